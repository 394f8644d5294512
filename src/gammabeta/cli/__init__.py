"""The command line: parses, calls, prints. Results go to stdout, progress and errors to stderr.

Exit codes: 0 fine, 1 something that was run failed, 2 the command or its input cannot be used,
130 interrupted.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from gammabeta import __version__
from gammabeta.cli._check import check as find_misuse
from gammabeta.cli._demo import demo
from gammabeta.cli._explain import explain
from gammabeta.cli._parts import (
    FAILED,
    FINE,
    INTERRUPTED,
    USAGE,
    Json,
    Runs,
    Unusable,
    complain,
    dump,
    examples,
    run_folders,
    usable,
)
from gammabeta.cli._study import study

__all__ = ["app", "main"]

app = App(
    name="gammabeta",
    help="Batch normalization: drop-in layers, instruments, and evidence.",
    version=__version__,
    help_format="plaintext",
    help_epilogue=examples(
        "demo                     # half a minute, no network needed",
        "study run headline       # decide the headline claims",
        "study list               # all claims",
        "study explain act-all    # one claim in full",
        "check train:build        # misuse in a model of yours",
        "report runs/a runs/b -o c.html",
    ),
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,
)
data = App(
    name="data",
    help="The images that the experiments train on.",
    help_epilogue=examples("data path", "data fetch", "data verify"),
)
app.command(
    demo,
    help_epilogue=examples("demo", "demo --json"),
)
app.command(study)
study.command(
    explain,
    help_epilogue=examples(
        "study explain act-all              # from the accepted rows",
        "study explain act-all runs/small   # from a run of yours",
        "study explain ics-reduced --json",
    ),
)
app.command(
    find_misuse,
    name="check",
    help_epilogue=examples(
        "check train:build             # what build() in train.py returns",
        "check train:build --ignore BN009 --json",
        "check --explain BN004",
    ),
)
app.command(data)
app.register_install_completion_command(
    help="Complete words of this command by TAB in your shell.",
    help_epilogue=examples("--install-completion", "--install-completion --shell bash"),
)

DataDir = Annotated[Path | None, Parameter(help="A folder that holds mnist/.")]


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
        code = complain(_misuse(error), USAGE)
    except Unusable as error:
        code = complain(str(error), USAGE)
    except KeyboardInterrupt:
        code = complain(_interrupted(given), INTERRUPTED)
        # An interrupt that came within some exec() (imports do it) makes CPython end by the signal
        # even now that it is handled; the next exec() makes it forget.
        exec("")
    except SystemExit as error:
        # What a help page's console makes of a reader who has left (`gammabeta --help | head`).
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = FINE
    except OSError as error:
        # Also the reader of our output has left (`| head`): nothing to say, nobody to say it to.
        gone = isinstance(error, BrokenPipeError)
        code = FINE if gone else complain(f"The output cannot be written: {error}.", FAILED)
        _drop_output()
    sys.exit(code or FINE)


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


@app.command(
    help_epilogue=examples(
        "report runs/headline -o report.html",
        "report runs/mine runs/yours -o c.html   # their rows together",
        "report runs/a runs/b --compare -o c.html   # verdicts side by side",
        "report record.jsonl -o training.html    # what a Recorder wrote",
        "report runs/small --format gif -o v.gif   # singular values move",
    )
)
def report(
    paths: Runs = None,
    /,
    *,
    out: Annotated[Path | None, Parameter(alias="-o")] = None,
    compare: bool = False,
    format: Literal["html", "md", "gif"] = "html",
    json: Json = False,
) -> int:
    """Write run folders, or records of trainings, as one self-contained HTML page.

    Parameters
    ----------
    paths
        Run folders, or files that a Recorder wrote; the newest run below runs/ unless given.
    out
        The file to write; report.html, report.md or report.gif unless given.
    compare
        Put the verdicts of two run folders side by side, those that differ first.
    format
        md: words and verdicts as Markdown. gif: animate the singular values of layers over
        training, a file for each, named after out.
    """
    out = Path(f"report.{format}") if out is None else out
    if format == "gif":
        with usable():
            from gammabeta.report import _animation

            files = _animation.write(run_folders(paths), out)
        return _tell(files, json)
    with usable():
        from gammabeta._runs import is_record
        from gammabeta.report.page import write

        records = [path for path in paths or () if is_record(path)]
        folders = [path for path in paths or () if path not in records]
        runs = run_folders(folders) if folders or not records else []
        with _judged(runs) as judged:
            page = write(
                [*runs, *records], out, compare=compare, markdown=format == "md", judged=judged
            )
    return _tell([page], json)


@contextmanager
def _judged(runs: list[Path]) -> Iterator[dict[Path, Path]]:
    """For run folders that hold rows but no verdicts, folders with what is judged of them."""
    from gammabeta import _runs

    open_runs = [
        run for run in runs if _runs.read_verdicts(run) is None and _runs.read_cells([run])
    ]
    found: dict[Path, Path] = {}
    with TemporaryDirectory() as folder:
        for number, run in enumerate(open_runs):
            try:
                from gammabeta.studies import _claims, _judge

                judged = _judge.judge([run])
            except (ImportError, RuntimeError) as error:
                complain(f"{run} has no verdicts, and its rows cannot be judged: {error}")
                continue
            home = Path(folder, str(number))
            home.mkdir()
            head = {"schema": _runs.SCHEMA, "claims": _claims.public()}
            _runs.write_json(home / "claims.json", head)
            _judge.write_derived(home, judged)
            found[run] = home
        yield found


@data.command(help_epilogue=examples("data fetch", "data fetch --data-dir data"))
def fetch(*, data_dir: DataDir = None, json: Json = False) -> int:
    """Download what is missing of MNIST, check it, and print its folder."""
    from gammabeta.studies import _data

    with usable():
        try:
            folder = _data.fetch(data_dir)
        except ConnectionError as error:
            return complain(str(error), FAILED)
    return _tell([folder], json)


@data.command(help_epilogue=examples("data verify", "data verify --data-dir data"))
def verify(*, data_dir: DataDir = None, json: Json = False) -> int:
    """Check the checksum, sizes and headers of each file of MNIST."""
    from gammabeta.studies import _data

    with usable():
        found = _data.verify(data_dir)
    if json:
        dump([{**check._asdict(), "file": str(check.file)} for check in found])
    for check in () if json else found:
        print(f"{'good' if check.ok else 'BAD '}  {check.file.name}: {check.detail}")
    return FINE if all(check.ok for check in found) else FAILED


@data.command(help_epilogue=examples("data path"))
def path(*, data_dir: DataDir = None, json: Json = False) -> int:
    """Print the folder that MNIST is read from."""
    from gammabeta.studies import _data

    with usable():
        place = _data.place(data_dir)
    if place.folder is None:
        return complain(f"There is no MNIST yet: {place.why}. {_data.HOW_TO_GET_MNIST}", FAILED)
    return _tell([place.folder], json)


def _tell(paths: Iterable[Path], json: bool) -> int:
    """Where something lies, a line each."""
    if json:
        return dump([str(path) for path in paths])
    for path in paths:
        print(path)
    return FINE


@app.command(help_epilogue=examples("env", "env --json"))
def env(*, json: Json = False) -> int:
    """Print what an account of a defect needs: versions, processor, threads, backends."""
    from gammabeta import _terminal

    facts = _terminal.environment()
    if json:
        return dump(facts)
    for name, value in facts.items():
        print(f"{name:<14} {'–' if value is None else value}")
    return FINE
