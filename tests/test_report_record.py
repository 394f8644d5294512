"""What the page shows of recorded trainings: every series, the slider, and nothing that runs."""

import importlib
import json
import math
import re

import pytest

from gammabeta import cli
from gammabeta._runs import RunError, read_record
from gammabeta._runs._record import RecordFile, encoded, header
from gammabeta.report import _records, page
from tests.test_report import HOSTILE, chromium, draw_all, opened, write_registry, write_run

assert chromium  # a fixture

LAYERS = [f"layer{n // 4}.{n % 4}.conv" for n in range(20)]


def about(**fields):
    given = {"gammabeta": "0.1.0", "torch": "2.13.0", "model": "ResNet", "parameters": 272474}
    given |= {"probes": ["weights", "jacobian", "influence"], "every": 50, "max_overhead": 0.05}
    return header(**{**given, "notes": ["A step is a call of Recorder.step."], **fields})


def row(step, layers=20, **fields):
    """Norms that grow with depth and step, spectra that widen, and a triangle of influences."""
    weights = {f"{n}/norm": 1 + at + step / 100 for at, n in enumerate(LAYERS[:layers])}
    spectra = {
        f"{n}/singular_values": [math.exp((20 - k) * step / 5000 - at) for k in range(40)][::-1]
        for at, n in enumerate(LAYERS[:3])
    }
    matrix = {"matrix": [[float(k < m) * (1 + step) for m in range(4)] for k in range(4)]}
    values = {"weights": {**weights, "mean": 0.1}, "jacobian": spectra, "influence": matrix}
    cost = {"seconds": 0.02, "overhead": 0.031}
    return {"step": step, **cost, "loss": 2.0, "values": values, **fields}


def written(path, *rows, **fields):
    file = RecordFile(path, about(**fields))
    for line in rows:
        file.append(line)
    return path


def write(paths, out):
    return page.write(paths, out).read_text(encoding="utf-8")


def figures_of(html):
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html)
    return json.loads(found.group(1))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    failed = {"errors": {"own": "ValueError: no"}}
    rows = [row(step, **(failed if step == 100 else {})) for step in range(0, 500, 50)]
    return written(folder / "record.jsonl", *rows, {"resumed": 450}, row(450))


# --- what it says ---------------------------------------------------------------------------


def test_the_page_of_a_record_says_what_was_measured_and_what_it_cost(path, tmp_path):
    html = write([path], tmp_path / "page.html").split('id="figures"')[0]
    for text in (
        "<title>What a training showed</title>",
        "ResNet, 272\u202f474 parameters",
        "weights, jacobian, influence",
        "every 50 steps",
        "10, steps 0 to 450",
        "3.1 % of the training&#39;s time, limit 5 %",
        "A step is a call of Recorder.step.",
        "own failed at 1 of 10 records, first at step 100: ValueError: no",
        "Continued by a later process from step 450.",
    ):
        assert text in html, text
    assert 'id="verdicts"' not in html
    assert str(tmp_path) not in html


def test_records_that_were_skipped_for_their_cost_are_counted(tmp_path):
    def fact(**fields):
        rows = [row(step) for step in (0, 50, 400, 950, 1450)]
        found = _records.recording(written(tmp_path / "r.jsonl", *rows, **fields), "r", 0)
        (tmp_path / "r.jsonl").unlink()
        return dict(found.facts)["Records"]

    told = "5 of 30 records taken, 25 skipped to stay under 5 % (max_overhead= raises it)"
    assert fact().endswith(told)
    assert "skipped" not in fact(max_overhead=None)
    assert "skipped" not in fact(every=None)


def test_a_quantity_with_a_name_that_does_not_say_it_has_a_sentence(tmp_path):
    """The names are those that the probes give; each sentence is there for one of them."""
    values = {}
    for name in _records._MEANINGS:
        probe, _, quantity = name.partition(": ")
        key = quantity.replace(" ", "_")
        values.setdefault(probe.replace(" ", "_"), {})[f"0/{key}"] = 1.0
    path = written(tmp_path / "r.jsonl", row(0, values=values), row(50, values=values))
    figures = _records.recording(path, "r", 0).figures
    said = {figure["title"]: figure["caption"] for figure in figures}
    for name, sentence in _records._MEANINGS.items():
        assert sentence in said[name]
    for probe, quantities in values.items():
        docs = importlib.import_module(f"gammabeta.probes.{probe}").__doc__
        for key in quantities:
            assert re.search(rf"`(<\w+>/)?{key.partition('/')[2]}`", docs), key


def test_every_number_of_a_small_record_is_in_the_page(path, tmp_path):
    figures = figures_of(write([path], tmp_path / "page.html"))
    kinds = {figure["title"]: figure["kind"] for figure in figures}
    assert kinds == {
        "The whole network": "whole",
        "weights: norm": "layers",
        "jacobian: singular values": "spectrum",
        "influence: matrix": "matrix",
    }
    record = read_record(path)
    norms = figures[1]
    assert norms["layers"] == LAYERS
    assert norms["steps"] == record.steps
    for name, values in zip(norms["layers"], norms["values"], strict=True):
        assert values == pytest.approx(record.series[f"weights/{name}/norm"].values, rel=1e-4)
    spectrum = figures[2]["values"][1][3]
    stored = record.series[f"jacobian/{LAYERS[1]}/singular_values"].values[3]
    assert spectrum == pytest.approx(sorted(stored, reverse=True), rel=1e-4)
    assert figures[2]["log"]
    assert not figures[3]["log"]
    whole = {panel["title"]: panel["y"] for panel in figures[0]["panels"]}
    assert [*whole] == ["loss", "seconds", "overhead", "weights: mean"]


def test_a_quantity_that_comes_late_or_is_not_finite_leaves_a_gap(tmp_path):
    first = row(0, layers=1)
    del first["values"]["weights"][f"{LAYERS[0]}/norm"]
    last = row(100, layers=1)
    last["values"]["weights"][f"{LAYERS[0]}/norm"] = encoded(math.inf)
    path = written(tmp_path / "record.jsonl", first, row(50, layers=1), last)
    figures = figures_of(write([path], tmp_path / "page.html"))
    norms = figures[1]  # in order of the probes, though it came last
    assert norms["title"] == "weights: norm"
    assert norms["steps"] == [50, 100]
    assert norms["values"] == [[1.5, None]]
    assert "1 values are not finite" in norms["caption"]


def test_a_long_record_is_drawn_at_fewer_steps_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(_records, "_NUMBERS", 1000)
    path = written(tmp_path / "record.jsonl", *(row(50 * k) for k in range(30)))
    html = write([path], tmp_path / "page.html")
    steps = figures_of(html)[1]["steps"]
    assert len(steps) < 12
    assert (steps[0], steps[-1]) == (0, 1450)
    assert f"Drawn are {len(steps)} of 30 records" in html


def test_the_largest_record_makes_a_page_within_its_limit(tmp_path):
    def many(step):
        values = {"w": {f"l{n}/q{q}": step + n / 7 for n in range(160) for q in range(10)}}
        return row(step, values=values)

    path = written(tmp_path / "record.jsonl", *(many(k) for k in range(250)))
    assert len(write([path], tmp_path / "page.html").encode()) < page.LIMIT


def test_records_and_run_folders_stand_on_one_page(path, tmp_path):
    run = tmp_path / "run"
    write_registry(run, [])
    other = written(tmp_path / "other.jsonl", row(0))
    html = write([path, run, other], tmp_path / "page.html")
    assert html.index('id="verdicts"') < html.index('id="record-0"') < html.index('id="record-1"')
    assert "<title>Batch normalization, claim by claim</title>" in html
    assert [figure["place"] for figure in figures_of(html)] == list(range(8))


def test_a_record_without_a_row_or_with_an_unfinished_one_is_shown(tmp_path):
    path = written(tmp_path / "record.jsonl")
    with open(path, "a") as file:
        file.write('{"step": 0')
    html = write([path], tmp_path / "page.html")
    assert "Nothing has been recorded yet." in html
    assert "The last line of the file is unfinished" in html


def test_hostile_texts_of_a_record_are_data(tmp_path):
    text = "".join(char for char in HOSTILE if char.isprintable())
    values = {text.replace("/", ""): {f"{text}/{text}": 1.0, f"{text}/v": [1.0], text: 2.0}}
    given = {"model": text, "notes": [text], "probes": [text], "gammabeta": text, "torch": text}
    path = written(tmp_path / "x<b>.jsonl", row(0, values=values, errors={text: text}), **given)
    html = write([path], tmp_path / "page.html")
    assert "<img" not in html
    assert "x<b>" not in html
    assert html.count("<script") == html.count("</script>") == 4


@pytest.fixture
def report(capsys):
    """The command, in this process."""

    def call(*words):
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", *map(str, words)])
        return ended.value.code, *capsys.readouterr()

    return call


def test_the_command_takes_records_and_says_what_is_wrong_with_one(
    report, path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, shown, said = report(path, "-o", "page.html")
    assert (code, shown) == (0, "page.html\n"), said
    bad = tmp_path / "bad.jsonl"
    bad.write_text(path.read_text().replace('"step": 50', '"step": -50', 1))
    code, _, said = report(bad, "-o", "bad.html")
    assert code == 2
    assert "bad.jsonl: line 3: step: expected 0, 1, ..., got -50." in said
    assert not (tmp_path / "bad.html").exists()
    with pytest.raises(RunError):
        page.write([bad], tmp_path / "bad.html")


@pytest.mark.parametrize("way", ["same", "dotted", "link", "hard link", "in a run folder"])
def test_a_page_never_takes_the_place_of_what_it_shows(way, report, path, tmp_path):
    record = tmp_path / "r.jsonl"
    record.write_bytes(path.read_bytes())
    given, out, kept = record, record, record
    if way == "dotted":
        (tmp_path / "sub").mkdir()
        out = tmp_path / "sub" / ".." / "r.jsonl"
    elif way == "link":
        out = tmp_path / "page.html"
        out.symlink_to(record)
    elif way == "hard link":
        out = tmp_path / "page.html"
        out.hardlink_to(record)
    elif way == "in a run folder":
        given = tmp_path / "run"
        write_run(given)
        out = kept = given / "claims.json"
    before = kept.read_bytes()
    code, shown, said = report(given, "-o", out)
    assert (code, shown) == (2, "")
    assert "must not take the place" in said
    assert kept.read_bytes() == before


# --- in a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(path, tmp_path_factory):
    return page.write([path], tmp_path_factory.mktemp("page") / "record.html")


@pytest.mark.parametrize("width", [390, 1280])
def test_it_opens_without_network_draws_all_and_does_not_overflow(chromium, made, width):
    with opened(chromium, made, width) as tab:
        draw_all(tab)
        assert tab.locator(".plot .main-svg").count() >= 8
        assert tab.locator("[data-figure='1'] .panel:first-child path.js-line").count() == 20
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_the_slider_shows_a_step_by_keyboard(chromium, made):
    shown = "node => [...node.querySelectorAll('.plot')].at(-1).data.at(-1)"
    with opened(chromium, made) as tab:
        draw_all(tab)
        for place, quantity in (("1", "y"), ("2", "y"), ("3", "z")):
            figure = tab.locator(f"[data-figure='{place}']")
            slider = figure.get_by_role("slider", name="Step")
            before = figure.evaluate(shown)[quantity]
            assert slider.get_attribute("aria-valuetext") == "step 450"
            slider.focus()
            tab.keyboard.press("ArrowLeft")
            assert slider.get_attribute("aria-valuetext") == "step 400"
            assert figure.locator("output").inner_text() == "400"
            assert figure.evaluate(shown)[quantity] != before
            tab.keyboard.press("Home")
            assert figure.locator("output").inner_text() == "0"
        norms = tab.locator("[data-figure='1']").evaluate(shown)["y"]
        assert norms == pytest.approx([1 + n for n in range(20)])


def test_a_layer_is_pointed_out_by_more_than_its_color(chromium, made):
    widths = (
        "node => [...node.querySelector('.plot').data].map(t => [t.line.width, t.opacity]).at(-1)"
    )
    with opened(chromium, made) as tab:
        draw_all(tab)
        figure = tab.locator("[data-figure='1']")
        assert figure.evaluate(widths) == [1.8, 1]
        modes = "node => [...node.querySelector('.plot').data].map(t => t.mode)"
        for at in (0, 1):  # each record is seen, and so is a hole between two
            found = tab.locator(f"[data-figure='{at}']").evaluate(modes)
            assert set(found) == {"lines+markers"}
        figure.get_by_label("Point out").select_option(LAYERS[7])
        assert figure.evaluate(widths) == [3.5, 1]
        name = "node => node.querySelector('.plot').data.at(-1).hovertemplate"
        assert LAYERS[7] in figure.evaluate(name)


def test_the_numbers_of_a_record_can_be_read_as_a_table(chromium, made):
    with opened(chromium, made) as tab:
        tab.evaluate("document.querySelectorAll('details.table').forEach(d => { d.open = true })")
        tab.locator("[data-figure-table='3'] table.data").wait_for()
        counts = [
            tab.locator(f"[data-figure-table='{n}'] [role=status]").inner_text() for n in range(4)
        ]
        assert counts == [
            "40 of 40 rows",
            "200 of 200 rows",
            "200 of 1200 rows",
            "160 of 160 rows",
        ]


def test_nothing_of_a_hostile_record_runs(chromium, tmp_path):
    text = "".join(char for char in HOSTILE if char.isprintable())
    values = {"p": {f"{text}/{text}{n}": 1.0 + n for n in range(3)}}
    values["p"] |= {f"{text}/v": [1.0, 2.0], f"{text}/m": [[1.0]], text: 2.0}
    path = written(tmp_path / "r.jsonl", row(0, values=values), row(50, values=values), model=text)
    with opened(chromium, page.write([path], tmp_path / "page.html"), 390) as tab:
        draw_all(tab)
        tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        tab.locator(".plot").last.hover()
        assert tab.evaluate("window.hacked") is None
        assert tab.locator("img").count() == 0
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
