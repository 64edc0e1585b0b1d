"""The configuration by which an MCP client starts our server: its shape, its place, its change.

Each client has a JSON file of its own with the servers it knows. We add or replace one entry and
keep everything else; the file as it was stays beside it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any, Final

import platformdirs

from step1x_edit.errors import InvalidParameterError, OutputNotWritableError, SettingsError
from step1x_edit.interfaces.discovery import SERVER_NAME
from step1x_edit.settings import Settings

_SCRIPT: Final = Path(__file__).resolve().parents[3] / "mcp_server.py"  # in a checkout
_HANDED_ON: Final = ("model_path", "gpu_idle_timeout")


class ClientName(str, Enum):
    """The MCP clients that we know the configuration of."""

    CLAUDE_DESKTOP = "claude-desktop"
    CLAUDE_CODE = "claude-code"
    CURSOR = "cursor"
    VSCODE = "vscode"


@dataclass(frozen=True)
class ConfigFile:
    """Where a client keeps its servers, and under which key."""

    path: Path
    key: str = "mcpServers"
    says_type: bool = False
    """Whether the client wants to be told that an entry is a server to start."""


def config_file(client: ClientName) -> ConfigFile:
    """The file of a client that holds for all of this user's projects.

    Raises SettingsError if nobody knows where this user's files are.
    """
    try:
        return _config_file(client)
    except RuntimeError:
        raise SettingsError("there is no home folder for the client's file; set HOME") from None


def _config_file(client: ClientName) -> ConfigFile:
    programs = Path(platformdirs.user_config_dir(roaming=True))
    match client:
        case ClientName.CLAUDE_DESKTOP:
            return ConfigFile(programs / "Claude" / "claude_desktop_config.json")
        case ClientName.CLAUDE_CODE:
            return ConfigFile(Path.home() / ".claude.json", says_type=True)
        case ClientName.CURSOR:
            return ConfigFile(Path.home() / ".cursor" / "mcp.json")
        case ClientName.VSCODE:
            return ConfigFile(programs / "Code" / "User" / "mcp.json", "servers", says_type=True)


def server_entry(settings: Settings, file: ConfigFile) -> dict[str, Any]:
    """How the client starts our server: absolute paths, because it may start it anywhere."""
    entry: dict[str, Any] = {"type": "stdio"} if file.says_type else {}
    arguments = [str(_SCRIPT)] if _SCRIPT.is_file() else ["-m", "step1x_edit.interfaces.cli", "mcp"]
    entry |= {"command": str(Path(sys.executable).absolute()), "args": arguments}
    if variables := _variables(settings):
        entry["env"] = variables
    return entry


def _variables(settings: Settings) -> dict[str, str]:
    """The settings that make a difference to an assistant, as far as they are set."""
    chosen = {name: getattr(settings, name) for name in _HANDED_ON}
    return {
        name.upper(): str(value.absolute() if isinstance(value, Path) else value)
        for name, value in chosen.items()
        if name in settings.model_fields_set and value is not None
    }


def write_entry(file: ConfigFile, entry: Mapping[str, Any]) -> Path | None:
    """Add our entry to the file, or replace it; returns where the file as it was lies now."""
    path = Path(os.path.realpath(file.path))  # a link to where someone keeps all such files
    try:
        content = _read(path)
        servers = content.setdefault(file.key, {})
        if not isinstance(servers, dict):
            raise _unusable(path, f"its {file.key} is not an object")
        servers[SERVER_NAME] = dict(entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        backup = _backed_up(path)
        _replace(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise OutputNotWritableError(f"{path} ({os.strerror(error.errno or 0).lower()})") from None
    return backup


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
        content = json.loads(text) if text.strip() else {}
    except FileNotFoundError:
        return {}
    except ValueError:
        raise _unusable(path, "it is not plain JSON (comments?)") from None
    if not isinstance(content, dict):
        raise _unusable(path, "it is not an object")
    return content


def _unusable(path: Path, reason: str) -> InvalidParameterError:
    return InvalidParameterError(
        f"{path} cannot be added to: {reason}; leave out --write and add what is printed by hand"
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
        temporary.touch(mode=0o600, exist_ok=False)  # there may be other programs' keys in it
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
