"""The host's memory: how much is free for this process, and how much may be page-locked.

Linux reports it in /proc, and in the control groups of a container or service, whose limits are
often far below the memory of the machine. Sizes are bytes. If a system does not report it, the
answer is None. Nothing here needs torch.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path("/")

UNLIMITED: Final = 2**60
"""A number in a group's file from here on means that there is no limit."""

LOCKABLE_SHARE: Final = 0.6
"""The share of free memory that may be page-locked; the rest is left to other programs."""
LOCKABLE_SHARE_WINDOWS: Final = 0.4
"""The same on Windows and in WSL, where page-locked memory counts as the GPU's."""


@dataclass(frozen=True)
class HostMemory:
    """The memory for this process and how much of it is free, in bytes."""

    available: int
    total: int


@dataclass(frozen=True)
class _Names:
    """The file names of a version of the control groups."""

    limits: tuple[str, ...]
    usage: str
    cached: tuple[str, ...]  # lines of memory.stat: memory that the system can reclaim


_FIRST: Final = _Names(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_SECOND: Final = _Names(
    ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")
)


def measure(root: Path = ROOT) -> HostMemory | None:
    """The memory for this process; `root` is the folder of proc and sys."""
    if sys.platform == "win32":
        return _measure_windows()
    found = _numbers(root / "proc/meminfo")
    try:
        available, total = 1024 * found["MemAvailable:"], 1024 * found["MemTotal:"]
    except KeyError:
        return None
    for limit, room in _group_limits(root):
        available, total = min(available, room), min(total, limit)
    return HostMemory(available, total)


def lockable_share(root: Path = ROOT) -> float:
    """The share of the free memory that may be page-locked."""
    if sys.platform == "win32" or "microsoft" in _text(root / "proc/sys/kernel/osrelease").lower():
        return LOCKABLE_SHARE_WINDOWS
    return LOCKABLE_SHARE


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """The limit of each group of this process, and how much of it is left."""
    for names, folder in _groups(root):
        limits = [_number(folder / name) for name in names.limits]
        limit = min((each for each in limits if each is not None), default=UNLIMITED)
        usage = _number(folder / names.usage)
        if limit >= UNLIMITED or usage is None:
            continue
        counts = _numbers(folder / "memory.stat")
        cached = sum(counts.get(name, 0) for name in names.cached)
        yield limit, max(0, limit - usage + cached)


def _groups(root: Path) -> Iterator[tuple[_Names, Path]]:
    """The folders of the groups that limit this process: its own and those around it."""
    mounts = dict(_mounts(root))
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            names = _SECOND
        elif "memory" in controllers.split(","):
            names = _FIRST
        else:
            continue
        if names not in mounts:
            continue
        inside, top = mounts[names]
        # In a container the path may be of the host, whose groups are not visible here.
        below = path.removeprefix(inside).strip("/")
        folder = top / below
        if ".." in Path(below).parts or not folder.is_dir():
            folder = top
        yield names, folder
        while folder != top:
            folder = folder.parent
            yield names, folder


def _mounts(root: Path) -> Iterator[tuple[_Names, tuple[str, Path]]]:
    """Where the groups are mounted, and which group is at the top there."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        mount, kind = left.split(), right.split()
        if len(mount) < 5 or len(kind) < 3:
            continue
        place = mount[3].rstrip("/"), root / mount[4].lstrip("/")
        if kind[0] == "cgroup2":
            yield _SECOND, place
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            yield _FIRST, place


def _numbers(file: Path) -> dict[str, int]:
    """The numbers by name of a file whose lines begin with a name and a number."""
    found = {}
    for line in _text(file).splitlines():
        name, *rest = line.split() or [""]
        if rest and rest[0].isdecimal():
            found[name] = int(rest[0])
    return found


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


if sys.platform == "win32":

    class _MemoryStatus(ctypes.Structure):
        """MEMORYSTATUSEX of the Windows API."""

        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            ("total", ctypes.c_ulonglong),
            ("available", ctypes.c_ulonglong),
            ("others", ctypes.c_ulonglong * 5),
        )

    def _measure_windows() -> HostMemory | None:
        status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
        if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            return None
        return HostMemory(status.available, status.total)
