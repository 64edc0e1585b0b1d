"""The header of a GGUF file: what it says about the model, and where its tensors are.

    GGUF, version, number of tensors, number of fields
    fields      name, type, value       general.architecture, general.alignment, …
    tensors     name, sides (the last one of the shape first), type, offset
    data        from the next multiple of the alignment on

Arrays, such as a vocabulary, are skipped. The file is mapped, so only the pages of its header are
read. The module knows no names of tensors.
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import torch

from step1x_edit.checkpoints.gguf_blocks import Packing, packing_of
from step1x_edit.errors import CheckpointError

SUFFIX: Final = ".gguf"
VERSIONS: Final = (2, 3)
HEADER_LIMIT: Final = 100_000_000
"""Bytes of the longest header that is read; a vocabulary takes some millions."""

PLAIN: Final = {
    0: ("F32", torch.float32),
    1: ("F16", torch.float16),
    24: ("I8", torch.int8),
    25: ("I16", torch.int16),
    26: ("I32", torch.int32),
    27: ("I64", torch.int64),
    28: ("F64", torch.float64),
    30: ("BF16", torch.bfloat16),
}
"""Types of numbers that are not packed, by their numbers in files."""

MAX_SIDES: Final = 4
"""Sides of a tensor that the format allows."""

_STRING, _ARRAY = 8, 9
_SCALARS: Final = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Types of fields, in the letters of `struct`."""

Value: TypeAlias = str | int | float


@dataclass(frozen=True)
class Entry:
    """A tensor in the file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """The type of its numbers, in GGUF's words."""
    dtype: torch.dtype
    """The type of its numbers, once they are unpacked."""
    packing: Packing | None
    """None: its numbers are not packed."""
    offset: int
    """From the beginning of the file."""


@dataclass(frozen=True)
class Header:
    """What a file says before its data."""

    fields: Mapping[str, Value]
    entries: tuple[Entry, ...]
    file_size: int
    modified_ns: int

    @property
    def kind(self) -> str:
        """The type of most numbers."""
        counts: Counter[str] = Counter()
        for entry in self.entries:
            counts[entry.kind] += math.prod(entry.shape)
        return max(counts, key=counts.__getitem__, default="without tensors")

    @property
    def architecture(self) -> str | None:
        """The model, in the words of the program that wrote the file."""
        found = self.fields.get("general.architecture")
        return None if found is None else str(found)


def read_header(path: Path) -> Header:
    """Read the header of a file, unless it was read before. Raises CheckpointError."""
    try:
        state = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return _header(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _header(path: Path, size: int, modified_ns: int) -> Header:
    """The header of a file in this state: a vocabulary takes time to skip."""
    try:
        if not size:
            raise ValueError("it is empty")
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            fields, entries = _parse(_Reader(data))
    except struct.error:
        raise CheckpointError(
            f"cannot read {path}: it ends within its header; download it again"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return Header(fields, entries, size, modified_ns)


class _Reader:
    """A place in the header."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.place = 0
        self.size = len(data)

    def number(self, form: str) -> int | float:
        """The next number, in a letter of `struct`."""
        start = self.place
        self.skip(struct.calcsize(form))
        (value,) = struct.unpack_from(f"<{form}", self._data, start)
        return value  # type: ignore[no-any-return]

    def whole(self, form: str) -> int:
        """The next whole number."""
        return int(self.number(form))

    def take(self, count: int) -> bytes:
        """The next bytes."""
        start = self.place
        self.skip(count)
        return self._data[start : self.place]

    def text(self) -> str:
        """The next text, behind its length."""
        return self.take(self.whole("Q")).decode("utf-8")

    def skip(self, count: int) -> None:
        """Leave out bytes. Raises struct.error if the file has fewer, ValueError for too many."""
        self.place += count
        if self.place > self.size:
            raise struct.error
        if self.place > HEADER_LIMIT:
            raise ValueError(f"its header is longer than {HEADER_LIMIT} bytes")


def _parse(reader: _Reader) -> tuple[dict[str, Value], tuple[Entry, ...]]:
    if reader.take(4) != b"GGUF":
        raise ValueError("it is not in GGUF")
    version = reader.whole("I")
    if not version & 0xFFFF:
        raise ValueError("its numbers are big-endian, which is not supported; convert it again")
    if version not in VERSIONS:
        raise ValueError(f"it has version {version} of GGUF; versions 2 and 3 are supported")
    num_tensors, num_fields = reader.whole("Q"), reader.whole("Q")
    fields: dict[str, Value] = {}
    for _ in range(num_fields):
        name = reader.text()
        if (value := _value(reader, reader.whole("I"))) is not None:
            fields[name] = value
    parts = fields.get("split.count", 1)
    if parts not in (0, 1):
        raise ValueError(f"it is one of {parts} parts: join them with llama-gguf-split --merge")
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment}")
    return fields, tuple(_entries(reader, num_tensors, alignment))


def _value(reader: _Reader, kind: int) -> Value | None:
    """The next value of this type; None for an array, which is skipped."""
    if kind == _STRING:
        return reader.text()
    if kind in _SCALARS:
        return reader.number(_SCALARS[kind])
    if kind != _ARRAY:
        raise ValueError(f"its header has a field of the unknown type {kind}")
    item, count = reader.whole("I"), reader.whole("Q")
    if item == _STRING:
        for _ in range(count):
            reader.skip(reader.whole("Q"))
    elif item in _SCALARS:
        reader.skip(count * struct.calcsize(_SCALARS[item]))
    else:
        raise ValueError(f"its header has an array of the unknown type {item}")
    return None


def _entries(reader: _Reader, count: int, alignment: int) -> Iterator[Entry]:
    """The tensors; raises ValueError unless all of them are whole and inside the file."""
    described: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = reader.text()
        if name in described:
            raise ValueError(f"it repeats the tensor {name[:100]}")
        if (num_sides := reader.whole("I")) > MAX_SIDES:
            raise ValueError(f"its tensor {name[:100]} has {num_sides} sides")
        sides = [reader.whole("Q") for _ in range(num_sides)]
        described[name] = tuple(reversed(sides)), reader.whole("I"), reader.whole("Q")
    start = -(-reader.place // alignment) * alignment
    for name, (shape, number, offset) in described.items():
        packing = None
        if number in PLAIN:
            kind, dtype = PLAIN[number]
            size = math.prod(shape) * dtype.itemsize
        else:
            packing = packing_of(number)
            kind, dtype = packing.name, torch.float32
            if not shape or shape[-1] % packing.numbers:
                raise ValueError(
                    f"its tensor {name[:100]} has the shape {shape}, and {packing.name} packs "
                    f"{packing.numbers} numbers of a row"
                )
            size = math.prod(shape) // packing.numbers * packing.size
        if start + offset + size > reader.size:
            raise ValueError(f"it ends before its tensor {name[:100]} does; download it again")
        yield Entry(name, shape, kind, dtype, packing, start + offset)
