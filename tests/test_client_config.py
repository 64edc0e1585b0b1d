"""`step1x-edit mcp config`: what it prints starts our server, and what it writes harms nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from typer.testing import CliRunner

from step1x_edit import MCPClient
from step1x_edit.interfaces.cli import app

ROOT = Path(__file__).parents[1]

FILES = {
    "claude-desktop": (".config/Claude/claude_desktop_config.json", "mcpServers"),
    "claude-code": (".claude.json", "mcpServers"),
    "cursor": (".cursor/mcp.json", "mcpServers"),
    "vscode": (".config/Code/User/mcp.json", "servers"),
}

run = CliRunner()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without any configuration."""
    if sys.platform != "linux":
        pytest.skip("the places are those of Linux")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "MODEL_PATH", "GPU_IDLE_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def config(*flags: str) -> Any:
    return run.invoke(app, ["mcp", "config", *flags])


@pytest.mark.parametrize("client", FILES)
def test_each_client_gets_its_own_shape_and_place(home: Path, client: str) -> None:
    path, key = FILES[client]
    result = config("--client", client)

    entry = json.loads(result.stdout)[key]["step1x-edit"]
    assert (entry.get("type") == "stdio") == (client in ("claude-code", "vscode"))
    assert entry["command"] == sys.executable
    assert entry["args"] == [str(ROOT / "mcp_server.py")]
    assert "env" not in entry
    assert str(home / path) in result.stderr
    assert not (home / path).exists()


async def test_what_is_printed_starts_the_server(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_PATH", "models")
    monkeypatch.setenv("GPU_IDLE_TIMEOUT", "77")
    entry = json.loads(config("--client", "cursor").stdout)["mcpServers"]["step1x-edit"]
    for name in ("MODEL_PATH", "GPU_IDLE_TIMEOUT"):
        monkeypatch.delenv(name)
    assert entry["env"] == {"MODEL_PATH": str(home / "models"), "GPU_IDLE_TIMEOUT": "77"}

    for name, value in entry["env"].items():
        monkeypatch.setenv(name, value)
    async with MCPClient(entry["args"][0]) as client:
        status = await client.call_tool("get_gpu_status")
    assert status["gpu_status"]["idle_timeout"] == 77


def test_writing_keeps_other_entries_and_a_backup(home: Path) -> None:
    real = home / "dotfiles" / "mcp.json"
    real.parent.mkdir()
    before = {"mcpServers": {"other": {"command": "x"}, "step1x-edit": {"old": 1}}, "theme": "ü"}
    real.write_text(json.dumps(before))
    real.chmod(0o600)
    (home / ".cursor").mkdir()
    (home / ".cursor" / "mcp.json").symlink_to(real)

    first, second = config("--client", "cursor", "--write"), config("--client", "cursor", "--write")

    assert (first.exit_code, second.exit_code) == (0, 0)
    written = json.loads(real.read_text("utf-8"))
    assert written["mcpServers"].pop("step1x-edit")["command"] == sys.executable
    assert written == {"mcpServers": {"other": {"command": "x"}}, "theme": "ü"}
    assert (home / ".cursor" / "mcp.json").is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    assert json.loads((real.parent / "mcp.json.bak").read_text()) == before
    assert sorted(path.name for path in real.parent.iterdir()) == [
        "mcp.json",
        "mcp.json.bak",
        "mcp.json.bak1",
    ]


def test_a_file_that_is_not_there_yet_is_made(home: Path) -> None:
    result = config("--client", "vscode", "--write")

    path = home / FILES["vscode"][0]
    assert result.stdout == f"{path}\n"
    assert list(json.loads(path.read_text())) == ["servers"]
    assert [each.name for each in path.parent.iterdir()] == ["mcp.json"]


@pytest.mark.parametrize("content", ['{"servers": {} // mine\n}', "[]", '{"servers": []}'])
def test_a_file_that_cannot_be_kept_as_it_is_is_left_alone(home: Path, content: str) -> None:
    path = home / FILES["vscode"][0]
    path.parent.mkdir(parents=True)
    path.write_text(content)

    result = config("--client", "vscode", "--write")

    assert result.exit_code == 2
    assert f"{path} cannot be added to" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert path.read_text() == content
    assert [each.name for each in path.parent.iterdir()] == ["mcp.json"]


def test_a_client_that_nobody_knows_is_a_usage_error() -> None:
    result = config("--client", "emacs")

    assert result.exit_code == 2
    assert "claude-desktop" in result.stderr


async def test_the_checked_in_configuration_starts_a_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a client does that runs in the checkout, with the python3 of its PATH."""
    config = json.loads((ROOT / "mcp_config.json").read_text())
    entry = config["mcpServers"]["step1x-edit"]
    assert entry == {
        "command": "python3",
        "args": ["mcp_server.py"],
        "env": {"MODEL_PATH": "/path/to/Step1X-Edit", "GPU_IDLE_TIMEOUT": "60"},
    }
    monkeypatch.chdir(ROOT)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    entry["env"] |= {**os.environ, "PATH": path}
    async with Client(config) as client:
        result = await client.call_tool("get_gpu_status", {})

    assert result.structured_content["status"] == "success"


# --- mcp call -------------------------------------------------------------------------------------


def test_call_prints_the_answer_and_tells_failures_by_its_exit_code() -> None:
    good = run.invoke(app, ["mcp", "call", "get_gpu_status", "{}"])
    bad = run.invoke(app, ["mcp", "call", "edit_image", '{"image_path": "no.png", "prompt": "x"}'])

    assert good.exit_code == 0
    assert json.loads(good.stdout)["gpu_status"]["model_location"] == "Unloaded"
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["error"] == "Image file not found: no.png"


@pytest.mark.parametrize("arguments", ["{image_path: 1}", "[1]", '"text"', "7"])
def test_arguments_that_are_no_object_are_a_usage_error(arguments: str) -> None:
    result = run.invoke(app, ["mcp", "call", "edit_image", arguments])

    assert result.exit_code == 2
    assert result.stdout == ""
    assert 'must be a JSON object such as \'{"image_path"' in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="needs HOME")
@pytest.mark.parametrize("client", FILES)
def test_a_user_without_a_home_is_told_so_in_one_sentence(
    client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(number: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    result = run.invoke(app, ["mcp", "config", "--client", client])

    assert result.exit_code == 2
    assert "no home folder for the client's file; set HOME" in result.stderr
