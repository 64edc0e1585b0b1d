"""Progress of edits for MCP: notifications whose numbers only increase."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Awaitable
from typing import Final, TypeVar

from fastmcp import Context
from fastmcp.server.dependencies import get_context

from step1x_edit.channel import Phase, Progress
from step1x_edit.schemas.requests import BatchRequest, EditRequest, GenerateRequest
from step1x_edit.waiting import with_heartbeats

T = TypeVar("T")

_OF_MANY_STEPS: Final = (
    Phase.LOADING,
    Phase.THINKING,
    Phase.DENOISING,
    Phase.REFLECTING,
    Phase.UPSCALING,
)


class ProgressReport:
    """Reports the progress of a tool's edits to the client, on one scale for all pictures.

    The protocol wants numbers that only increase, so a repeated event adds a tiny amount. Steps in
    quick succession are not all reported: a message costs milliseconds of CPU time, which a model
    on the CPU needs.
    """

    _TINY: Final = 0.0001

    def __init__(
        self,
        context: Context,
        pause_s: float,
        images: int,
        request: EditRequest | BatchRequest | GenerateRequest,
    ) -> None:
        self._context = context
        self._pause_s = pause_s  # between two steps that are reported
        self._ways = [_Way(request) for _ in range(images)]
        self._phase: Phase | None = None
        self._last = 0.0
        self._reported_step_at = -math.inf
        self._warning: str | None = None  # that was reported

    async def step(self, index: int, event: Progress) -> None:
        """Report an event of the picture with this index."""
        images, units = len(self._ways), self._ways[0].units
        position = index * units + self._ways[index].position(event)
        is_warning = event.warning not in (None, self._warning)
        if event.phase in _OF_MANY_STEPS and event.step < event.total:
            now = time.monotonic()
            is_soon = now < self._reported_step_at + self._pause_s
            if event.phase is self._phase and is_soon and not is_warning:
                return
            self._reported_step_at = now
        self._phase = event.phase
        self._last = max(position, self._last + self._TINY)
        text = event.text
        if is_warning:
            self._warning = event.warning
            text += f"; {event.warning}"
        if images > 1:
            text = f"image {index + 1}/{images}, {text}"
        await self._context.report_progress(self._last, float(images * units), text)


class _Way:
    """The progress of an edit through its phases, in units.

    Each step is one unit, and so is each other phase. With reflection there are units for all
    rounds that may run; if fewer do, the progress jumps to the end.
    """

    def __init__(self, request: EditRequest | BatchRequest | GenerateRequest) -> None:
        thinks = reflects = False
        rounds = 1
        if not isinstance(request, GenerateRequest):
            thinks, reflects = request.thinking, request.reflection
            rounds = request.reflection_rounds if reflects else 1
        self._before = int(thinks)
        self._steps = request.num_steps
        self._units_of_round = self._steps + 2 + int(reflects)
        self._last_round = rounds - 1
        self._round = 0
        self._has_reflected = False
        self._after = 1 + int(request.upscale > 1)
        self.units = self._before + rounds * self._units_of_round + self._after

    def position(self, event: Progress) -> float:
        """The position of an event; call it for each, because a round follows each reflection."""
        if self._has_reflected and event.phase in (Phase.ENCODING, Phase.DENOISING):
            self._round = min(self._round + 1, self._last_round)
            self._has_reflected = False
        start = self._before + self._round * self._units_of_round
        match event.phase:
            case Phase.ENCODING:
                return float(start)
            case Phase.DENOISING:
                return start + event.step + 1.0
            case Phase.DECODING:
                return start + self._steps + 1.0
            case Phase.REFLECTING:
                self._has_reflected = True
                return start + self._steps + 2.0
            case Phase.UPSCALING:
                return self.units - self._after + event.step / max(event.total, 1)
            case Phase.SAVING:
                return self.units - 1.0
        return 0.0


async def reporting_heartbeats(work: Awaitable[T], heartbeat_s: float) -> T:
    """Wait for work that may be queued, and report progress to the client every `heartbeat_s`."""
    context, beats = get_context(), itertools.count(1)

    async def beat() -> None:
        await context.report_progress(next(beats), None, "waiting for the running edit")

    return await with_heartbeats(work, beat, heartbeat_s)
