"""The cost of previews: whole edits with and without them, alternating.

    python benchmarks/bench_previews.py [--sizes 512,1024] [--steps 10] [--repeat 3] [--save FOLDER]

The page requests 8 previews per edit; each is encoded here as the page shows it. Bound by the
network's steps; a preview is a linear layer.
The first edit with previews also encodes the chart that the colours are fitted to; it is timed
separately. Ratios are of CPU seconds if the model computes on the CPU, because other load on the
machine does not change them, and of wall seconds otherwise. The previews can be saved for
inspection. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from step1x_edit.checkpoints.read import read_checkpoint
from step1x_edit.model.pipeline import Edited, EditPipeline, Step
from step1x_edit.model.request import NetworkRequest, Pixels

PREVIEWS = 8
PAGE_SIDE = 512
LIMIT = 0.10
"""The largest share of an edit that its previews may take."""


def edit(pipeline: EditPipeline, request: NetworkRequest) -> tuple[float, list[Pixels], Pixels]:
    """Seconds, previews and picture of one edit."""
    is_on_cpu = pipeline.vae.device.type == "cpu"
    clock = time.process_time if is_on_cpu else time.perf_counter
    began = clock()
    previews = []
    for event in pipeline.edit(request):
        if isinstance(event, Step) and event.preview is not None:
            previews.append(event.preview)
            show(event.preview)
    seconds = clock() - began
    assert isinstance(event, Edited)
    return seconds, previews, event.image


def show(preview: Pixels) -> None:
    """Encode a preview as the page does."""
    image = Image.fromarray(preview)
    image.thumbnail((PAGE_SIDE, PAGE_SIDE))
    image.save(io.BytesIO(), "WEBP", quality=85)


def psnr(a: Pixels, b: Pixels) -> float:
    return float(-10 * np.log10(((a / 255 - b / 255) ** 2).mean() + 1e-10))


def compare(plain: NetworkRequest, repeat: int, folder: Path | None) -> dict[str, object]:
    shown = replace(plain, previews=PREVIEWS)
    pipeline = read_checkpoint().pipeline
    edit(pipeline, replace(plain, num_steps=2))  # completes one-time work for the size
    first = edit(pipeline, shown)[0]
    without, with_previews = [], []
    for _ in range(repeat):
        without.append(edit(pipeline, plain)[0])
        seconds, previews, picture = edit(pipeline, shown)
        with_previews.append(seconds)
    if folder is not None:
        for index, preview in enumerate(previews):
            Image.fromarray(preview).save(folder / f"{plain.size_level}-{index}.png")
    more = statistics.median(b / a for a, b in zip(without, with_previews, strict=True)) - 1
    return {
        "without_s": round(statistics.median(without), 2),
        "with_s": round(statistics.median(with_previews), 2),
        "first_with_s": round(first, 2),
        "previews": len(previews),
        "more": round(more, 3),
        "is_within_limit": more <= LIMIT,
        "last_preview_db": round(psnr(previews[-1], picture), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="512,1024")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    found = {}
    for size in map(int, arguments.sizes.split(",")):
        request = NetworkRequest(
            data.coffee(), "change to night scene", num_steps=arguments.steps, size_level=size
        )
        found[str(size)] = compare(request, arguments.repeat, arguments.save)
        print(f"{size}: {found[str(size)]}", flush=True)
    print(json.dumps({"previews": found, "num_steps": arguments.steps}))


if __name__ == "__main__":
    main()
