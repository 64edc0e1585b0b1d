"""The pairs as latents and hidden states, encoded once and kept in files beside the output.

A file is found by all that it depends on: the bytes of both pictures, the instruction, the size,
and the files of the checkpoint. So a later training uses those of an earlier one, and training
itself needs neither the conditioner nor the autoencoder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from step1x_edit.checkpoints.arena import Arena
from step1x_edit.checkpoints.read import OpenedCheckpoint
from step1x_edit.checkpoints.stored import Stored
from step1x_edit.model.denoising import Branch, Encoded
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.request import NetworkRequest, Pixels
from step1x_edit.model.transformer import QuotedText
from step1x_edit.schemas.training import Pair, TrainRequest

FORMAT: Final = 1
"""Of these files; another number makes all of them again."""


@dataclass(frozen=True)
class Example:
    """A pair in one size, and the files that hold it encoded."""

    name: str
    prompt: str
    pair: Pair
    size: int
    encoded_at: Path
    target_at: Path

    def encoded(self) -> Encoded:
        """The source and its prompts: the instruction, and the empty one."""
        tensors, notes = _read(self.encoded_at)
        branches = [_branch(tensors, index) for index in range(int(notes["branches"]))]
        rows, columns = int(notes["rows"]), int(notes["columns"])
        return Encoded(tensors["reference"], tuple(branches), rows, columns)

    def target(self) -> Tensor:
        """The latents (1, N, C) of the picture that the edit is to make."""
        return _read(self.target_at)[0]["target"]


def read_parts(opened: OpenedCheckpoint, parts: tuple[str, ...], device: torch.device) -> None:
    """Read these networks onto a device; the others stay without weights."""
    weights = [each for each in opened.weights if each.name.partition(".")[0] in parts]
    arena = Arena(weights)
    arena.fill()
    arena.attach(arena.memories)
    for part in parts:
        opened.checkpoint.pipeline.modules[part].to(device)


def examples_of(
    pairs: Sequence[Pair], request: TrainRequest, opened: OpenedCheckpoint, folder: Path
) -> list[Example]:
    """Each pair in each size, with the files where it is or will be."""
    model = _identity(opened)
    found = []
    for pair in pairs:
        pictures = [_digest(pair.source), None if pair.target is None else _digest(pair.target)]
        for size in request.sizes:
            key = _key(FORMAT, model, size, pair.prompt, *pictures)
            # Its own edit also depends on how that is made.
            made = "" if pair.target else _key(request.edit_steps, request.seed, opened.precision)
            name = pair.name if len(request.sizes) == 1 else f"{pair.name} at {size}"
            target_at = folder / f"{key}{made}.target.safetensors"
            at = folder / f"{key}.safetensors"
            found.append(Example(name, pair.prompt, pair, size, at, target_at))
    return found


@torch.inference_mode()
def encode(
    examples: Sequence[Example], pipeline: EditPipeline, pixels_of: Callable[[str], Pixels]
) -> Iterator[Example]:
    """Encode what is not in files yet, and yield after each; needs conditioner and autoencoder."""
    for example in examples:
        asked = NetworkRequest(
            pixels_of(example.pair.source), example.prompt, size_level=example.size
        )
        encoded = pipeline.encode(asked)
        tensors = {"reference": encoded.reference}
        for index, branch in enumerate(encoded.branches):
            tensors |= _tensors_of(branch, index)
        notes = {
            "rows": str(encoded.rows),
            "columns": str(encoded.columns),
            "branches": str(len(encoded.branches)),
        }
        if example.pair.target is not None:
            target = pipeline.encode_target(pixels_of(example.pair.target), encoded)
            write_tensors(example.target_at, {"target": target})
        write_tensors(example.encoded_at, tensors, notes)
        yield example


def make_edit(
    example: Example, pipeline: EditPipeline, request: TrainRequest, guidance: float
) -> Tensor:
    """The latents (1, N, C) of the edit that the model makes now; needs the transformer."""
    encoded = example.encoded()
    asked = NetworkRequest(
        None, example.prompt, num_steps=request.edit_steps, guidance_scale=guidance
    )
    with torch.inference_mode():
        *_, last = pipeline.denoise(encoded, pipeline.start(encoded, request.seed), asked)
    return last.latents


def keep_edit(example: Example, latents: Tensor) -> None:
    """Write the model's own edit as the target of a pair."""
    write_tensors(example.target_at, {"target": latents})


def write_tensors(
    path: Path, tensors: dict[str, Tensor], notes: dict[str, str] | None = None
) -> None:
    """Write a file that is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, unfinished, metadata=notes)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        return tensors, opened.metadata() or {}


def _tensors_of(branch: Branch, index: int) -> dict[str, Tensor]:
    tensors = {"embeds": branch.embeds, "mask": branch.mask}
    if branch.quoted is not None:
        tensors |= {"quoted_embeds": branch.quoted.embeds, "quoted_mask": branch.quoted.mask}
    if branch.txt_ids is not None:
        tensors["txt_ids"] = branch.txt_ids
    return {f"{index}.{name}": tensor for name, tensor in tensors.items()}


def _branch(tensors: dict[str, Tensor], index: int) -> Branch:
    found = {
        name.removeprefix(f"{index}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{index}.")
    }
    quoted = None
    if "quoted_embeds" in found:
        quoted = QuotedText(found["quoted_embeds"], found["quoted_mask"])
    return Branch(found["embeds"], found["mask"], quoted, found.get("txt_ids"))


def _identity(opened: OpenedCheckpoint) -> str:
    """The files of a checkpoint, by name, size and time."""
    files = {
        (span.file.path.name, span.file.size, span.file.modified_ns)
        for weight in opened.weights
        if isinstance(weight.source, Stored)
        for span in weight.source.spans
    }
    return _key(opened.checkpoint.name, sorted(files))


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
