"""Importing torch, and of transformers only the network that a checkpoint needs.

`import transformers` reads the 1,600 files of all its models to list their names, and on the way
to any model it imports torch's compiler, torch's collectives and, if it finds them, scipy and
scikit-learn. One process on one device that runs its network as it is written needs none of that;
without it the import takes a third of the time. Nothing here changes what the network computes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any, Final

log = logging.getLogger(__name__)

_LEFT_OUT: Final = ("scipy", "sklearn", "torchvision")
"""For losses, a kind of sampling and processors of pictures that no checkpoint of ours uses. A
torchvision that does not fit torch cannot even be imported."""

_PACKAGES: Final = ("transformers", "transformers.models")
"""Their own code only lists what is below them."""

_COMPILER: Final = ("torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op")

_one_at_a_time: Final = threading.Lock()


def import_libraries() -> None:
    """Import torch, and transformers as far as it is used; other threads wait until that is done.

    They make millions of objects that live to the end, so the garbage collector pauses and
    ignores them afterwards.
    """
    with _one_at_a_time:
        _import_without_collecting()


def _import_without_collecting() -> None:
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401

        if "transformers" not in sys.modules:
            _import_network()
        # A torchvision that does not fit torch cannot be imported, and is not needed here.
        with _replaced({"torchvision": None}):
            from transformers.utils import logging as their_logging

            import step1x_edit.checkpoints.read  # noqa: F401
    finally:
        if collects:
            gc.enable()
    # Our own bars report the progress; those of transformers would fill the log of a server.
    their_logging.disable_progress_bar()
    gc.freeze()


def _import_network() -> None:
    """Import our modules that use transformers, without what they do not need.

    Every stand-in is gone afterwards: a later import finds the real module. If another version of
    transformers cannot be imported like this, nothing is left of the attempt.
    """
    before = set(sys.modules)
    stand_ins: dict[str, ModuleType | None] = dict.fromkeys(_LEFT_OUT)
    stand_ins |= {name: _Compiler(name) for name in _COMPILER}
    try:
        with _replaced(stand_ins), _alone(), _bare_packages(), _unlisted():
            import step1x_edit.checkpoints.read  # noqa: F401
    except Exception:  # whatever fails there, the whole package may still work
        log.debug("transformers is imported as a whole", exc_info=True)
        for name in set(sys.modules) - before:
            if name.startswith(("transformers.", "step1x_edit.")):
                del sys.modules[name]


@contextlib.contextmanager
def _replaced(modules: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """Have imports find these instead, unless the real ones are imported; None is not found."""
    hidden = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(hidden)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


class _Later(ModuleType):
    """Stands in for a module, and imports it when something in it is used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


class _Compiler(ModuleType):
    """Stands in for torch's compiler: what is marked for it stays as it is."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unmarked


def _unmarked(function: Any = None, *_: object, **__: object) -> Any:
    """A decorator that changes nothing, with or without arguments."""
    return function if callable(function) else _unmarked


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Have transformers find, and remember, that this process works with no other."""
    import torch

    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = available


@contextlib.contextmanager
def _bare_packages() -> Iterator[None]:
    """Give imports the packages without running the code that lists what is in them."""
    packages: dict[str, ModuleType] = {}
    path = None
    for name in _PACKAGES:
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        packages[name] = importlib.util.module_from_spec(spec)
        path = spec.submodule_search_locations
    vars(packages["transformers"])["__version__"] = importlib.metadata.version("transformers")
    with _replaced(packages):
        yield


@contextlib.contextmanager
def _unlisted() -> Iterator[None]:
    """Have transformers look up names in itself when it needs them, instead of listing all now."""
    names = vars(importlib.import_module("transformers.utils"))
    listed = names["direct_transformers_import"]
    names["direct_transformers_import"] = lambda _: _Later("transformers")
    try:
        yield
    finally:
        names["direct_transformers_import"] = listed
