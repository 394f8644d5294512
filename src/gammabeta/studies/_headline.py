"""The headline claims in brief, and run again under variations: cells and verdicts.

Kinds of cells that take a budget's place:

brief          a quick look at all twelve in five minutes, `make study`: 5 seeds
fresh-seeds    the accepted runs again: as many seeds as those had
width-half, width-double, images-small
               the fair part with other networks, other images: as many seeds as the rules ask for
               at least, 5 or 8

All of them train by the plan of `small` (in brief a few trainings are shorter, `_variations`), only
the arms that the headline claims need, with the seeds 100, 101, ..., which accepted rows never had.
Nothing is searched: learning rates, and the dropout that is compared, are those that the accepted
rows chose. They stand in `brief.toml`, which this makes from the rows:

    python -m gammabeta.studies._headline results

Variations take the full plan and the rules of `small`, not the short plan of the quick look: what
is asked is whether an accepted verdict comes again, so nothing else may differ. Rates are not
searched again since that is most of the work; that they may fit other widths and images less well
is part of what a variation tries. In brief the rules take five seeds where they ask for eight,
since nothing is decided there. Fresh seeds repeat the whole, with Holm's correction over the
twelve; the other kinds are not corrected: they try each claim alone, with fewer seeds.
"""

import collections
import dataclasses
import functools
import importlib.resources
import math
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from gammabeta import _runs
from gammabeta._runs import Row, Scalar
from gammabeta.studies._claims import claims
from gammabeta.studies._experiments import AGAIN, BRIEF, BUDGETS, Cell, Experiment

if TYPE_CHECKING:
    from gammabeta.studies._verdict import Verdict

FIRST_SEED, SEEDS, TUNING_SEEDS = 100, 5, (800, 801)
FILE = "brief.toml"
# The rules of these ask for more seeds than 5: (experiment, unit).
_MORE = {
    ("covariate-shift", "fair"): 8,
    ("learning-rate", "fair"): 8,
    ("regularization", "dropout"): 8,
}
_WHOLE = (BRIEF, AGAIN)  # as published too; other variations ask for the fair verdict alone
TITLES = {
    "fresh-seeds": "fresh seeds",
    "width-half": "half the width",
    "width-double": "twice the width",
    "images-small": "14 x 14, turned, noisy",
}
DECIDES = "The accepted rows decide: docs/verdicts.md"
NOTICE = (
    "A quick look, no accepted verdict: five seeds, shorter training for some claims, learning "
    "rates taken from the accepted rows, no correction for the number of claims. " + DECIDES
)

Rates = Mapping[str, Mapping[str, float]]  # group -> arm -> rate


class Chosen(NamedTuple):
    """What the accepted rows of an experiment chose.

    `doses` is the dropout that is best with and without batch normalization, where there is any;
    `seeds` are those of the accepted rows, by what they are for (see `unit`).
    """

    rates: Rates
    seeds: Mapping[str, int]
    doses: Mapping[str, str]


@functools.cache
def chosen() -> dict[str, Chosen]:
    """What brief.toml says, by experiment; those that have no accepted rows yet are absent."""
    text = importlib.resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8")
    return {
        name: Chosen(table.get("rates", {}), table.get("seeds", {}), table.get("doses", {}))
        for name, table in tomllib.loads(text).items()
    }


def decided() -> dict[str, list[str]]:
    """The experiments of the headline claims, with these claims."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for claim in claims().values():
        if claim.headline and claim.experiment:
            found[claim.experiment].append(claim.id)
    return dict(found)


def lacking(ids: Iterable[str], kind: str) -> list[str]:
    """Why experiments cannot be run so: one sentence each."""
    said = []
    for name in ids:
        if name not in decided():
            said.append(f"{name} decides no headline claim: {kind} runs those alone.")
        elif name not in chosen():
            said.append(f"{name} has no accepted rows at small yet, from which to take rates.")
    return said


# --- cells ------------------------------------------------------------------------------------


def cells(
    experiment: Experiment, module: ModuleType, kind: str, data: str, seeds: int | None
) -> list[Cell]:
    """What a kind wants of an experiment: the main runs of its headline claims."""
    from gammabeta.studies._variations import CHANGES, planned

    own = chosen().get(experiment.id)
    if own is None or experiment.id not in decided():
        return []
    most = seeds or max([SEEDS, *own.seeds.values(), *_MORE.values()])
    with planned(experiment.id, module, kind):
        all_cells = module.cells(
            "small", data, FIRST_SEED + most, searched(experiment.id, module, data)
        )
    return [
        cell._replace(arm={**cell.arm, **CHANGES[kind]}, wave=0)
        for cell in all_cells
        if FIRST_SEED <= cell.seed < FIRST_SEED + (seeds or _count(experiment.id, kind, cell.arm))
        and needed(experiment.id, cell.arm)
        and (kind in _WHOLE or cell.arm.get("part") != "published")
    ]


def unit(experiment: str, arm: Mapping[str, Scalar]) -> str:
    """What has a number of seeds of its own: a group of the regularization, else a part."""
    return str(arm.get("group" if experiment == "regularization" else "part", ""))


def _count(experiment: str, kind: str, arm: Mapping[str, Scalar]) -> int:
    of = unit(experiment, arm)
    if kind == BRIEF:
        return SEEDS
    if kind == AGAIN:
        return chosen()[experiment].seeds.get(of, SEEDS)
    return _MORE.get((experiment, of), SEEDS)


def needed(experiment: str, arm: Mapping[str, Scalar]) -> bool:
    """Whether a main run is one that the headline claims of its experiment need."""
    part, group, name = (str(arm.get(key, "")) for key in ("part", "group", "arm"))
    if experiment == "initialization":
        return arm.get("claim") == "vanishing-depth" and not part
    if experiment == "batch-size":
        return part == "ghost" or (part == "published" and arm["norm"] in ("bn", "none"))
    if experiment == "covariate-shift":
        return (part, group) == ("fair", "deep") and name in ("none", "bn", "noisy")
    if experiment == "smoothness":
        return part in ("fair", "published") and name in ("none", "bn")
    if experiment == "learning-rate":  # a tenth of the small rate is only shown
        rates = chosen()[experiment].rates["deep"].values()
        return (part, group) == ("fair", "deep") and arm["rate"] in rates
    if experiment == "regularization" and group == "dropout":
        norm, dose = name.split(", ")
        return part == "fair" and dose in ("no dropout", chosen()[experiment].doses[norm])
    if experiment == "regularization":
        return (part, group) == ("fair", "noise")
    return part in ("fair", "published")


# --- the searches that were made ----------------------------------------------------------------


def searched(experiment: str, module: ModuleType, data: str) -> list[Row]:
    """Rows of a search that ends with the chosen rates, for `cells` and `judge` of the experiment.

    They hold no measurement: of each arm the chosen rate has the highest accuracy, all others less,
    the farther off. Nothing of them is shown.
    """
    from gammabeta.studies._pairs import LADDER

    own = chosen()[experiment]
    found: list[Row] = []
    for group, arms in own.rates.items():
        for arm, best in arms.items():
            fields = _tuning(experiment, module, group, arm)
            norm, _, dose = arm.partition(", ")
            # of all doses at their best rates the chosen one is the best
            top = 0.9 if group == "dropout" and own.doses.get(norm) != dose else 1.0
            for rate in LADDER:
                # falls to both sides, so that a grid that grows does so toward the best
                score = top - 0.05 * abs(LADDER.index(rate) - LADDER.index(best))
                row: Row = {**fields, "rate": rate, "budget": "small", "data": data, "step": 1}
                row |= {"accuracy": score, "diverged": False}
                if group == "noise":
                    row["train_loss"] = 1 - score
                found += [row | {"seed": seed} for seed in TUNING_SEEDS]
    return found


def _tuning(experiment: str, module: ModuleType, group: str, arm: str) -> dict[str, Scalar]:
    """The fields of a trial, but for its rate."""
    if experiment in ("activations", "jacobians"):
        return {"part": "tuning", "activation": group, "norm": arm}
    if experiment == "batch-size":
        batch, norm, ghost = module._of(group, arm)
        return {"part": f"{group}-tuning", "batch": batch, "norm": norm, "ghost": ghost}
    return {"part": "tuning", "group": group, "arm": arm}


# --- verdicts -----------------------------------------------------------------------------------


def judge(experiment: Experiment, module: ModuleType, rows: Sequence[Row]) -> "list[Verdict]":
    """The headline claims of an experiment by its own rules; what a kind is stands with each."""
    from gammabeta.studies._variations import planned
    from gammabeta.studies._verdict import few_seeds

    kind, data = str(rows[0]["budget"]), str(rows[0]["data"])
    if experiment.id not in chosen():
        return []
    all_rows = _as_small(experiment, module, rows)
    with planned(experiment.id, module, kind), few_seeds(SEEDS if kind == BRIEF else None):
        found = module.judge(all_rows)
    title = TITLES.get(kind)
    notes = ["Learning rates: not searched, but those of the accepted rows."]
    notes.append(NOTICE if title is None else f"A variation of the accepted runs: {title}.")
    return [
        dataclasses.replace(
            verdict,
            budget=kind,
            published_status=verdict.published_status if kind in _WHOLE else None,
            sentence=f"{title[0].upper()}{title[1:]}: {verdict.sentence}"
            if title
            else verdict.sentence,
            place=f"{verdict.place}, {title}" if title and verdict.place else verdict.place,
            notes=[*(n for n in verdict.notes if kind in _WHOLE or "ublished" not in n), *notes],
        )
        for verdict in found
        if verdict.claim in decided().get(experiment.id, []) and data == verdict.data
    ]


def figures(
    experiment: Experiment, module: ModuleType, rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """The experiment's figures in brief, but those of searches, which were not made; else none."""
    from gammabeta.studies._variations import planned

    kind = str(rows[0]["budget"])
    if kind != BRIEF or experiment.id not in chosen():
        return []
    with planned(experiment.id, module, kind):
        found = module.figures(_as_small(experiment, module, rows))
    return [figure for figure in found if figure["x"]["label"] != "learning rate"]


def _as_small(experiment: Experiment, module: ModuleType, rows: Sequence[Row]) -> list[Row]:
    data = str(rows[0]["data"])
    own = [{**row, "budget": "small"} for row in rows]
    return own + searched(experiment.id, module, data)


# --- brief.toml from accepted rows --------------------------------------------------------------


def from_rows(experiment: str, rows: Sequence[Row]) -> Chosen:
    """What rows on MNIST chose: of each arm the rate with the highest mean accuracy.

    As every search here has it: over both tuning seeds, a rate that diverged only if all did, of
    equals the smallest; of the noise arms the smallest mean of the training loss.
    """
    trials: dict[tuple[str, str], dict[float, dict[int, list[Row]]]] = {}
    seeds: dict[str, set[int]] = collections.defaultdict(set)
    for row in rows:
        seed, part = row["seed"], str(row.get("part", ""))
        if not isinstance(seed, int):
            continue
        place = _place(experiment, row)
        if part.endswith("tuning") and place:
            by_rate = trials.setdefault(place, {})
            by_rate.setdefault(_number(row["rate"]), {}).setdefault(seed, []).append(row)
        elif seed < FIRST_SEED and _counts(experiment, row):
            seeds[unit(experiment, row)].add(seed)
    rates: dict[str, dict[str, float]] = {}
    scores: dict[tuple[str, str], float] = {}
    for (group, arm), by_rate in sorted(trials.items()):
        means = {r: _score(list(by.values())) for r, by in sorted(by_rate.items()) if len(by) > 1}
        stable = {r: v for r, v in means.items() if not _diverged(by_rate[r])} or means
        best = max(stable, key=lambda rate: stable[rate])
        rates.setdefault(group, {})[arm] = best
        scores[group, arm] = stable[best]
    doses = {}
    for norm in ("bn", "none"):
        own = [a for g, a in scores if g == "dropout" and a.startswith(f"{norm}, ")]
        tried = [a for a in _doses(own) if not a.endswith("no dropout")]
        if tried:
            doses[norm] = max(tried, key=lambda a: scores["dropout", a]).partition(", ")[2]
    counts = {name: len(found) for name, found in sorted(seeds.items())}
    return Chosen(rates, counts, doses)


def _doses(arms: Sequence[str]) -> list[str]:
    """In the order of the experiment, of which the first of equals is the best."""
    from gammabeta.studies.regularization import DOSES

    order = list(DOSES)
    return sorted(arms, key=lambda arm: order.index(arm.partition(", ")[2]))


def _place(experiment: str, row: Row) -> tuple[str, str] | None:
    """Group and arm of a trial, None where the headline claims need none of its group."""
    if experiment in ("activations", "jacobians"):
        return str(row.get("activation")), str(row.get("norm"))
    if experiment == "batch-size":
        ghost, norm = row.get("ghost"), str(row.get("norm"))
        part = str(row.get("part")).removesuffix("-tuning")
        return part, f"m = {ghost}" if (part, norm) == ("ghost", "bn") else norm
    group = str(row.get("group"))
    unneeded = {"covariate-shift": "inputs", "regularization": "ghost"}
    return None if unneeded.get(experiment) == group else (group, str(row.get("arm")))


def _counts(experiment: str, row: Row) -> bool:
    """Whether a row tells how many seeds a headline claim had: other claims may have more."""
    if experiment == "initialization":
        return row.get("claim") == "vanishing-depth" and "part" not in row
    if row.get("part") == "published" and experiment == "batch-size":
        return row["batch"] == 16
    if experiment in ("covariate-shift", "learning-rate") and row.get("group") != "deep":
        return False
    return str(row.get("part")) in ("fair", "published", "ghost")


def _score(by_seed: Sequence[Sequence[Row]]) -> float:
    """Mean over seeds of the last three accuracies, or of minus the mean loss."""
    found = []
    for rows in by_seed:
        ordered = sorted(rows, key=lambda row: _number(row["step"]))
        losses = [row["train_loss"] for row in ordered if "train_loss" in row]
        shares = [row["accuracy"] for row in ordered if "accuracy" in row]
        if shares:
            found.append(math.fsum(map(_number, shares[-3:])) / len(shares[-3:]))
        else:
            found.append(-math.fsum(map(_number, losses)) / len(losses))
    return math.fsum(found) / len(found)


def _diverged(by_seed: Mapping[int, Sequence[Row]]) -> bool:
    return any(bool(row.get("diverged")) for rows in by_seed.values() for row in rows)


def _number(value: Scalar) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a trial must have numbers, got {value!r}. Accept the run again.")
    return float(value)


def written(folder: Path) -> str:
    """The text of brief.toml from the kept rows in a folder."""
    lines = [
        "# Learning rates that the accepted rows chose, for the headline claims in",
        "# brief and varied; seeds: how many those rows have. Made by a command, do not edit it:",
        "#     python -m gammabeta.studies._headline results",
    ]
    for name in decided():
        own = [c for c in _runs.read_cells([folder], name) if c.spec["data"]["name"] == "mnist"]
        # The larger budget decides, and has the same search; a second stage has none.
        held = {c.spec["budget"] for c in own} & set(BUDGETS)
        budget = max(held, key=BUDGETS.index, default="")
        rows = [r for c in own if c.spec["budget"] == budget for r in c.flat()]
        if rows:
            lines += ["", f"[{name}]", *_table(from_rows(name, rows))]
    return "\n".join(lines) + "\n"


def _table(found: Chosen) -> Iterator[str]:
    if found.seeds:
        yield f"seeds = {_inline(found.seeds)}"
    if found.doses:
        yield f"doses = {_inline(found.doses)}"
    for group, arms in found.rates.items():
        yield f'rates."{group}" = {_inline(arms)}'


def _inline(table: Mapping[str, object]) -> str:
    def said(value: object) -> str:
        return f'"{value}"' if isinstance(value, str) else repr(value)

    return "{ " + ", ".join(f'"{key}" = {said(value)}' for key, value in table.items()) + " }"


if __name__ == "__main__":
    _runs.write_whole(Path(__file__).with_name(FILE), written(Path(sys.argv[1])).encode())
