"""The configuration with which an MCP client starts our server: its format, path and update.

Each client has a file with the servers it knows, in JSON, TOML or YAML. We add or replace one entry
and keep everything else; a backup of the old file is kept beside it. The formats follow the
clients' documentation, which docs/mcp.md names.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any, Final, TypeAlias

import platformdirs

from step1x_edit.errors import (
    CheckpointError,
    InvalidParameterError,
    OutputNotWritableError,
    SettingsError,
)
from step1x_edit.hub.pulled import resolve_model_path
from step1x_edit.interfaces.discovery import SERVER_NAME
from step1x_edit.settings import Settings

_SCRIPT: Final = Path(__file__).resolve().parents[4] / "mcp_server.py"  # in a checkout
_NEEDED_TO_LISTEN: Final = "api_key"  # a secret, which a server that a client starts does not need
_SPARE_S: Final = 10  # seconds between our answer and the client's timeout
_GOOSE_LIMIT_S: Final = 300


class ClientName(str, Enum):
    """The MCP clients whose configuration we know."""

    CLAUDE_DESKTOP = "claude-desktop"
    CLAUDE_CODE = "claude-code"
    CURSOR = "cursor"
    VSCODE = "vscode"
    CODEX = "codex"
    GEMINI = "gemini"
    WINDSURF = "windsurf"
    ZED = "zed"
    LM_STUDIO = "lm-studio"
    CLINE = "cline"
    GOOSE = "goose"
    CONTINUE = "continue"


Shape: TypeAlias = Callable[[str, list[str], dict[str, str]], dict[str, Any]]
"""Makes an entry from a command, its arguments and its environment."""


def _plain(command: str, arguments: list[str], variables: dict[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"command": command, "args": arguments}
    return entry | ({"env": variables} if variables else {})


def _with_type(command: str, arguments: list[str], variables: dict[str, str]) -> dict[str, Any]:
    return {"type": "stdio", **_plain(command, arguments, variables)}


def _with_name(command: str, arguments: list[str], variables: dict[str, str]) -> dict[str, Any]:
    return {"name": SERVER_NAME, **_with_type(command, arguments, variables)}


def _of_goose(command: str, arguments: list[str], variables: dict[str, str]) -> dict[str, Any]:
    return {
        "name": SERVER_NAME,
        "type": "stdio",
        "enabled": True,
        "cmd": command,
        "args": arguments,
        "envs": variables,
        "timeout": _GOOSE_LIMIT_S,
    }


@dataclass(frozen=True)
class ConfigFile:
    """The file and key under which a client keeps its servers, and how it treats them."""

    path: Path
    key: str = "mcpServers"
    shape: Shape = _plain
    limit_s: int | None = 60
    """Seconds until it ends a call, as far as is known; None: no limit."""
    is_list: bool = False
    """Whether the servers are a list of items with names, and not values by name."""
    preamble: Mapping[str, str] | None = None
    """The content of a new file besides the servers."""


def config_file(client: ClientName) -> ConfigFile:
    """The client's file for all projects of this user.

    Raises SettingsError if the user's home folder is unknown.
    """
    try:
        return _config_file(client)
    except RuntimeError:
        raise SettingsError("there is no home folder for the client's file; set HOME") from None


def _config_file(client: ClientName) -> ConfigFile:
    home, programs = Path.home(), Path(platformdirs.user_config_dir(roaming=True))
    unixlike = home / ".config" if sys.platform == "darwin" else programs
    match client:
        case ClientName.CLAUDE_DESKTOP:
            return ConfigFile(programs / "Claude" / "claude_desktop_config.json")
        case ClientName.CLAUDE_CODE:
            return ConfigFile(home / ".claude.json", shape=_with_type, limit_s=None)
        case ClientName.CURSOR:
            return ConfigFile(home / ".cursor" / "mcp.json")
        case ClientName.VSCODE:
            path = programs / "Code" / "User" / "mcp.json"
            return ConfigFile(path, "servers", _with_type, limit_s=None)
        case ClientName.CODEX:
            return ConfigFile(home / ".codex" / "config.toml", "mcp_servers")
        case ClientName.GEMINI:
            return ConfigFile(home / ".gemini" / "settings.json", limit_s=600)
        case ClientName.WINDSURF:
            return ConfigFile(home / ".codeium" / "windsurf" / "mcp_config.json")
        case ClientName.ZED:
            folder = programs / "Zed" if os.name == "nt" else unixlike / "zed"
            return ConfigFile(folder / "settings.json", "context_servers")
        case ClientName.LM_STUDIO:
            return ConfigFile(home / ".lmstudio" / "mcp.json")
        case ClientName.CLINE:
            settings = home / ".cline" / "data" / "settings"
            return ConfigFile(settings / "cline_mcp_settings.json")
        case ClientName.GOOSE:
            windows = programs / "Block" / "goose" / "config"
            folder = windows if os.name == "nt" else unixlike / "goose"
            return ConfigFile(folder / "config.yaml", "extensions", _of_goose, _GOOSE_LIMIT_S)
        case ClientName.CONTINUE:
            return ConfigFile(
                home / ".continue" / "config.yaml",
                shape=_with_name,
                is_list=True,
                preamble={"name": "Local config", "version": "1.0.0", "schema": "v1"},
            )


def server_entry(settings: Settings, file: ConfigFile) -> dict[str, Any]:
    """How the client starts our server: absolute paths, because it may start it anywhere."""
    arguments = [str(_SCRIPT)] if _SCRIPT.is_file() else ["-m", "step1x_edit.interfaces.cli", "mcp"]
    return file.shape(
        str(Path(sys.executable).absolute()), arguments, _variables(settings, file.limit_s)
    )


def snippet(file: ConfigFile, entry: Mapping[str, Any]) -> str:
    """The entry in the format of the file, with the keys around it."""
    content: dict[str, Any] = {}
    _place(file, content, entry)
    return _written(file.path, content)


def _variables(settings: Settings, limit_s: int | None) -> dict[str, str]:
    """The settings that are set, and the longest duration of a call if the client ends calls."""
    names = settings.model_fields_set - {_NEEDED_TO_LISTEN}
    chosen = {name: getattr(settings, name) for name in Settings.model_fields if name in names}
    if settings.model_path is not None:
        chosen["model_path"] = _model_path(settings.model_path, settings.data_dir)
    if limit_s is not None:
        chosen.setdefault("mcp_max_wait", limit_s - _SPARE_S)
    return {
        name.upper(): _as_text(value)
        for name, value in chosen.items()
        if value not in (None, (), {})
    }


def _model_path(path: Path, data_dir: Path) -> Path | str | None:
    """The checkpoint, or the name of a model that has not been pulled yet, which is not a path."""
    try:
        return resolve_model_path(path, data_dir)
    except CheckpointError:
        return str(path)


def _as_text(value: object) -> str:
    """A value as text for the environment."""
    match value:
        case bool():
            return str(value).lower()
        case Path():
            return str(value.absolute())
        case dict():  # files with a strength
            return os.pathsep.join(f"{_as_text(path)}@{part:g}" for path, part in value.items())
        case tuple():
            separator = os.pathsep if isinstance(value[0], Path) else ","
            return separator.join(map(_as_text, value))
    return str(value)


def write_entry(file: ConfigFile, entry: Mapping[str, Any]) -> Path | None:
    """Add our entry to the file, or replace it; returns the path of the backup."""
    path = Path(os.path.realpath(file.path))  # follow a link, such as into a folder of dotfiles
    try:
        content = _read(path, file.preamble or {})
        wanted = _plain_data(content)
        _place(file, wanted, entry)
        _place(file, content, entry)
        text = _checked(path, _written(path, content), wanted)
        path.parent.mkdir(parents=True, exist_ok=True)
        backup = _backed_up(path)
        _replace(path, text)
    except OSError as error:
        raise OutputNotWritableError(f"{path} ({os.strerror(error.errno or 0).lower()})") from None
    return backup


def _place(file: ConfigFile, content: MutableMapping[str, Any], entry: Mapping[str, Any]) -> None:
    """Put the entry where the client looks for it, replacing an older one."""
    if content.get(file.key) is None:  # an empty value in YAML, as in `extensions:`
        content[file.key] = [] if file.is_list else {}
    servers = content[file.key]  # what the content has made of it
    if not file.is_list:
        if not isinstance(servers, MutableMapping):
            raise _unusable(file.path, f"its {file.key} is not an object")
        servers[SERVER_NAME] = dict(entry)
        return
    if not isinstance(servers, MutableSequence):
        raise _unusable(file.path, f"its {file.key} is not a list")
    for index, server in enumerate(servers):
        if isinstance(server, Mapping) and server.get("name") == SERVER_NAME:
            servers[index] = dict(entry)
            return
    servers.append(dict(entry))


def _read(path: Path, preamble: Mapping[str, str]) -> MutableMapping[str, Any]:
    """The content of a file, in a form that keeps comments if the format has them."""
    try:
        text = path.read_text("utf-8")
        content = _parsed(path, text) if text.strip() else dict(preamble)
    except FileNotFoundError:
        return dict(preamble)
    except RecursionError:
        raise _unusable(path, "it is nested too deeply") from None
    except ValueError:
        reason = {".json": "plain JSON (comments?)", ".toml": "TOML"}.get(path.suffix, "YAML")
        raise _unusable(path, f"it is not {reason}") from None
    if not isinstance(content, MutableMapping):
        raise _unusable(path, "it is not an object")
    return content


def _checked(path: Path, text: str, wanted: object) -> str:
    """The new text, if it parses to the old content and our entry.

    tomlkit puts a table between keys with dots (`mcp_servers.a.command = …`), which would then
    belong to that table.
    """
    try:
        is_right = _plain_data(_parsed(path, text)) == wanted
    except ValueError:
        is_right = False
    if not is_right:
        raise _unusable(path, "its other content would change")
    return text


def _plain_data(value: Any) -> Any:
    """The same as plain values, without the library's formatting data."""
    match value:
        case Mapping():
            return {key: _plain_data(member) for key, member in value.items()}
        case MutableSequence():
            return [_plain_data(item) for item in value]
    return value


# The libraries are imported here: the server that a client starts shares this module's commands.


def _parsed(path: Path, text: str) -> Any:
    """Raises ValueError if the text is not in the format of the file."""
    match path.suffix:
        case ".toml":
            import tomlkit

            return tomlkit.parse(text)  # its errors are ValueErrors
        case ".yaml":
            from ruamel.yaml import YAML
            from ruamel.yaml.error import YAMLError

            try:
                return YAML().load(text)
            except YAMLError as error:
                raise ValueError from error
    return json.loads(text, object_pairs_hook=_members, parse_constant=_no_number)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a repeated name would lose its first value, so it is an error."""
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError
    return members


def _no_number(name: str) -> float:
    raise ValueError(name)


def _written(path: Path, content: Mapping[str, Any]) -> str:
    match path.suffix:
        case ".toml":
            import tomlkit

            return tomlkit.dumps(content)
        case ".yaml":
            from ruamel.yaml import YAML

            yaml, text = YAML(), io.StringIO()
            yaml.default_flow_style = False
            yaml.allow_unicode = True
            yaml.width = 4096  # keep long paths on one line
            yaml.dump(content, text)
            return text.getvalue()
    plain = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    # Half of a surrogate pair, as in a text cut within an emoji, cannot be encoded as UTF-8.
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", plain)


def _unusable(path: Path, reason: str) -> InvalidParameterError:
    return InvalidParameterError(
        f"cannot add to {path}: {reason}; run without --write and add the printed entry by hand"
    )


def _backed_up(path: Path) -> Path | None:
    if not path.exists():
        return None
    names = (path.with_name(f"{path.name}.bak{number or ''}") for number in count())
    backup = next(name for name in names if not os.path.lexists(name))
    shutil.copy2(path, backup)
    return backup


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.touch(mode=0o600, exist_ok=False)  # it may contain keys of other programs
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
