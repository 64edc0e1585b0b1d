"""docs/architecture.md names every file of the package."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "step1x_edit"
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")


def test_the_architecture_has_one_line_for_each_file() -> None:
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    named = Counter(re.findall(r"^- `([\w/]+\.py)`: .", PAGE, re.MULTILINE))

    assert set(named) == {file for file in files if not file.endswith("__init__.py")}
    assert set(named.values()) == {1}


def test_the_architecture_has_the_layers_of_the_import_contract() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    contract, *_ = re.findall(r'containers = \["step1x_edit"\].*?layers = \[(.*?)\]', project, re.S)
    layers = re.findall(r'"(.*?)"', contract)
    (drawn,) = re.findall(r"```\n(interfaces: .*?)\n```", PAGE, re.S)

    assert [line for line in drawn.splitlines() if re.match(r"\w+( \||$)", line)] == layers[1:]
