"""The denoising transformer: a FLUX.1 layout with a connector in front and no guidance input.

The figure is that of `src/flux/model.py` in FLUX.1 and `modules/model_edit.py` in Step1X-Edit, in
two halves. The *prologue* computes, for all timesteps at once, what depends only on timestep and
prompt: the refined text and the modulation of every block. The *core* maps tokens to velocity and
is all that runs inside the denoising loop. `forward` is one after the other for a single step, so
that sampling, training and tests share one implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x_edit.model.blocks import (
    ALL_ROWS,
    TIMESTEP_CHANNELS,
    DoubleStreamBlock,
    FinalLayer,
    KeysAndValues,
    Layout,
    MLPEmbedder,
    SingleStreamBlock,
    timestep_embedding,
)
from step1x_edit.model.config import TransformerConfig
from step1x_edit.model.connector import Connector
from step1x_edit.model.rope import rope_table


@dataclass(frozen=True)
class QuotedText:
    """v1.2: the letters that a prompt asks to draw, on a path around the conditioner's layers."""

    embeds: Tensor  # (B, L, C), the conditioner's input embeddings of the prompt
    mask: Tensor  # (B, L), 1 at tokens of a quoted character


@dataclass(frozen=True)
class PrologueStep:
    """What the core needs to know about one step."""

    txt: Tensor  # (B, L, D)
    double: Sequence[tuple[Tensor, Tensor]]  # per block: image and text, (B, 6D) each
    single: Sequence[Tensor]  # per block: (B, 3D)
    final: Tensor  # (B, 2D)


@dataclass(frozen=True)
class Prologue:
    """The steps of a whole schedule; tensors have a leading axis T."""

    txt: Tensor  # (T, B, L, D)
    double: Sequence[tuple[Tensor, Tensor]]
    single: Sequence[Tensor]
    final: Tensor

    def __len__(self) -> int:
        return self.txt.shape[0]

    def __getitem__(self, i: int) -> PrologueStep:
        return PrologueStep(
            txt=self.txt[i],
            double=[(img[i], txt[i]) for img, txt in self.double],
            single=[mod[i] for mod in self.single],
            final=self.final[i],
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
        timesteps (B,) in [0, 1], one per sample; `txt_ids` as in `rope`, `num_wanted` as in
        `Layout`, `quoted` as in `prologue`.
        """
        text_length = prompt_embeds.shape[1]
        step = self.prologue(prompt_embeds, prompt_mask, timesteps.unsqueeze(0), quoted)[0]
        rope = self.rope(img_ids, text_length, txt_ids)
        return self.core(img, step, Layout(rope, text_length, num_wanted=num_wanted))

    def prologue(
        self,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        timesteps: Tensor,
        quoted: QuotedText | None = None,
    ) -> Prologue:
        """Prepare all steps: timesteps are (T,) for the whole batch, or (T, B).

        A network with a text token mapping needs `quoted`, others cannot use it: ValueError.
        """
        if self.config.has_text_token_mapping != (quoted is not None):
            raise ValueError("quoted text is what a network with a text token mapping needs")
        timesteps = timesteps.reshape(len(timesteps), -1).expand(-1, len(prompt_embeds))  # (T, B)
        txt, pooled = self.connector(prompt_embeds, prompt_mask, timesteps)
        if quoted is not None:
            mapped = self.text_token_mapping(quoted.embeds)  # (B, L, D)
            txt = txt + mapped * quoted.mask.unsqueeze(-1).to(mapped.dtype)  # (T, B, L, D)
        vec = self.time_in(timestep_embedding(timesteps)) + self.vector_in(pooled)  # (T, B, D)
        vec = F.silu(vec)
        return Prologue(
            txt=self.txt_in(txt),
            double=[block.modulations(vec) for block in self.double_blocks],
            single=[block.modulation(vec) for block in self.single_blocks],
            final=self.final_layer.modulation(vec),
        )

    def core(
        self,
        img: Tensor,
        step: PrologueStep,
        layout: Layout,
        kept: Sequence[KeysAndValues] | None = None,
    ) -> Tensor:
        """Run the blocks: img (B, N, Cin) to the velocity (B, wanted, Cout) of the wanted tokens.

        The last block leaves out the other rows; every token has been a key in it, so that this
        changes no velocity. With `kept` (`keys_and_values`) img may be a part of the tokens
        (`Layout.only`): the others are keys as they were when they last ran.
        """
        depth, depth_single = len(step.double), len(step.single)
        none: Sequence[KeysAndValues | None] = [None] * (depth + depth_single)
        each = kept or none
        img, txt = self.img_in(img), step.txt  # (B, N, D), (B, L, D)
        doubles = zip(self.double_blocks, step.double, each[:depth], strict=True)
        for double, (img_mod, txt_mod), its in doubles:
            img, txt = double(img, txt, img_mod, txt_mod, layout, its)
        x = torch.cat([txt, img], dim=1)  # (B, L+N, D)
        singles = zip(self.single_blocks, step.single, each[depth:], strict=True)
        *blocks, (last, last_mod, last_kept) = singles
        for single, mod, its in blocks:
            x = single(x, mod, layout, ALL_ROWS, its)
        x = last(x, last_mod, layout, layout.wanted, last_kept)  # (B, wanted, D)
        velocity: Tensor = self.final_layer(x, step.final)
        return velocity

    def keys_and_values(self) -> list[KeysAndValues]:
        """What `core` keeps of each block for steps that run a part of the tokens."""
        return [KeysAndValues() for _ in (*self.double_blocks, *self.single_blocks)]

    def size_kept(self, rows: int) -> int:
        """Bytes of these for a number of rows, with copies of padding."""
        depth = len(self.double_blocks) + len(self.single_blocks)
        return depth * 2 * rows * self.config.hidden_size * self.img_in.weight.element_size()

    def rope(self, img_ids: Tensor, text_length: int, txt_ids: Tensor | None = None) -> Tensor:
        """Tabulate the rotations of text and image tokens; broadcasts to (B, H, L+N, D/2H, 2).

        Text tokens stand at the origin unless `txt_ids` says otherwise.
        """
        if txt_ids is None:
            txt_ids = img_ids.new_zeros(*img_ids.shape[:-2], text_length, img_ids.shape[-1])
        ids = torch.cat([txt_ids, img_ids], dim=-2)  # (L+N, 3) or (B, L+N, 3)
        table = rope_table(ids, self.config.axes_dim, self.config.theta)
        return table.unsqueeze(-4)
