"""Linear layers with few bits per weight: 8-bit floats, 8-bit integers or 4 bits.

A matrix W (N, K) is kept as codes and scales. 8-bit codes have one scale per row; 4-bit codes have
one per 64 columns, and two codes share a byte. Rows are coded independently, so that a matrix that
is coded in pieces equals one that is coded at once. If a layer may round its input and the device
has a product for the codes, it multiplies the codes themselves; the input is then rounded to 8
bits, row by row. Otherwise the weights are widened to the input's type first.
"""

from __future__ import annotations

import functools
import itertools
import platform
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x_edit.model.scratch import scratch

Code = Literal["fp8", "int8", "nf4"]
CODES: Final[tuple[Code, ...]] = get_args(Code)

FLOAT8: Final = torch.float8_e4m3fn
FLOAT8_MAX: Final = 448.0
INT8_MAX: Final = 127
NF4_BLOCK: Final = 64
"""Columns that share a scale."""
NF4_VALUES: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of the 16 codes: NormalFloat4 of QLoRA (arXiv 2305.14314), appendix E."""

FIXED_ONE: Final = 2**28
"""A share of a scale is multiplied by this: then all digits of the edges between two codes, and of
the shares beside them, are those of an integer."""
CELL_BITS: Final = 21
"""Bits of a place in a cell: there are 256 cells from -1 to 1."""
FIXED_OFFSET: Final = FIXED_ONE + 2**CELL_BITS
"""Added to a share, which exceeds 1 if its scale was rounded down, so that none is negative."""
CODE_SHIFT: Final = CELL_BITS + 1

SMALLEST: Final = 1e-30
"""Rows with a smaller maximum become zeros."""
INT_MM_ROWS: Final = 17
"""The fewest rows that CUDA's integer product takes."""
OUTPUTS_AT_ONCE: Final = 4096
"""Columns of an integer product that are computed together: their sums take 4 bytes each."""
CPU_OUTPUTS_AT_ONCE: Final = 1024
"""The same on a CPU, where fewer sums pass through the cache faster."""
CPU_SUMS_AT_ONCE: Final = 1024
"""Rows of these sums that a CPU computes together, for the same reason."""
CPU_ROWS_AT_ONCE: Final = 256
"""Rows of a matrix that are coded together, and of 4-bit codes that a CPU widens together, for the
same reason."""
PAIR_TYPES: Final = {2: torch.int32, 4: torch.int64}
"""Integers of the size of two numbers, by the bytes of one."""
ALL_ROWS: Final = slice(None)


class Coded(NamedTuple):
    """A matrix (N, K) as codes and scales."""

    codes: Tensor  # (N, K) in 8 bits; of nf4 (N, ⌈K/64⌉·32) bytes
    scale: Tensor  # (N, 1); of nf4 (N, ⌈K/64⌉)


def code(matrix: Tensor, kind: Code) -> Coded:
    """Round a float32 matrix (N, K) to codes and scales."""
    rows, columns = matrix.shape
    coded = empty((rows, columns), kind, matrix.device)
    code_into(coded, matrix.clone(), kind)
    return coded


def code_into(coded: Coded, matrix: Tensor, kind: Code) -> None:
    """Write the codes and scales of a float32 matrix (N, K), which is overwritten."""
    codes, scale = coded
    match kind:
        case "fp8":
            # Powers of two change no digit: weights that are stored in this type stay exact.
            mantissa, exponent = torch.frexp(_largest(matrix) / FLOAT8_MAX)
            torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int(), out=scale)
            codes.copy_(matrix.div_(scale))
        case "int8":
            # Rounded up to a bfloat16, so that widening to that type rounds only once.
            scale.copy_(_up_to_bfloat16(_largest(matrix) / INT8_MAX))
            codes.copy_(matrix.div_(scale).round_())
        case "nf4":
            if missing := -matrix.shape[1] % NF4_BLOCK:
                matrix = F.pad(matrix, (0, missing))
            blocks = matrix.view(matrix.shape[0], -1, NF4_BLOCK)  # (N, ⌈K/64⌉, 64)
            scale.copy_(_largest(blocks).squeeze(-1))
            blocks.div_(scale.float().unsqueeze(-1))
            _nf4_codes(codes, matrix.view(-1))


def _nf4_codes(codes: Tensor, shares: Tensor) -> None:
    """Write the codes, two per byte, of shares of a scale: from -1 to 1, flat, overwritten.

    A code is the number of edges, the middles between two values, that are below the share. The
    line is cut into cells that hold at most one edge each, so that one lookup per share finds what
    decides: more than ten times as fast on a CPU as searching the edges.
    """
    fixed = shares.mul_(FIXED_ONE).view(torch.int32).copy_(shares).add_(FIXED_OFFSET)
    cells = scratch("cells", fixed.shape, torch.int32)
    found = scratch("what the cells add", fixed.shape, torch.int32)
    torch.bitwise_right_shift(fixed, CELL_BITS, out=cells)
    fixed += torch.index_select(_nf4_cells(), 0, cells, out=found)
    pairs = fixed.bitwise_right_shift_(CODE_SHIFT).to(torch.uint8).view(torch.int16)
    codes.view(-1).copy_((pairs << 4).bitwise_or_(pairs >> 8))


@functools.cache
def _nf4_cells() -> Tensor:
    """What is added to a share in each cell, to find its code in the bits above `CODE_SHIFT`.

    With n edges below a cell and one in it, shares up to that edge end below (n + 1) · 2^CODE_SHIFT
    and those above it do not. A cell without an edge ends like one whose last number is an edge.
    """
    values = torch.tensor(NF4_VALUES)
    edges = ((values[1:] + values[:-1]) / 2 * FIXED_ONE).long() + FIXED_OFFSET
    cells = torch.arange(2 * FIXED_OFFSET >> CELL_BITS)
    below = torch.bucketize(cells, edges >> CELL_BITS)
    ends = (cells + 1 << CELL_BITS) - 1
    ends[edges >> CELL_BITS] = edges
    return ((below + 1 << CODE_SHIFT) - ends - 1).int()


def empty(shape: tuple[int, int], kind: Code, device: torch.device | str | None = None) -> Coded:
    """Allocate the codes and scales of a matrix of this shape."""
    rows, columns = shape
    if kind == "nf4":
        blocks = -(-columns // NF4_BLOCK)
        return Coded(
            torch.empty(rows, blocks * NF4_BLOCK // 2, dtype=torch.uint8, device=device),
            torch.empty(rows, blocks, dtype=torch.bfloat16, device=device),
        )
    dtype = FLOAT8 if kind == "fp8" else torch.int8
    return Coded(
        torch.empty(rows, columns, dtype=dtype, device=device),
        torch.empty(rows, 1, dtype=torch.float32, device=device),
    )


class QuantLinear(nn.Module):
    """A linear layer whose weights are codes; the bias is unchanged."""

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: Code,
        bias: nn.Parameter | None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.may_round_input = False
        """Whether a GPU may multiply the codes."""
        coded = empty((out_features, in_features), kind, device)
        self.register_buffer("codes", coded.codes)
        self.register_buffer("scale", coded.scale)
        if kind == "nf4":
            # The values of a byte's upper and lower half.
            values = torch.tensor(NF4_VALUES)
            pairs = torch.cartesian_prod(values, values)  # (256, 2)
            self.register_buffer("pairs", pairs, persistent=False)
        self.bias = bias

    @classmethod
    def like(cls, linear: nn.Linear, kind: Code) -> QuantLinear:
        """Allocate a layer of the same shape, with the same bias."""
        device = linear.weight.device
        return cls(linear.in_features, linear.out_features, kind, linear.bias, device)

    @classmethod
    def of(cls, linear: nn.Linear, kind: Code) -> QuantLinear:
        """Return the layer with its weights rounded."""
        made = cls.like(linear, kind).to(linear.weight.device)
        for rows in made._pieces():
            made.codes[rows], made.scale[rows] = code(linear.weight[rows].detach().float(), kind)
        return made

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weights of the codes, (N, K)."""
        if self.kind != "nf4":
            return self.codes.to(dtype).mul_(self.scale.to(dtype))
        scale = self.scale.unsqueeze(-1).to(dtype)  # (N, ⌈K/64⌉, 1)
        if self.codes.is_cuda:
            return self._cut(self._values(dtype, ALL_ROWS) * scale)
        weight = scale.new_empty(*self.scale.shape, NF4_BLOCK)
        for rows in self._pieces():
            torch.mul(self._values(dtype, rows), scale[rows], out=weight[rows])
        return self._cut(weight)

    def as_int8(self) -> Coded:
        """Return int8 codes, (N, K), of nf4 ones: this adds a tenth of a percent to their error."""
        if self.kind == "int8":
            return Coded(self.codes, self.scale)
        scale = self.scale.float()  # (N, ⌈K/64⌉)
        row_scale = scale.amax(1, keepdim=True) / INT8_MAX  # (N, 1)
        factor = (scale / row_scale).unsqueeze(-1)
        codes = scale.new_empty(*scale.shape, NF4_BLOCK, dtype=torch.int8)
        for rows in self._pieces():
            codes[rows] = self._values(torch.float32, rows).mul_(factor[rows]).round_()
        return Coded(self._cut(codes), row_scale)

    def _values(self, dtype: torch.dtype, rows: slice) -> Tensor:
        """The values of 4-bit codes, without their scales: (rows, ⌈K/64⌉, 64)."""
        assert isinstance(self.pairs, Tensor)
        # A pair is looked up as one number of its size: five times as fast on a CPU.
        pairs = self.pairs.to(dtype).view(PAIR_TYPES[dtype.itemsize]).flatten()
        found = pairs.index_select(0, self.codes[rows].flatten().int())
        return found.view(dtype).view(-1, self.scale.shape[1], NF4_BLOCK)

    def _pieces(self) -> Iterator[slice]:
        """The rows, in pieces that fit in a CPU's cache."""
        for first in range(0, self.out_features, CPU_ROWS_AT_ONCE):
            yield slice(first, first + CPU_ROWS_AT_ONCE)

    def _cut(self, blocks: Tensor) -> Tensor:
        """A matrix in blocks of 64 columns, (N, ⌈K/64⌉, 64), as (N, K)."""
        return blocks.flatten(1)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., K) to (..., N)."""
        if not (self.may_round_input and self.can_multiply_codes(x)):
            return F.linear(x, self.weight(x.dtype), self.bias)
        if not x.is_cuda:
            return multiply_int8_on_cpu(x, *self.as_int8(), self.bias)
        multiply = multiply_float8 if self.kind == "fp8" else multiply_int8
        rows = x.reshape(-1, self.in_features)
        product = multiply(rows, self.codes, self.scale, self.bias)
        return product.view(*x.shape[:-1], self.out_features)

    def can_multiply_codes(self, x: Tensor) -> bool:
        """Whether the device has a product for these codes and sizes."""
        if x.device.type == "cpu":
            return self.kind != "fp8" and _cpu_multiplies_int8()
        if not x.is_cuda:
            return False
        match self.kind:
            case "fp8":
                fits = self.in_features % 16 == 0 and self.out_features % 16 == 0
                # The product supports bfloat16 only.
                return fits and x.dtype == torch.bfloat16 and _capability(x.device.index) >= (8, 9)
            case "int8":
                fits = self.in_features % 8 == 0 and self.out_features % 8 == 0
                are_enough = x.numel() >= INT_MM_ROWS * self.in_features
                return fits and are_enough and _capability(x.device.index) >= (7, 5)
            case "nf4":
                return False

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


def multiply_float8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) in bfloat16 times the codes (N, K): (M, N), both as 8-bit floats."""
    x_scale = _largest(x).float() / FLOAT8_MAX  # (M, 1)
    # Rounding may exceed the largest number of the type, which has no infinity.
    x_codes = (x.float() / x_scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    product: Tensor = torch._scaled_mm(
        x_codes,
        codes.t(),
        scale_a=x_scale,
        scale_b=scale.t(),
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,  # its rounding error is far below that of the codes
    )
    return product


def multiply_int8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) times the codes (N, K): (M, N), both as 8-bit integers."""
    x_scale = _largest(x).float() / INT8_MAX  # (M, 1)
    x_codes = (x.float() / x_scale).round().to(torch.int8)
    out = x.new_empty(x.shape[0], codes.shape[0])
    for first in range(0, codes.shape[0], OUTPUTS_AT_ONCE):
        part = slice(first, first + OUTPUTS_AT_ONCE)
        product = torch._int_mm(x_codes, codes[part].t()) * x_scale * scale[part].t()
        out[:, part] = product if bias is None else product + bias[part]
    return out


def multiply_int8_on_cpu(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., M, K) times the codes (N, K): (..., M, N), both as 8-bit integers.

    A row is the mean of the M rows, plus its own centre c, plus a rest. The mean is multiplied with
    15 bits, as two more rows, and c with the sum of the codes, as one more; only the rest is
    rounded to 8 bits, which leaves it finer steps. In the mean, rows with larger numbers have less
    weight: a single one of them must not be found in the rests of all others.
    """
    rows = x.reshape(-1, *x.shape[-2:])  # (B, M, K)
    pictures, length, columns = rows.shape
    weights = 1 / _largest(rows).float()  # (B, M, 1)
    weights /= weights.sum(1, keepdim=True)
    mean = (weights.to(rows.dtype).mT @ rows).float()  # (B, 1, K)
    counts = [pictures, pictures, 1]
    common = torch.ones(sum(counts), columns, dtype=torch.int8)
    high, low, _ = torch.split(common, counts)
    high_scale = _round(mean, high.unsqueeze(1))
    low_scale = _round(mean - high.unsqueeze(1) * high_scale, low.unsqueeze(1))
    centre, rest_scale = mean.new_empty(2, pictures, length, 1)
    rest = torch.empty(rows.shape, dtype=torch.int8)
    for first in range(0, length, CPU_ROWS_AT_ONCE):
        piece = slice(first, first + CPU_ROWS_AT_ONCE)
        own = rows[:, piece] - mean
        least, most = own.amin(-1, keepdim=True), own.amax(-1, keepdim=True)
        centre[:, piece] = (least + most) / 2
        own -= centre[:, piece]
        rest_scale[:, piece] = _round(own, rest[:, piece])
    out = x.new_empty(pictures, length, codes.shape[0])
    for first in range(0, codes.shape[0], CPU_OUTPUTS_AT_ONCE):
        part = slice(first, first + CPU_OUTPUTS_AT_ONCE)
        sums = torch._int_mm(common, codes[part].t()).float()
        of_high, of_low, of_ones = torch.split(sums, counts)
        of_mean = of_high.unsqueeze(1) * high_scale + of_low.unsqueeze(1) * low_scale
        offset = of_mean * scale[part].t()  # (B, 1, N)
        if bias is not None:
            offset += bias[part]
        starts = range(0, length, CPU_SUMS_AT_ONCE)
        for picture, start in itertools.product(range(pictures), starts):
            piece = slice(start, start + CPU_SUMS_AT_ONCE)
            of_rest = torch._int_mm(rest[picture, piece], codes[part].t()).float()
            of_rest.mul_(rest_scale[picture, piece]).addcmul_(centre[picture, piece], of_ones)
            torch.addcmul(offset[picture], of_rest, scale[part].t(), out=out[picture, piece, part])
    return out.view(*x.shape[:-1], -1)


def _round(x: Tensor, codes: Tensor) -> Tensor:
    """Write x as 8-bit integers into the codes, and return the scale of each row."""
    scale = _largest(x) / INT8_MAX
    codes.copy_((x / scale).round_())
    return scale


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cpu_multiplies_int8() -> bool:
    """Whether this processor multiplies 8-bit integers faster than it widens them."""
    return _has_exact_products()


@functools.cache
def _has_exact_products() -> bool:
    """Whether sums of products are exact: then the processor has VNNI or AMX.

    Others add two products in 16 bits, which is too narrow for the largest ones. Only x86 has been
    measured.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    largest = torch.full((64, 64), INT8_MAX, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest) == 64 * INT8_MAX**2).all())


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude along the last axis, which is kept; never 0, to divide by it."""
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return torch.maximum(most, -least).clamp_(min=SMALLEST)


def _up_to_bfloat16(x: Tensor) -> Tensor:
    """Round x up to bfloat16; returned in float32."""
    rounded = x.bfloat16()
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded < x, above, rounded).float()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(index: int) -> tuple[int, int]:
    """The compute capability of a GPU."""
    return torch.cuda.get_device_capability(index)
