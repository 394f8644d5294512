"""The published figures beside our rows: reading, agreement, which learning rate, redrawing."""

import itertools
import math
import random

import pytest

from gammabeta.studies import _published_figures as figures
from gammabeta.studies._redrawn import redrawn

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
    # one rate alone has its own panels only
    alone = redrawn("published", list(rows_of(FIGURES["fig-1"], 0.01)))
    assert [p["title"] for p in alone[0]["panels"]] == ["rate 0.01"]
