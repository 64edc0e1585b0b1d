"""The documents keep their promises: links lead somewhere, nothing is left to fill in."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import MakeService
from step1x_edit.errors import Step1XEditError
from step1x_edit.interfaces.mcp.client_config import ClientName, config_file
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.schemas.answers import (
    BatchAnswer,
    EditAnswer,
    ErrorAnswer,
    Reasoning,
    RunningAnswer,
    StatusAnswer,
)
from step1x_edit.settings import Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "src/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text("utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_to_fill_in(document: Path) -> None:
    assert not re.search(r"@@|TODO|TBD|FIXME", document.read_text("utf-8"))


# --- docs/mcp.md is true --------------------------------------------------------------------------

GUIDE = (ROOT / "docs" / "mcp.md").read_text("utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table that begins with `heading`, back-ticks removed."""
    _, _, rest = GUIDE.partition(f"| {heading} |")
    lines = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


async def test_the_guide_names_every_tool_and_parameter_with_its_default_and_range(
    make_service: MakeService,
) -> None:
    tools = {tool.name: tool for tool in await build_mcp(make_service()).list_tools()}
    found: dict[str, set[str]] = {name: set() for name in tools}
    for name, of, default, allowed in rows("parameter"):
        owners = ["edit_image", "batch_edit_images"] if of == "both" else of.split("`, `")
        for owner in owners:
            found[owner].add(name)
            schema = tools[owner].parameters["properties"][name]
            if default != "–":
                assert json.loads(default) == schema["default"]
            else:
                assert name in tools[owner].parameters["required"]
            values = next((o for o in schema.get("anyOf", []) if o["type"] != "null"), schema)
            for bound in ("minimum", "maximum"):
                if name != "seed" and bound in values:
                    assert re.search(rf"\b{values[bound]}\b", allowed)

    assert {name for name, _ in rows("tool")} == tools.keys()
    assert "`submit_edit` takes what `edit_image` takes" in GUIDE
    found["submit_edit"] = found["edit_image"]
    for name, tool in tools.items():
        missing = tool.parameters["properties"].keys() - found[name] - {"image_path"}
        assert not missing


def test_the_errors_of_the_guide_are_those_of_the_tree() -> None:
    tree = {(kind.code, kind.beginning) for kind in _kinds(Step1XEditError)}
    told = {(code, beginning) for beginning, code, _ in rows("`error` begins with")}

    assert told <= tree
    assert len(told) > 8


def _kinds(root: type[Step1XEditError]) -> Iterator[type[Step1XEditError]]:
    for kind in root.__subclasses__():
        yield kind
        yield from _kinds(kind)


def test_the_answers_of_the_guide_are_those_of_the_schema() -> None:
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL)]
    config, thoughts, edit, batch, status, failure, running = blocks

    assert config == json.loads((ROOT / "mcp_config.json").read_text())
    EditAnswer.model_validate(edit)
    Reasoning.model_validate(thoughts)
    first, second = batch["results"]
    first["result"]["metadata"] = edit["metadata"]
    BatchAnswer.model_validate(batch)
    ErrorAnswer.model_validate(second["result"])
    StatusAnswer.model_validate(status)
    ErrorAnswer.model_validate(failure)
    RunningAnswer.model_validate(running)


@pytest.mark.parametrize("client", ClientName)
def test_the_guide_says_where_each_client_has_its_configuration(
    client: ClientName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    (row,) = [row for row in rows("`--client`") if row[0] == client.value]
    file = config_file(client)

    if sys.platform == "linux":
        assert Path(row[1]).expanduser() == file.path
    assert row[2].startswith(file.key)
    assert ("stdio" in row[2]) == ("type" in file.shape("python3", [], {}))
    advised = set(re.findall(r"MCP_MAX_WAIT=(\d+)", advice_for(client)))
    assert advised == (set() if file.limit_s is None else {str(file.limit_s - 10)})


def advice_for(client: ClientName) -> str:
    """What the guide says to set for the client, in the rows about limits that name it."""
    name = {"vscode": "vs code"}.get(client.value, client.value.replace("-", " "))
    limits = rows("client")
    found = [what for names, _, _, what in limits if name in names.lower()]
    assert found
    return " ".join(found)


# --- README's table of settings is true -----------------------------------------------------------


def _documented_settings() -> Iterator[tuple[str, str]]:
    """Each name in README's table of settings, with the default that stands beside it."""
    _, _, section = (ROOT / "README.md").read_text("utf-8").partition("## Settings")
    for row in re.findall(r"^\| (`[A-Z].*?) \| (.*?) \|", section, re.MULTILINE):
        names = re.findall(r"`([A-Z0-9_]+)`", row[0])
        defaults = row[1].split(", ") if len(names) > 1 else [row[1]]
        for index, name in enumerate(names):
            yield name, defaults[min(index, len(defaults) - 1)]


def test_the_readme_names_every_setting() -> None:
    names = [name for name, _ in _documented_settings()]

    assert sorted(names) == sorted(name.upper() for name in Settings.model_fields)


@pytest.mark.parametrize(
    ("name", "default"),
    [row for row in _documented_settings() if row[0] not in {"DATA_DIR", "ALLOWED_DIRS"}],
)
def test_the_readme_has_the_default_of_a_setting(name: str, default: str) -> None:
    value = Settings.model_fields[name.lower()].get_default(call_default_factory=True)
    shown = default.strip("`").removesuffix(" s")

    if default == "–":
        assert not value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        assert float(shown) == value
    else:
        assert shown.lower() == str(value).lower()
