"""The work of the loop at full size, counted without numbers."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.utils.flop_counter import FlopCounterMode

from gpu.networks import NUM_STEPS, encoded_prompts, our_pipeline
from step1x_edit.model.config import V1_1, ModelConfig
from step1x_edit.model.request import Mask, Mode, NetworkRequest
from step1x_edit.model.transformer import Transformer
from turbo.edits import MODES, quarter

VALID: Final = (352, 340)
"""Rows of the two prompts that are not padding, as in `gpu_check`."""


def counted(model: ModelConfig = V1_1, pixels: int = 1024) -> list[dict[str, Any]]:
    """PFLOP of all steps of v1.1 by mode, without a mask and with a quarter of the picture."""
    rows = []
    exact = 0.0
    for mode in MODES:
        for mask in (None, quarter(pixels, pixels)):
            work = pflop(model, pixels, mode, mask)
            exact = exact or work
            share = None if mask is None else float((mask > 0).mean())
            rows.append({"mode": mode, "edited": share, "pflop": work, "of_exact": work / exact})
    return rows


@torch.inference_mode()
def pflop(model: ModelConfig, pixels: int, mode: Mode, mask: Mask | None) -> float:
    with torch.device("meta"):
        network = Transformer(model.transformer).bfloat16()
    pipeline = our_pipeline(network, model)
    encoded = encoded_prompts(model, pixels, VALID, torch.device("cpu"))
    request = NetworkRequest(None, "", num_steps=NUM_STEPS, mode=mode, mask=mask)
    with FlopCounterMode(display=False) as counter:
        for _ in pipeline.denoise(encoded, pipeline.start(encoded, seed=0), request):
            pass
    return float(counter.get_total_flops()) / 1e15
