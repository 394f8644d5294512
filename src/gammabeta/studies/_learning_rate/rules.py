"""From the rows of the experiment on learning rates to the verdicts of its claims."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Words, answer
from gammabeta.studies._beside import answered
from gammabeta.studies._claims import claims
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._learning_rate import ladder, speed
from gammabeta.studies._outcomes import asked_for, beside
from gammabeta.studies._pairs import LABELS, NORMS
from gammabeta.studies._tuned import (
    EQUIVALENCE_SEEDS,
    LEAST_SEEDS,
    MOST_SEEDS,
    Best,
    Trained,
    Tuned,
    complete,
    fair_verdict,
    minus,
    shown,
)
from gammabeta.studies._verdict import Verdict, controlled

STEPS = 50000  # of the source of bn-speed
SMALL, LARGE, TENTH = "BN − none at the small rate", "each at its best rate", "at a tenth of it"
PUBLISHED_RATE = 0.1
TARGETS = {"speed": (0.90, 0.93), "published": (0.90, 0.95)}
_SPEED, _TIME = "steps, none / BN", "processor time, none / BN"


def rates_of(best: Best, group: str) -> dict[str, dict[str, float]]:
    """The rates of both arms, by condition."""
    small = best[group]["none"]
    found = {SMALL: dict.fromkeys(NORMS, small), LARGE: dict(best[group])}
    return found | ({TENTH: dict.fromkeys(NORMS, small / 10)} if group == "deep" else {})


def _differences(tuned: Tuned, part: str, group: str) -> dict[str, dict[int, float]]:
    """With minus without BN by condition and seed."""
    if group not in tuned.best:
        return {SMALL: {}, LARGE: {}, TENTH: {}}
    return {
        condition: minus(tuned.runs, part, *(Trained(group, norm, rates[norm]) for norm in NORMS))
        for condition, rates in rates_of(tuned.best, group).items()
    }


def planned(tuned: Tuned) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = _differences(tuned, "pilot", "deep")
    if not complete(pilot):
        return None
    judged = {name: pilot[name] for name in (SMALL, LARGE)}
    deltas = dict.fromkeys(judged, claims()["bjorck-lr"].thresholds["delta"])
    return asked_for(judged, deltas, EQUIVALENCE_SEEDS, MOST_SEEDS)


def _of_part(rows: Sequence[Row], part: str) -> dict[tuple[str, str, float], dict[int, list[Row]]]:
    """Rows of a part by network, arm and rate, then by seed."""
    found: dict[tuple[str, str, float], dict[int, list[Row]]] = {}
    for row in rows:
        rate, seed = row.get("rate"), row["seed"]
        if row.get("part") == part and isinstance(rate, float) and isinstance(seed, int):
            key = (str(row["group"]), str(row["arm"]), rate)
            found.setdefault(key, {}).setdefault(seed, []).append(row)
    return found


def speeds(
    rows: Sequence[Row], part: str, arms: Sequence[Trained], at: str = "step"
) -> tuple[dict[int, float], dict[str, int]]:
    """Mean over the targets of ln(second / first arm) of where they are reached; who is not."""
    by = _of_part(rows, part)
    first, second = (by.get((arm.group, arm.arm, arm.rate), {}) for arm in arms)
    found: dict[int, float] = {}
    late = {arm.arm: 0 for arm in arms}
    for seed in sorted(first.keys() & second.keys()):
        logs = []
        for target in TARGETS[part.removesuffix("-pilot")]:
            where = []
            for arm, by_seed in zip(arms, (first, second), strict=True):
                looks = {_number(row["step"]): row for row in by_seed[seed]}
                x = [_number(looks[s][at]) for s in sorted(looks)]
                y = [_number(looks[s]["validation"]) for s in sorted(looks)]
                place, arrived = speed.reached(target, x, y)
                where.append(max(place, 1e-9))
                late[arm.arm] += not arrived
            logs.append(math.log(where[1] / where[0]))
        found[seed] = statistics.fmean(logs)
    return found, late


def climbs(tuned: Tuned, part: str) -> tuple[dict[str, dict[int, float]], int]:
    """log2 of the ratio with / without of the largest rates, by network; searches without end."""
    by = _of_part(tuned.rows, part)
    found: dict[str, dict[int, float]] = {group: {} for group in tuned.groups}
    open_ended = 0
    for group, ratios in found.items():
        bn, none = (by.get((group, norm, 0.0), {}) for norm in NORMS)
        for seed in sorted(bn.keys() & none.keys()):
            ends = [ladder.largest(arm[seed]) for arm in (bn, none)]
            ratios[seed] = float(ends[0][0] - ends[1][0])
            open_ended += sum(not ended for _, ended in ends)
    return found, open_ended


def shallow(best: Best) -> list[Trained]:
    return [Trained("shallow", norm, best["shallow"][norm]) for norm in NORMS]


def planned_of(part: str, tuned: Tuned, least: int) -> int | None:
    """Seeds that the pilot of another part asks for, None before it is complete."""
    if part == "ladder":
        pilot, delta = (
            climbs(tuned, "ladder-pilot")[0],
            claims()["higher-lr"].thresholds["log2"],
        )
    elif "shallow" in tuned.best:
        pilot = {"speed": speeds(tuned.rows, "speed-pilot", shallow(tuned.best))[0]}
        delta = math.log(claims()["bn-speed"].thresholds["ratio"])
    else:
        return None
    if not complete(pilot):
        return None
    return asked_for(pilot, dict.fromkeys(pilot, delta), least, MOST_SEEDS)


def _number(value: Scalar) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a look must have numbers, got {value!r}. Repeat that cell.")
    return float(value)


def small_rate(tuned: Tuned) -> Verdict:
    """bjorck-lr: nothing gained at the small rate, something at the best ones."""
    delta, best = claims()["bjorck-lr"].thresholds["delta"], tuned.best
    found = _differences(tuned, "fair", "deep")
    parts = {
        SMALL: Part(list(found[SMALL].values()), "equivalence", delta),
        LARGE: Part(list(found[LARGE].values()), "superiority", delta),
    }
    outcome = joint(parts, EQUIVALENCE_SEEDS)
    outcome = controlled(outcome, outcome.cells[LARGE])

    notes = tuned.notes()
    if "deep" in best and best["deep"]["bn"] <= best["deep"]["none"]:
        notes.append("The best rate with BN is not larger than the one without.")
    if outcome.cells[LARGE].status != "supported" and outcome.cells[LARGE].interval:
        notes.append(f"The positive control, BN − none {LARGE}, is not supported.")
    more = shown(f"deep, {TENTH}", list(found[TENTH].values()))
    both = sorted(found[SMALL].keys() & found[LARGE].keys())
    more += shown(
        "deep, gain at the best rates − gain at the small one",
        [found[LARGE][seed] - found[SMALL][seed] for seed in both],
    )
    for name, by_seed in _differences(tuned, "fair", "shallow").items():
        more += shown(f"shallow, {name}", list(by_seed.values()))
    words = Words(
        "batch normalization gains nothing at the small rate, and gains accuracy where each "
        "network has its best rate: {weakest}",
        "the gain of batch normalization is not that of a larger learning rate alone: {refuted}",
        "the gain is {weakest}",
    )
    verdict = fair_verdict(
        "bjorck-lr",
        tuned.setting(
            "learning-rate",
            "MLP of ten layers",
            "at the rate that is best without batch normalization, and each network at its own",
        ),
        words,
        outcome,
        pilot=_differences(tuned, "pilot", "deep"),
        planned=planned(tuned),
        notes=notes,
    )
    return beside(verdict, more)


def fewer_steps(tuned: Tuned, least: int, published_steps: int) -> Verdict:
    """bn-speed: steps to an accuracy; ``least`` seeds."""
    rows, bound = tuned.rows, math.log(claims()["bn-speed"].thresholds["ratio"])
    notes: list[str] = []
    more: list[dict[str, Any]] = []
    steps: dict[int, float] = {}
    pilot: dict[int, float] = {}
    if "shallow" in tuned.best:
        bn, none = shallow(tuned.best)
        steps, late = speeds(rows, "speed", (bn, none))
        notes += _late("", late)
        pilot, _ = speeds(rows, "speed-pilot", (bn, none))
        times, _ = speeds(rows, "speed", (bn, none), "cpu_time")
        more += shown(_TIME, list(times.values()), "time")
        for arm in ("first", "second"):
            other, _ = speeds(rows, "speed", (bn._replace(arm=arm), none))
            more += shown(f"steps, none / BN on the {arm} layer only", list(other.values()))
    both = [Trained("published", norm, PUBLISHED_RATE) for norm in NORMS]
    old, late = speeds(rows, "published", both)
    notes += _late("As published, ", late)
    if tuned.plan.decides and published_steps < STEPS:
        notes.append(f"As published, but {published_steps:,} steps for the source's {STEPS:,}.")
    if steps:
        ratio = math.exp(statistics.fmean(steps.values()))
        notes.append(f"Geometric mean of the ratio of steps: {ratio:.2f}.")
    verdict = answer(
        "bn-speed",
        tuned.setting(
            "learning-rate", "MLP 100-100", unit="natural logarithm of the ratio of steps"
        ),
        Words(
            "batch normalization reaches the accuracies in fewer steps: {weakest}",
            "batch normalization does not save a fifth of the steps: {refuted}",
            "the ratio is {weakest}",
        ),
        joint({_SPEED: Part(list(steps.values()), "above", bound)}, LEAST_SEEDS),
        {
            "Ioffe & Szegedy's network": joint(
                {_SPEED: Part(list(old.values()), "above", bound)}, LEAST_SEEDS
            )
        },
        delta=bound,
        pilot={_SPEED: list(pilot.values())},
        planned=planned_of("speed", tuned, least),
        notes=notes,
    )
    return beside(verdict, more)


def _late(where: str, late: Mapping[str, int]) -> list[str]:
    """How many targets were not reached, by arm."""
    said = ", ".join(f"{count} {LABELS[arm]}" for arm, count in late.items())
    text = f"{where}targets not reached, counted as the last step: {said}."
    return [text[0].upper() + text[1:]] if any(late.values()) else []


def larger_rates(tuned: Tuned, least: int, steps: int) -> Verdict:
    """higher-lr: the largest rate that works in so many steps; ``least`` seeds."""
    bound = claims()["higher-lr"].thresholds["log2"]
    found, open_ended = climbs(tuned, "ladder")
    pilot, _ = climbs(tuned, "ladder-pilot")
    notes = []
    for group, by_seed in found.items():
        if by_seed:
            median = statistics.median(by_seed.values())
            notes.append(f"Median log2 ratio of the largest rates, {group}: {median:g}.")
    if open_ended:
        notes.append(f"Searches that found no rate, or none too large: {open_ended}.")
    return answered(
        "higher-lr",
        tuned.setting(
            "learning-rate",
            "MLPs of two and ten layers",
            f"{steps} steps at each rate",
            "log2 of the ratio of the largest learning rates",
        ),
        Words(
            "batch normalization works at much larger learning rates: {weakest}",
            "batch normalization does not work at four times the learning rate: {refuted}",
            "the ratio is {weakest}",
        ),
        joint(
            {group: Part(list(v.values()), "above", bound) for group, v in found.items()},
            LEAST_SEEDS,
        ),
        {},
        delta=bound,
        pilot={group: list(v.values()) for group, v in pilot.items()},
        planned=planned_of("ladder", tuned, least),
        notes=notes,
        beside={},
    )
