"""The command line: parses, calls, prints. Results go to stdout, progress and errors to stderr.

Exit codes: 0 fine, 1 something that was run failed, 2 the command or its input cannot be used,
130 interrupted.
"""

from __future__ import annotations

import json as json_module
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter, UnusedCliTokensError, validators

from gammabeta import __version__

if TYPE_CHECKING:
    from gammabeta.studies._claims import Claim

FINE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def _examples(*lines: str) -> str:
    return "Examples:\n" + "\n".join(f"    gammabeta {line}" for line in lines)


app = App(
    name="gammabeta",
    help="Batch normalization: drop-in layers, instruments, and evidence.",
    version=__version__,
    help_format="plaintext",
    help_epilogue=_examples(
        "study run headline    # decide the headline claims, write a page",
        "study list            # all claims",
        "study show act-all    # one claim in full",
        "report runs/a runs/b -o c.html",
    ),
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,
)
study = App(
    name="study",
    help="Decide claims about batch normalization by experiment.",
    help_epilogue=_examples("study list", "study run headline", "study show"),
)
data = App(
    name="data",
    help="The images that the experiments train on.",
    help_epilogue=_examples("data path", "data fetch", "data verify"),
)
app.command(study)
app.command(data)
app.register_install_completion_command(
    help="Complete words of this command by TAB in your shell.",
    help_epilogue=_examples("--install-completion", "--install-completion --shell bash"),
)

_WHAT = Group("What to run", sort_key=1)
_HOW = Group("How to run it", sort_key=2)
_INSTEAD = Group("Instead of a run", sort_key=3)
# Experiments choose learning rates with the seeds from 800 on: those must decide nothing.
_SEEDS = validators.Number(gte=1, lte=800)
DataDir = Annotated[Path | None, Parameter(help="A folder that holds mnist/.")]
Json = Annotated[bool, Parameter(help="Machine-readable.", show_default=False)]
Words = Annotated[list[str] | None, Parameter(consume_multiple=True)]
Runs = Annotated[list[Path] | None, Parameter(consume_multiple=True)]


class Unusable(Exception):
    """An input that cannot be used: one message, exit code 2."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a minus sign must not end a run
    try:
        code = app(given, exit_on_error=False, print_error=False, result_action="return_value")
        if sys.stdout is not None:
            sys.stdout.flush()
    except CycloptsError as error:
        code = _complain(_misuse(error), USAGE)
    except Unusable as error:
        code = _complain(str(error), USAGE)
    except KeyboardInterrupt:
        code = _complain(_interrupted(given), INTERRUPTED)
        # An interrupt that came within some exec() (imports do it) makes CPython end by the signal
        # even now that it is handled; the next exec() makes it forget.
        exec("")
    except OSError as error:
        # Also the reader of our output has left (`| head`): nothing to say, nobody to say it to.
        gone = isinstance(error, BrokenPipeError)
        code = FINE if gone else _complain(f"The output cannot be written: {error}.", FAILED)
        _drop_output()
    sys.exit(code or FINE)


def _complain(message: str, code: int = FINE) -> int:
    with suppress(OSError):
        if sys.stderr is not None:  # else print would take stdout
            print(message, file=sys.stderr)
    return code


def _drop_output() -> None:
    """What is still in the buffer goes nowhere, so that Python's own flush does not complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _misuse(error: CycloptsError) -> str:
    command = " ".join(("gammabeta", *(error.command_chain or ())))
    text = str(error)
    if isinstance(error, UnusedCliTokensError):
        text = f"`{command}` takes no {' '.join(map(repr, error.unused_tokens or ()))}."
    return f"{text} `{command} --help` shows what there is."


def _interrupted(given: list[str]) -> str:
    if given[:2] != ["study", "run"]:
        return "Interrupted."
    typed = sys.argv[0]
    found = shutil.which("gammabeta")
    if Path(typed).name == "__main__.py":
        program = [sys.executable, "-m", "gammabeta"]
    elif found is not None and Path(found).resolve() == Path(typed).resolve():
        program = ["gammabeta"]
    else:
        program = [typed]
    return f"Interrupted. What is finished is kept; to go on:\n    {shlex.join([*program, *given])}"


_EXTRA = ("joblib", "numpy", "pooch", "scipy", "sklearn")


@contextmanager
def _usable() -> Iterator[None]:
    """Turn the errors that speak to the user into exit code 2; others are defects and show."""
    try:
        yield
    except BrokenPipeError:
        raise
    except ImportError as error:
        cause: BaseException | None = error
        while cause is not None and getattr(cause, "name", None) is None:
            cause = cause.__cause__
        package = str(getattr(cause, "name", "")).partition(".")[0]
        if package not in _EXTRA or "pip install" in str(error):
            raise Unusable(str(error)) from error
        package = package.replace("sklearn", "scikit-learn")
        raise Unusable(
            f"The studies need the package {package}, which is not installed. "
            'Run: pip install "gammabeta[study]"'
        ) from error
    except (ValueError, OSError) as error:
        raise Unusable(str(error)) from error


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back during imports: some packages swallow it, and are left half made."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _dump(value: Any) -> int:
    print(json_module.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
    return FINE


# --- study ----------------------------------------------------------------------------------


@study.command(name="list", help_epilogue=_examples("study list", "study list --json"))
def list_claims(*, json: Json = False) -> int:
    """List all claims of the registry, also those that have no experiment yet."""
    from gammabeta.studies import _claims

    if json:
        return _dump(_claims.listing())
    from gammabeta import _terminal

    _terminal.claims(_claims.claims().values())
    return FINE


@study.command(
    help_epilogue=_examples(
        "study run                 # the headline claims, into runs/small",
        "study run act-all --data mnist --seeds 8 -o runs/mine",
        "study run all --dry-run   # how long would it take?",
    )
)
def run(
    ids: Words = None,
    /,
    *,
    budget: Annotated[Literal["tiny", "small", "full"], Parameter(group=_WHAT)] = "small",
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
    force: Annotated[bool, Parameter(group=_HOW, show_default=False)] = False,
    dry_run: Annotated[bool, Parameter(group=_INSTEAD, show_default=False)] = False,
    cell: Annotated[str | None, Parameter(group=_INSTEAD)] = None,
) -> int:
    """Run experiments, judge their claims and write the page.

    Finished work is kept: the same command goes on where it was stopped.

    Parameters
    ----------
    ids
        Claims or experiments (`gammabeta study list`); the sets headline (the default) and all.
    budget
        tiny: tries the wiring; small: minutes; full: as the source did it.
    data
        auto: MNIST where it is to be had, else the bundled digits (a demonstration).
    data_dir
        A folder that holds mnist/; GAMMABETA_DATA unless given.
    seeds
        Seeds for each arm, at most 800; planned from a pilot unless given.
    out
        The run folder; runs/BUDGET unless given.
    jobs
        Worker processes; one a core unless given.
    deadline
        Seconds after which nothing new is started; 240 for the set headline.
    force
        Make finished cells again.
    dry_run
        Say what would be run and how long it would take; write nothing.
    cell
        Repeat one cell of the run folder alone; its name has 16 digits.
    """
    out = Path("runs") / budget if out is None else out
    if cell is not None:
        if ids or dry_run:
            raise Unusable("--cell repeats one cell and takes neither claims nor --dry-run.")
        return _repeat(cell, out, data_dir)
    with _usable():
        wanted = ids or ["headline"]
        with _uninterrupted():
            from gammabeta import _terminal
            from gammabeta.studies import _claims, _data, _experiments, _judge, _run

            known = {key: e.CLAIMS for key, e in _experiments.experiments().items()}
        chosen = _claims.resolve(wanted, known)
        settings: dict[str, Any] = {
            "out": out,
            "budget": budget,
            "data": data,
            "data_dir": data_dir,
            "jobs": jobs,
            "seeds": seeds,
            "force": force,
        }
        if dry_run:
            estimate = _run.estimate(chosen, **settings)
            _terminal.estimate(estimate)
            if estimate.data == "digits":
                _terminal.notice(estimate.notice, _data.HOW_TO_GET_MNIST)
            return FINE
        if deadline is None and wanted == ["headline"]:
            deadline = 240.0
        with _terminal.Progress() as progress:
            result = _run.run(chosen, deadline_seconds=deadline, progress=progress, **settings)
        if result.interrupted:
            raise KeyboardInterrupt
        _terminal.ended(result)
        # The page tells of all that the folder holds, the terminal of what was asked for. All is
        # written before the first line is printed: a reader who leaves early loses nothing.
        judged = _judge.judge([out], budget=budget, data=result.data)
        page, trouble = _keep(out, judged)
        shown = [verdict for verdict in judged.verdicts if verdict.experiment in chosen]
        _terminal.verdicts(
            [verdict.to_json() for verdict in shown], _judge.surprises(shown), _claims.claims()
        )
        if page is not None:
            print(f"\nPage: {page}")
        if result.data == "digits":
            _terminal.notice(result.notice, _data.HOW_TO_GET_MNIST)
    if trouble:
        raise Unusable(trouble)
    return FAILED if result.failed else FINE


def _keep(out: Path, judged: Any) -> tuple[Path | None, str]:
    """Store verdicts and page in the run folder; the page, and what went wrong."""
    from gammabeta.studies import _judge

    try:
        _judge.write_derived(out, judged)
        from gammabeta.report.page import write

        return write([out], out / "report.html"), ""
    except ImportError as error:
        _complain(f"No page was written. {error}")
        return None, ""  # the verdicts stand without it
    except OSError as error:
        return None, f"The rows are kept, but not all that is made from them. {error}"


def _repeat(cell: str, out: Path, data_dir: Path | None) -> int:
    with _usable():
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
        return _complain(f"The cell {cell} failed again; the run folder is as it was.", FAILED)
    print(f"{stored.path}: {len(stored.rows)} rows. `gammabeta study judge {out}` judges them.")
    return FINE


def _newest() -> Path | None:
    runs = [path.parent for path in Path("runs").glob("*/claims.json")]
    return max(runs, key=lambda path: path.stat().st_mtime, default=None)


def _found(paths: list[Path] | None) -> list[Path]:
    """The run folders that were named, else the newest one below runs/."""
    from gammabeta import _runs

    found = paths or [path for path in [_newest()] if path is not None]
    if not found:
        raise Unusable(
            "A run folder was expected: none was named, and there is none below runs/. "
            "Make one with `gammabeta study run headline`, or name its path."
        )
    for path in found:
        _runs.read_claims(path)  # says it best where a path is no run folder, or a newer one
    return found


def _sorted_out(words: list[str]) -> tuple[list[Path], list[Claim]]:
    """Which words are run folders, and the claims that the others ask for."""
    from gammabeta.studies import _claims

    known = _claims.claims()
    paths: list[Path] = []
    asked: dict[str, Claim] = {}
    for word in words:
        name = word.strip().lower()
        belong = [
            claim
            for claim in known.values()
            if name in (claim.id.lower(), claim.experiment, "all")
            or (name == "headline" and claim.headline)
        ]
        if Path(word).exists() or Path(word).name != word:
            paths.append(Path(word))
        elif belong:
            asked |= {claim.id: claim for claim in belong}
        else:
            experiments = [claim.experiment for claim in known.values() if claim.experiment]
            near = _claims.suggest(name, [*known, *dict.fromkeys(experiments), *_claims.SETS])
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise Unusable(
                f"A run folder or a claim was expected, got {word!r}. {hint}"
                "`gammabeta study list` shows all claims; run folders lie below runs/."
            )
    return paths, list(asked.values())


@study.command(
    help_epilogue=_examples(
        "study show                # the newest run below runs/",
        "study show runs/headline --json",
        "study show act-all        # one claim: source, rule, answer, notes",
    )
)
def show(what: Words = None, /, *, json: Json = False) -> int:
    """Show the verdicts of run folders, or all about some claims.

    Parameters
    ----------
    what
        Run folders (the newest one below runs/ unless given), claims or experiments.
    """
    from gammabeta import _terminal

    with _usable():
        paths, asked = _sorted_out(what or [])
        if asked and not paths and _newest() is None:
            judged = None
        else:
            judged = _judged(_found(paths), {})
    ids = {claim.id for claim in asked}
    found = judged.verdicts if judged else []
    if json:
        return _dump([_public(v.to_json()) for v in found if not ids or v.claim in ids])
    for number, claim in enumerate(asked):
        if number:
            print()
        verdict = next((v.to_json() for v in found if v.claim == claim.id), None)
        _terminal.card(claim, verdict)
    if judged and not asked:
        _print(judged)
    return FINE


@study.command(
    help_epilogue=_examples(
        "study judge runs/headline", "study judge runs/headline --set act-all.delta=0.5"
    )
)
def judge(
    paths: Runs = None,
    /,
    *,
    json: Json = False,
    rules: Annotated[list[str] | None, Parameter(name="--set")] = None,
) -> int:
    """Judge the stored rows again, without training; the verdicts are kept in the run folder.

    Parameters
    ----------
    paths
        Run folders; the newest one below runs/ unless given. Of several nothing is kept.
    rules
        CLAIM.THRESHOLD=VALUE: judge by another rule. The run folder stays as it is.
    """
    from gammabeta import _terminal
    from gammabeta.studies import _claims

    with _usable():
        changed = _claims.rules(rules or [])
        found = _found(paths)
        judged = _judged(found, changed)
    if not json and changed:
        _terminal.other_rules(changed, _claims.claims())
    if json:
        _dump([_public(verdict.to_json()) for verdict in judged.verdicts])
    else:
        _print(judged)
    if len(found) == 1 and not changed:
        from gammabeta.studies import _judge

        try:
            _judge.write_derived(found[0], judged)
        except OSError as error:
            _complain(f"The verdicts were not kept, {found[0]} cannot be written: {error}.")
    return FINE


def _judged(paths: list[Path], rules: dict[str, dict[str, float]]) -> Any:
    from gammabeta.studies import _claims, _judge

    try:
        with _claims.overruled(rules):
            return _judge.judge(paths)
    except RuntimeError as error:
        if not rules:
            raise
        raise Unusable(f"The claims cannot be judged by this rule: {error.__cause__}") from error


def _print(judged: Any) -> None:
    from gammabeta import _terminal
    from gammabeta.studies import _claims, _data

    verdicts = [verdict.to_json() for verdict in judged.verdicts]
    _terminal.verdicts(verdicts, judged.surprises, _claims.claims())
    if judged.notice:
        _terminal.notice(judged.notice, _data.HOW_TO_GET_MNIST)


_SHOWN = (
    *("claim", "experiment", "status", "published_status", "effect", "ci", "n", "unit"),
    *("reported", "budget", "data"),
)


def _public(verdict: dict[str, Any]) -> dict[str, Any]:
    """What `--json` tells of a verdict; JSON knows no NaN and no infinity."""
    shown = {key: verdict[key] for key in _SHOWN}
    if shown["effect"] is not None and not math.isfinite(shown["effect"]):
        shown["effect"] = None
    if shown["ci"] is not None and not all(map(math.isfinite, shown["ci"])):
        shown["ci"] = None
    return shown


# --- report, data, env ----------------------------------------------------------------------


@app.command(
    help_epilogue=_examples(
        "report runs/headline -o report.html",
        "report runs/mine runs/yours -o both.html    # their rows together",
    )
)
def report(
    paths: Runs = None, /, *, out: Annotated[Path, Parameter(alias="-o")] = Path("report.html")
) -> int:
    """Write run folders as one self-contained HTML page.

    Parameters
    ----------
    paths
        Run folders; the newest one below runs/ unless given.
    out
        The HTML file to write.
    """
    with _usable():
        from gammabeta.report.page import write

        print(write(_found(paths), out))
    return FINE


@data.command(help_epilogue=_examples("data fetch", "data fetch --data-dir data"))
def fetch(*, data_dir: DataDir = None) -> int:
    """Download what is missing of MNIST, check it, and print its folder."""
    from gammabeta.studies import _data

    with _usable():
        try:
            print(_data.fetch(data_dir))
        except ConnectionError as error:
            return _complain(str(error), FAILED)
    return FINE


@data.command(help_epilogue=_examples("data verify", "data verify --data-dir data"))
def verify(*, data_dir: DataDir = None) -> int:
    """Check the checksum, sizes and headers of each file of MNIST."""
    from gammabeta.studies import _data

    with _usable():
        found = _data.verify(data_dir)
    for check in found:
        print(f"{'good' if check.ok else 'BAD '}  {check.file.name}: {check.detail}")
    return FINE if all(check.ok for check in found) else FAILED


@data.command(help_epilogue=_examples("data path"))
def path(*, data_dir: DataDir = None) -> int:
    """Print the folder that MNIST is read from."""
    from gammabeta.studies import _data

    with _usable():
        place = _data.place(data_dir)
    if place.folder is None:
        return _complain(f"There is no MNIST yet: {place.why}. {_data.HOW_TO_GET_MNIST}", FAILED)
    print(place.folder)
    return FINE


@app.command(help_epilogue=_examples("env", "env --json"))
def env(*, json: Json = False) -> int:
    """Print what an account of a defect needs: versions, processor, threads, backends."""
    from gammabeta import _terminal

    facts = _terminal.environment()
    if json:
        return _dump(facts)
    for name, value in facts.items():
        print(f"{name:<14} {'–' if value is None else value}")
    return FINE
