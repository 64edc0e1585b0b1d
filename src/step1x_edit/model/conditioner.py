"""The conditioner: Qwen2.5-VL (arXiv 2502.13923) reads picture and prompt.

Its hidden states guide the edit, as in `modules/conditioner.py` of Step1X-Edit. It knows chat text,
token ids and hidden states, but neither latents nor steps. Numbers that a checkpoint fixes come
from its `ConditionerConfig` and token ids from its tokenizer, so that the published models and the
embedded demo share one code path. `conditioner_v1_2` holds what v1.2 does differently.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from step1x_edit.model.config import ConditionerConfig

VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    VISION_START,
    VISION_END,
    IMAGE_PAD,
)
"""The special tokens of the chat text. A small vocabulary begins with them in this order, so that
its id 0 is padding."""

PAD_ID = 0
"""The reference masks ids > 0. In Qwen's vocabulary id 0 is "!", which is masked as well."""

PATCH_SIZE, MERGE_SIZE = 14, 2
FACTOR = PATCH_SIZE * MERGE_SIZE
"""Side in pixels of the square that becomes one image token."""

CHAT_TAIL = "<|im_end|>\n<|im_start|>assistant\n"
"""The chat text behind the prompt."""

PIXELS_BEFORE_PROCESSOR = (4 * FACTOR**2, 16384 * FACTOR**2)
"""Limits of the first resize, which `qwen-vl-utils` does in the reference."""

MAX_ASPECT_RATIO = 200
"""Qwen's image processor refuses narrower pictures."""


class VlmImage(NamedTuple):
    """A picture as Qwen2.5-VL takes it."""

    pixel_values: Tensor  # (patches, 3·2·14·14)
    grid_thw: Tensor  # (1, 3), in patches of 14 pixels

    @property
    def num_tokens(self) -> int:
        """Image tokens after the 2×2 merge."""
        return int(self.grid_thw.prod()) // MERGE_SIZE**2


@dataclass(frozen=True)
class Seen:
    """A picture as the vision tower saw it."""

    features: Tensor  # (tokens, C)
    grid_thw: Tensor  # (1, 3), in patches of 14 pixels
    size: tuple[int, int]
    """Width and height of the picture before it was resized to the grid."""

    @property
    def num_tokens(self) -> int:
        """Image tokens."""
        return len(self.features)


class PromptEncoding(NamedTuple):
    """The conditioner's output; the mask is 1 at real positions, padded rows are zero."""

    prompt_embeds: Tensor  # (B, L, C), or (L, C) for one prompt
    prompt_mask: Tensor  # (B, L), or (L)


class VlmReader:
    """Embeds chat text and pictures for the vision-language model."""

    def __init__(self, vlm: Qwen2_5_VLModel, tokenizer: Tokenizer) -> None:
        self.vlm = vlm
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def see(self, image: npt.NDArray[np.uint8], config: ConditionerConfig) -> Seen:
        """Run the vision tower on an RGB picture (H, W, 3) of the size of the edit."""
        pixel_values, grid_thw = prepare_image(image, config)
        features = self.encode_images(pixel_values, grid_thw)
        return Seen(features, grid_thw, (image.shape[1], image.shape[0]))

    def encode_images(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """The vision tower's tokens of all pictures, concatenated: (tokens, C). Differentiable."""
        device = self.vlm.device
        vision = self.vlm.get_image_features(pixel_values.to(device), grid_thw.to(device))
        return torch.cat(tuple(vision.pooler_output))

    def embed(self, input_ids: Tensor, is_image: Tensor, image_features: Tensor) -> Tensor:
        """The embeddings of the tokens, (B, S, C), with the pictures' features at image tokens."""
        embeds = self.vlm.get_input_embeddings()(input_ids)
        mixed: Tensor = embeds.masked_scatter(is_image.unsqueeze(-1), image_features.to(embeds))
        return mixed

    def rope_positions(
        self, input_ids: Tensor, is_image: Tensor, grid_thw: Tensor, mask: Tensor
    ) -> Tensor:
        """The rotary positions in time, row and column, (3, B, S); masked tokens do not count."""
        positions: Tensor
        positions, _ = self.vlm.get_rope_index(
            input_ids, is_image.int(), image_grid_thw=grid_thw, attention_mask=mask
        )
        # The reference used a version of transformers in which masked tokens have position 1.
        return positions.masked_fill(mask == 0, 1)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without added special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


class Conditioner(VlmReader):
    """Turns a picture and an instruction into hidden states of the vision-language model."""

    def __init__(
        self, vlm: Qwen2_5_VLModel, tokenizer: Tokenizer, config: ConditionerConfig
    ) -> None:
        super().__init__(vlm, tokenizer)
        self.config = config
        self.vision_end_id = special_id(tokenizer, VISION_END)
        self.image_pad_id = special_id(tokenizer, IMAGE_PAD)
        self.wrapping_quotes = _quote_ids(tokenizer)
        if not config.is_padded:
            raise ValueError("a sequence without padding is for ConditionerV12")
        check_prefix_length(tokenizer, config)

    @torch.inference_mode()
    def encode(self, prompt: str, image: npt.NDArray[np.uint8]) -> PromptEncoding:
        """The states for one prompt and one RGB picture, (L, C) and (L)."""
        embeds, mask = self.encode_many([prompt], self.see(image, self.config))
        return PromptEncoding(embeds[0], mask[0])

    @torch.inference_mode()
    def encode_many(self, prompts: Sequence[str], seen: Seen) -> PromptEncoding:
        """The states for several prompts about the same picture.

        The text that all prompts begin with, and the picture in it, are read only once.
        """
        # Attention is causal: tokens beyond the window do not affect the states that are kept.
        rows = [self.tokenize(prompt, seen.num_tokens)[: self._max_ids] for prompt in prompts]
        if len(rows) > 1:
            return self._encode_together(rows, seen.features, seen.grid_thw)
        return self.encode_ids(*pad_ids(rows), seen.features, seen.grid_thw)

    def cuts(self, prompt: str, size: tuple[int, int]) -> bool:
        """Whether the end of the prompt is cut off: the chat text keeps `text_length` tokens.

        `size` is the width and height of the picture that the prompt is about.
        """
        text = render_chat(prompt, self.config).removesuffix(CHAT_TAIL)
        ids = self._spelled(text, num_image_tokens(*size, self.config))
        return len(ids) > self._max_ids

    def prepare_image(self, image: npt.NDArray[np.uint8]) -> VlmImage:
        """Resize and cut an (H, W, 3) picture into patches, on the CPU."""
        return prepare_image(image, self.config)

    def tokenize(self, prompt: str, num_image_tokens: int) -> list[int]:
        """The ids of the whole chat text, with the quoted letters of the prompt spelled out."""
        return self._spelled(render_chat(prompt, self.config), num_image_tokens)

    def _spelled(self, text: str, num_image_tokens: int) -> list[int]:
        ids = self.ids(text.replace(IMAGE_PAD, IMAGE_PAD * num_image_tokens, 1))
        if not self.config.quote_characters:
            return ids
        spelled: list[int] = []
        for piece in split_quotes(text, self.config.quote_start, self.config.quote_characters):
            spelled += strip_wrapping_quotes(self.ids(piece), self.wrapping_quotes)
        return join_at(ids, spelled, self.vision_end_id)

    def encode_ids(
        self, input_ids: Tensor, lengths: Tensor, image_features: Tensor, grid_thw: Tensor
    ) -> PromptEncoding:
        """Encode token ids; differentiable, for training calls it without `torch.inference_mode`.

        `input_ids` (B, S) is padded on the right and `lengths` (B) holds the real length of each
        row (`pad_ids` makes both). Row b's picture is `grid_thw[b]`; `image_features` holds the
        tokens of all rows' pictures in the order of the batch, as `encode_images` returns them for
        the rows' patches concatenated. Attention is causal, so a row does not depend on its
        padding.
        """
        embeds, positions, mask = self._place(input_ids, image_features, grid_thw)
        states = self.vlm.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state  # (B, S, C)
        return self._keep(states, lengths)

    def _encode_together(
        self, rows: Sequence[Sequence[int]], image_features: Tensor, grid_thw: Tensor
    ) -> PromptEncoding:
        """Encode rows about one picture as one sequence: their common beginning, then their ends.

        Each end attends to the beginning and to itself. One pass reads the weights once, which
        matters if they are streamed to the device.
        """
        count, shared = len(rows), common_length(rows)
        input_ids, lengths = pad_ids(rows)
        embeds, positions, mask = self._place(
            input_ids, image_features.repeat(count, 1), grid_thw.repeat(count, 1)
        )
        start = [(0, place) for place in range(shared)]
        ends = [(b, place) for b, row in enumerate(rows) for place in range(shared, len(row))]
        row, place = torch.tensor(start + ends, device=self.vlm.device).T  # (T) each
        index = torch.arange(len(row), device=row.device)
        may_see = (row == row.unsqueeze(1)) | (index < shared)  # (query, key)
        may_see &= (index <= index.unsqueeze(1)) & (mask[row, place] > 0)
        states = self.vlm.language_model(
            inputs_embeds=embeds[row, place][None],
            position_ids=positions[:, row, place][:, None],
            attention_mask=may_see[None, None],
            use_cache=False,
        ).last_hidden_state[0]  # (T, C)
        apart = states.new_zeros(*input_ids.shape, states.shape[-1])  # (B, S, C)
        apart[row, place] = states
        apart[:, :shared] = states[:shared]
        return self._keep(apart, lengths)

    def _place(
        self, input_ids: Tensor, image_features: Tensor, grid_thw: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The language model's inputs: embeddings (B, S, C), positions (3, B, S), mask (B, S)."""
        input_ids = input_ids.to(self.vlm.device)
        is_image = self._image_positions(input_ids, grid_thw)  # (B, S)
        mask = (input_ids > PAD_ID).long()
        embeds = self.embed(input_ids, is_image, image_features)
        return embeds, self.rope_positions(input_ids, is_image, grid_thw, mask), mask

    def _keep(self, states: Tensor, lengths: Tensor) -> PromptEncoding:
        lengths = lengths.to(states.device)
        return keep_window(states, lengths, self.config.prefix_length, self.config.text_length)

    def _image_positions(self, input_ids: Tensor, grid_thw: Tensor) -> Tensor:
        """Which tokens are the picture's; an image token typed in the prompt is not."""
        is_pad = input_ids == self.image_pad_id
        tokens = grid_thw.to(input_ids.device).prod(-1, keepdim=True) // MERGE_SIZE**2
        return is_pad & (is_pad.cumsum(-1) <= tokens)

    @property
    def _max_ids(self) -> int:
        return self.config.prefix_length + self.config.text_length


def render_head(config: ConditionerConfig) -> str:
    """The chat text up to and including the prefix, the same for every prompt."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{config.prompt_prefix}"
    )


def render_chat(prompt: str, config: ConditionerConfig) -> str:
    """Qwen2.5-VL's chat template for one user turn of prefix, picture and prompt.

    In v1.2 the prompt comes before the picture, one space after the prefix.
    """
    picture = f"Picture 1: {VISION_START}{IMAGE_PAD}{VISION_END}"
    turn = f"{picture}{prompt}" if config.is_padded else f" {prompt}{picture}"
    return f"{render_head(config)}{turn}{CHAT_TAIL}"


def check_prefix_length(tokenizer: Tokenizer, config: ConditionerConfig) -> None:
    """Raise ValueError if the checkpoint does not drop exactly the tokens of head and prefix."""
    measured = measure_prefix_length(tokenizer, config)
    if measured != config.prefix_length:
        raise ValueError(
            f"the chat text has {measured} tokens to drop, the checkpoint says "
            f"{config.prefix_length}"
        )


def measure_prefix_length(tokenizer: Tokenizer, config: ConditionerConfig) -> int:
    """How many leading tokens are dropped: head and prefix without their last token, a colon."""
    head = tokenizer.encode(render_head(config), add_special_tokens=False).ids
    whole = tokenizer.encode(render_chat("", config), add_special_tokens=False).ids
    if whole[: len(head)] != head:
        raise ValueError("the prefix does not end at a token boundary in this vocabulary")
    return len(head) - 1


def split_quotes(text: str, quote_start: int, quote_characters: str) -> list[str]:
    """Cut a text so that each quoted character is a separate piece, wrapped as “c”.

    This is `split_string` in `modules/conditioner.py`. Quotes count after `quote_start`. The
    apostrophe is one of v1's quote characters, and a quote that never closes spells the rest of the
    text, special tokens included: the models were trained that way.
    """
    pieces: list[str] = []
    piece, is_quoted = "", False
    straight = text.translate(dict.fromkeys(map(ord, quote_characters), '"'))
    for index, character in enumerate(straight):
        is_quote = character == '"' and index > quote_start
        if is_quote and not is_quoted:
            pieces.append(piece + character)
            piece, is_quoted = "", True
        elif is_quote:
            piece, is_quoted = character, False
        elif is_quoted:
            pieces.append(f"“{character}”")
        else:
            piece += character
    return [*pieces, piece] if piece else pieces


def strip_wrapping_quotes(ids: list[int], quotes: tuple[int, int] | None) -> list[int]:
    """Drop the pair of quotes around a spelled character, if both are separate tokens.

    A character that merges with a quote (A, a full stop) keeps both, as in the reference.
    """
    return ids[1:-1] if quotes and ids and (ids[0], ids[-1]) == quotes else ids


def join_at(first: list[int], second: list[int], mark: int) -> list[int]:
    """The first list up to its first mark, the second from its first mark on."""
    return first[: first.index(mark)] + second[second.index(mark) :]


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many of their first tokens the rows have in common."""
    columns = zip(*rows, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def pad_ids(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """A (B, S) tensor of ids, padded on the right, and the (B) lengths of its rows."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), PAD_ID)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids, lengths


def keep_window(
    states: Tensor, lengths: Tensor, prefix_length: int, text_length: int
) -> PromptEncoding:
    """Drop the prefix, cut or zero-pad to the text length; the mask marks what is real."""
    kept = states[:, prefix_length : prefix_length + text_length]  # (B, ≤L, C)
    kept = F.pad(kept, (0, 0, 0, text_length - kept.shape[1]))  # (B, L, C)
    place = torch.arange(text_length, device=states.device)
    mask = (place < (lengths - prefix_length).unsqueeze(-1)).to(states.dtype)  # (B, L)
    return PromptEncoding(kept * mask.unsqueeze(-1), mask)


def prepare_image(image: npt.NDArray[np.uint8], config: ConditionerConfig) -> VlmImage:
    """Resize and cut an (H, W, 3) picture into patches, on the CPU."""
    size = _first_size(image.shape[1], image.shape[0], config)
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    patches = _image_processor(config)(picture, return_tensors="pt")
    return VlmImage(patches["pixel_values"], patches["image_grid_thw"])


def round_to_factor(width: int, height: int) -> tuple[int, int]:
    """The first of two resizes: each side to the nearest multiple of 28 (halves to even)."""
    low, high = PIXELS_BEFORE_PROCESSOR
    sides = [max(FACTOR, round(side / FACTOR) * FACTOR) for side in (width, height)]
    return _limit_pixels((width, height), (sides[0], sides[1]), low, high)


def vlm_image_size(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size at which the processor passes a picture to the vision tower."""
    sides = [round(side / FACTOR) * FACTOR for side in (width, height)]
    return _limit_pixels((width, height), (sides[0], sides[1]), min_pixels, max_pixels)


def num_image_tokens(width: int, height: int, config: ConditionerConfig) -> int:
    """The number of image tokens for a picture of this size."""
    if config.fixed_image_size:
        return (config.fixed_image_size // FACTOR) ** 2
    first = _first_size(width, height, config)
    size = vlm_image_size(*first, config.min_pixels, config.max_pixels)
    return size[0] * size[1] // FACTOR**2


def _limit_pixels(
    original: tuple[int, int], rounded: tuple[int, int], low: int, high: int
) -> tuple[int, int]:
    """Keep the rounded size if its area is within bounds, else rescale the original's sides."""
    if min(original) * MAX_ASPECT_RATIO < max(original):
        raise ValueError(f"a picture of {original[0]}×{original[1]} is too narrow for the model")
    area = rounded[0] * rounded[1]
    if low <= area <= high:
        return rounded
    limit, snap = (high, math.floor) if area > high else (low, math.ceil)
    ratio = math.sqrt(original[0] * original[1] / limit)
    width, height = (max(FACTOR, snap(side / ratio / FACTOR) * FACTOR) for side in original)
    return width, height


def _first_size(width: int, height: int, config: ConditionerConfig) -> tuple[int, int]:
    """The size at which the processor gets a picture: v1.2 passes it unchanged."""
    if config.fixed_image_size:
        return config.fixed_image_size, config.fixed_image_size
    return round_to_factor(width, height) if config.is_padded else (width, height)


def _image_processor(config: ConditionerConfig) -> Qwen2VLImageProcessorPil:
    """The PIL processor: the torchvision one resamples slightly differently from the reference."""
    if config.fixed_image_size:
        pixels = config.fixed_image_size**2
        return Qwen2VLImageProcessorPil(min_pixels=pixels, max_pixels=pixels)
    return Qwen2VLImageProcessorPil(min_pixels=config.min_pixels, max_pixels=config.max_pixels)


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a required token. Raises ValueError if there is none."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token}")
    return int(found)


def _quote_ids(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The ids of “ and ” (2073 and 854 in Qwen's vocabulary), if each is one token."""
    opening, closing = (tokenizer.encode(quote, add_special_tokens=False).ids for quote in "“”")
    return (opening[0], closing[0]) if len(opening) == len(closing) == 1 else None
