"""The process that inspects this machine and the checkpoint; it may import torch.

`python -m step1x_edit.worker.survey` reads a worker's `Start` as JSON from stdin and writes a
`Survey` as JSON to stdout. It builds the network and checks the headers of its files as an edit
does, but reads no weights.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING

from step1x_edit.channel import GIGA, Start, name_with_loras
from step1x_edit.checkpoints.memory_plan import plan_status
from step1x_edit.engine.machine import Survey, first_line
from step1x_edit.errors import ModelUnavailableError, Step1XEditError
from step1x_edit.worker.libraries import import_libraries
from step1x_edit.worker.opening import (
    chosen_device,
    open_chosen,
    place_of,
    plan_for,
)

if TYPE_CHECKING:
    from step1x_edit.checkpoints.read import OpenedCheckpoint


def survey(start: Start) -> Survey:
    """Inspect the libraries, the device and the checkpoint."""
    try:
        import_libraries()
        import torch
    except (ImportError, OSError) as error:  # OSError: a native library is missing
        return Survey(torch_error=first_line(f"{type(error).__name__}: {error}"))
    found = Survey(torch=torch.__version__)
    try:
        found = _with_device(found, start)
    except ModelUnavailableError as error:  # there are too few GPUs
        reason = first_line(str(error).removeprefix(f"{error.beginning}: "))
        found = dataclasses.replace(found, device=start.device, device_error=reason)
        start = dataclasses.replace(start, gpus_per_edit=1)
    return _with_upscaler(_with_checkpoint(found, start), start)


def _with_device(found: Survey, start: Start) -> Survey:
    import torch

    name = chosen_device(start)
    if not name.startswith("cuda"):
        return dataclasses.replace(found, device=name)
    ranks = range(start.gpus_per_edit)
    try:
        names = [chosen_device(dataclasses.replace(start, rank=rank)) for rank in ranks]
        free, total = min(map(torch.cuda.mem_get_info, names))
        shown = f"{', '.join(names)}, {torch.cuda.get_device_name(name)}"
    except (RuntimeError, AssertionError, ValueError) as error:
        return dataclasses.replace(found, device=name, device_error=first_line(str(error)))
    return dataclasses.replace(
        found,
        device=shown,
        device_free_gb=round(free / GIGA, 1),
        device_total_gb=round(total / GIGA, 1),
    )


def _with_checkpoint(found: Survey, start: Start) -> Survey:
    try:
        opened = open_chosen(start)
        loras = opened.loras.changes()
    except (Step1XEditError, OSError) as error:
        return dataclasses.replace(found, checkpoint_error=first_line(str(error)))
    placement = None
    if found.device_error is None:
        place = place_of(chosen_device(start))
        plan = None
        if place is not None:
            plan = dataclasses.replace(plan_for(place, opened.blocks), host=opened.host)
        placement = plan_status(plan, opened.precision, opened.host)
    return dataclasses.replace(
        found,
        size_multiple=opened.checkpoint.pipeline.config.size_multiple,
        placement=placement,
        checkpoint=name_with_loras(opened.checkpoint.name, loras.strengths),
        version=opened.checkpoint.version,
        arithmetic=_arithmetic(found, opened),
        weights_gb=round(sum(weight.size for weight in opened.weights) / GIGA, 2),
    )


def _with_upscaler(found: Survey, start: Start) -> Survey:
    from step1x_edit.worker.upscaling import Upscaler

    if start.upscale_model is None:
        return found
    try:
        return dataclasses.replace(found, upscale=Upscaler(start.upscale_model, None).scale)
    except Step1XEditError as error:
        return dataclasses.replace(found, upscale_error=first_line(str(error)))


def _arithmetic(found: Survey, opened: OpenedCheckpoint) -> str | None:
    """The numbers that a CPU would compute with."""
    from step1x_edit.worker.arithmetic import arithmetic_of

    if found.device != "cpu":
        return None
    names = {weight.name: weight.dtype for weight in opened.weights}
    return arithmetic_of(names["transformer.img_in.weight"])


def main() -> None:
    """Answer on stdout, without anything that libraries print there."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with answer:
        json.dump(dataclasses.asdict(survey(Start(**json.load(sys.stdin)))), answer)
        answer.write("\n")


if __name__ == "__main__":
    main()
