"""Reasoning of v1.2: think about the instruction, edit, judge the result, try again, choose.

The rules around the language model: what it is asked, how its replies are parsed, when another
round follows. It knows pictures as arrays and a language model as something that replies, but not
how either is computed or shown. Everything that takes long is a generator, which passes on what an
edit or a reply yields, so that progress and cancellation need no callback.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import (
    Any,
    Final,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    TypeVar,
)

from step1x_edit.model.config import ReasoningConfig
from step1x_edit.model.request import Pixels

T = TypeVar("T")
Event = TypeVar("Event")
Event_co = TypeVar("Event_co", covariant=True)

MAX_TRIES: Final = 20
"""How often a question is asked until its reply can be parsed."""

THINK, SUCCESS, FAILED = "<#Think>", "<#Success>", "<#Failed>"
REFLECTION, OTHERS = "<#Reflection>", "<#Others>"
VERDICT_TAGS: Final = (REFLECTION, FAILED, SUCCESS, OTHERS)

GAVE_UP: Final = f"{THINK} The process encountered repeated errors and could not complete.{FAILED}"
"""The verdict if one of the replies that it needs could never be parsed."""

MEETS_CAPS: Final = {"no": 2.0, "partial": 5.0}
"""Highest score of a picture that does not fully meet the instruction."""


class Prompt(NamedTuple):
    """One question to the language model, beside the pictures."""

    system: str
    text: str
    is_text_first: bool = False
    """Whether the text comes before the pictures; otherwise after them."""


class LanguageModel(Protocol[Event_co]):
    """A model that answers questions about pictures."""

    def reply(self, images: Sequence[Pixels], prompt: Prompt) -> Generator[Event_co, None, str]:
        """Return the answer. It may be cut off, and differ if the question is asked again."""
        ...


@dataclass(frozen=True)
class Consistency:
    """How well a picture agrees with the description of what it should show."""

    score: float
    """0 to 10: the raw score, no higher than any of `caps` allows."""
    raw_score: float
    caps: tuple[float, ...]
    meets_instruction: str
    major_conflicts: int
    minor_conflicts: int
    hallucinations: int
    omissions: int
    reason: str


@dataclass(frozen=True)
class Reflection:
    """The model's judgement of an edited picture; `verdict` is its text, tags included."""

    verdict: str
    description: str = ""
    consistency: Consistency | None = None
    """None if no reply could be parsed."""


class Verdict(NamedTuple):
    """A parsed verdict: a success, or what to do with the edited picture next."""

    is_valid: bool
    is_success: bool = False
    instruction: str | None = None
    """What to change in the edited picture; None to start again from the original."""


@dataclass(frozen=True)
class Rating:
    """Marks from 0 to 10, each for one aspect."""

    score: tuple[float, ...]
    reasoning: str = ""


NO_RATING: Final = Rating((0.0, 0.0))
"""The rating if no reply could be parsed."""


@dataclass(frozen=True)
class Ranking:
    """The ratings by which the best of several edits is chosen."""

    edit: Rating
    """How well the instruction was followed, and how little else was changed."""
    quality: Rating
    """How natural the picture looks, and how free of artefacts."""

    @property
    def value(self) -> float:
        """The worst mark for the edit times the worst for the quality."""
        return min(self.edit.score) * min(self.quality.score)


@dataclass(frozen=True)
class Round:
    """One edit: its picture, its prompt, its result and the model's judgement."""

    source: Pixels
    prompt: str
    image: Pixels
    reflection: Reflection | None = None
    ranking: Ranking | None = None


@dataclass(frozen=True)
class Reasoned:
    """All rounds, in order, and the best one."""

    rewritten_prompt: str | None
    """None without thinking."""
    rounds: tuple[Round, ...]
    best_index: int

    @property
    def image(self) -> Pixels:
        """The best picture."""
        return self.rounds[self.best_index].image


@dataclass(frozen=True)
class ReasoningPlan:
    """Which stages of reasoning to run."""

    has_thinking: bool = False
    """Whether the model rewrites the instruction first."""
    has_reflection: bool = True
    """Whether it judges its edits and tries again; otherwise there is one edit."""
    max_rounds: int = 3
    """The most edits."""
    has_ranking: bool = True
    """Whether each picture is rated; otherwise the last one is the best."""

    def __post_init__(self) -> None:
        if self.max_rounds < 1:
            raise ValueError(f"max_rounds must be at least 1, not {self.max_rounds}")


@dataclass(frozen=True)
class Stage:
    """The stage that begins, and its round; thinking comes before the first."""

    name: Literal["thinking", "editing", "reflecting", "ranking"]
    round: int


class Reasoner(Generic[Event]):
    """Asks a language model the questions of v1.2 and parses its replies."""

    def __init__(
        self,
        language_model: LanguageModel[Event],
        questions: Mapping[str, Prompt] | None = None,
    ) -> None:
        """`questions` are those that the model was trained with; None: those of v1.2."""
        self.language_model = language_model
        self.questions = prompts() if questions is None else questions

    def think(self, source: Pixels, instruction: str) -> Generator[Event, None, str]:
        """Return the instruction in clear words, or unchanged if the reply is empty."""
        question = self._fill("think", instruction=instruction, language=language_word(instruction))
        thought = yield from self.language_model.reply([source], question)
        return thought.strip() or instruction

    def reflect(
        self, source: Pixels, edited: Pixels, instruction: str
    ) -> Generator[Event, None, Reflection]:
        """Describe what the edit should show, score what it shows, and reach a verdict."""
        language = language_word(instruction)
        question = self._fill("describe", instruction=instruction, language=language)
        description = yield from self.language_model.reply([source], question)
        description = description.strip()
        question = self._fill(
            "score", instruction=instruction, language=language, description=description
        )
        consistency = yield from self._ask([edited], question, parse_consistency)
        if consistency is None:
            return Reflection(GAVE_UP, description)
        question = self._fill(
            "reflect",
            instruction=instruction,
            prior_score=str(consistency.score),
            prior_reason=consistency.reason,
        )
        verdict = yield from self._ask([source, edited], question, clean_verdict)
        return Reflection(verdict or GAVE_UP, description, consistency)

    def rank(
        self, source: Pixels, edited: Pixels, instruction: str
    ) -> Generator[Event, None, Ranking]:
        """Rate an edit and its picture."""
        question = self._fill("rank_edit", instruction=instruction)
        edit = yield from self._ask([source, edited], question, _marks)
        quality = yield from self._ask([edited], self._fill("rank_quality"), _marks)
        return Ranking(edit or NO_RATING, quality or NO_RATING)

    def _ask(
        self, images: Sequence[Pixels], question: Prompt, read: Callable[[str], T | None]
    ) -> Generator[Event, None, T | None]:
        """Ask until the reply can be parsed; None if it never can."""
        for _ in range(MAX_TRIES):
            reply = yield from self.language_model.reply(images, question)
            answer = read(reply)
            if answer is not None:
                return answer
        return None

    def _fill(self, name: str, **values: str) -> Prompt:
        """Fill in the placeholders of a question; placeholders in the values stay as they are."""

        def fill(template: str) -> str:
            return re.sub(
                r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template, flags=re.ASCII
            )

        question = self.questions[name]
        return question._replace(system=fill(question.system), text=fill(question.text))


def reason(
    reasoner: Reasoner[Event],
    edit: Callable[[Pixels, str], Generator[Event, None, Pixels]],
    source: Pixels,
    prompt: str,
    plan: ReasoningPlan,
) -> Generator[Stage | Event | Reasoned, None, None]:
    """Yield each stage before it begins and, last, the result; closing the generator stops.

    `edit` takes a picture and a prompt and returns a picture of the same size. The generator passes
    on what it and the language model yield, and ends with what they raise. Each round is judged
    against `source` and the (rewritten) prompt, even if it changed an earlier result.
    """
    rewritten = None
    if plan.has_thinking:
        yield Stage("thinking", 0)
        rewritten = yield from reasoner.think(source, prompt)
    goal = prompt if rewritten is None else rewritten
    rounds: list[Round] = []
    canvas, instruction = source, goal
    while len(rounds) < plan.max_rounds:
        number = len(rounds) + 1
        yield Stage("editing", number)
        edited = yield from edit(canvas, instruction)
        if not plan.has_reflection:
            rounds.append(Round(canvas, instruction, edited))
            break
        yield Stage("reflecting", number)
        reflection = yield from reasoner.reflect(source, edited, goal)
        ranking = None
        if plan.has_ranking:
            yield Stage("ranking", number)
            ranking = yield from reasoner.rank(source, edited, goal)
        rounds.append(Round(canvas, instruction, edited, reflection, ranking))
        verdict = read_verdict(reflection.verdict)
        if verdict.is_success:
            break
        if verdict.instruction and verdict.instruction.strip():
            canvas, instruction = edited, verdict.instruction
        else:
            canvas, instruction = source, goal
    yield Reasoned(rewritten, tuple(rounds), best_round(rounds))


def best_round(rounds: Sequence[Round]) -> int:
    """The index of the highest value; among equals a success wins, then the later round."""

    def worth(index: int) -> tuple[float, bool, int]:
        ranking, reflection = rounds[index].ranking, rounds[index].reflection
        value = ranking.value if ranking else 0.0
        return value, reflection is not None and SUCCESS in reflection.verdict, index

    return max(range(len(rounds)), key=worth)


def language_word(instruction: str) -> str:
    """“Chinese” or “English” in Chinese, with which even the English prompts are filled in."""
    num_chinese = sum("\u4e00" <= character <= "\u9fff" for character in instruction)
    return "中文" if num_chinese >= 2 else "英文"


def clean_verdict(reply: str) -> str | None:
    """The reply from its first thought on; None unless exactly one verdict follows the thought."""
    thought = reply.find(THINK)
    tags = [tag for tag in VERDICT_TAGS if tag in reply]
    if thought < 0 or len(tags) != 1 or reply.count(tags[0]) != 1 or reply.find(tags[0]) < thought:
        return None
    return reply[thought:].strip()


def read_verdict(text: str) -> Verdict:
    """Parse a verdict; a text that is not one is a failure."""
    tags = [tag for tag in VERDICT_TAGS for _ in range(text.count(tag))]
    if not text.startswith(THINK) or text.count(THINK) != 1 or len(tags) != 1:
        return Verdict(is_valid=False)
    if tags[0] == REFLECTION:
        return Verdict(is_valid=True, instruction=text.partition(REFLECTION)[2])
    return Verdict(is_valid=True, is_success=tags[0] in (SUCCESS, OTHERS))


def parse_consistency(reply: str) -> Consistency | None:
    """The score in a reply; None if it holds no JSON object that can be scored."""
    block = parse_json_block(reply)
    return None if block is None else cap_score(block)


def parse_json_block(reply: str) -> dict[str, Any] | None:
    """The JSON object from the first `{` to the last `}`; None if that is not one."""
    start, end = reply.find("{"), reply.rfind("}")
    try:
        data = json.loads(reply[start : end + 1]) if start >= 0 else None
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def cap_score(block: Mapping[str, Any]) -> Consistency | None:
    """The score that the counted mistakes allow; None if a value is present and not a number.

    A missing raw score counts as 0, as in the reference.
    """
    try:
        major, minor, hallucinations, omissions = (
            int(block.get(name) or 0)
            for name in ("major_conflicts", "minor_conflicts", "hallucinations", "omissions")
        )
        raw_score = float(block.get("raw_score", 0.0))
    except (TypeError, ValueError, OverflowError):
        return None
    if not math.isfinite(raw_score):
        return None
    if 0 <= raw_score <= 1.0000001:  # the score is from 0 to 1
        raw_score *= 10
    raw_score = min(max(raw_score, 0.0), 10.0)
    meets = str(block.get("meets_instruction") or "").strip().lower()

    caps = [MEETS_CAPS[meets]] if meets in MEETS_CAPS else []
    if major > 0:
        caps.append(8.0 if major == 1 else 5.0)
    if hallucinations > 0 or omissions > 0:
        caps.append(7.0)
    if meets != "yes" or major > 0 or hallucinations > 0 or omissions > 0:
        caps.append(8.99)
    return Consistency(
        score=round(min([raw_score, *caps]), 4),
        raw_score=raw_score,
        caps=tuple(caps),
        meets_instruction=meets,
        major_conflicts=major,
        minor_conflicts=minor,
        hallucinations=hallucinations,
        omissions=omissions,
        reason=str(block.get("reason") or ""),
    )


def parse_rating(reply: str) -> Rating | None:
    """Marks and reasoning of a reply that is strict JSON; None if it is not.

    A code fence is cut off by length, so that an unclosed fence costs three characters of the JSON,
    as in the reference.
    """
    text = reply.strip()
    if text.startswith("```"):
        text = text[7 if text.startswith("```json") else 3 : -3]
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or "reasoning" not in data:
        return None
    score = data.get("score")
    if not isinstance(score, list) or not all(map(_is_number, score)):
        return None
    return Rating(tuple(map(float, score)), str(data["reasoning"]))


def _marks(reply: str) -> Rating | None:
    """A rating with at least one mark; the reference fails without one."""
    rating = parse_rating(reply)
    return rating if rating and rating.score else None


def _is_number(value: object) -> bool:
    """Whether a value from JSON is a finite number of moderate size."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= 1e6  # false for NaN


@cache
def prompts(name: str = ReasoningConfig.prompts) -> Mapping[str, Prompt]:
    """The questions in a file: those that the models were trained with, byte for byte."""
    file = resources.files("step1x_edit.model") / name
    return {name: Prompt(**fields) for name, fields in json.loads(file.read_text("utf-8")).items()}
