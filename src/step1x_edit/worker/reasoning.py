"""An edit with thought, in the worker: the rounds of `reasoning` in the words of the channel.

It knows neither memory nor where the model is: how one edit is made and how the model is made to
talk comes from the worker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image

from step1x_edit.channel import Outcome, Phase, Progress, reasoning_of
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

Edit: TypeAlias = Callable[[NetworkRequest], Generator[Progress | Outcome, None, None]]
"""Yields progress and, last, the picture in its working size."""

Say: TypeAlias = Callable[[Sequence[Pixels], Prompt], Generator[Progress | Said, None, str]]
"""Replies to a question about pictures."""

TOKENS_TOLD: Final = 8
"""After so many tokens of a reply there is a sign of life."""


def reasoned_edit(
    request: NetworkRequest, config: ReasoningConfig, edit: Edit, say: Say
) -> Generator[Progress | Outcome, None, None]:
    """Yield progress and, last, the best picture with all that was thought about it.

    `request` is the edit as it was asked for. Its later rounds take the noises that follow.
    """
    picture = request.image
    assert picture is not None  # there is none only where words alone make one, without a thought
    painter, talker = _Painter(request, picture, edit), _Talker(say)
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
                    yield painter.outcome(event, has_rounds=request.reflection)
                case Stage("editing"):
                    pass
                case Stage(name):
                    talker.phase = Phase.THINKING if name == "thinking" else Phase.REFLECTING
                    yield Progress(talker.phase)


class _Painter:
    """Makes the edits of all rounds and keeps their pictures in the size they were made in."""

    def __init__(self, request: NetworkRequest, picture: Pixels, edit: Edit) -> None:
        self._request = request
        self._picture = picture
        self._edit = edit
        self._outcomes: list[Outcome] = []

    def paint(self, canvas: Pixels, prompt: str) -> Generator[Progress, None, Pixels]:
        """Edit a picture and return the result in the size of the input."""
        request = replace(self._request, image=canvas, prompt=prompt, draw=len(self._outcomes))
        with contextlib.closing(self._edit(request)) as events:
            for event in events:
                if isinstance(event, Outcome):
                    self._outcomes.append(event)
                else:
                    yield event
        height, width = self._picture.shape[:2]
        painted = Image.fromarray(self._outcomes[-1].image)
        return np.asarray(painted.resize((width, height), Image.Resampling.BICUBIC))

    def outcome(self, reasoned: Reasoned, *, has_rounds: bool) -> Outcome:
        """The best picture and, if they are wanted, those of all rounds."""
        pictures = [outcome.image for outcome in self._outcomes]
        return replace(
            self._outcomes[reasoned.best_index],
            reasoning=_told(reasoned),
            rounds=np.stack(pictures) if has_rounds else None,
        )


class _Talker:
    """The language model that tells in which phase it talks."""

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
                elif event.tokens % TOKENS_TOLD == 0:
                    yield Progress(self.phase, event.tokens, event.limit)


def _told(reasoned: Reasoned) -> dict[str, Any]:
    """All that was thought, as plain data."""
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
    """The round, from 1, that painted a picture; 0 if none did."""
    return next((i for i, each in enumerate(rounds, 1) if each.image is source), 0)


def _judged(each: Round) -> Mapping[str, Any]:
    """What was thought of a round, if it was asked."""
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
