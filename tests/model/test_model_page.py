"""docs/model.md names code that exists, and every file of the network."""

import importlib
import re
from operator import attrgetter
from pathlib import Path

import pytest

from step1x_edit import model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "model.md").read_text("utf-8")
MODULES = {path.stem for path in Path(model.__path__[0]).glob("*.py")} - {"__init__"}
NAMED = sorted(set(re.findall(r"`(\w+\.(?!py`)[\w.]+)`", PAGE)))


@pytest.mark.parametrize("named", NAMED)
def test_what_the_page_names_exists(named: str) -> None:
    module, _, name = named.partition(".")
    attrgetter(name)(importlib.import_module(f"step1x_edit.model.{module}"))


def test_the_page_names_every_file_of_the_network() -> None:
    linked = set(re.findall(r"model/(\w+)\.py\)", PAGE))

    assert MODULES - {named.partition(".")[0] for named in NAMED} - linked == set()
