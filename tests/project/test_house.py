"""The code stays readable: no function of the interfaces is longer than a screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import step1x_edit.interfaces

INTERFACES: Final = Path(step1x_edit.interfaces.__file__).parent
LONGEST: Final = 60
"""Lines from `def` to the end of the body."""


def functions() -> Iterator[tuple[str, int]]:
    """Each function of the interfaces, nested ones included, and its lines."""
    for path in INTERFACES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield (
                    f"{path.relative_to(INTERFACES)}: {node.name}",
                    node.end_lineno - node.lineno + 1,
                )


def test_no_function_of_the_interfaces_is_longer_than_a_screen() -> None:
    lines = list(functions())

    assert len(lines) > 500
    assert [f"{where}, {count} lines" for where, count in lines if count > LONGEST] == []
