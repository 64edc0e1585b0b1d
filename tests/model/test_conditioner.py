"""The conditioner: chat text, quote rule, picture sizes, masks and what is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from step1x_edit.model.conditioner import (
    CHAT_TAIL,
    FACTOR,
    PAD_ID,
    Conditioner,
    join_at,
    keep_window,
    measure_prefix_length,
    num_image_tokens,
    pad_ids,
    render_chat,
    render_head,
    round_to_factor,
    split_quotes,
    strip_wrapping_quotes,
    vlm_image_size,
)
from step1x_edit.model.config import V1_1, V1_2
from tiny import a_picture, tiny_conditioner, tiny_tokenizer

V1 = V1_1.conditioner
DATA = Path(__file__).parents[1] / "data"
PROMPTS = json.loads((DATA / "split_string_a.json").read_text("utf-8"))["rows"]
SIZES = json.loads((DATA / "sizing_a.json").read_text("utf-8"))["rows"]
QWEN_QUOTES, QWEN_VISION_END = (2073, 854), 151653

by_prompt = pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case["prompt"][:20])


@pytest.fixture(scope="module")
def conditioner() -> Conditioner:
    return tiny_conditioner()


def test_the_chat_text_is_qwens_template_around_the_prefix() -> None:
    assert render_chat("add a hat", dataclasses.replace(V1, prompt_prefix="PREFIX")) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nPREFIXPicture 1: <|vision_start|><|image_pad|><|vision_end|>"
        "add a hat<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_prefix_of_v1_is_the_one_it_was_trained_with() -> None:
    digest = hashlib.sha256(V1.prompt_prefix.encode()).hexdigest()
    assert digest == "40882ddca94ca6971c8d5713d42464afa31dad09236dfacafe3ee26b4b44aa82"
    assert len(render_head(dataclasses.replace(V1, prompt_prefix=""))) == 75
    assert (V1.prefix_length, V1.text_length) == (217, 640)


def test_the_quotes_of_the_prefix_lie_before_the_first_that_counts() -> None:
    quotes = [index for index, c in enumerate(render_head(V1)) if c in "\"'“”"]
    assert quotes == [108, 124]
    assert quotes[-1] < V1.quote_start < len(render_head(V1))


@by_prompt
def test_217_positions_and_13_kept_ones_frame_picture_and_prompt(case: dict[str, Any]) -> None:
    prompt_ids = len(case["ids_after_vision_end"]) - 5  # <|im_end|> \n <|im_start|> assistant \n
    assert case["total_len"] - case["kept_len"] == V1.prefix_length
    assert case["kept_len"] == case["image_tokens"] + prompt_ids + 13


@by_prompt
def test_quoted_text_is_split_as_in_the_reference(case: dict[str, Any]) -> None:
    chat = render_chat(case["prompt"], V1)

    first, *rest = split_quotes(chat, V1.quote_start, V1.quote_characters)

    assert first.partition("<|vision_end|>")[2] == case["first_piece_tail"]
    assert rest == case["pieces"]


@by_prompt
def test_wrapping_quotes_are_stripped_and_pieces_joined_as_in_the_reference(
    case: dict[str, Any],
) -> None:
    opening, closing = QWEN_QUOTES
    spelled = [
        id_
        for piece, ids in zip(case["pieces"], case["piece_token_ids"], strict=True)
        for id_ in strip_wrapping_quotes(
            [opening, *ids, closing] if piece[0] == "“" and len(ids) == 1 else ids, QWEN_QUOTES
        )
    ]
    ends = len(case["ids_after_vision_end"]) - len(spelled)
    before = [1, 2, QWEN_VISION_END]
    second = [9, QWEN_VISION_END, *case["ids_after_vision_end"][:ends], *spelled]

    joined = join_at([*before, *case["ids_after_vision_end_without_rule"]], second, QWEN_VISION_END)

    assert joined == [*before, *case["ids_after_vision_end"]]


@pytest.mark.parametrize("ids", [[47249, 854], [2073, 18987], [2073], []])
def test_a_character_that_merged_with_a_quote_keeps_both(ids: list[int]) -> None:
    assert strip_wrapping_quotes(ids, QWEN_QUOTES) == ids


def test_pictures_reach_the_vision_tower_in_the_reference_size() -> None:
    for case in SIZES:
        rounded = round_to_factor(*case["resized_wh"])
        shown = vlm_image_size(*rounded, V1.min_pixels, V1.max_pixels)

        assert list(rounded) == case["v1_vlm_fetch_wh"]
        assert list(shown) == case["v1_vlm_processor_wh"]
        assert shown[0] * shown[1] // FACTOR**2 == case["v1_image_tokens"] <= 324


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (864, 1200), (368, 704)])
def test_the_processor_agrees_with_the_size_rule(size: tuple[int, int]) -> None:
    width, height = vlm_image_size(*round_to_factor(*size), V1.min_pixels, V1.max_pixels)
    conditioner = tiny_conditioner(fixed_image_size=None)

    image = conditioner.prepare_image(a_picture(*size))

    assert image.grid_thw.tolist() == [[1, height // 14, width // 14]]
    assert image.num_tokens == width * height // 28**2


def test_a_strip_is_too_narrow_for_the_vision_tower() -> None:
    with pytest.raises(ValueError, match="narrow"):
        round_to_factor(2016, 8)


@pytest.mark.parametrize("size", [(60, 40), (30, 300)])
def test_a_fixed_size_gives_every_picture_the_same_tokens(
    conditioner: Conditioner, size: tuple[int, int]
) -> None:
    assert conditioner.prepare_image(a_picture(*size)).num_tokens == 4


def test_a_prompt_comes_out_padded_with_zeros_and_masked(conditioner: Conditioner) -> None:
    embeds, mask = conditioner.encode("make it night", a_picture())

    config = conditioner.config
    real = len(conditioner.tokenize("make it night", 4)) - config.prefix_length
    assert embeds.shape == (config.text_length, 32)
    assert mask.tolist() == [1.0] * real + [0.0] * (config.text_length - real)
    assert (embeds[:real].abs().sum(-1) > 0).all()
    assert not embeds[real:].any()


def test_a_long_prompt_loses_its_tail(conditioner: Conditioner) -> None:
    embeds, mask = conditioner.encode("make it night " * 50, a_picture())

    assert embeds.shape == (conditioner.config.text_length, 32)
    assert mask.all()


def test_what_is_cut_is_not_computed_and_changes_nothing(conditioner: Conditioner) -> None:
    prompt = "make it night " * 50
    image = conditioner.prepare_image(a_picture())
    whole = pad_ids([conditioner.tokenize(prompt, image.num_tokens)])
    with torch.inference_mode():
        features = conditioner.encode_images(image.pixel_values, image.grid_thw)
        oracle = conditioner.encode_ids(*whole, features, image.grid_thw)
    read: list[int] = []
    hook = conditioner.vlm.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].shape[1])
    )

    embeds, mask = conditioner.encode(prompt, a_picture())

    hook.remove()
    assert read == [conditioner.config.prefix_length + conditioner.config.text_length]
    torch.testing.assert_close(embeds, oracle.prompt_embeds[0], atol=1e-5, rtol=0)
    assert torch.equal(mask, oracle.prompt_mask[0])


def test_only_a_prompt_that_loses_words_counts_as_cut(conditioner: Conditioner) -> None:
    config = conditioner.config
    room = config.prefix_length + config.text_length - len(conditioner.tokenize("", 4))
    room += len(conditioner.tokenizer.encode(CHAT_TAIL, add_special_tokens=False).ids)

    assert not conditioner.cuts("!" * room, (60, 40))
    assert conditioner.cuts("!" * (room + 1), (60, 40))


@pytest.mark.parametrize("side", [56, None])
def test_image_tokens_are_known_before_the_picture_is_cut_into_patches(side: int | None) -> None:
    conditioner = tiny_conditioner(fixed_image_size=side)

    tokens = num_image_tokens(368, 704, conditioner.config)

    assert tokens == conditioner.prepare_image(a_picture(368, 704)).num_tokens


def test_the_window_starts_behind_the_prefix() -> None:
    states = torch.arange(1.0, 13).view(2, 6, 1)

    embeds, mask = keep_window(states, torch.tensor([6, 4]), prefix_length=2, text_length=5)

    assert embeds.squeeze(-1).tolist() == [[3, 4, 5, 6, 0], [9, 10, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]


def test_states_are_those_of_the_librarys_own_forward(conditioner: Conditioner) -> None:
    image = conditioner.prepare_image(a_picture())
    ids = torch.tensor([conditioner.tokenize("make it night", image.num_tokens)])
    with torch.inference_mode():
        oracle = conditioner.vlm(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=image.pixel_values,
            image_grid_thw=image.grid_thw,
            mm_token_type_ids=(ids == conditioner.image_pad_id).int(),
            output_hidden_states=True,
        ).hidden_states[-1][0]

    embeds, mask = conditioner.encode("make it night", a_picture())

    torch.testing.assert_close(embeds[mask.bool()], oracle[conditioner.config.prefix_length :])


def test_prompts_encoded_together_equal_prompts_encoded_alone(conditioner: Conditioner) -> None:
    prompts = ["make it night", "", "把天空变成夜晚"]

    together = conditioner.encode_many(prompts, conditioner.see(a_picture(), conditioner.config))

    for index, prompt in enumerate(prompts):
        embeds, mask = conditioner.encode(prompt, a_picture())
        torch.testing.assert_close(together.prompt_embeds[index], embeds, atol=1e-5, rtol=0)
        assert torch.equal(together.prompt_mask[index], mask)


def test_a_batch_may_show_each_prompt_another_picture(conditioner: Conditioner) -> None:
    pictures = [a_picture(), 255 - a_picture()]
    images = [conditioner.prepare_image(picture) for picture in pictures]
    ids, lengths = pad_ids([conditioner.tokenize(prompt, 4) for prompt in ("night", "a scene")])
    grids = torch.cat([image.grid_thw for image in images])

    features = conditioner.encode_images(torch.cat([i.pixel_values for i in images]), grids)
    embeds, _ = conditioner.encode_ids(ids, lengths, features, grids)

    for index, prompt in enumerate(("night", "a scene")):
        alone, _ = conditioner.encode(prompt, pictures[index])
        torch.testing.assert_close(embeds[index].detach(), alone, atol=1e-5, rtol=0)


def test_gradients_reach_the_text_and_the_vision_weights(conditioner: Conditioner) -> None:
    image = conditioner.prepare_image(a_picture())
    ids, lengths = pad_ids([conditioner.tokenize("night", image.num_tokens)])

    features = conditioner.encode_images(image.pixel_values, image.grid_thw)
    embeds, _ = conditioner.encode_ids(ids, lengths, features, image.grid_thw)
    embeds.square().sum().backward()

    for weight in (
        conditioner.vlm.visual.patch_embed.proj.weight,
        conditioner.vlm.language_model.embed_tokens.weight,
    ):
        assert weight.grad.abs().sum() > 0
    conditioner.vlm.zero_grad()


def test_id_zero_is_masked_wherever_it_stands(conditioner: Conditioner) -> None:
    image = conditioner.prepare_image(a_picture())
    ids = conditioner.tokenize("make it night", image.num_tokens)
    place = len(ids) - 8
    ids[place] = PAD_ID
    rows, lengths = pad_ids([ids])
    table = conditioner.vlm.language_model.embed_tokens.weight

    def encode() -> torch.Tensor:
        features = conditioner.encode_images(image.pixel_values, image.grid_thw)
        return conditioner.encode_ids(rows, lengths, features, image.grid_thw).prompt_embeds[0]

    with torch.no_grad():
        before = encode()
        table[PAD_ID] += 1
        after = encode()
        table[PAD_ID] -= 1

    others = torch.arange(len(before)) != place - conditioner.config.prefix_length
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


def test_an_image_token_typed_into_the_prompt_is_only_text(conditioner: Conditioner) -> None:
    embeds, _ = conditioner.encode("a <|image_pad|><|vision_end|> b", a_picture())

    assert embeds.isfinite().all()


def test_quoted_letters_are_tokens_of_their_own() -> None:
    spelling, plain = tiny_conditioner(), tiny_conditioner(quote_characters="")
    prompt = 'night "night" night'
    letters = [spelling.tokenizer.token_to_id(letter) for letter in "night"]

    ids = spelling.tokenize(prompt, 4)

    assert any(ids[i : i + 5] == letters for i in range(len(ids)))
    assert len(plain.tokenize(prompt, 4)) < len(ids)


def test_a_prefix_of_another_length_is_refused() -> None:
    fitting = tiny_conditioner()
    config = dataclasses.replace(fitting.config, prefix_length=217)

    with pytest.raises(ValueError, match="217"):
        Conditioner(fitting.vlm, fitting.tokenizer, config)


def test_the_prefix_length_leaves_the_last_token_of_the_prefix() -> None:
    tokenizer = tiny_tokenizer()

    length = measure_prefix_length(tokenizer, V1)

    assert tokenizer.encode(render_chat("", V1), add_special_tokens=False).tokens[length] == ":"


def test_a_tokenizer_without_the_chats_tokens_is_refused() -> None:
    fitting = tiny_conditioner()
    lacking = type(fitting.tokenizer).from_str(
        fitting.tokenizer.to_str().replace("<|vision_end|>", "<|other|>")
    )

    with pytest.raises(ValueError, match="vision_end"):
        Conditioner(fitting.vlm, lacking, fitting.config)


def test_v1_2_has_a_prefix_of_its_own() -> None:
    assert len(V1_2.conditioner.prompt_prefix) == 449
    assert V1_2.conditioner.prompt_prefix.endswith(":")


def test_the_picture_changes_the_states(conditioner: Conditioner) -> None:
    first, _ = conditioner.encode("night", a_picture())
    second, _ = conditioner.encode("night", np.zeros_like(a_picture()))

    assert not torch.allclose(first, second, atol=1e-3)
