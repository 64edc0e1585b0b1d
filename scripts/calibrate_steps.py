"""Measure how the velocity of a checkpoint bends along t, for the modes fast and turbo.

    python scripts/calibrate_steps.py [MODEL] [--version v1.1] [--device cuda] [--sizes 512,1024]
                                      [--pictures a.jpg,b.jpg] [--prompts FILE]

Makes exact edits and asks at each step how far the velocity is from one that continues the last
velocity, the last two or three. From that follows how densely it must be evaluated along t. Then
the modes are tried with each order of extrapolation, and the order whose latents come nearest to
the exact ones is kept. Writes `steps.json` beside the weights (default: those of the embedded
demo), where each version has its entry; it holds for sizes between the smallest and the largest
that were measured. Prints tables; the last line is one JSON object.

The pictures are photographs that installed packages contain, none of those that the benchmarks
judge by.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
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
from step1x_edit.model.flow import extrapolate
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
ORDERS = (1, 2, 3)
MODES: tuple[Mode, ...] = ("fast", "turbo")
NUM_STEPS = 28
OTHER_NUM_STEPS = (10, 50)
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

    curves: dict[int, list[Curve]] = {order: [] for order in ORDERS}
    smallest: list[Exact] = []
    for size in sorted(map(int, arguments.sizes.split(","))):
        exact = [exact_edit(pipeline, replace(each, size_level=size)) for each in requests]
        smallest = smallest or exact
        tokens = exact[0].latents.shape[1]
        print(f"{tokens} tokens: error of extrapolation by order; share of edited tokens")
        for order in ORDERS:
            curves[order].append(curve(exact, order))
        for index in range(max(ORDERS), NUM_STEPS):
            errors = " ".join(f"{error(exact, index, order):.4f}" for order in ORDERS)
            edited = np.mean([each.edited[index] for each in exact])
            print(f"{exact[0].velocities[index][0]:.3f} {errors} {edited:.2f}", flush=True)

    best, losses = None, {}
    for order in ORDERS:
        pipeline.profile = Profile(tuple(curves[order]), order)
        losses[order] = {mode: loss(pipeline, smallest, mode) for mode in MODES}
        print(f"order {order}: latents differ by {losses[order]}", flush=True)
        if best is None or losses[order]["turbo"] < losses[best.order]["turbo"]:
            best = pipeline.profile
    pipeline.profile = best
    for num_steps in OTHER_NUM_STEPS:
        exact = [
            exact_edit(pipeline, replace(each.request, num_steps=num_steps)) for each in smallest
        ]
        for mode in MODES:
            number = num_evaluated(mode, num_steps)
            print(f"{mode} {number}/{num_steps} {loss(pipeline, exact, mode):.4f}", flush=True)

    assert best is not None
    folder = arguments.model or DEMO_FOLDER
    file = (folder if folder.is_dir() else folder.parent) / STEPS_FILE
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    known[pipeline.config.version] = best.to_json()
    file.write_text(json.dumps(known) + "\n", encoding="utf-8")
    print(json.dumps({"order": best.order, "losses": losses, "file": str(file)}))


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


def curve(exact: Sequence[Exact], order: int) -> Curve:
    """The density that gives each stretch of t without an evaluation the same loss.

    A velocity whose derivative of this order is d is missed by d * h^order at a distance h, and the
    picture by d * h^(order + 1): the density is the root of d, which the error over the product of
    its distances estimates.
    """
    times = [t for t, _ in exact[0].velocities]
    density = []
    for index in range(order, len(times)):
        distances = math.prod(
            times[before] - times[index] for before in range(index - order, index)
        )
        density.append(
            (times[index], (error(exact, index, order) / distances) ** (1 / (order + 1)))
        )
    return Curve(exact[0].latents.shape[1], tuple(density))


def loss(pipeline: EditPipeline, exact: Sequence[Exact], mode: Mode) -> float:
    """How far the latents at the end are from those of the exact edits, relatively."""
    squares = []
    for each in exact:
        end = _states(pipeline, each.encoded, replace(each.request, mode=mode))[-1].latents
        squares.append(float((end - each.latents).norm() / each.latents.norm()) ** 2)
    return math.sqrt(sum(squares) / len(squares))


if __name__ == "__main__":
    main()
