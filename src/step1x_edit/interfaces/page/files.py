"""The files of the page's visitors: their folders, their owners, and their total size.

All are in one folder below DATA_DIR. It belongs to one server, and is emptied when a server starts
and when it ends. An event of the page may name a file that was made for its session, or an upload:
the address of an upload contains 128 random bits, so only its sender knows it, and the first
session that names it owns it. All other names are refused without opening a file. Visitors see the
folder under the name `/page`, so the server's paths are not disclosed. The module knows nothing
about HTTP and Gradio.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import secrets
import shutil
import stat
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote

from filelock import FileLock, Timeout

from step1x_edit.errors import NoSpaceError, PathNotAllowedError, SettingsError

FOLDER_NAME: Final = "page"
SHOWN_FOLDER: Final = "/page"
"""The path that visitors see instead of the folder's."""

_SERVERS: Final = 16  # servers that can share a data folder
_MADE: Final = "made"
_UPLOADS: Final = "uploads"
_LEAST_BYTES: Final = 16 * 1024  # minimum counted for a file, which also limits their number
_AWAY_S: Final = 600.0  # seconds to keep the files of a session without an open page
_UNUSED_S: Final = 3600.0  # seconds to keep an upload that no session has named
_ABSENT: Final = 1000  # sessions without an open page that are remembered


@contextlib.contextmanager
def own_folder(data_dir: Path) -> Iterator[Path]:
    """An empty folder for as long as the context lasts; also removes those of killed servers.

    Each server has a numbered folder and holds the lock beside it, which a kill releases. Raises
    SettingsError if no folder can be made.
    """
    home = data_dir / FOLDER_NAME
    own: tuple[Path, FileLock] | None = None
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in range(_SERVERS):
            folder, lock = home / str(number), FileLock(home / f"{number}.lock", mode=0o600)
            if own is not None and not folder.exists():
                continue
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                shutil.rmtree(folder, ignore_errors=True)
                if own is not None:
                    lock.release()
                    continue
                folder.mkdir(mode=0o700)
                own = folder, lock
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SettingsError(f"DATA_DIR: {home} cannot be written ({reason})") from None
    if own is None:
        raise SettingsError(f"DATA_DIR: {home} is in use by {_SERVERS} other servers")
    try:
        yield own[0].resolve()
    finally:
        shutil.rmtree(own[0], ignore_errors=True)
        own[1].release()


@dataclass
class Upload:
    """The files of one upload."""

    folder: Path
    sent_at: float
    size: int
    owner: str | None = None
    is_passing: bool = False
    """Whether later uploads replace it, so that it is removed first."""


@dataclass
class _Visits:
    """Which sessions have the page open, and when the others were last active."""

    now: Callable[[], float]
    open: Counter[str] = field(default_factory=Counter)
    absent: dict[str, float] = field(default_factory=dict)  # ordered by time

    def note(self, session: str) -> None:
        """Remember that a session was active."""
        self.absent.pop(session, None)
        if not self.open[session]:
            self.absent[session] = self.now()

    def forget(self, patience_s: float) -> list[str]:
        """Remove the sessions that have been inactive for longer; returns their names."""
        since = self.now() - patience_s
        enough = len(self.absent) - _ABSENT
        gone = [
            session
            for number, (session, at) in enumerate(self.absent.items())
            if number < enough or at <= since
        ]
        for session in gone:
            del self.absent[session]
        self.open = +self.open
        return gone


class PageFiles:
    """The files of all visitors, in one folder."""

    def __init__(
        self, folder: Path, max_bytes: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Uploads take at most `max_bytes` together."""
        self.folder = folder
        text = str(folder)
        self._spellings = {
            spelling.encode()
            for spelling in (
                json.dumps(text)[1:-1],
                json.dumps(text, ensure_ascii=False)[1:-1],
                quote(text, safe="/"),
            )
        }
        self._max_bytes = max_bytes
        self._now = now
        self._secret = secrets.token_bytes(32)
        self._uploads: dict[str, Upload] = {}
        self._visits = _Visits(now)
        self._arriving: dict[str, Upload] = {}
        self._one_at_a_time = asyncio.Lock()

    # --- files made for a session -----------------------------------------------------------------

    def folder_of(self, session: str) -> Path:
        """The folder for files made for a session; nobody can guess it, and it may not exist."""
        name = session.encode("utf-8", "surrogatepass")
        return self.folder / _MADE / hmac.new(self._secret, name, "sha256").hexdigest()

    @contextlib.asynccontextmanager
    async def open_page(self, session: str) -> AsyncIterator[None]:
        """Keep the files of a session for as long as its page is open, and some minutes longer."""
        self._visits.open[session] += 1
        self._visits.absent.pop(session, None)
        try:
            yield
        finally:
            self._visits.open[session] -= 1
            self._visits.note(session)

    # --- files named by an event ------------------------------------------------------------------

    async def take_event(self, session: str, event: object) -> None:
        """Replace the paths that visitors see in an event by the real ones.

        Raises PathNotAllowedError if the event names a file that is not the session's.
        """
        self._visits.note(session)
        await self._tidy(_AWAY_S, _UNUSED_S)
        for named in _with_paths(event):
            if named["path"] is not None:
                named["path"] = self._owned(session, named["path"])

    def real(self, path: object) -> str:
        """The real path of a plain file in the folder, by the path that visitors see.

        Raises PathNotAllowedError if no such file exists.
        """
        # Check the name first, so that no file outside of the folder is ever examined.
        below = (f"{SHOWN_FOLDER}/", f"{SHOWN_FOLDER}{os.sep}")
        if not isinstance(path, str) or "\0" in path or not path.startswith(below):
            raise PathNotAllowedError("the page serves only files that it has received or made")
        try:
            real = os.path.realpath(f"{self.folder}{path.removeprefix(SHOWN_FOLDER)}")
        except UnicodeEncodeError:  # half of a surrogate pair, which no file name can contain
            real = ""
        if not real.startswith(f"{self.folder}{os.sep}") or not _is_file(real):
            raise PathNotAllowedError("the file no longer exists; upload it again")
        return real

    def shown(self, text: bytes) -> bytes:
        """A text for visitors, with the folder's path replaced by the one that they see."""
        for spelling in self._spellings:
            text = text.replace(spelling, SHOWN_FOLDER.encode())
        return text

    def _owned(self, session: str, path: object) -> str:
        real = Path(self.real(path))
        kind, name, *_ = real.relative_to(self.folder).parts
        if kind == _MADE and real.is_relative_to(self.folder_of(session)):
            return str(real)
        upload = self._uploads.get(name) if kind == _UPLOADS else None
        if upload is None or upload.owner not in (None, session):
            raise PathNotAllowedError("the file belongs to another visitor; upload it again")
        upload.owner = session
        return str(real)

    # --- uploads ----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def upload(self, length: int) -> AsyncIterator[Upload]:
        """A new folder for an upload of this length in bytes; a failed upload is removed.

        Raises NoSpaceError if there is no room beside the other uploads.
        """
        async with self._one_at_a_time:
            await self._find_room(length)
            name = secrets.token_hex(16)
            upload = Upload(self.folder / _UPLOADS / name, self._now(), length)
            self._arriving[name] = upload
        try:
            upload.folder.mkdir(parents=True)
            yield upload
            upload.size = await asyncio.to_thread(_size_of, upload.folder)
            self._uploads[name] = upload
        except BaseException:
            shutil.rmtree(upload.folder, ignore_errors=True)
            raise
        finally:
            del self._arriving[name]

    async def _find_room(self, length: int) -> None:
        await self._tidy(_AWAY_S, _UNUSED_S)
        if self._has_room(length):
            return
        await self._tidy(0.0, _UNUSED_S)
        while not self._has_room(length):
            unnamed = [name for name, upload in self._uploads.items() if upload.owner is None]
            if not unnamed:
                raise NoSpaceError(
                    f"the pictures of all visitors take more than {self._max_bytes // 2**20} MB; "
                    "close pages that are not needed, or try again in some minutes"
                )
            passing = [name for name in unnamed if self._uploads[name].is_passing]
            await self._remove([(passing or unnamed)[0]])

    def _has_room(self, length: int) -> bool:
        held = [*self._uploads.values(), *self._arriving.values()]
        return sum(upload.size for upload in held) + length <= self._max_bytes

    async def _tidy(self, away_s: float, unused_s: float) -> None:
        """Remove the files of sessions that have left, and uploads that nobody has named."""
        left = set(self._visits.forget(away_s))
        since = self._now() - unused_s
        await self._remove(
            [
                name
                for name, upload in self._uploads.items()
                if upload.owner in left or (upload.owner is None and upload.sent_at < since)
            ],
            [self.folder_of(session) for session in left],
        )

    async def _remove(self, uploads: Sequence[str], folders: Sequence[Path] = ()) -> None:
        doomed = [*folders, *(self._uploads.pop(name).folder for name in uploads)]
        if doomed:
            await asyncio.to_thread(_remove, doomed)


def _with_paths(value: object) -> Iterator[dict[str, object]]:
    """The objects that have a member `path`, at any depth."""
    pending = [value]
    while pending:
        match pending.pop():
            case dict() as members:
                if "path" in members:
                    yield members
                pending.extend(members.values())
            case list() as items:
                pending.extend(items)


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(Path(path).lstat().st_mode)
    except OSError:
        return False


def _size_of(folder: Path) -> int:
    """Bytes of all files below; a file that is removed during the count is skipped."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += max(_LEAST_BYTES, Path(parent, name).lstat().st_size)
    return total


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
