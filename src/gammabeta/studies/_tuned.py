"""Arms that are tuned together and then compared seed by seed: cells, contrasts, notes.

A group is several arms that share a grid of learning rates; the cells of such an experiment have
the fields part ("tuning", "fair" or "pilot"), group, arm and rate.
"""

import dataclasses
import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from gammabeta._runs import Row
from gammabeta.studies._answer import PLACES, Setting, Words, answer
from gammabeta.studies._claims import claims
from gammabeta.studies._pairs import (
    Run,
    Runs,
    Tuning,
    collect,
    curve,
    curves,
    gains,
    rates_curve,
    tune,
)
from gammabeta.studies._verdict import Outcome, Verdict, interval

TUNING_SEEDS = (800, 801)
PILOT_SEEDS = (900, 901, 902, 903)
LEAST_SEEDS, EQUIVALENCE_SEEDS, MOST_SEEDS = 5, 8, 16
KEYS = ("part", "group", "arm", "rate")

Groups = Mapping[str, Sequence[str]]
Best = Mapping[str, Mapping[str, float]]  # group -> arm -> rate


class Trained(NamedTuple):
    """One network to be trained: an arm of a group at a learning rate."""

    group: str
    arm: str
    rate: float


class Wish(NamedTuple):
    """A cell that is wanted."""

    wave: int
    seed: int
    part: str
    what: Trained


class Budget(Protocol):
    """What the search takes from an experiment's plan; rates may be by group."""

    @property
    def rates(self) -> tuple[float, ...] | Mapping[str, tuple[float, ...]]: ...
    @property
    def decides(self) -> bool: ...


class Tuned(NamedTuple):
    """Rows of one budget and data set, and what their search over learning rates says."""

    rows: Sequence[Row]
    groups: Groups
    plan: Budget
    runs: Runs  # by ``KEYS``
    tunings: Mapping[str, Tuning]
    best: Best  # of the groups whose search is settled

    def setting(
        self,
        experiment: str,
        network: str,
        condition: str = "each network at its best learning rate",
        unit: str = "points of accuracy",
    ) -> Setting:
        """Where and how it was measured."""
        budget, data = str(self.rows[0]["budget"]), str(self.rows[0]["data"])
        return Setting(experiment, budget, data, network, condition, unit, self.plan.decides)

    def notes(self, *groups: str) -> list[str]:
        """What a reader must know of the search and of diverged runs, of all groups or of some."""
        tunings = {group: self.tunings[group] for group in groups or self.groups}
        runs = {key: by for key, by in self.runs.items() if not groups or key[1] in groups}
        budget = str(self.rows[0]["budget"])
        return tuning_notes(tunings, budget, decides=self.plan.decides) + diverged_note(runs)

    def ended(self, part: str, group: str, arm: str) -> dict[int, Run]:
        """Runs of an arm at its best rate, by seed; none before the search is settled."""
        if group not in self.best:
            return {}
        return self.runs.get((part, group, arm, self.best[group][arm]), {})

    def minus(self, part: str, group: str, first: str, second: str) -> dict[int, float]:
        """Final accuracy of an arm minus that of another of its group, in points, by seed."""
        return gains(self.ended(part, group, first), self.ended(part, group, second))

    def champion(self, group: str, arms: Sequence[str]) -> str:
        """Of some arms the best on validation; the first, of equals and before rates are chosen."""
        if group not in self.best:
            return arms[0]
        tried, best = trials(self.runs, group), self.best[group]
        return max(
            arms, key=lambda arm: math.fsum(tried[arm, best[arm]][s].final for s in TUNING_SEEDS)
        )

    def gaps(self) -> "Tuned":
        """The same with training minus test accuracy in the place of the accuracy."""
        rows = [
            {**row, "accuracy": seen - held}
            for row in self.rows
            if isinstance(seen := row.get("train_accuracy"), float)
            and isinstance(held := row.get("accuracy"), float)
        ]
        return self._replace(runs=collect(rows, KEYS))


def settle(
    rows: Sequence[Row],
    groups: Groups,
    plan: Budget,
    *,
    runs: Runs | None = None,
    floor: float = 0.0,
) -> Tuned:
    """The state of each group's search.

    Args:
        runs: by ``KEYS``, where not all rows are runs, or another number stands for the accuracy.
        floor: as ``tune`` has it.
    """
    runs = collect(rows, KEYS) if runs is None else runs
    tunings = _searched(runs, groups, plan.rates, grow=plan.decides, floor=floor)
    best = {group: tuning.best for group, tuning in tunings.items() if tuning.best is not None}
    return Tuned(rows, groups, plan, runs, tunings, best)


def guess(
    groups: Groups,
    plan: Budget,
    more: Sequence[float] | Mapping[str, Sequence[float]] = (),
    rate: float | None = None,
) -> Tuned:
    """About how the search ends: grids that grew by ``more``, and one rate for all, the first."""
    grids = {g: (*_by(plan.rates, g), *(_by(more, g) if plan.decides else ())) for g in groups}
    best = {
        group: dict.fromkeys(arms, grids[group][0] if rate is None else rate)
        for group, arms in groups.items()
    }
    return Tuned([], groups, plan, {}, _searched({}, groups, grids, grow=False), best)


def _searched(
    runs: Runs, groups: Groups, rates: Any, *, grow: bool, floor: float = 0.0
) -> dict[str, Tuning]:
    return {
        group: tune(
            trials(runs, group),
            _by(rates, group),
            TUNING_SEEDS,
            grow=grow,
            arms=tuple(arms),
            floor=floor,
        )
        for group, arms in groups.items()
    }


def _by(value: Any, group: str) -> Any:
    """What a group has of a value by group, or of one for all."""
    return value[group] if isinstance(value, Mapping) else value


def trials(runs: Runs, group: str) -> dict[tuple[str, float], dict[int, Run]]:
    """Tuning runs of a group by arm and rate."""
    return {
        (str(arm), float(rate)): by_seed
        for (part, name, arm, rate), by_seed in runs.items()
        if (part, name) == ("tuning", group) and isinstance(rate, int | float)
    }


def wishes(
    groups: Groups,
    tunings: Mapping[str, Tuning],
    main: Sequence[Trained] | None,
    *,
    least: int,
    seeds: int | None,
    pilot: bool,
    planned: int | None,
) -> list[Wish]:
    """Tuning; then the main runs, seed by seed; pilot; more seeds, as many as the pilot asks for.

    Args:
        main: what is compared, None as long as the search is not settled.
        least: seeds at least; seeds: the number that the user wants instead.
        pilot: whether this budget has one.
        planned: seeds that the pilot asks for, None before it is complete.
    """
    wanted = [
        Wish(0, seed, "tuning", Trained(group, arm, rate))
        for seed in TUNING_SEEDS
        for group, tuning in tunings.items()
        for rate in tuning.grid
        for arm in groups[group]
    ]
    if main is None:
        return wanted
    count = least if seeds is None else seeds
    wanted += [Wish(1, seed, "fair", what) for seed in range(count) for what in main]
    if seeds is None and pilot:
        wanted += [Wish(2, seed, "pilot", what) for seed in PILOT_SEEDS for what in main]
        for seed in range(count, planned or 0):
            wanted += [Wish(3, seed, "fair", what) for what in main]
    return wanted


def own(rows: Sequence[Row], budget: str, data: str) -> list[Row]:
    """The rows of a budget and data set."""
    return [row for row in rows if (row["budget"], row["data"]) == (budget, data)]


def every(groups: Groups, best: Best) -> list[Trained]:
    """All arms of all groups, each at its best rate."""
    return [Trained(g, arm, best[g][arm]) for g, arms in groups.items() for arm in arms]


def needed(
    tuned: Tuned,
    least: int,
    seeds: int | None,
    asked: Sequence[int | None],
    main: Callable[[Best], Sequence[Trained]] | None = None,
) -> list[Wish]:
    """The cells of an experiment whose main runs wait until all searches are settled.

    Args:
        least, seeds: as ``wishes`` has them.
        asked: for each claim the seeds that its pilot asks for, None before it is complete.
        main: what is compared, where it is not every arm.
    """
    known = [count for count in asked if count is not None]
    compared = None
    if len(tuned.best) == len(tuned.groups):
        compared = main(tuned.best) if main else every(tuned.groups, tuned.best)
    return wishes(
        tuned.groups,
        tuned.tunings,
        compared,
        least=least,
        seeds=seeds,
        pilot=tuned.plan.decides,
        planned=max(known) if known and len(known) == len(asked) else None,
    )


def needed_in(
    group: str,
    tuned: Tuned,
    least: int,
    seeds: int | None,
    main: Sequence[Trained] | None,
    planned: int | None,
) -> list[Wish]:
    """The cells of a group that does not wait for the others; arguments as ``wishes`` has them."""
    return wishes(
        {group: tuned.groups[group]},
        {group: tuned.tunings[group]},
        main,
        least=least,
        seeds=seeds,
        pilot=tuned.plan.decides,
        planned=planned,
    )


def minus(runs: Runs, part: str, first: Trained, second: Trained) -> dict[int, float]:
    """Final accuracy of one network minus that of another, in points, by seed."""
    return gains(runs.get((part, *first), {}), runs.get((part, *second), {}))


def complete(pilot: Mapping[str, Mapping[int, float]]) -> bool:
    """Whether all pilot seeds gave all contrasts."""
    return bool(pilot) and all(set(PILOT_SEEDS) <= by_seed.keys() for by_seed in pilot.values())


def tuning_notes(tunings: Mapping[str, Tuning], budget: str, *, decides: bool) -> list[str]:
    """What a reader must know of the search."""
    notes = []
    for group, tuning in tunings.items():
        where = f" ({group})" if len(tunings) > 1 else ""
        if tuning.best is not None:
            said = "; ".join(f"{arm} at {rate:g}" for arm, rate in tuning.best.items())
            notes.append(f"Learning rates chosen{where}: {said}.")
        if tuning.missing:
            notes.append(f"Missing: {tuning.missing} tuning runs{where}; nothing to compare.")
        elif tuning.at_edge and decides:
            arms = ", ".join(tuning.at_edge)
            notes.append(f"The best rate is at the end of all that is tried{where}: {arms}.")
    if not decides:
        notes.append(f"The budget {budget} tries the wiring; it decides nothing.")
    return notes


def diverged_note(runs: Runs) -> list[str]:
    """How many of the fair runs diverged."""
    count = sum(r.diverged for key, by in runs.items() if key[0] == "fair" for r in by.values())
    return [f"Runs that diverged, and count with what they had: {count}."] if count else []


def fair_verdict(
    claim: str,
    setting: Setting,
    words: Words,
    outcome: Outcome,
    *,
    pilot: Mapping[str, Mapping[int, float]],
    planned: int | None,
    notes: Sequence[str],
) -> Verdict:
    """The verdict of a claim whose source has no setting that could be run again here.

    ``pilot``: its contrasts by name and seed.
    """
    found = answer(
        claim,
        setting,
        words,
        outcome,
        {},
        delta=claims()[claim].thresholds["delta"],
        pilot={name: list(by_seed.values()) for name, by_seed in pilot.items()},
        planned=planned,
        notes=notes,
    )
    return dataclasses.replace(found, published_status=None)


def shown(name: str, values: Sequence[float], part: str = "shown") -> list[dict[str, Any]]:
    """A cell of a verdict that decides nothing; none, of fewer than two values."""
    if len(values) < 2:
        return []
    i = interval(values)
    both = {"effect": i.mean, "lo": i.lo, "hi": i.hi, "p_signflip": None, "n": i.n}
    return [{"name": name, "part": part, **both, "status": "inconclusive", "reason": "shown"}]


BAND = "Mean over seeds; the band is its 95 % interval."


def place(rows: Sequence[Row]) -> str:
    """The data set in words."""
    return PLACES.get(str(rows[0]["data"]), str(rows[0]["data"]))


def figure(
    experiment: str,
    key: str,
    title: str,
    caption: str,
    panels: Sequence[dict[str, Any]],
    x: str = "training step",
) -> list[dict[str, Any]]:
    """A figure of accuracies, as ``curves`` draws it; none without panels."""
    return [curves(experiment, key, title, caption, x, panels)] if panels else []


def tuning_figure(
    experiment: str, tuned: Tuned, what: str, groups: Groups | None = None
) -> list[dict[str, Any]]:
    """How the rates were chosen: validation accuracy over learning rates, a panel for each arm."""
    groups = tuned.groups if groups is None else groups
    panels = []
    for group in groups:
        tried = trials(tuned.runs, group)
        for arm in groups[group]:
            series = rates_curve({("bn", r): by for (a, r), by in tried.items() if a == arm}, "bn",
                                 TUNING_SEEDS)  # fmt: skip
            if series["x"]:
                title = f"{group}: {arm}" if len(groups) > 1 else arm
                panels.append({"title": title, "series": [{**series, "name": arm}]})
    return figure(
        experiment,
        "tuning",
        f"Validation accuracy on {place(tuned.rows)} over learning rates, {what}",
        "How each arm's learning rate was chosen. Mean and range over two seeds.",
        panels,
        "learning rate",
    )


def trained_figures(
    experiment: str,
    tuned: Tuned,
    title: str,
    caption: str,
    what: str,
    *,
    plain: Container[str] = (),
    panel: str | None = None,
) -> list[dict[str, Any]]:
    """Test accuracy while the fair runs end, a panel for each group; and how rates were chosen.

    Args:
        title: of the first figure, with {where}.
        what: the rates are chosen by or for.
        plain: arms that are drawn as those without batch normalization.
        panel: the title of one panel for all groups, in place of one each.
    """
    by_panel: dict[str, list[dict[str, Any]]] = {}
    for group, rates in tuned.best.items():
        for arm in rates:
            if ended := tuned.ended("fair", group, arm):
                style = "none" if arm in plain else "bn"
                series = by_panel.setdefault(panel or group, [])
                series.append({**curve(ended, style), "name": arm})
    panels = [{"title": name, "series": series} for name, series in by_panel.items()]
    where = place(tuned.rows)
    return [
        *figure(experiment, "accuracy", title.format(where=where), f"{caption} {BAND}", panels),
        *tuning_figure(experiment, tuned, what),
    ]
