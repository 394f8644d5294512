"""From the rows of the experiment on class ratios to what its claims are judged by."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Words, points
from gammabeta.studies._claims import claims
from gammabeta.studies._joint import Part
from gammabeta.studies._pairs import Tuning
from gammabeta.studies._tuned import EQUIVALENCE_SEEDS, MOST_SEEDS, PILOT_SEEDS
from gammabeta.studies._verdict import planned_n

ARMS = ("none", "bn", "brn", "ln")
PUBLISHED_RATES = (0.01, 0.0001)
STEPS = 1000  # of the source
# (part, norm, rate) -> seed -> (ratios, mode) -> odds -> balanced accuracy in points
Found = dict[tuple[Scalar, ...], dict[int, dict[tuple[Scalar, Scalar], dict[float, float]]]]


def found_in(rows: Sequence[Row]) -> Found:
    """Balanced accuracy in points, as ``Found`` orders it."""
    found: Found = {}
    for row in rows:
        seed, odds, value = row.get("seed"), row.get("odds"), row.get("balanced")
        if (
            isinstance(seed, int)
            and isinstance(odds, int | float)
            and isinstance(value, int | float)
        ):
            by_seed = found.setdefault((row["part"], row["norm"], row["rate"]), {})
            by_set = by_seed.setdefault(seed, {}).setdefault((row["ratios"], row["mode"]), {})
            by_set[float(odds)] = 100 * float(value)
    return found


def slope(by_odds: Mapping[float, float]) -> float | None:
    """Points per decade of ones per zero; positive: accuracy falls as ones become rare.

    >>> slope({1.0: 99.0, 0.1: 98.0, 0.01: 97.0})
    1.0
    """
    if len(by_odds) < 2:
        return None
    x = [math.log10(odds) for odds in by_odds]
    return round(statistics.linear_regression(x, list(by_odds.values())).slope, 12)


def fall(by_odds: Mapping[float, float]) -> float | None:
    """Points lost from the most ones to the fewest."""
    return by_odds[max(by_odds)] - by_odds[min(by_odds)] if len(by_odds) > 1 else None


def values_of(
    found: Found,
    part: str,
    norm: str,
    rate: float | None,
    mode: str,
    of: Callable[[Mapping[float, float]], float | None] = slope,
    ratios: str = "true",
) -> dict[int, float]:
    """A number of each seed."""
    if norm in ("none", "ln"):
        mode = "running"
    by_seed = found.get((part, norm, rate), {})
    each = {s: of(sets.get((ratios, mode), {})) for s, sets in sorted(by_seed.items())}
    return {s: v for s, v in each.items() if v is not None}


def _mends(found: Found, part: str, rates: Mapping[str, float], mode: str = "whole") -> list[float]:
    """Slope of BN minus slope of Batch Renormalization by seed."""
    bn, brn = (values_of(found, part, norm, rates.get(norm), mode) for norm in ("bn", "brn"))
    return [bn[s] - brn[s] for s in bn if s in brn]


def _slopes(found: Found, part: str, rates: Mapping[str, float], mode: str) -> list[float]:
    return list(values_of(found, part, "bn", rates.get("bn"), mode).values())


def contrasts(found: Found, part: str, rates: Mapping[str, float]) -> dict[str, dict[str, Part]]:
    """The parts of each claim."""
    delta = {claim: claims()[claim].thresholds["delta"] for claim in WORDS}
    whole, running = (_slopes(found, part, rates, mode) for mode in ("whole", "running"))
    falls = {
        mode: list(values_of(found, part, "bn", rates.get("bn"), mode, fall).values())
        for mode in ("running", "precise")
    }
    own = delta["mismatch"]
    hurts = {WHOLE: Part(whole, "superiority", own, level="whole")}
    if part != "published":
        hurts |= {
            f"fall, {mode} statistics": Part(values, "superiority", own, level=mode)
            for mode, values in falls.items()
        }
    return {
        "mismatch": hurts,
        "brn-mismatch": {
            _MENDS: Part(_mends(found, part, rates), "superiority", delta["brn-mismatch"])
        },
        "f-mismatch": {
            WHOLE: Part(whole, "superiority", delta["f-mismatch"]),
            "slope, running statistics": Part(running, "equivalence", delta["f-mismatch"]),
        },
    }


def planned(rows: Sequence[Row], best: Mapping[str, float]) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    needed = []
    for parts in contrasts(found_in(rows), "pilot", best).values():
        for part in parts.values():
            if len(part.values) < len(PILOT_SEEDS):
                return None
            needed.append(planned_n(part.values, part.bound, EQUIVALENCE_SEEDS, MOST_SEEDS))
    return max(needed)


WHOLE = "slope, whole-test-batch statistics"
_MENDS = "slope of BN − slope of Batch Renormalization"
WORDS = {
    "mismatch": Words(
        "rare ones cost accuracy with any statistics: {weakest} per decade",
        "rare ones do not cost {delta} points: {refuted}",
        "accuracy falls per decade by, of {weakest}",
        "rare ones cost accuracy where the test set normalizes itself, not with running or "
        "precise statistics, or the other way round: {weakest} per decade; not: {refuted}",
    ),
    "brn-mismatch": Words(
        "Batch Renormalization loses less as ones become rare: {weakest} per decade",
        "Batch Renormalization does not lose {delta} points per decade less: {refuted}",
        "what Batch Renormalization loses less is {weakest} per decade",
    ),
    "f-mismatch": Words(
        "rare ones cost accuracy with the test set's own statistics and not with running ones: "
        "{weakest} per decade",
        "the effect is not one of the test set's own statistics alone: {refuted}",
        "accuracy falls per decade by, of {weakest}",
    ),
}


def shown(found: Found, best: Mapping[str, float], claim: str, modes: Sequence[str]) -> list[str]:
    """Means that are not in the verdict: other modes, arms and ratios."""
    settings = [("fair", best)]
    settings += [("published", dict.fromkeys(ARMS, rate)) for rate in PUBLISHED_RATES]
    notes = []
    for part, rates in settings:
        where = part if part == "fair" else f"published, rate {rates['bn']:g}"
        if claim == "brn-mismatch":
            each = {mode: _mends(found, part, rates, mode) for mode in modes}
            what = "Slope of BN − Batch Renormalization by mode"
        elif claim == "mismatch":
            each = {
                f"{arm}, {mode}": list(
                    values_of(found, part, arm, rates.get(arm), mode, slope, "intended").values()
                )
                for arm in ARMS
                for mode in (modes if arm in ("bn", "brn") else ("running",))
            }
            what = "Slope with the intended ratios"
        else:
            each = {mode: _slopes(found, part, rates, mode) for mode in modes}
            what = "Slope of BN by mode"
        known = [f"{name} {points(statistics.fmean(v))}" for name, v in each.items() if v]
        if known:
            notes.append(f"{what} ({where}): {', '.join(known)}.")
    return notes


def notes_of(tuning: Tuning, rows: Sequence[Row], steps: int, *, decides: bool) -> list[str]:
    """What a reader must know of the search and of diverged runs; ``steps`` of the training."""
    notes = []
    if tuning.best is not None:
        chosen = ", ".join(f"{arm} {rate:g}" for arm, rate in tuning.best.items())
        notes.append(f"Learning rates chosen: {chosen}.")
    if tuning.missing:
        notes.append(f"Missing: {tuning.missing} tuning runs; nothing fair.")
    elif tuning.at_edge and decides:
        arms = ", ".join(tuning.at_edge)
        notes.append(f"The best learning rate is at the end of all that is tried: {arms}.")
    diverged = {
        (r["part"], r["norm"], r["rate"], r["seed"])
        for r in rows
        if r.get("diverged") and r["part"] != "tuning"
    }
    if diverged:
        notes.append(f"Runs that diverged, and count with the accuracy they had: {len(diverged)}.")
    if not decides:
        notes.append(f"The budget {rows[0]['budget']} tries the wiring; it decides nothing.")
    elif steps < STEPS:
        notes.append(f"As published, but {steps:,} steps for the source's {STEPS:,}.")
    return notes
