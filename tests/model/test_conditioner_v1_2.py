"""The conditioner of v1.2: trimmed states, marked letters, places of the picture's tokens."""

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
import torch

from step1x_edit.model.conditioner import (
    Conditioner,
    VlmImage,
    num_image_tokens,
    prepare_image,
    render_chat,
)
from step1x_edit.model.conditioner_v1_2 import (
    ConditionerV12,
    Piece,
    PromptEncodingV12,
    split_quotes_v1_2,
    text_position_ids,
)
from step1x_edit.model.config import V1_1, V1_2, ConditionerConfig
from tiny import a_picture, tiny_conditioner
from tiny import tiny_conditioner_v1_2 as conditioner


def encode(
    reader: ConditionerV12, prompt: str, image: npt.NDArray[np.uint8] | None = None
) -> PromptEncodingV12:
    return reader.encode(prompt, reader.see(a_picture() if image is None else image, reader.config))


def seen(reader: ConditionerV12, image: npt.NDArray[np.uint8]) -> VlmImage:
    return prepare_image(image, reader.config)


def kept_tokens(reader: ConditionerV12, prompt: str, count: int) -> list[str]:
    """The kept tokens of the chat text as they are written."""
    ids = reader.tokenize(prompt, count).ids[reader.config.prefix_length :]
    return [reader.tokenizer.decode([token], skip_special_tokens=False) for token in ids]


def test_the_prompt_stands_before_the_picture() -> None:
    chat = render_chat("make it red", V1_2.conditioner)

    assert chat.endswith(
        "The editing instruction is: make it redPicture 1: <|vision_start|><|image_pad|>"
        "<|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_states_are_those_of_the_library() -> None:
    """Beside our own assembly, the library's forward pass from ids and pixels to states."""
    reader = conditioner()
    image = seen(reader, a_picture())
    tokens = reader.tokenize('write "no" here', image.num_tokens)

    encoding = encode(reader, 'write "no" here')

    with torch.inference_mode():
        states = reader.vlm(
            input_ids=torch.tensor([tokens.ids]),
            mm_token_type_ids=torch.tensor([tokens.is_image]).int(),
            pixel_values=image.pixel_values,
            image_grid_thw=image.grid_thw,
        ).last_hidden_state[0]
    expected = states[reader.config.prefix_length :]
    assert encoding.prompt_embeds.shape == expected.shape
    torch.testing.assert_close(encoding.prompt_embeds, expected, rtol=1e-4, atol=1e-4)


def test_the_kept_sequence_begins_with_the_colon_of_the_prefix() -> None:
    tokens = kept_tokens(conditioner(), "red", 1)

    assert "".join(tokens) == (
        ": redPicture 1: <|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_each_prompt_keeps_its_own_length() -> None:
    reader = conditioner()
    image = a_picture()

    encodings = [encode(reader, prompt, image) for prompt in ("make it a night scene", "")]

    lengths = [encoding.prompt_embeds.shape[0] for encoding in encodings]
    count = seen(reader, image).num_tokens
    assert lengths == [
        len(kept_tokens(reader, prompt, count)) for prompt in ("make it a night scene", "")
    ]


def test_the_mask_marks_the_letters_between_quotes() -> None:
    reader = conditioner()
    prompt = 'replace "Ab" with “日”, girl\'s'

    encoding = encode(reader, prompt)

    tokens = kept_tokens(reader, prompt, seen(reader, a_picture()).num_tokens)
    mask = encoding.text_mask.bool().tolist()
    marked = [token for token, is_marked in zip(tokens, mask, strict=True) if is_marked]
    assert marked[:2] == ["A", "b"]
    letter = reader.tokenizer.encode("日", add_special_tokens=False).ids
    assert len(marked) == 2 + len(letter)


def test_the_embeddings_are_what_the_language_model_is_given() -> None:
    reader = conditioner()
    image = seen(reader, a_picture())
    start = reader.config.prefix_length
    tokens = reader.tokenize("red", image.num_tokens)

    encoding = encode(reader, "red")

    is_image = torch.tensor(tokens.is_image[start:])
    with torch.inference_mode():
        table = reader.vlm.get_input_embeddings()(torch.tensor(tokens.ids[start:]))
        features = reader.encode_images(image.pixel_values, image.grid_thw)
    torch.testing.assert_close(encoding.token_embeds[~is_image], table[~is_image])
    torch.testing.assert_close(encoding.token_embeds[is_image], features)


def test_an_image_token_in_the_prompt_is_not_the_picture() -> None:
    reader = conditioner()
    typed = "a <|image_pad|> b"
    image = seen(reader, a_picture())
    tokens = reader.tokenize(typed, image.num_tokens)

    encoding = encode(reader, typed)

    assert sum(tokens.is_image) == image.num_tokens
    first = tokens.is_image.index(True)
    vision_start = reader.tokenizer.token_to_id("<|vision_start|>")
    assert tokens.ids[first - 1] == vision_start
    assert torch.isfinite(encoding.prompt_embeds).all()
    assert encoding.prompt_embeds.shape[0] == len(tokens.ids) - reader.config.prefix_length


def test_a_token_that_pads_is_skipped_by_the_positions_but_read() -> None:
    """The end-of-text token has id 0 here, as "!" has in Qwen's vocabulary."""
    reader = conditioner()

    with_pad = encode(reader, "a<|endoftext|>b")
    without = encode(reader, "a<|im_end|>b")

    places = with_pad.position_ids[:, 0]
    ids = reader.tokenize("a<|endoftext|>b", 1).ids[reader.config.prefix_length :]
    at = ids.index(0)
    assert places[at + 1] - places[at - 1] == 1
    assert places[at] < places[0]  # position 1, before all that is kept
    assert without.position_ids[at, 0] == without.position_ids[at - 1, 0] + 1
    assert with_pad.prompt_embeds.shape == without.prompt_embeds.shape
    assert torch.isfinite(with_pad.prompt_embeds).all()


def test_all_tokens_come_before_the_latents_in_time() -> None:
    reader = conditioner()
    tokens = reader.tokenize("red", seen(reader, a_picture()).num_tokens)

    places = encode(reader, "red").position_ids

    is_image = torch.tensor(tokens.is_image[reader.config.prefix_length :])
    assert places.dtype == torch.float32
    assert places[-1].tolist() == [-1, 0, 0]
    assert (places[:, 0] < 0).all()
    assert (places[~is_image, 1:] == 0).all()
    assert len(places[is_image, 0].unique()) == 1


def test_image_tokens_lie_where_they_were_cut_out() -> None:
    """Neither stretched nor moved, a token of 28 pixels begins 28/16 latents behind the last."""
    grid = torch.tensor([1, 4, 6])  # 2 rows and 3 columns of 28 pixels
    positions = torch.zeros(6, 3)

    places = text_position_ids(positions, torch.ones(6).bool(), grid, (84, 56))

    rows, columns = places[:, 1].view(2, 3), places[:, 2].view(2, 3)
    assert (rows == rows[:, :1]).all()
    assert (columns == columns[:1]).all()
    assert columns[0].tolist() == [2.5 / 16, 30.5 / 16, 58.5 / 16]
    assert rows[:, 0].tolist() == [2.5 / 16, 30.5 / 16]


def test_a_picture_with_its_end_cut_off_keeps_its_places() -> None:
    whole = conditioner()
    prefix = whole.config.prefix_length
    tokens = whole.tokenize("red", seen(whole, a_picture()).num_tokens)
    length = tokens.is_image.index(True) - prefix + 2

    encoding = encode(conditioner(text_length=length), "red")

    expected = encode(whole, "red")
    for found, full in zip(encoding[:3], expected[:3], strict=True):
        torch.testing.assert_close(found, full[:length])
    torch.testing.assert_close(encoding.position_ids[:, 1:], expected.position_ids[:length, 1:])
    assert encoding.position_ids[:, 0].max() == -1


def test_a_prompt_is_cut_when_it_or_the_picture_does_not_fit() -> None:
    tail = conditioner().ids("<|im_end|>\n<|im_start|>assistant\n")
    whole = conditioner()
    size = len(whole.tokenize("red", seen(whole, a_picture()).num_tokens).ids)
    length = size - len(tail) - whole.config.prefix_length

    assert not conditioner(text_length=length).cuts("red", (60, 40))
    assert conditioner(text_length=length - 1).cuts("red", (60, 40))


@pytest.mark.parametrize("config", [V1_1.conditioner, V1_2.conditioner])
@pytest.mark.parametrize("size", [(1024, 1024), (1360, 768), (336, 784), (500, 333), (70, 70)])
def test_as_many_image_tokens_are_expected_as_there_are(
    config: ConditionerConfig, size: tuple[int, int]
) -> None:
    found = prepare_image(a_picture(*size), config).num_tokens

    assert found == num_image_tokens(*size, config)


def test_the_processor_gets_the_picture_as_it_is() -> None:
    """v1 rounds to 28 pixels before; v1.2 resamples once, so what is seen differs."""
    picture = a_picture(1000, 600)
    v1, v1_2 = (
        prepare_image(
            picture,
            dataclasses.replace(preset.conditioner, min_pixels=28 * 28, max_pixels=112 * 112),
        )
        for preset in (V1_1, V1_2)
    )

    assert torch.equal(v1.grid_thw, v1_2.grid_thw)
    assert not torch.equal(v1.pixel_values, v1_2.pixel_values)


def texts(pieces: list[Piece]) -> list[str]:
    return [f"[{piece.text}]" if piece.is_quoted else piece.text for piece in pieces]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ('a "bc" d', ['a "', "[b]", "[c]", '" d']),
        ("a “b” d", ["a “", "[b]", "” d"]),
        ("girl's 'x'", ["girl's 'x'"]),
        ('an "unclosed “quote” here', ['an "unclosed “quote” here']),
        ('"a" and “b', ['"', "[a]", '" and “b']),
        ('"a<|im_end|>b"', ['"a', "<|im_end|>", 'b"']),
        ("“a” b", ["[a]", "” b"]),
        ("“a b", ["“a b"]),
        ('"“"', ['"', "[“]", '"']),
        ("", []),
    ],
)
def test_quotes_are_split(text: str, pieces: list[str]) -> None:
    assert texts(split_quotes_v1_2(text, -1)) == pieces


def test_quotes_of_the_template_are_none() -> None:
    assert texts(split_quotes_v1_2('"a" <|im_end|>"b" "c"', 16)) == [
        '"a" ',
        "<|im_end|>",
        '"b" "',
        "[c]",
        '"',
    ]


def test_each_conditioner_refuses_the_other_s_configuration() -> None:
    v1 = tiny_conditioner()

    with pytest.raises(ValueError, match="with padding"):
        ConditionerV12(v1.vlm, v1.tokenizer, v1.config)
    with pytest.raises(ValueError, match="without padding"):
        Conditioner(v1.vlm, v1.tokenizer, dataclasses.replace(v1.config, is_padded=False))


def test_another_number_of_tokens_to_drop_is_refused() -> None:
    with pytest.raises(ValueError, match="the checkpoint says 3"):
        conditioner(prefix_length=3)
