"""Measure how the velocity of a checkpoint bends along t, for the modes fast and turbo.

    python scripts/calibrate_steps.py [MODEL] [--version v1.1] [--device cuda] [--sizes 384,1056]
                                      [--pictures a.jpg,b.jpg] [--prompts FILE]

Makes exact edits and asks at each step how far the velocity is from the last one (first order) and
from the line through the last two (second order). From the second follows how densely it must be
evaluated along t. Writes `steps.json` beside the weights (default: those of the embedded demo),
where each version has its entry. Other sizes than those between the smallest and the largest are
refused in the modes fast and turbo; edits at 512 can be somewhat smaller, and edits at 1024 larger,
as the ratio of the picture requires. Whether the region of a mask may run alone is not measured: it
stays as it was. Then makes the edits of the smallest size in the modes fast and turbo, with several
num_steps. Prints tables; the last line is one JSON object.

The pictures are photographs that installed packages contain, none of those that the benchmarks
judge by.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from demo_data import TRAINING_PHOTOS, load_photo
from step1x_edit.checkpoints.read import DEMO_FOLDER, STEPS_FILE, Wanted, read_checkpoint
from step1x_edit.model.denoising import DenoiseState, Encoded
from step1x_edit.model.flow import extrapolate, jumps
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.request import Mode, NetworkRequest, Pixels
from step1x_edit.model.steps import Curve, Profile, num_evaluated

PHOTOS = ("astronaut", "chelsea", "flower")
PROMPTS = (
    "make it a night scene",
    "turn it into a mosaic",
    "make it look like a pencil sketch",
    "exchange red and blue",
    "turn it into a black and white photo",
    "a thermal image",
)
MODES: tuple[Mode, ...] = ("fast", "turbo")
NUM_STEPS = 28
TRIED_NUM_STEPS = (10, 28, 50)
EDITED_BELOW = 0.88
"""RegionE calls a token edited if its cosine with that of the picture is lower."""


@dataclass(frozen=True)
class Exact:
    """An exact edit: what it starts from, its velocities by falling t, and its end."""

    request: NetworkRequest
    encoded: Encoded
    velocities: list[tuple[float, Tensor]]
    edited: list[float]
    """The share of tokens that are predicted to differ from the picture, by step."""
    latents: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--version")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", default="384,640,1056")
    parser.add_argument("--pictures")
    parser.add_argument("--prompts", type=Path, help="one prompt per line")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    checkpoint = read_checkpoint(arguments.model, Wanted(version=arguments.version))
    pipeline = checkpoint.pipeline
    for module in pipeline.modules.values():
        module.to(arguments.device)
    requests = _requests(
        [_read(Path(name)) for name in arguments.pictures.split(",")]
        if arguments.pictures
        else [(load_photo(*TRAINING_PHOTOS[name]) * 255).astype(np.uint8) for name in PHOTOS],
        arguments.prompts.read_text("utf-8").splitlines() if arguments.prompts else PROMPTS,
    )

    curves: list[Curve] = []
    smallest: list[Exact] = []
    for size in sorted(map(int, arguments.sizes.split(","))):
        exact = [exact_edit(pipeline, replace(each, size_level=size)) for each in requests]
        smallest = smallest or exact
        times = [t for t, _ in exact[0].velocities]
        jumps_at = jumps(times, requests[0].guidance_scale, pipeline.config.guidance_rule)
        steps = [i for i in range(2, NUM_STEPS) if not {i, i - 1} & set(jumps_at)]
        tokens = min(each.latents.shape[1] for each in exact)
        curves.append(Curve(tokens, tuple(density(exact, steps))))
        print(f"{tokens} tokens: t, change, error of the line, density, edited tokens")
        for index, (t, weight) in zip(steps, curves[-1].density, strict=True):
            errors = [error(exact, index, order) for order in (1, 2)]
            edited = np.mean([each.edited[index] for each in exact])
            print(f"{t:.3f} {errors[0]:.4f} {errors[1]:.4f} {weight:.2f} {edited:.2f}", flush=True)

    before = pipeline.profile or Profile(())
    pipeline.profile = replace(before, curves=tuple(curves), caveat=None)
    folder = arguments.model or DEMO_FOLDER
    file = (folder if folder.is_dir() else folder.parent) / STEPS_FILE
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    known[pipeline.config.version] = pipeline.profile.to_json()
    file.write_text(json.dumps(known) + "\n", encoding="utf-8")

    losses = {}
    for num_steps in TRIED_NUM_STEPS:
        edits = [replace(each.request, num_steps=num_steps) for each in smallest]
        exact = [exact_edit(pipeline, each) for each in edits]
        for mode in MODES:
            evaluated = num_evaluated(mode, num_steps)
            losses[f"{mode} {evaluated}/{num_steps}"] = round(loss(pipeline, exact, mode), 4)
    for name, value in losses.items():
        print(f"{name}: the latents differ by {value}")
    print(json.dumps({"version": checkpoint.version, "file": str(file), "losses": losses}))


def _read(file: Path) -> Pixels:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _requests(pictures: Sequence[Pixels], prompts: Sequence[str]) -> list[NetworkRequest]:
    """Each prompt once, with the pictures in turn."""
    return [
        NetworkRequest(pictures[i % len(pictures)], prompt, num_steps=NUM_STEPS, seed=i)
        for i, prompt in enumerate(prompts)
    ]


def exact_edit(pipeline: EditPipeline, request: NetworkRequest) -> Exact:
    encoded = pipeline.encode(request)
    states = list(_states(pipeline, encoded, request))
    edited = []
    for state in states:
        assert state.predicted is not None
        cosine = F.cosine_similarity(state.predicted, encoded.reference.to(state.predicted), dim=-1)
        edited.append(float((cosine < EDITED_BELOW).float().mean()))
    velocities = [state.known[-1] for state in states]
    return Exact(request, encoded, velocities, edited, states[-1].latents)


def _states(
    pipeline: EditPipeline, encoded: Encoded, request: NetworkRequest
) -> list[DenoiseState]:
    return list(pipeline.denoise(encoded, pipeline.start(encoded, request.seed), request))


def error(exact: Sequence[Exact], index: int, order: int) -> float:
    """How far a step's velocity is from one that continues the `order` before it, on average."""
    squares = []
    for each in exact:
        t, velocity = each.velocities[index]
        continued = extrapolate(each.velocities[index - order : index], t)
        squares.append(float((continued - velocity).norm() / velocity.norm()) ** 2)
    return math.sqrt(sum(squares) / len(squares))


def density(exact: Sequence[Exact], steps: Sequence[int]) -> Iterator[tuple[float, float]]:
    """The weight at the t of some steps that gives each stretch between evaluations one loss.

    A line misses a velocity with the second derivative d by d * h^2 at a distance h, and the
    picture by d * h^3: so the weight is the third root of d.
    """
    for index in steps:
        before, last, t = (exact[0].velocities[i][0] for i in (index - 2, index - 1, index))
        yield t, (error(exact, index, order=2) / ((before - t) * (last - t))) ** (1 / 3)


def loss(pipeline: EditPipeline, exact: Sequence[Exact], mode: Mode) -> float:
    """How far the latents at the end are from those of the exact edits, relatively."""
    squares = []
    for each in exact:
        end = _states(pipeline, each.encoded, replace(each.request, mode=mode))[-1].latents
        squares.append(float((end - each.latents).norm() / each.latents.norm()) ** 2)
    return math.sqrt(sum(squares) / len(squares))


if __name__ == "__main__":
    main()
