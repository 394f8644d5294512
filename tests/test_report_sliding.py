"""Figures whose slider moves something else than steps, or that have a strip below their curves."""

import csv
import math

import pytest

from gammabeta import _runs
from gammabeta.report import _content, page
from tests.test_report import (
    HOSTILE,
    chromium,
    claim,
    draw_all,
    opened,
    spec,
    write_derived,
    write_registry,
)

assert chromium  # a fixture

NETWORK, LINEAR = "a network fits sin(3x)", "control: a linear model fits 2x"
CENTERS = (-1.0, 0.5, 2.0)
GRID = tuple(-2 + 0.25 * k for k in range(21))
MOVED, SIGMOID = "#fig-small-fits-small-fits-moved", "#fig-layer-inputs-layer-inputs-sigmoid-inputs"


def bell(x, center, sd):
    return math.exp(-(((x - center) / sd) ** 2) / 2) / (sd * math.sqrt(2 * math.pi))


def moved_rows(seed):
    """A network that is right within 0.6 of the center and off by one elsewhere; a right line."""

    def row(panel, series, at, x, y):
        return {"kind": "curve", "curve": "moved", "panel": panel, "series": series, "at": at,
                "x": x, "y": y}  # fmt: skip

    for panel, target in ((NETWORK, lambda x: math.sin(3 * x)), (LINEAR, lambda x: 2 * x)):
        for x in GRID:
            for center in CENTERS:
                off = (abs(x - center) > 0.65) * (panel == NETWORK) * (0.9 + 0.2 * seed)
                yield row(panel, "fit", center, x, target(x) + off)
                if seed == 0:
                    yield row(panel, "density of the inputs", center, x, bell(x, center, 0.3))
            if seed == 0:
                yield row(panel, "target", None, x, target(x))


def sigmoid_rows(norm, seed):
    """Inputs that move from 0 to -2 in five steps with batch normalization, to -4 without."""
    panel, speed = ("with batch normalization", 0.4) if norm == "bn" else ("without", 0.8)
    head = {"kind": "curve", "curve": "sigmoid-inputs", "panel": panel}
    for x in (0.5 * k for k in range(-20, 21)):
        if seed == 0:
            yield {**head, "series": "sigmoid", "at": None, "x": x, "y": 1 / (1 + math.exp(-x))}
        for step in range(6):
            y = bell(x, -speed * step, 1)
            yield {**head, "series": "density", "at": step, "x": x, "y": y}


def write_rows(run, seeds=2):
    for seed in range(seeds):
        arm = {"claim": "dense-region", "part": "shown"}
        _runs.write_cell(run, spec(arm, seed, experiment="small-fits"), moved_rows(seed), "")
        for norm in ("bn", "none"):
            cell = spec({"norm": norm}, seed, experiment="layer-inputs")
            _runs.write_cell(run, cell, sigmoid_rows(norm, seed), "")
    return run


def figures(run):
    return {figure["id"]: figure for figure in _content.gather([run]).figures}


# --- from rows ------------------------------------------------------------------------------


def test_the_density_moves_under_the_fit_and_the_words_say_how_near_it_is(tmp_path):
    figure = figures(write_rows(tmp_path))["small-fits-moved"]
    assert (figure["kind"], figure["steps"], figure["opens"]) == ("steps", [-1.0, 0.5, 2.0], 0)
    for panel in figure["panels"]:
        fit, target, density = panel["series"]
        assert (fit["n"], target["n"], density["n"]) == (2, None, None)
        assert [s["fixed"] for s in (fit, target, density)] == [False, True, False]
        assert [s["below"] for s in (fit, target, density)] == [False, False, True]
        tops = [density["x"][y.index(max(y))] for y in density["y"]]
        assert tops == [-1.0, 0.5, 2.0]
    fit = figure["panels"][0]["series"][0]
    assert fit["x"][0] == -2
    assert [fit[k][1][0] - math.sin(-6) for k in ("lo", "y", "hi")] == pytest.approx([0.9, 1, 1.1])
    told = "A network fits sin(3x): mean distance to the target below 0.001 where the inputs are "
    told += "dense, 1 elsewhere. Control: a linear model fits 2x: mean distance to the target "
    told += "below 0.001 where the inputs are dense, below 0.001 elsewhere."
    assert figure["alt"].endswith(told)
    assert figure["caption"].endswith(told)
    assert "3 places of center m of the density, −1 to 2" in figure["alt"]


def test_densities_before_and_after_stand_beside_each_other(tmp_path):
    figure = figures(write_rows(tmp_path))["layer-inputs-sigmoid-inputs"]
    assert (figure["slider"], figure["steps"], figure["opens"]) == ("step", list(range(6)), 5)
    for panel, mean in zip(figure["panels"], (-2.0, -4.0), strict=True):
        sigmoid, density, before = panel["series"]
        assert before["y"] == [density["y"][0]]
        assert density["x"][density["y"][5].index(max(density["y"][5]))] == mean
        assert not sigmoid["below"]
        assert density["below"]
        assert before["below"]
    assert "deviation 0 ± 1 before training, −2 ± 1 at step 5. Without:" in figure["alt"]
    assert "0 ± 1 before training, −4 ± 1 at step 5." in figure["alt"]


def test_rows_of_wrong_types_and_of_one_place_make_no_figure(tmp_path):
    good = list(moved_rows(0))
    rows = [row for row in good if row["at"] in (None, 0.5)]
    for change in ({"at": "x"}, {"at": True}, {"panel": 3}, {"series": HOSTILE[:9]}, {"x": None}):
        rows += [{**row, **change} for row in good[:9]]
    cell = spec({"part": "shown"}, 0, experiment="small-fits")
    _runs.write_cell(tmp_path / "a", cell, rows, "")
    assert figures(tmp_path / "a") == {}
    huge = [{**row, "x": row["x"] * 1e300, "y": row["y"] * 2e307} for row in good]
    _runs.write_cell(tmp_path / "b", cell, huge, "")  # of a stranger: no error
    assert list(figures(tmp_path / "b")) == ["small-fits-moved"]
    lone = [row for row in good if row["series"] == "fit"]
    _runs.write_cell(tmp_path / "c", cell, lone, "")
    (figure,) = figures(tmp_path / "c").values()
    assert "mean distance" not in figure["alt"]


def test_a_slider_over_steps_says_so(tmp_path):
    rows = [{"kind": "spectrum", "layer": 1, "norm": "bn", "step": s, "x": x, "y": 1.0 + x + s}
            for s in (0, 5) for x in (0.0, 50.0)]  # fmt: skip
    arm = {"activation": "relu", "part": "fair"}
    _runs.write_cell(tmp_path, spec(arm, 0, experiment="jacobians"), rows, "")
    (figure,) = figures(tmp_path).values()
    assert (figure["slider"], figure["start"]) == ("step", True)


# --- in a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = write_rows(tmp_path_factory.mktemp("runs") / "run")
    claims = [claim("dense-region", experiment="small-fits")]
    write_registry(run, [*claims, claim("ics-def", experiment="layer-inputs")])
    write_derived(run, [], [])
    return page.write([run], tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def tab(chromium, made):
    with opened(chromium, made) as tab:
        draw_all(tab)
        yield tab


def plots(where, what):
    return f"[...document.querySelectorAll('{where} .plot')].map(p => {what})"


def drawn(tab, where, name):
    """y of one series of each panel, as it is drawn now."""
    found = tab.evaluate(
        plots(where, "p.data.filter(t => t.hovertemplate).map(t => [t.hovertemplate, t.y])")
    )
    return [next(y for text, y in traces if f"<b>{name}</b>" in text) for traces in found]


def test_the_slider_is_named_by_what_it_moves_and_moves_fit_and_density_alone(tab):
    found = tab.locator(MOVED)
    slider = found.get_by_role("slider", name="Center m of the density")
    assert slider.get_attribute("aria-valuetext") == "center m of the density -1"
    axes = plots(MOVED, "JSON.stringify(['xaxis', 'yaxis', 'yaxis2'].map(k => p.layout[k].range))")
    fixed, target = tab.evaluate(axes), drawn(tab, MOVED, "target")
    first = [drawn(tab, MOVED, name) for name in ("fit", "density of the inputs")]
    slider.focus()
    tab.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "center m of the density 0.5"
    fit, density = (drawn(tab, MOVED, name) for name in ("fit", "density of the inputs"))
    assert GRID[density[0].index(max(density[0]))] == 0.5
    assert fit[0] != first[0][0]
    assert fit[1] == first[0][1]  # of the linear model: the same wherever the inputs are
    assert density != first[1]
    assert tab.evaluate(axes) == fixed
    assert drawn(tab, MOVED, "target") == target
    tab.keyboard.press("Home")
    found.get_by_role("button", name="Play").focus()
    tab.keyboard.press("Enter")
    found.get_by_role("button", name="Pause").wait_for()
    found.get_by_role("button", name="Play").wait_for()  # it ends by itself
    assert found.locator("output").inner_text() == "2"
    assert tab.evaluate(axes) == fixed
    slider.focus()
    tab.keyboard.press("Home")


def test_what_lies_below_has_its_own_axis_under_the_curves(tab):
    for where in (MOVED, SIGMOID):
        ends = plots(where, "[p.layout.yaxis2.domain[1], p.layout.yaxis.domain[0]]")
        assert all(0 < below < above < 1 for below, above in tab.evaluate(ends))
        own = plots(where, "p.data.map(t => t.yaxis === 'y2')")
        assert all(set(found) == {True, False} for found in tab.evaluate(own))
        shown = plots(where, "JSON.stringify(p.layout.yaxis2.range)")
        assert len(set(tab.evaluate(shown))) == 1
    ranges = tab.evaluate(plots(MOVED, "p.layout.yaxis.range"))
    assert ranges[0] != ranges[1]  # sin(3x) and 2x would flatten each other


def test_before_stays_in_sight_and_the_last_step_is_shown_first(tab):
    found = tab.locator(SIGMOID)
    slider = found.get_by_role("slider", name="Step")
    assert slider.get_attribute("aria-valuetext") == "step 5"
    before, now = (drawn(tab, SIGMOID, name) for name in ("density before training", "density"))
    assert now != before
    slider.focus()
    tab.keyboard.press("Home")
    assert (
        drawn(tab, SIGMOID, "density") == before == drawn(tab, SIGMOID, "density before training")
    )
    tab.keyboard.press("End")
    assert found.locator(".legend > span").all_inner_texts() == [
        "sigmoid",
        "density",
        "density before training",
    ]


def test_a_formula_has_no_number_of_seeds(tab):
    texts = tab.evaluate(plots(MOVED, "p.data.map(t => t.hovertemplate).filter(Boolean)"))[0]
    by = {name: next(t for t in texts if f"<b>{name}</b>" in t) for name in ("fit", "target")}
    assert "n = 2" in by["fit"]
    assert "n = " not in by["target"]


def test_text_alternative_table_and_csv_hold_all_places(tab, tmp_path):
    found = tab.locator(MOVED)
    told = found.locator(".panels[role=img]").get_attribute("aria-label")
    assert told.startswith("What is fitted as the density of the inputs moves, for 3 places of")
    found.locator("details.table > summary").focus()
    tab.keyboard.press("Enter")
    found.locator("tbody tr").first.wait_for()
    names = found.locator("thead th").all_inner_texts()
    assert names == ["panel", "series", "n", "center m of the density", "x", "y", "lo", "hi"]
    with tab.expect_download() as download:
        found.get_by_role("button", name="Download CSV").click()
    assert download.value.suggested_filename == "small-fits-moved.csv"
    download.value.save_as(tmp_path / "moved.csv")
    with open(tmp_path / "moved.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 + 1 + 3) * len(GRID)
    targets = [row for row in rows if row["series"] == "target"]
    assert {row["center m of the density"] for row in targets} == {""}
    (one,) = [row for row in rows if (row["panel"], row["series"], row["x"]) ==
              (NETWORK, "density of the inputs", "0.5")
              and row["center m of the density"] == "0.5"]  # fmt: skip
    assert float(one["y"]) == pytest.approx(bell(0, 0, 0.3), rel=1e-4)
    found.locator("details.table > summary").click()


def test_the_place_of_the_slider_is_kept_in_the_address(chromium, made, tab):
    slider = tab.locator(MOVED).get_by_role("slider")
    slider.focus()
    tab.keyboard.press("End")
    tab.wait_for_timeout(700)
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    other = context.new_page()
    for address, place in ((tab.url, "2"), (made.as_uri(), "-1")):
        other.goto("about:blank")
        other.goto(address)
        draw_all(other)
        assert other.locator(MOVED).locator("output").inner_text() == place
    context.close()
    tab.keyboard.press("Home")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone(chromium, made, scheme):
    with opened(chromium, made, 390, color_scheme=scheme) as tab:
        draw_all(tab)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        for where in (MOVED, SIGMOID):
            boxes = tab.evaluate(
                f"[...document.querySelectorAll('{where} :is(.controls *, .plot, .legend span)')]"
                ".map(n => n.getBoundingClientRect()).map(b => [b.left, b.right, b.width])"
            )
            assert all(left >= 0 and right <= 390 for left, right, _ in boxes)
            assert tab.locator(where).get_by_role("slider").bounding_box()["width"] > 80
