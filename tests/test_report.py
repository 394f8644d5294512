"""The page: what it says, that nothing in a run folder can run in it, and how it behaves."""

import csv
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from gammabeta import _runs
from gammabeta.report import _embed, _marks, page

RESULTS = Path(__file__).resolve().parents[1] / "results"
ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "softplus", "tanh")
GAIN = {"relu": 0.3, "leaky_relu": 0.6, "sigmoid": 2.9, "softplus": 1.1, "tanh": -0.2}
STEPS = (1, 3, 10, 30, 100, 300, 1000, 2000)
HOSTILE = '</script><img src=x onerror="window.hacked=1"><!-- \u2028 {{7*7}} \'"&amp; \ud800'


# --- run folders as the runner writes them --------------------------------------------------


def claim(name, **fields):
    """One entry of the registry."""
    return {
        "id": name,
        "title": f"The claim {name} as one sentence.",
        "question": f"Does {name} hold?",
        "origin": "text",
        "source": "Chang et al. 2018",
        "kind": "statistical",
        "topic": "accuracy",
        "reported": "",
        "rule": "Superiority, five activations, universal.",
        "caveats": "One learning rate for all arms in the source.",
        "headline": False,
        "thresholds": {},
        **fields,
    }


def registry():
    """Three claims of one experiment and as many others as a real registry has."""
    delta = {"experiment": "activations", "thresholds": {"delta": 0.5}}
    first = [
        claim(
            "act-all",
            question="Does batch normalization help whatever the activation?",
            title="Batch normalization raises the accuracy whatever the activation.",
            reported="+0.45 (ReLU) to +3.6 points (sigmoid) after 40,000 steps, one run each.",
            headline=True,
            **delta,
        ),
        claim("act-sigmoid-most", question="Does it help the sigmoid most?", **delta),
        claim("act-late", question="Does the gain last?", **delta),
    ]
    topics = ("gradients", "speed", "learning-rate", "covariate-shift", "smoothness")
    rest = [
        claim(f"other-{n}", topic=topics[n % 5], headline=n < 4, origin="beyond", rule="")
        for n in range(150)
    ]
    return [*first, *rest]


def spec(arm, seed, data="mnist", experiment="activations"):
    return {
        "schema": _runs.SCHEMA,
        "experiment": experiment,
        "arm": arm,
        "seed": seed,
        "budget": "small",
        "data": {"name": data, "digest": "0123456789abcdef"},
        "code": "fedcba9876543210",
        "versions": {"gammabeta": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
    }


def rows_of(activation, norm, seed):
    """Accuracies that rise with the step, with a seed's own luck; the same at every call."""
    luck = random.Random(f"{activation} {norm} {seed}").gauss(0, 0.35)
    gain = GAIN[activation] if norm == "bn" else 0.0
    slow = 3.0 if norm == "none" else 1.0
    for step in STEPS:
        accuracy = 94 + gain + luck - 84 * math.exp(-math.log1p(step) / slow)
        yield {"step": step, "accuracy": accuracy, "loss": 5 - accuracy / 20, "train_seconds": 0.1}


def outcome(name, mean, spread, status, part="done fairly"):
    return {
        "name": name,
        "part": part,
        "effect": mean,
        "lo": mean - spread,
        "hi": mean + spread,
        "n": 5,
        "status": status,
    }


def verdict(name, **fields):
    return {
        "claim": name,
        "experiment": "activations",
        "status": "refuted",
        "published_status": "supported",
        "effect": -0.2,
        "ci": [-0.55, 0.15],
        "n": 5,
        "unit": "points",
        "reported": "+0.45 to +3.6 points",
        "budget": "small",
        "data": "mnist",
        "delta": 0.5,
        "half_width": 0.35,
        "planned_half_width": 0.25,
        "sentence": "Not for tanh: the gain is −0.2 points, below the 0.5 that would matter.",
        "cells": [],
        "notes": [],
        "place": "MNIST, MLP 100-100",
        **fields,
    }


def verdicts():
    cells = [
        outcome(name, gain, 0.35, "supported" if gain > 0.5 else "refuted")
        for name, gain in GAIN.items()
    ]
    cells += [
        outcome(name, gain + 0.7, 0.3, "supported", "as published") for name, gain in GAIN.items()
    ]
    most = {"status": "supported", "effect": 1.8, "ci": [1.2, 2.4], "half_width": 0.6}
    return [
        verdict("act-all", cells=cells, notes=["Holm over five activations."]),
        verdict("act-sigmoid-most", sentence="Yes: by 1.8 points more than softplus.", **most),
    ]


def figure(**fields):
    panels = []
    for activation in ACTIVATIONS:
        series = []
        for norm, name in (("bn", "with batch normalization"), ("none", "without")):
            runs = [[row["accuracy"] for row in rows_of(activation, norm, s)] for s in range(5)]
            columns = list(zip(*runs, strict=True))
            series.append(
                {
                    "name": name,
                    "style": norm,
                    "n": 5,
                    "x": list(STEPS),
                    "y": [sum(values) / 5 for values in columns],
                    "lo": [min(values) for values in columns],
                    "hi": [max(values) for values in columns],
                }
            )
        panels.append({"title": activation, "series": series})
    return {
        "id": "accuracy",
        "experiment": "activations",
        "kind": "curves",
        "title": "Test accuracy while training",
        "caption": "Mean of five seeds; the band holds all of them.",
        "alt": "Five panels, one per activation: accuracy over training steps.",
        "x": {"label": "training step", "log": True},
        "y": {"label": "test accuracy, %", "log": False},
        "panels": panels,
        **fields,
    }


def write_registry(run, claims):
    run.mkdir(parents=True, exist_ok=True)
    _runs.write_json(run / "claims.json", {"schema": 1, "claims": claims})


def write_derived(run, entries, figures, **fields):
    derived = {"schema": 1, "gammabeta": "0.1.0", "verdicts": entries, "surprises": []}
    _runs.write_json(run / "verdicts.json", {**derived, "notice": None, **fields})
    _runs.write_json(run / "figures.json", {"schema": 1, "figures": figures})


def write_run(run, data="mnist", seeds=5):
    write_registry(run, registry())
    for activation, norm, seed in itertools.product(ACTIVATIONS, ("bn", "none"), range(seeds)):
        cell = spec({"activation": activation, "norm": norm}, seed, data)
        _runs.write_cell(run, cell, rows_of(activation, norm, seed), "")
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run folder with everything in it, a failed cell included."""
    run = write_run(tmp_path_factory.mktemp("runs") / "headline")
    write_derived(
        run,
        verdicts(),
        [figure()],
        surprises=["“Whatever the activation” did not survive a fair learning rate: tanh lost."],
        protocols={"activations": "Five activations.\n\nTwo arms, five seeds."},
    )
    arm = {"activation": "relu", "norm": "bn"}
    error = (
        "Traceback (most recent call last):\n  File x\nValueError: loss is not finite\n\nagain: y"
    )
    _runs.write_failed(run, spec(arm, 99), error)
    return run


def text_of(paths, out):
    return page.write(paths, out).read_text(encoding="utf-8")


def without_scripts(html):
    return re.sub(r"<script.*?</script>", "", html, flags=re.S)


# --- what it says ---------------------------------------------------------------------------


def test_the_first_screen_holds_both_verdicts_effect_interval_n_and_place(whole, tmp_path):
    html = without_scripts(text_of([whole], tmp_path / "report.html"))
    row = re.search(r'<tr role="row">\s*<td.*?</tr>', html, re.S).group()
    assert "Does batch normalization help whatever the activation?" in row
    assert row.index("s-supported") < row.index("s-refuted")
    assert re.search(r"−0\.2</b> points", row)
    assert "[−0.55, +0.15]" in row
    assert (
        'aria-label="effect −0.2, interval −0.55 to +0.15, smallest effect that matters 0.5"' in row
    )
    assert "on MNIST, MLP 100-100 · budget small" in row
    assert ">5</td>" in row
    assert re.search(r'grade g-c">C</b> · no variation tried', row)
    assert html.index("did not survive a fair learning rate") < html.index(row)


def test_the_first_screen_holds_the_headline_claims_and_at_most_twelve_rows(tmp_path):
    run = tmp_path / "run"

    def shown(count, headline):
        write_registry(run, [claim(f"c{n}", headline=n in headline) for n in range(20)])
        write_derived(run, [verdict(f"c{n}") for n in range(count)], [])
        html = text_of([run], tmp_path / "report.html")
        return re.findall(
            r'<td role="cell" class="question">\s*<a href="#verdict-(c\d+)">', html
        ), html

    rows, html = shown(20, range(10, 20))
    assert rows == [f"c{n}" for n in range(10, 20)]
    assert "10 more verdicts" in html
    assert shown(4, {3})[0] == ["c3", "c0", "c1", "c2"]  # few: all of them
    assert shown(20, ())[0] == [f"c{n}" for n in range(12)]


def test_every_claim_is_listed_with_and_without_runs(whole, tmp_path):
    html = text_of([whole], tmp_path / "report.html")
    for entry in registry():
        assert f'id="claim-{entry["id"]}"' in html
    assert re.search(r'id="claim-other-7" data-status="none"', html)
    assert re.search(r'id="claim-act-all" data-status="refuted"', html)


def test_an_experiment_shows_protocol_caveats_failure_and_both_commands(whole, tmp_path):
    html = text_of([whole], tmp_path / "report.html")
    section = html[html.index('id="exp-activations"') :]
    for text in (
        "Two arms, five seeds.",
        "One learning rate for all arms in the source.",
        "ValueError: loss is not finite",
        "gammabeta study run activations --budget small --data mnist --out runs/activations",
        "gammabeta study judge headline --set act-all.delta=0.25",
        "gammabeta study judge headline --set act-sigmoid-most.delta=1<",
        "no verdict on <code>act-late</code>",
        "All rows: 400 from 50 cells",
    ):
        assert text in section, text


def test_every_figure_has_a_text_alternative_and_a_table(whole, tmp_path):
    html = text_of([whole], tmp_path / "report.html")
    assert len(re.findall(r"<figure ", html)) == 1
    assert 'role="img" aria-label="Five panels, one per activation: accuracy' in html
    assert 'data-figure-table="0"' in html


def test_bundled_digits_are_announced(tmp_path):
    run = write_run(tmp_path / "run", data="digits", seeds=1)
    entry = verdict("act-all", status="demo", published_status="demo", data="digits")
    notice = "Bundled digits: a demonstration. Get MNIST: gammabeta data fetch"
    write_derived(run, [entry], [], notice=notice)
    html = text_of([run], tmp_path / "report.html")
    assert notice in html
    assert (
        html.index(notice)
        < html.index("demo only", html.index(notice))
        < html.index("<main>") + 3000
    )


def test_what_is_missing_is_said(tmp_path):
    run = tmp_path / "run"
    write_registry(run, registry()[:3])
    html = text_of([run], tmp_path / "report.html")
    for text in (
        "no verdicts.json",
        "no figures.json",
        "no finished cell",
        "No claim has been judged",
    ):
        assert text in html, text
    assert 'id="claim-act-all"' in html
    _runs.write_cell(run, spec({"activation": "relu"}, 0), [{"step": 1}], "")
    (run / "claims.json").unlink()
    html = text_of([run], tmp_path / "report.html")
    assert "no claims.json" in html
    assert 'id="exp-activations"' in html
    assert "There are no figures of this experiment here." in html


def test_kept_rows_make_a_whole_page_once_they_are_judged(tmp_path):
    """As a clone holds them: packed rows, and neither verdicts nor figures nor a registry."""
    from gammabeta.studies import _claims, _judge

    kept, home = tmp_path / "results", tmp_path / "judged"
    kept.mkdir()
    home.mkdir()
    for name in ("identities", "depth"):
        shutil.copy(RESULTS / f"{name}.jsonl.gz", kept)
    _runs.write_json(home / "claims.json", {"schema": 1, "claims": _claims.public()})
    _judge.write_derived(home, _judge.judge([kept]))
    before = sorted(kept.iterdir())
    out = page.write([kept], tmp_path / "report.html", judged={kept: home})
    html = without_scripts(out.read_text(encoding="utf-8"))
    assert "<b>Missing.</b>" not in html
    assert 'class="card" id="verdict-fold' in html
    assert 'class="figure" id="fig-depth-' in html
    assert f"of {len(_claims.claims())} judged here" in html
    assert sorted(kept.iterdir()) == before
    html = text_of([kept], out)
    assert "has no verdicts.json: its runs have not been judged" in html


def test_an_identity_without_interval_and_delta_is_shown_without_a_bar(tmp_path):
    run = tmp_path / "run"
    write_registry(run, [claim("fold", kind="exact", headline=True)])
    empty = dict.fromkeys(("effect", "ci", "delta", "half_width", "planned_half_width"))
    entry = verdict("fold", status="exact", published_status=None, **empty)
    write_derived(run, [entry], [])
    html = text_of([run], tmp_path / "report.html")
    assert "not tried" in html
    assert "no effect size" in html
    assert 'role="img"' not in html.split("<main>")[1].split("What the words mean")[0]


def test_run_folders_are_shown_together(whole, tmp_path):
    other = tmp_path / "digits"
    write_run(other, data="digits", seeds=2)
    entries = [verdict("act-all", data="digits", place="", status="demo", sentence="Only that.")]
    write_derived(other, entries, [figure(title="Second")])
    html = text_of([whole, other], tmp_path / "report.html")
    assert "Only that." in html
    assert "MNIST, MLP 100-100 · budget small · headline" in html
    assert "digits · budget small · digits" in html
    assert 'data-status="refuted demo"' in html
    assert "from 70 cells" in html
    assert 'id="fig-activations-accuracy" data-figure="0"' in html
    assert 'id="fig-activations-accuracy-1" data-figure="1"' in html
    copied = text_of([whole, whole], tmp_path / "copied.html")
    assert copied.count("<figure ") == 1  # a copy of a folder adds nothing
    assert copied.count('<td role="cell" class="question">') == 2


# --- what it refuses ------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_a_clear_error(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(_runs.RunError, match="expected a run folder"):
            page.write([path], tmp_path / "report.html")
    with pytest.raises(ValueError, match="expected a run folder, got none"):
        page.write([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_wrong_protocols_name_file_and_field(tmp_path):
    run = tmp_path / "run"
    write_registry(run, [])
    write_derived(run, [], [], protocols={"activations": 3})
    with pytest.raises(_runs.RunError, match=r"verdicts\.json: protocols: expected an object"):
        page.write([run], tmp_path / "report.html")


def test_an_output_that_cannot_be_written_is_a_clear_error_and_leaves_nothing(whole, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match=r"cannot be written to .*report\.html: .*Name another file"):
        page.write([whole], tmp_path / "file" / "report.html")
    with pytest.raises(IsADirectoryError, match=r"expected a file to write"):
        page.write([whole], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_the_page_replaces_an_older_one_and_leaves_no_other_file(whole, tmp_path):
    out = tmp_path / "new" / "report.html"
    page.write([whole], out)
    out.write_text("old")
    assert page.write([whole], out) == out
    assert out.stat().st_size > 1_000_000
    assert os.listdir(out.parent) == ["report.html"]


@pytest.mark.parametrize("package", ["jinja2", "plotly"])
def test_a_missing_extra_gives_one_line_with_the_command(package, whole, tmp_path):
    program = (
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        f"hide = lambda name, *more: None if name == {package!r} else find(name, *more)\n"
        "PathFinder.find_spec = staticmethod(hide)\n"
        "from pathlib import Path\n"
        "try:\n"
        "    from gammabeta.report import page\n"
        f"    page.write([Path({str(whole)!r})], Path({str(tmp_path / 'r.html')!r}))\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == (
        'The report needs the extra "report": pip install "gammabeta[report]"\n'
    ), done.stderr


def test_making_a_page_imports_neither_torch_nor_plotly_nor_the_studies(whole, tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom gammabeta.report import page\n"
        f"page.write([Path({str(whole)!r})], Path({str(tmp_path / 'r.html')!r}))\n"
        "print([m for m in ('torch', 'plotly', 'numpy', 'gammabeta.studies') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# --- one file, no network, nothing foreign runs ---------------------------------------------


def test_the_policy_forbids_the_network_and_names_every_script(whole, tmp_path):
    html = text_of([whole], tmp_path / "report.html")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert policy.startswith("default-src &#39;none&#39;; script-src &#39;sha256-")
    assert "unsafe-eval" not in policy
    assert "http" not in policy
    assert policy.count("sha256-") == len(re.findall(r"<script>", html)) == 3
    assert not re.search(r'<(?:script|img|link|iframe)[^>]*\b(?:src|href)="', html)


def test_the_plotting_library_comes_with_its_license(whole, tmp_path):
    html = text_of([whole], tmp_path / "report.html")
    assert "Permission is hereby granted, free of charge" in html
    assert "Licensed under the MIT license" in html


def test_data_inside_a_script_cannot_end_it():
    text = str(_embed.data_text({"a": HOSTILE, "b": [1.5, None, True]}))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a": HOSTILE, "b": [1.5, None, True]}
    with pytest.raises(ValueError, match="must not contain"):
        _embed.script_text("x = '</SCRIPT>'")


def hostile_run(run):
    """Every text that a run folder can carry says something that would like to be markup."""
    texts = dict.fromkeys(("title", "question", "source", "topic", "reported", "rule"), HOSTILE)
    entry = claim("bad", headline=True, experiment="activations", **texts)
    entry |= {"caveats": HOSTILE, "thresholds": {f"delta {HOSTILE[:40]}": 0.5}}
    write_registry(run, [entry])
    arm = {"activation": HOSTILE, "norm": "=cmd()"}
    _runs.write_cell(run, spec(arm, 0), [{"step": 1, "note": HOSTILE}], "")
    _runs.write_failed(run, spec(arm, 1), HOSTILE.encode("utf-8", "replace").decode() * 3)
    bad = {"unit": HOSTILE, "reported": HOSTILE, "sentence": HOSTILE, "budget": HOSTILE}
    cells = [outcome(HOSTILE, 1e308, 1e307, HOSTILE, HOSTILE), {"name": HOSTILE, "status": ""}]
    cells.append(
        {"name": "text", "status": "refuted", "effect": HOSTILE, "lo": HOSTILE, "n": HOSTILE}
    )
    numbers = {"effect": 1e300, "ci": [None, -1e308], "delta": 1e-300, "n": 2**62}
    entries = [verdict("bad", cells=cells, notes=[HOSTILE], data=HOSTILE, **bad, **numbers)]
    drawn = figure(title=HOSTILE, caption=HOSTILE, alt=HOSTILE, x={"label": HOSTILE, "log": True})
    drawn["panels"][0]["title"] = HOSTILE
    drawn["panels"][0]["series"][0] |= {"name": HOSTILE, "style": "constructor"}
    drawn["panels"][1]["series"][0] |= {"style": "__proto__", "x": [0, -1, None, 1, 2, 3, 4, 1e308]}
    drawn["panels"][2]["series"][1] |= {"y": [None] * 8, "lo": None, "hi": None}
    more = {"notice": HOSTILE, "surprises": [HOSTILE], "protocols": {"activations": HOSTILE}}
    write_derived(run, entries, [drawn, figure(id="empty", panels=[])], **more)
    return run


def test_hostile_texts_are_data(tmp_path):
    run = hostile_run(tmp_path / "run <b>")
    html = text_of([run], tmp_path / "report.html")
    assert "<img" not in html
    assert "<b>Missing" not in html
    assert "run <b>" not in html
    assert "&lt;/script&gt;&lt;img" in html
    assert "{{7*7}}" in html
    assert html.count("<script") == html.count("</script>") == 5


def test_numbers_are_told_in_three_digits_whatever_they_are():
    told = [_marks.number(v) for v in (0.12345, -3.0, 0, 12, 60_000, 1e308, 2**62, None, True)]
    assert told[:4] == ["0.123", "−3", "0", "12"]
    assert told[4] == "60\u202f000"
    assert told[5:] == ["1e308", "4.61e18", "–", "True"]


def test_the_bars_of_a_page_share_one_scale():
    scale = _marks.Scale([0.2, -40.0])
    places = [scale.at(ratio) for ratio in (-1e9, -40, -1, 0, 1, 40, math.inf)]
    assert places == sorted(places)
    assert places[3] == _marks.WIDTH / 2
    assert 0 < places[0] < places[1] < places[5] < places[6] < _marks.WIDTH
    assert places[4] - places[3] == pytest.approx(places[3] - places[2])
    assert [name for _, name in scale.ticks()] == ["−10δ", "−δ", "0", "δ", "10δ"]
    assert [name for _, name in _marks.Scale([300]).ticks()][1:6] == ["", "", "0", "", ""]
    assert scale.bar(1.0, 0.5, 1.5, None) == ""
    assert scale.bar(None, 0.5, 1.5, 1.0) == ""


def test_the_page_stays_under_its_limit_and_says_what_it_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LIMIT", 5_500_000)  # 20 MB of rows would say no more, only later
    run = tmp_path / "run"
    write_registry(run, [])
    noise = random.Random(1)
    for experiment in ("small", "large"):
        count = 20_000 if experiment == "large" else 10
        columns = [f"c{n}" for n in range(10)]
        rows = ({name: noise.random() for name in columns} for _ in range(count))
        _runs.write_cell(run, spec({}, 0, experiment=experiment), rows, "")
    html = text_of([run], tmp_path / "report.html")
    assert len(html.encode()) < page.LIMIT
    assert 'id="rows-small"' in html
    assert 'id="rows-large"' not in html
    assert "the rows lie in <code>cells/large</code>" in html


# --- in a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    """The system's browser, driven by Playwright."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine: install the package chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += ["--disable-component-update", "--no-first-run", "--force-color-profile=srgb"]
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=options)
        yield browser
        browser.close()


@contextmanager
def opened(browser, path, width=1280, **options):
    """The page from disk with the network shut; at the end nothing may have gone wrong."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, accept_downloads=True, **options
    )
    requests, troubles = [], []
    context.route(re.compile("^(?!file:)"), lambda route: route.abort())
    context.on("request", lambda request: requests.append(request.url))
    tab = context.new_page()
    tab.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    try:
        tab.goto(path.as_uri())
        yield tab
        assert [url for url in requests if not url.startswith("blob:")] == [path.as_uri()]
        assert troubles == []
    finally:
        context.close()


def draw_all(tab):
    for node in tab.query_selector_all("[data-figure]"):
        node.scroll_into_view_if_needed()
    tab.locator("[data-figure]:not([data-drawn])").first.wait_for(state="detached")


@pytest.fixture(scope="module")
def made(whole, tmp_path_factory):
    return page.write([whole], tmp_path_factory.mktemp("page") / "report.html")


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_it_opens_from_disk_without_network_and_nothing_overflows(chromium, made, width):
    with opened(chromium, made, width) as tab:
        draw_all(tab)
        assert tab.locator(".plot .main-svg").count() >= 5
        assert tab.locator(".plot .scatterlayer .trace.scatter path.js-line").count() >= 10
        assert tab.locator("table.verdicts td.question").first.is_visible()
        for details in tab.locator("details").all()[:3] + tab.locator("details.table").all():
            details.evaluate("node => { node.open = true }")
        tab.wait_for_selector("table.data")
        wide = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1]
        right = tab.evaluate(
            "Math.max(...[...document.querySelectorAll('.verdicts *, .panel, .card > p')]"
            ".map(n => n.getBoundingClientRect().right))"
        )
        assert right <= width


@pytest.mark.parametrize("span", [3, 8, 20, 60, 300])
def test_names_on_an_axis_do_not_touch(chromium, span):
    tab = chromium.new_page()
    tab.set_content(f"<style>{_embed.asset('style.css')}</style>{_marks.Scale([span]).axis()}")
    ends = tab.evaluate(
        "[...document.querySelectorAll('text')].map(t => t.getBoundingClientRect())"
        ".filter(b => b.width).flatMap(b => [b.left, b.right])"
    )
    assert len(ends) >= 6
    assert all(b - a > 2 for a, b in zip(ends[1:-1:2], ends[2::2], strict=True))
    tab.close()


def test_a_narrow_interval_shows_its_ends(chromium):
    """The dot is smaller than what lies between the ends."""
    scale = _marks.Scale([40.0])
    for lo, hi in ((1.0, 2.0), (2.0, 2.4), (10.0, 30.0)):
        bar = scale.bar((lo + hi) / 2, lo, hi, 1.0)
        ends = [float(x) for x in re.findall(r'class="ci" d="M([\d.]+) 13.0m0', bar)]
        assert 2 * float(re.search(r' r="([\d.]+)"', bar).group(1)) <= max(ends[1] - ends[0], 4.8)


def test_on_a_narrow_screen_filters_are_folded_and_every_part_has_an_axis(chromium, made):
    fields = ".filter select:visible"
    with opened(chromium, made, 1280) as tab:
        assert tab.locator(fields).count() == 5
        assert not tab.locator(".filters").is_visible()
        assert tab.locator(".parts .part .axis:visible").count() == 0
    with opened(chromium, made, 390) as tab:
        assert tab.get_by_label("Search").is_visible()
        assert tab.locator(fields).count() == 0
        more = tab.get_by_role("button", name="Filters and order")
        more.click()
        assert tab.locator(fields).count() == 5
        assert more.get_attribute("aria-expanded") == "true"
        more.click()
        assert tab.locator(fields).count() == 0
        axes = tab.locator("#verdict-act-all .parts .part .axis:visible")
        assert axes.count() == 2
        drawn = axes.first.evaluate("n => n.getElementsByTagName('use')[0].getBBox().width")
        assert drawn > 40
        tab.goto(made.as_uri() + "#claims&status=refuted")
        tab.locator("select[name=status]").wait_for()  # what is set is seen


def test_with_and_without_differ_by_dash_and_marker_as_well(chromium, made):
    with opened(chromium, made) as tab:
        draw_all(tab)
        plot = tab.locator(".plot").first
        dashes = plot.evaluate(
            "p => [...p.querySelectorAll('path.js-line')].map(getComputedStyle)"
            ".filter(s => s.strokeWidth !== '0px').map(s => s.strokeDasharray)"
        )
        assert dashes == ["none", "7px, 4px"]  # the edges of the bands have no width
        assert plot.locator(".points path").count() > 3


def test_all_panels_share_their_axes(chromium, made):
    with opened(chromium, made) as tab:
        draw_all(tab)
        ranges = tab.evaluate(
            "[...document.querySelectorAll('.plot')].map(p => "
            "JSON.stringify([p.layout.xaxis.range, p.layout.yaxis.range, p.layout.xaxis.type]))"
        )
        assert len(ranges) == 5
        assert len(set(ranges)) == 1
        assert ranges[0].endswith('"log"]')


def test_dark_follows_the_system_and_the_button_and_is_kept(chromium, made):
    background = "getComputedStyle(document.body).backgroundColor"
    with opened(chromium, made, color_scheme="dark") as tab:
        draw_all(tab)
        dark = tab.evaluate(background)
        line = tab.evaluate("document.querySelector('.plot').data.at(-1).line.color")
        button = tab.get_by_role("button", name="Theme")
        button.focus()
        tab.keyboard.press("Enter")
        assert button.inner_text() == "Theme: light"
        assert tab.evaluate(background) != dark
        assert tab.evaluate("document.querySelector('.plot').data.at(-1).line.color") != line
        tab.emulate_media(color_scheme="light")
        light = tab.evaluate(background)
        button.click()
        assert button.inner_text() == "Theme: dark"
        assert tab.evaluate(background) == dark != light


def test_claims_are_searched_and_filtered(chromium, made):
    with opened(chromium, made) as tab:
        visible = tab.locator(".claims > li:visible")
        assert visible.count() == len(registry())
        tab.get_by_label("Search").fill("whatever ACTIVATION")
        assert visible.count() == 1
        assert tab.locator(".filter output").inner_text() == "1 of 153"
        tab.get_by_label("Search").fill("no such thing")
        assert tab.get_by_text("No claim fits the search.").is_visible()
        tab.get_by_label("Search").fill("")
        tab.locator("select[name=status]").select_option("supported")
        assert visible.count() == 1
        tab.locator("select[name=status]").select_option("")
        tab.locator("select[name=topic]").select_option("gradients")
        assert visible.count() == 30


def test_a_link_to_a_claim_opens_it(chromium, made):
    with opened(chromium, made) as tab:
        tab.get_by_role("link", name="other-2", exact=True).click()
        tab.wait_for_selector("#claim-other-2 details[open]")
        assert tab.locator("#claim-other-2 .claim").is_visible()


def test_the_tables_of_rows_and_figures_can_be_read_and_saved(chromium, made, tmp_path):
    with opened(chromium, made) as tab:
        rows = tab.locator("details[data-rows]")
        rows.locator("summary").focus()
        tab.keyboard.press("Enter")
        rows.locator("table.data").wait_for()
        assert rows.locator("tbody tr").count() == 200
        rows.get_by_role("button", name="Show 200 more").click()
        assert rows.locator("tbody tr").count() == 400
        with tab.expect_download() as download:
            rows.get_by_role("button", name="Download CSV").click()
        assert download.value.suggested_filename == "activations.csv"
        download.value.save_as(tmp_path / "rows.csv")
        with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
            saved = list(csv.DictReader(file))
        assert len(saved) == 400
        found = [float(r["accuracy"]) for r in saved if r["activation"] == "tanh"
                 and r["norm"] == "none" and r["seed"] == "3"]  # fmt: skip
        wanted = [row["accuracy"] for row in rows_of("tanh", "none", 3)]
        assert found == pytest.approx(wanted, rel=1e-5)
        tab.locator("details[data-figure-table] > summary").click()
        tab.locator("details[data-figure-table] tbody tr").first.wait_for()
        assert tab.locator("details[data-figure-table] tbody tr").count() == 80


def test_nothing_of_a_hostile_run_folder_runs(chromium, tmp_path):
    run = hostile_run(tmp_path / "run")
    with opened(chromium, page.write([run], tmp_path / "report.html"), 390) as tab:
        tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        for node in tab.query_selector_all("[data-figure]"):
            node.scroll_into_view_if_needed()
        tab.wait_for_selector(".plot .main-svg")
        tab.wait_for_selector("details[data-rows] table.data")
        tab.locator(".plot").first.hover()
        assert tab.evaluate("window.hacked") is None
        assert tab.locator("img").count() == 0
        assert tab.locator("main script:not([type])").count() == 0
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_many_figures_are_packed_and_drawn_all_the_same(chromium, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_PLAIN", 1000)
    made = page.write([whole], tmp_path / "report.html")
    html = made.read_text(encoding="utf-8")
    assert 'id="figures"' not in html
    assert '"panels":' not in html
    with opened(chromium, made) as tab:
        draw_all(tab)
        assert tab.locator(".plot .main-svg").count() >= 5
        table = tab.locator("details[data-figure-table]")
        table.locator("summary").click()
        table.locator("tbody tr").first.wait_for()
    with opened(chromium, made) as tab:
        tab.evaluate("location.hash = 'fig-activations-accuracy'")
        tab.locator("[data-drawn]").wait_for()
    context = chromium.new_context()
    tab = context.new_page()
    tab.add_init_script("delete window.DecompressionStream")
    tab.goto(made.as_uri() + "#fig-activations-accuracy")
    tab.get_by_text("This browser cannot unpack the numbers").wait_for()
    context.close()


def test_the_policy_stops_a_script_that_slipped_in(chromium, made, tmp_path):
    """The second lock: were the escaping ever wrong, the browser would still refuse."""
    html = made.read_text(encoding="utf-8")
    bad = tmp_path / "bad.html"
    added = "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
    bad.write_text(html.replace("<main>", added + "<main>"), encoding="utf-8")
    context = chromium.new_context()
    tab = context.new_page()
    refused = []
    tab.on("console", lambda message: refused.append(message.text))
    tab.goto(bad.as_uri())
    tab.wait_for_selector("#theme:visible")
    assert tab.evaluate("window.hacked") is None
    assert any("Content Security Policy" in text for text in refused)
    context.close()


def test_the_words_stay_readable_without_scripts(chromium, made):
    with opened(chromium, made, java_script_enabled=False) as tab:
        assert tab.locator("noscript p").is_visible()
        assert tab.locator("table.verdicts").is_visible()


def test_a_link_stays_a_link_and_a_device_is_not_replaced(tmp_path, whole):
    target, link = tmp_path / "target.html", tmp_path / "link.html"
    target.write_text("old")
    link.symlink_to(target)
    assert page.write([whole], link) == link
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="neither a file nor new"):
        page.write([whole], pipe)
    assert pipe.is_fifo()
