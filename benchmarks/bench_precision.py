"""Quantised weights on a CPU: speed of the demo and of published layers, and PSNR of the pictures.

    python benchmarks/bench_precision.py [--other OTHER/src] [--save FOLDER]

*Demo*: a photograph that it was never trained on is edited by a few prompts with each precision.
PSNR is against the exact edit of the same seed; the row of exact weights has the PSNR of that edit
against the photograph. *Full width*: one double and one single block of the published sizes with
random weights, and the rows of a picture of 512 px with one prompt.

`--other` names the sources of another build. Its quantised layers take turns with these, with the
same weights, and all else is the same. Times are CPU seconds, which other work on the machine
hardly affects; ratios are medians over the turns. Bound by matrix products, at full width. At most
4 GB of memory. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn

from step1x_edit.checkpoints.read import Wanted, read_checkpoint
from step1x_edit.model.blocks import DoubleStreamBlock, Layout, Modulator, SingleStreamBlock
from step1x_edit.model.config import V1_1
from step1x_edit.model.latents import image_position_ids
from step1x_edit.model.pipeline import Edited, EditPipeline
from step1x_edit.model.quantised import CODES, Code, QuantLinear
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.rope import rope_table

Pixels = npt.NDArray[np.uint8]
PROMPTS: Final = ("change to night scene", "make it black and white", "make it warmer", "red tint")
CHANGED: Final = ("int8", "nf4")
"""The precisions that are compared with another build."""
PARTS: Final = ("demo", "bfloat16", "float32")
"""The demo, and full width in these types."""
EXACT: Final = "exact"
TEXT_LENGTH: Final = 256
"""Rows of the text of a picture of 512 px and a short prompt, one of them padding."""

Network = TypeVar("Network", bound=nn.Module)
Row: TypeAlias = tuple[str, str]
"""Precision and build."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--turns", type=int, default=3, help="at full width")
    parser.add_argument("--precisions", nargs="+", choices=CODES, default=CODES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    other = layers_of(arguments.other) if arguments.other else None
    found: dict[str, object] = {}
    for part in arguments.parts:
        if part == "demo":
            found[part] = demo(arguments, other)
        else:
            found[part] = full_width(getattr(torch, part), arguments, other)
    print(json.dumps(found | {"prompts": PROMPTS, "steps": arguments.steps}))


# --- the demo -------------------------------------------------------------------------------------


def demo(arguments: argparse.Namespace, other: ModuleType | None) -> list[dict[str, object]]:
    """Edit with each precision and build in turns; a prompt is a turn."""
    image = data.coffee()
    pipelines = dict(with_other(read_pipelines(arguments.precisions), other))
    times: dict[Row, list[float]] = {row: [] for row in pipelines}
    quality: dict[Row, list[float]] = {row: [] for row in pipelines}
    for prompt in PROMPTS:
        for row, pipeline in pipelines.items():
            picture, seconds = edited(pipeline, image, prompt, arguments.size, arguments.steps)
            times[row].append(seconds)
            if row == (EXACT, ""):
                exact = picture
                size = picture.shape[1], picture.shape[0]
                quality[row].append(psnr(picture, np.asarray(Image.fromarray(image).resize(size))))
            else:
                quality[row].append(psnr(picture, exact))
            if arguments.save is not None:
                name = "-".join((*row, prompt)).replace(" ", "-")
                Image.fromarray(picture).save(arguments.save / f"{name}.png")
    print(f"\nThe demo at {arguments.size}, {arguments.steps} steps:\n")
    print("| precision | build | weights, MB | CPU s | of exact | " + " | ".join(PROMPTS) + " |")
    print("|---" * (5 + len(PROMPTS)) + "|")
    rows = []
    for row, pipeline in pipelines.items():
        size_mb = sum(map(bytes_of, pipeline.modules.values())) / 1e6
        seconds, ratio = statistics.median(times[row]), of_exact(times, row)
        decibels = " | ".join(f"{value:.1f}" for value in quality[row])
        print(f"| {' | '.join(row)} | {size_mb:.1f} | {seconds:.2f} | {ratio:.2f} | {decibels} |")
        rows.append(
            {"row": row, "weights_mb": size_mb, "cpu_s": times[row], "psnr_db": quality[row]}
        )
    return rows


def read_pipelines(precisions: Sequence[Code]) -> dict[str, EditPipeline]:
    wanted = {EXACT: Wanted()} | {kind: Wanted(precision=kind) for kind in precisions}
    return {name: read_checkpoint(wanted=each).pipeline for name, each in wanted.items()}


def with_other(
    pipelines: Mapping[str, EditPipeline], other: ModuleType | None
) -> Iterator[tuple[Row, EditPipeline]]:
    """The pipelines by precision and build, of the other build those with codes."""
    for precision, pipeline in pipelines.items():
        yield (precision, ""), pipeline
        if other is not None and precision in CHANGED:
            theirs = copy.copy(pipeline)
            theirs.transformer = with_layers_of(other, pipeline.transformer)
            yield (precision, "other"), theirs


def edited(
    pipeline: EditPipeline, image: Pixels, prompt: str, size: int, steps: int
) -> tuple[Pixels, float]:
    request = NetworkRequest(image, prompt, num_steps=steps, size_level=size, seed=0)
    started = time.process_time()
    *_, last = pipeline.edit(request)
    assert isinstance(last, Edited)
    return last.image, time.process_time() - started


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    error = float(((found.astype(float) - expected.astype(float)) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


# --- full width -----------------------------------------------------------------------------------


def full_width(
    dtype: torch.dtype, arguments: argparse.Namespace, other: ModuleType | None
) -> list[dict[str, object]]:
    """Run a double and a single block with each precision and build in turns."""
    runs: dict[Row, Callable[[], Tensor]] = {}
    exact = blocks(dtype)
    runs[EXACT, ""] = run_of(exact, dtype)
    sizes = {EXACT: bytes_of(exact)}
    for kind in arguments.precisions:
        coded = with_codes(exact, kind)
        sizes[kind] = bytes_of(coded)
        runs[kind, ""] = run_of(coded, dtype)
        if other is not None and kind in CHANGED:
            runs[kind, "other"] = run_of(with_layers_of(other, coded), dtype)
    times: dict[Row, list[float]] = {row: [] for row in runs}
    error: dict[Row, float] = {}
    expected = runs[EXACT, ""]()
    for _ in range(arguments.turns):
        for row, run in runs.items():
            started = time.process_time()
            result = run()
            times[row].append(time.process_time() - started)
            error[row] = float((result - expected).float().norm() / expected.float().norm())
    print(f"\nA double and a single block of the published sizes, 512 px, {dtype}:\n")
    print("| precision | build | weights, MB | CPU s | of exact | error |")
    print("|---" * 6 + "|")
    rows = []
    for row in runs:
        seconds, ratio = statistics.median(times[row]), of_exact(times, row)
        size_mb, percent = sizes[row[0]] / 1e6, 100 * error[row]
        print(
            f"| {' | '.join(row)} | {size_mb:.0f} | {seconds:.2f} | {ratio:.2f} | {percent:.1f} % |"
        )
        rows.append({"row": row, "weights_mb": size_mb, "cpu_s": times[row], "error": error[row]})
    return rows


def blocks(dtype: torch.dtype) -> nn.ModuleList:
    """A double and a single block of the published sizes."""
    kinds = (DoubleStreamBlock, SingleStreamBlock)
    return nn.ModuleList([random_block(kind, dtype) for kind in kinds])


def random_block(
    kind: type[DoubleStreamBlock | SingleStreamBlock], dtype: torch.dtype
) -> DoubleStreamBlock | SingleStreamBlock:
    """A block with random weights, without the modulators."""
    config, generator = V1_1.transformer, torch.Generator().manual_seed(0)
    with torch.device("meta"):
        block = kind(config.hidden_size, config.num_heads, config.mlp_size)
        for name, child in list(block.named_children()):
            if isinstance(child, Modulator):
                setattr(block, name, nn.Identity())
    block = block.to(dtype).to_empty(device="cpu").requires_grad_(False)
    for name, parameter in block.named_parameters():
        if name.endswith("norm.scale"):
            parameter.fill_(1)
        else:
            parameter.normal_(0, 0.02, generator=generator)
    return block


def wide_layout() -> Layout:
    """The rows of a picture of 512 px."""
    side = 512 // V1_1.size_multiple
    ids = image_position_ids(side, side, V1_1.reference_offset)
    ids = torch.cat([ids.new_zeros(TEXT_LENGTH, 3), ids])
    rope = rope_table(ids, V1_1.transformer.axes_dim, V1_1.transformer.theta)
    return Layout(rope[None, None], TEXT_LENGTH)


def run_of(modules: nn.Module, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The blocks with fixed inputs."""
    generator, layout = torch.Generator().manual_seed(1), wide_layout()
    double, single = modules.children()

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    width, rows = V1_1.transformer.hidden_size, layout.rope.shape[2]
    img, txt = drawn(1, rows - TEXT_LENGTH, width), drawn(1, TEXT_LENGTH, width)
    mods = drawn(1, 6 * width) / 4, drawn(1, 6 * width) / 4
    mod = drawn(1, 3 * width) / 4

    @torch.inference_mode()
    def run() -> Tensor:
        new_img, new_txt = double(img, txt, *mods, layout)
        result: Tensor = single(torch.cat([new_txt, new_img], dim=1), mod, layout)
        return result

    return run


def with_codes(modules: nn.Module, kind: Code) -> nn.Module:
    """The blocks with their matrices as codes, as in a loaded model."""
    coded = shared_copy(modules)
    for name, layer in list(coded.named_modules()):
        if isinstance(layer, nn.Linear):
            made = QuantLinear.of(layer, kind)
            made.may_round_input = True
            coded.set_submodule(name, made)
    return coded


# --- both -----------------------------------------------------------------------------------------


def layers_of(source: Path) -> ModuleType:
    """The quantised layers of another build."""
    file = source / "step1x_edit" / "model" / "quantised.py"
    spec = importlib.util.spec_from_file_location("other_quantised", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_layers_of(other: ModuleType, modules: Network) -> Network:
    """The same network, and the same weights, with the layers of another build."""
    theirs = shared_copy(modules)
    for layer in theirs.modules():
        if isinstance(layer, QuantLinear):
            layer.__class__ = other.QuantLinear
    return theirs


def shared_copy(modules: Network) -> Network:
    """A copy of the modules with the same tensors."""
    tensors = {id(tensor): tensor for tensor in (*modules.parameters(), *modules.buffers())}
    return copy.deepcopy(modules, dict(tensors))


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def of_exact(times: Mapping[Row, list[float]], row: Row) -> float:
    """The median ratio to the exact weights' time in the same turn."""
    pairs = zip(times[row], times[EXACT, ""], strict=True)
    return statistics.median(seconds / exact for seconds, exact in pairs)


if __name__ == "__main__":
    main()
