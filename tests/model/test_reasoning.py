"""Thinking, judging and trying again, with a language model whose replies are written down."""

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import numpy as np
import pytest

from step1x_edit.model.config import V1_2_PREVIEW
from step1x_edit.model.reasoning import (
    GAVE_UP,
    MAX_TRIES,
    NO_RATING,
    Prompt,
    Reasoned,
    Reasoner,
    ReasoningPlan,
    Stage,
    cap_score,
    clean_verdict,
    language_word,
    parse_json_block,
    parse_rating,
    prompts,
    read_verdict,
    reason,
)
from step1x_edit.model.request import Pixels

GOOD_SCORE = '{"meets_instruction": "yes", "raw_score": 9, "reason": "fits"}'
MARKS = '{"score": [8, 9], "reasoning": "fine"}'
SUCCESS = "<#Think> good <#Success>"
FAILED = "<#Think> broken <#Failed>"
AGAIN = "<#Think> nearly <#Reflection>make it red"

# From the published code of v1.2: the models were trained with exactly these bytes.
PUBLISHED = {
    "think": (
        "bc13eaa419b56ca07027f22d924295f9241136990955b1b92b166ba1ce4b5273",
        "586f3067879b32b8f414de79f440c310b8b968771c24754eec284b83231b8add",
    ),
    "describe": (
        "0a4c51bfc8b577a7e8f1fbc1398c1757ee2ee3e5ff2627239fd1c5b8dd1faae7",
        "fda5e505510c42bb0764f7a62ce929aa8dad2ef00364e8acb45c090b0fc06bd4",
    ),
    "score": (
        "045139c40340846277bc597000e7acfd3df39d1a3ad04b1e5e8055d5654e59be",
        "1485577084f8ee40ecda7194d4d2080ffb06502b3696b09bfacea392c544b0ff",
    ),
    "reflect": (
        "98a650d2966a0b4365ddee7edd551c0b3f66d03839acb6e2c71e4d4f433f8334",
        "1b167412bffcdde2847df7c84a56bcc0dcaa4878f8a6c58bd2f59a85f8417c9d",
    ),
    "rank_edit": (
        "823a7992906b603fa5ea23a8e5a2e4a8e075c5c1fa4dcc68e68000265b2abac3",
        "ead66084989cb3697bb4abf6717397201e8caffb3cdf961bb76a4a2403d4b749",
    ),
    "rank_quality": (
        "fdef398702c195d957872ded5cf4abc8e936def4e00f17f470279c1789054e2d",
        "896e7320ff3b429ddb838d2330c00304f838d361c11fddce9dbef1b75edd6661",
    ),
}

PUBLISHED_PREVIEW = {
    "think": (
        "370052d2624a65b5c1610c15c2c9b697d1fc68b899cc6bf6cda407d24df331ba",
        "c096d60dbb12f0d0847e7f9357cc2541ba3bdd7699554aaa7b45095c4efc5fca",
    ),
    "describe": (
        "518ec112258fad3982bdb74fed061d36e2586c4476819b022830fb20d3c25e2d",
        "9f93c6b17b401f815b43ee0527cd40bf97b172ca80dce9d9ea910e1f6c173e5f",
    ),
    "score": (
        "18de6f1d27c14ee8cc158d5d025db96a6048108ae904536ea7749fb118538453",
        "5a3738e59fd5a2e97e3ef238b046db3c7bcba4bf1c01ba6459130a22ee4dac0e",
    ),
    "reflect": (
        "4c3c7c8dcc907b6f2bae740a4a31fad1881503cc81ffbd0a0a526ba24f7239b2",
        "ae3dd9ac41bd3a41524f7fe5f03c05266bb4125098bf144e8f3f50f738a29aea",
    ),
}

T = TypeVar("T")


def picture(number: int) -> Pixels:
    return np.full((2, 3, 3), number, dtype=np.uint8)


def number(image: Pixels) -> int:
    return int(image[0, 0, 0])


class Scripted:
    """A language model with a list of replies for each question; the last one is repeated."""

    def __init__(self, **replies: str | list[str]) -> None:
        script = {
            "think": "a clear instruction",
            "describe": "a red cat",
            "score": GOOD_SCORE,
            "reflect": SUCCESS,
            "rank_edit": MARKS,
            "rank_quality": MARKS,
            **replies,
        }
        self.replies = {
            name: [lines] if isinstance(lines, str) else list(lines)
            for name, lines in script.items()
        }
        self.asked: list[tuple[str, list[int], Prompt]] = []
        self.questions = prompts()

    def reply(self, images: Sequence[Pixels], prompt: Prompt) -> Generator[str, None, str]:
        starts = {name: question.text[:60] for name, question in self.questions.items()}
        systems = {name: question.system[:60] for name, question in self.questions.items()}
        (name,) = (
            name
            for name in starts
            if prompt.system.startswith(systems[name].partition("{")[0])
            and prompt.text.startswith(starts[name].partition("{")[0])
        )
        self.asked.append((name, [number(image) for image in images], prompt))
        lines = self.replies[name]
        yield name
        return lines.pop(0) if len(lines) > 1 else lines[0]

    def names(self) -> list[str]:
        return [name for name, _, _ in self.asked]

    def question(self, name: str) -> Prompt:
        return next(prompt for asked, _, prompt in self.asked if asked == name)


class Painter:
    """Paints pictures 1, 2, 3, ... and keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str]] = []

    def __call__(self, image: Pixels, prompt: str) -> Generator[str, None, Pixels]:
        self.calls.append((number(image), prompt))
        yield "painting"
        return picture(len(self.calls))


def run(
    model: Scripted,
    painter: Callable[[Pixels, str], Generator[str, None, Pixels]],
    **plan: object,
) -> tuple[list[Stage], Reasoned]:
    *stages, result = reason(
        Reasoner(model),
        painter,
        picture(0),
        "do it",
        ReasoningPlan(**plan),  # type: ignore[arg-type]
    )
    assert isinstance(result, Reasoned)
    return [stage for stage in stages if isinstance(stage, Stage)], result


def returned(work: Generator[str, None, T]) -> T:
    """What a generator returns at its end."""
    try:
        while True:
            next(work)
    except StopIteration as end:
        result: T = end.value
        return result


@pytest.mark.parametrize(
    ("file", "published"),
    [("reasoning_prompts.json", PUBLISHED), ("reasoning_prompts_preview.json", PUBLISHED_PREVIEW)],
)
def test_the_questions_are_those_that_were_published(
    file: str, published: dict[str, tuple[str, str]]
) -> None:
    found = {
        name: tuple(
            hashlib.sha256(text.encode()).hexdigest() for text in (prompt.system, prompt.text)
        )
        for name, prompt in prompts(file).items()
    }

    assert found == published


def test_the_preview_asks_its_own_questions_and_takes_the_last_picture() -> None:
    rules = V1_2_PREVIEW.reasoning
    assert rules is not None
    model = Scripted(reflect=FAILED)
    model.questions = prompts(rules.prompts)
    plan = ReasoningPlan(has_thinking=True, has_ranking=rules.has_ranking)

    *_, result = reason(Reasoner(model, model.questions), Painter(), picture(0), "do it", plan)

    assert isinstance(result, Reasoned)
    assert number(result.image) == 3
    assert all(round_.ranking is None for round_ in result.rounds)
    assert model.names() == ["think", *["describe", "score", "reflect"] * 3]


def test_only_the_score_is_asked_with_the_text_before_the_picture() -> None:
    assert [name for name, prompt in prompts().items() if prompt.is_text_first] == ["score"]


def test_thinking_replaces_the_prompt() -> None:
    model, painter = Scripted(think="  paint the cat red\n"), Painter()

    _, result = run(model, painter, has_thinking=True, has_reflection=False)

    assert painter.calls == [(0, "paint the cat red")]
    assert result.rewritten_prompt == "paint the cat red"
    assert model.asked[0][1] == [0]
    assert "User input instruction:do it\n" in model.asked[0][2].text


def test_a_thought_without_words_leaves_the_prompt_as_it_was() -> None:
    painter = Painter()

    run(Scripted(think=" \n"), painter, has_thinking=True, has_reflection=False)

    assert painter.calls == [(0, "do it")]


def test_without_reflection_the_language_model_is_not_asked_about_the_edit() -> None:
    model = Scripted()

    stages, result = run(model, Painter(), has_reflection=False)

    assert model.asked == []
    assert stages == [Stage("editing", 1)]
    assert (len(result.rounds), number(result.image)) == (1, 1)
    assert result.rounds[0].reflection is None


def test_a_success_ends_the_rounds() -> None:
    stages, result = run(Scripted(reflect=SUCCESS), Painter())

    assert stages == [Stage("editing", 1), Stage("reflecting", 1), Stage("ranking", 1)]
    assert len(result.rounds) == 1


def test_a_verdict_with_an_instruction_goes_on_from_the_newest_picture() -> None:
    painter = Painter()

    _, result = run(Scripted(reflect=[AGAIN, SUCCESS]), painter)

    assert painter.calls == [(0, "do it"), (1, "make it red")]
    assert [number(round_.source) for round_ in result.rounds] == [0, 1]
    assert [round_.prompt for round_ in result.rounds] == ["do it", "make it red"]


@pytest.mark.parametrize("verdict", [FAILED, "<#Think> hm <#Reflection>  "])
def test_a_verdict_without_an_instruction_starts_from_the_original(verdict: str) -> None:
    painter = Painter()

    run(Scripted(reflect=[AGAIN, verdict, SUCCESS]), painter)

    assert painter.calls == [(0, "do it"), (1, "make it red"), (0, "do it")]


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_there_are_no_more_rounds_than_were_planned(rounds: int) -> None:
    _, result = run(Scripted(reflect=FAILED), Painter(), max_rounds=rounds)

    assert len(result.rounds) == rounds


def test_a_plan_without_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="max_rounds must be at least 1, not 0"):
        ReasoningPlan(max_rounds=0)


def test_every_round_is_judged_against_the_original_and_the_goal() -> None:
    model = Scripted(reflect=[AGAIN, FAILED, SUCCESS])

    run(model, Painter(), has_thinking=True)

    for name, images in (
        ("describe", [[0], [0], [0]]),
        ("score", [[1], [2], [3]]),
        ("reflect", [[0, 1], [0, 2], [0, 3]]),
        ("rank_edit", [[0, 1], [0, 2], [0, 3]]),
        ("rank_quality", [[1], [2], [3]]),
    ):
        asked = [(seen, prompt) for asked, seen, prompt in model.asked if asked == name]
        assert [seen for seen, _ in asked] == images
        if name != "rank_quality":
            assert all("a clear instruction" in prompt.text for _, prompt in asked)


def test_the_questions_build_on_each_other() -> None:
    score = {"meets_instruction": "partial", "raw_score": 9, "reason": "ears are missing"}
    model = Scripted(describe=" a red cat ", score=json.dumps(score))

    _, result = run(model, Painter())

    assert model.question("score").text.endswith(
        "[Text Description]\n            a red cat\n            "
    )
    reflect = model.question("reflect").text
    assert "- Score: 5.0\n" in reflect
    assert "- Reason: ears are missing\n" in reflect
    reflection = result.rounds[0].reflection
    assert reflection is not None
    assert reflection.description == "a red cat"
    assert reflection.consistency is not None
    assert reflection.consistency.caps == (5.0, 8.99)


def test_what_a_user_writes_is_not_taken_for_a_placeholder() -> None:
    model = Scripted()

    list(Reasoner(model).think(picture(0), r"write {language} and {x} and \1"))

    assert r"instruction:write {language} and {x} and \1" in model.question("think").text


@pytest.mark.parametrize(
    ("instruction", "word"), [("add a cat", "英文"), ("把猫变成狗", "中文"), ("一 cat", "英文")]
)
def test_the_questions_name_the_language_of_the_instruction(instruction: str, word: str) -> None:
    model = Scripted()

    list(Reasoner(model).reflect(picture(0), picture(1), instruction))

    assert f"a concise, factual {word} description" in model.question("describe").system
    assert f"Brief reasoning in {word}:" in model.question("score").text
    assert language_word(instruction) == word


@pytest.mark.parametrize("name", ["score", "reflect", "rank_edit", "rank_quality"])
def test_a_question_is_put_again_until_its_reply_can_be_read(name: str) -> None:
    good = Scripted().replies[name][0]
    model = Scripted(**{name: ["", "<#Think> cut sho", '{"score": [1, ', good]})

    _, result = run(model, Painter())

    assert model.names().count(name) == 4
    (round_,) = result.rounds
    assert round_.reflection is not None
    assert round_.reflection.verdict == SUCCESS
    assert round_.ranking is not None
    assert round_.ranking.value == 64


@pytest.mark.parametrize("name", ["score", "reflect"])
def test_a_reflection_gives_up_after_twenty_tries(name: str) -> None:
    model, painter = Scripted(**{name: "never mind"}), Painter()

    _, result = run(model, painter, max_rounds=2)

    assert model.names().count(name) == 2 * MAX_TRIES
    assert [r.reflection.verdict for r in result.rounds if r.reflection] == [GAVE_UP] * 2
    assert painter.calls == [(0, "do it")] * 2
    assert MAX_TRIES == 20


def test_a_score_that_cannot_be_read_leaves_no_verdict_to_ask_for() -> None:
    model = Scripted(score="?")

    reflection = returned(Reasoner(model).reflect(picture(0), picture(1), "do it"))

    assert "reflect" not in model.names()
    assert reflection.consistency is None


@pytest.mark.parametrize("reply", ["?", '{"score": [], "reasoning": ""}'])
def test_a_rating_that_cannot_be_read_counts_as_nothing(reply: str) -> None:
    model = Scripted(rank_edit=reply)

    ranking = returned(Reasoner(model).rank(picture(0), picture(1), "do it"))

    assert model.names().count("rank_edit") == MAX_TRIES
    assert (ranking.edit, ranking.value) == (NO_RATING, 0)


def marks(*values: int) -> list[str]:
    return [json.dumps({"score": [value, 10], "reasoning": ""}) for value in values]


@pytest.mark.parametrize(
    ("edit", "quality", "verdicts", "best"),
    [
        (marks(9, 5, 6), marks(9, 9, 9), [FAILED] * 3, 0),
        (marks(5, 6, 9), marks(9, 9, 9), [FAILED] * 3, 2),
        (marks(9, 9, 9), marks(1, 9, 2), [FAILED] * 3, 1),
        (marks(7, 7, 7), marks(7, 7, 7), [FAILED] * 3, 2),
        (marks(5, 5, 5), marks(5, 5, 5), [FAILED, SUCCESS], 1),
        (marks(9, 5, 5), marks(9, 5, 5), [FAILED, SUCCESS], 0),
    ],
)
def test_the_best_picture_is_chosen(
    edit: list[str], quality: list[str], verdicts: list[str], best: int
) -> None:
    model = Scripted(rank_edit=edit, rank_quality=quality, reflect=verdicts)

    _, result = run(model, Painter())

    assert result.best_index == best
    assert number(result.image) == best + 1


def test_closing_the_generator_stops_the_work() -> None:
    model, painter = Scripted(), Painter()
    stages = reason(Reasoner(model), painter, picture(0), "do it", ReasoningPlan())

    heard = [next(stages) for _ in range(4)]
    stages.close()

    assert heard == [Stage("editing", 1), "painting", Stage("reflecting", 1), "describe"]
    assert len(painter.calls) == 1
    assert model.names() == ["describe"]


def test_what_stops_an_edit_stops_the_rounds() -> None:
    model = Scripted()

    def cancelled(_image: Pixels, _prompt: str) -> Generator[str, None, Pixels]:
        yield "painting"
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(model, cancelled)

    assert model.asked == []


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Well. <#Think> a <#Success>\n", "<#Think> a <#Success>"),
        ("<#Think> a <#Success> <#Success>", None),
        ("<#Failed> <#Think> a", None),
        ("<#Think> cut off in the mid", None),
        ("<#Success>", None),
    ],
)
def test_a_verdict_has_a_thought_and_then_one_tag(reply: str, verdict: str | None) -> None:
    assert clean_verdict(reply) == verdict


@pytest.mark.parametrize("text", ["", "x <#Think> a <#Success>", "<#Think><#Think> a <#Success>"])
def test_a_text_that_is_no_verdict_is_no_success(text: str) -> None:
    verdict = read_verdict(text)

    assert not verdict.is_valid
    assert not verdict.is_success
    assert verdict.instruction is None


DEEP = '{"a": ' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize(
    "reply",
    ["", "}{", "[1]", "{broken", '{"a": 1} {"b": 2}', pytest.param(DEEP, id="deep")],
)
def test_a_reply_without_one_json_object_is_not_read(reply: str) -> None:
    assert parse_json_block(reply) is None


@pytest.mark.parametrize(
    "block",
    [
        {"raw_score": None},
        {"raw_score": ""},
        {"raw_score": [8]},
        {"raw_score": "nan"},
        {"raw_score": float("inf")},
        {"raw_score": 10**400},
        {"raw_score": 5, "omissions": "many"},
        {"raw_score": 5, "omissions": [1]},
        {"raw_score": 5, "omissions": float("inf")},
    ],
)
def test_a_score_that_is_no_number_is_not_read(block: dict[str, object]) -> None:
    assert cap_score({"meets_instruction": "yes", **block}) is None


@pytest.mark.parametrize(
    ("block", "caps"),
    [
        ({}, (8.99,)),
        ({"meets_instruction": "yes"}, ()),
        ({"meets_instruction": "no", "omissions": 1}, (2.0, 7.0, 8.99)),
    ],
)
def test_a_missing_raw_score_counts_as_zero(
    block: dict[str, object], caps: tuple[float, ...]
) -> None:
    consistency = cap_score(block)

    assert consistency is not None
    assert (consistency.score, consistency.raw_score, consistency.caps) == (0.0, 0.0, caps)


def test_a_reply_without_a_raw_score_is_not_asked_for_again() -> None:
    model = Scripted(score="{}", reflect=[FAILED, SUCCESS])

    _, result = run(model, Painter())

    assert model.names().count("score") == len(result.rounds) == 2
    assert "- Score: 0.0\n" in model.question("reflect").text


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "[1, 2]",
        '{"score": [1, 2]}',
        '{"score": 8, "reasoning": ""}',
        '{"score": ["8"], "reasoning": ""}',
        '{"score": [true], "reasoning": ""}',
        '{"score": [NaN], "reasoning": ""}',
        '{"score": [1e999], "reasoning": ""}',
        f'{{"score": [{10**400}], "reasoning": ""}}',
        '```json\n{"score": [1], "reasoning": ""}',
        pytest.param(DEEP, id="deep"),
    ],
)
def test_a_rating_that_is_not_strict_json_is_not_read(reply: str) -> None:
    assert parse_rating(reply) is None
