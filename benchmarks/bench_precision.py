"""The error of edits with quantised weights against exact ones: the demo, the same seeds.

    python benchmarks/bench_precision.py [--size 512] [--steps 28] [--save FOLDER]

A photograph that the demo was never trained on is edited by a few prompts with each precision.
Printed are the PSNR against the exact edit, the change that the exact edit itself makes, and the
size of the weights. Bound by matrix products; times say little about a GPU, because on a CPU the
codes are widened in each step. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from skimage import data

from step1x_edit.checkpoints.read import Wanted, read_checkpoint
from step1x_edit.model.pipeline import Edited, EditPipeline
from step1x_edit.model.quantised import CODES
from step1x_edit.model.request import NetworkRequest
from step1x_edit.schemas.requests import Precision

Pixels = npt.NDArray[np.uint8]
PROMPTS = ("change to night scene", "make it black and white", "make it warmer", "red tint")


def edited(
    pipeline: EditPipeline, image: Pixels, prompt: str, size: int, steps: int
) -> tuple[Pixels, float]:
    request = NetworkRequest(image, prompt, num_steps=steps, size_level=size, seed=0)
    started = time.perf_counter()
    *_, last = pipeline.edit(request)
    assert isinstance(last, Edited)
    return last.image, time.perf_counter() - started


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    error = float(((found.astype(float) - expected.astype(float)) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    image = data.coffee()
    exact: dict[str, np.ndarray] = {}
    found: dict[str, dict[str, object]] = {}
    print("| precision | weights, MB | an edit, s | " + " | ".join(PROMPTS) + " |")
    print("|---" * (3 + len(PROMPTS)) + "|")
    precisions: tuple[Precision, ...] = ("auto", *CODES)
    for precision in precisions:
        pipeline = read_checkpoint(wanted=Wanted(precision=precision)).pipeline
        tensors = [
            tensor
            for module in pipeline.modules.values()
            for tensor in (*module.parameters(), *module.buffers())
        ]
        times, values = [], []
        for prompt in PROMPTS:
            picture, seconds = edited(pipeline, image, prompt, arguments.size, arguments.steps)
            times.append(seconds)
            if precision == "auto":
                exact[prompt] = picture
                height, width = picture.shape[:2]
                before = np.asarray(Image.fromarray(image).resize((width, height)))
                values.append(psnr(picture, before))
            else:
                values.append(psnr(picture, exact[prompt]))
            if arguments.save is not None:
                name = f"{precision}-{prompt.replace(' ', '-')}.png"
                Image.fromarray(picture).save(arguments.save / name)
        row: dict[str, object] = {
            "weights_mb": round(sum(tensor.nbytes for tensor in tensors) / 1e6, 1),
            "edit_s": round(min(times), 2),
            "psnr_db": [round(value, 1) for value in values],
        }
        found[precision] = row
        told = " | ".join(f"{value:.1f} dB" for value in values)
        name = "exact, against the photograph" if precision == "auto" else precision
        print(f"| {name} | {row['weights_mb']} | {row['edit_s']} | {told} |", flush=True)
    print(json.dumps({"precision": found, "prompts": PROMPTS, "steps": arguments.steps}))


if __name__ == "__main__":
    main()
