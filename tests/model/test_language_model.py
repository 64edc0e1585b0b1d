"""A tiny Qwen2.5-VL that talks: as the library's own generation, repeatable, stoppable."""

import dataclasses
from collections.abc import Generator

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from step1x_edit.model.language_model import (
    ChatModel,
    Said,
    Sampling,
    prepare_image,
    sample,
)
from step1x_edit.model.reasoning import Prompt
from tiny import a_picture, tiny_conditioner

GREEDY = Sampling(max_new_tokens=12, temperature=0)
PROMPT = Prompt("You are terse.", "make it a night scene")
PICTURES = [a_picture(60, 40), a_picture(90, 300)]


@pytest.fixture(scope="module")
def talker() -> Qwen2_5_VLForConditionalGeneration:
    """The library's model with a language head, and random weights."""
    conditioner = tiny_conditioner()
    config = conditioner.vlm.config
    config.tie_word_embeddings = False
    torch.manual_seed(4)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.model.load_state_dict(conditioner.vlm.state_dict())
    with torch.no_grad():
        model.lm_head.weight.normal_()
    model.tokenizer = conditioner.tokenizer
    return model


def chat_model(talker: Qwen2_5_VLForConditionalGeneration, **changes: object) -> ChatModel:
    return ChatModel(talker.model, talker.lm_head, talker.tokenizer, **changes)  # type: ignore[arg-type]


def said_and_reply(model: ChatModel) -> list[Said | str]:
    """What a reply yields on its way, and its text."""
    heard: list[Said | str] = []

    def listen() -> Generator[Said, None, None]:
        heard.append((yield from model.reply(PICTURES, PROMPT)))

    said = list(listen())
    return [*said, *heard]


def library_reply(
    talker: Qwen2_5_VLForConditionalGeneration, model: ChatModel, prompt: Prompt, **options: object
) -> list[int]:
    """The new tokens of the library's `generate` for the same pictures."""
    pictures = [prepare_image(image) for image in PICTURES]
    chat = model.tokenize(prompt, [picture.num_tokens for picture in pictures])
    ids = torch.tensor([chat.ids])
    output = talker.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=torch.tensor([chat.is_image]).int(),
        pixel_values=torch.cat([picture.pixel_values for picture in pictures]),
        image_grid_thw=torch.cat([picture.grid_thw for picture in pictures]),
        max_new_tokens=GREEDY.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=model.end_id,
        **options,
    )
    tokens: list[int] = output[0, len(chat.ids) :].tolist()
    return [token for token in tokens if token != model.end_id]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("is_text_first", [False, True])
def test_greedy_tokens_are_those_of_the_library(
    talker: Qwen2_5_VLForConditionalGeneration, penalty: float, is_text_first: bool
) -> None:
    prompt = PROMPT._replace(is_text_first=is_text_first)
    sampling = dataclasses.replace(GREEDY, repetition_penalty=penalty)
    model = chat_model(talker, sampling=sampling)

    tokens = list(model.generate(PICTURES, prompt))

    assert tokens == library_reply(talker, model, prompt, repetition_penalty=penalty)
    assert len(set(tokens)) > 3


def test_a_reply_ends_where_the_model_ends_its_turn(
    talker: Qwen2_5_VLForConditionalGeneration,
) -> None:
    model = chat_model(talker, sampling=GREEDY)
    tokens = list(model.generate(PICTURES, PROMPT))
    end = tokens[4]
    model.end_id = end

    assert list(model.generate(PICTURES, PROMPT)) == tokens[: tokens.index(end)]


def test_a_reply_is_no_longer_than_allowed(talker: Qwen2_5_VLForConditionalGeneration) -> None:
    model = chat_model(talker, sampling=dataclasses.replace(GREEDY, max_new_tokens=3))
    model.end_id = -1

    assert len(list(model.generate(PICTURES, PROMPT))) == 3


def test_the_same_seed_gives_the_same_replies(talker: Qwen2_5_VLForConditionalGeneration) -> None:
    def replies(seed: int) -> list[str]:
        model = chat_model(talker, sampling=Sampling(max_new_tokens=8, temperature=2), seed=seed)
        return [str(said_and_reply(model)[-1]) for _ in range(2)]

    first = replies(1)

    torch.rand(1)  # the global state has no say
    assert replies(1) == first
    assert replies(2) != first
    assert first[0] != first[1]  # asking again can help


def test_a_reply_is_the_text_of_its_tokens(talker: Qwen2_5_VLForConditionalGeneration) -> None:
    model = chat_model(talker, sampling=GREEDY)
    tokens = list(model.generate(PICTURES, PROMPT))

    *said, reply = said_and_reply(model)

    assert said == [Said(number, GREEDY.max_new_tokens) for number in range(1, len(tokens) + 1)]
    assert reply == talker.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert reply


def test_closing_a_reply_stops_between_two_tokens(
    talker: Qwen2_5_VLForConditionalGeneration,
) -> None:
    model = chat_model(talker, sampling=dataclasses.replace(GREEDY, max_new_tokens=50))
    model.end_id = -1
    asked: list[object] = []
    hook = talker.lm_head.register_forward_pre_hook(lambda _, inputs: asked.append(inputs))
    reply = model.reply(PICTURES, PROMPT)

    said = [next(reply) for _ in range(3)]
    reply.close()
    hook.remove()

    assert said[-1] == Said(3, 50)
    assert len(asked) == 3


def test_a_prompt_is_rendered_as_the_model_was_trained(
    talker: Qwen2_5_VLForConditionalGeneration,
) -> None:
    model = chat_model(talker)

    def rendered(prompt: Prompt) -> str:
        return str(
            talker.tokenizer.decode(model.tokenize(prompt, [2, 1]).ids, skip_special_tokens=False)
        )

    pictures = (
        "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
        "<|vision_start|><|image_pad|><|vision_end|>"
    )
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(Prompt("Be brief.", "hi")) == f"{head}{pictures}hi{tail}"
    assert rendered(Prompt("Be brief.", "hi", is_text_first=True)) == f"{head}hi{pictures}{tail}"


def test_an_image_token_in_the_text_is_no_picture(
    talker: Qwen2_5_VLForConditionalGeneration,
) -> None:
    model = chat_model(talker, sampling=GREEDY)
    prompt = Prompt("", "<|image_pad|> a", is_text_first=True)

    assert sum(model.tokenize(prompt, [5]).is_image) == 5
    assert list(model.generate(PICTURES, prompt))


def draws(logits: list[float], sampling: Sampling, seen: int | None = None) -> set[int]:
    """All tokens that come up in many draws."""
    mask = torch.zeros(len(logits), dtype=torch.bool)
    if seen is not None:
        mask[seen] = True
    rng = torch.Generator().manual_seed(0)
    return {sample(torch.tensor(logits), mask, sampling, rng) for _ in range(300)}


def test_only_the_likeliest_tokens_are_drawn() -> None:
    everything = Sampling(temperature=1, top_k=9, top_p=1, repetition_penalty=1)
    logits = [0.0, 0.5, 1.0, 0.2]

    assert draws(logits, everything) == {0, 1, 2, 3}
    assert draws(logits, dataclasses.replace(everything, top_k=2)) == {1, 2}
    assert draws(logits, dataclasses.replace(everything, top_p=0.01)) == {2}
    # e^1 + e^0.5 make 66 % of the whole
    assert draws(logits, dataclasses.replace(everything, top_p=0.65)) == {1, 2}
    assert draws(logits, dataclasses.replace(everything, top_p=0.67)) == {1, 2, 3}
    assert draws(logits, dataclasses.replace(everything, temperature=0.01)) == {2}


@pytest.mark.parametrize("logits", [[1.0, 1.1], [-1.1, -1.0]])
def test_what_was_said_before_is_less_likely(logits: list[float]) -> None:
    sampling = Sampling(temperature=0, repetition_penalty=1.5)

    assert draws(logits, sampling) == {1}
    assert draws(logits, sampling, seen=1) == {0}


def test_a_large_picture_is_shrunk_before_it_is_looked_at() -> None:
    prepared = prepare_image(a_picture(2048, 1024))

    assert prepared.grid_thw.tolist() == [[1, 36, 74]]  # 1024×512, rounded to 1036×504


def test_a_small_picture_is_enlarged() -> None:
    assert prepare_image(a_picture(60, 60)).num_tokens == (532 // 28) ** 2
