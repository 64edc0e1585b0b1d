"""A second device for a machine that has none: it computes like the host, and mixes with no other.

A tensor left on the host fails beside one of this device, as it would beside one on a GPU; if the
host itself replaces the device, such a tensor goes unnoticed. The numbers are computed in host
memory, so that results can be compared. It intercepts only a thread's own operations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from step1x_edit.checkpoints.arena import Arena, Weight

_setup_privateuseone_for_python_backend("second")
# What runs on the host asks this of every device.
torch.second.get_amp_supported_dtype = list  # type: ignore[attr-defined]
SECOND: Final = torch.device("second:0")

_aten = torch.ops.aten
_CROSSING: Final = frozenset({_aten._to_copy.default, _aten.copy_.default})
"""The operators that take tensors of both devices."""
_INDEXING: Final = frozenset(
    {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
)
"""The operators that take indices from the host."""


class SecondTensor(Tensor):
    """A tensor of the second device; `host` holds its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> SecondTensor:
        # Views of tensors known to autograd must be known to it too, and others must not.
        with torch.inference_mode(host.is_inference()):
            made = Tensor._make_wrapper_subclass(
                cls,
                host.size(),
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                device=SECOND,
            )
        made.host = host
        assert isinstance(made, SecondTensor)
        return made

    def tolist(self) -> Any:
        return self.host.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor of the second device to numpy")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it on the class
        cls,
        operator: Any,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _run(operator, args, dict(kwargs or {}))


class _Factories(TorchDispatchMode):
    """Also intercepts tensors that are created on the second device or moved to it."""

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if operator._can_decompose():  # such as `to`, which inference does not decompose
            with self:
                made = operator.decompose(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        return _run(operator, args, dict(kwargs or {}))


def _run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute it on the host; the result is on the device of the inputs, or where it is sent."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_second = any(isinstance(each, SecondTensor) for each in tensors)
    if is_second and operator not in _CROSSING:
        _refuse_to_mix(operator, args, tensors)
    if kwargs.get("device") is not None:
        is_second = torch.device(kwargs["device"]).type == SECOND.type
        kwargs["device"] = torch.device("cpu")
    result = operator(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))
    if operator is _aten.copy_.default:  # to either device
        return args[0]
    known = {id(_on_host(each)): each for each in tensors}  # changed in place

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        return SecondTensor(value) if is_second else value

    return tree_map(placed, result)


def _refuse_to_mix(operator: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Fail as a GPU does; a single number may come from the host."""
    strangers = [each for each in tensors if not isinstance(each, SecondTensor) and each.dim()]
    if not strangers or (operator in _INDEXING and isinstance(args[0], SecondTensor)):
        return
    shapes = ", ".join(f"{tuple(each.shape)} {each.dtype}" for each in strangers)
    raise RuntimeError(f"{operator} meets tensors of the host on the second device: {shapes}")


def _on_host(value: Any) -> Any:
    return value.host if isinstance(value, SecondTensor) else value


@contextlib.contextmanager
def second_device() -> Iterator[torch.device]:
    """Provide the device to this thread."""
    with pytest.MonkeyPatch.context() as patch, _Factories():
        for name in ("tensor", "as_tensor"):  # no hook intercepts these
            patch.setattr(torch, name, _sent_afterwards(getattr(torch, name)))
        # A parameter cannot take data of another class: it is created again.
        patch.setattr(Arena, "bind", _bind)
        patch.setattr(Arena, "empty", _empty)
        yield SECOND


def _sent_afterwards(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        numbers = tree_map(lambda leaf: leaf.tolist() if _is_second(leaf) else leaf, data)
        tensor = make(numbers, **options)
        return tensor if device is None else tensor.to(device)

    return made


def _is_second(value: Any) -> bool:
    return isinstance(value, SecondTensor)


def _bind(arena: Arena, memories: Mapping[str, Tensor]) -> None:
    for name, memory in memories.items():
        for place in arena._places[name]:
            _put(place.weight, place.view(memory))


def _empty(arena: Arena, block: str, device: torch.device) -> None:
    for place in arena._places[block]:
        _put(place.weight, torch.empty(0, dtype=place.weight.dtype, device=device))


def _put(weight: Weight, data: Tensor) -> None:
    is_parameter = isinstance(weight.tensor, nn.Parameter)
    made = nn.Parameter(data, requires_grad=False) if is_parameter else data
    setattr(weight.module, weight.attribute, made)
