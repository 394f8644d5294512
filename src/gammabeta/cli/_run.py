"""`gammabeta study run` and `more`: train what is missing, judge it, show what came."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter, validators

from gammabeta.cli._parts import (
    FAILED,
    FINE,
    Json,
    Unusable,
    Words,
    complain,
    dump,
    run_folders,
    sorted_out,
    uninterrupted,
    usable,
)

_WHAT = Group("What to run", sort_key=1)
_HOW = Group("How to run it", sort_key=2)
_INSTEAD = Group("Instead of a run", sort_key=3)
# Experiments choose learning rates with the seeds from 800 on: those must decide nothing.
SEEDS = validators.Number(gte=1, lte=800)


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
    seeds: Annotated[int | None, Parameter(group=_WHAT, validator=SEEDS)] = None,
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
            return _estimated(_run.estimate(chosen, **settings), json)
        if deadline is None and wanted == ["headline"] and variant is None:
            deadline = 240.0
        result = _trained(
            chosen, deadline_seconds=deadline, retry_failed=retry_failed, dask=dask, **settings
        )
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


def _trained(chosen: list[str], **settings: Any) -> Any:
    """Run what is missing, with its progress; how it ended."""
    from gammabeta import _terminal
    from gammabeta.studies import _run

    with _terminal.Progress() as progress:
        result = _run.run(chosen, progress=progress, **settings)
    if result.interrupted:
        raise KeyboardInterrupt
    _terminal.ended(result)
    return result


def _estimated(estimate: Any, json: bool) -> int:
    """Show what a run would take."""
    if json:
        waves = [wave._asdict() for wave in estimate.waves]
        seconds = {"cpu_seconds": estimate.cpu_seconds, "seconds": estimate.seconds}
        return dump({**estimate._asdict(), **seconds, "waves": waves})
    from gammabeta import _terminal
    from gammabeta.studies import _data

    _terminal.estimate(estimate)
    if estimate.data == "digits":
        _terminal.notice(estimate.notice, _data.HOW_TO_GET_MNIST)
    return FINE


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


def more(
    what: Words = None,
    /,
    *,
    out: Annotated[Path, Parameter(alias="-o")] = Path("runs/second-stage"),
    data_dir: Path | None = None,
    jobs: Annotated[int | None, Parameter(alias="-j", validator=validators.Number(gte=1))] = None,
    deadline: Annotated[float | None, Parameter(validator=validators.Number(gt=0))] = None,
    dry_run: Annotated[bool, Parameter(show_default=False)] = False,
    json: Json = False,
) -> int:
    """Run fresh seeds for undecided claims, and judge these by them alone.

    Once, and as many as docs/studies.md says. Finished work is kept: the same command goes on.

    Parameters
    ----------
    what
        The rows that left claims undecided (results unless given), and claims or experiments; all
        that are undecided unless given.
    out
        The run folder.
    data_dir
        A folder that holds mnist/; GAMMABETA_DATA unless given.
    jobs
        Worker processes; all cores unless given.
    deadline
        After so many seconds no cell is started any more.
    dry_run
        Say what would be run and how many CPU seconds it would take; write nothing.
    """
    with usable():
        paths, claims = sorted_out(what or [])
        paths = run_folders(paths or [Path("results")])
        with uninterrupted():
            from gammabeta import _terminal
            from gammabeta.studies import _claims, _judge, _run, _second
            from gammabeta.studies._experiments import SECOND
        ids = list(dict.fromkeys(c.experiment for c in claims if c.experiment)) or None
        samples, against = _second.samples(paths, ids)
        asked = [c.id for c in claims] or [sample.claim for sample in samples]
        for name in asked:
            if reason := against.get(name, f"{name} has no rows on MNIST at small there."):
                complain(reason)
        samples = [sample for sample in samples if sample.claim in asked]
        if not samples and claims:
            raise Unusable("None of these claims gets a second stage: there is nothing to run.")
        if not samples:
            print(
                "No claim of these rows gets a second stage: there is nothing to run. Name a claim "
                "to be told why."
            )
            return FINE
        catalogue = _second.catalogue(paths, samples)
        chosen = list(catalogue)
        settings: dict[str, Any] = {
            "out": out,
            "budget": SECOND,
            "data": "mnist",
            "data_dir": data_dir,
        }
        if dry_run:
            estimate = _run.estimate(chosen, jobs=jobs, catalogue=catalogue, **settings)
            return _estimated(estimate, json)
        result = _trained(
            chosen, jobs=jobs, catalogue=catalogue, deadline_seconds=deadline, **settings
        )
        judged = _judge.judge([*paths, out], chosen, budget="small", data="mnist")
        own = [v for v in judged.verdicts if v.claim in asked and v.stage > 1]
        if json:
            dump([public(verdict.to_json()) for verdict in own])
        else:
            _terminal.verdicts([v.to_json() for v in own], [], _claims.claims())
            print(f"\n`gammabeta study accept {out}` keeps these rows beside those of the first.")
    return FAILED if result.failed or result.failed_before else FINE


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
