"""Claims about numbers that runs end with: seeds, parts, verdicts."""

import pytest

from gammabeta.studies import _asked
from gammabeta.studies._answer import Setting, Words
from gammabeta.studies._asked import Asked

SETTING = Setting("x", "small", "mnist", "net", "one rate", "points")
WORDS = Words("yes {weakest}", "no {refuted}", "seen {weakest}", "some {refuted}")
NOISE = (-0.02, 0.02, -0.01, 0.01, 0.0, 0.015, -0.015, 0.0)


def part(mean, rule="superiority", bound=0.3, level="", precision=0.3, spread=1.0):
    return Asked({s: mean + spread * e for s, e in enumerate(NOISE)}, rule, bound, precision, level)


def pilot(spread):
    return Asked({s: spread * (s % 2) for s in (900, 901, 902, 903)}, "above", 0.0, 0.3)


def decided(fair, **more):
    given = {"least": 5, "notes": []} | more
    return _asked.verdict("bn-order", SETTING, WORDS, fair, {}, **given)


def test_the_mean_is_over_the_last_three_steps_of_the_rows_that_are_meant():
    rows = [
        {"seed": seed, "step": step, "arm": arm, "a": 10.0 * seed + step}
        for seed in (0, 1)
        for step in range(1, 6)
        for arm in ("x", "y")
        if not (arm == "y" and step == 5)
    ]
    assert _asked.ends(rows, "a", {"arm": "x"}) == {0: 4.0, 1: 14.0}
    assert _asked.ends(rows, "a", {"arm": "y"}) == {0: 3.0, 1: 13.0}
    assert _asked.ends(rows, "a", {"arm": "y"}, [1, 5]) == {}
    assert _asked.ends(rows, "b", {}) == {}
    assert _asked.less({0: 2.0, 1: 3.0}, {1: 1.0}) == {1: 2.0}


@pytest.mark.parametrize(("spread", "seeds"), [(0.0, 8), (0.4, 12), (9.0, 16)])
def test_the_widest_part_gives_the_number_of_seeds(spread, seeds):
    both = {"narrow": pilot(0.0), "wide": pilot(spread)}
    assert _asked.planned(both, 8) == seeds
    free = {"narrow": pilot(0.0), "wide": pilot(9.0)._replace(precision=float("inf"))}
    assert _asked.planned(free, 8) == 8


def test_without_the_whole_pilot_no_number_of_seeds_is_known():
    short = pilot(0.1)
    short = short._replace(values={s: v for s, v in short.values.items() if s != 903})
    assert _asked.planned({"all": pilot(0.1), "short": short}, 5) is None
    assert _asked.planned({}, 5) is None


def test_all_parts_have_to_hold_and_the_first_is_the_effect():
    good, bad = part(1.0), part(0.0)
    assert decided({"a": good, "b": part(0.0, "equivalence")}).status == "supported"
    found = decided({"a": good, "b": bad})
    assert (found.status, round(found.effect, 6), found.n) == ("refuted", 1.0, 8)
    assert decided({"a": good, "b": part(0.3, spread=50)}).status == "inconclusive"
    levels = {"a": good._replace(level="one"), "b": bad._replace(level="two")}
    assert decided(levels).status == "mixed"
    few = Asked({0: 1.0, 1: 1.1}, "superiority", 0.3)
    assert decided({"a": few}).status == "inconclusive"
    ten = part(10.0, "number", 10.0)._replace(tolerance=3.0)
    assert decided({"a": ten}).status == "supported"
    assert decided({"a": ten._replace(bound=20.0)}).status == "refuted"


def test_what_was_published_and_what_is_shown_are_told_apart():
    good, bad = {"a": part(1.0)}, {"a": part(0.0)}
    assert decided(good).published_status is None
    assert decided(good, published={}).published_status == "supported"
    other = decided(good, published=bad, beside={"b": {0: 1.0, 1: 2.0}, "c": {0: 1.0}})
    assert (other.status, other.published_status) == ("supported", "refuted")
    assert [c["name"] for c in other.cells if c["part"] == "shown"] == ["b"]
    digits = SETTING._replace(data="digits")
    found = _asked.verdict(
        "bn-order", digits, WORDS, good, {}, least=5, notes=[], published=bad,
        beside={"b": {0: 1.0, 1: 2.0}},
    )  # fmt: skip
    assert {found.status, found.published_status, *(c["status"] for c in found.cells)} == {"demo"}
