"""`gammabeta study`: list claims, run experiments, show verdicts, judge rows again."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Group, Parameter, validators

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
    uninterrupted,
    usable,
)

if TYPE_CHECKING:
    from gammabeta.studies._claims import Claim

study = App(
    name="study",
    help="Decide claims about batch normalization by experiment.",
    help_epilogue=examples("study list", "study run headline", "study show"),
)

_WHAT = Group("What to run", sort_key=1)
_HOW = Group("How to run it", sort_key=2)
_INSTEAD = Group("Instead of a run", sort_key=3)
# Experiments choose learning rates with the seeds from 800 on: those must decide nothing.
_SEEDS = validators.Number(gte=1, lte=800)


@study.command(
    name="list",
    help_epilogue=examples("study list", "study list covariate shift", "study list --json"),
)
def list_claims(words: Words = None, /, *, json: Json = False) -> int:
    """List the claims of the registry, also those that have no experiment yet.

    Parameters
    ----------
    words
        Only claims that have all these words in their id, question, text or source.
    """
    from gammabeta.studies import _claims

    wanted = [word.lower() for word in words or ()]
    found = [
        claim
        for claim in _claims.claims().values()
        if all(
            word in " ".join((claim.id, claim.question, claim.title, claim.source)).lower()
            for word in wanted
        )
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
        "study run                 # the headline claims, into runs/small",
        "study run act-all --data mnist --seeds 8 -o runs/mine",
        "study run all --dry-run   # how long would it take?",
        "study run --budget brief  # a quick look: make study",
        "study run --variant width-half   # does it hold there?",
    )
)
def run(
    ids: Words = None,
    /,
    *,
    budget: Annotated[Literal["tiny", "brief", "small", "full"], Parameter(group=_WHAT)] = "small",
    variant: Annotated[
        Literal["fresh-seeds", "width-half", "width-double", "images-small"] | None,
        Parameter(group=_WHAT),
    ] = None,
    data: Annotated[Literal["auto", "mnist", "digits"], Parameter(group=_WHAT)] = "auto",
    data_dir: Annotated[Path | None, Parameter(group=_WHAT)] = None,
    seeds: Annotated[int | None, Parameter(group=_WHAT, validator=_SEEDS)] = None,
    out: Annotated[Path | None, Parameter(alias="-o", group=_HOW)] = None,
    jobs: Annotated[
        int | None, Parameter(alias="-j", group=_HOW, validator=validators.Number(gte=1))
    ] = None,
    deadline: Annotated[
        float | None, Parameter(group=_HOW, validator=validators.Number(gt=0))
    ] = None,
    dask: Annotated[str | None, Parameter(group=_HOW)] = None,
    force: Annotated[bool, Parameter(group=_HOW, show_default=False)] = False,
    refresh: Annotated[bool, Parameter(group=_HOW, show_default=False)] = False,
    retry_failed: Annotated[bool, Parameter(group=_HOW, show_default=False)] = False,
    dry_run: Annotated[bool, Parameter(group=_INSTEAD, show_default=False)] = False,
    cell: Annotated[str | None, Parameter(group=_INSTEAD)] = None,
    json: Annotated[Json, Parameter(group=_HOW)] = False,
) -> int:
    """Run experiments, judge their claims and write the page.

    Finished work is kept: the same command goes on where it was stopped.

    Parameters
    ----------
    ids
        Claims or experiments (`gammabeta study list`); the sets headline (the default) and all.
    budget
        tiny: tries the wiring; brief: a quick look at the headline claims, which decides nothing;
        small: minutes; full: as the source did it.
    variant
        The headline claims at small again, but for the seeds, the width of the networks (half,
        twice) or the images (14 x 14, turned, with noise); at the rates that were chosen before.
    data
        auto: MNIST where it is to be had, else the bundled digits (a demonstration).
    data_dir
        A folder that holds mnist/; GAMMABETA_DATA unless given.
    seeds
        Seeds for each arm, at most 800; planned from a pilot unless given.
    out
        The run folder; runs/BUDGET or runs/VARIANT unless given.
    jobs
        Worker processes; one a core unless given.
    deadline
        Seconds after which nothing new is started; 240 for the set headline at a budget.
    dask
        tcp://HOST:PORT of a Dask scheduler, whose workers then run the cells.
    force
        Make finished cells again.
    refresh
        Make those cells again that other code made; else such an experiment is left as it is.
    retry_failed
        Try those cells again that failed before.
    dry_run
        Say what would be run and how many CPU seconds it would take; write nothing.
    cell
        Repeat one cell of the run folder alone; its name has 16 digits.
    """
    kind = variant or budget
    out = Path("runs") / kind if out is None else out
    if cell is not None:
        if ids or dry_run:
            raise Unusable("--cell repeats one cell and takes neither claims nor --dry-run.")
        return _repeat(cell, out, data_dir)
    with usable():
        wanted = ids or ["headline"]
        with uninterrupted():
            from gammabeta import _terminal
            from gammabeta.studies import _claims, _data, _experiments, _headline, _judge, _run

            known = {key: e.CLAIMS for key, e in _experiments.experiments().items()}
        chosen = _claims.resolve(wanted, known)
        if variant or budget == "brief":
            for reason in _headline.lacking(chosen, kind):
                complain(reason)
        settings: dict[str, Any] = {
            "out": out,
            "budget": kind,
            "data": data,
            "data_dir": data_dir,
            "jobs": jobs,
            "seeds": seeds,
            "force": force,
            "refresh": refresh,
        }
        if dry_run:
            estimate = _run.estimate(chosen, **settings)
            if json:
                waves = [wave._asdict() for wave in estimate.waves]
                seconds = {"cpu_seconds": estimate.cpu_seconds, "seconds": estimate.seconds}
                return dump({**estimate._asdict(), **seconds, "waves": waves})
            _terminal.estimate(estimate)
            if estimate.data == "digits":
                _terminal.notice(estimate.notice, _data.HOW_TO_GET_MNIST)
            return FINE
        if deadline is None and wanted == ["headline"] and variant is None:
            deadline = 240.0
        with _terminal.Progress() as progress:
            result = _run.run(
                chosen,
                deadline_seconds=deadline,
                progress=progress,
                retry_failed=retry_failed,
                dask=dask,
                **settings,
            )
        if result.interrupted:
            raise KeyboardInterrupt
        _terminal.ended(result)
        # The page tells of all that the folder holds, the terminal of what was asked for. All is
        # written before the first line is printed: a reader who leaves early loses nothing.
        judged = _judge.judge([out], budget=kind, data=result.data)
        page, trouble = _keep(out, judged)
        shown = [verdict for verdict in judged.verdicts if verdict.experiment in chosen]
        if json:
            dump([public(verdict.to_json()) for verdict in shown])
        else:
            _terminal.verdicts(
                [verdict.to_json() for verdict in shown], _judge.surprises(shown), _claims.claims()
            )
            if judged.multiplicity is not None:
                _terminal.multiplicity(judged.multiplicity)
            if budget == "brief" and variant is None:
                _terminal.notice(_headline.NOTICE, _headline.DECIDES)
            if page is not None:
                print(f"\nPage: {page}")
            if result.data == "digits":
                _terminal.notice(result.notice, _data.HOW_TO_GET_MNIST)
    if trouble:
        raise Unusable(trouble)
    return FAILED if result.failed or result.failed_before else FINE


def _keep(out: Path, judged: Any) -> tuple[Path | None, str]:
    """Store verdicts and page in the run folder; the page, and what went wrong."""
    from gammabeta.studies import _judge

    try:
        _judge.write_derived(out, judged)
        from gammabeta.report.page import write

        return write([out], out / "report.html"), ""
    except ImportError as error:
        complain(f"No page was written. {error}")
        return None, ""  # the verdicts stand without it
    except OSError as error:
        return None, f"The rows are kept, but not all that is made from them. {error}"


def _repeat(cell: str, out: Path, data_dir: Path | None) -> int:
    with usable():
        from gammabeta._runs import RunError
        from gammabeta.studies import _data, _run

        if data_dir is not None:
            _data.place(data_dir)
    try:
        stored = _run.run_one(cell, out, data_dir=data_dir)
    except RunError as error:
        raise Unusable(str(error)) from error
    except Exception:
        import traceback  # the one that is asked for

        traceback.print_exc()
        return complain(f"The cell {cell} failed again; the run folder is as it was.", FAILED)
    print(f"{stored.path}: {len(stored.rows)} rows. `gammabeta study judge {out}` judges them.")
    return FINE


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
    seeds: Annotated[int | None, Parameter(validator=_SEEDS)] = None,
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


_SHOWN = (
    *("claim", "experiment", "status", "published_status", "effect", "ci", "n", "unit"),
    *("reported", "budget", "data"),
)


def public(verdict: dict[str, Any]) -> dict[str, Any]:
    """What `--json` tells of a verdict; JSON knows no NaN and no infinity."""
    shown = {key: verdict[key] for key in _SHOWN}
    if shown["effect"] is not None and not math.isfinite(shown["effect"]):
        shown["effect"] = None
    if shown["ci"] is not None and not all(map(math.isfinite, shown["ci"])):
        shown["ci"] = None
    return shown
