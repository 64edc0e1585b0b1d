"""`step1x-edit mcp config`: what it prints starts our server, and what it writes harms nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import yaml
from fastmcp import Client
from typer.testing import CliRunner

from step1x_edit import MCPClient
from step1x_edit.hub.catalog import find_model
from step1x_edit.interfaces.cli import app
from step1x_edit.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]

FILES = {
    "claude-desktop": (".config/Claude/claude_desktop_config.json", "mcpServers"),
    "claude-code": (".claude.json", "mcpServers"),
    "cursor": (".cursor/mcp.json", "mcpServers"),
    "vscode": (".config/Code/User/mcp.json", "servers"),
    "codex": (".codex/config.toml", "mcp_servers"),
    "gemini": (".gemini/settings.json", "mcpServers"),
    "windsurf": (".codeium/windsurf/mcp_config.json", "mcpServers"),
    "zed": (".config/zed/settings.json", "context_servers"),
    "lm-studio": (".lmstudio/mcp.json", "mcpServers"),
    "cline": (".cline/data/settings/cline_mcp_settings.json", "mcpServers"),
    "goose": (".config/goose/config.yaml", "extensions"),
    "continue": (".continue/config.yaml", "mcpServers"),
}
UNLIMITED = ("claude-code", "vscode")

run = CliRunner()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without any configuration and with no setting of ours."""
    if sys.platform != "linux":
        pytest.skip("the places are those of Linux")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", *(field.upper() for field in Settings.model_fields)):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def config(*flags: str) -> Any:
    return run.invoke(app, ["mcp", "config", *flags])


def parsed(path: str, text: str) -> Any:
    """The text as the client reads it: by another library than ours where there is one."""
    match Path(path).suffix:
        case ".toml":
            return tomlkit.parse(text).unwrap()
        case ".yaml":
            return yaml.safe_load(text)
    return json.loads(text)


def entry_in(content: Any, key: str) -> dict[str, Any]:
    """Our entry, in the shape that most clients have."""
    servers = content[key]
    if isinstance(servers, list):
        (entry,) = [server for server in servers if server["name"] == "step1x-edit"]
    else:
        entry = servers["step1x-edit"]
    found = dict(entry)
    for theirs, ours in (("cmd", "command"), ("envs", "env")):
        if theirs in found:
            found[ours] = found.pop(theirs)
    return found


@pytest.mark.parametrize("client", FILES)
def test_each_client_gets_its_own_shape_and_place(home: Path, client: str) -> None:
    path, key = FILES[client]
    result = config("--client", client)

    content = parsed(path, result.stdout)
    entry = entry_in(content, key)
    assert list(content) == [key]
    assert (entry.get("type") == "stdio") == (client in (*UNLIMITED, "goose", "continue"))
    assert ("name" in entry) == (client in ("goose", "continue"))
    assert (entry.get("enabled"), entry.get("timeout")) == (
        (True, 300) if client == "goose" else (None, None)
    )
    assert entry["command"] == sys.executable
    assert entry["args"] == [str(ROOT / "mcp_server.py")]
    assert str(home / path) in result.stderr
    assert not (home / path).exists()


@pytest.mark.parametrize("client", FILES)
def test_a_client_that_ends_calls_is_answered_before(
    home: Path, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, key = FILES[client]
    waits = {"gemini": "590", "goose": "290"} | dict.fromkeys(UNLIMITED)

    usual = entry_in(parsed(path, config("--client", client).stdout), key)
    monkeypatch.setenv("MCP_MAX_WAIT", "20")
    chosen = entry_in(parsed(path, config("--client", client).stdout), key)

    assert usual.get("env", {}).get("MCP_MAX_WAIT") == waits.get(client, "50")
    assert chosen["env"]["MCP_MAX_WAIT"] == "20"


def test_every_setting_that_is_set_is_written_but_the_key(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("in", "out", "loras", "models/v1.1"):
        (home / folder).mkdir(parents=True)
    (home / "loras" / "snow.safetensors").touch()
    given = {
        "MODEL_PATH": "models/v1.1",
        "MODEL_VERSION": "v1.1",
        "ALLOWED_DIRS": f"in{os.pathsep}out",
        "LORA_PATH": f"loras{os.pathsep}look.safetensors@0.8",
        "PRECISION": "INT8",
        "ENABLE_UI": "no",
        "ALLOWED_HOSTS": "a.example, b.example",
        "DEFAULT_GUIDANCE_SCALE": "4.5",
        "LOG_LEVEL": "info",
        "API_KEY": "a-secret",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (home / ".env").write_text("DATA_DIR=data\nGPU_IDLE_TIMEOUT=77\n")

    result = config("--client", "vscode")

    variables = json.loads(result.stdout)["servers"]["step1x-edit"]["env"]
    assert variables == {
        "MODEL_PATH": str(home / "models" / "v1.1"),
        "MODEL_VERSION": "v1.1",
        "LORA_PATH": f"{home}/loras/snow.safetensors@0{os.pathsep}{home}/look.safetensors@0.8",
        "GPU_IDLE_TIMEOUT": "77",
        "PRECISION": "int8",
        "ALLOWED_DIRS": f"{home / 'in'}{os.pathsep}{home / 'out'}",
        "ENABLE_UI": "false",
        "ALLOWED_HOSTS": "a.example,b.example",
        "DATA_DIR": str(home / "data"),
        "DEFAULT_GUIDANCE_SCALE": "4.5",
        "LOG_LEVEL": "INFO",
    }
    assert "a-secret" not in result.output
    assert "API_KEY is left out" in result.stderr
    before = load_settings()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (home / ".env").unlink()
    monkeypatch.chdir(home / "out")
    after = load_settings()  # as a client does, from another folder
    assert after.model_fields_set == before.model_fields_set
    assert (after.model_path, after.data_dir) == (home / "models" / "v1.1", home / "data")
    for name in ("allowed_dirs", "allowed_hosts", "enable_ui", "precision", "gpu_idle_timeout"):
        assert getattr(after, name) == getattr(before, name)
    assert list(after.lora_path.values()) == list(before.lora_path.values())


def test_the_name_of_a_model_is_not_taken_for_a_path(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_PATH", "v1.1")
    monkeypatch.setenv("DATA_DIR", str(home / "data"))
    folder = home / "data" / "models" / find_model("v1.1").folder_name

    not_pulled = json.loads(config("--client", "zed").stdout)
    folder.mkdir(parents=True)
    pulled = json.loads(config("--client", "zed").stdout)

    paths = [
        entry_in(each, "context_servers")["env"]["MODEL_PATH"] for each in (not_pulled, pulled)
    ]
    assert paths == ["v1.1", str(folder)]


async def test_what_is_printed_starts_the_server(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_IDLE_TIMEOUT", "77")
    entry = json.loads(config("--client", "claude-code").stdout)["mcpServers"]["step1x-edit"]
    monkeypatch.delenv("GPU_IDLE_TIMEOUT")
    assert entry["env"] == {"GPU_IDLE_TIMEOUT": "77"}

    for name, value in entry["env"].items():
        monkeypatch.setenv(name, value)
    async with MCPClient(entry["args"][0]) as client:
        status = await client.call_tool("get_gpu_status")
    assert status["gpu_status"]["idle_timeout"] == 77


EXISTING = {
    ".json": '{"theme": "dark", "KEY": {"other": {"command": "x"}, "step1x-edit": {"old": 1}}}',
    ".toml": '# mine\nmodel = "m"  # the best\n\n[KEY.other]\ncommand = "x"\n\n'
    '[KEY.step1x-edit]\nold = 1\n\n[profiles.a]\nmodel = "n"\n',
    ".yaml": "# mine\nmodel: m  # the best\nKEY:\n  other:\n    command: x\n"
    "  step1x-edit:\n    old: 1\nslash: [a, b]\n",
    "list": "# mine\nname: me\nKEY:\n  - name: other\n    command: x  # the best\n"
    "  - name: step1x-edit\n    old: 1\nrules: []\n",
}


@pytest.mark.parametrize("client", FILES)
def test_writing_replaces_our_entry_and_keeps_the_rest(home: Path, client: str) -> None:
    path, key = FILES[client]
    file = home / path
    text = EXISTING["list" if client == "continue" else file.suffix].replace("KEY", key)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)

    first, second = (config("--client", client, "--write") for _ in range(2))

    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr
    written, before = file.read_text(), parsed(path, text)
    content = parsed(path, written)
    assert entry_in(content, key)["command"] == sys.executable
    assert "old" not in entry_in(content, key)
    for each in (content, before):
        servers = each[key]
        if isinstance(servers, list):
            each[key] = [server for server in servers if server["name"] != "step1x-edit"]
        else:
            del servers["step1x-edit"]
    assert content == before
    assert written.count("# mine") == text.count("# mine")
    assert written.count("# the best") == text.count("# the best")
    assert file.with_name(f"{file.name}.bak").read_text() == text


@pytest.mark.parametrize("client", FILES)
def test_a_new_file_has_what_its_client_needs(home: Path, client: str) -> None:
    path, key = FILES[client]

    assert config("--client", client, "--write").exit_code == 0

    content = parsed(path, (home / path).read_text())
    assert entry_in(content, key)["args"] == [str(ROOT / "mcp_server.py")]
    extra = {"name", "version", "schema"} if client == "continue" else set()
    assert content.keys() == {key, *extra}


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


@pytest.mark.parametrize(
    ("client", "content"),
    [
        ("vscode", '{"servers": {} // mine\n}'),
        ("vscode", "[]"),
        ("vscode", '{"servers": []}'),
        ("codex", "model = \n"),
        ("codex", 'mcp_servers = "none"\n'),
        ("goose", "extensions: [\n"),
        ("goose", "- a\n"),
        ("continue", "mcpServers:\n  a: {}\n"),
        ("codex", 'mcp_servers.a.command = "x"\nmcp_servers.a.args = []\nmodel = "m"\n'),
        ("cursor", '{"servers": 1, "servers": 2}'),
        ("cursor", '{"number": 1e400}'),
        ("cursor", '{"deep": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        ("goose", "deep: " + "[" * 3000 + "]" * 3000),
        ("goose", "base: &base {a: {cmd: x}}\nextensions: *base\n"),
    ],
)
def test_a_file_that_cannot_be_kept_as_it_is_is_left_alone(
    home: Path, client: str, content: str
) -> None:
    path = home / FILES[client][0]
    path.parent.mkdir(parents=True)
    path.write_text(content)

    result = config("--client", client, "--write")

    assert result.exit_code == 2
    assert f"cannot add to {path}" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert path.read_text() == content
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_text_that_was_cut_in_an_emoji_is_kept(home: Path) -> None:
    content = {"history": ["make it night \ud83c", "ü"]}
    (home / ".claude.json").write_text(json.dumps(content))

    assert config("--client", "claude-code", "--write").exit_code == 0
    written = json.loads((home / ".claude.json").read_text("utf-8"))
    assert entry_in(written, "mcpServers")["command"] == sys.executable
    assert written["history"] == content["history"]


def test_nothing_in_the_place_of_the_servers_is_no_server(home: Path) -> None:
    path = home / FILES["continue"][0]
    path.parent.mkdir()
    path.write_text("name: mine\nmcpServers:\n")

    assert config("--client", "continue", "--write").exit_code == 0
    assert entry_in(yaml.safe_load(path.read_text()), "mcpServers")["command"] == sys.executable


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
