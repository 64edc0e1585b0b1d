"""A partner: a process that makes the steps of edits with the worker that has started it.

It has the weights of the transformer only. What it does, and when, the worker says.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from step1x_edit.channel import Denoise, Prepare, Residence, Start
from step1x_edit.checkpoints.arena import Check
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.quantised import Code
from step1x_edit.model.team import PartedError, Team
from step1x_edit.worker.group import End, Seat, leave_if_broken, task_of
from step1x_edit.worker.memory import is_out_of_memory
from step1x_edit.worker.opening import chosen_device, open_chosen, place_of, plan_for
from step1x_edit.worker.products import coding, kind_of
from step1x_edit.worker.residency import Residency

if TYPE_CHECKING:
    from step1x_edit.schemas.requests import Precision


class Partner:
    """Makes the steps of edits in a team."""

    def __init__(self, start: Start, end: End) -> None:
        """`end` is called if the group cannot continue."""
        self._start = start
        self._end = end
        self._device = chosen_device(start)
        if self._device.startswith("cuda"):
            torch.cuda.set_device(self._device)  # else torch also takes memory on the first GPU
        self._seat = Seat(start.rank, start.gpus_per_edit, self._device, start.meeting)
        self._residency = self._residency_in(start.precision)
        self._load = 0

    def help(self, request: Prepare | Denoise, check: Check) -> None:
        """Do what the worker asks for. If memory runs out, less stays on the device afterwards."""
        try:
            match request:
                case Prepare():
                    self._prepare(request, check)
                case Denoise():
                    self._denoise(request)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                self._residency.shrink()
            raise

    def offload(self) -> None:
        """Move the model to host memory; does nothing if it is there already."""
        self._residency.offload()

    def residence(self) -> Residence:
        """The memory that the model occupies, as measured."""
        return Residence(device=self._device, memory=self._residency.memory())

    def _residency_in(self, precision: Precision) -> Residency:
        start, place = replace(self._start, precision=precision), place_of(self._device)
        return Residency(partial(open_chosen, start), place, plan=partial(plan_for, place))

    def _prepare(self, request: Prepare, check: Check) -> None:
        """Bring the model to where it computes."""
        if request.load != self._load:
            self._residency.release()
            self._residency, self._load = self._residency_in(request.precision), request.load
        if not self._residency.is_ready(request.loras):
            self._residency.use_loras(request.loras, check)
            self._residency.load(check)
            self._residency.onload(check)

    @torch.inference_mode()
    def _denoise(self, message: Denoise) -> None:
        """Make the steps; ends early if another process does."""
        encoded, state, plan = task_of(message)
        team = Team()

        def team_for(*_: object) -> Team:
            nonlocal team
            team = self._seat.team(len(encoded.branches))
            return team

        with self._residency.on_device() as checkpoint, contextlib.suppress(PartedError):
            pipeline = checkpoint.pipeline
            pipeline.team_for = team_for
            _use_codes(pipeline, message.task["code"])
            try:
                for _ in pipeline.denoise(encoded, state, message, plan):
                    pass
            except Exception as error:
                leave_if_broken(team, error, self._end)
                raise


def _use_codes(pipeline: EditPipeline, code: Code | None) -> None:
    """Have copies of layers in these codes, and no others."""
    if code is None or (pipeline.coded is not None and kind_of(pipeline.coded) != code):
        pipeline.coded = None
    if code is not None and pipeline.coded is None:
        for _ in coding(pipeline, code):
            pass
