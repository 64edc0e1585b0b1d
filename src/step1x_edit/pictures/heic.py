"""HEIC as pillow-heif reads it: only the main picture of a file, whose parts do not overlap.

pillow-heif copies the metadata and the profile of each picture when it opens a file, and libheif
the metadata of each item. In a file whose items share their bytes that is many times its size.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from typing import Any, Final

from step1x_edit.errors import CorruptImageError
from step1x_edit.pictures.formats import box

_SHARED: Final = 2  # times its bytes: what the items of a file may hold together
_FREE: Final = 4 * 1024 * 1024  # and this much more
_MAX_ITEMS: Final = 65_536


def check(data: bytes) -> None:
    """Raise CorruptImageError if the items of a HEIC hold much more than its bytes."""
    if sum(_sizes(data)) > _SHARED * len(data) + _FREE:
        raise CorruptImageError("the parts of the HEIC overlap")


@functools.cache
def register() -> None:
    """Let Pillow open HEIC."""
    import _pillow_heif
    import pillow_heif

    load = _pillow_heif.load_file

    def load_main(*arguments: Any) -> tuple[list[Any], list[Any]]:
        pictures, _ = load(*arguments)
        return [each for each in pictures if each is not None and each.primary], []

    _pillow_heif.load_file = load_main
    pillow_heif.register_heif_opener()


def _sizes(data: bytes) -> Iterator[int]:
    """The length of each part of each item, from the iloc box; 0 is the rest of the file."""
    found = box(data, (0, len(data)), b"meta", b"iloc")
    if found is None:
        return
    at, end = found
    version, sizes = data[at], struct.unpack_from(">H", data, at + 4)[0]
    offset, length, base, index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    wide = 4 if version == 2 else 2
    count = int.from_bytes(data[at + 6 : at + 6 + wide], "big")
    at += 6 + wide
    head = wide + (2 if version else 0) + 2 + base
    extent = offset + length + (index if version else 0)
    for _ in range(min(count, _MAX_ITEMS)):
        extents = int.from_bytes(data[at + head : at + head + 2], "big")
        at += head + 2
        for _ in range(extents):
            if at + extent > end or not extent:
                return
            yield int.from_bytes(data[at + extent - length : at + extent], "big") or len(data)
            at += extent
