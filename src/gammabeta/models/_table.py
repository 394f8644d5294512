"""A report of a model function: a list of named tuples that prints as a table."""

from __future__ import annotations

from typing import Any, TypeVar

Row = TypeVar("Row", bound=tuple[Any, ...])


class Table(list[Row]):
    """Rows of one kind of named tuple; ``str()`` aligns them in columns.

    Tuples and tensors within a row are left out of the text, and a number is shown with four
    significant digits: the rows themselves hold everything.
    """

    def __str__(self) -> str:
        if not self:
            return "(no batch normalization)"
        fields: tuple[str, ...] = getattr(self[0], "_fields", ())
        wanted = [
            column
            for column, name in enumerate(fields)
            if all(isinstance(row[column], str | int | float) for row in self)
        ]
        cells = [[fields[column] for column in wanted]]
        cells += [[_text(fields[column], row[column]) for column in wanted] for row in self]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (zip(line, widths, strict=True) for line in cells)
        return "\n".join("  ".join(f"{c:<{w}}" for c, w in line).rstrip() for line in lines)


def _text(field: str, value: object) -> str:
    if field == "name" and value == "":
        return "(model)"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
