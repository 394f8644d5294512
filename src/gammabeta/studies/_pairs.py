"""Pairs of arms, with and without batch normalization: from rows to gains, rates and curves.

An experiment that compares the two arms hands its rows to ``collect`` and gets one ``Run`` for
each arm and seed. ``tune`` picks the learning rate of each arm from a grid that grows while the
best value lies at its edge; ``gains`` pairs the arms seed by seed.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._verdict import interval

NORMS = ("bn", "none")
LABELS = {"bn": "with batch normalization", "none": "without"}
# The learning rates that a grid may grow to; beyond its ends the search stops, and says so.
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Run(NamedTuple):
    """One finished cell: accuracies in percent at increasing steps."""

    steps: list[int]
    accuracy: list[float]
    accuracy_batch: list[float]  # by test-batch statistics, where it was measured beside
    diverged: bool

    @property
    def final(self) -> float:
        """The metric: mean of the last three evaluations."""
        return _last_three(self.accuracy)

    @property
    def final_batch(self) -> float:
        """The same by test-batch statistics, where they differ."""
        return _last_three(self.accuracy_batch) if self.accuracy_batch else self.final


Runs = dict[tuple[Scalar, ...], dict[int, Run]]


def collect(rows: Sequence[Row], keys: Sequence[str]) -> Runs:
    """Runs by the values of the arm's ``keys``, then by seed; rows that lack one are no runs."""
    grouped: dict[tuple[Scalar, ...], dict[int, dict[int, Row]]] = defaultdict(dict)
    for row in rows:
        if all(key in row for key in (*keys, "seed", "step", "accuracy")):
            arm = tuple(row[key] for key in keys)
            # By step: a cell that was measured twice counts once.
            grouped[arm].setdefault(_integer(row["seed"]), {})[_integer(row["step"])] = row
    return {
        arm: {seed: _run(by_step) for seed, by_step in sorted(seeds.items())}
        for arm, seeds in grouped.items()
    }


def _run(by_step: Mapping[int, Row]) -> Run:
    rows = [by_step[step] for step in sorted(by_step)]
    return Run(
        sorted(by_step),
        [100 * _real(row["accuracy"]) for row in rows],
        [100 * _real(row["accuracy_batch"]) for row in rows if "accuracy_batch" in row],
        any(bool(row.get("diverged")) for row in rows),
    )


class Tuning(NamedTuple):
    """The state of a search: the grid so far, and the best rate of each arm once it is settled."""

    grid: tuple[float, ...]
    best: dict[str, float] | None  # None: trials of this grid are missing
    missing: int
    at_edge: tuple[str, ...]  # arms whose best rate is at an end all the same


def tune(
    trials: Mapping[tuple[str, float], Mapping[int, Run]],
    grid: Sequence[float],
    seeds: Sequence[int],
    *,
    grow: bool = True,
    arms: Sequence[str] = NORMS,
    floor: float = 0.0,
) -> Tuning:
    """Choose each arm's learning rate by the mean validation accuracy over the tuning seeds.

    A rate that diverged with any seed is not chosen unless all did. If the best rate of any arm
    is at an edge, the next value of the ladder is added for all arms, which so have the same
    number of trials; of equal rates the smaller is taken.

    Args:
        trials: runs by (arm, rate) and seed.
        grid: consecutive values of ``LADDER``, if it shall grow.
        arms: the arms that are compared.
        floor: an arm whose best accuracy lies below it, in percent, is at chance at every rate: the
            grid does not grow for it.
    """
    rates = sorted(grid)
    while True:
        wanted = [(norm, rate, seed) for norm in arms for rate in rates for seed in seeds]
        missing = sum(s not in trials.get((norm, rate), {}) for norm, rate, s in wanted)
        if missing:
            return Tuning(tuple(rates), None, missing, ())
        best, learns = {}, []
        for norm in arms:
            tried = {r: [trials[norm, r][s] for s in seeds] for r in rates}
            stable = [r for r in rates if not any(run.diverged for run in tried[r])] or rates
            # max() keeps the first of equals.
            best[norm] = max(stable, key=lambda r: math.fsum(run.final for run in tried[r]))
            if math.fsum(run.final for run in tried[best[norm]]) >= floor * len(seeds):
                learns.append(best[norm])
        more = []
        if grow and rates[-1] in learns:
            more += [r for r in LADDER if r > rates[-1]][:1]
        if grow and rates[0] in learns:
            more += [r for r in LADDER if r < rates[0]][-1:]
        if not more:
            edges = (rates[0], rates[-1])
            at_edge = tuple(norm for norm in arms if best[norm] in edges)
            return Tuning(tuple(rates), best, 0, at_edge)
        rates = sorted([*rates, *more])


def gains(
    with_bn: Mapping[int, Run], without: Mapping[int, Run], *, batch: bool = False
) -> dict[int, float]:
    """Gain in points by seed, for the seeds that both arms have.

    ``batch``: by test-batch statistics, where they were measured beside.
    """
    metric = "final_batch" if batch else "final"
    shared = sorted(with_bn.keys() & without.keys())
    return {s: getattr(with_bn[s], metric) - getattr(without[s], metric) for s in shared}


def unpaired(with_bn: Mapping[int, Run], without: Mapping[int, Run]) -> list[int]:
    """Seeds that only one arm has."""
    return sorted(with_bn.keys() ^ without.keys())


def curve(runs: Mapping[int, Run], norm: str) -> dict[str, Any]:
    """One series of a figure: mean accuracy over seeds with its 95 % interval, step by step.

    Only steps that all seeds share; with one seed the band has no width.
    """
    shared = set.intersection(*(set(run.steps) for run in runs.values())) if runs else set()
    steps = sorted(shared)
    bands = [band([run.accuracy[run.steps.index(s)] for run in runs.values()]) for s in steps]
    return {"name": LABELS[norm], "style": norm, "x": steps, "n": len(runs), **_columns(bands)}


def band(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t interval, cut to 0 ... 100 percent; of one value, the value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    i = interval(values)
    return i.mean, max(i.lo, 0.0), min(i.hi, 100.0)


def rates_curve(
    trials: Mapping[tuple[str, float], Mapping[int, Run]], norm: str, seeds: Sequence[int]
) -> dict[str, Any]:
    """One series of a figure: validation accuracy over learning rates, mean and range."""
    tried = {r: [run.final for s, run in by.items() if s in seeds]
             for (arm, r), by in trials.items() if arm == norm}  # fmt: skip
    rates = sorted(r for r, finals in tried.items() if finals)
    bands = [(math.fsum(tried[r]) / len(tried[r]), min(tried[r]), max(tried[r])) for r in rates]
    count = min((len(tried[r]) for r in rates), default=0)
    return {"name": LABELS[norm], "style": norm, "x": rates, "n": count, **_columns(bands)}


def curves(
    experiment: str,
    key: str,
    title: str,
    caption: str,
    x: str,
    panels: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """A figure of accuracies in percent, with a text alternative that tells where they end."""
    ends = []
    for panel in panels:
        each = ", ".join(f"{s['y'][-1]:.1f} % {s['name']}" for s in panel["series"] if s["y"])
        ends.append(f"{panel['title']} {each}")
    return {
        "id": f"{experiment}-{key}",
        "experiment": experiment,
        "kind": "curves",
        "title": title,
        "caption": caption,
        "alt": f"{title}. Curves over the {x}, at their right end: {'; '.join(ends)}.",
        "x": {"label": x, "log": True},
        "y": {"label": "accuracy (%)", "log": False},
        "panels": list(panels),
    }


def _columns(bands: Sequence[tuple[float, float, float]]) -> dict[str, list[float]]:
    return {name: [values[k] for values in bands] for k, name in enumerate(("y", "lo", "hi"))}


def _last_three(values: Sequence[float]) -> float:
    return math.fsum(values[-3:]) / len(values[-3:])


def _integer(value: Scalar) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"seed and step must be whole numbers, got {value!r}. Repeat that cell.")
    return value


def _real(value: Scalar) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"accuracies must be numbers, got {value!r}. Repeat that cell.")
    return float(value)
