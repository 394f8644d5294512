"""What the page says beside the verdicts themselves: words for exact claims, certainty, chance,
sources, code, comparison of two runs, figures made from rows, Markdown."""

import json
import re
from pathlib import Path

import pytest

import gammabeta
from gammabeta import _runs
from gammabeta.report import _content, _next, _rules, page
from gammabeta.studies import _claims, _holds, _judge, _provenance, _second
from gammabeta.studies._experiments import VARIATIONS
from gammabeta.studies._verdict import Verdict
from tests.test_report import (
    HOSTILE,
    claim,
    figure,
    hostile_run,
    registry,
    spec,
    text_of,
    verdict,
    without_scripts,
    write_derived,
    write_registry,
    write_run,
)

EMPTY = dict.fromkeys(("effect", "ci", "delta", "half_width", "planned_half_width"))


def first_row(html):
    return re.search(r'<td role="cell" class="question">.*?</tr>', html, re.S).group()


def test_an_exact_claim_is_judged_as_worded_and_as_rightly_stated(tmp_path):
    write_registry(tmp_path / "run", [claim("fold", kind="exact", headline=True)])
    numbers = {**EMPTY, "effect": 6.7e-16, "unit": "relative error", "place": ""}
    entry = verdict("fold", status="exact", published_status="fails", **numbers)
    write_derived(tmp_path / "run", [entry], [])
    html = without_scripts(text_of([tmp_path / "run"], tmp_path / "report.html"))
    row = first_row(html)
    assert re.search(r"as worded</span>\s*<span class=\"status s-fails", row)
    assert re.search(r"as rightly stated</span>\s*<span class=\"status s-exact", row)
    assert 'class="bar' not in row
    assert "δ" not in row
    assert "for any data · budget small" in row
    card = html[html.index('id="verdict-fold"') :]
    assert "As rightly stated" in card
    assert "Matters from" not in card
    assert "<dt>Fair</dt>" not in card


@pytest.mark.parametrize(
    ("status", "fields", "told"),
    [
        ("exact", {}, ("A", "an identity or a proof")),
        ("fails", {"certainty": "B"}, ("A", "an identity or a proof")),
        ("supported", {}, ("C", "no variation tried")),
        ("refuted", {"certainty": "B"}, ("B", "holds in at least 3 of 4 variations")),
        (
            "mixed",
            {"certainty": "C", "variations": "Holds in 0 of 1 variations tried: a refuted."},
            ("C", "holds in 0 of 1 tried"),
        ),
        ("refuted", {"certainty": HOSTILE, "variations": 7}, ("C", "no variation tried")),
        ("inconclusive", {"certainty": "B"}, ("D", "undecided")),
        ("demo", {}, ("D", "undecided")),
    ],
)
def test_certainty_is_a_letter_with_its_words(status, fields, told, tmp_path):
    write_derived(tmp_path, [verdict("act-all", status=status, **fields)], [])
    write_registry(tmp_path, registry()[:1])
    assert _content.gather([tmp_path]).verdicts[0]["certainty"] == told


def test_variations_stand_one_by_one_in_the_head_of_a_claim(tmp_path):
    """The sentence that the studies make is the one that the page takes apart."""
    run = tmp_path / "run"
    write_registry(run, registry()[:2])
    by = {"fresh-seeds": "refuted", "width-half": "inconclusive", "images-small": "refuted"}
    given = verdict("act-all") | {"cells": [], "ci": None}
    (judged,) = _holds.certain([Verdict(**given)], {"act-all": by})
    entry = verdict("act-all", certainty=judged.certainty, variations=judged.variations)
    free = verdict("act-sigmoid-most", variations="In a few: others, not.")
    write_derived(run, [entry, free], [])
    html = without_scripts(text_of([run], tmp_path / "r.html"))
    assert 'grade g-c">C</b> · holds in 2 of 3 tried (1 of 4 not run)</span>' in first_row(html)
    card = html[html.index('id="verdict-act-all"') :]
    items = re.findall(r"<li[^>]*><b aria-hidden.*?</li>", card, re.S)
    assert [re.sub("<.*?>", "", item) for item in items] == [
        "✓ fresh seeds: refuted, the same",
        "✗ half the width: inconclusive, not the same",
        "✓ 14×14, turned, noisy: refuted, the same",
        "– twice the width: not run",
    ]
    assert judged.variations not in html
    assert "<p>In a few: others, not.</p>" in html


def test_without_a_delta_there_is_an_effect_and_no_bar(tmp_path):
    write_registry(tmp_path / "run", registry()[:1])
    parts = [{"name": name, "part": "fair", "status": "refuted", "effect": at, "n": 5}
             for name, at in (("sigmoid", 0.087), ("ReLU", 0.4))]  # fmt: skip
    entry = verdict("act-all", delta=None, effect=0.4, ci=[0.3, 0.5], cells=parts)
    write_derived(tmp_path / "run", [entry], [])
    row = first_row(text_of([tmp_path / "run"], tmp_path / "report.html"))
    assert "no single δ" in row
    assert '<span class="muted">ReLU</span>' in row  # which part the number is of
    assert 'role="img"' not in row


def test_how_many_false_supported_are_to_be_expected_is_said(tmp_path):
    run = tmp_path / "run"
    write_registry(run, registry())
    told = {"expected_false": 1.6, "supported": 17, "how": "An <upper> bound.", "family": {}}
    write_derived(run, [verdict("act-all")], [], multiplicity=told)
    html = text_of([run], tmp_path / "report.html")
    assert "Of 17 claims that are supported, done fairly, chance alone explains 1.6 on" in html
    assert "An &lt;upper&gt; bound." in html
    for bad in ([], {}, {**told, "supported": "17"}, {**told, "how": None}):
        write_derived(run, [verdict("act-all")], [], multiplicity=bad)
        with pytest.raises(_runs.RunError, match=r"verdicts\.json: multiplicity: expected"):
            page.write([run], tmp_path / "report.html")


def write_rules(run, **when):
    """rules.json as it lies beside kept rows: for each claim whether, or when, it was changed."""
    known = {entry["id"]: entry for entry in registry()}
    rules = {
        name: {
            "digest": _rules.digest(known[name]), "commit": "c" * 40, "amended": changed == "late",
            "changed": f"2026-01-0{2 if changed == 'early' else 4}", "rows_since": "2026-01-03",
        }
        for name, changed in when.items()
    }  # fmt: skip
    _runs.write_json(run / "rules.json", {"schema": 1, "rules": rules})
    return rules


def test_a_rule_that_was_amended_after_data_is_marked_wherever_its_claim_stands(tmp_path):
    run = tmp_path / "run"
    write_registry(run, registry()[:3])
    write_derived(run, [verdict("act-all"), verdict("act-late")], [])
    html = without_scripts(text_of([run], tmp_path / "r.html"))
    html = re.sub(r'<details class="key".*?</details>', "", html, flags=re.S)
    assert "amended" not in html.replace(".amended", "")
    assert "before its runs" not in html  # nothing is known of these rules
    write_rules(run, **{"act-all": "late", "act-late": "early"})
    html = without_scripts(text_of([run], tmp_path / "r.html"))
    badge = '<span class="amended">rule amended after data</span>'
    assert html.count(badge) == 3
    assert badge in first_row(html)
    for start in ('id="claim-act-all"', 'id="verdict-act-all"'):
        assert badge in html[html.index(start) :][:1500], start
    told = (
        "1 of 2 rules were fixed before the first of their rows was made; 1 (all of headline "
        "claims) was amended after data and is marked."
    )
    assert told in html
    text = page.write([run], tmp_path / "r.md", markdown=True).read_text(encoding="utf-8")
    assert told in text.replace("\\", "")
    assert text.count("**rule amended after data**") == 2  # two tables


def test_a_rule_that_changed_since_its_rows_were_accepted_is_amended(tmp_path):
    rules = write_rules(tmp_path, **{"act-all": "early", "act-late": "early"})
    claims = registry()[:3]
    both = dict.fromkeys(rules, "fixed")
    assert _rules.read_rules(tmp_path, claims) == both
    claims[0]["thresholds"] = {"delta": 0.3}
    assert _rules.read_rules(tmp_path, claims) == {**both, "act-all": "amended"}
    for bad in ([], {"act-all": 1}, {"act-all": {**rules["act-all"], "amended": "no"}}):
        _runs.write_json(tmp_path / "rules.json", {"schema": 1, "rules": bad})
        with pytest.raises(_runs.RunError, match=r"rules\.json: rules: expected"):
            _rules.read_rules(tmp_path, claims)


def test_the_page_knows_rules_by_the_digest_of_the_studies():
    for entry in _claims.claims().values():
        assert _rules.digest(entry._asdict()) == _provenance.digest(entry)


def test_sources_are_told_by_their_names_alone(tmp_path):
    texts = (
        "Chang et al., MNIST study (MLDS_final_2017), Claim 2 and Fig. 2; Kathuria, an article",
        "Kathuria, an article; Ioffe & Szegedy 2015 (arXiv 1502.03167), citing LeCun et al.",
        "",
    )
    write_registry(tmp_path, [claim(f"c{n}", source=text) for n, text in enumerate(texts)])
    found = _content.gather([tmp_path])
    assert found.claims[0]["sources"] == [
        "Chang et al., MNIST study",
        "Kathuria, an article",
    ]
    assert found.claims[1]["sources"] == ["Kathuria, an article", "Ioffe & Szegedy 2015"]
    assert found.claims[2]["sources"] == []
    assert found.sources[0] == "Kathuria, an article"


def test_an_experiment_names_its_code_and_a_line_to_cite(tmp_path):
    run = write_run(tmp_path / "run", seeds=1)
    html = text_of([run], tmp_path / "report.html")
    lines = Path(gammabeta.__file__).with_name("studies").joinpath("activations.py").read_text()
    at = int(re.search(r"studies/activations\.py</code>: measure, line (\d+)", html).group(1))
    assert lines.split("\n")[at - 1].startswith("def measure(")
    cite = "gammabeta 0.1.0, experiment “activations”, MNIST, budget small, code fedcba9876543210."
    assert cite in html
    _runs.write_cell(run, spec({}, 0, experiment="of-a-stranger"), [{"step": 1}], "")
    assert "studies/of_a_stranger" not in text_of([run], tmp_path / "report.html")


def test_a_command_says_what_it_took_where_every_cell_does(tmp_path):
    for seed, seconds in enumerate((90, 120)):
        _runs.write_cell(tmp_path, spec({}, seed) | {"cpu_seconds": seconds}, [{"step": 1}], "")
    assert _content.gather([tmp_path]).sections[0].took == [
        "Took 3.5 CPU minutes, all cells together."
    ]
    assert "Took 3.5 CPU minutes" in text_of([tmp_path], tmp_path / "r.html")
    _runs.write_cell(tmp_path, spec({}, 2), [{"step": 1}], "")
    assert _content.gather([tmp_path]).sections[0].took == [""]


def test_the_page_calls_surprising_what_the_studies_do(tmp_path):
    names = [entry["id"] for entry in registry()[:3]]
    entries = [
        verdict("act-all", published_status="refuted"),
        verdict("act-late", status="supported", published_status="refuted", ci=[0.1, 0.3]),
        verdict("act-sigmoid-most", effect=-1.0, ci=[-1.2, -0.8], published_status=None),
    ]
    told = _judge.surprises([Verdict(**entry) for entry in entries])
    write_registry(tmp_path, registry())
    write_derived(tmp_path, entries, [], surprises=told)
    found = _content.gather([tmp_path]).surprises
    assert {entry["claim"] for entry, _ in found} == set(names)
    assert [entry["claim"] for entry, _ in found] == [text.split(":")[0] for text in told]
    assert [text for _, text in found] == [
        "Refuted as published, supported in the fair setting.",
        "The effect points the other way.",
        "Refuted.",
    ]
    write_derived(tmp_path, entries, [])
    assert _content.gather([tmp_path]).surprises == []


def test_the_answer_stands_under_its_question_without_numbers(tmp_path):
    write_registry(tmp_path / "run", registry()[:1])
    long = "No: on MNIST, MLP 100-100, it does not gain (−0.7; reversed): tanh, (+0.1; absent)."
    write_derived(tmp_path / "run", [verdict("act-all", sentence=long)], [])
    html = text_of([tmp_path / "run"], tmp_path / "r.html")
    assert '<p class="said">No: it does not gain.</p>' in first_row(html)
    assert f'<p class="answer">{long}</p>' in html
    write_derived(tmp_path / "run", [verdict("act-all", sentence="Word " * 99)], [])
    assert " Word …</p>" in first_row(text_of([tmp_path / "run"], tmp_path / "r.html"))


def test_all_claims_are_listed_with_both_verdicts(tmp_path):
    run = tmp_path / "run"
    write_registry(run, registry()[:3])
    same = verdict("act-late", published_status="refuted")
    write_derived(run, [verdict("act-all"), same], [])
    html = without_scripts(text_of([run], tmp_path / "r.html"))
    items = dict(re.findall(r'<li id="claim-([\w-]+)"(.*?)</summary>', html, re.S))
    marks = {name: re.findall('class="status s-([a-z]+)', item) for name, item in items.items()}
    assert marks["act-all"] == ["supported", "refuted"]
    assert marks["act-late"] == ["refuted", "refuted"]
    assert marks["act-sigmoid-most"] == ["none"]
    assert [name for name, item in items.items() if "data-differ" in item] == ["act-all"]


def test_the_first_screen_says_what_the_fair_test_overturned_and_how_to_dispute(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    write_registry(run, registry())
    told = {"expected_false": 1.6, "supported": 17, "how": "An upper bound.", "family": {}}
    sides = {"act-all": ("supported", "refuted"), "act-late": ("supported", "inconclusive")}
    sides["act-sigmoid-most"] = ("refuted", "refuted")
    entries = [
        verdict(name, published_status=published, status=fair, delta=0.5)
        for name, (published, fair) in sides.items()
    ]
    write_derived(run, entries, [], multiplicity=told)
    html = without_scripts(text_of([run], tmp_path / "r.html"))
    asked = re.search(r'<ul class="asked".*?</ul>', html, re.S).group()
    first, false, dispute = re.findall("<li>.*?</li>", asked, re.S)
    assert re.findall('href="#([^"]*)"', first) == ["verdict-act-all", "claims&amp;differ=yes"]
    assert "2 claims</a>" in first
    assert "chance alone explains 1.6 on average at most" in false
    assert "To repeat or dispute" in dispute
    items = dict(re.findall(r'<li id="claim-([\w-]+)".*?data-differ="(\w+)"', html))
    assert items == {"act-all": "overturned", "act-late": "yes"}
    card = html[html.index('id="verdict-act-all"') :]
    assert card.index('href="#again-activations"') < card.index('id="again-activations"')


def test_why_a_rule_was_amended_stands_beside_the_mark(tmp_path):
    run = tmp_path / "run"
    claims = registry()[:3]
    claims[0]["amended"] = "A run <diverged>."
    claims[2]["amended"] = ["not a text"]
    write_registry(run, claims)
    entries = [verdict(entry["id"]) for entry in claims]
    write_derived(run, entries, [])
    when = {"act-all": "late", "act-sigmoid-most": "late", "act-late": "early"}
    write_rules(run, **when)
    html = without_scripts(text_of([run], tmp_path / "r.html"))
    cards = [html[html.index(f'id="verdict-{name}"') :][:900] for name in when]
    assert "A run &lt;diverged&gt;." in cards[0]
    assert "after the first of its rows was made." in cards[1]
    assert "not a text" not in html
    told = page.write([run], tmp_path / "r.md", markdown=True).read_text(encoding="utf-8")
    assert "Rule amended after data: A run \\<diverged\\>." in told


UNDECIDED = {"status": "inconclusive", "published_status": None, "n": 16}


@pytest.mark.parametrize(
    ("name", "fields", "told", "command"),
    [
        (
            "act-late",
            {"n_needed": 20},
            "About 20 seeds would decide it: a forecast",
            "more act-late",
        ),
        ("act-late", {"n_needed": 128}, "twice as many fresh ones, once", "more act-late"),
        ("act-late", {"n_needed": 129}, "ask for 128 at most", ""),
        ("act-late", {"n_needed": None}, "No number of seeds up to 1000", ""),
        ("act-late", {"n_needed": 50, "stage": 2}, "there is no third", ""),
        ("act-all", {"n_needed": 20}, "no second stage", "run act-all --variant fresh-seeds"),
        ("keep-consistent", {"n_needed": 20}, "by noisy-bn", "run noisy-bn --variant fresh-seeds"),
        ("act-late", {"n_needed": HOSTILE}, "No number of seeds up to 1000", ""),
    ],
)
def test_an_undecided_claim_says_what_can_be_done(name, fields, told, command, tmp_path):
    write_registry(tmp_path, [*registry()[:3], claim("keep-consistent")])
    write_derived(tmp_path, [verdict(name, **UNDECIDED | fields)], [])
    words, run = _content.gather([tmp_path]).verdicts[0]["todo"]
    assert told in words
    assert run.startswith(f"gammabeta study {command}") if command else run == ""
    asked = fields["n_needed"]
    sure = f"About {asked} seeds would decide it: a forecast, which holds if mean and spread stay"
    assert (sure in words) == isinstance(asked, int)
    html = without_scripts(text_of([tmp_path], tmp_path / "r.html"))
    card = html[html.index(f'id="verdict-{name}"') :]
    assert card.index("What can be done:") < card.index("<dt>Fair</dt>")
    assert (f"<code>{run}</code>" in card) == bool(run)


def test_what_can_be_done_is_said_by_the_rule_of_the_studies():
    """For every claim of the registry: where the page names the command, it runs something."""
    assert (_next.ASKED, set(_next.BY_HEADLINE)) == (_second.ASKED, set(_second._BY_HEADLINE))
    for entry in _claims.claims().values():
        for asked in (None, 5, 128, 129):
            given = verdict(entry.id, **UNDECIDED, n_needed=asked, experiment="activations")
            one = Verdict(**given | {"cells": [], "ci": None})
            told = {"exact": False, "second": False, "text": entry._asdict()}
            words = _next.steps(one.to_json() | told)
            assert words is not None
            assert words[1].startswith("gammabeta study more") == (_second.asked(one) is not None)


@pytest.mark.parametrize("status", ["refuted", "supported", "mixed", "exact", "fails", "demo"])
def test_a_decided_claim_has_nothing_left_to_do(status, tmp_path):
    write_registry(tmp_path, registry()[:1])
    write_derived(tmp_path, [verdict("act-all", status=status, n_needed=20)], [])
    assert "What can be done" not in text_of([tmp_path], tmp_path / "r.html")


@pytest.mark.parametrize(
    ("varied", "told"),
    [
        ({"act-all": {"fresh-seeds": "supported"}}, "that gave: supported, which does not replace"),
        ({"act-all": {"fresh-seeds": "inconclusive"}}, "that gave: also inconclusive."),
        ({"act-all": {"width-half": "supported"}}, "as a variation."),
        ({"act-all": {"fresh-seeds": ["supported"]}}, "as a variation."),
        (HOSTILE, "as a variation."),
        (None, "as a variation."),
    ],
)
def test_what_fresh_seeds_gave_is_said_of_an_undecided_headline_claim(varied, told, tmp_path):
    write_registry(tmp_path, registry()[:1])
    write_derived(tmp_path, [verdict("act-all", **UNDECIDED)], [], varied=varied)
    assert told in _content.gather([tmp_path]).verdicts[0]["todo"][0]


def test_a_control_that_the_sign_flip_test_decides_does_not_seem_to_contradict(tmp_path):
    by_sign = "above 0 by the exact sign-flip test, and at least 0.3 on average"
    wide = "the interval is too wide"
    rows = [
        ("control", "BN − none", 11.3, 6e-5, "supported", by_sign),
        ("fair", "noisy BN − none", 11.2, 2e-4, "inconclusive", wide),
        ("fair", "log drift", -1.42, 0.5, "inconclusive", wide),
    ]
    cells = [
        {"part": part, "name": name, "effect": at, "lo": at - 15, "hi": at + 15, "n": 16}
        | {"p_signflip": p, "status": status, "reason": reason}
        for part, name, at, p, status, reason in rows
    ]
    said = "Undecided: on MNIST, the cell nearest to its limit is log drift (−1.42). Open: all."
    entry = verdict("act-all", **UNDECIDED, cells=cells, effect=11.2, ci=[-4.2, 26.6])
    run = tmp_path / "run"
    write_registry(run, registry()[:1])
    write_derived(run, [entry | {"sentence": said}], [])
    found = _content.gather([run]).verdicts[0]
    parts = [cell["reason"] for part in found["parts"].values() for cell in part]
    assert parts[0] == f"{by_sign}: a control may be decided so, and this one was"
    assert parts[1] == f"{wide}; here the interval decides, not the sign-flip test"
    assert parts[2] == wide
    row = first_row(text_of([run], tmp_path / "r.html"))
    assert "nearest to its limit is log drift" in row
    assert re.search(r"nearest to its limit:</span> <b[^>]*>−1\.42</b>", row)
    assert "[−16.4, +13.6]" in row
    write_derived(run, [entry], [])
    assert "nearest to its limit" not in first_row(text_of([run], tmp_path / "r.html"))


@pytest.mark.parametrize("stage", [None, 1, True, HOSTILE, 2])
def test_a_second_stage_is_marked_wherever_its_verdict_stands(stage, tmp_path):
    run = tmp_path / "run"
    write_registry(run, registry()[:1])
    notes = ["Second stage: 18 fresh seeds. The first, of 8, was undecided.", "Rates: 1."]
    entry = verdict("act-all", notes=notes) | ({} if stage is None else {"stage": stage})
    write_derived(run, [entry], [])
    html = without_scripts(text_of([run], tmp_path / "r.html"))
    card = html[html.index('id="verdict-act-all"') :]
    parts = [first_row(html), html[html.index('id="claim-act-all"') :].split("</li>")[0], card]
    assert ["second stage</span>" in part for part in parts] == [stage == 2] * 3
    told = [part.count("18 fresh seeds. The first, of 8, was undecided.") for part in parts]
    assert told == ([0, 1, 1] if stage == 2 else [0, 0, 1])
    assert ('data-marks="second"' in parts[1]) == (stage == 2)
    assert ('href="#claims&amp;mark=second">1</a>' in html) == (stage == 2)
    words = html[html.index('<details class="key"') :].split("</details>")[0]
    assert "<dt>second stage</dt>" in words
    page.write([run], tmp_path / "r.md", markdown=True)
    assert ("**second stage**" in (tmp_path / "r.md").read_text()) == (stage == 2)


@pytest.mark.parametrize(
    "word", ["fair", "as published", "δ (delta)", "Holm", "the cell nearest to its limit",
             "per decrease of the loss", "budget", "second stage"]
)  # fmt: skip
def test_a_word_of_the_trade_is_explained(word, tmp_path):
    write_registry(tmp_path / "run", registry()[:1])
    write_derived(tmp_path / "run", [verdict("act-all")], [])
    html = text_of([tmp_path / "run"], tmp_path / "r.html")
    assert re.search(rf"<dt>{re.escape(word)}</dt><dd>[^<]{{40,}}\.</dd>", html)


def test_the_effect_is_named_among_levels_and_not_by_the_control(tmp_path):
    run = tmp_path / "run"
    write_registry(run, registry()[:1])
    parts = [("control", "accuracy", 3.0), ("level: a", "near", 0.4), ("level: b", "far", 0.9)]
    cells = [
        {"name": name, "part": part, "status": "supported", "effect": at, "n": 5}
        for part, name, at in parts
    ]
    write_derived(run, [verdict("act-all", effect=0.4, ci=[0.3, 0.5], cells=cells)], [])
    assert _content.gather([run]).verdicts[0]["at"] == "near"


def test_surprises_lead_to_their_claims_and_stay_short(tmp_path):
    run = tmp_path / "run"
    write_registry(run, registry())
    entry = verdict("act-all", published_status="refuted")
    told = [f"act-all: refuted. {entry['sentence']}", "unknown: as it stands."]
    write_derived(run, [entry], [], surprises=told)
    html = without_scripts(text_of([run], tmp_path / "report.html"))
    box = re.search(r'<div class="surprises".*?</div>', html, re.S).group()
    assert '<a href="#verdict-act-all">Does batch normalization help whatever' in box
    assert "Refuted." in box
    assert entry["sentence"] not in box
    assert "<li>unknown: as it stands.</li>" in box
    assert len(re.findall("<li>", box)) == 2


def test_a_variation_is_repeated_by_its_own_option(tmp_path):
    assert _content.VARIANTS == VARIATIONS
    run = tmp_path / "run"
    write_registry(run, registry()[:1])
    for seed, budget in enumerate(("small", "brief", *VARIATIONS)):
        cell = spec({"norm": "bn"}, seed) | {"budget": budget}
        _runs.write_cell(run, cell, [{"step": 1, "accuracy": 0.5}], "")
    html = text_of([run], tmp_path / "report.html")
    commands = re.findall(r"gammabeta study run activations --(\w+) ([\w-]+) --data mnist", html)
    assert {name for option, name in commands if option == "variant"} == set(VARIATIONS)
    assert {name for option, name in commands if option == "budget"} == {"small", "brief"}


# --- two runs beside each other ---------------------------------------------------------------


def pair_of_runs(tmp_path):
    """Five claims: same, intervals apart, another verdict, and one on each side alone."""
    names = ("same", "apart", "turned", "first-only", "second-only")
    for side in (0, 1):
        run = tmp_path / f"run{side}"
        write_registry(run, [claim(name, headline=True) for name in names])
        apart = {"effect": 0.2 + side, "ci": [0.1 + side, 0.3 + side]}
        entries = [
            verdict("same"),
            verdict("apart", **apart),
            verdict("turned", status=("refuted", "supported")[side]),
            verdict(("first-only", "second-only")[side]),
        ]
        write_derived(run, entries, [figure()] if side else [])
    return [tmp_path / "run0", tmp_path / "run1"]


def test_two_runs_are_compared_claim_by_claim_what_differs_first(tmp_path):
    runs = pair_of_runs(tmp_path)
    found = _content.gather(runs, compare=True).comparison
    assert [(pair.claim, pair.change) for pair in found.pairs] == [
        ("turned", "verdict"),
        ("apart", "effect"),
        ("first-only", "only"),
        ("second-only", "only"),
        ("same", "same"),
    ]
    page.write(runs, tmp_path / "c.html", compare=True)
    html = without_scripts((tmp_path / "c.html").read_text(encoding="utf-8"))
    section = re.search(r'<section id="comparison".*?</section>', html, re.S).group()
    assert section.count("not judged") == 2
    assert "Of 5 claims: another verdict, 1; the same verdict, intervals apart, 1;" in section
    assert section.index('data-change="verdict"') < section.index('data-change="same"')
    assert 'id="comparison"' not in without_scripts(text_of(runs, tmp_path / "both.html"))


def test_a_comparison_needs_two_run_folders(tmp_path):
    runs = pair_of_runs(tmp_path)
    for given in (runs[:1], [*runs, runs[0]]):
        with pytest.raises(ValueError, match="a comparison needs two run folders"):
            page.write(given, tmp_path / "c.html", compare=True)


def test_folders_of_one_name_are_told_apart(tmp_path):
    for place in ("a", "b"):
        write_registry(tmp_path / place / "run", registry()[:1])
        write_derived(tmp_path / place / "run", [verdict("act-all")], [])
    runs = [tmp_path / place / "run" for place in ("a", "b")]
    assert _content.gather(runs, compare=True).comparison.names == ("run (1)", "run (2)")


# --- Markdown ---------------------------------------------------------------------------------


def test_markdown_has_the_tables_the_answers_and_the_commands(tmp_path):
    run = write_run(tmp_path / "run", seeds=1)
    entry = verdict("act-all", published_status="refuted")
    write_derived(run, [entry], [], surprises=["act-all: refuted. Not so.", "x: y."])
    out = page.write([run], tmp_path / "report.md", markdown=True)
    told = out.read_text(encoding="utf-8")
    assert told.startswith("# Batch normalization, claim by claim\n")
    row = next(line for line in told.splitlines() if line.startswith("| Does batch"))
    columns = [column.strip() for column in row.strip("|").split("|")]
    assert columns[1:7] == ["refuted", "refuted", "−0.2 points", "−0.55 to +0.15", "0.5", "5"]
    assert columns[7:] == ["C (no variation tried)", "MNIST, MLP 100-100 · budget small"]
    for text in (
        "Not for tanh",
        "- Does batch normalization help whatever the activation? Refuted. Not so.",
        "- x: y.",
        "gammabeta study run activations --budget small --data mnist --out runs/activations",
        "gammabeta study judge run --set act-all.delta=0.25",
        "Cite: The gammabeta developers",
    ):
        assert text in told, text


def test_texts_of_a_stranger_stay_texts_in_markdown(tmp_path):
    run = hostile_run(tmp_path / "run")
    told = page.write([run], tmp_path / "r.md", markdown=True).read_text(encoding="utf-8")
    outside = [line for line in told.splitlines() if not line.startswith("    ")]
    assert not any("<" in line.replace("\\<", "") for line in outside)
    pair = pair_of_runs(tmp_path)
    told = page.write(pair, tmp_path / "c.md", markdown=True, compare=True).read_text()
    assert "| Does turned hold? | refuted, −0.2 points | supported, −0.2 points | another" in told


# --- figures made from rows -------------------------------------------------------------------


def spectra_run(run):
    """Singular values that move to one with batch normalization; none after step 5 without."""
    for norm in ("bn", "none"):
        for seed in (0, 1):
            rows = [
                {"kind": "spectrum", "layer": 1, "norm": norm, "step": step, "x": x,
                 "y": 1 + (x / 50 - 1) / (1 + step * (norm == "bn")) + seed / 10}
                for step in (0, 5, 50) for x in (0.0, 50.0, 100.0)
                if norm == "bn" or step < 50
            ]  # fmt: skip
            arm = {"activation": "relu", "part": "fair", "rates": norm}
            _runs.write_cell(run, spec(arm, seed, experiment="jacobians"), rows, "")
            rows = [
                {"kind": "influence", "from": k, "to": to, "shift": 0.5 * to + seed}
                for k in (1, 2) for to in (2, 3) if to > k
            ]  # fmt: skip
            arm = {"arm": norm, "part": "fair"}
            _runs.write_cell(run, spec(arm, seed, experiment="covariate-shift"), rows, "")
    return run


def test_spectra_over_training_share_steps_and_say_what_is_missing(tmp_path):
    found = _content.gather([spectra_run(tmp_path)]).figures
    spectra = next(f for f in found if f["kind"] == "steps")
    assert spectra["steps"] == [0, 5, 50]
    (panel,) = spectra["panels"]
    assert panel["title"] == "layer 1, ReLU"
    bn, none = panel["series"]
    assert (bn["name"], none["name"]) == ("with batch normalization", "without")
    assert bn["x"] == [0.0, 50.0, 100.0]
    assert bn["y"][0] == pytest.approx([0.05, 1.05, 2.05])  # mean of two seeds
    assert bn["lo"][0] == pytest.approx([0.0, 1.0, 2.0])
    assert bn["hi"][0] == pytest.approx([0.1, 1.1, 2.1])
    assert none["y"][2] is None
    assert "3 steps from 0 to 50" in spectra["alt"]


def test_the_influence_of_layers_is_a_matrix_for_each_arm(tmp_path):
    found = _content.gather([spectra_run(tmp_path)]).figures
    heat = next(f for f in found if f["kind"] == "heat")
    assert [panel["title"] for panel in heat["panels"]] == ["with batch normalization", "without"]
    assert heat["panels"][0]["rows"] == [1, 2]
    assert heat["panels"][0]["columns"] == [2, 3]
    assert heat["panels"][0]["z"] == [[1.5, 2.0], [None, 2.0]]


def test_rows_of_wrong_types_make_no_figure(tmp_path):
    rows = [{"kind": "spectrum", "norm": "bn", "step": "x", "x": HOSTILE[:9], "y": True},
            {"kind": "spectrum", "norm": None, "step": 2, "x": 1.0, "y": None},
            {"kind": "influence", "from": "a", "to": 1e308, "shift": "b"},
            {"kind": "sum", "step": 1, "largest": "x"}]  # fmt: skip
    arm = {"arm": "bn", "part": "fair"}
    _runs.write_cell(tmp_path, spec(arm, 0, experiment="jacobians"), rows, "")
    assert _content.gather([tmp_path]).figures == []


# --- hostile folders --------------------------------------------------------------------------


def _grow(run):
    with open(next(run.glob("cells/*/*/rows.jsonl")), "ab") as file:
        file.truncate(51_000_000)


def _link(run):
    cell = next(run.glob("cells/*/*"))
    cell.rename(run / "elsewhere")
    cell.symlink_to(run / "elsewhere")


def _rows(text):
    def change(run):
        next(run.glob("cells/*/*/rows.jsonl")).write_text(text)

    return change


def _verdicts(**fields):
    def change(run):
        write_derived(run, [verdict("act-all")], [])
        path = run / "verdicts.json"
        value = _runs.read_json(path, "verdicts")
        value["verdicts"][0] |= fields
        path.write_text(json.dumps(value))

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_grow, r"rows\.jsonl: the size: expected at most 50 MB"),
        (_link, "expected a folder, got a file or a symbolic link"),
        (_rows('{"step": NaN}\n'), r"rows\.jsonl: .*NaN is not a finite number"),
        (_rows('{"step": 1e999}\n'), r"rows\.jsonl: .*step"),
        (_rows('{"step": [1]}\n'), r"rows\.jsonl: .*step"),
        (_rows("[" * 100_000), r"rows\.jsonl: "),
        (_verdicts(effect="large"), r"verdicts\.json: verdicts\[0\]: effect: expected"),
        (_verdicts(experiment="../../etc"), r"verdicts\.json: verdicts\[0\]: experiment: expected"),
        (_verdicts(cells=[{"status": 3}]), r"verdicts\.json: verdicts\[0\]\.cells\[0\]: name"),
    ],
)
def test_a_hostile_folder_gives_an_error_that_names_file_and_field(change, told, tmp_path):
    run = tmp_path / "run"
    write_registry(run, registry()[:1])
    _runs.write_cell(run, spec({"norm": "bn"}, 0), [{"step": 1}], "")
    change(run)
    for markdown in (False, True):
        with pytest.raises(_runs.RunError, match=told):
            page.write([run], tmp_path / "out" / "report.html", markdown=markdown)
    assert not (tmp_path / "out").exists()
