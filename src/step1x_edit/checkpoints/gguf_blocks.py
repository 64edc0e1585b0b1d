"""Numbers in the block formats of GGUF, and their way back to float32.

A format packs 32 or 256 numbers into a block of bytes: codes of a few bits, and scales in float16.

    Q4_0, Q5_0, Q8_0    d · (code - middle)
    Q4_1, Q5_1          d · code + m
    Q2_K, Q4_K, Q5_K    (d · scale) · code - (dmin · minimum), of each 16 or 32 numbers
    Q3_K, Q6_K          (d · scale) · (code - middle)

These are the operations of the gguf package, in its order: the numbers are equal to the bit. The
codes of four or eight bytes are taken apart together, as one integer. The module knows no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

Unpack: TypeAlias = Callable[[Tensor, Tensor], object]
"""Writes the numbers of blocks (n, bytes of a block) into float32 (n, numbers of a block)."""

AT_ONCE: Final = 512 * 1024
"""Numbers that are unpacked together: more leave a CPU's cache, fewer cost more calls."""

_LOW: Final = 0x0F0F0F0F
"""The lower half of each byte of an int32."""
_LOW_64: Final = 0x0F0F0F0F_0F0F0F0F
_ONES: Final = 0x01010101

_SHIFTS: Final = {
    bits: torch.arange(0, 8, bits, dtype=torch.int32).view(1, 1, -1, 1) for bits in (1, 2)
}
_FIFTH: Final = (
    torch.tensor([[16 * (byte >> i & 1) for i in range(8)] for byte in range(256)])
    .to(torch.uint8)
    .view(torch.int64)
    .flatten()
)
"""The eight bits of a byte, each as 16 or 0 in a separate byte."""


@dataclass(frozen=True)
class Packing:
    """A format of blocks."""

    name: str
    numbers: int
    """Numbers of a block."""
    size: int
    """Bytes of a block."""
    unpack: Unpack

    def unpack_into(self, raw: Tensor, target: Tensor) -> None:
        """Write the numbers of some bytes into a flat tensor, converting them to its type."""
        blocks, rows = raw.view(-1, self.size), target.view(-1, self.numbers)
        step = AT_ONCE // self.numbers
        for some, out in zip(torch.split(blocks, step), torch.split(rows, step), strict=True):
            numbers = out if out.dtype == torch.float32 else torch.empty(out.shape)
            self.unpack(some, numbers)
            if numbers is not out:
                out.copy_(numbers)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at this byte of each block, (n, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _words(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Bytes of each block, four to an integer."""
    return blocks[:, start:stop].contiguous().view(torch.int32)


def _high(words: Tensor) -> Tensor:
    """The upper half of each byte."""
    return (words >> 4).bitwise_and_(_LOW)


def _parts(words: Tensor, width: int, bits: int) -> Tensor:
    """Codes of so many bits, the lowest of each byte first: (n, …, 8 / bits, width) integers."""
    rows = words.view(len(words), -1, 1, width)
    return (rows >> _SHIFTS[bits]).bitwise_and_(_ONES * ((1 << bits) - 1))


def _signed(words: Tensor, middle: int) -> Tensor:
    """The bytes of integers, minus the middle."""
    return words.view(torch.int8).sub_(middle)


def _unsigned(words: Tensor) -> Tensor:
    return words.view(torch.uint8)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    words, halves = _words(blocks, 2, 18), out.view(-1, 2, 16)
    halves[:, 0] = _signed(words & _LOW, 8)
    halves[:, 1] = _signed(_high(words), 8)
    out.mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    words, halves = _words(blocks, 4, 20), out.view(-1, 2, 16)
    halves[:, 0] = _unsigned(words & _LOW)
    halves[:, 1] = _unsigned(_high(words))
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5(blocks: Tensor, at: int) -> Tensor:
    """The codes of Q5_0 and Q5_1, (n, 4) integers of eight bytes: four of fifth bits come first."""
    codes = _FIFTH.index_select(0, blocks[:, at : at + 4].flatten().int()).view(-1, 2, 2)
    pairs = blocks[:, at + 4 :].contiguous().view(torch.int64)  # (n, 2)
    codes[:, 0] |= pairs & _LOW_64
    codes[:, 1] |= (pairs >> 4) & _LOW_64
    return codes.flatten(1)


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_signed(_q5(blocks, 2), 16)).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_unsigned(_q5(blocks, 4))).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    packed = blocks[:, :16]
    scales = (packed & 0x0F).float().mul_(_half(blocks, 80)).unsqueeze(-1)  # (n, 16, 1)
    minima = (packed >> 4).float().mul_(_half(blocks, 82)).unsqueeze(-1)
    codes = _parts(_words(blocks, 16, 80), width=8, bits=2)
    out.copy_(_unsigned(codes).flatten(1)).view(-1, 16, 16).mul_(scales).sub_(minima)


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    packed = _words(blocks, 96, 108)  # of 16 scales: 8 bytes of four lower bits, 4 of two upper
    lower = packed[:, :2]
    scales = torch.cat([lower & _LOW, _high(lower)], dim=1)  # (n, 4)
    scales |= _parts(packed[:, 2:].contiguous(), width=1, bits=2).flatten(1) << 4
    factors = _signed(scales, 32).float().mul_(_half(blocks, 108)).unsqueeze(-1)  # (n, 16, 1)
    codes = _parts(_words(blocks, 32, 96), width=8, bits=2).flatten(1)
    codes |= _parts(_words(blocks, 0, 32), width=8, bits=1).flatten(1) << 2
    out.copy_(_signed(codes, 4)).view(-1, 16, 16).mul_(factors)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K, each (n, 8, 1): twelve bytes hold eight of each, of six bits."""
    first, second, third = torch.split(_words(blocks, 4, 16), 1, dim=1)
    words = torch.cat(
        [
            first & 0x3F3F3F3F,
            (third & _LOW) | ((first >> 2) & 0x30303030),
            second & 0x3F3F3F3F,
            _high(third) | ((second >> 2) & 0x30303030),
        ],
        dim=1,
    )
    scales, minima = torch.split(_unsigned(words).float(), 8, dim=1)
    return (
        (scales * _half(blocks, 0)).unsqueeze(-1),
        (minima * _half(blocks, 2)).unsqueeze(-1),
    )


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    scales, minima = _scales_and_minima(blocks)
    words, pairs = _words(blocks, 16, 144), out.view(-1, 4, 2, 32)
    pairs[:, :, 0] = _unsigned(words & _LOW).view(-1, 4, 32)
    pairs[:, :, 1] = _unsigned(_high(words)).view(-1, 4, 32)
    out.view(-1, 8, 32).mul_(scales).sub_(minima)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    scales, minima = _scales_and_minima(blocks)
    words = _words(blocks, 48, 176).view(-1, 4, 8)
    codes = _parts(_words(blocks, 16, 48), width=8, bits=1).view(-1, 4, 2, 8)
    codes.bitwise_left_shift_(4)
    codes[:, :, 0] |= words & _LOW
    codes[:, :, 1] |= _high(words)
    out.copy_(_unsigned(codes).flatten(1)).view(-1, 8, 32).mul_(scales).sub_(minima)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208)).unsqueeze(-1)
    words = _words(blocks, 0, 128).view(-1, 2, 2, 8)
    codes = _parts(_words(blocks, 128, 192), width=8, bits=2)  # (n, 2, 4, 8)
    codes.bitwise_left_shift_(4)
    codes[:, :, :2] |= words & _LOW
    codes[:, :, 2:] |= _high(words)
    out.copy_(_signed(codes, 32).flatten(1)).view(-1, 16, 16).mul_(scales)


PACKINGS: Final = {
    2: Packing("Q4_0", 32, 18, _q4_0),
    3: Packing("Q4_1", 32, 20, _q4_1),
    6: Packing("Q5_0", 32, 22, _q5_0),
    7: Packing("Q5_1", 32, 24, _q5_1),
    8: Packing("Q8_0", 32, 34, _q8_0),
    10: Packing("Q2_K", 256, 84, _q2_k),
    11: Packing("Q3_K", 256, 110, _q3_k),
    12: Packing("Q4_K", 256, 144, _q4_k),
    13: Packing("Q5_K", 256, 176, _q5_k),
    14: Packing("Q6_K", 256, 210, _q6_k),
}
"""By their numbers in files."""


def packing_of(number: int) -> Packing:
    """The format with this number; formats not listed above are unpacked by the gguf package.

    Raises ValueError if there is none.
    """
    if number in PACKINGS:
        return PACKINGS[number]
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
    except ImportError as error:
        raise ValueError(
            f"for its numbers of the type {number} install step1x-edit[gguf]"
        ) from error
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise ValueError(f"its numbers of the type {number} are not known") from error
    count, size = GGML_QUANT_SIZES[kind]

    def unpack(blocks: Tensor, out: Tensor) -> None:
        out.copy_(torch.from_numpy(quants.dequantize(blocks.numpy(), kind)))

    try:
        unpack(torch.zeros(1, size, dtype=torch.uint8), torch.empty(1, count))
    except NotImplementedError as error:
        raise ValueError(f"its numbers of the type {kind.name} are not supported") from error
    return Packing(kind.name, count, size, unpack)
