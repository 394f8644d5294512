"""The statistics of the studies: rules that turn paired differences into a verdict.

A rule takes one number per seed (the difference between the two arms of a pair, which share
initial weights and batch order), computes a Student t interval, and compares it with the smallest
effect of interest, delta, that was fixed before the rows. A verdict is given only where the
interval allows it; everything else is inconclusive, with the number of seeds that would decide.

Sources: the t interval and the two one-sided tests (equivalence as "the 90 % interval lies inside
±delta") are Schuirmann 1987; superiority with a smallest effect of interest and "every part must
hold" as an intersection-union test are Berger & Hsu 1996; the step-down correction is Holm 1979;
the exact sign-flip test is Fisher 1935.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

STATUSES = ("supported", "refuted", "mixed", "inconclusive", "exact", "fails", "demo")

# Exact enumeration by halves: 2 * 2^20 sums at most.
_SIGN_FLIP_LEAST, _SIGN_FLIP_MOST = 6, 40
# Beyond this many seeds "more would decide" is no advice.
_MOST_SEEDS = 1000
_WIDE = "the interval is too wide"


class Interval(NamedTuple):
    """Mean of n values with its t interval [lo, hi]; sd is the sample standard deviation."""

    mean: float
    lo: float
    hi: float
    n: int
    sd: float
    p_signflip: float | None

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.hi - self.lo) / 2


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a rule says: status, the interval it rests on, and why.

    ``n_needed`` is the number of seeds that would decide an inconclusive outcome if mean and
    standard deviation stayed as they are (None if there is none below 1,000, or nothing to say).
    A universal rule also gives the outcome of each cell and the name of the weakest one, whose
    interval is its own. ``p`` is the p-value of what "supported" has to reject, comparable with
    0.05 for every rule: two-sided for superiority, the larger of two one-sided ones for
    equivalence and number, the largest of its cells for universal.
    """

    status: str
    interval: Interval | None
    reason: str
    n_needed: int | None = None
    cells: Mapping[str, "Outcome"] = dataclasses.field(default_factory=dict)
    weakest: str | None = None
    p: float | None = None


def half_width(sd: float, n: int, level: float = 0.95) -> float:
    """Half-width of the t interval of n values with standard deviation sd: t(n-1) sd / sqrt(n).

    >>> round(half_width(1.0, 5), 4)
    1.2417
    """
    if n < 2:
        raise ValueError(f"an interval needs n >= 2 values, got n = {n}. Run more seeds.")
    return _quantile(0.5 + level / 2, n - 1) * sd / math.sqrt(n)


@functools.cache
def _quantile(probability: float, freedom: int) -> float:
    return float(student.ppf(probability, freedom))


def interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """Two-sided t interval: mean ± t(n-1, (1+level)/2) sd / sqrt(n), sd with n - 1.

    Args:
        values: at least two finite numbers, one per seed.
        level: coverage, between 0 and 1.

    Raises:
        ValueError: fewer than two values, a non-finite value, or a level outside (0, 1).

    >>> i = interval([1.0, 2.0, 3.0])
    >>> round(i.lo, 4), i.mean, round(i.hi, 4)
    (-0.4841, 2.0, 4.4841)
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}. Use 0.95.")
    x = np.asarray(list(values), dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError(
            f"values must be finite, got {x.tolist()}. Leave such seeds out, and say so."
        )
    mean = float(x.mean()) if x.size else math.nan
    # Equal values must give sd = 0 exactly, whatever rounding does to their mean.
    sd = float(x.std(ddof=1)) if x.size > 1 and x.min() < x.max() else 0.0
    half = half_width(sd, x.size, level)
    return Interval(mean, mean - half, mean + half, x.size, sd, sign_flip(x))


def sign_flip(values: Iterable[float]) -> float | None:
    """Exact two-sided sign-flip test that the values are symmetric about 0.

    p = share of the 2^n assignments of signs with ``|sum(s_i x_i)| >= |sum(x_i)|``. Computed for n
    from 6 (below, p cannot fall under 0.05) to 40, else None; all 2^n are counted by splitting
    the values into two halves and sorting the sums of one.

    >>> sign_flip([1.0] * 6)
    0.03125
    """
    x = np.asarray(list(values), dtype=np.float64)
    if not _SIGN_FLIP_LEAST <= x.size <= _SIGN_FLIP_MOST:
        return None
    # Sums equal in exact arithmetic must count as equal.
    bound = abs(float(x.sum())) - 1e-12 * float(np.abs(x).sum())
    left = _signed_sums(x[: x.size // 2])
    right = np.sort(_signed_sums(x[x.size // 2 :]))
    above = right.size - np.searchsorted(right, bound - left, side="left")
    below = np.searchsorted(right, -bound - left, side="right")
    total = left.size * right.size
    return min(1.0, (int(above.sum()) + int(below.sum())) / total)


def _signed_sums(x: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    sums = np.zeros(1)
    for value in x:
        sums = np.concatenate((sums + value, sums - value))
    return sums


def superiority(values: Iterable[float], delta: float, least: int = 2) -> Outcome:
    """Is the mean above 0, and at least delta? (Values signed in the claimed direction.)

    With the 95 % interval [lo, hi]: supported if lo > 0 and mean >= delta; refuted if hi < delta;
    else inconclusive. A refutation is "reversed" (hi < 0), "too small to matter" (lo > 0) or
    "absent". Fewer than ``least`` values are always inconclusive.
    """
    x = _values(values, delta)
    short = _too_few(x, least)
    if short is not None:
        return short
    i = interval(x)
    p = min(1.0, 2 * _p_above(i, 0.0))
    if i.hi < delta:
        reason = "reversed" if i.hi < 0 else "too small to matter" if i.lo > 0 else "absent"
        return Outcome("refuted", i, reason, p=p)
    if i.lo > 0 and i.mean >= delta:
        return Outcome("supported", i, f"above 0, and at least {delta:g} on average", p=p)
    # Above delta the interval has to clear 0, below it has to clear delta.
    needed = seeds_for(i.sd, i.mean if i.mean >= delta else delta - i.mean)
    return Outcome("inconclusive", i, advice(_WIDE, needed), needed, p=p)


def lies_above(values: Iterable[float], bound: float, least: int = 2) -> Outcome:
    """Does the mean lie above a stated value? ("Below" is the same of the negative values.)

    With the 95 % interval [lo, hi]: supported if lo > bound; refuted if hi < bound; else
    inconclusive.

    >>> lies_above([2.1, 2.2, 2.3], 2.0).status
    'inconclusive'
    >>> lies_above([2.1, 2.2, 2.3, 2.2], 2.0).status
    'supported'
    """
    if not math.isfinite(bound):
        raise ValueError(f"bound must be finite, got {bound}. Take it from the rule.")
    x = [float(v) for v in values]
    short = _too_few(x, least)
    if short is not None:
        return short
    i = interval(x)
    p = min(1.0, 2 * _p_above(i, bound))
    if i.lo > bound:
        return Outcome("supported", i, f"above {bound:g}", p=p)
    if i.hi < bound:
        return Outcome("refuted", i, f"below {bound:g}", p=p)
    needed = seeds_for(i.sd, abs(i.mean - bound))
    return Outcome("inconclusive", i, advice(_WIDE, needed), needed, p=p)


def controlled(outcome: Outcome, control: Outcome) -> Outcome:
    """The outcome, where the positive control is supported; else inconclusive.

    A claim about why batch normalization helps is judged only where it helps: ``control`` is the
    superiority of "with" over "without" in the same cells.
    """
    if control.status == "supported":
        return outcome
    reason = f"nothing to explain here: the positive control is {control.status}"
    return dataclasses.replace(outcome, status="inconclusive", reason=reason, n_needed=None)


def helps(values: Iterable[float], delta: float, least: int = 2) -> Outcome:
    """Does batch normalization help here at all? For a positive control: superiority, or its sign.

    A network without batch normalization that diverges under one seed of many is a gain like no
    other, and widens the t interval beyond 0. Where superiority is inconclusive, the exact
    sign-flip test decides (from 6 values; two-sided p at most 0.05, mean at least delta).

    >>> helps([1.0, 1.1, 0.9, 1.2, 1.0, 1.1, 80.0], 0.3).status
    'supported'
    >>> superiority([1.0, 1.1, 0.9, 1.2, 1.0, 1.1, 80.0], 0.3).status
    'inconclusive'
    """
    x = _values(values, delta)
    found = superiority(x, delta, least)
    i = found.interval
    if found.status != "inconclusive" or i is None or len(x) < least or i.p_signflip is None:
        return found
    if i.mean >= delta and i.p_signflip <= 0.05:
        reason = f"above 0 by the exact sign-flip test, and at least {delta:g} on average"
        return Outcome("supported", i, reason, p=i.p_signflip)
    return found


def equivalence(values: Iterable[float], delta: float, least: int = 2) -> Outcome:
    """Is the mean inside ±delta?

    Supported if the 90 % interval lies inside ±delta (two one-sided tests at 5 %); refuted if
    |mean| >= delta and the 95 % interval excludes 0; else inconclusive. The outcome carries the
    95 % interval.
    """
    x = _values(values, delta)
    short = _too_few(x, least)
    if short is not None:
        return short
    narrow, i = interval(x, 0.90), interval(x)
    p = max(_p_above(i, -delta), _p_below(i, delta))
    if -delta < narrow.lo and narrow.hi < delta:
        return Outcome("supported", i, f"within ±{delta:g}", p=p)
    if abs(i.mean) >= delta and (i.lo > 0 or i.hi < 0):
        return Outcome("refuted", i, f"a difference of at least {delta:g}", p=p)
    inside = abs(i.mean) < delta
    needed = seeds_for(
        i.sd, delta - abs(i.mean) if inside else abs(i.mean), 0.9 if inside else 0.95
    )
    return Outcome("inconclusive", i, advice(_WIDE, needed), needed, p=p)


def number(
    values: Iterable[float], value: float, tolerance: float | None = None, least: int = 2
) -> Outcome:
    """Does the mean equal a stated value, up to a tolerance (absolute; default 5 % of it)?

    Supported if the 90 % interval lies inside value ± tolerance; refuted if the 95 % interval
    lies outside it; else inconclusive.
    """
    tolerance = 0.05 * abs(value) if tolerance is None else tolerance
    x = _values(values, tolerance)
    short = _too_few(x, least)
    if short is not None:
        return short
    narrow, i = interval(x, 0.90), interval(x)
    p = max(_p_above(i, value - tolerance), _p_below(i, value + tolerance))
    if value - tolerance < narrow.lo and narrow.hi < value + tolerance:
        return Outcome("supported", i, f"within {tolerance:g} of {value:g}", p=p)
    if i.hi < value - tolerance or i.lo > value + tolerance:
        return Outcome("refuted", i, f"not within {tolerance:g} of {value:g}", p=p)
    gap = tolerance - abs(i.mean - value)
    needed = seeds_for(i.sd, abs(gap), 0.90 if gap > 0 else 0.95)
    return Outcome("inconclusive", i, advice(_WIDE, needed), needed, p=p)


def universal(cells: Mapping[str, Sequence[float]], delta: float, least: int = 2) -> Outcome:
    """Does superiority hold in every cell ("whatever the activation")?

    Supported if every cell is supported (an intersection-union test: no correction); refuted if
    any cell is refuted after Holm's correction over the cells, each with the one-sided p-value
    of "mean >= delta" against alpha = 0.025 (p < 0.025 is hi < delta); else inconclusive. A cell
    refuted only before the correction is shown as inconclusive. The effect is that of the
    weakest cell: smallest mean, with its own interval.
    """
    if not cells:
        return Outcome("inconclusive", None, "no cells")
    outcomes = {name: superiority(x, delta, least) for name, x in cells.items()}
    # Cells that are too small to be judged keep their place in the family, with p = 1.
    p = {
        name: _p_below(o.interval, delta) if o.interval and o.interval.n >= least else 1.0
        for name, o in outcomes.items()
    }
    adjusted = holm(p)
    for name, o in outcomes.items():
        if o.status == "refuted" and adjusted[name] >= 0.025:
            reason = f"{o.reason} alone, but not after Holm's correction over {len(cells)} cells"
            outcomes[name] = dataclasses.replace(o, status="inconclusive", reason=reason)
    means = {name: o.interval.mean for name, o in outcomes.items() if o.interval}
    weakest = min(means, key=lambda name: means[name]) if means else None
    effect = outcomes[weakest].interval if weakest is not None else None

    by = {s: [n for n, o in outcomes.items() if o.status == s] for s in STATUSES}
    if by["refuted"]:
        status, reason = "refuted", _list(by["refuted"], outcomes)
    elif by["inconclusive"]:
        status, reason = "inconclusive", _list(by["inconclusive"], outcomes)
    else:
        status, reason = "supported", f"all {len(cells)} cells supported"
    needs = [outcomes[n].n_needed for n in by["inconclusive"]]
    known = [n for n in needs if n is not None]
    needed = max(known) if status == "inconclusive" and len(known) == len(needs) else None
    # An intersection-union test: all hypotheses have to be rejected, the last one too.
    known_p = [o.p for o in outcomes.values() if o.p is not None]
    largest = max(known_p) if len(known_p) == len(outcomes) else None
    return Outcome(status, effect, reason, needed, outcomes, weakest, largest)


def levels(a: Outcome, b: Outcome) -> str:
    """One status of two levels declared beforehand.

    Mixed only if one is supported and the other refuted; the common status if they agree; else
    inconclusive.
    """
    if a.status == b.status:
        return a.status
    return "mixed" if {a.status, b.status} == {"supported", "refuted"} else "inconclusive"


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values: max over j <= i of min(1, (k - j + 1) p_(j)).

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    adjusted: dict[str, float] = {}
    worst = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = worst
    return {name: adjusted[name] for name in p}


def planned_n(
    pilot_differences: Iterable[float], delta: float, least: int = 5, most: int = 16
) -> int:
    """Number of seeds planned from a pilot that is used for nothing else.

    The smallest n from ``least`` to ``most`` with t(n-1) sd / sqrt(n) <= delta / 2, sd being that
    of the pilot's paired differences; ``most`` if there is none.

    >>> planned_n([0.0, 0.2, 0.1, 0.3], delta=0.3)
    6
    """
    sd = interval(_values(pilot_differences, delta)).sd
    for n in range(least, most):
        if half_width(sd, n) <= delta / 2:
            return n
    return most


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer to one claim, ready to be written as JSON.

    ``status`` is the fair verdict, ``published_status`` the one in the source's own setting.
    ``cells`` holds one dict per contrast: name, part, effect, lo, hi, n, status. ``half_width`` is
    the one reached by the effect, ``planned_half_width`` the one predicted from the pilot. An exact
    claim has no smallest effect of interest: its ``delta`` is None. ``p`` is that of the fair
    outcome. ``place`` says where it was found: "MNIST, MLP 100-100". ``certainty`` is A (exact), B
    (holds in three of four variations at least), C (this setting alone) or D (undecided), "" where
    it was not asked for; ``variations`` says in how many of them the verdict holds, and in which.
    ``n_needed`` is the number of seeds that would decide it, where it is undecided and one is known
    (see ``Outcome``); ``stage`` is 2 where it rests on a second sample of seeds (``_second``).
    """

    claim: str
    experiment: str
    status: str
    published_status: str | None
    effect: float | None
    ci: tuple[float, float] | None
    n: int
    unit: str
    reported: str
    budget: str
    data: str
    delta: float | None
    half_width: float | None
    planned_half_width: float | None
    sentence: str
    cells: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    p: float | None = None
    place: str = ""
    certainty: str = ""
    variations: str = ""
    n_needed: int | None = None
    stage: int = 1

    def __post_init__(self) -> None:
        for status in (self.status, self.published_status):
            if status is not None and status not in STATUSES:
                raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {status!r}.")

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        plain = dataclasses.asdict(self)
        plain["ci"] = list(self.ci) if self.ci is not None else None
        return plain


def _values(values: Iterable[float], delta: float) -> list[float]:
    if not (math.isfinite(delta) and delta > 0):
        raise ValueError(f"delta (or tolerance) must be positive and finite, got {delta}.")
    return [float(v) for v in values]


_ENOUGH: contextvars.ContextVar[int | None] = contextvars.ContextVar("seeds", default=None)


@contextlib.contextmanager
def few_seeds(count: int | None) -> Iterator[None]:
    """Within the block so many seeds are enough for every rule; None: what each rule asks for.

    For a quick look, that decides nothing.
    """
    token = _ENOUGH.set(count)
    try:
        yield
    finally:
        _ENOUGH.reset(token)


def enough(least: int) -> int:
    """The number of seeds that a rule takes for enough here; see ``few_seeds``."""
    few = _ENOUGH.get()
    return least if few is None else min(least, few)


def _too_few(x: Sequence[float], least: int) -> Outcome | None:
    least = max(enough(least), 2)
    if len(x) >= least:
        return None
    measured = interval(x) if len(x) >= 2 else None
    return Outcome("inconclusive", measured, f"{len(x)} of at least {least} seeds", least)


def _p_below(i: Interval, delta: float) -> float:
    """One-sided p-value of the hypothesis "mean >= delta"."""
    if i.sd == 0:
        return 0.0 if i.mean < delta else 1.0
    return float(student.cdf((i.mean - delta) * math.sqrt(i.n) / i.sd, i.n - 1))


def _p_above(i: Interval, bound: float) -> float:
    """One-sided p-value of the hypothesis "mean <= bound"."""
    if i.sd == 0:
        return 0.0 if i.mean > bound else 1.0
    return float(student.sf((i.mean - bound) * math.sqrt(i.n) / i.sd, i.n - 1))


def p_of_interval(mean: float, lo: float, hi: float, n: int) -> float:
    """Two-sided p-value of "the mean is 0" from a 95 % t interval of n values.

    >>> round(p_of_interval(2.0, 0.0, 4.0, 5), 6)
    0.05
    """
    if hi == lo:
        return 0.0 if mean else 1.0
    ratio = abs(mean) / ((hi - lo) / 2) * _quantile(0.975, n - 1)
    return float(2 * student.sf(ratio, n - 1))


def seeds_for(sd: float, target: float, level: float = 0.95) -> int | None:
    """Smallest n whose half-width is below the target, None beyond 1,000."""
    if target <= 0 or half_width(sd, _MOST_SEEDS, level) >= target:
        return None
    low, high = 2, _MOST_SEEDS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if half_width(sd, middle, level) < target else (middle + 1, high)
    return low


def advice(why: str, needed: int | None) -> str:
    if needed is None:
        return f"{why}; more than {_MOST_SEEDS} seeds would be needed"
    return f"{why}; about {needed} seeds would decide"


def _list(names: Sequence[str], outcomes: Mapping[str, Outcome]) -> str:
    return "; ".join(f"{name}: {outcomes[name].reason}" for name in names)
