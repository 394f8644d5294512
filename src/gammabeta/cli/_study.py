"""`gammabeta study`: list claims, run experiments, show verdicts, judge rows again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter, validators

from gammabeta.cli._parts import (
    FAILED,
    FINE,
    Json,
    Runs,
    Unusable,
    Words,
    complain,
    dump,
    examples,
    newest_run,
    run_folders,
    sorted_out,
    usable,
)
from gammabeta.cli._run import SEEDS, more, public, run

if TYPE_CHECKING:
    from gammabeta.studies._claims import Claim

study = App(
    name="study",
    help="Decide claims about batch normalization by experiment.",
    help_epilogue=examples("study list", "study run headline", "study show"),
)

study.command(
    run,
    help_epilogue=examples(
        "study run                 # the headline claims, into runs/small",
        "study run act-all --data mnist --seeds 8 -o runs/mine",
        "study run all --dry-run   # how long would it take?",
        "study run --budget brief  # a quick look: make study",
        "study run --variant width-half   # does it hold there?",
    ),
)
study.command(
    more,
    help_epilogue=examples(
        "study more --dry-run               # what would it take?",
        "study more imagenet-7pct -o runs/mine",
        "study more runs/small --data-dir data",
    ),
)


@study.command(
    name="list",
    help_epilogue=examples("study list", "study list covariate shift", "study list --json"),
)
def list_claims(words: Words = None, /, *, json: Json = False) -> int:
    """List the claims of the registry, also those that have no experiment yet.

    Parameters
    ----------
    words
        Only claims that have all these words in their id, question, text, source or topic.
    """
    from gammabeta.studies import _claims

    wanted = [word.lower() for word in words or ()]
    found = [
        claim
        for claim in _claims.claims().values()
        if all(_has(word, _told(claim)) for word in wanted)
    ]
    if not found:
        raise Unusable(
            f"No claim has the words {' '.join(wanted)}. {_meant(wanted, _claims.claims())}"
            "`gammabeta study list` has all."
        )
    if json:
        ids = {claim.id for claim in found}
        return dump([claim for claim in _claims.listing() if claim["id"] in ids])
    from gammabeta import _terminal

    _terminal.claims(found)
    return FINE


def _told(claim: Claim) -> str:
    return " ".join((claim.id, claim.question, claim.title, claim.source, claim.topic)).lower()


def _has(word: str, text: str) -> bool:
    """Whether a text has a word as it is, or all that hyphens join in it."""
    return word in text or all(part in text for part in word.split("-"))


def _meant(words: list[str], known: Mapping[str, Claim]) -> str:
    """Words of ids and questions that are spelled like those that no claim has."""
    from gammabeta.studies import _claims

    texts = [f"{claim.id} {claim.question}".lower() for claim in known.values()]
    everywhere = dict.fromkeys(w for text in texts for w in re.findall(r"[\w-]{3,}", text))
    near = [
        _claims.suggest(word, everywhere)
        for word in words
        if not any(word in text for text in texts)
    ]
    found = [" or ".join(choices) for choices in near if choices]
    return f"Did you mean {', '.join(found)}? " if found else ""


@study.command(
    help_epilogue=examples(
        "study show                # the newest run below runs/",
        "study show runs/headline --json",
        "study show act-all        # one claim: source, rule, answer, notes",
        "study show --published results   # beside the published figures",
    )
)
def show(
    what: Words = None,
    /,
    *,
    published: Annotated[bool, Parameter(show_default=False)] = False,
    json: Json = False,
) -> int:
    """Show the verdicts of run folders, or all about some claims.

    Parameters
    ----------
    what
        Run folders (the newest one below runs/ unless given), claims or experiments.
    published
        Show the numbers of the MNIST study's figures beside those of the runs instead.
    """
    from gammabeta import _terminal

    with usable():
        paths, asked = sorted_out(what or [])
        if published:
            if asked:
                raise Unusable(
                    "--published compares all figures and takes run folders only, got the "
                    f"claim {asked[0].id}. `gammabeta study show {asked[0].id}` shows that."
                )
            from gammabeta.studies import _published_figures

            beside = _published_figures.of_runs(run_folders(paths))
    if published:
        if json:
            return dump(beside.to_json())
        _terminal.published(beside)
        return FINE
    with usable():
        if asked and not paths and newest_run() is None:
            judged = None
        else:
            judged = _judged(run_folders(paths), {})
    ids = {claim.id for claim in asked}
    found = judged.verdicts if judged else []
    if json:
        return dump([public(v.to_json()) for v in found if not ids or v.claim in ids])
    for number, claim in enumerate(asked):
        if number:
            print()
        verdict = next((v.to_json() for v in found if v.claim == claim.id), None)
        _terminal.card(claim, verdict)
    if judged and not asked:
        _print(judged)
    return FINE


@study.command(
    help_epilogue=examples(
        "study status              # the newest run below runs/",
        "study status runs/a runs/b",
        "study status act-all runs/small --json",
    )
)
def status(
    what: Words = None,
    /,
    *,
    seeds: Annotated[int | None, Parameter(validator=SEEDS)] = None,
    json: Json = False,
) -> int:
    """Tell what run folders hold: cells done, missing, stale (made by other code), failed.

    Parameters
    ----------
    what
        Run folders (the newest one below runs/ unless given), claims or experiments.
    seeds
        Seeds for each arm, as the run was told.
    """
    from gammabeta import _terminal

    with usable():
        from gammabeta.studies import _status

        paths, asked = sorted_out(what or [])
        ids = list(dict.fromkeys(c.experiment for c in asked if c.experiment)) if asked else None
        found = _status.status(run_folders(paths), ids, seeds=seeds)
    if json:
        return dump([entry._asdict() for entry in found])
    _terminal.status(found)
    return FINE


@study.command(
    help_epilogue=examples(
        "study verify results      # 20 kept cells, drawn at random",
        "study verify results act-all --cells 5",
        "study verify runs/small --seconds 600 --draw 7",
    )
)
def verify(
    what: Words = None,
    /,
    *,
    cells: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 20,
    seconds: Annotated[float, Parameter(validator=validators.Number(gt=0))] = 60.0,
    draw: int = 0,
    data_dir: Annotated[Path | None, Parameter(name="--data-dir")] = None,
    json: Json = False,
) -> int:
    """Measure stored cells again, drawn at random, and compare the rows; nothing is changed.

    Exits with 1 if a cell gives other rows than those that are stored.

    Parameters
    ----------
    what
        Run folders or kept rows (the newest one below runs/ unless given), claims or experiments.
    cells
        How many cells at most; the experiments take turns.
    seconds
        After these no other cell is begun.
    draw
        Another number draws other cells.
    data_dir
        A folder that holds mnist/; GAMMABETA_DATA unless given.
    """
    from gammabeta import _terminal

    with usable():
        from gammabeta.studies import _verify

        paths, asked = sorted_out(what or [])
        ids = list(dict.fromkeys(c.experiment for c in asked if c.experiment)) if asked else None
        begun = _verify.verify(
            run_folders(paths), ids, cells=cells, seconds=seconds, draw=draw, data_dir=data_dir
        )
        found = list(begun) if json else list(_terminal.verifying(begun))
    if json:
        dump([one.to_json() for one in found])
    else:
        _terminal.verified(found)
    return FAILED if any(one.outcome == "other" for one in found) else FINE


@study.command(
    help_epilogue=examples(
        "study accept runs/small   # into results/",
        "study accept runs/a runs/b --only activations --budget small",
    )
)
def accept(
    paths: Runs = None,
    /,
    *,
    out: Annotated[Path, Parameter(alias="-o")] = Path("results"),
    only: Words = None,
    budget: Literal["small", "full"] | None = None,
    json: Json = False,
) -> int:
    """Keep the rows of accepted runs: pack them, an experiment a file, to be committed.

    Parameters
    ----------
    paths
        Run folders; the newest one below runs/ unless given.
    out
        Where the packed rows lie.
    only
        Claims or experiments; all that are there unless given.
    budget
        The budget whose cells are kept; the largest that is there unless given.
    """
    from gammabeta import _terminal

    with usable():
        from gammabeta.studies import _claims, _experiments, _kept

        known = {key: e.CLAIMS for key, e in _experiments.experiments().items()}
        ids = _claims.resolve(only, known) if only else None
        kept = _kept.accept(run_folders(paths), out, ids, budget=budget)
    if json:
        return dump([{**entry._asdict(), "path": str(entry.path)} for entry in kept])
    _terminal.kept(kept)
    return FINE


@study.command(
    help_epilogue=examples(
        "study judge runs/headline",
        "study judge results --set act-all.delta=0.5",
        "study judge results -o docs/verdicts.md",
    )
)
def judge(
    paths: Runs = None,
    /,
    *,
    out: Annotated[Path | None, Parameter(alias="-o")] = None,
    json: Json = False,
    rules: Annotated[list[str] | None, Parameter(name="--set")] = None,
) -> int:
    """Judge the stored rows again, without training; the verdicts are kept in the run folder.

    Parameters
    ----------
    paths
        Run folders or kept rows; the newest below runs/ unless given. Of several none is written.
    out
        Write the verdicts of kept rows on MNIST into this Markdown page instead.
    rules
        CLAIM.THRESHOLD=VALUE: this claim by both rules. The run folder stays as it is.
    """
    from gammabeta import _terminal

    with usable():
        from gammabeta.studies import _card, _claims

        changed = _claims.rules(rules or [])
        found = run_folders(paths)
        if out is not None:
            return _page(found, out, bool(changed or json))
        if changed and not json:
            with _by_this_rule():
                both = _card.disputed(found, changed)
            _terminal.disputed(both, changed)
            return FINE
        judged = _judged(found, changed)
    if json:
        dump([public(verdict.to_json()) for verdict in judged.verdicts])
    else:
        _print(judged)
    if len(found) == 1 and found[0].is_dir() and not changed:
        from gammabeta.studies import _judge

        try:
            _judge.write_derived(found[0], judged)
        except OSError as error:
            complain(f"The verdicts were not kept, {found[0]} cannot be written: {error}.")
    return FINE


def _page(found: list[Path], out: Path, more: bool) -> int:
    from gammabeta import _runs
    from gammabeta.studies import _kept

    if more:
        raise Unusable("--out writes the verdicts by the registry's rules: no --set, no --json.")
    if len(found) != 1 or not found[0].is_dir():
        raise Unusable("--out takes one folder of kept rows, as `gammabeta study accept` makes it.")
    text = _kept.page(found[0])
    out.parent.mkdir(parents=True, exist_ok=True)
    _runs.write_whole(out, text.encode())
    print(out)
    return FINE


def _judged(paths: list[Path], rules: dict[str, dict[str, float]]) -> Any:
    from gammabeta.studies import _claims, _judge

    if not rules:
        return _judge.judge(paths)
    with _by_this_rule(), _claims.overruled(rules):
        return _judge.judge(paths)


@contextmanager
def _by_this_rule() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Unusable(f"The claims cannot be judged by this rule: {error.__cause__}") from error


def _print(judged: Any) -> None:
    from gammabeta import _terminal
    from gammabeta.studies import _claims, _data

    verdicts = [verdict.to_json() for verdict in judged.verdicts]
    _terminal.verdicts(verdicts, judged.surprises, _claims.claims())
    if judged.multiplicity is not None:
        _terminal.multiplicity(judged.multiplicity)
    if judged.notice:
        _terminal.notice(judged.notice, _data.HOW_TO_GET_MNIST)
