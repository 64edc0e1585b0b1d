"""The documents say what the published model takes: on which card what stays, and how much of it.

They are held to the plan for a network of full size, whose weights have shapes and no numbers.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from step1x_edit.checkpoints.arena import Block, Weight, blocks_of
from step1x_edit.checkpoints.memory_plan import GB, fitting
from step1x_edit.checkpoints.precision import with_codes
from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.config import V1_1, AutoencoderConfig
from step1x_edit.model.quantised import CODES, Code
from step1x_edit.model.transformer import Transformer

ROOT = Path(__file__).parents[2]
GIB = 2**30  # cards are sold by them
QWEN_7B = Qwen2_5_VLConfig(
    text_config={
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    vision_config={
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
)


@functools.cache
def full_size(precision: Code | None) -> tuple[Block, ...]:
    """The blocks of v1.1 as published."""
    with torch.device("meta"):
        parts = {
            "transformer": Transformer(V1_1.transformer),
            "conditioner": Qwen2_5_VLModel(QWEN_7B),
            "vae": Autoencoder(AutoencoderConfig()),
        }
    weights = []
    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            path, _, attribute = name.rpartition(".")
            owner = module.get_submodule(path)
            shape = tuple(parameter.shape)
            dtype = torch.float32 if part == "vae" else torch.bfloat16
            weights.append(Weight(f"{part}.{name}", owner, attribute, shape, dtype, None))
    return blocks_of(weights if precision is None else with_codes(parts, weights, precision))


def test_the_guide_says_how_much_the_published_model_takes() -> None:
    guide = (ROOT / "docs" / "models.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) GB \| ([\d.]+) GB \|", guide, re.MULTILINE)

    found = []
    for precision in (None, *CODES):
        blocks = full_size(precision)
        core = [block for block in blocks if block.component == "core"]
        sizes = [sum(block.size for block in some) / GB for some in (blocks, core)]
        found.append((precision or "bf16", *(f"{size:.1f}" for size in sizes)))

    assert rows == found


def planned(card: int, precision: Code | None) -> str:
    """What stays on a card of this size that does nothing else, and the peak, as README says."""
    plan = fitting(full_size(precision), card * GIB)
    if not plan.is_streaming:
        kept = "everything"
    elif plan.core_share == 1:
        kept = "the core"
    else:
        kept = f"{plan.core_share:.0%} of the core".replace("%", " %")
    return f"{kept}, {plan.peak / GB:.1f} GB"


def test_the_readme_says_what_stays_on_which_card() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) GB \|([^|]+)\|[^|]+\|([^|]+)\|[^|]+\|([^|]+)\|", readme, re.M)

    assert [int(card) for card, *_ in rows] == [80, 48, 32, 24, 16, 12, 8, 6]
    for card, exact, coded, known in rows:
        assert exact.strip() == planned(int(card), None)
        assert coded.strip() == planned(int(card), "fp8") == planned(int(card), "int8")
        assert known.strip() == "predicted"
