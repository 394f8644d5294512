"""Arms that are tuned together and then compared seed by seed: cells, contrasts, notes.

A group is several arms that share a grid of learning rates; the cells of such an experiment have
the fields part ("tuning", "fair" or "pilot"), group, arm and rate.
"""

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
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
    """What the search and the number of seeds take from an experiment's plan."""

    @property
    def rates(self) -> tuple[float, ...]: ...
    @property
    def seeds(self) -> int: ...
    @property
    def decides(self) -> bool: ...


def search(
    runs: Runs, groups: Groups, rates: Sequence[float], *, grow: bool, floor: float = 0.0
) -> dict[str, Tuning]:
    """The state of each group's search, from runs by ``KEYS``; ``floor`` as ``tune`` has it."""
    return {
        group: tune(
            trials(runs, group), rates, TUNING_SEEDS, grow=grow, arms=tuple(arms), floor=floor
        )
        for group, arms in groups.items()
    }


def trials(runs: Runs, group: str) -> dict[tuple[str, float], dict[int, Run]]:
    """Tuning runs of a group by arm and rate."""
    return {
        (str(arm), float(rate)): by_seed
        for (part, name, arm, rate), by_seed in runs.items()
        if (part, name) == ("tuning", group) and isinstance(rate, int | float)
    }


def chosen(tunings: Mapping[str, Tuning]) -> dict[str, dict[str, float]]:
    """Best rates of the groups whose search is settled."""
    return {group: tuning.best for group, tuning in tunings.items() if tuning.best is not None}


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


def every(groups: Groups, best: Best) -> list[Trained]:
    """All arms of all groups, each at its best rate."""
    return [Trained(g, arm, best[g][arm]) for g, arms in groups.items() for arm in arms]


def needed(
    rows: Sequence[Row],
    groups: Groups,
    plan: Budget,
    seeds: int | None,
    asked: Callable[[Best], Iterable[int | None]],
) -> list[Wish]:
    """The cells of an experiment that compares all its arms, given the rows of its budget so far.

    ``asked``: for each claim the seeds that its pilot asks for, None before it is complete.
    """
    tunings = search(collect(rows, KEYS), groups, plan.rates, grow=plan.decides)
    best = chosen(tunings)
    settled = len(best) == len(groups)
    counts = list(asked(best)) if settled else []
    known = [count for count in counts if count is not None]
    return wishes(
        groups,
        tunings,
        every(groups, best) if settled else None,
        least=plan.seeds,
        seeds=seeds,
        pilot=plan.decides,
        planned=max(known) if known and len(known) == len(counts) else None,
    )


def guessed(
    groups: Groups, plan: Budget, seeds: int | None, count: int, more: Sequence[float] = ()
) -> list[Wish]:
    """About what `needed` will have asked for: ``more`` rates, ``count`` seeds by the pilot."""
    rates = (*plan.rates, *more) if plan.decides else plan.rates
    guess = {group: dict.fromkeys(arms, plan.rates[0]) for group, arms in groups.items()}
    return wishes(
        groups,
        search({}, groups, rates, grow=False),
        every(groups, guess),
        least=plan.seeds,
        seeds=seeds,
        pilot=plan.decides,
        planned=count,
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
    pilot: Mapping[str, Sequence[float]],
    planned: int | None,
    notes: Sequence[str],
) -> Verdict:
    """The verdict of a claim whose source has no setting that could be run again here."""
    found = answer(
        claim,
        setting,
        words,
        outcome,
        {},
        delta=claims()[claim].thresholds["delta"],
        pilot=pilot,
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


def tuning_figure(
    experiment: str, key: str, rows: Sequence[Row], runs: Runs, groups: Groups, what: str
) -> list[dict[str, Any]]:
    """How the rates were chosen: validation accuracy over learning rates, a panel for each arm."""
    where = PLACES.get(str(rows[0]["data"]), str(rows[0]["data"]))
    panels = []
    for group in groups:
        tried = trials(runs, group)
        for arm in groups[group]:
            series = rates_curve({("bn", r): by for (a, r), by in tried.items() if a == arm}, "bn",
                                 TUNING_SEEDS)  # fmt: skip
            if series["x"]:
                title = f"{group}: {arm}" if len(groups) > 1 else arm
                panels.append({"title": title, "series": [{**series, "name": arm}]})
    drawn = curves(
        experiment,
        key,
        f"Validation accuracy on {where} over learning rates, {what}",
        "How each arm's learning rate was chosen. Mean and range over two seeds.",
        "learning rate",
        panels,
    )
    return [drawn] if panels else []


def trained_figures(
    experiment: str,
    rows: Sequence[Row],
    groups: Groups,
    plan: Budget,
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
    runs = collect(rows, KEYS)
    best = chosen(search(runs, groups, plan.rates, grow=plan.decides))
    by_panel: dict[str, list[dict[str, Any]]] = {}
    for group, rates in best.items():
        for arm, rate in rates.items():
            if ended := runs.get(("fair", group, arm, rate), {}):
                style = "none" if arm in plain else "bn"
                series = by_panel.setdefault(panel or group, [])
                series.append({**curve(ended, style), "name": arm})
    panels = [{"title": name, "series": series} for name, series in by_panel.items()]
    where = PLACES.get(str(rows[0]["data"]), str(rows[0]["data"]))
    drawn = curves(
        experiment,
        "accuracy",
        title.format(where=where),
        f"{caption} Mean over seeds; the band is its 95 % interval.",
        "training step",
        panels,
    )
    tuned = tuning_figure(experiment, "tuning", rows, runs, groups, what)
    return [*([drawn] if panels else []), *tuned]
