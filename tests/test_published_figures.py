"""The published figures beside our rows: reading, agreement, which learning rate, redrawing."""

import itertools
import json
import math
import random

import pytest

from gammabeta import _runs, cli
from gammabeta.report import page
from gammabeta.studies import _published_figures as figures
from gammabeta.studies._experiments import experiments
from gammabeta.studies._redrawn import redrawn
from tests.test_report import chromium, draw_all, opened, registry, write_derived, write_registry

assert chromium  # a fixture

FIGURES = {figure.id: figure for figure in figures.published()}


def rows_of(figure, rate, *, seeds=(0, 1, 2), change=lambda v: v, last=math.inf, sd=0.0):
    """Rows whose curves go through `change` of each published point, log-linear between."""
    luck = random.Random(1)
    for series, seed in itertools.product(figure.series, seeds):
        points = {p.step: change(p.value) for p in series.points}
        if 0 not in points:
            points[10] = min(points.values()) - 0.05
        off = luck.gauss(0, sd) if sd else 0.0
        for step, value in sorted(points.items()):
            if step <= last:
                yield {
                    **series.arm._asdict(),
                    "part": "published",
                    "rate": rate,
                    "seed": seed,
                    "step": step,
                    figures.COLUMNS[figure.quantity]: value + off,
                }


def summary(rows, figure):
    found = {s.figure: s for s in figures.summarize(figures.curves(list(rows)))}
    return found[figure]


def test_the_table_holds_the_numbers_of_the_published_figures():
    assert [*FIGURES] == ["fig-1", "fig-2", "fig-4", "fig-5", "fig-6", "fig-9"]
    assert sum(len(s.points) for f in FIGURES.values() for s in f.series) == 53
    for figure in FIGURES.values():
        assert figure.kind in ("accuracy", "magnitude")
        assert figure.name in figure.source
        assert figure.quantity in figures.COLUMNS
        arms = [series.arm for series in figure.series]
        assert len(set(arms)) == len(arms)
        # each panel of a figure has both arms
        by_panel = {figure.panel(arm): set() for arm in arms}
        for arm in arms:
            by_panel[figure.panel(arm)].add(arm.norm)
        assert all(norms >= {"bn", "none"} for norms in by_panel.values())
        for point in (p for s in figure.series for p in s.points):
            assert 0 < point.low <= point.high <= 1
            assert 0 <= point.step <= 40000
    sigmoid = figures.Arm("sigmoid", "sgd", 64, "none")
    (ends,) = [s.points for s in FIGURES["fig-1"].series if s.arm == sigmoid]
    assert [(p.step, p.value) for p in ends][-1] == (40000, 0.1329)


def test_curves_are_interpolated_in_the_logarithm_of_the_step():
    curve = ((1, 0.0), (10, 1.0), (1000, 3.0))
    assert figures.at(curve, 31.6227766) == pytest.approx(1.5)
    assert figures.at(curve, 10) == 1.0
    assert figures.at(curve, 0) == 0.0, "the first step stands for the start"
    assert figures.at(curve, 1001) is None
    assert figures.at(((10, 1.0), (20, 2.0)), 0) is None
    assert figures.at(((10, 1.0), (20, 2.0)), 5) is None
    assert figures.at(((0, 0.0), (1, 5.0), (100, 7.0)), 1) == 5.0
    assert figures.at(((0, 0.0), (1, 5.0), (100, 7.0)), 0) == 0.0
    assert figures.at(((0, 0.0), (100, 2.0)), 10) == pytest.approx(1.0)
    assert figures.at((), 1) is None


def test_a_mean_curve_has_the_steps_of_all_its_seeds():
    by_seed = {0: ((1, 0.0), (10, 2.0)), 1: ((1, 1.0), (20, 2.0))}
    assert figures.mean_curve(by_seed) == ((1, 0.5),)
    assert figures.mean_curve({}) == ()


@pytest.mark.parametrize(
    ("kind", "low", "high", "ours", "verdict"),
    [
        ("accuracy", 0.95, 0.95, 0.9599, True),
        ("accuracy", 0.95, 0.95, 0.9401, True),
        ("accuracy", 0.95, 0.95, 0.9611, False),
        ("accuracy", 0.95, 0.95, 0.9389, False),
        ("magnitude", 0.1, 0.1, 0.1119, True),
        ("magnitude", 0.1, 0.1, 0.1121, False),
        ("magnitude", 0.1, 0.1, 0.0881, True),
        ("magnitude", 0.1, 0.1, 0.0879, False),
        ("magnitude", 0.13, 0.15, 0.1679, True),
        ("magnitude", 0.13, 0.15, 0.1143, False),
    ],
)
def test_a_point_agrees_within_its_tolerance(kind, low, high, ours, verdict):
    curve = ((1, ours), (1000, ours), (2000, ours))
    assert figures.agrees(kind, figures.Point(1000, low, high), ours, curve) is verdict


def test_an_accuracy_also_agrees_where_the_curve_meets_it_near_its_step():
    steep = ((900, 0.6), (1000, 0.7), (1100, 0.8))
    # at step 1050 the curve has about 0.751
    assert figures.agrees("accuracy", figures.Point(1000, 0.745, 0.745), 0.7, steep)
    assert not figures.agrees("accuracy", figures.Point(1000, 0.78, 0.78), 0.7, steep)
    assert figures.agrees("accuracy", figures.Point(1000, 0.66, 0.66), 0.7, steep)
    # a magnitude has one tolerance
    assert not figures.agrees("magnitude", figures.Point(1000, 0.83, 0.83), 0.7, steep)


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
@pytest.mark.parametrize("rate", figures.RATES)
def test_rows_on_the_points_agree_and_decide_the_rate(figure, rate):
    other = next(r for r in figures.RATES if r != rate)
    rows = [*rows_of(figure, rate), *rows_of(figure, other, change=lambda v: 0.7 * v)]
    found = summary(rows, figure.id)
    count = sum(len(s.points) for s in figure.series)
    assert (found.agree[rate], found.compared[rate]) == (count, count)
    assert (found.agree[other], found.compared[other]) == (0, count)
    assert (found.rate, found.decided_on, found.points) == (rate, count, count)


def test_nothing_is_decided_where_the_rates_are_alike_or_one_is_missing():
    figure = FIGURES["fig-5"]
    same = [row for rate in figures.RATES for row in rows_of(figure, rate)]
    assert summary(same, "fig-5").rate is None
    alone = summary(rows_of(figure, 0.01), "fig-5")
    assert (alone.rate, alone.decided_on, alone.compared) == (None, 0, {0.01: 8, 0.0001: 0})
    # one seed of three on the other side
    rows = [*rows_of(figure, 0.01), *rows_of(figure, 0.0001, change=lambda v: v - 0.1)]
    assert summary(rows, "fig-5").rate == 0.01
    rows += [*rows_of(figure, 0.01, seeds=[3], change=lambda v: v - 0.2)]
    rows += [*rows_of(figure, 0.0001, seeds=[3])]
    assert summary(rows, "fig-5").rate is None


def test_a_point_that_no_run_reaches_is_not_compared():
    rows = list(rows_of(FIGURES["fig-1"], 0.01, last=1000))
    points = [p for p in figures.compare(figures.curves(rows)) if p.figure == "fig-1"]
    reached = [p for p in points if p.agrees is not None]
    assert {(p.rate, p.step) for p in reached} == {(0.01, 0)}
    assert all(p.ours is None and p.n == 0 for p in points if p.agrees is None)


def test_a_difference_is_ours_minus_the_published_with_the_interval_over_seeds():
    figure = FIGURES["fig-6"]
    rows = rows_of(figure, 0.01, change=lambda v: v - 0.02, sd=0.003)
    points = figures.compare(figures.curves(list(rows)))
    points = [p for p in points if p.figure == "fig-6" and p.ours is not None]
    assert len(points) == 8
    for p in points:
        assert p.n == 3
        assert p.lo < p.ours < p.hi
        assert p.difference == pytest.approx(p.ours - p.published)
    one = figures.compare(figures.curves(list(rows_of(figure, 0.01, seeds=[0]))))
    assert all(p.lo is None and p.n == 1 for p in one if p.ours is not None)


def test_rows_of_other_parts_and_arms_are_no_curves():
    row = next(iter(rows_of(FIGURES["fig-6"], 0.01)))
    assert len(figures.curves([row])) == 1
    for change in (
        {"part": "fair"},
        {"norm": "whitened"},
        {"activation": "cube"},
        {"optimizer": "lion"},
        {"rate": None},
        {"step": None},
    ):
        assert figures.curves([row | change]) == {}
    # the defaults of the study
    del row["optimizer"], row["batch"]
    ((arm, _, _),) = figures.curves([row])
    assert (arm.optimizer, arm.batch) == ("sgd", 64)


def test_each_published_figure_is_drawn_with_a_panel_for_each_rate():
    rows = [
        row
        for figure in FIGURES.values()
        for rate in figures.RATES
        for row in rows_of(figure, rate, sd=0.001)
    ]
    drawn = redrawn("published", rows)
    assert [figure["id"] for figure in drawn] == [f"published-{key}" for key in FIGURES]
    for figure, of in zip(drawn, FIGURES.values(), strict=True):
        panels = {of.panel(series.arm) for series in of.series}
        assert len(figure["panels"]) == len(panels) * len(figures.RATES)
        marks = [s for p in figure["panels"] for s in p["series"] if s["style"].endswith("-points")]
        lines = [
            s for p in figure["panels"] for s in p["series"] if not s["style"].endswith("-points")
        ]
        assert len(marks) == len(lines) == len(of.series) * len(figures.RATES)
        for s in lines:
            assert all(lo < y < hi for lo, y, hi in zip(s["lo"], s["y"], s["hi"], strict=True))
        shown = sum(len(s["x"]) for s in marks) // len(figures.RATES)
        assert shown == sum(len(s.points) for s in of.series)
    assert redrawn("published", []) == []
    assert redrawn("published", [row | {"data": "digits"} for row in rows]) == []
    (only,) = redrawn("published", rows, only=["fig-9"])
    assert only["id"] == "published-fig-9"
    # one rate alone has its own panels only
    alone = redrawn("published", list(rows_of(FIGURES["fig-1"], 0.01)))
    assert [p["title"] for p in alone[0]["panels"]] == ["rate 0.01"]


# --- the command, and the page --------------------------------------------------------------


def store(run, *, rates=figures.RATES, data="mnist"):
    """Cells of the experiment `activations` that go through Fig. 4 at rate 0.0001."""
    digest = experiments()["activations"].code_of("full")
    for rate, seed, series in itertools.product(rates, (0, 1, 2), FIGURES["fig-4"].series):
        off = 0.001 * seed + (0.04 if rate == 0.01 else 0.0)
        spec = {
            "schema": _runs.SCHEMA,
            "experiment": "activations",
            "arm": {
                "part": "published",
                "activation": series.arm.activation,
                "norm": series.arm.norm,
                "rate": rate,
            },
            "seed": seed,
            "budget": "full",
            "data": {"name": data, "digest": "0123456789abcdef"},
            "code": digest,
            "versions": {"gammabeta": "0", "torch": "0", "python": "0"},
            "cpu_seconds": 1.0,
        }
        rows = [
            {"step": p.step, "accuracy": p.value - off, "diverged": False, "loss": 1.0}
            for p in series.points
        ]
        _runs.write_cell(run, spec, rows, "")
    return run


@pytest.fixture
def show(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as ended:
            cli.main(["study", "show", *map(str, words)])
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return call


def test_show_published_prints_ours_beside_the_published_numbers(show, tmp_path):
    code, out, err = show("--published", store(tmp_path / "run"))
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    fig_4 = out[out.index("Fig. 4") : out.index("Fig. 5")]
    assert "ReLU, BN" in fig_4
    assert "  10k  " in fig_4
    assert "1e-4  0.964 [0.962, 0.966]  -0.001  +" in fig_4
    assert sum(line.rstrip().endswith("-0.041  -") for line in fig_4.splitlines()) == 20
    assert "agree: 0 of 20 at rate 0.01, 20 of 20 at rate 1e-4; published: 20" in fig_4
    assert "made with rate 1e-4" in fig_4
    assert "not reached" in out[: out.index("Fig. 4")]
    assert "rate not decided" in out[: out.index("Fig. 4")]
    assert "activations, budget full" in " ".join(out.split())


def test_show_published_gives_the_same_as_json(show, tmp_path):
    code, out, _ = show("--published", store(tmp_path / "run"), "--json")
    assert code == 0
    told = json.loads(out)
    assert told["tolerance"] == {"accuracy": 0.01, "steps": 0.05, "magnitude": 0.12}
    assert len(told["rows"]) == 2 * 53
    (fig_4,) = [f for f in told["figures"] if f["figure"] == "fig-4"]
    assert fig_4["decided_rate"] == 0.0001
    assert [(r["rate"], r["agree"], r["compared"]) for r in fig_4["rates"]] == [
        (0.01, 0, 20),
        (0.0001, 20, 20),
    ]
    rows = [r for r in told["rows"] if r["figure"] == "fig-4" and r["rate"] == 0.0001]
    assert all(r["lo"] < r["ours"] < r["hi"] for r in rows)
    # the sigmoid curves of Fig. 4 are those of Fig. 6 at batch 64 as well
    (fig_6,) = [f for f in told["figures"] if f["figure"] == "fig-6"]
    assert fig_6["rates"][0]["compared"] == 2


def test_show_published_says_what_it_needs(show, tmp_path):
    code, _, err = show("--published", "act-all")
    assert code == 2
    assert "run folders only" in err
    code, _, err = show("--published", store(tmp_path / "digits", data="digits"))
    assert code == 2
    assert "on MNIST were expected" in err
    assert "gammabeta study run published" in err


def test_the_page_draws_published_numbers_as_marks_over_our_bands(chromium, tmp_path):
    run = store(tmp_path / "run")
    rows = [row for cell in _runs.read_cells([run]) for row in cell.flat()]
    figure = next(f for f in redrawn("activations", rows) if f["id"] == "activations-fig-4")
    write_registry(run, registry())
    write_derived(run, [], [figure])
    with opened(chromium, page.write([run], tmp_path / "report.html")) as tab:
        draw_all(tab)
        plots = tab.locator(".plot")
        assert plots.count() == 10
        told = plots.first.evaluate(
            "p => p.data.map(t => [t.mode, t.marker ? t.marker.symbol : '', t.x, t.y])"
        )
        marks = [t for t in told if t[0] == "markers"]
        assert marks == [
            ["markers", "diamond", [10000, 40000], [0.965, 0.9745]],
            ["markers", "diamond-open", [10000, 40000], [0.942, 0.97]],
        ]
        # two curves, each with the edges of its band
        assert len(told) - len(marks) == 6
        names = tab.locator("figure .legend > span").all_inner_texts()
        assert names == [s["name"] for s in figure["panels"][0]["series"]]
        # a line for each curve, a diamond for each set of published numbers
        assert tab.locator("figure .legend svg path[d='M0 6h36']").count() == 2
        assert tab.locator("figure .legend svg path[d^='M18 1.2']").count() == 2
