"""The change that is learned: a product of two small matrices beside each linear layer of a block.

y = W x + alpha / rank · up (down x), as in "LoRA" (arXiv 2106.09685). `up` starts as zeros, so an
untrained change changes nothing. Both matrices are float32, whatever W is kept as.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from step1x_edit.model.quantised import QuantLinear
from step1x_edit.model.transformer import Transformer

KOHYA: Final = "lora_unet_"
"""What comes before the name of a module, whose dots become underscores."""


class LowRankLinear(nn.Module):
    """A linear layer that stays as it is, plus a change of low rank."""

    def __init__(
        self, base: nn.Linear | QuantLinear, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        place = base.codes.device if isinstance(base, QuantLinear) else base.weight.device
        bound = 1 / math.sqrt(base.in_features)
        down = torch.empty(rank, base.in_features, dtype=torch.float32)
        down.uniform_(-bound, bound, generator=generator)  # on the CPU: the same on every device
        up = torch.zeros(base.out_features, rank, dtype=torch.float32)
        self.down, self.up = nn.Parameter(down.to(place)), nn.Parameter(up.to(place))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        narrow = F.linear(x, self.down.to(x.dtype))  # (..., rank)
        change = F.linear(narrow, self.up.to(x.dtype))
        unchanged: Tensor = self.base(x)
        return torch.add(unchanged, change, alpha=self.scale)


def add_changes(
    transformer: Transformer, rank: int, alpha: float, seed: int
) -> dict[str, LowRankLinear]:
    """Replace the linear layers of all blocks; returns the new ones by the names of the old."""
    generator = torch.Generator().manual_seed(seed)
    added = {}
    for name, layer in list(transformer.named_modules()):
        if not name.startswith(("double_blocks.", "single_blocks.")):
            continue
        if isinstance(layer, QuantLinear):
            layer.may_round_input = False  # the rounded product has no gradient
        if isinstance(layer, nn.Linear | QuantLinear):
            added[name] = LowRankLinear(layer, rank, alpha / rank, generator)
            transformer.set_submodule(name, added[name])
    return added


@contextlib.contextmanager
def unchanged(layers: Iterable[LowRankLinear]) -> Iterator[None]:
    """Have the network compute without these changes."""
    scales = [(layer, layer.scale) for layer in layers]
    for layer, _ in scales:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in scales:
            layer.scale = scale


def write_lora(
    path: Path,
    layers: Mapping[str, LowRankLinear],
    alpha: float,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Write the changes with the keys of kohya's scripts."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        key = KOHYA + name.replace(".", "_")
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        tensors[f"{key}.lora_down.weight"] = layer.down.detach().to("cpu", dtype).contiguous()
        tensors[f"{key}.lora_up.weight"] = layer.up.detach().to("cpu", dtype).contiguous()
    path.write_bytes(_with_metadata(save(tensors), metadata))


def _with_metadata(file: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with metadata in its header; the library writes it in random order."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = {"__metadata__": dict(metadata), **json.loads(file[8:start])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[start:]
