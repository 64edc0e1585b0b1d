"""Rows of figures as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def table_of(rows: Sequence[Mapping[str, object]], digits: int = 3) -> list[str]:
    """The lines of a table whose columns are the names of the first row."""
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    return lines + [
        f"| {' | '.join(cell(value, digits) for value in row.values())} |" for row in rows
    ]


def cell(value: object, digits: int = 3) -> str:
    """A number with this many digits, any other value in words."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.{digits}g}"
        case _:
            return str(value)
