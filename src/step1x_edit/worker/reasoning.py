"""An edit with reasoning in the worker: translates between `model.reasoning` and the channel.

It knows neither memory nor the location of the model: the worker passes in how to make one edit
and how to make the model talk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image

from step1x_edit.channel import Painted, Phase, Progress, reasoning_of
from step1x_edit.model.config import ReasoningConfig
from step1x_edit.model.language_model import Said
from step1x_edit.model.reasoning import (
    Prompt,
    Reasoned,
    Reasoner,
    ReasoningPlan,
    Round,
    Stage,
    prompts,
    reason,
)
from step1x_edit.model.request import NetworkRequest, Pixels
from step1x_edit.model.steps import Evaluations

Paint: TypeAlias = Callable[[NetworkRequest], Generator[Progress | Painted, None, None]]
"""Makes one edit; yields progress and finally the picture in its working size."""

Say: TypeAlias = Callable[[Sequence[Pixels], Prompt], Generator[Progress | Said, None, str]]
"""Answers a question about pictures."""

TOKENS_PER_EVENT: Final = 8
"""Tokens of a reply per progress event."""


def reasoned_edit(
    request: NetworkRequest, config: ReasoningConfig, paint: Paint, say: Say
) -> Generator[Progress | Painted, None, None]:
    """Yield progress and finally the best picture, with the reasoning about it.

    `request` is the edit as requested. Later rounds use the noises that follow its own.
    """
    picture = request.image
    assert picture is not None  # generation from text has no reasoning
    painter, talker = _Painter(request, picture, paint), _Talker(say)
    plan = ReasoningPlan(
        has_thinking=request.thinking,
        has_reflection=request.reflection,
        max_rounds=request.reflection_rounds,
        has_ranking=config.has_ranking,
    )
    reasoner = Reasoner(talker, prompts(config.prompts))
    thoughts = reason(reasoner, painter.paint, picture, request.prompt, plan)
    with contextlib.closing(thoughts) as events:
        for event in events:
            match event:
                case Progress():
                    yield event
                case Reasoned():
                    yield painter.best(event, has_rounds=request.reflection)
                case Stage("editing"):
                    pass
                case Stage(name):
                    talker.phase = Phase.THINKING if name == "thinking" else Phase.REFLECTING
                    yield Progress(talker.phase)


class _Painter:
    """Makes the edits of all rounds and keeps their pictures in the working size."""

    def __init__(self, request: NetworkRequest, picture: Pixels, paint: Paint) -> None:
        self._request = request
        self._picture = picture
        self._paint = paint
        self._rounds: list[Painted] = []

    def paint(self, canvas: Pixels, prompt: str) -> Generator[Progress, None, Pixels]:
        """Edit a picture and return the result in the size of the input."""
        request = replace(self._request, image=canvas, prompt=prompt, draw=len(self._rounds))
        with contextlib.closing(self._paint(request)) as events:
            for event in events:
                if isinstance(event, Painted):
                    self._rounds.append(event)
                else:
                    yield event
        height, width = self._picture.shape[:2]
        painted = Image.fromarray(self._rounds[-1].image)
        return np.asarray(painted.resize((width, height), Image.Resampling.BICUBIC))

    def best(self, reasoned: Reasoned, *, has_rounds: bool) -> Painted:
        """The best picture and, if requested, those of all rounds."""
        pictures = [painted.image for painted in self._rounds]
        return replace(
            self._rounds[reasoned.best_index],
            reasoning=_as_data(reasoned),
            rounds=np.stack(pictures) if has_rounds else None,
            evaluations=self._evaluations(),
        )

    def _evaluations(self) -> Evaluations:
        """Those of all rounds."""
        each = [painted.evaluations for painted in self._rounds if painted.evaluations]
        return Evaluations(sum(e.done for e in each), sum(e.skipped for e in each))


class _Talker:
    """The language model, with progress events in the phase in which it talks."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.phase = Phase.THINKING

    def reply(self, images: Sequence[Pixels], prompt: Prompt) -> Generator[Progress, None, str]:
        with contextlib.closing(self._say(images, prompt)) as said:
            while True:
                try:
                    event = next(said)
                except StopIteration as end:
                    return str(end.value)
                if isinstance(event, Progress):
                    yield event
                elif event.tokens % TOKENS_PER_EVENT == 0:
                    yield Progress(self.phase, event.tokens, event.limit)


def _as_data(reasoned: Reasoned) -> dict[str, Any]:
    """The reasoning as plain data."""
    rounds = [
        {
            "prompt": each.prompt,
            "from_round": _number_of(each.source, reasoned.rounds),
            **_judged(each),
        }
        for each in reasoned.rounds
    ]
    return reasoning_of(reasoned.rewritten_prompt, rounds, reasoned.best_index + 1)


def _number_of(source: Pixels, rounds: Sequence[Round]) -> int:
    """The number of the round that made a picture, from 1; 0 for the input."""
    return next((i for i, each in enumerate(rounds, 1) if each.image is source), 0)


def _judged(each: Round) -> Mapping[str, Any]:
    """The judgement of a round; empty without reflection."""
    if each.reflection is None:
        return {}
    consistency, ranking = each.reflection.consistency, each.ranking
    return {
        "verdict": each.reflection.verdict,
        "description": each.reflection.description,
        "score": None if consistency is None else consistency.score,
        "reason": None if consistency is None else consistency.reason,
        "edit_score": None if ranking is None else list(ranking.edit.score),
        "quality_score": None if ranking is None else list(ranking.quality.score),
        "value": None if ranking is None else ranking.value,
    }
