"""How a server on this machine is found, so that all clients share its one model.

A server that listens announces itself by a note in the data folder: its URL, its process and the
token that it asks for. Whoever wants to join reads the note and trusts it only if it is ours alone,
the process lives, and a server of ours answers. Everything else counts as "there is none".
Discovery knows nothing about tools.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from fastmcp.client.transports import StreamableHttpTransport

log = logging.getLogger(__name__)

SERVER_NAME: Final = "step1x-edit"
NOTE_NAME: Final = "server.json"

_ANSWER_TIMEOUT_S: Final = 1.0  # a server that is slower than this is no help to anybody
_MAX_NOTE_BYTES: Final = 64 * 1024
_LOOPBACK: Final = {"127.0.0.1", "::1", "localhost"}

# Absent on Windows, which has neither owners nor modes in this sense.
_O_NOFOLLOW: Final[int] = getattr(os, "O_NOFOLLOW", 0)
_O_NONBLOCK: Final[int] = getattr(os, "O_NONBLOCK", 0)
_HAS_OWNERS: Final = hasattr(os, "getuid")


@dataclass(frozen=True)
class RunningServer:
    """Where a server listens, and what it wants to see from its callers."""

    url: str
    pid: int
    token: str | None = None


# --- for the server -------------------------------------------------------------------------------


@contextlib.contextmanager
def announced(data_dir: Path, url: str, token: str | None = None) -> Iterator[None]:
    """Announce this process as the running server for as long as the context lasts."""
    server = RunningServer(url, os.getpid(), token)
    _publish(data_dir, server)
    try:
        yield
    finally:
        if _read_note(data_dir) == server:  # or another one has taken our place
            with contextlib.suppress(OSError):
                (data_dir / NOTE_NAME).unlink()


def _publish(data_dir: Path, server: RunningServer) -> None:
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = data_dir / f".{NOTE_NAME}.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _O_NOFOLLOW
    try:
        with os.fdopen(os.open(temporary, flags, 0o600), "w", encoding="utf-8") as note:
            json.dump(asdict(server), note)
        temporary.replace(data_dir / NOTE_NAME)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# --- for whoever wants to join --------------------------------------------------------------------


async def find_server(data_dir: Path, timeout_s: float = _ANSWER_TIMEOUT_S) -> RunningServer | None:
    """The server that runs on this machine, if there is one that answers."""
    server = _read_note(data_dir)
    if server is None or server.pid == os.getpid() or not _lives(server.pid):
        return None
    if not await _answers(server, timeout_s):
        log.info("the server announced at %s does not answer as one of ours", server.url)
        return None
    return server


def _read_note(data_dir: Path) -> RunningServer | None:
    """The note, if it is there, whole, for this machine, and nobody else could have written it."""
    try:
        descriptor = os.open(data_dir / NOTE_NAME, os.O_RDONLY | _O_NOFOLLOW | _O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as note:
        if not _is_ours_alone(os.fstat(descriptor)):
            log.warning("%s is ignored: others may write or read it", data_dir / NOTE_NAME)
            return None
        try:
            content = json.loads(note.read(_MAX_NOTE_BYTES))
        except ValueError:
            return None
    match content:
        case {"url": str(url), "pid": int(pid), "token": (str() | None) as token}:
            return RunningServer(url, pid, token) if _is_on_this_machine(url) else None
    return None


def _is_ours_alone(found: os.stat_result) -> bool:
    if not stat.S_ISREG(found.st_mode):
        return False
    return not _HAS_OWNERS or (found.st_uid == os.getuid() and not found.st_mode & 0o077)


def _is_on_this_machine(url: str) -> bool:
    """The token goes to nobody else, whatever the note says."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.hostname in _LOOPBACK


def _lives(pid: int) -> bool:
    if not _HAS_OWNERS:
        return True  # on Windows signal 0 would end the process; the answer has to tell
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError):  # gone, or not ours
        return False
    return pid > 0


def transport_to(
    server: RunningServer, extra_headers: Mapping[str, str] | None = None
) -> StreamableHttpTransport:
    """The way to a server on this machine, past any proxy that is set for the world outside."""
    # Imported when there is somebody to ask, so that a start without one stays quick.
    import httpx2
    from fastmcp.client.transports import StreamableHttpTransport

    def client(
        headers: dict[str, str] | None = None,
        timeout: httpx2.Timeout | None = None,
        auth: httpx2.Auth | None = None,
        **_: object,
    ) -> httpx2.AsyncClient:
        # A silent server says that it lives every 15 s.
        patience = timeout or httpx2.Timeout(30.0, read=300.0)
        return httpx2.AsyncClient(headers=headers, timeout=patience, auth=auth, trust_env=False)

    return StreamableHttpTransport(
        server.url,
        headers=dict(extra_headers or {}),
        auth=server.token,
        httpx_client_factory=client,
    )


async def _answers(server: RunningServer, timeout_s: float) -> bool:
    from fastmcp import Client

    async def name() -> str | None:
        async with Client(transport_to(server)) as client:
            return None if client.server_info is None else client.server_info.name

    try:
        return await asyncio.wait_for(name(), timeout_s) == SERVER_NAME
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, it cannot be joined
        log.debug("%s: %r", server.url, error)
        return False
