"""Writing the codes of a model into a file, and reading them from there instead of rounding."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Generator, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final

import torch

from step1x_edit.checkpoints.ahead import ReadAhead
from step1x_edit.checkpoints.arena import Arena, Kept, Read, Weight, checksum_of
from step1x_edit.checkpoints.converted import (
    PARTIAL,
    Header,
    Stamp,
    UnusableError,
    check_sources,
    read_header,
)
from step1x_edit.checkpoints.read import OpenedCheckpoint
from step1x_edit.checkpoints.stored import DTYPES, Stored, stored_tensors
from step1x_edit.errors import CheckpointError, NoSpaceError

_GB: Final = 1e9
_DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def with_kept_codes(opened: OpenedCheckpoint, file: Path) -> OpenedCheckpoint:
    """The same model with its codes read from a file. Raises UnusableError if they are not its."""
    header = read_header(file)
    check_sources(file, header, _sources(opened.weights))
    try:
        tensors = stored_tensors([file])
        weights = tuple(_with_kept(weight, tensors, header) for weight in opened.weights)
    except (CheckpointError, KeyError):
        raise UnusableError(f"{file.name} is damaged") from None
    return replace(opened, weights=weights)


def write_codes(opened: OpenedCheckpoint, file: Path) -> Generator[Read, None, None]:
    """Round the matrices of a model and write their codes; yields what has been read.

    The file appears when it is complete; if that fails or the iterator is closed, nothing is left.
    Raises CheckpointError, or NoSpaceError before the work begins.
    """
    blocks = {block.name for block in opened.blocks}
    arena = Arena(filter(_is_written, opened.weights), on_disk=blocks)
    named = {weight.name: weight for weight in opened.weights}
    weights = [named[name] for block in arena.blocks for name in arena.weights_of(block.name)]
    matrices = [weight.name for weight in weights if weight.code is not None]
    header = Header(_sources(weights), dict.fromkeys(matrices, 0))
    beginning = _beginning(header, opened.precision, weights)
    size = len(beginning) + sum(weight.size for weight in weights)
    if (free := shutil.disk_usage(file.parent).free) < size:
        raise NoSpaceError(
            f"the codes take {size / _GB:.1f} GB and {free / _GB:.1f} GB of disk are free in "
            f"{file.parent}: free some, or choose another folder"
        )
    partial = file.with_name(file.name + PARTIAL)
    try:
        with partial.open("wb") as out:
            out.write(beginning)
            checksums = yield from _write_blocks(arena, sum(map(_bytes_of, weights)), out)
            out.seek(0)
            # As long as before: a checksum always has eight digits.
            out.write(_beginning(replace(header, checksums=checksums), opened.precision, weights))
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _write_blocks(arena: Arena, total: int, out: BinaryIO) -> Generator[Read, None, dict[str, int]]:
    """Write the codes of one block while those of the next are made; returns the checksums."""
    checksums: dict[str, int] = {}
    names = [block.name for block in arena.blocks]
    read = 0
    with contextlib.closing(ReadAhead(arena.read)) as disk:
        for name, following in itertools.zip_longest(names, names[1:]):
            memory = disk.take(name)
            if following is not None:
                disk.begin(following)
            views = dict(arena.views(name, memory))
            scales = {weight.name: view for weight, view in views.items() if weight.code is None}
            for weight, view in views.items():
                out.write(view.reshape(-1).view(torch.uint8).numpy().data)
                read += _bytes_of(weight)
                if weight.code is not None:
                    codes = checksum_of(view)
                    checksums[weight.name] = checksum_of(scales[weight.scale_name], codes)
            yield Read(read, total)
    return checksums


def _beginning(header: Header, precision: str, weights: Iterable[Weight]) -> bytes:
    """The header of a safetensors file."""
    entries: dict[str, object] = {"__metadata__": header.metadata(precision)}
    end = 0
    for weight in weights:
        start, end = end, end + weight.size
        entries[weight.name] = {
            "dtype": _DTYPE_NAMES[weight.dtype],
            "shape": weight.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _with_kept(weight: Weight, tensors: Mapping[str, Stored], header: Header) -> Weight:
    """The weight with its codes in the file, if it has codes. Raises KeyError without them."""
    if weight.code is None:
        return weight
    kept = Kept(tensors[weight.name], tensors[weight.scale_name], header.checksums[weight.name])
    if kept.codes.size != weight.size:
        raise KeyError(weight.name)
    return replace(weight, kept=kept)


def _is_written(weight: Weight) -> bool:
    """Whether it is codes or scales."""
    return weight.code is not None or weight.source is None


def _bytes_of(weight: Weight) -> int:
    """What is read from the model's files for it."""
    return weight.source.size if isinstance(weight.source, Stored) else 0


def _sources(weights: Iterable[Weight]) -> frozenset[Stamp]:
    """The files with the matrices that are kept as codes, as they were when they were opened."""
    files = {
        span.file
        for weight in weights
        if weight.code is not None and isinstance(weight.source, Stored)
        for span in weight.source.spans
    }
    return frozenset(Stamp(str(each.path.resolve()), each.size, each.modified_ns) for each in files)
