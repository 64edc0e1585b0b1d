"""The process that trains: the child process of `step1x-edit train-lora`, which may import torch.

It reads one line of JSON from stdin, its work, and writes a line of JSON for each event to stdout.
When stdin ends, the parent wants to stop or is gone: the process saves its state after the step
and exits. It knows nothing about options or terminals.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from filelock import FileLock, Timeout

from step1x_edit.channel import Start
from step1x_edit.errors import (
    CheckpointError,
    InternalError,
    InvalidParameterError,
    JobConflictError,
    ModelUnavailableError,
    OutOfMemoryError,
    OutputNotWritableError,
    Step1XEditError,
)
from step1x_edit.logs import log_to_stderr
from step1x_edit.schemas.requests import DEFAULT_GUIDANCE_SCALE
from step1x_edit.schemas.training import STATE, Pair, TrainRequest
from step1x_edit.settings import Limits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from step1x_edit.checkpoints.read import OpenedCheckpoint
    from step1x_edit.model.pipeline import EditPipeline
    from step1x_edit.model.request import Pixels
    from step1x_edit.training.examples import Example
    from step1x_edit.training.loop import Training

log = logging.getLogger(__name__)

CACHE: Final = "cache"
PICTURES: Final = "validation"

Event = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What the parent asks for."""

    start: Start
    request: TrainRequest
    pairs: tuple[Pair, ...]
    limits: Limits
    output: Path
    folder: Path
    """Everything else that a training writes."""
    overwrite: bool
    """Whether to begin again, even if there is a state of another training."""
    only_estimate: bool
    """Whether to train nothing, and only say what a step needs."""

    @classmethod
    def from_json(cls, text: str) -> Work:
        """What `service.training` has written."""
        data = json.loads(text)
        return cls(
            start=Start(**data["start"]),
            request=TrainRequest(**data["request"]),
            pairs=tuple(Pair(**pair) for pair in data["pairs"]),
            limits=Limits(**data["limits"]),
            output=Path(data["output"]),
            folder=Path(data["folder"]),
            overwrite=data["overwrite"],
            only_estimate=data["only_estimate"],
        )


def run(work: Work, is_stopped: Callable[[], bool]) -> Generator[Event, None, None]:
    """Train, and yield what happens; the last event is `trained`, or `stopped`."""
    from step1x_edit.training.examples import examples_of, read_parts

    device = _device(work.start)
    examples = examples_of(work.pairs, work.request, _open(work), work.folder / CACHE)
    yield from _encoded(work, examples, device, is_stopped)
    if is_stopped():
        yield {"stopped": 0}
        return
    opened = _open(work)
    yield {"phase": "loading", "text": f"reading {opened.checkpoint.name}"}
    read_parts(opened, ("transformer",), device)
    pipeline = opened.checkpoint.pipeline
    yield from _own_edits(work, examples, pipeline, is_stopped)
    if is_stopped():
        yield {"stopped": 0}
        return
    yield from _trained(work, examples, opened, is_stopped)


def _encoded(
    work: Work, examples: list[Example], device: torch.device, is_stopped: Callable[[], bool]
) -> Iterator[Event]:
    """Encode the pairs that no file holds yet; afterwards the networks are free again."""
    from step1x_edit.training.examples import encode, read_parts

    missing = [
        each
        for each in examples
        if not each.encoded_at.exists() or (each.pair.target and not each.target_at.exists())
    ]
    if not missing:
        return
    # Exact, whatever the transformer is kept as: these numbers are used in every step.
    exact = replace(work, request=work.request.model_copy(update={"precision": "auto"}))
    opened = _open(exact)
    yield {"phase": "loading", "text": f"reading the encoders of {opened.checkpoint.name}"}
    read_parts(opened, ("conditioner", "vae"), device)
    pixels_of = partial(_pixels_of, work.limits)
    for done, example in enumerate(encode(missing, opened.checkpoint.pipeline, pixels_of), 1):
        yield _progress("encoding", f"encoded {example.name}", done, len(missing))
        if is_stopped():
            return


def _own_edits(
    work: Work, examples: list[Example], pipeline: EditPipeline, is_stopped: Callable[[], bool]
) -> Iterator[Event]:
    """Make the targets of pairs that are kept, before anything is learned."""
    from step1x_edit.training.examples import keep_edit, make_edit

    missing = [each for each in examples if not each.target_at.exists()]
    for done, example in enumerate(missing, 1):
        keep_edit(example, make_edit(example, pipeline, work.request, DEFAULT_GUIDANCE_SCALE))
        yield _progress("editing", f"edited {example.name}, to keep it", done, len(missing))
        if is_stopped():
            return


def _trained(
    work: Work, examples: list[Example], opened: OpenedCheckpoint, is_stopped: Callable[[], bool]
) -> Iterator[Event]:
    from step1x_edit.training.loop import Training, fingerprint, state_notes

    request, pipeline = work.request, opened.checkpoint.pipeline
    with_target = [each for each in examples if each.pair.target is not None]
    held_out = with_target[len(with_target) - request.held_out * len(request.sizes) :]
    learned = [each for each in examples if each not in held_out]
    training = Training(pipeline.transformer, pipeline.config, request)
    notes, state = fingerprint(request, examples), work.folder / STATE
    if state.exists() and not work.overwrite:
        _check_same(notes, state_notes(state), work)
        training.load(state)
        if training.done > request.steps:
            raise InvalidParameterError(
                f"this training has already made {training.done} steps: choose more --steps, or "
                "--overwrite to begin again"
            )
        yield {"note": f"continued after step {training.done}"}
    if held_out and not training.done:
        yield from _validated(work, held_out, opened, training)
    mean = None
    for loss in training.steps(learned):
        mean = loss if mean is None else 0.95 * mean + 0.05 * loss
        text = f"step {training.done} of {request.steps}, loss {mean:.4f}"
        yield _progress("training", text, training.done, request.steps)
        stops = is_stopped()
        if stops or training.done % request.save_every == 0 or training.done == request.steps:
            training.save(state, notes)
        if stops:
            yield {"stopped": training.done}
            return
        if held_out and (
            training.done % request.validate_every == 0 or training.done == request.steps
        ):
            yield from _validated(work, held_out, opened, training)
    _write(work, opened, training, len(learned))
    yield {"trained": {"output": str(work.output), "steps": training.done, "loss": mean}}


def _validated(
    work: Work, held_out: list[Example], opened: OpenedCheckpoint, training: Training
) -> Iterator[Event]:
    """Edit the pairs that are held out; source, result and target stand side by side."""
    import numpy as np
    import torch
    from PIL import Image

    from step1x_edit.training.examples import make_edit, read_parts

    pipeline = opened.checkpoint.pipeline
    folder = work.folder / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    latents = []
    for done, example in enumerate(held_out, 1):
        latents.append(make_edit(example, pipeline, work.request, DEFAULT_GUIDANCE_SCALE))
        yield _progress("validating", f"edited {example.name}", done, len(held_out))
    read_parts(opened, ("vae",), training.transformer.img_in.weight.device)
    figures = []
    for example, result in zip(held_out, latents, strict=True):
        encoded = example.encoded()
        rows: list[Tensor] = [encoded.reference, result, example.target()]
        with torch.inference_mode():
            source, made, wanted = (pipeline.decode(each, encoded) for each in rows)
        name = f"step-{training.done:06}-{Path(example.name).stem}-{example.size}.png"
        Image.fromarray(np.concatenate([source, made, wanted], axis=1)).save(folder / name)
        figures.append(_psnr(made, wanted))
    pipeline.vae.to("meta")
    mean = sum(figures) / len(figures)
    yield {
        "note": f"after step {training.done}, PSNR of {len(figures)} held-out results to their "
        f"targets: {mean:.1f} dB (higher is closer): {folder}"
    }


def _psnr(one: Pixels, other: Pixels) -> float:
    import numpy as np

    error = np.square(one.astype(np.float64) - other).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def _write(work: Work, opened: OpenedCheckpoint, training: Training, pairs: int) -> None:
    """Publish the LoRA, complete or not at all."""
    from step1x_edit.training.low_rank import write_lora

    request, checkpoint = work.request, opened.checkpoint
    metadata = {
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(request.rank),
        "ss_network_alpha": f"{training.alpha:g}",
        "ss_base_model_version": f"step1x-edit {checkpoint.version}",
        "ss_sd_model_name": checkpoint.name,
        "ss_output_name": work.output.stem,
        "ss_learning_rate": f"{request.learning_rate:g}",
        "ss_batch_size_per_device": str(request.batch_size),
        "ss_max_train_steps": str(request.steps),
        "ss_steps": str(training.done),
        "ss_num_train_images": str(pairs),
        "ss_resolution": request.size,
        "ss_seed": str(request.seed),
        "ss_guidance_scale": f"{request.guidance:g}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "step1x-edit/lora",
        "modelspec.implementation": "https://github.com/stepfun-ai/Step1X-Edit",
        "modelspec.title": work.output.stem,
        "modelspec.prediction_type": "velocity",
        "modelspec.resolution": f"{max(request.sizes)}x{max(request.sizes)}",
    }
    unfinished = work.output.with_name(f".{work.output.name}.part")
    dtype = training.transformer.img_in.weight.dtype
    write_lora(unfinished, training.layers, training.alpha, dtype, metadata)
    unfinished.replace(work.output)


def _check_same(notes: Mapping[str, str], found: Mapping[str, str], work: Work) -> None:
    """Raise InvalidParameterError if a state is of another training."""
    differing = [name for name, value in notes.items() if found.get(name) != value]
    if differing:
        raise InvalidParameterError(
            f"{work.folder / STATE} is of a training with other {', '.join(differing)}: choose "
            "another --output, or --overwrite to begin again"
        )


def _open(work: Work) -> OpenedCheckpoint:
    """The checkpoint in the precision of the training; nothing of it is read."""
    from step1x_edit.checkpoints.read import Wanted, open_checkpoint
    from step1x_edit.hub.pulled import pulled_version, resolve_model_path

    start, data_dir = work.start, Path(work.start.data_dir)
    path = resolve_model_path(start.model_path, data_dir)
    named = None if start.model_version == "auto" else start.model_version
    version = named or pulled_version(path, data_dir)
    opened = open_checkpoint(path, Wanted(version=version, precision=work.request.precision))
    found = opened.checkpoint.version
    if named not in (None, found):
        raise CheckpointError(f"MODEL_VERSION is {named}, but the checkpoint is {found}")
    return opened


def estimates(work: Work) -> Iterator[Event]:
    """What a step needs at each size, and nothing else; no weights are read."""
    from step1x_edit.training.estimate import needs_of

    opened = _open(work)
    pipeline = opened.checkpoint.pipeline
    dtype = next(each.dtype for each in opened.weights if each.name == "transformer.img_in.weight")
    for size in work.request.sizes:
        needs = needs_of(pipeline.config, dtype, work.request, size)
        yield {"needs": vars(needs) | {"memory": needs.memory, "model": opened.checkpoint.name}}


def _device(start: Start) -> torch.device:
    import torch

    if start.device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelUnavailableError(f"DEVICE is {start.device}, and torch finds no GPU here")
    if start.device != "auto":
        return torch.device(start.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _pixels_of(limits: Limits, path: str) -> Pixels:
    from step1x_edit.pictures.images import decode

    return decode(Path(path).read_bytes(), limits).in_srgb


def _progress(phase: str, text: str, done: int, total: int) -> Event:
    return {"phase": phase, "text": text, "done": done, "total": total}


def main() -> None:
    """Do the work of the first line of stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent closes stdin
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    work = Work.from_json(sys.stdin.readline())
    log_to_stderr(work.start.log_level, work.start.log_format, "training")
    # A torchvision that does not fit torch cannot be imported, and transformers would try.
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    stopped = threading.Event()
    threading.Thread(target=_wait_for_end, args=(stopped,), daemon=True).start()
    try:
        with contextlib.nullcontext() if work.only_estimate else _alone(work.folder):
            for event in estimates(work) if work.only_estimate else run(work, stopped.is_set):
                _say(answer, event)
    except Exception as error:  # noqa: BLE001 - the parent reports it
        _say(answer, _failed(error, work))
    with contextlib.suppress(BrokenPipeError):
        answer.close()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time train into a folder. Raises JobConflictError."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise JobConflictError(
            f"another training writes to {folder}; wait for it, or choose another --output"
        ) from None


def _wait_for_end(stopped: threading.Event) -> None:
    while os.read(0, 1):  # unbuffered: a thread in a buffer's lock would spoil the exit
        pass
    stopped.set()


def _say(answer: IO[str], event: Event) -> None:
    """Tell the parent; without one the training still ends as if it were stopped."""
    with contextlib.suppress(BrokenPipeError):
        answer.write(json.dumps(event) + "\n")
        answer.flush()


def _failed(error: Exception, work: Work) -> Event:
    import torch
    from safetensors import SafetensorError

    known: Step1XEditError
    match error:
        case Step1XEditError():
            known = error
        case torch.OutOfMemoryError() | MemoryError():
            known = OutOfMemoryError(
                "a step does not fit; use a smaller --size or --precision int8 (see --estimate)"
            )
        case FloatingPointError():
            known = InvalidParameterError(f"{error}; use a lower --learning-rate")
        case SafetensorError():
            known = OutputNotWritableError(
                f"a file in {work.folder} is damaged: delete this folder to begin again"
            )
        case OSError():
            known = OutputNotWritableError(f"{error.filename} ({error.strerror})")
        case _:
            log.error("training failed", exc_info=error)
            known = InternalError("training failed unexpectedly; the log says more")
    return {"failed": known.code, "sentence": str(known)}


if __name__ == "__main__":
    main()
