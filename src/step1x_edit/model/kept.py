"""What edits have computed, kept for later edits of the same picture.

A value is found by all that it depends on, so it equals what would be computed again. It waits in
host memory. A `Kept` belongs to one thread; it knows nothing of the meaning of keys and values.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")

HOST = torch.device("cpu")


class Kept:
    """Keeps at most `most` bytes of tensors; what has not been used for the longest goes first."""

    def __init__(self, most: int = 0) -> None:
        self._most = most
        self._size = 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of this key; make it if it is not there.

        A value that was kept has its tensors in host memory, wherever it was made. No caller may
        change them.
        """
        if key in self._values:
            self._values.move_to_end(key)
            return cast("T", self._values[key][0])
        value = make()
        size = size_of(value)
        if size <= self._most:
            self._values[key] = moved(value, HOST), size
            self._size += size
        while self._size > self._most:
            _, (_, freed) = self._values.popitem(last=False)
            self._size -= freed
        return value

    def clear(self) -> bool:
        """Forget everything; returns whether there was anything."""
        was_empty = not self._values
        self._values.clear()
        self._size = 0
        return not was_empty


def moved(value: T, device: torch.device) -> T:
    """The same value with its tensors on a device."""
    return cast("T", _mapped(value, lambda tensor: tensor.to(device)))


def size_of(value: object) -> int:
    """The bytes of memory that the tensors of a value keep alive."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    _mapped(value, note)
    return sum(sizes.values())


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or lists, tuples and dataclasses of tensors, with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(each, change) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        changed = {name: _mapped(each, change) for name, each in fields.items()}
        return dataclasses.replace(value, **changed)
    return value
