"""The weights of a checkpoint in one piece of host memory, block by block in execution order.

Blocks may also stay on disk and be read each time they are needed. Parameters and buffers of the
network are views of the arena, or of copies of its blocks that the caller holds (`bind`). The arena
knows nothing about devices.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import mmap
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from step1x_edit.checkpoints.stored import Span, Stored
from step1x_edit.errors import CheckpointError
from step1x_edit.model.quantised import Code, Coded, code_into
from step1x_edit.model.scratch import scratch

logger = logging.getLogger(__name__)

ALIGNMENT: Final = 256
"""Bytes: the alignment of CUDA's own allocations, which kernels expect."""

PIECE: Final = 16 * 1024**2
"""Bytes per read or copy; the work can be stopped between two pieces."""

CODED_PIECE: Final = PIECE // 16
"""Bytes of a matrix, in float32, that are coded at once: all passes over them stay in the cache."""

REPORTED: Final = 128 * 1024**2
"""Bytes between two reports of reading: about a second's work of an ordinary disk."""

ORDER: Final = (
    ("conditioner", r"conditioner\.visual\.(patch_embed|rotary_pos_emb)"),
    ("conditioner", r"conditioner\.visual\.blocks\.\d+"),
    ("conditioner", r"conditioner\.visual\.\w+"),
    ("conditioner", r"conditioner\.language_model\.(embed_tokens|rotary_emb)"),
    ("conditioner", r"conditioner\.language_model\.layers\.\d+"),
    ("conditioner", r"conditioner\.lm_head"),
    ("conditioner", r"conditioner\.\w+\.\w+"),
    ("encoder", r"vae\.encoder\.(conv_in|down_blocks\.\d+)"),
    ("encoder", r"vae\.(encoder|quant_conv)"),
    ("prologue", r"transformer\.connector\.(S\.\w+_embedder|global_proj_out|scale_factor)"),
    ("prologue", r"transformer\.connector\.S\.individual_token_refiner\.blocks\.\d+"),
    ("prologue", r"transformer\.text_token_mapping"),
    ("prologue", r"transformer\.(time_in|vector_in|txt_in)"),
    ("prologue", r"transformer\.double_blocks\.\d+\.(img|txt)_mod"),
    ("prologue", r"transformer\.single_blocks\.\d+\.modulation"),
    ("prologue", r"transformer\.final_layer\.adaLN_modulation"),
    ("core", r"transformer\.img_in"),
    ("core", r"transformer\.double_blocks\.\d+"),
    ("core", r"transformer\.single_blocks\.\d+"),
    ("core", r"transformer\.final_layer"),
    ("decoder", r"vae\.(post_quant_conv|decoder\.(conv_in|mid_block))"),
    ("decoder", r"vae\.decoder\.up_blocks\.\d+"),
    ("decoder", r"vae\.decoder"),
    ("recogniser", r"recogniser"),
)
"""The components of all tensors, in execution order.

A tensor belongs to the first line that matches the start of its name; the match names its block.
"""

_RANKS: Final = tuple((component, re.compile(pattern)) for component, pattern in ORDER)


Check: TypeAlias = Callable[[], None]
"""Called between pieces of work; raises to stop it."""


DeltaOf: TypeAlias = Callable[[str, Callable[[], Tensor]], Tensor | None]
"""Returns the delta of a weight, by its name and a function that returns its numbers; both are in
float32."""


class Read(NamedTuple):
    """Bytes of files that were read so far, and all that are to be read."""

    done: int
    total: int


@dataclass(frozen=True)
class Kept:
    """Codes and scales of a matrix that are in a file."""

    codes: Stored
    scale: Stored
    checksum: int
    """As `checksum_of` both."""


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer of the network, and the source of its numbers."""

    name: str
    """The part and the name in it: transformer.img_in.weight; codes keep that of their matrix."""
    module: nn.Module
    attribute: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Stored | Tensor | None
    """None for the scales of a matrix, which are computed with its codes."""
    code: Code | None = None
    """Set for a matrix that is kept as codes; its source has the real shape and full precision."""
    kept: Kept | None = None
    """Its codes, if they need not be computed."""

    @property
    def scale_name(self) -> str:
        """The name of the scales of a matrix that is kept as codes."""
        return f"{self.name.removesuffix('.weight')}.scale"

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def tensor(self) -> Tensor:
        """The current parameter or buffer."""
        tensor: Tensor = getattr(self.module, self.attribute)
        return tensor


@dataclass(frozen=True)
class Block:
    """Consecutive bytes of the arena that are needed together."""

    name: str
    component: str
    offset: int | None
    """None for a block that stays on disk: it is not in the arena."""
    size: int


def never_stop() -> None:
    """A check that lets the work continue."""


class Arena:
    """Host memory for the weights of one network; it is freed with the last view of it."""

    def __init__(self, weights: Iterable[Weight], on_disk: Collection[str] = frozenset()) -> None:
        """`on_disk` names the blocks that stay on disk."""
        self.blocks, self._places = _lay_out(weights, on_disk)
        self.size = sum(block.size for block in self.blocks if block.offset is not None)
        self.memory = _reserve(self.size)
        self.memories = {
            block.name: self.memory[block.offset : block.offset + block.size]
            for block in self.blocks
            if block.offset is not None
        }
        self._sizes = {block.name: block.size for block in self.blocks}

    def fill(self, check: Check = never_stop) -> None:
        """Read all weights that do not stay on disk.

        `check` is called between pieces and may raise to stop. Raises CheckpointError
        if a file cannot be read, has changed, or holds numbers that are not finite.
        """
        _finish(self.filling(check))

    def filling(self, check: Check = never_stop) -> Iterator[Read]:
        """Read as `fill` does, and yield after each `REPORTED` bytes; then also at the end."""
        return self._reading(self.memories, check)

    def read(self, block: str, check: Check = never_stop) -> Tensor:
        """The bytes of a block as in the files, in new memory; raises as `fill` does."""
        memory = self.room_for(block)
        _finish(self._reading({block: memory}, check))
        return memory

    def room_for(self, block: str) -> Tensor:
        """New memory of the size of a block."""
        return _reserve(self._sizes[block])

    def _reading(self, memories: Mapping[str, Tensor], check: Check) -> Iterator[Read]:
        """Read blocks into memory, by name."""
        pieces = sorted(self._pieces(memories), key=_place_on_disk)
        total = sum(piece.size for piece in pieces)
        done = reported = 0
        threads = min(16, 2 * (os.cpu_count() or 1))
        under_way: deque[Future[int]] = deque()
        with _one_core_each() as set_up, ThreadPoolExecutor(threads, "read", set_up) as pool:
            try:
                for piece in pieces:
                    check()
                    if len(under_way) == 2 * threads:
                        done += under_way.popleft().result()
                    under_way.append(pool.submit(piece.read))
                    if done - reported >= REPORTED:
                        reported = done
                        yield Read(done, total)
                while under_way:
                    check()
                    under_way.popleft().result()
            finally:
                for future in under_way:
                    future.cancel()
        if reported:
            yield Read(total, total)

    def views(self, block: str, memory: Tensor) -> Iterator[tuple[Weight, Tensor]]:
        """The weights of a block, and where they are in memory of its size."""
        return ((place.weight, place.view(memory)) for place in self._places[block])

    def weights_of(self, block: str) -> list[str]:
        """The names of the weights in a block."""
        return [place.weight.name for place in self._places[block]]

    def write_changed(
        self,
        block: str,
        memory: Tensor,
        delta_of: DeltaOf,
        check: Check = never_stop,
    ) -> None:
        """Write a block, with deltas added to some of its weights, into memory of its size.

        If that is the block's own memory, the block is read again. A matrix that is kept as codes
        is read again, so that it is rounded only once; raises as `fill` does.
        """
        base = self.memories.get(block)
        if base is None or base is memory:
            _finish(self._reading({block: memory}, check))
        else:
            memory.copy_(base)
        for place in self._places[block]:
            check()
            delta = delta_of(place.weight.name, partial(_unchanged, place, memory))
            if delta is not None:
                self._add(block, place, delta, memory, check)

    def attach(self, memories: Mapping[str, Tensor]) -> None:
        """Make the network's parameters and buffers views of this memory.

        Parameters are created again: those of a network without weights cannot take any.
        """
        for place in self._all_places():
            weight = place.weight
            empty = torch.empty(0, dtype=weight.dtype)
            is_parameter = isinstance(weight.tensor, nn.Parameter)
            made = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
            setattr(weight.module, weight.attribute, made)
        # Not above: a tensor that is created as a view holds the memory of that view for ever.
        self.bind(memories)

    def bind(self, memories: Mapping[str, Tensor]) -> None:
        """Make the network's tensors views of these copies of their blocks, by name.

        Only `data` is replaced: compiled code, for example, keeps its parameters.
        """
        for name, memory in memories.items():
            for place in self._places[name]:
                place.weight.tensor.data = place.view(memory)

    def empty(self, block: str, device: torch.device) -> None:
        """Detach the weights of a block from the network, as empty tensors on this device."""
        for place in self._places[block]:
            place.weight.tensor.data = torch.empty(0, dtype=place.weight.dtype, device=device)

    def detach(self) -> None:
        """Detach the weights so that stray references do not keep them alive."""
        for name in self._places:
            self.empty(name, torch.device("cpu"))

    def lies_in(self, memories: Iterable[Tensor], blocks: Iterable[str]) -> bool:
        """Whether all tensors of the blocks are views of this memory, by address."""
        addresses = {memory.untyped_storage().data_ptr() for memory in memories}
        found = {
            place.weight.tensor.untyped_storage().data_ptr()
            for name in blocks
            for place in self._places[name]
        }
        return found <= addresses

    def _add(self, block: str, place: _Place, delta: Tensor, memory: Tensor, check: Check) -> None:
        """Add a delta to a weight in a copy of its block."""
        if place.weight.code is None:
            view = place.view(memory)
            view.copy_(view.float() + delta)
            return
        for piece in self._coded_pieces(block, place, memory, delta):
            check()
            piece.read()

    def _all_places(self) -> Iterator[_Place]:
        return itertools.chain.from_iterable(self._places.values())

    def _pieces(self, memories: Mapping[str, Tensor]) -> Iterator[_AnyPiece]:
        """The pieces to read."""
        for name, memory in memories.items():
            for place in self._places[name]:
                weight, target = place.weight, place.view(memory)
                if weight.code is None:
                    yield from _pieces_of(weight, target.reshape(-1))
                    continue
                rounding = self._coded_pieces(name, place, memory)
                if weight.kept is None:
                    yield from rounding
                else:
                    scale = self._scale_of(name, weight).view(memory)
                    yield _KeptPiece(weight, weight.kept, target, scale, rounding)

    def _scale_of(self, block: str, weight: Weight) -> _Place:
        """The place of the scales of a matrix that is kept as codes."""
        return next(p for p in self._places[block] if p.weight.name == weight.scale_name)

    def _coded_pieces(
        self, block: str, place: _Place, memory: Tensor, delta: Tensor | None = None
    ) -> Iterator[_CodedPiece]:
        """The pieces of a matrix that is kept as codes, some rows each."""
        weight, source = place.weight, place.weight.source
        assert source is not None
        codes, scale = place.view(memory), self._scale_of(block, weight).view(memory)
        rows, columns = source.shape
        step = max(1, CODED_PIECE // (4 * columns))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield _CodedPiece(
                weight,
                source[part] if isinstance(source, Tensor) else source.rows(part.start, part.stop),
                codes[part],
                scale[part],
                None if delta is None else delta[part],
            )


@dataclass(frozen=True)
class _Place:
    """The place of a weight, in bytes from the start of its block."""

    weight: Weight
    offset: int

    def view(self, memory: Tensor) -> Tensor:
        """The weight in a copy of its block."""
        raw = memory[self.offset : self.offset + self.weight.size]
        return raw.view(self.weight.dtype).view(self.weight.shape)


@dataclass(frozen=True)
class _Piece:
    """Numbers of a weight: source and target."""

    weight: Weight
    source: Span | Tensor
    target: Tensor  # flat

    @property
    def size(self) -> int:
        """Bytes to read from a file."""
        return 0 if isinstance(self.source, Tensor) else self.source.size

    def read(self) -> int:
        """Read them, and return how many they are."""
        if isinstance(self.source, Tensor):
            self.target.copy_(self.source)
        else:
            _read(self.weight, self.source, self.target)
        return self.size


@dataclass(frozen=True)
class _CodedPiece:
    """Rows of a matrix that is kept as codes and scales."""

    weight: Weight
    source: Stored | Tensor
    codes: Tensor
    scale: Tensor
    delta: Tensor | None
    """Added before coding."""

    @property
    def size(self) -> int:
        """Bytes to read from files."""
        return 0 if isinstance(self.source, Tensor) else self.source.size

    def read(self) -> int:
        """Read and code the rows, and return how many bytes were read."""
        assert self.weight.code is not None
        rows = scratch("rows", tuple(self.source.shape), torch.float32)
        _read_in_full(self.weight, self.source, rows)
        if self.delta is not None:
            rows += self.delta
        code_into(Coded(self.codes, self.scale), rows, self.weight.code)
        return self.size


@dataclass(frozen=True)
class _KeptPiece:
    """A matrix whose codes are in a file."""

    weight: Weight
    kept: Kept
    codes: Tensor
    scale: Tensor
    rounding: Iterable[_CodedPiece]
    """Computes the codes if those in the file are wrong."""

    @property
    def source(self) -> Stored:
        return self.kept.codes

    @property
    def size(self) -> int:
        """Bytes to read from the file."""
        return self.kept.codes.size + self.kept.scale.size

    def read(self) -> int:
        """Read the codes, and return how many bytes they are."""
        if not self._has_read():
            file = self.kept.codes.spans[0].file.path.name
            logger.warning("%s has wrong codes of %s: rounding them again", file, self.weight.name)
            for piece in self.rounding:
                piece.read()
        return self.size

    def _has_read(self) -> bool:
        checksum = 0
        try:
            for stored, target in ((self.kept.codes, self.codes), (self.kept.scale, self.scale)):
                (span,), flat = stored.spans, target.reshape(-1)
                for start in range(0, span.count, CODED_PIECE):
                    stop = min(start + CODED_PIECE, span.count)
                    span.part(start, stop).read_into(flat[start:stop])
                    checksum = checksum_of(flat[start:stop], checksum)
        except CheckpointError:  # it has been replaced or removed
            return False
        return checksum == self.kept.checksum


_AnyPiece: TypeAlias = _Piece | _CodedPiece | _KeptPiece


def checksum_of(tensor: Tensor, before: int = 0) -> int:
    """The CRC-32 of the bytes of a tensor, after those with the checksum `before`."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, before)


def _unchanged(place: _Place, memory: Tensor) -> Tensor:
    """A weight in float32, from a copy of its block; from its source if codes are kept of it."""
    if place.weight.code is None:
        return place.view(memory).float()
    assert place.weight.source is not None
    numbers = torch.empty(place.weight.source.shape)
    _read_in_full(place.weight, place.weight.source, numbers)
    return numbers


def _read_in_full(weight: Weight, source: Stored | Tensor, numbers: Tensor) -> None:
    """Read numbers of a weight into a float32 tensor of their shape."""
    if isinstance(source, Tensor):
        numbers.copy_(source)
        return
    flat, place = numbers.view(-1), 0
    for span in source.spans:
        _read(weight, span, flat[place : place + span.count])
        place += span.count


@contextlib.contextmanager
def _one_core_each() -> Iterator[Callable[[], None]]:
    """What threads that begin within it call first, so that none of them divides its operations.

    Torch keeps a number of threads for each thread, and one for those that begin later.
    """
    threads = torch.get_num_threads()
    try:
        yield partial(torch.set_num_threads, 1)
    finally:
        torch.set_num_threads(threads)


def _finish(reading: Iterator[Read]) -> None:
    """Read to the end."""
    deque(reading, maxlen=0)


def _read(weight: Weight, span: Span, target: Tensor) -> None:
    """Read numbers of a weight into a flat tensor. Raises CheckpointError."""
    span.read_into(target)
    if target.is_floating_point():
        # As fast as copying; checking each number with isfinite is much slower.
        low, high = target.aminmax()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CheckpointError(
                f"{span.file.path.name} holds numbers in {weight.name} that are not finite"
            )


def _pieces_of(weight: Weight, flat: Tensor) -> Iterator[_Piece]:
    if weight.source is None:
        return
    if isinstance(weight.source, Tensor):
        yield _Piece(weight, weight.source.reshape(-1), flat)
        return
    place = 0
    for span in weight.source.spans:
        step = PIECE // max(span.dtype.itemsize, flat.dtype.itemsize)
        for start in range(0, span.count, step):
            stop = min(start + step, span.count)
            yield _Piece(weight, span.part(start, stop), flat[place + start : place + stop])
        place += span.count


def blocks_of(weights: Iterable[Weight]) -> tuple[Block, ...]:
    """The blocks that an arena of these weights would have; takes no memory."""
    return _lay_out(weights)[0]


def _lay_out(
    weights: Iterable[Weight], on_disk: Collection[str] = frozenset()
) -> tuple[tuple[Block, ...], dict[str, list[_Place]]]:
    """The blocks in execution order, and the places of the weights in them."""
    # sorted() is stable: within a block the order of the network's definition remains.
    ordered = sorted(weights, key=lambda weight: _rank(weight.name)[0])
    blocks: list[Block] = []
    places: dict[str, list[_Place]] = {}
    end = 0
    for (component, name), members in itertools.groupby(
        ordered, key=lambda weight: _rank(weight.name)[1:]
    ):
        size = 0
        places[name] = []
        for weight in members:
            places[name].append(_Place(weight, size))
            size += -(-weight.size // ALIGNMENT) * ALIGNMENT
        stays = name in on_disk
        blocks.append(Block(name, component, None if stays else end, size))
        end += 0 if stays else size
    return tuple(blocks), places


def _rank(name: str) -> tuple[tuple[int, list[int]], str, str]:
    """The rank of a tensor in the order, its component and the name of its block."""
    for line, (component, pattern) in enumerate(_RANKS):
        if match := pattern.match(name):
            numbers = [int(number) for number in re.findall(r"\d+", match.group())]
            return (line, numbers), component, match.group()
    raise ValueError(f"{name} belongs to no component")


def _reserve(size: int) -> Tensor:
    """Anonymous memory, in huge pages if possible; freed with the last view."""
    size = max(1, size)  # an empty mapping is an error
    if hasattr(mmap, "MAP_PRIVATE"):  # everywhere but on Windows
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux, if its kernel was built so
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _place_on_disk(piece: _AnyPiece) -> tuple[str, int]:
    """Sorts pieces so that files are read from beginning to end."""
    if isinstance(piece.source, Tensor):
        return "", 0
    span = piece.source.spans[0] if isinstance(piece.source, Stored) else piece.source
    return str(span.file.path), span.offset
