"""What the commands share: exit codes, parameters, output, and how an error speaks."""

from __future__ import annotations

import json as json_module
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from gammabeta.studies._claims import Claim

FINE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

Json = Annotated[bool, Parameter(help="Machine-readable.", show_default=False)]
Runs = Annotated[list[Path] | None, Parameter(consume_multiple=True)]
Words = Annotated[list[str] | None, Parameter(consume_multiple=True)]


class Unusable(Exception):
    """An input that cannot be used: one message, exit code 2."""


def examples(*lines: str) -> str:
    """The end of a help page."""
    return "Examples:\n" + "\n".join(f"    gammabeta {line}" for line in lines)


def complain(message: str, code: int = FINE) -> int:
    """Tell stderr; the exit code."""
    with suppress(OSError):
        if sys.stderr is not None:  # else print would take stdout
            print(message, file=sys.stderr)
    return code


def dump(value: Any) -> int:
    """Print as JSON; the exit code."""
    print(json_module.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
    return FINE


_EXTRA = ("joblib", "numpy", "pooch", "scipy", "sklearn")


@contextmanager
def usable() -> Iterator[None]:
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
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back during imports: some packages swallow it, and are left half made."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def newest_run() -> Path | None:
    """The run folder below runs/ that was written last."""
    runs = [path.parent for path in Path("runs").glob("*/claims.json")]
    return max(runs, key=lambda path: path.stat().st_mtime, default=None)


def run_folders(paths: list[Path] | None) -> list[Path]:
    """The run folders that were named, else the newest one below runs/."""
    from gammabeta import _runs

    found = paths or [path for path in [newest_run()] if path is not None]
    if not found:
        raise Unusable(
            "A run folder was expected: none was named, and there is none below runs/. "
            "Make one with `gammabeta study run headline`, or name its path."
        )
    for path in found:
        _runs.read_claims(path)  # says it best where a path is no run folder, or a newer one
    return found


def sorted_out(words: list[str]) -> tuple[list[Path], list[Claim]]:
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
            hint = _claims.meant(name, [*known, *experiments, *_claims.SETS])
            raise Unusable(
                f"A run folder or a claim was expected, got {word!r}. {f'{hint} ' if hint else ''}"
                "`gammabeta study list` shows all claims; run folders lie below runs/."
            )
    return paths, list(asked.values())
