"""The service: pictures, GPU operations and status, for every interface.

An edit is a linear sequence: decode the picture, have the engine edit it, restore its size, keep
what a mask protects, encode it, describe how it was made. `file_edits` does the same with files.
The service knows nothing about protocols, and knows the model only through the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from step1x_edit.channel import (
    EditJob,
    Painted,
    Phase,
    Progress,
    Residence,
    UpscaleJob,
)
from step1x_edit.engine.engine import (
    HEARTBEAT_S,
    Edit,
    EditResult,
    EngineLike,
    EngineStatus,
    Replica,
)
from step1x_edit.engine.machine import check_upscale_model
from step1x_edit.errors import (
    CheckpointError,
    EditCancelledError,
    InvalidParameterError,
    NoSpaceError,
    Step1XEditError,
)
from step1x_edit.hub.catalog import CATALOG, SUGGESTED, Suggestion
from step1x_edit.hub.pulled import resolve_model_path
from step1x_edit.lora_names import lora_name
from step1x_edit.model.config import DEMO, ONLY_EDITING, REASONING
from step1x_edit.pictures.result_files import ResultFile, ResultFiles
from step1x_edit.schemas.answers import (
    DeviceMemory,
    EditMetadata,
    EstimateAnswer,
    GpuAnswer,
    GpuStatistics,
    GpuStatus,
    ReplicaStatus,
    StatusAnswer,
)
from step1x_edit.schemas.plan import PlanStatus
from step1x_edit.schemas.requests import (
    CHOSEN_BY_THE_OPERATOR,
    BatchRequest,
    EditRequest,
    GeneratePictureRequest,
    GenerateRequest,
    HowToMake,
    PictureRequest,
    Record,
    check_loras,
    loras_of,
    read_request,
    strengths_of,
)
from step1x_edit.service.editor import Reporter, unreported
from step1x_edit.service.estimate import Estimator
from step1x_edit.service.files import FileAccess, nearest_existing
from step1x_edit.service.records import PictureOrder, job_of, metadata_of, record_of, with_seed
from step1x_edit.service.source import NO_INPUT, read_source
from step1x_edit.settings import MEBI, Settings
from step1x_edit.waiting import with_heartbeats

if TYPE_CHECKING:  # deferred: a server starts to answer before numpy is imported
    from step1x_edit.pictures.images import Picture

_UNCHANGED: Final = PictureRequest(prompt="")
_Request = TypeVar("_Request", bound=HowToMake)


@dataclass(frozen=True)
class EditedPicture:
    """A picture, edited or generated, as the bytes of a file, and how it was made."""

    picture: Picture
    data: bytes
    metadata: EditMetadata
    record: Record
    processing_time: float
    rounds: tuple[bytes, ...] = ()
    """Small JPEGs of the result of each round of a reflection."""
    source: Picture | None = None
    """The input on a canvas of the same size, unless the picture was generated."""
    original: bytes | None = None
    """The file of the input, if results are signed."""


class EditService:
    """The operations. `wiring.build_service` creates one with its usual collaborators."""

    def __init__(
        self, engine: EngineLike, files: FileAccess, settings: Settings, estimator: Estimator
    ) -> None:
        self._engine = engine
        self.files = files
        """The callers' files, for the interfaces that take paths."""
        self._settings = settings
        self._limits = settings.limits
        self._loras = {lora_name(path): strength for path, strength in settings.lora_path.items()}
        self._outcomes: Counter[str] = Counter()
        self._result_files = ResultFiles(settings)
        self._estimator = estimator

    @property
    def defaults(self) -> Mapping[str, int | float | str]:
        """The operator's defaults for parameters that a caller leaves unset."""
        return {name: getattr(self._settings, f"default_{name}") for name in CHOSEN_BY_THE_OPERATOR}

    @property
    def loras(self) -> Mapping[str, float]:
        """The LoRAs that edits can select, and their default strengths."""
        return MappingProxyType(self._loras)

    def read_edit(self, arguments: Mapping[str, object]) -> EditRequest:
        """Create a request from a caller's parameters; raises InvalidParameterError.

        None counts as unset for optional parameters: language models often send it.
        """
        return self._read(EditRequest, arguments)

    def read_picture(self, arguments: Mapping[str, object]) -> PictureRequest:
        """Create a request from a caller's parameters, as `read_edit` does."""
        return self._read(PictureRequest, arguments)

    def read_generate(self, arguments: Mapping[str, object]) -> GenerateRequest:
        """Create a request from a caller's parameters, as `read_edit` does.

        Raises InvalidParameterError too if the model is already known to only edit.
        """
        request = self._read(GenerateRequest, arguments)
        self._check_can_generate()
        return request

    def read_generate_picture(self, arguments: Mapping[str, object]) -> GeneratePictureRequest:
        """Create a request from a caller's parameters, as `read_generate` does."""
        request = self._read(GeneratePictureRequest, arguments)
        self._check_can_generate()
        return request

    def read_batch(self, arguments: Mapping[str, object]) -> BatchRequest:
        """Create a request from a caller's parameters, as `read_edit` does."""
        return self._read(BatchRequest, arguments)

    async def edit_picture(
        self,
        data: bytes,
        request: PictureRequest,
        report: Reporter = unreported,
        suffix: str = ".png",
        mask: bytes | None = None,
        previews: int = 0,
    ) -> EditedPicture:
        """Edit a picture that the caller has sent, and return the result; no file is touched.

        `suffix` selects the output format, `mask` is a picture of the region that may change. Up
        to `previews` of the reported steps carry a preview. Cancelling the call cancels the edit.
        """
        await self.check_room()  # a full server must not spend memory on pictures
        submit = self._engine.submit
        return await self._edit(data, request, report, suffix, mask, submit, previews)

    async def edit_next(
        self,
        data: bytes,
        request: PictureRequest,
        report: Reporter = unreported,
        suffix: str = ".png",
        mask: bytes | None = None,
    ) -> EditedPicture:
        """Edit the next picture of a batch that `check_room` has admitted; otherwise as above."""
        return await self._edit(data, request, report, suffix, mask, self._engine.submit_next)

    async def generate_picture(
        self,
        request: GeneratePictureRequest,
        report: Reporter = unreported,
        suffix: str = ".png",
        previews: int = 0,
    ) -> EditedPicture:
        """Generate a picture from a prompt alone and return it; otherwise as `edit_picture`.

        Raises InvalidParameterError if the model is already known to only edit.
        """
        self._check_can_generate()
        await self.check_room()
        await asyncio.to_thread(self._check_generated_size, request, suffix)
        submit = self._engine.submit
        return await self._edit(None, request, report, suffix, None, submit, previews)

    def file_of(
        self, edited: EditedPicture, picture: Picture, suffix: str, quality: int | None
    ) -> bytes:
        """The file of another version of a result, such as a smaller one."""
        return self._result_files.write(
            picture, suffix, edited.record, edited.original, quality
        ).data

    async def check_picture(
        self, data: bytes, mask: bytes | None = None, request: PictureRequest = _UNCHANGED
    ) -> None:
        """Raise the error that `edit_picture` would raise for these bytes, without editing them."""
        await asyncio.to_thread(read_source, data, request, mask, ".png", self._limits)

    async def preview(self, data: bytes, side: int) -> bytes:
        """A small JPEG of a picture, at most `side` pixels wide and high."""

        def show() -> bytes:
            from step1x_edit.pictures import images

            return images.preview(images.decode(data, self._limits), side)

        return await asyncio.to_thread(show)

    def check_time(self, request: PictureOrder) -> None:
        """Raise the error that such an edit would be refused with because it takes too long."""
        self._engine.check_time(job_of(with_seed(request)))

    def time_warning(self, request: PictureOrder) -> str | None:
        """A warning if such an edit is predicted to take longer than it may."""
        return self._engine.time_warning(job_of(with_seed(request)))

    def predicted_s(self, request: PictureOrder) -> float | None:
        """How long such an edit takes, without waiting and loading; None if it is not known."""
        return self._engine.predicted_s(job_of(with_seed(request)))

    def status(self) -> StatusAnswer:
        """The location of the model and the memory it occupies; never waits."""
        return StatusAnswer(gpu_status=self._gpu_status(self._engine.status()))

    async def loaded_model(self) -> str | None:
        """The name of the model; None while none is loaded."""
        return self._engine.status().residence.model

    @property
    def lanes(self) -> int:
        """How many edits can run at a time."""
        return self._engine.lanes

    @property
    def is_editing(self) -> bool:
        """Whether the model is computing, or about to."""
        return self._engine.status().is_editing

    @property
    def loading(self) -> Progress | None:
        """What has been read of the model, while an edit loads it."""
        return self._engine.status().loading

    @property
    def version(self) -> str | None:
        """The model version, known once it has been loaded, or if a setting names it."""
        return self._engine.status().residence.version or named_version(self._settings)

    @property
    def can_reason(self) -> bool:
        """Whether edits may use thinking and reflection, as far as known without the model."""
        return self.version is None or self.version in REASONING

    @property
    def can_upscale(self) -> bool:
        """Whether results can be enlarged, as far as known without torch."""
        try:
            check_upscale_model(self._settings.upscale_model)
        except Step1XEditError:
            return False
        return True

    @property
    def suggestion(self) -> Suggestion | None:
        """The authors' recommended parameters, if the model is known and the defaults differ."""
        return suggestion_for(self.version, self._settings)

    async def estimate(
        self,
        request: PictureRequest,
        size: tuple[int, int] | None = None,
        n: int = 1,
        previews: int = 0,
    ) -> EstimateAnswer:
        """The time and memory of `n` such edits of a picture of this size (or of a square one).

        Nothing is run and no worker is started. If the model is not loaded, a separate process
        inspects the checkpoint. Raises the error that such a picture would be refused with.
        """
        with self._settings.naming_paths():
            return await self._estimator.estimate(request, size, n, previews)

    @property
    def outcomes(self) -> Mapping[str, int]:
        """The number of edits since the start by outcome: "success", or the code of the error."""
        return MappingProxyType(self._outcomes)

    @property
    def readiness(self) -> Mapping[str, Callable[[], None]]:
        """The checks that the next edit depends on; each raises an error, without any path."""
        checks = {
            "room in the queue": self._engine.check_room,
            "worker": self._engine.check_worker,
            "checkpoint": self._check_checkpoint,
        }
        if self._settings.enable_api:
            checks["disk for stored jobs"] = self._check_disk
        return checks

    async def check_room(self) -> None:
        """Raise the error that an edit would be refused with now, before its picture is read."""
        self._engine.check_room()

    def _check_checkpoint(self) -> None:
        path = resolve_model_path(self._settings.model_path, self._settings.data_dir)
        if path is not None and not os.path.exists(path):  # noqa: PTH110 - pathlib's can raise
            raise CheckpointError("there is nothing at MODEL_PATH")

    def _check_disk(self) -> None:
        """Raise NoSpaceError if DATA_DIR cannot take the largest picture that a job may contain."""
        folder = self._settings.data_dir
        try:
            free = shutil.disk_usage(nearest_existing(folder)).free
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO).lower()
            raise NoSpaceError(f"DATA_DIR cannot be reached ({reason})") from None
        if free < self._settings.max_bytes:
            raise NoSpaceError(
                f"{free / MEBI:.0f} MiB are free in DATA_DIR, and a picture may have "
                f"{self._settings.max_upload_mb} (MAX_UPLOAD_MB)"
            )

    async def offload(self) -> GpuAnswer:
        """Move the model from the GPU to host memory, before the next edit."""
        status = await _moving(self._engine.offload())
        if status.residence.location == "Unloaded":
            return self._moved("Nothing to offload. Model location:", status)
        return self._moved("GPU offloaded. Model now on", status)

    async def release(self) -> GpuAnswer:
        """Unload the model and free all its memory, before the next edit."""
        return self._moved("GPU released. Model location:", await _moving(self._engine.release()))

    def prepare(self) -> None:
        """Begin with what the first edit would wait for, because it is about to come."""
        self._engine.prepare()

    def close(self, timeout_s: float = 5.0) -> None:
        """Cancel the running edit, fail the waiting ones and accept no more."""
        self._engine.close(timeout_s)

    def _check_can_generate(self) -> None:
        """Refuse, without a worker, what the model cannot do if its version is certain."""
        residence = self._engine.status().residence
        version = residence.version or _certain_version(self._settings)
        if version in ONLY_EDITING:
            raise InvalidParameterError(
                "text to image needs Step1X-Edit v1.1; the model here is "
                f"{residence.model or version}"
            )

    def _check_generated_size(self, request: GeneratePictureRequest, suffix: str) -> None:
        from step1x_edit.pictures import images

        images.check_enlarged(request.width, request.height, request.upscale, self._limits)
        width, height = (request.upscale * side for side in (request.width, request.height))
        images.check_encodable(width, height, suffix)

    def _read(self, kind: type[_Request], arguments: Mapping[str, object]) -> _Request:
        fields = kind.model_fields
        given = {
            name: value
            for name, value in arguments.items()
            if value is not None or name not in fields or fields[name].is_required()
        }
        return self._completed(read_request(kind, given))

    def _completed(self, request: _Request) -> _Request:
        """The request with the operator's defaults for unset parameters.

        Raises an error for LoRAs that are not here, and if it must be enlarged and cannot be.
        """
        check_loras(strengths_of(request.loras or []), self._loras)
        if request.upscale > 1:
            check_upscale_model(self._settings.upscale_model)
        left_open = type(request).model_fields.keys() - request.model_fields_set
        defaults = {name: value for name, value in self.defaults.items() if name in left_open}
        return request.model_copy(update=defaults)

    async def _edit(
        self,
        data: bytes | None,
        request: PictureOrder,
        report: Reporter,
        suffix: str,
        mask: bytes | None,
        submit: Callable[[EditJob], Edit],
        previews: int = 0,
    ) -> EditedPicture:
        """Edit a picture, or generate one if there is none."""
        started = time.monotonic()
        request = self._completed(request)
        original = data if self._result_files.are_signed else None
        source = NO_INPUT
        if data is not None:
            assert isinstance(request, PictureRequest)
            given = data, request, mask, suffix, self._limits
            source = await asyncio.to_thread(read_source, *given)
        request = with_seed(request, source.record)
        with self._counted(), self._settings.naming_paths():
            job = job_of(request, *await asyncio.to_thread(source.seen), previews)
            result = await _run(submit(job), source.showing_whole(report))
            record = record_of(request, result, source)
            saving = partial(report, Progress(Phase.SAVING))
            enlarging = partial(report, Progress(Phase.UPSCALING))
            restoring = saving if request.upscale == 1 else enlarging
            await restoring()
            restored = asyncio.to_thread(source.restored, result.painted.image)
            picture, share = await with_heartbeats(restored, restoring, HEARTBEAT_S)
            if request.upscale > 1:
                picture, record = await self._enlarged(picture, record, report)
                await saving()

            def finished() -> tuple[ResultFile, tuple[bytes, ...]]:
                file = self._result_files.write(picture, suffix, record, original)
                return file, _rounds(result.painted)

            file, rounds = await with_heartbeats(asyncio.to_thread(finished), saving, HEARTBEAT_S)
        return EditedPicture(
            picture,
            file.data,
            metadata_of(record, result, source, picture, share).with_warning(file.warning),
            record,
            processing_time=round(time.monotonic() - started, 2),
            rounds=rounds,
            source=source.before,
            original=original,
        )

    async def _enlarged(
        self, picture: Picture, record: Record, report: Reporter
    ) -> tuple[Picture, Record]:
        """The picture as its record says it is enlarged, and the record with what enlarged it."""
        from step1x_edit.pictures import images

        async def report_tiles(event: Progress) -> None:
            is_tile = event.phase is Phase.UPSCALING
            await report(event if is_tile else Progress(Phase.UPSCALING, warning=event.warning))

        assert self._settings.upscale_model is not None
        pixels = await asyncio.to_thread(lambda: picture.in_srgb)
        job = UpscaleJob(pixels, record.upscale)
        made = (await _run(self._engine.submit_end(job), report_tiles)).painted
        upscaler = {
            "upscaler": self._settings.upscale_model.name,
            "upscaler_sha256": made.upscaler_sha256,
        }
        enlarged = await asyncio.to_thread(images.enlarged, made.image, picture)
        return enlarged, record.model_copy(update=upscaler)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        outcome = "internal"
        try:
            yield
            outcome = "success"
        except asyncio.CancelledError:
            outcome = EditCancelledError.code
            raise
        except Step1XEditError as error:
            outcome = error.code
            raise
        finally:
            self._outcomes[outcome] += 1

    def _moved(self, message: str, status: EngineStatus) -> GpuAnswer:
        residence = status.residence
        return GpuAnswer(
            message=f"{message} {residence.location}, "
            f"GPU memory: {residence.memory.allocated_gb:.2f}GB",
            gpu_status=self._gpu_status(status),
        )

    def _gpu_status(self, status: EngineStatus) -> GpuStatus:
        residence = status.residence
        return GpuStatus(
            model_location=residence.location,
            idle_time=round(status.idle_time_s, 1),
            idle_timeout=self._settings.gpu_idle_timeout,
            gpu_memory_allocated_gb=round(residence.memory.allocated_gb, 2),
            gpu_memory_reserved_gb=round(residence.memory.reserved_gb, 2),
            auto_monitor_running=status.is_monitoring,
            statistics=_statistics_of(status),
            model=residence.model,
            device=residence.device,
            arithmetic=residence.arithmetic,
            numerics=residence.numerics,
            queue_length=status.queue_length,
            plan=None if residence.placement is None else _rounded(residence.placement),
            loras=list(self._loras) or None,
            loras_in_model=loras_of(residence.loras) or None,
            loading=status.loading and status.loading.text,
            other_devices=_other_devices(residence) or None,
            replicas=[_replica_status(one) for one in status.replicas] or None,
        )


def _other_devices(residence: Residence) -> list[DeviceMemory]:
    kind = (residence.device or "").partition(":")[0]
    return [
        DeviceMemory(
            device=f"{kind}:{rank}",
            allocated_gb=round(memory.allocated_gb, 2),
            reserved_gb=round(memory.reserved_gb, 2),
        )
        for rank, memory in enumerate(residence.others, start=1)
        if kind != "cpu"
    ]


async def _run(edit: Edit, report: Reporter) -> EditResult:
    try:
        async for event in edit.events():
            await report(event)
        return await edit.result()
    finally:
        edit.cancel()  # does nothing to an edit that has ended


def _statistics_of(status: EngineStatus) -> GpuStatistics:
    return GpuStatistics(
        total_loads=status.total_loads,
        gpu_to_cpu=status.gpu_to_cpu,
        cpu_to_gpu=status.cpu_to_gpu,
        full_releases=status.full_releases,
    )


def _replica_status(replica: Replica) -> ReplicaStatus:
    status = replica.status or EngineStatus()
    residence = status.residence
    state: Literal["starting", "idle", "editing"] = "editing" if status.is_editing else "idle"
    return ReplicaStatus(
        name=replica.name,
        state="starting" if replica.status is None else state,
        model_location=residence.location,
        gpu_memory_allocated_gb=round(residence.memory.allocated_gb, 2),
        gpu_memory_reserved_gb=round(residence.memory.reserved_gb, 2),
        idle_time=round(status.idle_time_s, 1),
        statistics=_statistics_of(status),
        model=residence.model,
        device=residence.device,
        numerics=residence.numerics,
        loading=status.loading and status.loading.text,
    )


async def _moving(move: Future[EngineStatus]) -> EngineStatus:
    """Wait for a move of the model; cancelling the wait does not stop the move."""
    return await asyncio.shield(asyncio.wrap_future(move))


def _rounds(painted: Painted) -> tuple[bytes, ...]:
    """The result of each round as shown: without the parts that a mask or alpha hides."""
    from step1x_edit.pictures import images

    return tuple(
        images.preview(images.Picture(pixels), max_base64_bytes=images.ROUND_BASE64_BYTES)
        for pixels in (() if painted.rounds is None else painted.rounds)
    )


def _rounded(plan: PlanStatus) -> PlanStatus:
    """The plan rounded to two digits, because its figures are estimates or fluctuate."""
    figures: dict[str, Any] = {
        name: round(value, 2) for name, value in vars(plan).items() if isinstance(value, float)
    }
    return replace(plan, **figures)


def named_version(settings: Settings) -> str | None:
    """The version of the model if the settings name it; nothing is opened."""
    if settings.model_version != "auto":
        return settings.model_version
    if settings.model_path is None:
        return DEMO.version
    name = settings.model_path.name
    return next((each.version for each in CATALOG if each.name == name), None)


def _certain_version(settings: Settings) -> str | None:
    """The version that the model must have, if the settings leave no other."""
    if settings.model_version != "auto":
        return settings.model_version
    return DEMO.version if settings.model_path is None else None


def suggestion_for(version: str | None, settings: Settings) -> Suggestion | None:
    """The recommended parameters of a version, if the operator's defaults differ."""
    suggested = SUGGESTED.get(version or "")
    chosen = Suggestion(settings.default_num_steps, settings.default_guidance_scale)
    return None if suggested == chosen else suggested
