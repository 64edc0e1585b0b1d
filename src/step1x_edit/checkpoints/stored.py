"""Tensors that are still in safetensors or GGUF files: their shapes and the places of their bytes.

Every conversion between the layouts of the weights (rows fused or split, halves swapped, a 1x1
convolution flattened) only reorders consecutive numbers. So a stored tensor is a shape and a list
of spans, and rearranging one reads nothing. The module knows no names.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from step1x_edit import foreign_json
from step1x_edit.checkpoints import gguf_file
from step1x_edit.checkpoints.gguf_blocks import Packing
from step1x_edit.errors import CheckpointError
from step1x_edit.model.scratch import scratch

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLES: Final = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})
HEADER_LIMIT: Final = 100_000_000
"""Bytes of the longest header that the format allows."""


@dataclass(frozen=True)
class StoredFile:
    """A file, and its state when its header was read."""

    path: Path
    size: int
    modified_ns: int

    def read(self, offset: int, target: memoryview) -> None:
        """Fill the bytes of `target`. Raises CheckpointError if the file has changed."""
        try:
            with self.path.open("rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                if (found.st_size, found.st_mtime_ns) != (self.size, self.modified_ns):
                    raise CheckpointError(f"{self.path} has changed since it was opened")
                file.seek(offset)
                while target:
                    count = file.readinto(target)
                    if not count:
                        raise CheckpointError(f"cannot read {self.path}: it ends too early")
                    target = target[count:]
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error}") from error

    def forget(self, offset: int, size: int) -> None:
        """Drop bytes from the system's page cache, if it allows that: they come from disk again."""
        if hasattr(os, "posix_fadvise"):  # Linux
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Span:
    """Consecutive numbers of one type in a file."""

    file: StoredFile
    offset: int
    count: int
    dtype: torch.dtype
    scale: float = 1.0
    """What they are multiplied by when they are read."""
    packing: Packing | None = None
    """How they are packed in blocks; `dtype` is their type afterwards."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self._bytes_of(self.count)

    def part(self, start: int, stop: int) -> Span:
        """Its numbers from `start` on and before `stop`; both are multiples of a block."""
        return replace(self, offset=self.offset + self._bytes_of(start), count=stop - start)

    def read_into(self, target: Tensor) -> None:
        """Read the numbers into a flat tensor of the same length, converting them to its type."""
        raw = target
        if self.packing is not None:
            raw = scratch("bytes of a file", (self.size,), torch.uint8)
        elif target.dtype != self.dtype:
            raw = scratch("bytes of a file", (self.count,), self.dtype)
        self.file.read(self.offset, raw.view(torch.uint8).numpy().data)
        if self.packing is not None:
            self.packing.unpack_into(raw, target)
        elif raw is not target:
            target.copy_(raw)
        if self.scale != 1.0:
            target.mul_(self.scale)

    def _bytes_of(self, count: int) -> int:
        """Bytes of the first numbers."""
        if self.packing is None:
            return count * self.dtype.itemsize
        blocks, rest = divmod(count, self.packing.numbers)
        if rest:
            raise CheckpointError(
                f"{self.file.path.name} packs numbers as {self.packing.name} across rows: use "
                "the same model as safetensors"
            )
        return blocks * self.packing.size


@dataclass(frozen=True)
class Stored:
    """A tensor in files: its numbers are those of its spans, in order."""

    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        """Bytes in the files."""
        return sum(span.size for span in self.spans)

    def is_floating_point(self) -> bool:
        """Whether it holds no integers, as of a tensor."""
        return all(span.dtype.is_floating_point for span in self.spans)

    def rows(self, start: int, stop: int) -> Stored:
        """Some rows, like a slice of a tensor."""
        size = math.prod(self.shape[1:])
        spans = tuple(_between(self.spans, start * size, stop * size))
        return Stored((stop - start, *self.shape[1:]), spans)

    def reshape(self, *shape: int) -> Stored:
        """The same numbers in another shape."""
        assert math.prod(shape) == math.prod(self.shape)
        return Stored(shape, self.spans)

    def times(self, scale: float) -> Stored:
        """The same numbers, multiplied when they are read."""
        return Stored(self.shape, tuple(replace(span, scale=scale) for span in self.spans))

    def read(self, dtype: torch.dtype) -> Tensor:
        """The numbers as a flat tensor; for small ones."""
        numbers = torch.empty(math.prod(self.shape), dtype=dtype)
        start = 0
        for span in self.spans:
            span.read_into(numbers[start : start + span.count])
            start += span.count
        return numbers

    def forget(self) -> None:
        """As `StoredFile.forget`."""
        for span in self.spans:
            span.file.forget(span.offset, span.size)

    @staticmethod
    def concatenate(parts: Sequence[Stored]) -> Stored:
        """The rows of all parts."""
        rows = sum(part.shape[0] for part in parts)
        spans = tuple(span for part in parts for span in part.spans)
        return Stored((rows, *parts[0].shape[1:]), spans)


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError for a file that could run code."""
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{path.name} may run code when read: only safetensors are accepted")


def is_gguf(path: Path) -> bool:
    """Whether a file is in GGUF, by its name."""
    return path.suffix.lower() == gguf_file.SUFFIX


def shortened(name: str) -> str:
    """A name for a message, of at most 100 letters."""
    return name if len(name) <= 100 else f"{name[:70]}…{name[-29:]}"


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """All tensors of the files by name. Raises CheckpointError."""
    tensors: dict[str, Stored] = {}
    for path in files:
        for name, tensor in _in_gguf(path) if is_gguf(path) else _in_file(path):
            if name in tensors:
                raise CheckpointError(f"{path} repeats the tensor {shortened(name)}")
            tensors[name] = tensor
    return tensors


def stored_names(path: Path) -> set[str]:
    """The names of a file's tensors."""
    if is_gguf(path):
        return {entry.name for entry in gguf_file.read_header(path).entries}
    try:
        with safe_open(path, framework="pt") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def metadata_of(path: Path) -> dict[str, str]:
    """What the header of a file says besides its tensors."""
    try:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _in_gguf(path: Path) -> Iterator[tuple[str, Stored]]:
    header = gguf_file.read_header(path)
    file = StoredFile(path, header.file_size, header.modified_ns)
    for entry in header.entries:
        count = math.prod(entry.shape)
        span = Span(file, entry.offset, count, entry.dtype, packing=entry.packing)
        yield entry.name, Stored(entry.shape, (span,))


def _in_file(path: Path) -> Iterator[tuple[str, Stored]]:
    names = stored_names(path)  # the library validates the header first
    try:
        with path.open("rb") as opened:
            found = os.fstat(opened.fileno())
            length = int.from_bytes(opened.read(8), "little")
            header = foreign_json.parse(opened.read(min(length, HEADER_LIMIT)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    file = StoredFile(path, found.st_size, found.st_mtime_ns)
    for name in names:
        try:
            tensor = _tensor(file, 8 + length, header[name])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"cannot read {shortened(name)} in {path}: {error!r}") from error
        yield name, tensor


def _tensor(file: StoredFile, base: int, entry: dict[str, Any]) -> Stored:
    kind, shape = entry["dtype"], tuple(int(side) for side in entry["shape"])
    if kind not in DTYPES:
        raise CheckpointError(
            f"{file.path.name} has numbers of type {kind}, which is not supported"
        )
    dtype = DTYPES[kind]
    begin, end = (base + int(offset) for offset in entry["data_offsets"])
    count = math.prod(shape)
    if min(shape, default=0) < 0 or not base <= begin <= end <= file.size:
        raise ValueError("its bytes are outside the file")
    if end - begin != count * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes do not make a tensor of shape {shape}")
    return Stored(shape, (Span(file, begin, count, dtype),))


def _between(spans: Iterable[Span], start: int, stop: int) -> Iterator[Span]:
    """The numbers from `start` up to `stop` of those in the spans."""
    passed = 0
    for span in spans:
        first, last = max(start - passed, 0), min(stop - passed, span.count)
        if first < last:
            yield span.part(first, last)
        passed += span.count
