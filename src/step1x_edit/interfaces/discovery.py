"""Finds the server on this machine, so that all clients share its one model.

A listening server announces itself by a note in the data folder: its URL, its process, the token
that it requires and a secret. A client that wants to join reads the note. It trusts the note only
if no other user can read or write it, the process that wrote it still runs, the listener proves
that it knows the secret, and the answer is that of a step1x-edit server. The token is sent after
the proof, so a program that listens at the port of a dead server learns nothing. In all other cases
there is no server to join. Discovery knows nothing about tools.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import secrets
import stat
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from step1x_edit import foreign_json
from step1x_edit.interfaces import hosts
from step1x_edit.settings import inherited_environment

if TYPE_CHECKING:
    from fastmcp.client.transports import StreamableHttpTransport

log = logging.getLogger(__name__)

SERVER_NAME: Final = "step1x-edit"
NOTE_NAME: Final = "server.json"
PROOF_PATH: Final = "/livez"
PROOF_HEADER: Final = "X-Proof"
"""The path at which a listener answers a `nonce` with the proof that it knows the note's secret."""

_ANSWER_TIMEOUT_S: Final = 1.0  # a slower server is not useful to join
_PS_S: Final = 5.0
_MAX_NOTE_BYTES: Final = 64 * 1024

# Zero on Windows, which has no owners and modes of this kind.
_O_NOFOLLOW: Final[int] = getattr(os, "O_NOFOLLOW", 0)
_O_NONBLOCK: Final[int] = getattr(os, "O_NONBLOCK", 0)
_HAS_OWNERS: Final = hasattr(os, "getuid")


@dataclass(frozen=True)
class RunningServer:
    """A server's URL and process, and the token that it requires."""

    url: str
    pid: int
    secret: str
    started: str | None = None
    """Distinguishes its process from a later one with the same id; None if the system cannot."""
    token: str | None = None


def new_secret() -> str:
    """A secret shared by a starting server and the programs that can read its note."""
    return secrets.token_hex(32)


def proof(secret: str, nonce: str, port: int) -> str:
    """The answer to a nonce; it covers the port, so that no listener can relay another's."""
    return hmac.digest(secret.encode(), f"{port} {nonce}".encode(), "sha256").hex()


# --- for the server -------------------------------------------------------------------------------


@contextlib.contextmanager
def announced(data_dir: Path, url: str, secret: str, token: str | None = None) -> Iterator[None]:
    """Announce this process as the running server for as long as the context lasts.

    Only logs if another server has announced itself and still runs, or if the note cannot be
    written. If the system does not report when a process started, the note is replaced: a killed
    server leaves a note that looks the same.
    """
    first = _read_note(data_dir)
    if first is not None and first.started is not None and _runs(first):
        log.warning("other programs join the server at %s, which started first", first.url)
        yield
        return
    server = RunningServer(url, os.getpid(), secret, start_of_process(os.getpid()), token)
    try:
        _publish(data_dir, server)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        log.warning("other programs cannot find this server: DATA_DIR %s (%s)", data_dir, reason)
    try:
        yield
    finally:
        if _read_note(data_dir) == server:
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


# --- for clients that join a server ---------------------------------------------------------------


async def find_server(data_dir: Path, timeout_s: float = _ANSWER_TIMEOUT_S) -> RunningServer | None:
    """The server that runs on this machine, if one answers."""
    server = _read_note(data_dir)
    if server is None or server.pid == os.getpid() or not _runs(server):
        return None
    if not await _answers(server, timeout_s):
        log.info("the server announced at %s does not answer as a step1x-edit server", server.url)
        return None
    return server


def _read_note(data_dir: Path) -> RunningServer | None:
    """The note, if it exists, is complete and for this machine, and only this user can write it."""
    try:
        descriptor = os.open(data_dir / NOTE_NAME, os.O_RDONLY | _O_NOFOLLOW | _O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as note:
        if not _is_ours_alone(os.fstat(descriptor)):
            log.warning("%s is ignored: other users can write or read it", data_dir / NOTE_NAME)
            return None
        try:
            content = foreign_json.parse(note.read(_MAX_NOTE_BYTES))
        except ValueError:
            return None
    match content:
        case {
            "url": str(url),
            "pid": int(pid),
            "secret": str(secret),
            "started": (str() | None) as started,
            "token": (str() | None) as token,
        } if _is_on_this_machine(url):
            return RunningServer(url, pid, secret, started, token)
    return None


def _is_ours_alone(found: os.stat_result) -> bool:
    if not stat.S_ISREG(found.st_mode):
        return False
    return not _HAS_OWNERS or (found.st_uid == os.getuid() and not found.st_mode & 0o077)


def _is_on_this_machine(url: str) -> bool:
    """The token is sent only to this machine, whatever the note says."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.hostname in hosts.LOOPBACK


def _runs(server: RunningServer) -> bool:
    """Whether the process that wrote the note still runs."""
    return _lives(server.pid) and server.started == start_of_process(server.pid)


def start_of_process(pid: int) -> str | None:
    """The start time of a process, as a text to compare; None if the system does not report it."""
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return _started_by_ps(pid)
    # The second field is the program's name in parentheses, which may contain any characters.
    ticks = stat_line.rpartition(b")")[2].split()[19]
    return f"{ticks.decode()} {boot}"


def _started_by_ps(pid: int) -> str | None:
    """The same without /proc, such as on macOS; not available on Windows."""
    try:
        listed = subprocess.run(  # noqa: S603 - only a number varies
            ["ps", "-o", "lstart=", "-p", str(pid)],  # noqa: S607 - found on the PATH
            capture_output=True,
            env=inherited_environment(LC_ALL="C", TZ="UTC"),
            timeout=_PS_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return listed.stdout.decode("ascii", "replace").strip() or None


def _lives(pid: int) -> bool:
    if not _HAS_OWNERS:
        return True  # on Windows signal 0 would end the process; the server's answer decides
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError):  # ended, or another user's
        return False
    return pid > 0


def transport_to(
    server: RunningServer, extra_headers: Mapping[str, str] | None = None
) -> StreamableHttpTransport:
    """The transport to a server on this machine, which bypasses any configured proxy."""
    # Imported only if there is a server to ask, so that a start without one is fast.
    import httpx2
    from fastmcp.client.transports import StreamableHttpTransport

    def client(
        headers: dict[str, str] | None = None,
        timeout: httpx2.Timeout | None = None,
        auth: httpx2.Auth | None = None,
        **_: object,
    ) -> httpx2.AsyncClient:
        # A silent server sends a heartbeat every 15 s.
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
        if not await _proves_itself(server):
            return None
        async with Client(transport_to(server)) as client:
            return None if client.server_info is None else client.server_info.name

    try:
        return await asyncio.wait_for(name(), timeout_s) == SERVER_NAME
    except Exception as error:  # noqa: BLE001 - after any error it cannot be joined
        log.debug("%s: %r", server.url, error)
        return False


async def _proves_itself(server: RunningServer) -> bool:
    """Whether the listener knows the secret of the note; only a random text is sent."""
    import httpx2

    parts, nonce = urlsplit(server.url), secrets.token_hex(16)
    asked = f"{parts.scheme}://{parts.netloc}{PROOF_PATH}"
    async with (
        httpx2.AsyncClient(trust_env=False) as client,
        client.stream("GET", asked, params={"nonce": nonce}) as answer,  # the body is not read
    ):
        shown = answer.headers.get(PROOF_HEADER, "")
    expected = proof(server.secret, nonce, parts.port or 0)
    return hmac.compare_digest(shown.encode(), expected.encode())
