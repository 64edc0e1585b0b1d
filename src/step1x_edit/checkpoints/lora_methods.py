"""What the tensors of an adapter do to the weights of one module, by the method that made them.

Each change is a difference from the unchanged weight, so changes of several files add up in any
order, and a strength scales all of them alike. The module knows neither files nor names of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import torch
from torch import Tensor

Base: TypeAlias = Callable[[], Tensor]
"""Returns the unchanged weight, in float32. Only some methods call it."""

Scale: TypeAlias = Callable[[int | None], float]
"""The factor of a product of this rank; None if no matrix of the module has the rank."""

Found: TypeAlias = dict[str, Tensor]
"""Tensors of one module, by their roles."""


class Change(Protocol):
    """The change of one weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it changes."""
        ...

    def delta(self, base: Base) -> Tensor:
        """The difference at full strength, in float32."""
        ...


@dataclass(frozen=True)
class LowRank:
    """LoRA: scale · up·down."""

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError for matrices that cannot be multiplied."""
        down, up = self.down.shape, self.up.shape
        if len(down) != 2 or len(up) != 2 or up[1] != down[0] or not (down[1] and up[0]):
            raise ValueError(f"matrices that do not fit: {tuple(down)} and {tuple(up)}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    def delta(self, base: Base) -> Tensor:
        return self.scale * (self.up.float() @ self.down.float())


@dataclass(frozen=True)
class Rows:
    """Separate changes of consecutive rows."""

    parts: tuple[Change, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:]

    def delta(self, base: Base) -> Tensor:
        return torch.cat([part.delta(base) for part in self.parts])


@dataclass(frozen=True)
class Hadamard:
    """LoHa (arXiv 2108.06098): scale · (a₁·b₁) ⊙ (a₂·b₂)."""

    one: LowRank
    two: LowRank
    scale: float

    def __post_init__(self) -> None:
        """Raise ValueError for factors of different shapes."""
        if self.one.shape != self.two.shape:
            raise ValueError(f"matrices that do not fit: {self.one.shape} and {self.two.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.one.shape

    def delta(self, base: Base) -> Tensor:
        return self.scale * (self.one.delta(base) * self.two.delta(base))


@dataclass(frozen=True)
class Kronecker:
    """LoKr (arXiv 2309.14859): scale · w₁ ⊗ w₂."""

    one: Change
    two: Change
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(a * b for a, b in zip(self.one.shape, self.two.shape, strict=True))

    def delta(self, base: Base) -> Tensor:
        return self.scale * torch.kron(self.one.delta(base), self.two.delta(base))


@dataclass(frozen=True)
class Difference:
    """The difference itself."""

    values: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def delta(self, base: Base) -> Tensor:
        return self.scale * self.values.float()


@dataclass(frozen=True)
class Replacement:
    """A new value of the whole weight."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def delta(self, base: Base) -> Tensor:
        return self.values.float() - base()


@dataclass(frozen=True)
class Decomposed:
    """DoRA (arXiv 2402.09353): m · (W + ΔW) / ‖W + ΔW‖, the norm by rows or by columns."""

    change: Change
    magnitude: Tensor  # (out,) or (out, 1) by rows, (1, in) by columns

    def __post_init__(self) -> None:
        """Raise ValueError for a magnitude of another shape."""
        shape, found = self.change.shape, tuple(self.magnitude.shape)
        if len(shape) != 2 or found not in (shape[:1], (shape[0], 1), (1, shape[1])):
            raise ValueError(f"a magnitude that does not fit: {found} for {shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.change.shape

    def delta(self, base: Base) -> Tensor:
        before = base()
        after = before + self.change.delta(base)
        across = 0 if tuple(self.magnitude.shape) == (1, self.shape[1]) else 1
        norm = after.norm(dim=across, keepdim=True)
        after /= norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return after.mul_(self.magnitude.float().reshape(norm.shape)).sub_(before)


def changes(found: Found, scale: Scale) -> Iterator[tuple[str, Change]]:
    """The changes that tensors describe, each with the parameter: `weight` or `bias`.

    Takes the tensors that it understands out of `found`. Raises KeyError if one is missing, and
    ValueError if they do not fit each other.
    """
    weight = [make(found, scale) for role, make in _METHODS.items() if role in found]
    if "magnitude" in found and weight:
        weight[0] = Decomposed(weight[0], found.pop("magnitude"))
    yield from (("weight", change) for change in weight)
    yield from (("bias", make(found, scale)) for role, make in _OF_BIASES.items() if role in found)


def _low_rank(found: Found, scale: Scale) -> Change:
    down, up = found.pop("down"), found.pop("up")
    factor = scale(down.shape[0])
    if "up_bias" in found:
        found["scaled_bias"] = factor * found.pop("up_bias").float()
    return LowRank(down, up, factor)


def _rows(found: Found, scale: Scale) -> Change:
    """Of sd-scripts: a product for each part of a fused matrix."""
    count = sum(role.startswith("down_") for role in found)
    parts = [(found.pop(f"down_{i}"), found.pop(f"up_{i}")) for i in range(count)]
    return Rows(tuple(LowRank(down, up, scale(down.shape[0])) for down, up in parts))


def _hadamard(found: Found, scale: Scale) -> Change:
    one, two = (
        LowRank(found.pop(f"hada_{part}_b"), found.pop(f"hada_{part}_a")) for part in ("w1", "w2")
    )
    return Hadamard(one, two, scale(one.down.shape[0]))


def _kronecker(found: Found, scale: Scale) -> Change:
    factors = {part: _factor(found, f"lokr_{part}") for part in ("w1", "w2")}
    ranks = [each.down.shape[0] for each in factors.values() if isinstance(each, LowRank)]
    return Kronecker(factors["w1"], factors["w2"], scale(ranks[-1] if ranks else None))


def _factor(found: Found, role: str) -> Difference | LowRank:
    if role not in found:
        return LowRank(found.pop(f"{role}_b"), found.pop(f"{role}_a"))
    factor = Difference(found.pop(role))
    if len(factor.shape) != 2:
        raise ValueError(f"a factor that is no matrix: {factor.shape}")
    return factor


_METHODS: Final[Mapping[str, Callable[[Found, Scale], Change]]] = {
    "down": _low_rank,
    "down_0": _rows,
    "hada_w1_a": _hadamard,
    "lokr_w1": _kronecker,
    "lokr_w1_a": _kronecker,
    "diff": lambda found, _: Difference(found.pop("diff")),
    "whole": lambda found, _: Replacement(found.pop("whole")),
}
"""How a weight changes, by a role that each method has."""

_OF_BIASES: Final[Mapping[str, Callable[[Found, Scale], Change]]] = {
    "scaled_bias": lambda found, _: Difference(found.pop("scaled_bias")),
    "diff_b": lambda found, _: Difference(found.pop("diff_b")),
    "whole_b": lambda found, _: Replacement(found.pop("whole_b")),
}
