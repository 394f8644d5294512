"""From the rows of the experiment on smoothness to the verdicts of its claims."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Setting, Words, answer, span
from gammabeta.studies._beside import answered, control_note, helped
from gammabeta.studies._claims import claims
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._outcomes import asked_for
from gammabeta.studies._pairs import NORMS
from gammabeta.studies._tuned import (
    EQUIVALENCE_SEEDS,
    KEYS,
    LEAST_SEEDS,
    MOST_SEEDS,
    Trained,
    Tuned,
    complete,
    fair_verdict,
)
from gammabeta.studies._verdict import (
    Outcome,
    Verdict,
    controlled,
    interval,
    superiority,
    universal,
)

QUANTITIES = {
    "range": "(a) range of the loss",
    "change": "(b) change of the gradient",
    "beta": "(c) effective beta",
}
PUBLISHED_RATE = 0.1
GHOSTS = (4, 8, 16, 32, 64)
TINY = 1e-12  # a quantity that is smaller, as where the loss has vanished, counts as this
_GRID = 10  # values of the loss at which arms are compared
Looks = Mapping[int, Row]  # by step
Seen = dict[tuple[Scalar, ...], dict[int, dict[int, Row]]]  # KEYS -> seed -> step -> look


def looks(rows: Sequence[Row]) -> Seen:
    """The looks along the gradient, by arm, seed and step; those that have numbers."""
    found: Seen = {}
    for row in rows:
        seed, step = row["seed"], row["step"]
        if "loss" in row and isinstance(seed, int) and isinstance(step, int):
            key = tuple(row[name] for name in KEYS)
            found.setdefault(key, {}).setdefault(seed, {})[step] = row
    return found


def _pair(seen: Seen, part: str, rates: Mapping[str, float]) -> dict[int, tuple[Looks, Looks]]:
    """Looks with and without BN, by seed; none where a rate is missing."""
    if not set(NORMS) <= set(rates):
        return {}
    bn, none = (seen.get((part, *Trained("deep", n, rates[n])), {}) for n in NORMS)
    return {seed: (bn[seed], none[seed]) for seed in sorted(bn.keys() & none.keys())}


def smoother_by(
    seen: Seen, part: str, rates: Mapping[str, float], prefix: str = ""
) -> dict[str, dict[int, float]]:
    """Mean over the looks of ln(without) - ln(with), by quantity and seed."""
    pairs = _pair(seen, part, rates)
    found: dict[str, dict[int, float]] = {name: {} for name in QUANTITIES}
    for name, by_seed in found.items():
        for seed, (bn, none) in pairs.items():
            shared = sorted(bn.keys() & none.keys())
            logs = [log(none[s], prefix + name) - log(bn[s], prefix + name) for s in shared]
            if logs:
                by_seed[seed] = statistics.fmean(logs)
    return found


def at_equal_loss(seen: Seen, part: str, rates: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """The same, at losses that both arms pass through; a seed without such losses has none."""
    found: dict[str, dict[int, float]] = {name: {} for name in QUANTITIES}
    for seed, arms in _pair(seen, part, rates).items():
        ordered = [sorted(arm.values(), key=lambda row: log(row, "loss")) for arm in arms]
        x = [[log(row, "loss") for row in arm] for arm in ordered]
        low, high = max(v[0] for v in x), min(v[-1] for v in x)
        if low >= high:
            continue
        grid = np.linspace(low, high, _GRID)
        for name, by_seed in found.items():
            bn, none = (
                np.interp(grid, at, [log(row, name) for row in arm])
                for at, arm in zip(x, ordered, strict=True)
            )
            by_seed[seed] = float(np.mean(none - bn))
    return found


def log(row: Row, name: str) -> float:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a look must have the number {name}, got {value!r}. Repeat that cell.")
    return math.log(max(value, TINY))


def areas(tuned: Tuned, part: str) -> dict[str, dict[int, float]]:
    """Area of the training loss of each arm by seed, for the seeds that all arms have."""
    found: dict[str, dict[int, dict[int, float]]] = {arm: {} for arm in tuned.groups["deep"]}
    for row in tuned.rows:
        arm, seed, step, loss = row.get("arm"), row["seed"], row["step"], row.get("train_loss")
        rate = tuned.best.get("deep", {}).get(str(arm))
        ours = (row.get("part"), row.get("group"), row.get("rate")) == (part, "deep", rate)
        if ours and isinstance(loss, float) and isinstance(seed, int) and isinstance(step, int):
            found[str(arm)].setdefault(seed, {})[step] = loss
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
    return {
        arm: {seed: statistics.fmean(by_seed[seed].values()) for seed in shared}
        for arm, by_seed in found.items()
    }


def _norms(area: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    """Area of l1 and linf minus that of BN, in mean areas that BN saves."""
    bn, none, others = area["bn"], area["none"], [arm for arm in area if arm not in NORMS]
    saved = statistics.fmean(none[s] - bn[s] for s in bn) if bn else 0.0
    if saved <= 0:
        return {arm: {} for arm in others}
    return {arm: {s: (area[arm][s] - bn[s]) / saved for s in bn} for arm in others}


def planned(tuned: Tuned) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = smoother_by(looks(tuned.rows), "pilot", tuned.best.get("deep", {}))
    area = areas(tuned, "pilot")
    if not complete(pilot) or not complete(area):
        return None
    limits = {claim: claims()[claim].thresholds["delta"] for claim in ("smoother", "lp-norm")}
    wanted = [asked_for(pilot, dict.fromkeys(pilot, limits["smoother"]), LEAST_SEEDS, MOST_SEEDS)]
    norms = {arm: by_seed for arm, by_seed in _norms(area).items() if by_seed}
    if norms:
        deltas = dict.fromkeys(norms, limits["lp-norm"])
        wanted.append(asked_for(norms, deltas, EQUIVALENCE_SEEDS, MOST_SEEDS))
    return max(wanted)


def smoother(tuned: Tuned) -> Verdict:
    """smoother, fair and as published."""
    seen, rates = looks(tuned.rows), tuned.best.get("deep", {})
    same = dict.fromkeys(NORMS, PUBLISHED_RATE)
    limits = claims()["smoother"].thresholds
    control = helped(tuned.runs, "fair", "deep", rates, limits["control"])
    fair, raw = (
        universal(_named(by), limits["delta"], LEAST_SEEDS)
        for by in (smoother_by(seen, "fair", rates), smoother_by(seen, "published", same, "raw_"))
    )
    beside = {
        "at equal loss": at_equal_loss(seen, "fair", rates),
        "at each best rate, not scale-free": smoother_by(seen, "fair", rates, "raw_"),
    }
    return answered(
        "smoother",
        tuned.setting(
            "smoothness",
            "MLP of five layers",
            unit="natural logarithm of the ratio without / with",
        ),
        Words(
            "loss and gradient change less along the gradient with batch normalization, "
            "scale-free; least so {weakest}",
            "loss and gradient do not all change less along the gradient with batch normalization, "
            "scale-free: {refuted}",
            "the smallest contrast, scale-free, is {weakest}",
        ),
        controlled(fair, control),
        {f"rate {PUBLISHED_RATE:g}, not scale-free": raw},
        delta=limits["delta"],
        pilot=_named(smoother_by(seen, "pilot", rates)),
        planned=planned(tuned),
        notes=[*tuned.notes(), *control_note(control)],
        beside={
            f"{QUANTITIES[name]}, {where}": by_seed
            for where, by in beside.items()
            for name, by_seed in by.items()
        },
    )


def other_norms(tuned: Tuned, setting: Setting) -> Verdict:
    """lp-norm: all norms save the same area of the training loss."""
    limits, notes = claims()["lp-norm"].thresholds, tuned.notes()
    area = areas(tuned, "fair")
    saved = superiority(
        [1 - area["bn"][s] / area["none"][s] for s in area["bn"]], limits["control"], LEAST_SEEDS
    )
    if saved.interval:
        notes.append(
            f"Positive control, share of the area of none that BN saves: {span(saved.interval)}, "
            f"{saved.status}."
        )
    parts = {
        f"{arm} − BN": Part(list(v.values()), "equivalence", limits["delta"])
        for arm, v in _norms(area).items()
    }
    found = joint(parts, EQUIVALENCE_SEEDS)
    sizes = {n: abs(c.interval.mean) for n, c in found.cells.items() if c.interval}
    if sizes:
        far = max(sizes, key=lambda name: sizes[name])
        found = dataclasses.replace(found, weakest=far, interval=found.cells[far].interval)
    pilot = {f"{arm} − BN": v for arm, v in _norms(areas(tuned, "pilot")).items()}
    return fair_verdict(
        "lp-norm",
        setting,
        Words(
            "other norms train as well as batch normalization: farthest is {weakest}",
            "other norms do not train as batch normalization does: {refuted}",
            "the area of the training loss differs most for {weakest}",
        ),
        controlled(found, saved),
        pilot=pilot,
        planned=planned(tuned),
        notes=notes,
    )


def by_ghost(tuned: Tuned, batch: int) -> dict[str, dict[int, list[float]]]:
    """ln of the scale-free beta, and final accuracy in points, by m; one number for each seed."""
    rate = tuned.best.get("deep", {}).get("bn")
    runs, seen = tuned.runs, looks(tuned.rows)
    arms = {m: ("ghost", "deep", f"ghost {m}", rate) for m in GHOSTS}
    arms[batch] = ("fair", "deep", "bn", rate)  # a ghost as large as the batch
    shared = sorted(set.intersection(*(set(runs.get(a, {})) & set(seen.get(a, {}))
                                       for a in arms.values())))  # fmt: skip
    return {
        "ln beta": {
            m: [statistics.fmean(log(r, "beta") for r in seen[a][s].values()) for s in shared]
            for m, a in arms.items()
        },
        "accuracy": {m: [runs[a][s].final for s in shared] for m, a in arms.items()},
    }


def spearman(values: Sequence[float]) -> tuple[float, float]:
    """Correlation of the ranks with the order, and the exact p of one that is so small or smaller.

    Of all orders of the values; equal values have the mean of their ranks. All equal: 0 and 1.

    >>> spearman([5, 4, 3, 2])
    (-1.0, 0.041666666666666664)
    """
    ranks = rankdata(values) - (len(values) + 1) / 2
    order = np.arange(len(values)) - (len(values) - 1) / 2
    scale = math.sqrt(float(ranks @ ranks) * float(order @ order))
    if scale == 0:
        return 0.0, 1.0
    every = np.array(list(itertools.permutations(ranks))) @ order
    found = float(ranks @ order)
    return found / scale, float(np.mean(every <= found + 1e-9))


def ghosts(tuned: Tuned, setting: Setting, batch: int) -> Verdict:
    """ghost-less-smooth: smoothness and accuracy by the size of ghosts of a batch."""
    level = claims()["ghost-less-smooth"].thresholds["p"]
    sizes = ", ".join(str(m) for m in (*GHOSTS, batch))
    notes = [*tuned.notes(), f"Ghost sizes {sizes}; 5 seeds, no pilot."]
    cells: dict[str, Outcome] = {}
    for name, by_m in by_ghost(tuned, batch).items():
        count = min(len(values) for values in by_m.values())
        if count < LEAST_SEEDS:
            cells[name] = Outcome("inconclusive", None, f"{count} of at least {LEAST_SEEDS} seeds")
            continue
        means = [statistics.fmean(values) for values in by_m.values()]
        rho, falls = spearman(means)
        _, rises = spearman([-mean for mean in means])
        status = "supported" if falls < level else "refuted" if rises < level else "inconclusive"
        reason = f"correlation of the means {rho:+.2f}, p = {falls:.3f}"
        own = [spearman(one)[0] for one in zip(*by_m.values(), strict=True)]
        cells[name] = Outcome(status, interval(own), reason, p=min(1.0, 2 * falls))
        each = ", ".join(f"{m}: {mean:.2f}" for m, mean in zip(by_m, means, strict=True))
        notes.append(f"Mean {name} by m: {each}; {reason} (falls), {rises:.3f} (rises).")
    statuses = {cell.status for cell in cells.values()}
    status = (
        "refuted" if "refuted" in statuses
        else "supported" if statuses == {"supported"} else "inconclusive"
    )  # fmt: skip
    means_of = {n: c.interval.mean for n, c in cells.items() if c.interval}
    weakest = max(means_of, key=lambda name: means_of[name]) if means_of else None
    ps = [cell.p for cell in cells.values() if cell.p is not None]
    verdict = answer(
        "ghost-less-smooth",
        setting._replace(
            condition="all ghost sizes at the best rate of the whole batch",
            unit="Spearman correlation with m",
        ),
        Words(
            "with smaller ghosts effective beta is larger and test accuracy higher: {weakest}",
            "with smaller ghosts effective beta is not larger, or test accuracy not higher: "
            "{refuted}",
            "correlations with the ghost size are at most {weakest}",
        ),
        Outcome(
            status,
            cells[weakest].interval if weakest else None,
            "; ".join(f"{name}: {cell.reason}" for name, cell in cells.items()),
            cells=cells,
            weakest=weakest,
            p=max(ps) if len(ps) == len(cells) else None,
        ),
        {},
        delta=level,
        pilot={},
        planned=None,
        notes=notes,
    )
    return dataclasses.replace(verdict, published_status=None, delta=None)


def _named(by: Mapping[str, Mapping[int, float]]) -> dict[str, list[float]]:
    return {QUANTITIES[name]: list(values.values()) for name, values in by.items()}
