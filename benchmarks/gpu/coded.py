"""One block with quantised weights beside the same one in full precision: speed and error."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from bench_residency import GB
from gpu.bench import Bench, Figures, best_seconds, peak_gb, relative, start_peak
from gpu.networks import born_as, compiled, randomise
from step1x_edit.model.blocks import Layout, SingleStreamBlock
from step1x_edit.model.latents import image_position_ids
from step1x_edit.model.quantised import CODES, Code, QuantLinear
from step1x_edit.model.rope import rope_table

ALLOWED = {"bf16": 0.02, "fp8": 0.1, "int8": 0.05, "nf4": 0.2}
"""The allowed error of the block's output against float32, relative to the norm."""


@torch.inference_mode()
def coded_blocks(bench: Bench) -> Figures:
    """A single block on the rows of the largest picture, both prompts, eager and compiled."""
    config = bench.scale.model.transformer
    with bench.device, born_as(bench.dtype):
        block = SingleStreamBlock(config.hidden_size, config.num_heads, config.mlp_size)
    block.eval().requires_grad_(False)
    randomise(block, seed=3)
    inputs = _inputs(bench)
    x = inputs[0].float()
    exact = copy.deepcopy(block).float()(x, inputs[1].float(), inputs[2]) - x
    figures: Figures = {"blocks": [], "left_out": []}
    for kind in (None, *CODES):
        name = kind or "bf16"
        if bench.is_over():
            figures["left_out"].append(name)
            continue
        coded = block if kind is None else _coded(block, kind)
        error = relative(coded(*inputs).float() - x, exact)
        before = start_peak(bench.device)
        row: Figures = {"precision": name, "from_float32": error, "allowed": ALLOWED[name]}
        row["weights_gb"] = sum(t.nbytes for t in (*coded.parameters(), *coded.buffers())) / GB
        row["ms"] = 1000 * best_seconds(bench.device, partial(coded, *inputs))
        row |= peak_gb(bench.device, before)
        if not bench.is_over():
            with compiled([coded], bench.scale.backend):
                row["compiled_from_float32"] = relative(coded(*inputs).float() - x, exact)
                row["compiled_ms"] = 1000 * best_seconds(bench.device, partial(coded, *inputs))
        figures["blocks"].append(row)
    figures["is_right"] = all(
        max(row["from_float32"], row.get("compiled_from_float32", 0)) <= row["allowed"]
        for row in figures["blocks"]
    )
    return figures


def _inputs(bench: Bench) -> tuple[Tensor, Tensor, Layout]:
    """Rows of both prompts (2, L+2N, D), their modulation (2, 3D) and their layout."""
    config, text = bench.scale.model.transformer, bench.scale.model.conditioner.text_length
    encoded = bench.encoded(max(bench.scale.pictures))
    ids = image_position_ids(encoded.rows, encoded.columns, bench.scale.model.reference_offset)
    ids = torch.cat([ids.new_zeros(text, 3), ids]).to(bench.device)
    generator = torch.Generator(bench.device).manual_seed(4)

    def drawn(*shape: int) -> Tensor:
        numbers = torch.randn(shape, device=bench.device, generator=generator)
        return numbers.to(bench.dtype)

    rope = rope_table(ids, config.axes_dim, config.theta).unsqueeze(-4)  # (1, L+2N, D/2H, 2)
    mod = drawn(2, 3 * config.hidden_size)
    return drawn(2, len(ids), config.hidden_size), mod, Layout(rope, text)


def _coded(block: nn.Module, kind: Code) -> nn.Module:
    """A copy with its linear layers as codes."""
    coded = copy.deepcopy(block)
    for name, layer in list(coded.named_modules()):
        if isinstance(layer, nn.Linear):
            made = QuantLinear.of(layer, kind)
            made.may_round_input = True  # as in a loaded model
            coded.set_submodule(name, made)
    return coded
