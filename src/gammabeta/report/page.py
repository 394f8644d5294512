"""The door of the report: run folders and records in, one HTML file out."""

import os
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gammabeta import __version__
from gammabeta.report import INSTALL

try:
    import jinja2
except ImportError as error:
    raise ImportError(INSTALL) from error
if find_spec("plotly") is None:
    raise ImportError(INSTALL)

from gammabeta.report import _content, _embed, _markdown, _marks

LIMIT = 8_000_000  # bytes of the whole page
_MARGIN = 100_000
_PLAIN = 100_000  # bytes of figures that are shown at once, before anything is unpacked
_FEW_OPEN = 3  # experiments: more are folded, or the page would be 200 screens high
_SCRIPTS = ("view.js", "stepper.js", "figures.js", "records.js", "claims.js", "page.js")


def write(
    paths: Sequence[Path],
    out: Path,
    *,
    compare: bool = False,
    markdown: bool = False,
    judged: Mapping[Path, Path] | None = None,
) -> Path:
    """Write one self-contained HTML page about run folders and records, and return its path.

    The page needs no network and no other file, and stays under 8 MB: where the rows of all
    cells do not fit, the longest tables are left out and the page says so. It appears under
    `out` by one rename, or not at all.

    Args:
        paths: one or more run folders, what several of them hold is shown together; or records
            of trainings (`gammabeta.Recorder`), each in a section of its own.
        out: the file to write; its folder is made where it is missing.
        compare: put the verdicts of two run folders beside each other as well.
        markdown: the words and verdicts as Markdown, without figures and rows.
        judged: for run folders without verdicts.json, such as kept rows, a folder that holds what
            was judged of them: verdicts.json, figures.json, claims.json. Nothing is judged here.

    Raises:
        RunError: a folder is not a run folder, or a file is not what it has to be.
        OSError: `out` cannot be written.
        ImportError: the extra `report` is not installed.
        ValueError: neither was given, or not two folders to compare, or `out` is one of them or a
            file in one that is no page.

    Example:
        >>> write([], Path("report.html"))
        Traceback (most recent call last):
        ValueError: report: expected a run folder, got none. Name one, or the record of a training.
    """
    runs = [Path(path) for path in paths]
    if not runs:
        raise ValueError(
            "report: expected a run folder, got none. Name one, or the record of a training."
        )
    out = Path(out)
    if out.is_dir():
        raise IsADirectoryError(
            f"report: expected a file to write, got the folder {out}. "
            f"Name a file: {out / 'report.html'}"
        )
    target = out.resolve()  # a link stays a link: the file that it names is written
    if target.exists() and not target.is_file():
        raise OSError(
            f"report: expected a file to write, got {out}, which is neither a file nor new. "
            "Name a file with -o."
        )
    _check_apart(target, runs)
    content = _content.gather(runs, compare, judged)
    text = _markdown.text(content) if markdown else _render(content)
    # A lone surrogate, which JSON can hold, has no UTF-8; it is shown as "?".
    _replace(target, text.encode("utf-8", "replace"))
    return out


def _check_apart(target: Path, runs: Sequence[Path]) -> None:
    """Refuse to write over what the page is made of."""
    if not target.exists():
        return
    for run in runs:
        # In a run folder all but a page may be its rows and verdicts.
        page = target.suffix in (".html", ".md")
        inside = run.is_dir() and target.is_relative_to(run.resolve()) and not page
        if inside or (run.exists() and target.samefile(run)):
            raise ValueError(
                f"report: the page must not take the place of what it shows, got the output "
                f"{target}, which is {'in' if inside else 'the input'} {run}. "
                "Name another file with -o, one that ends in .html or .md."
            )


def _render(content: _content.Content) -> str:
    template = _template()
    scripts = {
        "theme": _embed.script_text(_embed.asset("theme.js")),
        "plotly": _embed.script_text(_embed.plotly_script()),
        "page": _embed.script_text("".join(map(_embed.asset, _SCRIPTS))),
    }
    fixed: dict[str, Any] = {
        "page": content,
        "policy": _embed.policy([str(text) for text in scripts.values()]),
        "scripts": scripts,
        "style": _embed.script_text(_embed.asset("style.css")),
        "license": _embed.plotly_license(),
        **_figures(content.figures),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "statuses": _marks.STATUSES,
        "number": _marks.number,
        "status_mark": _marks.status_mark,
        "shapes": _marks.shapes(),
        "few_open": _FEW_OPEN,
        "chose": _content.CHOSE,
        "certainties": _marks.CERTAINTY,
        "words": _marks.WORDS,
        "certainty_mark": _marks.certainty_mark,
    }
    tables = {section.id: _table(section) for section in content.sections if section.cells}
    text = template.render(fixed, tables=tables)
    while len(text.encode("utf-8", "replace")) > LIMIT - _MARGIN:
        longest = max(tables, key=lambda name: len(tables[name]["packed"]), default=None)
        if longest is None or not tables[longest]["packed"]:
            break
        tables[longest] = {**tables[longest], "packed": ""}
        text = template.render(fixed, tables=tables)
    return text


def _figures(figures: Sequence[Any]) -> dict[str, Any]:
    """The numbers of the figures as JSON, or packed where they are many."""
    numbers = _embed.rounded(figures, digits=5)
    text = _embed.data_text(numbers)
    packed = _embed.packed(numbers) if len(text) > _PLAIN else ""
    return {"figure_data": "" if packed else text, "figures_packed": packed}


def _table(section: _content.Section) -> dict[str, Any]:
    table = _content.columns(section.cells)
    return {
        "rows": table["rows"],
        "cells": len(section.cells),
        "packed": _embed.packed(_embed.rounded(table)),
    }


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_embed.asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html.j2")


def _replace(out: Path, data: bytes) -> None:
    """Write under a temporary name beside `out` and rename, so that nobody reads half a page."""
    temp = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temp.write_bytes(data)
        os.replace(temp, out)
    except OSError as error:
        kind = type(error)
        raise kind(
            f"report: the page cannot be written to {out}: {error.strerror or error}. "
            "Name another file with -o."
        ) from error
    finally:
        _remove(temp)


def _remove(temp: Path) -> None:
    try:
        temp.unlink(missing_ok=True)
    except OSError:
        return  # its folder is not one, or is not ours: nothing was made there
