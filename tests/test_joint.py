"""Claims of several parts: what holds of all of them, and how often chance decides."""

import numpy as np
import pytest

from gammabeta.studies._joint import RULES, Part, any_of, joint, outcome
from gammabeta.studies._verdict import Outcome

CLOSE = [0.99, 1.0, 1.01, 1.0, 0.995]
WIDE = [-2.0, 4.0, 1.0, 0.0, 2.0]

HOLDS = {
    "superiority": Part(CLOSE, "superiority", 0.5),
    "above": Part(CLOSE, "above", 0.5),
    "equivalence": Part([v - 1 for v in CLOSE], "equivalence", 0.5),
    "number": Part(CLOSE, "number", 1.0, 0.2),
    "differs": Part([-v for v in CLOSE], "differs", 0.5),
}
FAILS = {
    "superiority": HOLDS["superiority"]._replace(bound=2.0),
    "above": HOLDS["above"]._replace(bound=2.0),
    "equivalence": Part(CLOSE, "equivalence", 0.5),
    "number": HOLDS["number"]._replace(bound=2.0),
    "differs": HOLDS["differs"]._replace(bound=2.0),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_support_refute_and_leave_open(rule):
    assert joint({"a": HOLDS[rule]}, 5).status == "supported"
    assert joint({"a": FAILS[rule]}, 5).status == "refuted"
    assert joint({"a": HOLDS[rule]._replace(values=WIDE)}, 5).status == "inconclusive"
    assert joint({"a": HOLDS[rule]}, 6).status == "inconclusive"


def test_all_parts_have_to_hold_and_the_effect_is_that_of_the_first():
    found = joint(HOLDS, 5)
    assert found.status == "supported"
    assert found.weakest == "superiority"
    assert found.interval == found.cells["superiority"].interval
    assert joint(HOLDS | {"other": FAILS["above"]}, 5).status == "refuted"
    open_ = HOLDS["above"]._replace(values=WIDE)
    assert joint(HOLDS | {"other": open_}, 5).status == "inconclusive"
    assert joint({}, 5).status == "inconclusive"


def test_why_it_is_supported_is_said_without_a_plural_of_one():
    assert joint({"a": HOLDS["above"]}, 5).reason == outcome(HOLDS["above"], 5).reason
    two = {name: HOLDS[name] for name in ("above", "differs")}
    assert joint(two, 5).reason == "both parts supported"
    assert joint(HOLDS, 5).reason == "all 5 parts supported"


def test_levels_that_disagree_are_mixed():
    first, second = HOLDS["above"]._replace(level="1"), FAILS["above"]._replace(level="2")
    assert joint({"a": first, "b": second}, 5).status == "mixed"
    assert joint({"a": first, "b": first._replace(level="2")}, 5).status == "supported"
    assert joint({"a": first, "b": second._replace(values=WIDE)}, 5).status == "inconclusive"


def test_among_many_parts_a_refutation_needs_more():
    nearly = Part([0.2, 0.9, 0.3, 0.8, 0.5], "above", 0.97)
    assert outcome(nearly, 5).status == "refuted"
    assert outcome(nearly, 5, 20).status == "inconclusive"


def test_of_alternatives_one_is_enough():
    def said(*statuses):
        return any_of([Outcome(s, None, "") for s in statuses])

    assert said("refuted", "supported") == "supported"
    assert said("refuted", "refuted") == "refuted"
    assert said("refuted", "inconclusive") == said() == "inconclusive"


@pytest.mark.parametrize(
    "part",
    [
        Part([], "superiority", 0.3),
        Part([], "above", 0.3),
        Part([], "equivalence", 0.3),
        Part([], "number", 0.6, 0.3),
        Part([], "differs", 0.3),
    ],
)
@pytest.mark.parametrize("sd", [0.05, 0.2])
def test_on_the_boundary_of_a_rule_chance_supports_as_often_as_it_may(part, sd):
    # superiority and "differs" reject "the mean is 0", the others "the mean is at the bound"
    at = 0.0 if part.rule in ("superiority", "differs") else 0.3
    draws = np.random.default_rng(5).normal(at, sd, (1000, 6))
    said = [outcome(part._replace(values=x.tolist()), 5).status for x in draws]
    assert said.count("supported") <= 64


def test_on_the_boundary_many_parts_refute_as_often_as_they_may():
    draws = np.random.default_rng(6).normal(0.3, 0.2, (1000, 4, 6))
    said = [
        joint({str(k): Part(x.tolist(), "above", 0.3) for k, x in enumerate(four)}, 5).status
        for four in draws
    ]
    assert said.count("refuted") <= 64
