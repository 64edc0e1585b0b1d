"""The messages between engine and worker, and how they cross the pipe between the two processes.

Messages are plain data. On the pipe each is one frame of JSON, followed by its pictures, each as a
frame of raw bytes. Nothing is pickled, so that reading a message can never run code. The channel
knows nothing about queues, models or files. A worker that edits with several processes is to the
others, its *partners*, what the engine is to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from step1x_edit.model.request import NetworkRequest, Pixels
from step1x_edit.model.steps import Evaluations
from step1x_edit.schemas.plan import PlanStatus

if TYPE_CHECKING:  # a worker needs no pydantic
    from step1x_edit.schemas.answers import Location
    from step1x_edit.schemas.requests import Arithmetic, Precision

GIGA: Final = 10**9
"""Bytes of a GB: the unit in which sizes are reported."""


# --- to the worker -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The first message: which model to run, and on which device."""

    model_path: str | None = None
    """A path, or the name of a model pulled into `data_dir`."""
    data_dir: str = ""
    model_version: str = "auto"
    device: str = "auto"
    log_level: str = "INFO"
    loras: Mapping[str, float] = field(default_factory=dict)
    """Paths of LoRA files, and their strengths in edits that name none.

    An edit names a file by its stem.
    """
    log_format: str = "text"
    precision: Precision = "auto"
    arithmetic: Arithmetic = "fp32"
    """Of the demo and the autoencoder on a CPU; auto: see `worker.arithmetic`."""
    edit_cache_bytes: int = 0
    """Host memory for what later edits of the same picture can use again."""
    gpus_per_edit: int = 1
    rank: int = 0
    """0: the worker; the others are its partners."""
    meeting: int = 0
    """The port of this machine at which the processes of an edit find each other."""
    host_bytes: int | None = None
    """The free memory of the host that this process may use; None: all of it."""
    upscale_model: str | None = None
    """The path of the model file that enlarges pictures."""


@dataclass(frozen=True)
class EditJob(NetworkRequest):
    """A request of the network in the queue."""

    number: int = 0
    """Given by the sender; `Cancel` names it."""
    upscale: int = 1
    """How many times an `UpscaleJob` will enlarge the result; refused now if that is impossible."""

    @property
    def smaller(self) -> str:
        """What to ask for, in words, if this job needs too much memory."""
        return "a smaller width and height" if self.width else "a lower size_level"

    @property
    def quicker(self) -> str:
        """What to ask for, in words, if this job takes too long."""
        less = f"fewer num_steps, {self.smaller}"
        return less if self.mode == "turbo" else f"a faster mode, {less}"


@dataclass(frozen=True)
class UpscaleJob:
    """A finished picture to enlarge, in the queue."""

    image: Pixels
    upscale: int
    number: int = 0
    """As that of an `EditJob`."""

    @property
    def quicker(self) -> str:
        """What to ask for, in words, if this job takes too long."""
        return "a lower upscale"


Job: TypeAlias = EditJob | UpscaleJob


@dataclass(frozen=True)
class Cancel:
    """Stop the edit with this number; ignored if it has ended."""

    number: int


@dataclass(frozen=True)
class Offload:
    """Move the model from the compute device to host memory."""


@dataclass(frozen=True)
class Prepare:
    """Bring the model, with these LoRAs and in this precision, to where a partner computes."""

    number: int
    """As in `EditJob`."""
    loras: Mapping[str, float] | None
    precision: Precision
    load: int
    """The partner reads the files again if this has changed."""


@dataclass(frozen=True)
class Denoise(NetworkRequest):
    """Make the steps of an edit with the sender. The picture and the prompts are encoded."""

    number: int = 0
    tensors: Pixels | None = None
    """Safetensors, by the names that `worker.task` gives them."""
    task: Mapping[str, Any] = field(default_factory=dict)
    """What else it says, as plain data."""


Request: TypeAlias = Job | Offload | Prepare | Denoise
ToWorker: TypeAlias = Start | Cancel | Request


# --- to the engine -------------------------------------------------------------------------------


class Phase(str, Enum):
    """The phases of an edit, in order."""

    QUEUED = "queued"
    STARTING = "starting"
    """No replica of a cluster runs yet."""
    LOADING = "loading"
    THINKING = "thinking"
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    REFLECTING = "reflecting"
    UPSCALING = "upscaling"
    SAVING = "saving"


_COUNTED: Final = (Phase.LOADING, Phase.DENOISING, Phase.UPSCALING)


@dataclass(frozen=True)
class Progress:
    """Step `step` of `total` in a phase of an edit.

    In the queue, `step` is the position. While the model is read, `step` and `total` are bytes;
    while a picture is enlarged, they are its tiles.
    """

    phase: Phase
    step: int = 0
    total: int = 0
    preview: Pixels | None = field(default=None, compare=False, repr=False)
    """The picture as predicted at this step, in its working size, if one was requested."""
    is_known: bool = field(default=True, compare=False)
    """False once a small model has found that it does not know such an edit."""
    left_s: float | None = field(default=None, compare=False)
    """Estimated seconds until the end of the phase; None if unknown."""
    warning: str | None = field(default=None, compare=False)
    """Set once the edit is expected to take longer than it may."""
    evaluated: int = field(default=0, compare=False)
    """In how many of the steps so far the network ran."""
    to_evaluate: int = field(default=0, compare=False)
    """In how many of all steps it runs; 0: in each."""

    @property
    def work(self) -> tuple[int, int]:
        """How much of the phase's work is done, and all of it: other steps take no time."""
        return (self.evaluated, self.to_evaluate) if self.to_evaluate else (self.step, self.total)

    @property
    def is_counted(self) -> bool:
        """Whether `step` of `total` says how much of the phase is done."""
        return self.phase in _COUNTED and self.total > 0

    @property
    def text(self) -> str:
        """The same in words: "queued, position 2", "denoising 7/28"."""
        match self.phase:
            case Phase.QUEUED:
                return f"queued, position {self.step}"
            case Phase.LOADING if self.step < self.total:
                read = f"reading {self.step / GIGA:.1f} of {self.total / GIGA:.1f} GB"
                return read if self.left_s is None else f"{read}, about {_rough(self.left_s)}"
            case Phase.LOADING:
                return "loading model"
            case Phase.DENOISING:
                return f"denoising {self.step}/{self.total}"
            case Phase.UPSCALING if self.total:
                return f"upscaling {self.step}/{self.total}"
        return str(self.phase.value)


def _rough(seconds: float) -> str:
    """A duration as exact as an estimate can be: 40 s, 12 min."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


@dataclass(frozen=True)
class Memory:
    """Device memory that the worker holds, as reported by the allocator."""

    allocated_gb: float = 0.0
    reserved_gb: float = 0.0


@dataclass(frozen=True)
class Residence:
    """The model, its location and the memory that it occupies, as measured."""

    location: Location = "Unloaded"
    model: str | None = None
    device: str | None = None
    memory: Memory = Memory()
    version: str | None = None
    size_multiple: int | None = None
    """The sides of the edited picture, in its working size, are multiples of this, in pixels."""
    placement: PlanStatus | None = None
    """How it was last placed where it computes; kept while it waits in host memory."""
    loras: Mapping[str, float] = field(default_factory=dict)
    """The LoRAs in the model by name, and the strength of each."""
    arithmetic: str | None = None
    """What the last edit computed with: the numbers of a CPU, such as `bf16 amx`, and products of
    codes, if any; None on another device without them."""
    numerics: str | None = None
    """What else the bytes of a picture depend on: `cpu/avx512/2 threads/torch 2.13.0`."""
    others: tuple[Memory, ...] = ()
    """The memory on the other devices of an edit, if it has several."""

    @property
    def is_ready(self) -> bool:
        """Whether the model is where it computes; otherwise the next edit loads or moves it."""
        return self.location == ("CPU" if self.device == "cpu" else "GPU")

    @property
    def model_with_loras(self) -> str | None:
        """The model of a picture in words: demo with LoRA hand 0.5."""
        return self.model and name_with_loras(self.model, self.loras)


def name_with_loras(model: str, loras: Mapping[str, float]) -> str:
    """The name of a model with LoRAs in it."""
    named = ", ".join(f"{name} {strength:g}" for name, strength in loras.items())
    return f"{model} with LoRA {named}" if named else model


@dataclass(frozen=True)
class Painted:
    """The edited picture in its working size, or one that has been enlarged."""

    image: Pixels
    warning: str | None = None
    """Set if the model does not know such an edit or has not read its whole prompt."""
    reasoning: Mapping[str, Any] | None = None
    """The reasoning, if it was requested; see `reasoning_of`."""
    rounds: Pixels | None = None
    """(R, H, W, 3): the pictures of all rounds of a reflection, in the same size."""
    evaluations: Evaluations | None = None
    """With reflection, those of all rounds."""
    upscaler_sha256: str | None = None
    """Of the model file that enlarged it, if one did."""


def reasoning_of(
    prompt: str | None, rounds: Sequence[Mapping[str, Any]], best: int
) -> dict[str, Any]:
    """The reasoning as plain data: the rewritten prompt, the rounds, and the best round (from 1).

    A round has `prompt`, `from_round` (the round whose picture it changed; 0 is the input) and,
    with reflection, `verdict`, `description`, `score` (0 to 10, None if it is not readable),
    `reason`, `edit_score` and `quality_score` (lists of 0 to 10) and `value`, which decides which
    round is the best.
    """
    return {"prompt": prompt, "rounds": [dict(each) for each in rounds], "best": best}


@dataclass(frozen=True)
class Failed:
    """The request failed: one of our errors, as its code and its sentence."""

    code: str
    sentence: str


@dataclass(frozen=True)
class Done:
    """The request is done, and has no result."""


Event: TypeAlias = Progress | Painted | Failed | Done


@dataclass(frozen=True)
class Report:
    """An event, and the state of the model at that moment."""

    event: Event
    residence: Residence


# --- on the wire ---------------------------------------------------------------------------------

_KINDS: Final = {
    kind.__name__: kind
    for kind in (
        *(Start, EditJob, UpscaleJob, Cancel, Offload, Prepare, Denoise),
        *(Progress, Painted, Failed, Done),
    )
}

_PICTURES: Final = ("image", "mask", "preview", "rounds", "tensors")
"""The fields that hold pixels, or other bytes."""


def connect(handle: int) -> Connection:
    """Open the inherited end of a pipe."""
    if sys.platform == "win32":
        from multiprocessing.connection import PipeConnection

        return PipeConnection(handle)
    return Connection(handle)


class Channel:
    """One end of the pipe; several threads may send, one receives."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: ToWorker | Report) -> None:
        """Send a message; raises OSError when the other end is gone."""
        header: dict[str, Any] = {}
        body: ToWorker | Event
        if isinstance(message, Report):
            body, header["residence"] = message.event, dataclasses.asdict(message.residence)
        else:
            body = message
        fields = {one.name: getattr(body, one.name) for one in dataclasses.fields(body)}
        pictures = {name: fields.pop(name) for name in _PICTURES if fields.get(name) is not None}
        shapes = {name: picture.shape for name, picture in pictures.items()}
        if fields.get("evaluations") is not None:
            fields["evaluations"] = dataclasses.asdict(fields["evaluations"])
        header |= {"kind": type(body).__name__, "fields": fields, "shapes": shapes}
        with self._sending:
            self._connection.send_bytes(json.dumps(header).encode())
            for picture in pictures.values():
                self._connection.send_bytes(_bytes_of(picture))

    def receive(self) -> ToWorker | Report:
        """Wait for a message; raises EOFError or OSError when the other end is gone."""
        frame = self._connection.recv_bytes()
        if not frame:
            raise EOFError
        header = json.loads(frame)
        fields = header["fields"]
        if "phase" in fields:
            fields["phase"] = Phase(fields["phase"])
        if fields.get("evaluations") is not None:
            fields["evaluations"] = Evaluations(**fields["evaluations"])
        for name, shape in header["shapes"].items():
            fields[name] = _pixels_of(self._connection.recv_bytes(), shape)
        message: Any = _KINDS[header["kind"]](**fields)
        if "residence" not in header:
            return message  # type: ignore[no-any-return]
        residence = header["residence"]
        residence["memory"] = Memory(**residence["memory"])
        residence["others"] = tuple(Memory(**each) for each in residence["others"])
        if residence["placement"] is not None:
            residence["placement"] = PlanStatus(**residence["placement"])
        return Report(message, Residence(**residence))

    def hang_up(self) -> None:
        """Send the end of the stream, even while another thread waits in `receive`."""
        with contextlib.suppress(OSError), self._sending:
            self._connection.send_bytes(b"")

    def close(self) -> None:
        """Close this end; the other one sees the end of the stream."""
        self._connection.close()


def _bytes_of(picture: Pixels) -> memoryview:
    import numpy as np

    return np.ascontiguousarray(picture).reshape(-1).data


def _pixels_of(data: bytes, shape: Sequence[int]) -> Pixels:
    import numpy as np

    return np.frombuffer(data, np.uint8).reshape(shape)
