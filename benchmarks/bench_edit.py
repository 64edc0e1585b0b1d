"""Seconds per edit of the demo checkpoint, whole pipeline, for each size and number of steps.

    python benchmarks/bench_edit.py [--sizes 512,768,1024] [--steps 10,28] [--repeat 3]

A square picture is edited in process after one warm-up edit; the best of the repeats is printed,
because load on a shared machine adds time. Bound by matrix products: most of the time goes into
the transformer's linear layers and attention. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import numpy as np
import torch

from step1x_edit.checkpoints.read import read_checkpoint
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.request import NetworkRequest


def seconds(pipeline: EditPipeline, image: np.ndarray, size: int, steps: int) -> float:
    request = NetworkRequest(
        image, "change to night scene", num_steps=steps, size_level=size, seed=0
    )
    started = time.perf_counter()
    for _ in pipeline.edit(request):
        pass
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="512,768,1024")
    parser.add_argument("--steps", default="10,28")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    step_counts = [int(steps) for steps in arguments.steps.split(",")]

    started = time.perf_counter()
    checkpoint = read_checkpoint()
    load_s = time.perf_counter() - started
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    seconds(checkpoint.pipeline, image, sizes[0], 2)
    print(
        f"{checkpoint.name}: loaded in {load_s:.2f} s; "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| size | " + " | ".join(f"{steps} steps" for steps in step_counts) + " |")
    print("| --- |" + " --- |" * len(step_counts))
    table: dict[str, float] = {}
    for size in sizes:
        for steps in step_counts:
            runs = [
                seconds(checkpoint.pipeline, image, size, steps) for _ in range(arguments.repeat)
            ]
            table[f"{size}x{steps}"] = round(min(runs), 2)
        print(
            f"| {size} | "
            + " | ".join(f"{table[f'{size}x{steps}']:.1f} s" for steps in step_counts)
            + " |"
        )
    print(
        json.dumps(
            {
                "load_s": round(load_s, 2),
                "edit_s": table,
                "cores": os.cpu_count(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
