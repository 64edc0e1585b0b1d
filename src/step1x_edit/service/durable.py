"""Files below DATA_DIR that only their user can read, and that survive a power cut once written."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

# Absent on Windows, which syncs folder entries by itself.
_O_DIRECTORY: Final[int] = getattr(os, "O_DIRECTORY", 0)
_O_BINARY: Final[int] = getattr(os, "O_BINARY", 0)
O_CLOEXEC: Final[int] = getattr(os, "O_CLOEXEC", 0)


def write(path: Path, data: bytes) -> None:
    """Write a file and sync it; the entry in its folder is not synced."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _O_BINARY | O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file.fileno(), rest) :]
        os.fsync(file.fileno())


def publish(path: Path, data: bytes) -> None:
    """Write a file that appears under its name only when it is complete, and sync its folder.

    A kill can leave a file whose name begins with a dot.
    """
    unfinished = path.with_name(f".{secrets.token_hex(8)}")
    try:
        write(unfinished, data)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    if _O_DIRECTORY:
        descriptor = os.open(folder, os.O_RDONLY | _O_DIRECTORY | O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
