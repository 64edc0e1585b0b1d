"""Unpacking the formats of GGUF on one core, against the gguf package; PSNR of the demo's pictures.

    python benchmarks/bench_gguf.py [--turns 7] [--parts speed demo]

*Speed*: the bytes of a matrix are in memory and become float32. The package and this code take
turns, and their numbers are equal to the bit. Ratios are medians over the turns, of CPU seconds.
*Demo*: a photograph that it was never trained on is edited with the matrices of the transformer's
blocks in each format that the package can write. PSNR is against the exact edit of the same seed.

Bound by memory and by vector instructions on bytes. At most 1 GB of memory. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from skimage import data

from bench_precision import PROMPTS, edited, psnr
from step1x_edit.checkpoints.gguf_blocks import PACKINGS
from step1x_edit.checkpoints.read import read_checkpoint

Kind = GGMLQuantizationType
ROWS, COLUMNS = 1536, 3072
PARTS: Final = ("speed", "demo")
WRITABLE: Final = (Kind.Q8_0, Kind.Q5_1, Kind.Q5_0, Kind.Q4_1, Kind.Q4_0)
"""The formats that the package can write."""
SCALES: Final = {
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
}
"""Where a block of the other formats has its float16, which random bytes might make infinite."""
IN_BLOCKS: Final = re.compile(r"(double|single)_blocks\.\d+\..*\.weight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=28)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    if "speed" in arguments.parts:
        found["speed"] = speed(arguments.turns)
    if "demo" in arguments.parts:
        found["demo"] = demo(arguments.size, arguments.steps)
    print(json.dumps(found))


def speed(turns: int) -> list[dict[str, object]]:
    print(f"\n{ROWS} x {COLUMNS} numbers, millions per CPU second:\n")
    print("| format | gguf package | here | ratio |")
    print("|---|---|---|---|")
    rows: list[dict[str, object]] = []
    for number, packing in PACKINGS.items():
        kind, raw = Kind(number), packed(Kind(number))
        flat, out = torch.from_numpy(raw).flatten(), torch.empty(ROWS * COLUMNS)
        times: list[tuple[float, float]] = []
        for _ in range(turns):
            theirs = seconds(quants.dequantize, raw, kind)
            times.append((theirs, seconds(packing.unpack_into, flat, out)))
        expected = quants.dequantize(raw, kind).ravel()
        assert np.array_equal(out.numpy().view(np.int32), expected.view(np.int32))
        ratio = statistics.median(theirs / ours for theirs, ours in times)
        rates = [
            ROWS * COLUMNS / 1e6 / statistics.median(each) for each in zip(*times, strict=True)
        ]
        print(f"| {kind.name} | {rates[0]:.0f} | {rates[1]:.0f} | {ratio:.2f} |")
        rows.append({"format": kind.name, "millions_per_s": rates, "ratio": ratio})
    return rows


def seconds(run: Callable[..., object], *arguments: object) -> float:
    started = time.process_time()
    run(*arguments)
    return time.process_time() - started


def packed(kind: Kind) -> npt.NDArray[np.uint8]:
    random = np.random.default_rng(0)
    if kind in WRITABLE:
        return quants.quantize(random.standard_normal((ROWS, COLUMNS), dtype=np.float32), kind)
    count, size = GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (ROWS, COLUMNS // count, size), dtype=np.uint8)
    for at in SCALES[kind]:
        halves = random.standard_normal((ROWS, COLUMNS // count, 1)).astype(np.float16)
        raw[:, :, at : at + 2] = halves.view(np.uint8)
    return raw.reshape(ROWS, -1)


def demo(size: int, steps: int) -> list[dict[str, object]]:
    pipeline, image = read_checkpoint().pipeline, data.coffee()
    weights = {
        name: weight
        for name, weight in pipeline.transformer.named_parameters()
        if IN_BLOCKS.fullmatch(name) and weight.shape[-1] % 32 == 0
    }
    exact = {name: weight.detach().numpy().copy() for name, weight in weights.items()}
    pictures = [edited(pipeline, image, prompt, size, steps)[0] for prompt in PROMPTS]
    print(f"\nThe demo at {size}, {steps} steps, PSNR in dB:\n")
    print("| format | " + " | ".join(PROMPTS) + " |")
    print("|---" * (1 + len(PROMPTS)) + "|")
    rows: list[dict[str, object]] = []
    for kind in WRITABLE:
        for name, weight in weights.items():
            rounded = quants.dequantize(quants.quantize(exact[name], kind), kind)
            weight.data.copy_(torch.from_numpy(rounded))
        found = [
            psnr(edited(pipeline, image, prompt, size, steps)[0], picture)
            for prompt, picture in zip(PROMPTS, pictures, strict=True)
        ]
        print(f"| {kind.name} | " + " | ".join(f"{value:.1f}" for value in found) + " |")
        rows.append({"format": kind.name, "psnr_db": found})
    return rows


if __name__ == "__main__":
    main()
