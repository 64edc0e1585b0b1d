"""The loop: noise a target, compare the velocity with that of the line, change the LoRA.

Everything random in a step follows from the seed and the number of the step, so a training that
was stopped and continued ends with the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from step1x_edit.model import flow
from step1x_edit.model.blocks import Layout, widen
from step1x_edit.model.config import ModelConfig
from step1x_edit.model.denoising import Branch, Encoded, keep_one_pad
from step1x_edit.model.latents import image_position_ids
from step1x_edit.model.transformer import QuotedText, Transformer
from step1x_edit.schemas.training import TrainRequest
from step1x_edit.training.examples import Example, write_tensors
from step1x_edit.training.low_rank import add_changes, unchanged

WARM_UP: Final = 20
"""Steps in which the learning rate rises to its value."""
LARGEST_GRADIENT: Final = 1.0
"""Norm at which the gradient of a step is cut off."""
MOMENTS: Final = ("step", "exp_avg", "exp_avg_sq")
"""What the optimiser keeps of each matrix."""


@dataclass(frozen=True)
class Drawn:
    """The random numbers of one example in one step."""

    t: float
    noise: Tensor  # (1, N, C)


class Training:
    """A transformer with a LoRA that learns, step by step."""

    def __init__(
        self, transformer: Transformer, config: ModelConfig, request: TrainRequest
    ) -> None:
        self.transformer = transformer
        self.config = config
        self.request = request
        self.alpha = float(request.rank if request.alpha is None else request.alpha)
        self.layers = add_changes(transformer, request.rank, self.alpha, request.seed)
        checkpoint_blocks(transformer)
        self.optimiser = torch.optim.AdamW(
            list(self._matrices().values()), lr=request.learning_rate, betas=(0.9, 0.99)
        )
        self.done = 0

    def steps(self, examples: Sequence[Example]) -> Iterator[float]:
        """Make the steps that remain, and yield the loss of each."""
        while self.done < self.request.steps:
            yield self.descend(self._losses(examples))

    def descend(self, losses: Iterable[Tensor]) -> float:
        """Make a step along the mean gradient of these losses; returns their mean.

        Raises FloatingPointError if it is not finite.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = self.request.learning_rate * min(1.0, (self.done + 1) / WARM_UP)
        found = []
        for loss in losses:  # each frees what it needs for its gradient before the next is made
            (loss / self.request.batch_size).backward()  # type: ignore[no-untyped-call]
            found.append(float(loss.detach()))
        mean = sum(found) / len(found)
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss of step {self.done + 1} is not finite")
        nn.utils.clip_grad_norm_(self._matrices().values(), LARGEST_GRADIENT)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.done += 1
        return mean

    def _losses(self, examples: Sequence[Example]) -> Iterator[Tensor]:
        """The losses of the next step, one by one."""
        for index in range(self.request.batch_size):
            number = self.done * self.request.batch_size + index
            example = examples[_order(len(examples), number, self.request.seed)]
            target = example.target()
            loss = self.loss if example.pair.target is not None else self.loss_of_kept
            yield loss(self.spared(example.encoded()), target, self._draw(target, number))

    def spared(self, encoded: Encoded) -> Encoded:
        """The prompts that are compared, without the padding that can be spared."""
        branches = encoded.branches if self.is_guided else encoded.branches[:1]
        return replace(encoded, branches=tuple(keep_one_pad(branches)))

    @property
    def is_guided(self) -> bool:
        """Whether a step also needs the velocity of the empty prompt."""
        return self.request.guidance != 1.0

    def loss(self, encoded: Encoded, target: Tensor, drawn: Drawn) -> Tensor:
        """The mean squared distance of the velocity from that of the line to the target."""
        target, noise = target.to(self._device).float(), drawn.noise.to(self._device)
        velocity = self._velocity(encoded, flow.between(target, noise, drawn.t), drawn.t)
        return F.mse_loss(velocity, flow.velocity_of(target, noise))

    def loss_of_kept(self, encoded: Encoded, edit: Tensor, drawn: Drawn) -> Tensor:
        """The mean squared distance of the velocity from that of the unchanged model."""
        x = flow.between(edit.to(self._device).float(), drawn.noise.to(self._device), drawn.t)
        with torch.no_grad(), unchanged(self.layers.values()):
            wanted = self._velocity(encoded, x, drawn.t)
        return F.mse_loss(self._velocity(encoded, x, drawn.t), wanted)

    def _velocity(self, encoded: Encoded, x: Tensor, t: float) -> Tensor:
        """The velocity at x (1, N, C), under guidance if that is wanted."""
        found = [
            predicted(self.transformer, self.config, x, t, encoded, branch)
            for branch in encoded.branches
        ]
        if not self.is_guided:
            return found[0]
        cond, uncond = found
        return flow.guide(cond, uncond, self.request.guidance, t, self.config.guidance_rule)

    def save(self, path: Path, notes: Mapping[str, str]) -> None:
        """Write all that later steps depend on."""
        tensors = {}
        for name, matrix in self._matrices().items():
            tensors[name] = matrix.data
            for moment, value in self.optimiser.state[matrix].items():
                tensors[f"{name}.{moment}"] = value
        write_tensors(path, tensors, {**notes, "done": str(self.done)})

    def load(self, path: Path) -> None:
        """Continue from a state that `save` has written."""
        with safe_open(path, framework="pt") as opened, torch.no_grad():
            for name, matrix in self._matrices().items():
                matrix.copy_(opened.get_tensor(name))
                self.optimiser.state[matrix] = {
                    moment: opened.get_tensor(f"{name}.{moment}").to(
                        "cpu" if moment == "step" else matrix.device
                    )
                    for moment in MOMENTS
                }
            self.done = int(opened.metadata()["done"])

    @property
    def _device(self) -> torch.device:
        return self.transformer.img_in.weight.device

    def _matrices(self) -> dict[str, nn.Parameter]:
        """All that learns, by name."""
        return {
            f"{name}.{part}": matrix
            for name, layer in self.layers.items()
            for part, matrix in (("down", layer.down), ("up", layer.up))
        }

    def _draw(self, target: Tensor, number: int) -> Drawn:
        """The timestep and the noise of an example, by its number among all that are used."""
        rng = np.random.default_rng([self.request.seed, number, 1])
        u = torch.tensor(1 / (1 + math.exp(-rng.standard_normal())))
        if self.request.shift is None:
            t = flow.shift(u, target.shape[1])
        else:
            t = flow.shift_by(u, self.request.shift)
        generator = torch.Generator().manual_seed(int(rng.integers(2**32)))
        return Drawn(float(t), torch.randn(target.shape, generator=generator))


def predicted(
    transformer: Transformer,
    config: ModelConfig,
    x: Tensor,
    t: float,
    encoded: Encoded,
    branch: Branch,
) -> Tensor:
    """The velocity (1, N, C) at x (1, N, C) and t for one prompt, in float32 or wider."""
    device, dtype = x.device, transformer.img_in.weight.dtype
    quoted = branch.quoted
    if quoted is not None:
        quoted = QuotedText(quoted.embeds.to(device, dtype), quoted.mask.to(device))
    embeds, mask = branch.embeds.to(device, dtype), branch.mask.to(device)
    step = transformer.prologue(embeds, mask, torch.tensor([t], device=device), quoted)[0]
    ids = image_position_ids(encoded.rows, encoded.columns, config.reference_offset).to(device)
    txt_ids = None if branch.txt_ids is None else branch.txt_ids.to(device)
    rope = transformer.rope(ids, embeds.shape[1], txt_ids)
    layout = Layout(rope, embeds.shape[1], branch.pad_copies, num_wanted=x.shape[1])
    img = torch.cat([x, encoded.reference.to(x)], dim=1)
    return widen(transformer.core(img.to(dtype), step, layout)[:, : x.shape[1]])


def checkpoint_blocks(transformer: Transformer) -> None:
    """Have each block keep its input only, and run again for its gradient."""
    for block in (*transformer.double_blocks, *transformer.single_blocks):
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        setattr(block, "forward", again)  # noqa: B010 - a method for the type checker


def state_notes(path: Path) -> dict[str, str]:
    """What was noted with a saved state."""
    with safe_open(path, framework="pt") as opened:
        return dict(opened.metadata())


def fingerprint(request: TrainRequest, examples: Sequence[Example]) -> dict[str, str]:
    """All that decides what a training learns; the number of its steps is not among them."""
    left_out = {"steps", "validate_every", "save_every"}
    values = request.model_dump(exclude=left_out)
    values["data"] = [example.target_at.name for example in examples]
    return {name: json.dumps(value) for name, value in values.items()}


def _order(count: int, number: int, seed: int) -> int:
    """The example to use next: all in random order, then all in another."""
    epoch, place = divmod(number, count)
    return int(np.random.default_rng([seed, epoch, 0]).permutation(count)[place])
