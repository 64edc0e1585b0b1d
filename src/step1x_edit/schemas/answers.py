"""Every answer; names and descriptions are defined only here."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model
from typing_extensions import Self

from step1x_edit.errors import Step1XEditError
from step1x_edit.model.request import Mode
from step1x_edit.schemas.parameters import CONTRACT, in_order
from step1x_edit.schemas.plan import PlanStatus
from step1x_edit.schemas.requests import (
    EditRecord,
    GeneratePictureRequest,
    GenerationRecord,
    HowToEdit,
    HowToGenerate,
    PictureRequest,
)

Location = Literal["Unloaded", "CPU", "GPU"]
ComputedIn = Annotated[
    str | None,
    Field(description="The numbers and instructions that a CPU computes with: bf16 amx"),
]
Numerics = Annotated[
    str | None,
    Field(description="What else the bytes depend on: device, instruction set, threads, library"),
]


class _Answer(BaseModel):
    """An answer; optional fields that are None are left out of its dictionary."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain JSON values, in the order of the contract."""
        return self.model_dump(mode="json", exclude_none=True)


class ReasoningRound(_Answer):
    """One edit of a reflection and how the model judged it; scores from 0 to 10."""

    prompt: Annotated[str, Field(description="The prompt of this round")]
    from_round: Annotated[
        int, Field(description="The round whose picture it edited, from 1; 0 is the input")
    ]
    verdict: Annotated[
        str | None,
        Field(
            description="<#Think> and the reasoning, then <#Success>, <#Others>, <#Failed>, or "
            "<#Reflection> and what to change next"
        ),
    ] = None
    description: Annotated[
        str | None, Field(description="The model's description of what the picture should show")
    ] = None
    score: Annotated[
        float | None, Field(description="How well the picture matches the description")
    ] = None
    reason: Annotated[str | None, Field(description="The reason for this score")] = None
    edit_score: Annotated[
        list[float] | None, Field(description="Scores for how well the edit follows the prompt")
    ] = None
    quality_score: Annotated[
        list[float] | None, Field(description="Scores for how natural and clean the picture is")
    ] = None
    value: Annotated[
        float | None,
        Field(description="The lowest score of the edit times the lowest of the quality"),
    ] = None


class Reasoning(_Answer):
    """The model's reasoning, and the edits that it tried."""

    prompt: Annotated[
        str | None, Field(description="The prompt as the model rewrote it, with thinking")
    ] = None
    rounds: list[ReasoningRound]
    best: Annotated[int, Field(description="The round whose picture is the result, from 1")]


if TYPE_CHECKING:

    class _HowItWasMade(_Answer):
        """The parameters of an edit, by name, as an answer repeats them."""

else:
    _HowItWasMade = create_model(
        "_HowItWasMade",
        __base__=_Answer,
        prompt=(str, ...),
        **{  # without the limits of a request, and left out if without effect
            name: (field.annotation | None, None)
            for name, field in in_order(HowToEdit.model_fields, CONTRACT).items()
        },
    )


class EditedRegion(_Answer):
    """The part of a picture that was edited, and how large it was for the network."""

    box: Annotated[
        list[int], Field(description="Left, top, right and bottom in pixels of the result")
    ]
    scale: Annotated[
        float,
        Field(
            description="Pixels that the network worked with for each pixel of the result, along "
            "one side; less than 1: the part was larger than size_level"
        ),
    ]


class EditMetadata(_HowItWasMade):
    """The parameters, the model and the device of an edit or a generated picture."""

    prompt: str
    num_steps: int
    guidance_scale: float
    size_level: Annotated[
        int | None, Field(description="Left out for a picture that was generated from text")
    ] = None
    seed: int
    gpu_location: Location
    gpu_memory_gb: float
    model: str | None = None
    device: str | None = None
    arithmetic: ComputedIn = None
    numerics: Numerics = None
    width: int | None = None
    height: int | None = None
    negative_prompt: str | None = None
    mode: Mode | None = None
    warning: str | None = None
    changed_share: Annotated[
        float | None,
        Field(
            description="Share of the pixels that changed, 0 to 1, if there was a mask or outpaint"
        ),
    ] = None
    region: Annotated[
        EditedRegion | None,
        Field(description="With region full: the part of the picture that was edited"),
    ] = None
    loras: Annotated[
        list[str] | None,
        Field(description="The LoRAs that were used, as name:strength, if there were any"),
    ] = None
    evaluations_done: Annotated[
        int | None,
        Field(
            description="How often the network ran: once per step, or twice if there is guidance; "
            "with reflection, in all rounds together"
        ),
    ] = None
    evaluations_skipped: Annotated[
        int | None, Field(description="How many of these runs the mode left out")
    ] = None
    reasoning: Annotated[
        Reasoning | None, Field(description="The outcome of thinking and reflection, if requested")
    ] = None

    def with_warning(self, warning: str | None) -> Self:
        """The same with one more warning, if there is one."""
        together = "; ".join(filter(None, (self.warning, warning)))
        return self.model_copy(update={"warning": together or None})


EDITED: Final = "Image edited successfully"
GENERATED: Final = "Image generated successfully"
KEPT: Final = "Kept from an earlier run"


class EditAnswer(_Answer):
    """One picture was edited, or generated from text, and saved."""

    status: Literal["success"] = "success"
    message: str = EDITED
    output_path: str
    processing_time: float
    metadata: EditMetadata


class RunningAnswer(_Answer):
    """The edit continues in the background; `get_job` returns its answer once it has ended."""

    status: Literal["running"] = "running"
    job_id: Annotated[str, Field(description="The id for get_job and cancel_job")]
    message: Annotated[str, Field(description="The progress of the edit in words")]
    phase: Annotated[
        str | None,
        Field(
            description="queued, starting, loading, thinking, encoding, denoising, decoding, "
            "reflecting, upscaling or saving"
        ),
    ] = None
    step: Annotated[
        int | None,
        Field(description="Completed denoising steps, or tiles; while loading, bytes read"),
    ] = None
    total: Annotated[
        int | None, Field(description="All denoising steps; while loading, all bytes")
    ] = None
    position: Annotated[int | None, Field(description="Position in the queue, from 1")] = None


class CancelAnswer(_Answer):
    """The answer of `cancel_job`."""

    status: Literal["success"] = "success"
    message: Annotated[str, Field(description="What was cancelled, or why nothing was")]
    job_id: Annotated[str, Field(description="The id of the edit")]


class RoundPicture(_Answer):
    """The picture of a round of a reflection, as a small JPEG in base64."""

    image: str


class PictureAnswer(_Answer):
    """One picture was edited; the answer contains it."""

    status: Literal["success"] = "success"
    message: str = EDITED
    processing_time: float
    metadata: EditMetadata
    media_type: str
    image_base64: str
    rounds: Annotated[
        list[RoundPicture] | None,
        Field(description="The pictures of the rounds in metadata.reasoning, in order"),
    ] = None


class ActionClaim(_Answer):
    """What was done to a picture, as its C2PA manifest says."""

    action: str
    digital_source_type: str | None = None
    software: str | None = None


class IngredientClaim(_Answer):
    """A picture that another one was made of, as its C2PA manifest says."""

    relationship: str
    title: str | None = None
    manifest: Annotated[
        Literal["valid", "invalid"] | None, Field(description="Its own manifest, if it had one")
    ] = None


class ManifestClaim(_Answer):
    """What the C2PA manifest of a picture claims."""

    status: Annotated[
        Literal["valid", "invalid", "elsewhere", "unchecked"],
        Field(
            description="Whether the file is as it was signed; elsewhere: the manifest is at a "
            "URL, which is not fetched; unchecked: the extra c2pa is not installed"
        ),
    ]
    problems: Annotated[list[str], Field(description="Codes of C2PA for what is wrong")] = []
    signer: str | None = None
    generator: Annotated[str | None, Field(description="The program that signed")] = None
    actions: list[ActionClaim] = []
    ingredients: list[IngredientClaim] = []


class CreditClaim(_Answer):
    """Who is credited for a picture, and its terms of use; what does not begin with exif is XMP."""

    creators: list[str] | None = None
    copyright: str | None = None
    usage_terms: str | None = None
    web_statement: str | None = None
    credit_line: str | None = None
    exif_artist: str | None = None
    exif_copyright: str | None = None


class InspectAnswer(_Answer):
    """What a picture claims about itself."""

    status: Literal["success"] = "success"
    path: str
    format: str
    width: int
    height: int
    size_bytes: int
    record: EditRecord | GenerationRecord | None = None
    digital_source_type: str | None = None
    credit: CreditClaim | None = None
    c2pa: ManifestClaim | None = None
    warning: str | None = None


class ErrorAnswer(_Answer):
    """The call failed; `error` is one sentence that says what to change."""

    status: Literal["error"] = "error"
    error: str
    code: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: Step1XEditError) -> ErrorAnswer:
        """The answer that reports `error`."""
        return cls(error=str(error), code=error.code, retry_after_s=error.retry_after_s)


class RecipeAnswer(_Answer):
    """How a picture was made, as its file says: enough to make it again."""

    status: Literal["success"] = "success"
    model: Annotated[str, Field(description="The model, with its LoRAs")]
    prompt: Annotated[
        str | None, Field(description="Left out if the operator keeps prompts out of files")
    ] = None
    parameters: Annotated[
        HowToEdit | HowToGenerate,
        Field(description="The other parameters, by their names in a request"),
    ]
    input_sha256: Annotated[
        str | None,
        Field(description="The hash of the input's bytes; left out if there was no input"),
    ] = None
    mask_sha256: Annotated[
        str | None, Field(description="The hash of the mask's bytes, if there was one")
    ] = None
    rewritten_prompt: Annotated[
        str | None, Field(description="The prompt as the model rewrote it, with thinking")
    ] = None
    upscaler: Annotated[
        str | None, Field(description="The file of the model that enlarged it, if one did")
    ] = None
    upscaler_sha256: Annotated[str | None, Field(description="The hash of its bytes")] = None
    precision: Annotated[str | None, Field(description="How the weights were kept")] = None
    arithmetic: ComputedIn = None
    numerics: Numerics = None


_SHOWN: Final = 100  # characters


class Difference(_Answer):
    """What a picture and the same one made again say differently about themselves."""

    name: str
    then: str | None = None
    now: str | None = None

    @property
    def text(self) -> str:
        """The same in words."""
        return f"{self.name} {_shown(self.then)}, now {_shown(self.now)}"


def _shown(value: str | None) -> str:
    """A value of a record, which anyone can have written, short and without control characters."""
    text = "".join(each if each.isprintable() else " " for each in value or "unknown")
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


class CheckAnswer(_Answer):
    """A picture compared with the one that its recipe gives now."""

    status: Literal["success"] = "success"
    message: Annotated[str, Field(description="Equal to the byte, or what differs and why")]
    equal: Annotated[bool, Field(description="Whether the bytes of the files are equal")]
    max_difference: Annotated[
        int | None, Field(description="The largest difference of a value, in levels of 255")
    ] = None
    changed_share: Annotated[
        float | None, Field(description="The share of the values that differ, 0 to 1")
    ] = None
    differences: Annotated[
        list[Difference] | None, Field(description="What the records say differently")
    ] = None
    metadata: EditMetadata


class BatchItem(_Answer):
    """The result for one input of a batch."""

    input: str
    result: EditAnswer | ErrorAnswer


class BatchSummary(_Answer):
    """How many inputs a batch had, and how many succeeded and failed."""

    total: int
    successes: int
    failures: int


class BatchAnswer(_Answer):
    """The results of a batch; `partial` if some items failed, `error` if all did."""

    status: Literal["success", "partial", "error"]
    message: str
    error: str | None = None
    results: list[BatchItem]
    summary: BatchSummary

    @classmethod
    def of(cls, items: Sequence[BatchItem]) -> BatchAnswer:
        """Count the items and derive the status of the batch."""
        total = len(items)
        successes = sum(isinstance(item.result, EditAnswer) for item in items)
        failures = total - successes
        message = f"Processed {total} images: {successes} succeeded, {failures} failed"
        if failures == 0:
            status: Literal["success", "partial", "error"] = "success"
        else:
            status = "partial" if successes else "error"
        return cls(
            status=status,
            message=message,
            error=message if status == "error" else None,
            results=list(items),
            summary=BatchSummary(total=total, successes=successes, failures=failures),
        )


class JobState(str, Enum):
    """The state of a job; the last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        """Whether the state can no longer change."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


class JobProgress(_Answer):
    """The progress of a job: `step` of `total` if the phase has steps, or its `position`."""

    phase: str
    step: Annotated[
        int | None, Field(description="Completed steps of the phase; while loading, bytes read")
    ] = None
    total: Annotated[
        int | None, Field(description="All steps of the phase; while loading, all bytes")
    ] = None
    position: Annotated[
        int | None, Field(description="Position in the queue of edits, from 1, while it waits")
    ] = None


class JobResult(_Answer):
    """The stored answer of a successful job, besides the picture."""

    processing_time: float
    metadata: EditMetadata


class JobAnswer(_Answer):
    """A stored job as it is now; times in seconds since 1970."""

    id: str
    status: JobState
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    position: int | None = None
    progress: JobProgress | None = None
    request: PictureRequest | GeneratePictureRequest
    processing_time: float | None = None
    metadata: EditMetadata | None = None
    warning: Annotated[
        str | None,
        Field(description="When the job is created: that such an edit takes too long, if it does"),
    ] = None
    error: str | None = None
    code: str | None = None
    retry_after_s: float | None = None


class JobsAnswer(_Answer):
    """Some stored jobs, newest first, and whether there are older ones than `last_id`."""

    object: Literal["list"] = "list"
    data: list[JobAnswer]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class JobEventAnswer(_Answer):
    """An event of a stored job: a new status, or progress."""

    at: float
    status: JobState
    progress: JobProgress | None = None


class PulledModel(_Answer):
    """A published model and its state on this disk."""

    name: str
    version: str | None = None
    repos: Annotated[list[str], Field(description="Its repositories on the hub")]
    note: str | None = None
    size_bytes: Annotated[int | None, Field(description="Its size on the disk, if published")] = (
        None
    )
    state: Literal["available", "partial", "pulled"]
    folder: Annotated[
        str | None, Field(description="Its folder on this disk, complete or partial")
    ] = None
    disk_bytes: Annotated[int | None, Field(description="The size of that folder")] = None
    runs: Annotated[bool, Field(description="Whether MODEL_PATH selects it")]


class PullProgressAnswer(_Answer):
    """The progress of a pull in bytes; both are 0 while the hub is asked for the list of files."""

    phase: Literal["asking", "downloading", "checking", "waiting"]
    done: int
    total: int
    text: Annotated[str, Field(description="The file, or what the pull waits for")]


class PullAnswer(_Answer):
    """The state of a pull, or its outcome."""

    name: str
    status: JobState
    progress: PullProgressAnswer
    path: Annotated[str | None, Field(description="The folder of the pulled model")] = None
    error: str | None = None
    code: str | None = None


class ModelsAnswer(_Answer):
    """The published models, and the running or last pull."""

    status: Literal["success"] = "success"
    models: list[PulledModel]
    pull: PullAnswer | None = None


class GpuStatistics(_Answer):
    """How often the model was moved since the start."""

    total_loads: int = 0
    gpu_to_cpu: int = 0
    cpu_to_gpu: int = 0
    full_releases: int = 0


class DeviceMemory(_Answer):
    """The memory that one of several devices holds, in GB."""

    device: str
    allocated_gb: float
    reserved_gb: float


class ReplicaStatus(_Answer):
    """One replica of a cluster: where its model is and how much memory it uses."""

    name: str
    state: Annotated[Literal["starting", "idle", "editing"], Field(description="What it does")]
    model_location: Location
    gpu_memory_allocated_gb: float
    gpu_memory_reserved_gb: float
    idle_time: float
    statistics: GpuStatistics
    model: str | None = None
    device: str | None = None
    numerics: Numerics = None
    loading: str | None = None


class GpuStatus(_Answer):
    """Where the model is and how much memory it uses; times in seconds, memory in GB."""

    model_location: Location
    idle_time: float
    idle_timeout: int | float  # int first: 60 stays 60 in JSON
    gpu_memory_allocated_gb: float
    gpu_memory_reserved_gb: float
    auto_monitor_running: bool
    statistics: GpuStatistics
    model: str | None = None
    device: str | None = None
    arithmetic: ComputedIn = None
    numerics: Numerics = None
    queue_length: int | None = None
    plan: Annotated[
        PlanStatus | None,
        Field(
            description="How the model is placed; while it is in host memory, how it was on the "
            "device. Left out if no model is loaded"
        ),
    ] = None
    loras: Annotated[
        list[str] | None,
        Field(description="The names of the LoRAs that edits can use, if there are any"),
    ] = None
    loras_in_model: Annotated[
        list[str] | None,
        Field(description="Those that the last edit used, as name:strength"),
    ] = None
    loading: Annotated[
        str | None,
        Field(description="While an edit loads the model: how much of it has been read, in words"),
    ] = None
    other_devices: Annotated[
        list[DeviceMemory] | None,
        Field(
            description="The memory on the other GPUs of an edit, if it has several: the fields "
            "above are of the first"
        ),
    ] = None
    replicas: Annotated[
        list[ReplicaStatus] | None,
        Field(
            description="With ENGINE=ray: each replica. The fields above are then those of the "
            "first one, and `statistics` the sums"
        ),
    ] = None


class StatusAnswer(_Answer):
    """The answer of `get_gpu_status`."""

    status: Literal["success"] = "success"
    gpu_status: GpuStatus


class GpuAnswer(_Answer):
    """The answer of `offload_gpu` and `release_gpu`."""

    status: Literal["success"] = "success"
    message: str
    gpu_status: GpuStatus


class EstimateAnswer(_Answer):
    """The estimated time and memory of an edit that was not run; null if unknown."""

    status: Literal["success"] = "success"
    width: Annotated[int, Field(description="Width in pixels at which the picture is edited")]
    height: Annotated[int, Field(description="Height in pixels at which the picture is edited")]
    num_steps: int
    guidance_scale: float
    size_level: int
    mode: Mode
    n: Annotated[int, Field(description="Number of pictures, one after the other")]
    predicted_seconds: Annotated[
        float | None,
        Field(
            description="For all n pictures, from the last edit of the same kind, without waiting "
            "and loading; with reflection the time of all rounds, an upper bound"
        ),
    ]
    predicted_peak_gb: Annotated[float | None, Field(description="Estimated device memory in GB")]
    must_load: Annotated[
        bool, Field(description="Whether the model must first be loaded or moved to the device")
    ]
    queue_length: Annotated[int, Field(description="Number of waiting edits")]
    model: str | None
    device: str | None
    reason: Annotated[str | None, Field(description="The memory plan in words")]
    note: Annotated[
        str | None,
        Field(description="Why less is known than usual, or that such an edit takes too long"),
    ]
