"""Upscaling: a model file of the user enlarges a finished picture, tile by tile.

The library spandrel, of the extra `step1x-edit[upscale]`, builds the network that fits the file.
The network stays in host memory between pictures, and is where the edit computes only while it
enlarges one. This module knows nothing of edits, of transparency and of profiles.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional as F

from step1x_edit.channel import GIGA, Painted, Phase, Progress
from step1x_edit.checkpoints.arena import Check
from step1x_edit.engine.machine import check_upscale_model
from step1x_edit.errors import (
    CheckpointError,
    InvalidParameterError,
    ModelUnavailableError,
    Step1XEditError,
)
from step1x_edit.model.request import Pixels
from step1x_edit.worker.memory import is_out_of_memory

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

log = logging.getLogger(__name__)

TILES: Final = (256, 128)
"""The side of a tile in pixels of the smaller picture; the next one if memory runs out."""
CONTEXT: Final = 32
"""Pixels around a tile that the network sees too. Its result there is left out, so no seam shows
unless a network looks further."""
_LARGEST: Final = 2 * GIGA
"""Bytes of a file; the largest published upscalers have a quarter of that."""


@dataclass(frozen=True)
class _Loaded:
    network: ImageModelDescriptor[torch.nn.Module]
    sha256: str

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        module = self.network.model
        tensors = itertools.chain(module.parameters(), module.buffers())
        return sum(tensor.nbytes for tensor in tensors)


class Upscaler:
    """Enlarges pictures with the network of a file, which is read when it is first needed."""

    def __init__(self, path: str | None, place: torch.device | None) -> None:
        """`place` is where it computes; None: in host memory."""
        self._path = None if path is None else Path(path)
        self._place = place or torch.device("cpu")
        self._loaded: _Loaded | None = None

    @property
    def size(self) -> int:
        """Bytes of host memory that hold its weights."""
        return 0 if self._loaded is None else self._loaded.size

    @property
    def scale(self) -> int:
        """How many times the network enlarges; reads the file if necessary.

        Raises InvalidParameterError without a file, and ModelUnavailableError if it cannot be used.
        """
        scale: int = self._load().network.scale
        return scale

    def check(self, factor: int) -> None:
        """Raise an error unless it can enlarge this many times; reads the file if necessary."""
        scale = self.scale
        if scale % factor:
            usable = [str(other) for other in (2, 4) if scale % other == 0]
            instead = f"use upscale {' or '.join(usable)}, or " if usable else ""
            raise InvalidParameterError(
                f"upscale {factor} needs a model that enlarges {factor} times, and the one of "
                f"UPSCALE_MODEL enlarges {scale} times; {instead}set another one",
                param="upscale",
            )

    def enlarge(
        self, image: Pixels, factor: int, tile: int, check: Check
    ) -> Generator[Progress | Painted, None, None]:
        """Yield progress and finally the picture, made of tiles with this side.

        If the network enlarges more, its result is reduced by the mean of whole squares of pixels.
        """
        self.check(factor)
        loaded = self._load()
        height, width, _ = image.shape
        enlarged = np.empty((height * factor, width * factor, 3), np.uint8)
        corners = [*itertools.product(range(0, height, tile), range(0, width, tile))]
        with self._computing(loaded, check) as network:
            yield Progress(Phase.UPSCALING, 0, len(corners))
            for number, (top, left) in enumerate(corners, start=1):
                above, before = min(top, CONTEXT), min(left, CONTEXT)
                seen = image[
                    top - above : top + tile + CONTEXT, left - before : left + tile + CONTEXT
                ]
                made = _pixels(network(_tensor(seen, self._place)), network.scale // factor)
                target = enlarged[
                    top * factor : (top + tile) * factor, left * factor : (left + tile) * factor
                ]
                rows, columns, _ = target.shape
                made = made[above * factor :, before * factor :]
                target[:] = made[:rows, :columns]
                yield Progress(Phase.UPSCALING, number, len(corners))
        yield Painted(enlarged, upscaler_sha256=loaded.sha256)

    @contextlib.contextmanager
    def _computing(
        self, loaded: _Loaded, check: Check
    ) -> Iterator[ImageModelDescriptor[torch.nn.Module]]:
        """The network where it computes; `check` is called before each of its layers."""

        def before_layer(*_: object) -> None:
            check()

        with contextlib.ExitStack() as hooks:
            for module in loaded.network.model.modules():
                hooks.callback(module.register_forward_pre_hook(before_layer).remove)
            try:
                yield loaded.network.to(self._place)
            finally:
                loaded.network.cpu()

    def _load(self) -> _Loaded:
        if self._loaded is None:
            check_upscale_model(self._path)
            assert self._path is not None
            data = _read(self._path)
            network = _network_of(_weights(data, self._path.suffix.lower()))
            self._loaded = _Loaded(network, hashlib.sha256(data).hexdigest())
            log.info("UPSCALE_MODEL: %s, %.2f GB", self._path.name, self.size / GIGA)
        return self._loaded


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise CheckpointError(f"UPSCALE_MODEL has {size / GIGA:.1f} GB: it is no upscaler")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"UPSCALE_MODEL cannot be read ({error.strerror})") from None


def _weights(data: bytes, suffix: str) -> dict[str, Any]:
    """The tensors in a file; a pickle is only read as far as it contains weights."""
    try:
        if suffix == ".safetensors":
            tensors: dict[str, Any] = load(data)
            return tensors
        found = torch.load(  # noqa: TID251 - upscalers are published like this; runs no code
            io.BytesIO(data), map_location="cpu", weights_only=True
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        log.info("UPSCALE_MODEL cannot be read", exc_info=True)
        raise CheckpointError(
            f"UPSCALE_MODEL is no {suffix} file with nothing but weights; the log says more"
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError("UPSCALE_MODEL has no weights with names")
    return found


def _network_of(weights: dict[str, Any]) -> ImageModelDescriptor[torch.nn.Module]:
    """The network that these weights belong to."""
    try:
        import spandrel
    except (ImportError, OSError, RuntimeError):  # RuntimeError: operators that are not there
        log.info("spandrel cannot be imported", exc_info=True)
        raise ModelUnavailableError(
            f"upscale needs a torchvision that fits torch {torch.__version__}; install both from "
            "the same package index"
        ) from None
    try:
        named = spandrel.canonicalize_state_dict(weights)
        network = spandrel.ModelLoader().load_from_state_dict(named).eval()
    except spandrel.UnsupportedModelError:
        raise CheckpointError(
            "UPSCALE_MODEL is of no architecture that spandrel knows; use another file"
        ) from None
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, Step1XEditError):
            raise
        log.info("UPSCALE_MODEL cannot be used", exc_info=True)
        raise CheckpointError(
            "UPSCALE_MODEL is damaged, or of no architecture that spandrel knows; the log says more"
        ) from None
    is_for_pictures = isinstance(network, spandrel.ImageModelDescriptor)
    if not is_for_pictures or network.scale < 2 or network.input_channels != 3:
        raise CheckpointError("UPSCALE_MODEL does not enlarge pictures in colour; use another file")
    return network


def _tensor(pixels: Pixels, place: torch.device) -> Tensor:
    """As (1, 3, H, W) from 0 to 1."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return tensor.to(place, torch.float32)[None] / 255


@torch.inference_mode()
def _pixels(made: Tensor, times: int) -> Pixels:
    """The inverse, each side divided by `times`."""
    if not made.isfinite().all():
        raise CheckpointError("UPSCALE_MODEL makes values that are not numbers; use another file")
    if times > 1:
        made = F.avg_pool2d(made, times)
    pixels: Pixels = (made[0] * 255).round().to(torch.uint8).cpu().numpy().transpose(1, 2, 0)
    return pixels
