"""The conditioner of v1.2: no padding, but a mask of quoted letters and an id for each token.

Besides the hidden states, its transformer takes the input embeddings of the letters between quotes
and a position id for each token, which puts the picture's tokens on the grid of the latents. The
reference is the authors' branch of diffusers (`step1xedit_v1p2`); no paper describes this.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from step1x_edit.model.conditioner import (
    CHAT_TAIL,
    FACTOR,
    IMAGE_PAD,
    PAD_ID,
    PATCH_SIZE,
    SPECIAL_TOKENS,
    Seen,
    VlmReader,
    check_prefix_length,
    num_image_tokens,
    render_chat,
)
from step1x_edit.model.config import ConditionerConfig

CLOSING_QUOTES = {'"': '"', "“": "”"}
"""Each opening quote and its closing one; the apostrophe is not a quote."""

TOKEN_CENTRE = 13.5
"""Centre of an image token in its own pixels, 0 to 27."""

GRID_OFFSET, GRID_PIXELS = 11, 16
"""A token of latents has 16 pixels. Its centre would be 7.5; the reference uses 11."""


class Piece(NamedTuple):
    """A part of the chat text that is tokenised separately."""

    text: str
    is_quoted: bool = False
    """Whether it is a letter between quotes."""


class ChatTokens(NamedTuple):
    """The tokens of a chat text and which of them are quoted or the picture's."""

    ids: list[int]
    is_quoted: list[bool]
    is_image: list[bool]


class PromptEncodingV12(NamedTuple):
    """What the transformer of v1.2 takes of one prompt of L tokens."""

    prompt_embeds: Tensor  # (L, C) hidden states
    token_embeds: Tensor  # (L, C) input embeddings of the language model
    text_mask: Tensor  # (L), 1 at letters between quotes
    position_ids: Tensor  # (L, 3) float32


class ConditionerV12(VlmReader):
    """Turns a picture and an instruction into what the transformer of v1.2 takes."""

    def __init__(
        self, vlm: Qwen2_5_VLModel, tokenizer: Tokenizer, config: ConditionerConfig
    ) -> None:
        super().__init__(vlm, tokenizer)
        self.config = config
        self.special_tokens = [
            token.content
            for token in tokenizer.get_added_tokens_decoder().values()
            if token.special
        ]
        if config.is_padded:
            raise ValueError("a sequence with padding is for Conditioner")
        check_prefix_length(tokenizer, config)

    @torch.inference_mode()
    def encode(self, prompt: str, seen: Seen) -> PromptEncodingV12:
        """Encode a prompt about a picture."""
        tokens = self.tokenize(prompt, seen.num_tokens)
        device = self.vlm.device
        ids = torch.tensor([tokens.ids], device=device)  # (1, S)
        is_image = torch.tensor([tokens.is_image], device=device)  # (1, S)
        embeds = self.embed(ids, is_image, seen.features)  # (1, S, C)
        # The positions skip tokens of id 0, but the attention of v1.2 has no mask.
        mask = (ids > PAD_ID).long()
        positions = self.rope_positions(ids, is_image, seen.grid_thw, mask)  # (3, 1, S)
        states = self.vlm.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False
        ).last_hidden_state  # (1, S, C)
        start = self.config.prefix_length
        kept = slice(start, start + self.config.text_length)
        return PromptEncodingV12(
            prompt_embeds=states[0, kept],
            token_embeds=embeds[0, kept],
            text_mask=torch.tensor(tokens.is_quoted[kept], device=device).to(states.dtype),
            position_ids=text_position_ids(
                positions[:, 0, kept].T, is_image[0, kept], seen.grid_thw[0], seen.size
            ),
        )

    def cuts(self, prompt: str, size: tuple[int, int]) -> bool:
        """Whether a part of the prompt or the picture, of this width and height, is cut off."""
        tokens = self.tokenize(prompt, num_image_tokens(*size, self.config))
        kept = self.config.prefix_length + self.config.text_length
        return len(tokens.ids) - len(self.ids(CHAT_TAIL)) > kept

    def tokenize(self, prompt: str, num_image_tokens: int) -> ChatTokens:
        """The tokens of the whole chat text; each quoted letter is tokenised separately."""
        text = render_chat(prompt, self.config)
        pieces = split_quotes_v1_2(text, self.config.quote_start, self.special_tokens)
        # A prompt may contain the image token too; the picture comes after it.
        picture = max(index for index, piece in enumerate(pieces) if piece.text == IMAGE_PAD)
        tokens = ChatTokens([], [], [])
        for index, piece in enumerate(pieces):
            ids = self.ids(piece.text) * (num_image_tokens if index == picture else 1)
            tokens.ids.extend(ids)
            tokens.is_quoted.extend([piece.is_quoted] * len(ids))
            tokens.is_image.extend([index == picture] * len(ids))
        return tokens


def split_quotes_v1_2(
    text: str, quote_start: int, special_tokens: Collection[str] = SPECIAL_TOKENS
) -> list[Piece]:
    """Cut a chat text at its special tokens, and so that each quoted letter is a piece.

    Quotes count after `quote_start` and within one part between special tokens; one that is not
    closed there is not a quote.
    """
    pieces: list[Piece] = []
    start = 0
    for part in re.split(f"({'|'.join(map(re.escape, special_tokens))})", text):
        if part in special_tokens:
            pieces.append(Piece(part))
        elif part:
            pieces += _split_part(part, quote_start - start)
        start += len(part)
    return pieces


def _split_part(part: str, quote_start: int) -> list[Piece]:
    """The pieces of a text without special tokens."""
    pieces: list[Piece] = []
    piece, index = "", 0
    while index < len(part):
        opening = part[index]
        closing = CLOSING_QUOTES.get(opening) if index > quote_start else None
        if closing is None:
            piece += opening
            index += 1
            continue
        end = part.find(closing, index + 1)
        if end < 0:  # after an unclosed quote there are no quotes
            piece += part[index:]
            break
        # “ at the very beginning is dropped, as in the reference.
        if piece or opening != "“":
            pieces.append(Piece(piece + opening))
        pieces += [Piece(letter, is_quoted=True) for letter in part[index + 1 : end]]
        piece, index = closing, end + 1
    return [*pieces, Piece(piece)] if piece else pieces


def text_position_ids(
    positions: Tensor, is_image: Tensor, grid_thw: Tensor, source_size: tuple[int, int]
) -> Tensor:
    """The position ids (L, 3) of the kept tokens, float32, in the coordinates of the latents.

    `positions` (L, 3) are the rotary ones. Along the first axis (kind) the tokens come before the
    latents and end at -1. An image token has the row and column, in tokens of latents, of its
    centre in the picture, whose size was `source_size` (width, height) before it was resized to the
    grid: ((28 i + 13.5) · (source - 1) / (seen - 1) - 11) / 16.
    """
    ids = torch.zeros(positions.shape, dtype=torch.float64, device=positions.device)
    ids[:, 0] = positions[:, 0] - (positions[:, 0].max() + 1)
    seen = (grid_thw[1:] * PATCH_SIZE).tolist()
    rows, columns = (
        ((FACTOR * torch.arange(side // FACTOR) + TOKEN_CENTRE) * (source - 1) / (side - 1))
        for side, source in zip(seen, reversed(source_size), strict=True)
    )
    places = (torch.cartesian_prod(rows, columns) - GRID_OFFSET) / GRID_PIXELS
    count = int(is_image.sum())  # fewer than all, if the end of the picture is cut off
    ids[is_image, 1:] = places[:count].to(ids)
    return ids.float()
