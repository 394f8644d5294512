"""The registry of claims is complete and well formed, and says what is wrong with a bad one."""

import hashlib
import json
from typing import Any

import pytest

from gammabeta import _terminal
from gammabeta.studies import _claims
from gammabeta.studies._card import Card
from gammabeta.studies._claims import (
    claims,
    listing,
    overruled,
    parse,
    public,
    resolve,
    rules,
    suggest,
)
from gammabeta.studies._provenance import Rule, digest
from gammabeta.studies._verdict import Verdict

HEADLINE = {
    "ics-reduced",
    "cross-layer-stats",
    "noisy-bn",
    "smoother",
    "bjorck-lr",
    "reg-by-noise",
    "vanishing-depth",
    "jacobian-one",
    "act-all",
    "batch-small",
    "bn-order",
    "no-dropout",
}
# The ids in their order, one a line. Published ids stay; a new claim changes this line alone.
IDS = (132, "c8078f925409f8de8f1cbc56a4bfc55b0c058d06411ba5c371b0dbaef9264ea7")
RUNNABLE = {"activations": ("act-all", "act-sigmoid-most")}

GOOD = {
    "id": "a-claim",
    "title": "One sentence.",
    "question": "Is it so?",
    "origin": "text",
    "source": "Somebody 2015",
    "kind": "exact",
    "topic": "speed",
    "rule": "Identity.",
}


def toml(*tables: dict[str, object]) -> str:
    # JSON's texts, numbers and booleans are TOML's as well.
    bodies = ["\n".join(f"{k} = {json.dumps(v)}" for k, v in t.items()) for t in tables]
    return "\n".join(f"[[claim]]\n{body}\n" for body in bodies)


# --- the registry itself --------------------------------------------------------------------


def test_every_claim_is_there_in_order() -> None:
    ids = list(claims())
    assert (len(ids), hashlib.sha256("\n".join(ids).encode()).hexdigest()) == IDS
    assert {"ics-def", "f-jac2", "gamma-grad", "beta-grad", "mf-orthogonal"} <= set(ids)
    assert {claim.id for claim in claims().values() if claim.headline} == HEADLINE


@pytest.mark.parametrize("claim", claims().values(), ids=list(claims()))
def test_the_texts_fit_a_terminal_and_a_page(claim: _claims.Claim) -> None:
    assert claim.question.endswith("?")
    assert len(claim.question) <= 72
    assert claim.title.endswith(".")
    assert claim.rule.endswith(".")
    assert (claim.title + claim.question).isascii()  # these go to terminals
    for text in (claim.title, claim.reported, claim.rule, claim.caveats):
        assert "[R]" not in text
        assert "`" not in text


def test_a_claim_named_in_a_text_exists() -> None:
    named = ("ics-gradient", "weight-pythagoras", "noisy-bn", "f-lr", "bn-speed", "batch-U")
    texts = " ".join(claim.rule + claim.caveats for claim in claims().values())
    for name in named:
        assert name in texts
        assert name in claims()


def test_the_first_experiment_decides_two_claims() -> None:
    decided = {i: c.thresholds for i, c in claims().items() if c.experiment == "activations"}
    assert decided == {"act-all": {"delta": 0.3}, "act-sigmoid-most": {"delta": 0.3}}
    assert "sigmoid +3.6" in claims()["act-all"].reported
    assert "+2.2" in claims()["act-sigmoid-most"].reported


def test_changing_what_is_returned_leaves_the_registry_alone() -> None:
    claims().clear()
    public()[0]["id"] = "other"
    assert len(claims()) == IDS[0]
    assert public()[0]["id"] == "ics-def"


# --- the schema -----------------------------------------------------------------------------


def test_a_good_claim_is_read_and_its_lines_are_folded() -> None:
    text = toml(GOOD).replace('"Identity."', '"""\n  Identity,\n  twice."""')
    claim = parse(text)["a-claim"]
    assert claim.rule == "Identity, twice."
    assert (claim.reported, claim.caveats, claim.experiment) == ("", "", None)
    assert (claim.headline, claim.thresholds) == (False, {})


def test_thresholds_become_floats() -> None:
    text = toml(GOOD | {"experiment": "x"}) + "[claim.thresholds]\ndelta = 1\n"
    (value,) = parse(text)["a-claim"].thresholds.values()
    assert isinstance(value, float)


@pytest.mark.parametrize("field", [field for field in GOOD if field != "id"])
def test_a_missing_field_is_named(field: str) -> None:
    table = {k: v for k, v in GOOD.items() if k != field}
    with pytest.raises(ValueError, match=f"a-claim: field '{field}'.*got none. Add it."):
        parse(toml(table))


def test_a_claim_without_id_is_named_by_its_place() -> None:
    table = {k: v for k, v in GOOD.items() if k != "id"}
    with pytest.raises(ValueError, match="claim number 2: field 'id'"):
        parse(toml(GOOD, table))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sourse": "x"}, "a-claim: field 'sourse'.*Did you mean 'source'"),
        ({"protocol": "x"}, "a-claim: field 'protocol'.*Remove it"),
        ({"kind": "statistic"}, "field 'kind'.*got 'statistic'. Did you mean 'statistical'"),
        ({"origin": "seed"}, "field 'origin'.*one of text, beyond, got 'seed'"),
        ({"topic": "speeds"}, "field 'topic'.*Did you mean 'speed'"),
        ({"topic": ["speed"]}, "field 'topic': expected text in quotes"),
        ({"id": "A_claim"}, "claim number 1: field 'id'.*got 'A_claim'"),
        ({"id": "a" * 65}, "field 'id': expected 1 to 64"),
        ({"id": "a-claim\n"}, "field 'id'"),
        ({"id": "all"}, "field 'id'.*none of headline, all"),
        ({"id": "All"}, "field 'id'.*none of headline, all, got 'All'"),
        ({"experiment": "a.b"}, "a-claim: field 'experiment'"),
        ({"experiment": "Abc"}, "field 'experiment': expected 1 to 64 of a-z, 0-9 and -"),
        ({"experiment": "a-claim"}, "field 'experiment'.*an id that no claim has"),
        ({"id": "A-Claim", "experiment": "a-claim"}, "A-Claim: field 'experiment'.*no claim has"),
        ({"headline": 1}, "field 'headline': expected true or false, got 1"),
        ({"title": "  "}, "field 'title': expected a text, got an empty one"),
        ({"thresholds": 3}, "field 'thresholds': expected a table of numbers"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(toml(GOOD | change))


@pytest.mark.parametrize("value", ['"0.3"', "true", "nan", "inf"])
def test_a_threshold_is_a_finite_number(value: str) -> None:
    text = toml(GOOD) + f"[claim.thresholds]\ndelta = {value}\n"
    with pytest.raises(ValueError, match=r"field 'thresholds\.delta': expected a finite"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (toml(GOOD, GOOD), "a-claim: field 'id': expected every id once"),
        (toml(GOOD, GOOD | {"id": "a-Claim"}), "a-Claim: field 'id': expected every id once"),
        ("[[claim]]\nid = x\n", "expected TOML.*line 2"),
        ("[[claims]]\n", "expected nothing but .*got 'claims'"),
        ("[claim]\nid = 'x'\n", "double brackets"),
        ("claim = [1]\n", "double brackets"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"claims\.toml: .*{message}"):
        parse(text)


# --- asking ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], []),
        (["act-all"], ["activations"]),
        (["activations", "act-sigmoid-most", "act-all"], ["activations"]),
        (["other", "ACT-ALL"], ["other", "activations"]),
        (["headline"], ["activations"]),
        (["all"], ["activations", "other"]),
        (["other", "all"], ["other", "activations"]),
    ],
)
def test_ids_become_experiments(ids: list[str], expected: list[str]) -> None:
    assert resolve(ids, {**RUNNABLE, "other": ()}) == expected


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            ["act-all", "act-al"],
            r"unknown claim or experiment 'act-al'\. Did you mean act-all\? "
            r"`gammabeta study list` shows all\.",
        ),
        (["activation"], "Did you mean activations"),
        (["headlines"], "Did you mean headline"),
        (["xyzzy"], r"unknown claim or experiment 'xyzzy'\. `gammabeta study list`"),
        (["\x1b[2J"], r"'\\x1b\[2J'"),
        (["adversarial"], r"claim 'adversarial' has no experiment yet\..* run: activations\."),
        (["batch-U"], r"claim 'batch-U' has no experiment yet"),
        (["batch-u"], r"claim 'batch-U' has no experiment yet"),
    ],
)
def test_an_id_that_cannot_be_run_is_explained(ids: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(ids, RUNNABLE)


@pytest.mark.parametrize(
    ("experiments", "message"),
    [
        ({"noisy-bn": ()}, "experiment 'noisy-bn': expected an id that is neither"),
        ({"batch-u": ()}, "experiment 'batch-u': expected an id that is neither"),
        ({"all": ()}, "experiment 'all'"),
        ({"activations": ("act-al",)}, "CLAIMS: unknown.*'act-al'.*Did you mean act-all"),
        ({"other": ("act-all",)}, "'act-all'.*'other'.*gives it the experiment 'activations'"),
    ],
)
def test_experiments_that_contradict_the_registry_are_refused(
    experiments: dict[str, tuple[str, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(["headline"], experiments)


def test_of_a_claim_without_experiment_neither_cells_nor_thresholds_are_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_claims, "_file", lambda: parse(toml(GOOD)))
    with pytest.raises(ValueError, match=r"'a-claim'.*gives it the experiment None"):
        resolve(["headline"], {"other": ("a-claim",)})
    with pytest.raises(ValueError, match="'a-claim' has no threshold 'delta'; it has none yet"):
        rules(["a-claim.delta=1"])


@pytest.mark.parametrize("given", ["a-CLAIM", "a-claim", " A-Claim "])
def test_capitals_do_not_matter_in_what_is_asked(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    text = toml(GOOD | {"id": "a-CLAIM", "experiment": "x"}) + "[claim.thresholds]\ndelta = 1\n"
    monkeypatch.setattr(_claims, "_file", lambda: parse(text))
    assert resolve([given], {"x": ("a-CLAIM",)}) == ["x"]
    assert rules([f"{given}.delta=2"]) == {"a-CLAIM": {"delta": 2.0}}


def test_the_nearest_names_come_first() -> None:
    assert suggest("act-al", claims())[0] == "act-all"
    assert suggest("BN-Ordr", claims())[0] == "bn-order"
    assert suggest("batchU", claims())[0] == "batch-U"
    assert suggest("xyzzy", claims()) == []


# --- other rules ----------------------------------------------------------------------------


def test_another_rule_holds_within_its_block_only() -> None:
    with overruled(rules(["act-all.delta=1", "ACT-ALL.delta=0.5"])):
        assert claims()["act-all"].thresholds == {"delta": 0.5}
        assert claims()["act-sigmoid-most"].thresholds == {"delta": 0.3}
        assert list(claims()) == [row["id"] for row in public()]
    assert claims()["act-all"].thresholds == {"delta": 0.3}


def test_the_registry_is_back_after_an_error() -> None:
    with pytest.raises(KeyError), overruled({"act-all": {"delta": 0.5}}):
        raise KeyError
    assert claims()["act-all"].thresholds == {"delta": 0.3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("delta=0.5", r"expected CLAIM\.THRESHOLD=VALUE.*got 'delta=0\.5'"),
        ("act-all.delta", "expected CLAIM"),
        ("act-all.delta=", "expected CLAIM"),
        ("act-all.delta=nan", "finite number"),
        ("act-al.delta=1", "'act-al'.*Did you mean act-all"),
        ("act-all.alpha=1", "'act-all' has no threshold 'alpha'; it has delta"),
        ("batch-u.alpha=1", "'batch-U' has no threshold 'alpha'; it has delta"),
    ],
)
def test_a_wrong_rule_is_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rules([text])


# --- giving ---------------------------------------------------------------------------------


def test_the_listing_has_exactly_its_keys() -> None:
    rows = listing()
    assert [row["id"] for row in rows] == list(claims())
    for row in rows:
        assert list(row) == ["id", "title", "origin", "source", "experiment", "kind"]
    by_id = {row["id"]: row for row in rows}
    assert by_id["act-all"]["experiment"] == "activations"
    assert {i: row["experiment"] for i, row in by_id.items()} == {
        i: claim.experiment for i, claim in claims().items()
    }
    assert json.loads(json.dumps(rows)) == rows


def test_the_public_form_has_every_field_and_survives_json() -> None:
    rows = public()
    assert len(rows) == IDS[0]
    for row in rows:
        assert set(row) == set(_claims.Claim._fields)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


# --- what the terminal says of it -----------------------------------------------------------


def explained(capsys: pytest.CaptureFixture[str], claim: str, **fields: Any) -> str:
    """The words of `study explain`, with line ends as spaces."""
    one = Verdict(
        claim=claim, experiment="x", published_status=None, effect=1.0, ci=(-1.0, 3.0), n=16,
        unit="points", reported="", budget="small", data="mnist", delta=0.3, half_width=2.0,
        planned_half_width=None, sentence="An answer.", certainty="",
        **{"status": "inconclusive", **fields},
    )  # fmt: skip
    rule = Rule("0" * 16, None, None, "2026-01-01", amended=True)
    _terminal.explain(Card(claims()[claim], "", rule, one, [], None, None, []))
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("claim", "fields", "told"),
    [
        ("selu", {"n_needed": 20}, "judges these alone: gammabeta study more selu That about 20"),
        ("selu", {"n_needed": 423}, "423 seeds, more than 128. That about 423 seeds"),
        ("selu", {"n_needed": 20, "stage": 2}, "no third: it stays undecided here. That about 20"),
        ("noisy-bn", {"n_needed": 20}, "`gammabeta study run noisy-bn --variant fresh-seeds`"),
        ("selu", {}, "does not say how many seeds would decide it"),
    ],
)
def test_of_an_undecided_claim_the_terminal_says_what_can_be_done(
    capsys: pytest.CaptureFixture[str], claim: str, fields: dict[str, object], told: str
) -> None:
    out = explained(capsys, claim, **fields)
    assert out.index("What can be done") < out.index(told) < out.index("Verdicts")
    assert ("if mean and spread stay as they were" in out) == ("n_needed" in fields)
    assert "What can be done" not in explained(capsys, claim, **fields, status="refuted")


def test_why_a_rule_was_amended_is_told_and_is_no_part_of_the_rule(
    capsys: pytest.CaptureFixture[str],
) -> None:
    amended = {name for name, claim in claims().items() if claim.amended}
    assert amended == {"smoother", "ics-reduced", "cross-layer-stats", "noisy-bn"}
    for name in amended:
        claim = claims()[name]
        assert claim.amended in explained(capsys, name)
        assert digest(claim) == digest(claim._replace(amended=""))
    assert "why" not in explained(capsys, "selu").split("amended after data")[1]
