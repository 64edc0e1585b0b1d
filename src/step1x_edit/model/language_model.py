"""Qwen2.5-VL as a language model: it reads pictures and writes a reply, token by token.

It knows chat text and sampling; `reasoning` knows the questions and the meaning of replies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.cache_utils import StaticCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from step1x_edit.model.conditioner import (
    CHAT_TAIL,
    IMAGE_PAD,
    VISION_END,
    VISION_START,
    VlmImage,
    VlmReader,
    round_to_factor,
    special_id,
)
from step1x_edit.model.reasoning import Prompt
from step1x_edit.model.request import Pixels

LONGEST_SIDE = 1024
"""Pictures are first reduced to this side length."""

MIN_PIXELS, MAX_PIXELS = 262144, 802816
"""Limits of the image processor in the reference: 512², and 1024 image tokens of 28²."""

END = "<|im_end|>"


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    max_new_tokens: int = 128
    """Replies are cut off here, as in the reference; the caller asks again."""
    temperature: float = 0.7
    """0 takes the likeliest token."""
    top_k: int = 50
    top_p: float = 0.9
    repetition_penalty: float = 1.05


class Chat(NamedTuple):
    """A prompt as tokens; `is_image` marks those of its pictures."""

    ids: list[int]
    is_image: list[bool]


class Said(NamedTuple):
    """The length of a reply so far."""

    tokens: int
    limit: int


class ChatModel(VlmReader):
    """Replies to prompts about pictures. The same seed and prompts give the same replies."""

    def __init__(
        self,
        vlm: Qwen2_5_VLModel,
        lm_head: nn.Module,
        tokenizer: Tokenizer,
        *,
        sampling: Sampling = Sampling(),
        seed: int = 0,
    ) -> None:
        super().__init__(vlm, tokenizer)
        self.lm_head = lm_head
        self.sampling = sampling
        # On the CPU, so that a seed means the same on every device.
        self.rng = torch.Generator().manual_seed(seed)
        self.end_id = special_id(tokenizer, END)

    def reply(self, images: Sequence[Pixels], prompt: Prompt) -> Generator[Said, None, str]:
        """Yield after each token and return the text, stripped and without special tokens.

        Closing the generator stops.
        """
        tokens = []
        with contextlib.closing(self.generate(images, prompt)) as generated:
            for token in generated:
                tokens.append(token)
                yield Said(len(tokens), self.sampling.max_new_tokens)
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    @torch.inference_mode()
    def generate(self, images: Sequence[Pixels], prompt: Prompt) -> Generator[int, None, None]:
        """Yield token after token until the model ends its turn; closing the iterator stops."""
        device = self.vlm.device
        pictures = [prepare_image(image) for image in images]
        chat = self.tokenize(prompt, [picture.num_tokens for picture in pictures])
        ids = torch.tensor([chat.ids], device=device)  # (1, S)
        is_image = torch.tensor([chat.is_image], device=device)  # (1, S)
        grid_thw = torch.cat([picture.grid_thw for picture in pictures])
        features = self.encode_images(
            torch.cat([picture.pixel_values for picture in pictures]), grid_thw
        )
        embeds = self.embed(ids, is_image, features)  # (1, S, C)
        positions = self.rope_positions(ids, is_image, grid_thw, torch.ones_like(ids))  # (3, 1, S)
        # The last token needs no room: the model is not run on it.
        room = len(chat.ids) + self.sampling.max_new_tokens - 1
        cache = StaticCache(config=self.vlm.config.text_config, max_cache_len=room)
        seen = torch.zeros(self.vlm.config.text_config.vocab_size, dtype=torch.bool, device=device)
        seen[ids[0]] = True
        next_position = int(positions.max()) + 1
        for index in range(self.sampling.max_new_tokens):
            states = self.vlm.language_model(
                inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state
            logits = self.lm_head(states[0, -1]).float()  # (V)
            token = sample(logits, seen, self.sampling, self.rng)
            if token == self.end_id:
                return
            yield token
            seen[token] = True
            embeds = self.vlm.get_input_embeddings()(torch.tensor([[token]], device=device))
            positions = torch.full((3, 1, 1), next_position + index, device=device)

    def tokenize(self, prompt: Prompt, image_tokens: Sequence[int]) -> Chat:
        """Qwen2.5-VL's chat template for one question, with `image_tokens` for each picture."""
        head = f"<|im_start|>system\n{prompt.system}{END}\n<|im_start|>user\n"
        before, after = (prompt.text, "") if prompt.is_text_first else ("", prompt.text)
        chat = Chat([], [])

        def add(ids: list[int], *, is_image: bool) -> None:
            chat.ids.extend(ids)
            chat.is_image.extend([is_image] * len(ids))

        add(self.ids(head + before), is_image=False)
        for count in image_tokens:
            add(self.ids(VISION_START), is_image=False)
            add(self.ids(IMAGE_PAD) * count, is_image=True)
            add(self.ids(VISION_END), is_image=False)
        add(self.ids(after + CHAT_TAIL), is_image=False)
        return chat


def add_lm_head(vlm: Qwen2_5_VLModel) -> None:
    """Add a language head as a submodule, so that it is read, moved and streamed with the model."""
    text = vlm.config.text_config
    vlm.add_module("lm_head", nn.Linear(text.hidden_size, text.vocab_size, bias=False))


def sample(logits: Tensor, seen: Tensor, sampling: Sampling, rng: torch.Generator) -> int:
    """Draw a token from logits (V); tokens that were `seen` (V) become less likely.

    The order is that of transformers: penalty, temperature, the k likeliest, and of these the
    fewest whose probabilities add up to p.
    """
    penalty = sampling.repetition_penalty
    punished = torch.where(logits < 0, logits * penalty, logits / penalty)
    logits = torch.where(seen, punished, logits)
    if sampling.temperature == 0:
        return int(logits.argmax())
    best, tokens = logits.topk(min(sampling.top_k, logits.shape[0]))  # (K), falling
    probabilities = (best.cpu() / sampling.temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities * (before < sampling.top_p)  # always the first
    return int(tokens[int(torch.multinomial(kept, 1, generator=rng))])


def shrink(picture: Image.Image) -> Image.Image:
    """Reduce a picture to at most 1024 pixels a side."""
    picture = picture.copy()
    if max(picture.size) > LONGEST_SIDE:
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return picture


def prepare_image(image: Pixels) -> VlmImage:
    """Shrink, round and cut an (H, W, 3) picture into patches, on the CPU."""
    picture = shrink(Image.fromarray(np.ascontiguousarray(image)))
    picture = picture.resize(round_to_factor(*picture.size), Image.Resampling.BICUBIC)
    processor = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    patches = processor(picture, return_tensors="pt")
    return VlmImage(patches["pixel_values"], patches["image_grid_thw"])
