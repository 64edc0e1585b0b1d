"""The conditioner of v1.2: nothing is padded, quoted letters and places in the picture are told.

Beside the hidden states, its transformer takes the input embeddings of the letters between quotes
and a position for every token, by which the picture's tokens lie on the grid of the latents.
"""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen2_5_VLModel

from step1x_edit.model.conditioner import (
    CHAT_TAIL,
    FACTOR,
    IMAGE_PAD,
    PAD_ID,
    PATCH_SIZE,
    SPECIAL_TOKENS,
    VlmReader,
    check_prefix_length,
    num_image_tokens,
    prepare_image,
    render_chat,
)
from step1x_edit.model.config import ConditionerConfig

CLOSING_QUOTES = {'"': '"', "“": "”"}
"""Each opening quote with the one that closes it; the apostrophe is none."""

TOKEN_CENTRE = 13.5
"""Middle of an image token in its own pixels, 0 to 27."""

GRID_OFFSET, GRID_PIXELS = 11, 16
"""A token of latents has 16 pixels. Its middle would be 7.5; the reference has 11."""


class Piece(NamedTuple):
    """A part of the chat text that is tokenised for itself."""

    text: str
    is_quoted: bool = False
    """Whether it is one letter between quotes."""


class ChatTokens(NamedTuple):
    """The tokens of a chat text and what each stands for."""

    ids: list[int]
    is_quoted: list[bool]
    is_image: list[bool]


class PromptEncodingV12(NamedTuple):
    """What the transformer of v1.2 takes of one prompt, as long as it is."""

    prompt_embeds: Tensor  # (L, C) hidden states
    token_embeds: Tensor  # (L, C) what the language model was given
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
    def encode_each(
        self, prompts: Sequence[str], image: npt.NDArray[np.uint8]
    ) -> list[PromptEncodingV12]:
        """Encode several prompts about the same picture, which is looked at only once.

        `image` (H, W, 3) has the size that is edited in. The encodings differ in length.
        """
        vlm_image = prepare_image(image, self.config)
        features = self.encode_images(vlm_image.pixel_values, vlm_image.grid_thw)
        size = (image.shape[1], image.shape[0])
        return [
            self._encode(
                self.tokenize(prompt, vlm_image.num_tokens), features, vlm_image.grid_thw, size
            )
            for prompt in prompts
        ]

    def cuts(self, prompt: str, image: npt.NDArray[np.uint8]) -> bool:
        """Whether a part of the prompt or the picture lies beyond what is kept."""
        height, width = image.shape[:2]
        tokens = self.tokenize(prompt, num_image_tokens(width, height, self.config))
        kept = self.config.prefix_length + self.config.text_length
        return len(tokens.ids) - len(self.ids(CHAT_TAIL)) > kept

    def tokenize(self, prompt: str, num_image_tokens: int) -> ChatTokens:
        """The tokens of the whole chat text; each quoted letter is tokenised for itself."""
        text = render_chat(prompt, self.config)
        pieces = split_quotes_v1_2(text, self.config.quote_start, self.special_tokens)
        # A prompt may hold the image token too; the picture is behind it.
        picture = max(index for index, piece in enumerate(pieces) if piece.text == IMAGE_PAD)
        tokens = ChatTokens([], [], [])
        for index, piece in enumerate(pieces):
            ids = self.ids(piece.text) * (num_image_tokens if index == picture else 1)
            tokens.ids.extend(ids)
            tokens.is_quoted.extend([piece.is_quoted] * len(ids))
            tokens.is_image.extend([index == picture] * len(ids))
        return tokens

    def _encode(
        self,
        tokens: ChatTokens,
        image_features: Tensor,
        grid_thw: Tensor,
        source_size: tuple[int, int],
    ) -> PromptEncodingV12:
        device = self.vlm.device
        ids = torch.tensor([tokens.ids], device=device)  # (1, S)
        is_image = torch.tensor([tokens.is_image], device=device)  # (1, S)
        embeds = self.embed(ids, is_image, image_features)  # (1, S, C)
        # The positions skip tokens of id 0, but the attention of v1.2 has no mask.
        mask = (ids > PAD_ID).long()
        positions = self.rope_positions(ids, is_image, grid_thw, mask)  # (3, 1, S)
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
                positions[:, 0, kept].T, is_image[0, kept], grid_thw[0], source_size
            ),
        )


def split_quotes_v1_2(
    text: str, quote_start: int, special_tokens: Collection[str] = SPECIAL_TOKENS
) -> list[Piece]:
    """Cut a chat text at its special tokens, and so that each quoted letter is a piece.

    Quotes count from behind `quote_start` on and within one part between special tokens; one that
    is not closed there is no quote.
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
        if end < 0:  # nothing behind a quote that is not closed is a quote
            piece += part[index:]
            break
        # “ at the very beginning is dropped: a habit of the reference.
        if piece or opening != "“":
            pieces.append(Piece(piece + opening))
        pieces += [Piece(letter, is_quoted=True) for letter in part[index + 1 : end]]
        piece, index = closing, end + 1
    return [*pieces, Piece(piece)] if piece else pieces


def text_position_ids(
    positions: Tensor, is_image: Tensor, grid_thw: Tensor, source_size: tuple[int, int]
) -> Tensor:
    """The places (L, 3) of the kept tokens among those of the latents, float32.

    `positions` (L, 3) are the rotary ones. In time all tokens come before the latents and end at
    -1. An image token lies, in rows and columns of latents, where it was cut out of the picture,
    whose size was `source_size` (width, height) before it was resized to the grid.
    """
    ids = torch.zeros(positions.shape, dtype=torch.float64, device=positions.device)
    ids[:, 0] = positions[:, 0] - (positions[:, 0].max() + 1)
    seen = (grid_thw[1:] * PATCH_SIZE).tolist()
    rows, columns = (
        ((FACTOR * torch.arange(side // FACTOR) + TOKEN_CENTRE) * (source - 1) / (side - 1))
        for side, source in zip(seen, reversed(source_size), strict=True)
    )
    places = (torch.cartesian_prod(rows, columns) - GRID_OFFSET) / GRID_PIXELS
    count = int(is_image.sum())  # fewer than there are, if the end of the picture was cut off
    ids[is_image, 1:] = places[:count].to(ids)
    return ids.float()
