"""The value of each exact saving: an edit without it against one with all of them.

    python benchmarks/bench_savings.py [--size 512] [--steps 4] [--rounds 3]

The demo on the CPU, with one thread. Every round runs all variants in turn, so that varying load
affects all of them. Times are CPU seconds, not wall seconds, of the fastest round: other programs
hardly affect either. Bound by matrix products, whose operations are counted as well: that count is
the same on every machine. Times on a GPU at full size: `gpu_check.py --only savings`. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from skimage import data
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from step1x_edit.checkpoints.read import read_checkpoint
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.savings import ALL, NONE, Savings

WITHOUT = {
    "nothing": ALL,
    **{field.name: replace(ALL, **{field.name: False}) for field in fields(Savings)},
    "all": NONE,
}
"""The savings, and what each avoids."""


@torch.inference_mode()
def parts(pipeline: EditPipeline, request: NetworkRequest) -> tuple[dict[str, float], Tensor]:
    """Seconds of the two stages that have savings, and the latents at the end."""
    clock: Callable[[], float] = time.process_time
    started = clock()
    encoded = pipeline.encode(request)
    read = clock()
    *_, end = pipeline.denoise(encoded, pipeline.start(encoded, request.seed), request)
    return {"encode_s": read - started, "denoise_s": clock() - read}, end.latents


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = read_checkpoint().pipeline
    request = NetworkRequest(
        data.coffee(),
        "change to night scene",
        num_steps=arguments.steps,
        size_level=arguments.size,
    )
    work: dict[str, float] = {}
    taken: dict[str, dict[str, float]] = defaultdict(dict)
    furthest: dict[str, float] = {}
    _, expected = parts(pipeline, request)
    for name, savings in WITHOUT.items():
        pipeline.savings = savings
        with FlopCounterMode(display=False) as counter:
            _, latents = parts(pipeline, request)
        work[name] = counter.get_total_flops() / 1e9
        furthest[name] = float((latents - expected).abs().max())
    for _ in range(arguments.rounds):
        for name, savings in WITHOUT.items():
            pipeline.savings = savings
            seconds, _ = parts(pipeline, request)
            for part, value in seconds.items():
                taken[name][part] = min(value, taken[name].get(part, value))
    print("| without | GFLOP | ÷ with all | encode, s | denoise, s | ÷ with all | differ by |")
    print("|---|---|---|---|---|---|---|")
    whole = {name: sum(each.values()) for name, each in taken.items()}
    figures = {
        name: {
            **each,
            "gflop": work[name],
            "work_ratio": work[name] / work["nothing"],
            "time_ratio": whole[name] / whole["nothing"],
            "latents_differ_by": furthest[name],
        }
        for name, each in taken.items()
    }
    for name, each in figures.items():
        print(
            f"| {name} | {each['gflop']:.2f} | {each['work_ratio']:.4f} | {each['encode_s']:.3f} "
            f"| {each['denoise_s']:.3f} | {each['time_ratio']:.3f} "
            f"| {each['latents_differ_by']:.1g} |"
        )
    print(json.dumps({"savings": figures, "size": arguments.size, "steps": arguments.steps}))


if __name__ == "__main__":
    main()
