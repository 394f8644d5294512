"""A second stage: fresh seeds for what the first left open, judged by these seeds alone.

The registry's rules ask for 16 seeds at most. Where a claim stays undecided, and says that so many
seeds more would decide it, they are run, once:

which     every statistical claim, undecided on MNIST in its fair part at `small`, for which
          `ASKED` seeds at most are said to decide all that is open. Not the headline claims, whose
          p-values are one family of fixed size and which `fresh-seeds` repeats; nor a claim that
          one of them decides
how many  twice as many as would decide, at least `LEAST`, at most `MOST`: mean and spread that are
          taken from a few seeds err, and an interval that just reaches its limit decides half of
          the time
seeds     200, 201, ..., which no other run has
cells     those main runs without which the claim's fair verdict would be another one. Nothing is
          searched again: rates and doses are those of the first stage
verdict   the claim's own rule on the second sample alone. The first sample chose that there is a
          second, so it may not count twice. What the second says stands, and the first beside it;
          one that is still undecided stays so: there is no third

Each such claim was tested twice: 5 % more false "supported" are to be expected of each.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gammabeta import _runs
from gammabeta._runs import Row, StoredCell
from gammabeta.studies._claims import claims
from gammabeta.studies._experiments import SECOND, Cell, Experiment, experiments
from gammabeta.studies._verdict import Verdict

FIRST_SEED = 200
ASKED, LEAST, MOST = 128, 16, 256
_OF = "small"  # the budget that the first stage had
_CHOSE = 800  # seeds from here on chose rates and numbers of seeds
_AS_PUBLISHED = "As published"  # how notes on it begin
_BY_HEADLINE = ("keep-consistent",)  # the opposite of noisy-bn


class Asked(NamedTuple):
    """A claim that gets a second sample, and of how many seeds."""

    claim: str
    experiment: str
    seeds: int


def asked(verdict: Verdict) -> Asked | None:
    """The second sample that a verdict of the first stage asks for, None for none."""
    if reason_against(verdict) or verdict.n_needed is None:
        return None
    seeds = min(MOST, max(LEAST, 2 * verdict.n_needed))
    return Asked(verdict.claim, verdict.experiment, seeds)


def reason_against(verdict: Verdict) -> str:
    """Why a verdict of the first stage gets no second sample, "" where it gets one."""
    name, known = verdict.claim, claims().get(verdict.claim)
    if verdict.data != "mnist" or verdict.budget != _OF:
        return f"{name} was judged on {verdict.data} at {verdict.budget}, not on mnist at {_OF}."
    if known is None or known.headline or name in _BY_HEADLINE:
        repeats = "noisy-bn" if name in _BY_HEADLINE else name
        return (
            f"{name} is a headline claim, or decided by one, and gets no second stage: `gammabeta "
            f"study run {repeats} --variant fresh-seeds` repeats it with as many fresh seeds."
        )
    if verdict.status != "inconclusive":
        return f"{name} is decided: {verdict.status}."
    if verdict.n_needed is None:
        return f"{name} does not say how many seeds would decide it; its notes say why."
    if verdict.n_needed > ASKED:
        return f"{name} asks for about {verdict.n_needed} seeds, more than {ASKED}."
    return ""


class Planned(Experiment):
    """An experiment whose cells are a given list; to a worker it goes without them."""

    wanted: tuple[Cell, ...]

    def __init__(self, experiment: Experiment, wanted: Iterable[Cell]) -> None:
        super().__init__(experiment.id, experiment.module)
        object.__setattr__(self, "wanted", tuple(wanted))

    def __reduce__(self) -> tuple[type[Experiment], tuple[str, str]]:
        return Experiment, (self.id, self.module)

    def cells(self, budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
        return list(self.wanted)

    def expected(self, budget: str, data: str, seeds: int | None) -> list[Cell]:
        return list(self.wanted)


def planned(
    experiment: Experiment, cells: Sequence[StoredCell], samples: Sequence[Asked]
) -> Planned:
    """The experiment with the cells of the second stage.

    Args:
        cells: those of the first stage.
        samples: what is asked for of this experiment.
    """
    rows = [row for cell in cells for row in cell.flat()]
    most = FIRST_SEED + max(sample.seeds for sample in samples)
    every = experiment.cells(_OF, str(rows[0]["data"]), most, rows)
    counts: dict[str, int] = {}
    for sample in samples:
        for arm in needed(experiment, cells, sample.claim):
            counts[arm] = max(counts.get(arm, 0), sample.seeds)
    wanted = [
        cell._replace(wave=0)
        for cell in every
        if FIRST_SEED <= cell.seed < FIRST_SEED + counts.get(_key(cell.arm), 0)
    ]
    return Planned(experiment, sorted(wanted, key=lambda cell: cell.seed))


def needed(experiment: Experiment, cells: Sequence[StoredCell], claim: str) -> list[str]:
    """The arms without which the fair verdict of a claim would be another one."""
    by_arm: dict[str, list[StoredCell]] = {}
    for cell in cells:
        if cell.spec["seed"] < _CHOSE:
            by_arm.setdefault(_key(cell.spec["arm"]), []).append(cell)
    whole = _fair(experiment, cells, claim)
    found = []
    for arm, own in by_arm.items():
        left = {id(cell) for cell in own}
        if _fair(experiment, [c for c in cells if id(c) not in left], claim) != whole:
            found.append(arm)
    return found


def _fair(experiment: Experiment, cells: Sequence[StoredCell], claim: str) -> Any:
    """What of a verdict is not merely shown."""
    rows = [row for cell in cells for row in cell.flat()]
    found = [v for v in experiment.judge(rows) if v.claim == claim]
    parts = [
        cell
        for verdict in found
        for cell in verdict.cells
        if cell["part"] in ("fair", "control") or str(cell["part"]).startswith("level")
    ]
    return [(verdict.status, verdict.effect, verdict.n) for verdict in found], parts


def _key(arm: Mapping[str, Any]) -> str:
    return repr(sorted(arm.items()))


# --- verdicts -----------------------------------------------------------------------------------


def apart(cells: Iterable[StoredCell]) -> tuple[list[StoredCell], list[StoredCell]]:
    """The cells of the first stage, with all others, and those of the second."""
    first: list[StoredCell] = []
    second: list[StoredCell] = []
    for cell in cells:
        (second if cell.spec["budget"] == SECOND else first).append(cell)
    return first, second


def judged(
    experiment: Experiment,
    first: Sequence[StoredCell],
    second: Sequence[StoredCell],
    verdicts: Sequence[Verdict],
) -> list[Verdict]:
    """The verdicts of the first stage, and of claims with a second sample those of the second.

    Of `second` those count that the same code made of the same images.
    """
    samples = {v.claim: sample for v in verdicts if (sample := asked(v))}
    alike = {(c.spec["code"], c.spec["data"]["digest"]) for c in first}
    second = [c for c in second if (c.spec["code"], c.spec["data"]["digest"]) in alike]
    if not second or not samples:
        return list(verdicts)
    chose = [row for c in first if c.spec["seed"] >= _CHOSE for row in c.flat()]
    rows = chose + [{**row, "budget": _OF} for c in second for row in c.flat()]
    again = {v.claim: v for v in experiment.judge(rows)}
    return [
        _joined(v, again[v.claim], samples[v.claim])
        if v.claim in samples and v.claim in again and again[v.claim].n >= samples[v.claim].seeds
        else v
        for v in verdicts
    ]


def _published(part: object) -> bool:
    return str(part).startswith("published")


def _joined(first: Verdict, second: Verdict, sample: Asked) -> Verdict:
    """The verdict of the second sample; what the first one said becomes a note."""
    lo, hi = first.ci or (float("nan"), float("nan"))
    told = (
        f"Second stage: {sample.seeds} fresh seeds, judged alone. The first, of {first.n}, was "
        f"undecided ({first.effect:.3g}, 95 % interval {lo:.3g} to {hi:.3g}) and said that about "
        f"{first.n_needed} would decide."
    ).replace("-", "−")
    return dataclasses.replace(
        second,
        # the source's own setting, where it is another one, was run in the first stage alone
        published_status=first.published_status
        if any(_published(c["part"]) for c in first.cells)
        else second.published_status,
        cells=[
            *(c for c in second.cells if not _published(c["part"])),
            *(c for c in first.cells if _published(c["part"])),
        ],
        planned_half_width=None,
        notes=[
            told,
            *(n for n in second.notes if not n.startswith(("The pilot asked for", _AS_PUBLISHED))),
            *(n for n in first.notes if n.startswith(_AS_PUBLISHED)),
        ],
        stage=2,
    )


# --- what the command asks ----------------------------------------------------------------------


def samples(paths: Sequence[Path], ids: Sequence[str] | None) -> tuple[list[Asked], dict[str, str]]:
    """What these rows ask for, of some experiments or all; and why other claims get none."""
    first, second = (_present(paths, budget) for budget in (_OF, SECOND))
    known = experiments()
    found: list[Asked] = []
    against: dict[str, str] = {}
    for name, cells in first.items():
        if ids is not None and name not in ids:
            continue
        own = known[name].judge([row for cell in cells for row in cell.flat()])
        against |= {verdict.claim: reason_against(verdict) for verdict in own}
        for verdict in judged(known[name], cells, second.get(name, []), own):
            if verdict.stage > 1:
                against[verdict.claim] = (
                    f"{verdict.claim} has had its second stage: {verdict.status}, by {verdict.n} "
                    "fresh seeds. There is no third."
                )
        found += [s for verdict in own if not against[verdict.claim] and (s := asked(verdict))]
    return found, against


def catalogue(paths: Sequence[Path], wanted: Sequence[Asked]) -> dict[str, Experiment]:
    """The experiments of these samples, with their cells."""
    by_experiment: dict[str, list[Asked]] = {}
    for sample in wanted:
        by_experiment.setdefault(sample.experiment, []).append(sample)
    first, known = _present(paths, _OF), experiments()
    return {name: planned(known[name], first[name], own) for name, own in by_experiment.items()}


def _present(paths: Sequence[Path], budget: str) -> dict[str, list[StoredCell]]:
    """The cells of a budget on MNIST by experiment, of the present code."""
    found: dict[str, list[StoredCell]] = {}
    known = experiments()
    for cell in _runs.read_cells(paths):
        spec = cell.spec
        own = known.get(spec["experiment"])
        of_it = (spec["budget"], spec["data"]["name"]) == (budget, "mnist")
        if own is not None and of_it and spec["code"] == own.code_of(budget):
            found.setdefault(own.id, []).append(cell)
    return found
