"""The work of the loop at full size, counted without numbers."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.utils.flop_counter import FlopCounterMode

from gpu.networks import encoded_prompts, our_pipeline, our_states, quarter
from step1x_edit.model.config import V1_1, ModelConfig
from step1x_edit.model.pipeline import Plan
from step1x_edit.model.request import Mask, Mode
from step1x_edit.model.transformer import Transformer
from turbo.edits import MODES

VALID: Final = (352, 340)
"""Rows of the two prompts that are not padding, as in `gpu_check`."""


def counted(model: ModelConfig = V1_1, pixels: int = 1024) -> list[dict[str, Any]]:
    """PFLOP of all steps of v1.1 by mode, and of turbo with a quarter of the picture to edit."""
    ways: list[tuple[Mode, Mask | None]] = [(mode, None) for mode in MODES]
    ways.append(("turbo", quarter(pixels, pixels)))
    work = [pflop(model, pixels, *way) for way in ways]
    return [
        {
            "mode": mode,
            "edited": 1.0 if mask is None else float((mask > 0).mean()),
            "pflop": each,
            "of_exact": each / work[0],
        }
        for (mode, mask), each in zip(ways, work, strict=True)
    ]


@torch.inference_mode()
def pflop(model: ModelConfig, pixels: int, mode: Mode, mask: Mask | None) -> float:
    with torch.device("meta"):
        network = Transformer(model.transformer).bfloat16()
    pipeline = our_pipeline(network, model)
    encoded = encoded_prompts(model, pixels, VALID, torch.device("cpu"))
    plan = Plan(keepable=2**40)
    with FlopCounterMode(display=False) as counter:
        for _ in our_states(pipeline, encoded, plan, mode, mask):
            pass
    return float(counter.get_total_flops()) / 1e15
