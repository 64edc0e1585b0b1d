"""The denoising transformer: a FLUX.1 layout with a connector in front and no guidance input.

It works in two stages. The *prologue* computes, for all timesteps at once, whatever depends on
timestep and prompt only: the refined text and the modulation of every block. The *core* maps
tokens to velocity and is all that runs inside the denoising loop. `forward` is one after the
other for a single step, so there is one implementation for sampling, training and tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x_edit.model.blocks import (
    TIMESTEP_CHANNELS,
    DoubleStreamBlock,
    FinalLayer,
    MLPEmbedder,
    Pads,
    SingleStreamBlock,
    timestep_embedding,
)
from step1x_edit.model.config import TransformerConfig
from step1x_edit.model.connector import Connector
from step1x_edit.model.rope import rope_table


@dataclass(frozen=True)
class QuotedText:
    """v1.2: the letters that a prompt asks to draw, past the conditioner's layers."""

    embeds: Tensor  # (B, L, C), the conditioner's input embeddings of the prompt
    mask: Tensor  # (B, L), 1 where a token is of a quoted character


@dataclass(frozen=True)
class PrologueStep:
    """What the core needs to know about one step."""

    txt: Tensor  # (B, L, D)
    double: Sequence[tuple[Tensor, Tensor]]  # per block: image and text, (B, 6D) each
    single: Sequence[Tensor]  # per block: (B, 3D)
    final: Tensor  # (B, 2D)
    pad_copies: int = 0
    """So many more text rows there would be, all like the last one."""


@dataclass(frozen=True)
class Prologue:
    """The steps of a whole schedule; tensors have a leading axis T."""

    txt: Tensor  # (T, B, L, D)
    double: Sequence[tuple[Tensor, Tensor]]
    single: Sequence[Tensor]
    final: Tensor
    pad_copies: int = 0

    def __len__(self) -> int:
        return self.txt.shape[0]

    def __getitem__(self, i: int) -> PrologueStep:
        return PrologueStep(
            txt=self.txt[i],
            double=[(img[i], txt[i]) for img, txt in self.double],
            single=[mod[i] for mod in self.single],
            final=self.final[i],
            pad_copies=self.pad_copies,
        )


class Transformer(nn.Module):
    """Predicts the velocity of image tokens under a prompt."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        d, heads, mlp_size = config.hidden_size, config.num_heads, config.mlp_size
        self.img_in = nn.Linear(config.in_channels, d)
        self.time_in = MLPEmbedder(TIMESTEP_CHANNELS, d)
        self.vector_in = MLPEmbedder(config.vec_in_dim, d)
        self.txt_in = nn.Linear(config.connector.hidden_size, d)
        double_blocks = [DoubleStreamBlock(d, heads, mlp_size) for _ in range(config.depth)]
        single_blocks = [SingleStreamBlock(d, heads, mlp_size) for _ in range(config.depth_single)]
        # A ModuleList does not tell the type checker what it lists.
        self.double_blocks = cast("Sequence[DoubleStreamBlock]", nn.ModuleList(double_blocks))
        self.single_blocks = cast("Sequence[SingleStreamBlock]", nn.ModuleList(single_blocks))
        self.final_layer = FinalLayer(d, config.out_channels)
        self.connector = Connector(config.connector, config.vec_in_dim)
        if config.has_text_token_mapping:
            self.text_token_mapping = nn.Linear(
                config.connector.in_features, config.connector.hidden_size
            )

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        timesteps: Tensor,
        txt_ids: Tensor | None = None,
        num_wanted: int | None = None,
        quoted: QuotedText | None = None,
    ) -> Tensor:
        """Predict the velocity (B, N, Cout) of tokens img (B, N, Cin), target then reference.

        img_ids (N, 3) or (B, N, 3); prompt_embeds (B, L, C); prompt_mask (B, L) of 0 and 1;
        timesteps (B,) in [0, 1], one per sample. `num_wanted` as in `core`, `quoted` as in
        `prologue`.
        """
        step = self._condition(prompt_embeds, prompt_mask, timesteps.unsqueeze(0), quoted)[0]
        rope = self.rope(img_ids, prompt_embeds.shape[1], txt_ids)
        return self.core(img, step, rope, num_wanted)

    def prologue(
        self,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        timesteps: Tensor,
        quoted: QuotedText | None = None,
        pad_copies: int = 0,
    ) -> Prologue:
        """Prepare all steps: timesteps (T,) hold for every sample of the batch.

        A network with a text token mapping needs `quoted`, others cannot use it: ValueError.
        Where the last row of every prompt is padding, it may stand for `pad_copies` more of them.
        """
        batch = prompt_embeds.shape[0]
        of_each = timesteps.unsqueeze(1).expand(-1, batch)
        prologue = self._condition(prompt_embeds, prompt_mask, of_each, quoted)
        return replace(prologue, pad_copies=pad_copies)

    def core(
        self, img: Tensor, step: PrologueStep, rope: Tensor, num_wanted: int | None = None
    ) -> Tensor:
        """Run the blocks: img (B, N, Cin) to velocity (B, N, Cout).

        The sampler uses the velocity of the target tokens only. Where it says so (`num_wanted`
        leading tokens), the last block leaves the other rows out, which changes no result.
        """
        img, txt = self.img_in(img), step.txt
        text_length = txt.shape[1]
        pads = Pads(text_length - 1, step.pad_copies)
        for double, (img_mod, txt_mod) in zip(self.double_blocks, step.double, strict=True):
            img, txt = double(img, txt, img_mod, txt_mod, rope, pads)
        x = torch.cat([txt, img], dim=1)
        *blocks, (last, last_mod) = zip(self.single_blocks, step.single, strict=True)
        for single, mod in blocks:
            x = single(x, mod, rope, pads=pads)
        if num_wanted is None:
            x = last(x, last_mod, rope, pads=pads)[:, text_length:]
        else:
            x = last(x, last_mod, rope, slice(text_length, text_length + num_wanted), pads)
        velocity: Tensor = self.final_layer(x, step.final)
        return velocity

    def rope(self, img_ids: Tensor, text_length: int, txt_ids: Tensor | None = None) -> Tensor:
        """Tabulate the rotations of text and image tokens; broadcasts to (B, H, L+N, D/2H, 2).

        Text tokens stand at the origin unless `txt_ids` says otherwise.
        """
        if txt_ids is None:
            txt_ids = img_ids.new_zeros(*img_ids.shape[:-2], text_length, img_ids.shape[-1])
        ids = torch.cat([txt_ids, img_ids], dim=-2)
        table = rope_table(ids, self.config.axes_dim, self.config.theta)
        return table.unsqueeze(-4)

    def _condition(
        self,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        timesteps: Tensor,
        quoted: QuotedText | None,
    ) -> Prologue:
        """Prepare steps from timesteps (T, B)."""
        if self.config.has_text_token_mapping != (quoted is not None):
            raise ValueError("quoted text is what a network with a text token mapping needs")
        txt, pooled = self.connector(prompt_embeds, prompt_mask, timesteps)
        if quoted is not None:
            mapped = self.text_token_mapping(quoted.embeds)  # (B, L, D)
            txt = txt + mapped * quoted.mask.unsqueeze(-1).to(mapped.dtype)
        vec = self.time_in(timestep_embedding(timesteps)) + self.vector_in(pooled)  # (T, B, D)
        vec = F.silu(vec)
        return Prologue(
            txt=self.txt_in(txt),
            double=[block.modulations(vec) for block in self.double_blocks],
            single=[block.modulation(vec) for block in self.single_blocks],
            final=self.final_layer.modulation(vec),
        )
