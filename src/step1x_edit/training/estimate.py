"""What one step of training needs, by numbers: the step runs on tensors that have no memory.

Attention counts as one fused operation, as on a GPU and a CPU; what a library's kernels keep for
themselves, and memory that the allocator cannot use, is not counted.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from step1x_edit.checkpoints.precision import CODED
from step1x_edit.model.config import ModelConfig
from step1x_edit.model.denoising import Branch, Encoded
from step1x_edit.model.quantised import QuantLinear
from step1x_edit.model.transformer import QuotedText, Transformer
from step1x_edit.schemas.training import TrainRequest
from step1x_edit.training.loop import Drawn, Training

TEXT_ROWS: Final = 353
"""Of a picture of 1024 × 1024 and an instruction of some words; more than these is padding."""


@dataclass(frozen=True)
class Needs:
    """Bytes and operations of one step at one size."""

    size: int
    weights: int
    """The model, as it is kept."""
    learned: int
    """The LoRA, and what the optimiser keeps of it."""
    computing: int
    """Gradients and all that the step computes, at their largest."""
    flop: int
    """Floating point operations, with what is computed again."""
    parameters: int
    """Numbers of the LoRA."""

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.weights + self.learned + self.computing


def needs_of(config: ModelConfig, dtype: torch.dtype, request: TrainRequest, size: int) -> Needs:
    """What a step with a square picture of this size needs; nothing is read or computed."""
    with FakeTensorMode():
        transformer = _network(config, dtype)
        if request.precision == "int8":
            _code(transformer)
        weights = sum(each.nbytes for each in (*transformer.parameters(), *transformer.buffers()))
        training = Training(transformer, config, request)
        learned = [each for each in transformer.parameters() if each.requires_grad]
        encoded, target, drawn = _made_up(config, dtype, size, training.is_guided)
        flops = FlopCounterMode(display=False, custom_mapping=_FUSED)
        for counter in (peak := _Peak(), flops):  # one by one: the second keeps tensors alive
            with counter:
                training.loss(encoded, target, drawn).backward()  # type: ignore[no-untyped-call]
            training.optimiser.zero_grad()
    return Needs(
        size=size,
        weights=weights,
        learned=3 * sum(each.nbytes for each in learned),  # and two moments
        computing=peak.most,
        flop=request.batch_size * flops.get_total_flops(),
        parameters=sum(each.numel() for each in learned),
    )


def _network(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # such tensors cannot be converted in place
    try:
        return Transformer(config.transformer).requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)


def _code(transformer: Transformer) -> None:
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, nn.Linear) and CODED.match(f"transformer.{name}."):
            transformer.set_submodule(name, QuantLinear.like(layer, "int8"))


def _made_up(
    config: ModelConfig, dtype: torch.dtype, size: int, is_guided: bool
) -> tuple[Encoded, Tensor, Drawn]:
    side, channels = size // config.size_multiple, config.transformer.in_channels
    features = config.transformer.connector.in_features
    length = min(TEXT_ROWS, config.conditioner.text_length)
    embeds, mask = torch.empty(1, length, features, dtype=dtype), torch.empty(1, length)
    pad_copies = config.conditioner.text_length - length if config.conditioner.is_padded else 0
    quoted = QuotedText(embeds, mask) if config.transformer.has_text_token_mapping else None
    branch = Branch(embeds, mask, quoted, pad_copies=pad_copies)
    tokens = torch.empty(1, side * side, channels)
    encoded = Encoded(tokens, (branch,) * (1 + is_guided), side, side)
    return encoded, tokens, Drawn(0.5, tokens)


def _forward(query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _backward(grad: Any, query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
    flop = sdpa_backward_flop_count(grad, query, key, value)  # type: ignore[no-untyped-call]
    return int(flop)


_ATTENTION: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED: Final[dict[Any, Any]] = {
    _ATTENTION: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""The fused attention of a CPU, which torch's counter does not know."""


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the memory of all tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = {_storage(each) for each in tree_leaves((args, kwargs)) if _is_tensor(each)}
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if _is_tensor(each) and (storage := _storage(each)) not in before:
                self._count(storage)
        return made

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self._now -= size


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
