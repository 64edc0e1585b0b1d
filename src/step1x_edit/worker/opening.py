"""Opening the checkpoint that a worker is started with, as the memory of this machine allows.

Torch, and what needs it, is imported inside functions: it takes seconds and may fail.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from step1x_edit.channel import GIGA, Start
from step1x_edit.engine import host_memory
from step1x_edit.engine.host_memory import HostMemory
from step1x_edit.errors import CheckpointError, ModelUnavailableError

if TYPE_CHECKING:
    import torch

    from step1x_edit.checkpoints.arena import Block, Weight
    from step1x_edit.checkpoints.memory_plan import MemoryPlan, Rates
    from step1x_edit.checkpoints.read import OpenedCheckpoint, Wanted
    from step1x_edit.schemas.requests import Arithmetic, Precision

logger = logging.getLogger(__name__)

STAND_IN: Final = "stand-in"
"""A device for tests: a second copy in host memory takes the GPU's place."""

MeasureHost: TypeAlias = Callable[[], HostMemory | None]
"""Returns the memory of the host and how much of it is free; None if unknown."""

MeasureRates: TypeAlias = "Callable[[OpenedCheckpoint, torch.device | None], Rates]"
"""Returns how fast this machine reads a checkpoint and computes with it."""


def place_of(device: str) -> torch.device | None:
    """The device of this name; None if the model computes in host memory."""
    import torch

    if device == "cpu":
        return None
    return torch.device("cpu" if device == STAND_IN else device)


def plan_for(place: torch.device | None, blocks: Sequence[Block]) -> MemoryPlan:
    """The part of the model that fits on the device, by the memory that is free there now."""
    import torch

    from step1x_edit.checkpoints.memory_plan import everything, fitting

    if place is None or place.type != "cuda":
        return everything(blocks)
    free, _ = torch.cuda.mem_get_info(place)
    return fitting(blocks, free)


def chosen_device(start: Start) -> str:
    """The name of the device to compute on.

    Raises ModelUnavailableError if an edit needs more GPUs than there are.
    """
    import torch

    name = start.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if start.gpus_per_edit == 1 or name != "cuda":
        return name
    found = torch.cuda.device_count()
    if found < start.gpus_per_edit:
        raise ModelUnavailableError(
            f"GPUS_PER_EDIT is {start.gpus_per_edit} and torch finds {found} here: set a lower "
            "GPUS_PER_EDIT, or make more GPUs visible"
        )
    return f"cuda:{start.rank}"


def open_chosen(
    start: Start,
    measure: MeasureHost = host_memory.measure,
    measure_rates: MeasureRates | None = None,
) -> OpenedCheckpoint:
    """Open the checkpoint to run, in a precision for which the host has memory.

    A partner gets the weights of the transformer only, and the precision is decided.

    Raises CheckpointError, or ModelUnavailableError if the model is too large for this machine or
    cannot be divided among as many processes.
    """
    from step1x_edit.checkpoints.memory_plan import (
        COMPUTING_RESERVE,
        FALLING,
        HOST_RESERVE,
        hosted,
    )
    from step1x_edit.worker.rates import measured

    opener = Opener(start)
    falls = start.precision == "auto" and start.rank == 0
    precisions = FALLING if falls else (start.precision,)
    memory, place = measure(), place_of(chosen_device(start))
    if memory is not None and start.host_bytes is not None:
        memory = replace(memory, available=min(memory.available, start.host_bytes))
    plan = hosted(
        lambda precision: opener.open(precision).blocks,
        None if memory is None else memory.available,
        reserve=COMPUTING_RESERVE if place is None else HOST_RESERVE,
        lockable_share=host_memory.lockable_share(),
        measure=lambda: (measure_rates or measured)(opener.open(precisions[0]), place),
        precisions=precisions,
        converted=opener.converted() if falls else (),
    )
    if memory is not None and place is None and plan.size > memory.available:
        raise ModelUnavailableError(
            f"the model needs at least {plan.size / GIGA:.1f} GB of memory and "
            f"{memory.available / GIGA:.1f} GB are free: free some"
        )
    chosen = opener.open(plan.precision)
    chosen.checkpoint.pipeline.keep(start.edit_cache_bytes)
    return replace(chosen, host=replace(plan, codes=opener.codes_of(plan.precision)))


class Opener:
    """Opens the checkpoint of a worker, in each precision at most once."""

    def __init__(self, start: Start) -> None:
        from step1x_edit.checkpoints.read import DEMO_FOLDER, Wanted
        from step1x_edit.hub.pulled import pulled_version, resolve_model_path

        self._start = start
        self._data_dir = Path(start.data_dir)
        path = resolve_model_path(start.model_path, self._data_dir)
        self._named = None if start.model_version == "auto" else start.model_version
        wanted = Wanted(
            version=self._named or pulled_version(path, self._data_dir),
            loras={Path(file): strength for file, strength in start.loras.items()},
        )
        if chosen_device(start) == "cpu":
            wanted = _with_arithmetic(wanted, start.arithmetic, self._data_dir)
        self._wanted = wanted
        self.path: Final = path or DEMO_FOLDER
        self._opened: dict[Precision, OpenedCheckpoint] = {}
        self._files: dict[Precision, Path] = {}
        """The files whose codes are used."""
        self._problems: list[str] = []

    def open(self, precision: Precision) -> OpenedCheckpoint:
        """The checkpoint, with codes from a file that `models convert` has written, if any."""
        if precision not in self._opened:
            opened = self._with_kept_codes(self.open_files(precision), precision)
            if self._start.rank:
                opened = replace(opened, weights=tuple(filter(_is_of_transformer, opened.weights)))
            self._opened[precision] = opened
        return self._opened[precision]

    def open_files(self, precision: Precision) -> OpenedCheckpoint:
        """The checkpoint as its own files have it."""
        from step1x_edit.checkpoints.read import open_checkpoint
        from step1x_edit.model.team import parts_of

        opened = open_checkpoint(self.path, replace(self._wanted, precision=precision))
        found, number = opened.checkpoint.version, self._start.gpus_per_edit
        if self._named not in (None, found):
            raise CheckpointError(f"MODEL_VERSION is {self._named}, but the checkpoint is {found}")
        heads = opened.checkpoint.pipeline.config.transformer.num_heads
        if heads % (parts := parts_of(number)):
            raise ModelUnavailableError(
                f"GPUS_PER_EDIT is {number}, which divides each prompt among {parts} "
                f"GPUs, and {opened.checkpoint.name} has {heads} heads: set another GPUS_PER_EDIT"
            )
        return opened

    def converted(self) -> list[Precision]:
        """The precisions whose codes are in files that can be used, the most exact one first."""
        from step1x_edit.checkpoints.converted import converted_files

        precisions: tuple[Precision, ...] = ("int8", "fp8", "nf4")
        files = converted_files(self._data_dir, self.path) if self._start.data_dir else ()
        present = {found.precision for found in files}
        for precision in precisions:
            if precision in present:
                self.open(precision)
        return [precision for precision in precisions if precision in self._files]

    def codes_of(self, precision: Precision) -> str:
        """Where the codes of a precision come from, and which files are not used, in words."""
        file = self._files.get(precision)
        used = () if file is None else (f"its codes are read from {file.name}",)
        return "; ".join((*used, *self._problems))

    def _with_kept_codes(self, opened: OpenedCheckpoint, precision: Precision) -> OpenedCheckpoint:
        from step1x_edit.checkpoints.conversion import with_kept_codes
        from step1x_edit.checkpoints.converted import UnusableError, converted_folder, file_name

        name = file_name(self.path, opened.checkpoint.version, precision)
        file = converted_folder(self._data_dir) / name
        if not (self._start.data_dir and file.exists()):
            return opened
        try:
            opened = with_kept_codes(opened, file)
            self._files[precision] = file
        except UnusableError as error:
            self._problems.append(f"{error}, so it is not used")
            logger.warning("%s: convert the model again", self._problems[-1])
        return opened


def _is_of_transformer(weight: Weight) -> bool:
    return weight.name.startswith("transformer.")


def _with_arithmetic(wanted: Wanted, arithmetic: Arithmetic, data_dir: Path) -> Wanted:
    """The same, computing in bfloat16 wherever the processor is faster with it, if auto."""
    import torch

    from step1x_edit.worker.arithmetic import fastest

    if arithmetic == "fp32" or (arithmetic == "auto" and fastest(data_dir) is torch.float32):
        return wanted
    return replace(wanted, dtype=torch.bfloat16, vae_dtype=torch.bfloat16)
