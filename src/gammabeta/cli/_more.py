"""`gammabeta study more`: fresh seeds for claims that the accepted rows leave undecided."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators

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
from gammabeta.cli._study import public


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
        if not samples:
            raise Unusable("No claim gets a second stage: there is nothing to run.")
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
            if json:
                return dump({**estimate._asdict(), "cpu_seconds": estimate.cpu_seconds})
            _terminal.estimate(estimate)
            return FINE
        with _terminal.Progress() as progress:
            result = _run.run(
                chosen,
                jobs=jobs,
                catalogue=catalogue,
                deadline_seconds=deadline,
                progress=progress,
                **settings,
            )
        if result.interrupted:
            raise KeyboardInterrupt
        _terminal.ended(result)
        judged = _judge.judge([*paths, out], chosen, budget="small", data="mnist")
        own = [v for v in judged.verdicts if v.claim in asked and v.stage > 1]
        if json:
            dump([public(verdict.to_json()) for verdict in own])
        else:
            _terminal.verdicts([v.to_json() for v in own], [], _claims.claims())
            print(f"\n`gammabeta study accept {out}` keeps these rows beside those of the first.")
    return FAILED if result.failed or result.failed_before else FINE
