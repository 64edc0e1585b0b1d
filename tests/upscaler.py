"""Model files that enlarge pictures in a known way, and the real spandrel to run them with.

PyTorch's CPU build has the version that torchvision of PyPI asks for, but that one is built for
CUDA: its operators cannot be loaded, and importing it fails because it describes them. Here they
are declared first. Nothing that is tested calls one. Both are in a folder of their own, so that no
other test finds them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from step1x_edit.channel import (
    Cancel,
    Done,
    Failed,
    Job,
    Offload,
    Progress,
    Report,
)
from step1x_edit.errors import EditCancelledError, Step1XEditError
from step1x_edit.model.request import Pixels
from step1x_edit.worker.edits import PipelineWorker

FOLDER: Final = str(Path(sys.prefix) / "upscale")

_OPERATORS = (
    "_deform_conv2d_backward",
    "_ps_roi_align_backward",
    "_ps_roi_pool_backward",
    "_roi_align_backward",
    "_roi_pool_backward",
    "deform_conv2d",
    "nms",
    "ps_roi_align",
    "ps_roi_pool",
    "qnms",
    "qroi_align",
    "roi_align",
    "roi_pool",
)
_declared: list[torch.library.Library] = []


def need_spandrel() -> None:
    """Import it, or skip the test with the reason."""
    if FOLDER not in sys.path:
        sys.path.append(FOLDER)
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("`make setup` has not installed spandrel")
    if torch.version.cuda is None and not _declared:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in _OPERATORS:
            library.define(f"{name}(Tensor a) -> Tensor")  # type: ignore[no-untyped-call]
        _declared.append(library)
    try:
        import spandrel  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"spandrel cannot be imported: {error}")


def weights(scale: int, channels: int = 3) -> dict[str, torch.Tensor]:
    """An ESRGAN that averages 3×3 pixels, with black around the picture, and repeats the mean."""
    from spandrel.architectures.ESRGAN import ESRGAN

    network = ESRGAN(in_nc=channels, out_nc=channels, num_filters=4, num_blocks=1, scale=scale)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        first, *others = [module for module in network.model if isinstance(module, torch.nn.Conv2d)]
        for layer in (first, *others, *(m[1] for m in network.model if _enlarges(m))):
            for channel in range(channels):
                layer.weight[channel, channel, 1, 1] = 1
        first.weight[range(channels), range(channels)] = 1 / 9
    state: dict[str, torch.Tensor] = network.state_dict()
    return state


def _enlarges(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Sequential)


def write_upscaler(file: Path, scale: int = 4, channels: int = 3) -> Path:
    """A model file that enlarges as `expected` says."""
    if file.suffix == ".pth":
        torch.save({"params_ema": weights(scale, channels)}, file)
    else:
        save_file(weights(scale, channels), file)
    return file


def expected(pixels: Pixels, factor: int) -> Pixels:
    """What such a file makes of a picture."""
    padded = np.pad(pixels.astype(np.float64), ((1, 1), (1, 1), (0, 0)))
    height, width, _ = pixels.shape
    total = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3))
    mean = np.rint(np.asarray(total) / 9).astype(np.uint8)
    return mean.repeat(factor, axis=0).repeat(factor, axis=1)


class WorkerHere:
    """A real worker's model on the engine's own thread: no process, and no pipe."""

    def __init__(self, model: PipelineWorker) -> None:
        self._model = model
        self._reports: Generator[Report, None, None] | None = None
        self._cancelled = -1
        self.is_alive = True

    def __call__(self, ended: Callable[[], None]) -> WorkerHere:
        return self

    def send(self, request: Job | Offload) -> None:
        self._reports = self._work(request)

    def receive(self, timeout_s: float) -> Report | None:
        assert self._reports is not None
        return next(self._reports)

    def cancel(self, request: Cancel) -> None:
        self._cancelled = request.number

    def stop(self, timeout_s: float) -> None:
        self.kill()

    def kill(self) -> None:
        self.is_alive = False

    def _work(self, request: Job | Offload) -> Generator[Report, None, None]:
        if isinstance(request, Offload):
            self._model.offload()
            yield Report(Done(), self._model.residence())
            return

        def check() -> None:
            if self._cancelled == request.number:
                raise EditCancelledError()

        try:
            for event in self._model.edit(request, check):
                yield Report(event, self._model.residence())
                if isinstance(event, Progress):
                    check()
        except Step1XEditError as error:
            yield Report(Failed(error.code, str(error)), self._model.residence())
