"""`gammabeta check`: find misuse of batch normalization in a model that a function builds."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from inspect import signature
from pathlib import PurePath
from typing import Annotated, Any

from cyclopts import Group, Parameter

from gammabeta.cli._parts import FAILED, FINE, Json, Unusable, complain, dump, usable

_WHICH = Group("Which rules", sort_key=1)
_INSTEAD = Group("Instead of a check", sort_key=2)
Codes = Annotated[list[str] | None, Parameter(group=_WHICH)]
# of a tuple that a factory returns, in this order
_ARGUMENTS = ("model", "batch", "optimizer")
_OWN = ("check:", "gammabeta.check:")  # how messages begin that speak for themselves


def check(
    target: str | None = None,
    /,
    *,
    json: Json = False,
    select: Codes = None,
    ignore: Codes = None,
    explain: Annotated[str | None, Parameter(group=_INSTEAD)] = None,
) -> int:
    """Find misuse of batch normalization: ten rules, the measured effect, the cure.

    Exit codes: 0 nothing found, 1 findings, 2 the command cannot be used.

    Parameters
    ----------
    target
        MODULE:FACTORY, a function without arguments in a module that can be imported from here.
        It returns the model, a tuple (model, batch, optimizer) or its beginning, or a dict of the
        arguments of gb.check.
    select
        Try these rules only: BN001,BN005.
    ignore
        Leave these rules out.
    explain
        Say what a rule is about, when it fires, and what cures it: BN004.
    """
    with usable():
        from gammabeta._check import check as find
        from gammabeta._check._evidence import NO_BATCH
        from gammabeta._check._finding import jsonable
        from gammabeta._check._page import explain as explained

        if explain is not None:
            if target is not None:
                raise Unusable("--explain tells of a rule and takes no MODULE:FACTORY.")
            print(explained(explain))
            return FINE
        if target is None:
            raise Unusable(
                "A model was expected: gammabeta check MODULE:FACTORY, or --explain BN004."
            )
        # what the user's code prints is no part of the report
        with redirect_stdout(sys.stderr) if json else nullcontext():
            arguments = _made(target)
        for name, given in (("select", select), ("ignore", ignore)):
            if given is not None:
                arguments[name] = ",".join(given)
        redirected = redirect_stdout(sys.stderr) if json else nullcontext()
        with redirected, _theirs(f"Checking what {target} returned"):
            found = find(arguments.pop("model"), **arguments)
        factory = target.rpartition(":")[2]
        for code, reason in found.skipped.items():
            if reason == NO_BATCH:
                found.skipped[code] = f"let {factory}() return (model, batch, optimizer)"
        for code, what in found.partly.items():
            argument = what.rpartition("give ")[2].removesuffix("=")
            if argument != "optimizer":
                what = what.replace(
                    f"give {argument}=", f"let {factory}() return a dict with {argument!r}"
                )
                found.partly[code] = what
    if json:
        findings = [jsonable(finding) for finding in found]
        told = {"tried": list(found.tried), "partly": found.partly, "skipped": found.skipped}
        dump({"findings": findings, **told})
    else:
        print(found)
    return FAILED if found else FINE


@contextmanager
def _theirs(what: str) -> Iterator[None]:
    """Errors of the user's code: where they come from, and exit code 2."""
    try:
        yield
    except Unusable:
        raise
    except SystemExit as error:
        raise Unusable(
            f"{what} left with SystemExit({error.code!r}). A factory must return the model: call "
            "nothing in it that ends the program."
        ) from error
    except Exception as error:
        spoken = isinstance(error, ValueError | TypeError) and str(error).startswith(_OWN)
        if not spoken:
            complain(_where(error))
        text = str(error) if spoken else f"{what} raised {type(error).__name__}: {error}"
        raise Unusable(text) from error


def _where(error: Exception) -> str:
    """The traceback by the user's frames alone, without its last line: a sentence follows."""
    import torch

    import gammabeta

    ours, theirs, python = (
        os.path.dirname(str(module.__file__)) + os.sep for module in (gammabeta, torch, os)
    )

    def shown(file: str) -> bool:
        packages = "site-packages" in file  # below Python's own files, but none of them
        return not file.startswith((ours, theirs, "<frozen importlib")) and (
            packages or not file.startswith(python)
        )

    told = traceback.TracebackException.from_exception(error)
    last = "" if isinstance(error, SyntaxError) else "".join(told.format_exception_only())
    part: traceback.TracebackException | None = told
    while part is not None:
        part.stack[:] = [frame for frame in part.stack if shown(frame.filename)]
        part = part.__cause__ or part.__context__
    return "".join(told.format()).removesuffix(last).rstrip()


def _made(target: str) -> dict[str, Any]:
    """The arguments of the check that the factory returns."""
    from torch import nn

    from gammabeta._check import check as find

    factory = _factory(target)
    with _theirs(target):
        made = factory if isinstance(factory, nn.Module) else factory()
    if isinstance(made, Mapping):
        arguments = dict(made)
        known = list(signature(find).parameters)
        unknown = [key for key in arguments if key not in known]
        if unknown:
            raise Unusable(
                f"{target} must return a dict with keys among {', '.join(known)}, got "
                f"{', '.join(map(repr, unknown))}."
            )
    elif isinstance(made, tuple):
        if len(made) > len(_ARGUMENTS):
            raise Unusable(
                f"{target} must return (model, batch, optimizer), got {len(made)} parts."
            )
        arguments = dict(zip(_ARGUMENTS, made, strict=False))
    else:
        arguments = {"model": made}
    if not isinstance(arguments.get("model"), nn.Module):
        raise Unusable(
            f"{target} must return a model, (model, batch, optimizer), or a dict with 'model', got "
            f"{type(arguments.get('model', made)).__name__}."
        )
    return arguments


def _factory(target: str) -> Callable[[], Any]:
    module, colon, path = target.partition(":")
    if module.endswith(".py"):
        dotted = ".".join(PurePath(module).with_suffix("").parts)
        raise Unusable(
            "MODULE:FACTORY was expected, with a module as it is imported, got a file: write "
            f"{dotted}:{path or 'build'}."
        )
    if not (module and colon and path):
        raise Unusable(f"MODULE:FACTORY was expected, such as train:build, got {target!r}.")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does
    with _theirs(f"Importing {module!r}"):
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or error.name not in (module, module.partition(".")[0]):
                raise
            raise Unusable(f"There is no module {error.name!r} to import from here.") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise Unusable(f"{module!r} has no {path!r}.")
        found = getattr(found, name)
    if not callable(found):
        raise Unusable(f"{target} must be a function, got {type(found).__name__}.")
    factory: Callable[[], Any] = found
    return factory
