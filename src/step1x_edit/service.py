"""The service: the operations that every interface offers, and what they promise.

An edit is one straight story: read the file, decide where the result will go, have the engine edit,
bring the picture back to its size, save it, say what was done. The service knows nothing about
protocols, and of the model only what the engine tells.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from step1x_edit import images
from step1x_edit.engine import HEARTBEAT_S, Engine
from step1x_edit.files import FileAccess, InputFile, Output
from step1x_edit.images import Limits, Picture
from step1x_edit.schemas import (
    MAX_SEED,
    EditAnswer,
    EditMetadata,
    EditRecord,
    EditRequest,
    GpuStatistics,
    GpuStatus,
    StatusAnswer,
    read_request,
)
from step1x_edit.settings import Settings
from step1x_edit.worker import (
    EditJob,
    Memory,
    ModelInfo,
    Outcome,
    Phase,
    Progress,
    Worker,
    load_worker,
)

T = TypeVar("T")

Report = Callable[[Progress], Awaitable[None]]
"""Called in the caller's own task, at least every few seconds, with how far an edit has come."""


async def unreported(event: Progress) -> None:
    """For callers who do not want to know how far an edit has come."""


@dataclass(frozen=True)
class FinishedEdit:
    """The answer, and the picture that was saved, for faces that show it."""

    answer: EditAnswer
    picture: Picture


class EditService:
    """The operations. Collaborators come from outside; `build_service` brings the usual ones."""

    def __init__(
        self,
        engine: Engine,
        files: FileAccess,
        settings: Settings,
    ) -> None:
        self._engine = engine
        self._files = files
        self._settings = settings
        self._limits = Limits(settings.max_bytes, settings.max_pixels)

    @property
    def defaults(self) -> Mapping[str, int | float]:
        """What the operator has chosen for parameters that a caller leaves out."""
        return {
            "num_steps": self._settings.default_num_steps,
            "guidance_scale": self._settings.default_guidance_scale,
            "size_level": self._settings.default_size_level,
        }

    def read_edit(self, arguments: Mapping[str, object]) -> EditRequest:
        """Make a request of what a caller gave; raises InvalidParameterError.

        None counts as not given where a parameter may be left out: language models like to send it.
        """
        fields = EditRequest.model_fields
        given = {
            name: value
            for name, value in arguments.items()
            if value is not None or name not in fields or fields[name].is_required()
        }
        return read_request(EditRequest, {**self.defaults, **given})

    async def edit(self, request: EditRequest, report: Report = unreported) -> FinishedEdit:
        """Edit one image and save the result; cancelling the call stops the work, unsaved."""
        started = time.monotonic()
        self._engine.check_room()  # a server without room must not spend memory on pictures
        source, output = await asyncio.to_thread(self._open, request)
        seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        outcome = await self._run(_job(request, source, seed), report)
        record = _record(request, seed, outcome.model)
        # Encoding may take a while and can be given up; publishing is short and comes last.
        picture = await asyncio.to_thread(images.restore, outcome.image, source)
        data = await _aside(
            lambda: images.encode(picture, output.suffix, record), Progress(Phase.SAVING), report
        )
        path = await asyncio.to_thread(self._files.publish, output, data)
        answer = EditAnswer(
            output_path=str(path),
            processing_time=round(time.monotonic() - started, 2),
            metadata=_metadata(record, outcome, self._engine.status().memory, picture),
        )
        return FinishedEdit(answer, picture)

    def status(self) -> StatusAnswer:
        """Where the model is and what it occupies; never waits."""
        status = self._engine.status()
        return StatusAnswer(
            gpu_status=GpuStatus(
                model_location=status.location,
                idle_time=round(status.idle_time_s, 1),
                idle_timeout=self._settings.gpu_idle_timeout,
                gpu_memory_allocated_gb=round(status.memory.allocated_gb, 2),
                gpu_memory_reserved_gb=round(status.memory.reserved_gb, 2),
                auto_monitor_running=False,  # nothing moves an idle model yet
                statistics=GpuStatistics(
                    total_loads=status.total_loads,
                    gpu_to_cpu=status.gpu_to_cpu,
                    cpu_to_gpu=status.cpu_to_gpu,
                    full_releases=status.full_releases,
                ),
                model=None if status.model is None else status.model.name,
                device=None if status.model is None else status.model.device,
                queue_length=status.queue_length,
            )
        )

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop the running edit, end the waiting ones and take no more."""
        self._engine.close(timeout_s)

    def _open(self, request: EditRequest) -> tuple[Picture, Output]:
        """Read the input and check where the output will go, before any work is done."""
        file = self._files.read(request.image_path)
        output = self._plan(request, file)
        picture = images.decode(file.data, self._limits)
        images.check_encodable(picture, output.suffix)
        return picture, output

    def _plan(self, request: EditRequest, file: InputFile) -> Output:
        inputs = {file.identity}
        if request.output_path is None:
            return self._files.plan_default_output(
                request.image_path, inputs, overwrite=request.overwrite
            )
        return self._files.plan_output(request.output_path, inputs, overwrite=request.overwrite)

    async def _run(self, job: EditJob, report: Report) -> Outcome:
        edit = self._engine.submit(job)
        try:
            async for event in edit.events():
                await report(event)
            return await edit.result()
        finally:
            edit.cancel()  # does nothing to an edit that has ended


async def _aside(work: Callable[[], T], progress: Progress, report: Report) -> T:
    """Work in a thread, with a sign of life now and while it takes long."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    await report(progress)
    while not (await asyncio.wait({task}, timeout=HEARTBEAT_S))[0]:
        await report(progress)
    return task.result()


def _job(request: EditRequest, source: Picture, seed: int) -> EditJob:
    return EditJob(
        image=source.pixels,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        num_steps=request.num_steps,
        guidance_scale=request.guidance_scale,
        size_level=request.size_level,
        seed=seed,
    )


def _record(request: EditRequest, seed: int, model: ModelInfo) -> EditRecord:
    return EditRecord(
        model=model.name,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        num_steps=request.num_steps,
        guidance_scale=request.guidance_scale,
        size_level=request.size_level,
        seed=seed,
    )


def _metadata(
    record: EditRecord, outcome: Outcome, memory: Memory, picture: Picture
) -> EditMetadata:
    return EditMetadata(
        prompt=record.prompt,
        num_steps=record.num_steps,
        guidance_scale=record.guidance_scale,
        size_level=record.size_level,
        seed=record.seed,
        gpu_location=outcome.model.location,
        gpu_memory_gb=round(memory.allocated_gb, 2),
        model=record.model,
        device=outcome.model.device,
        width=picture.width,
        height=picture.height,
        negative_prompt=record.negative_prompt or None,
        warning=outcome.warning,
    )


def build_service(settings: Settings, load: Callable[[], Worker] | None = None) -> EditService:
    """Wire the service that all interfaces use; `load` brings another worker than the settings'."""

    def load_chosen() -> Worker:
        return load_worker(settings.model_path, settings.model_version, settings.device)

    engine = Engine(
        load or load_chosen, max_queue=settings.max_queue, edit_timeout_s=settings.edit_timeout
    )
    files = FileAccess(settings.allowed_dirs, settings.max_bytes)
    return EditService(engine, files, settings)
