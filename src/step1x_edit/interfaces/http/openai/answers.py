"""Answers in the form of OpenAI's Images: JSON, and the events of a stream."""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from step1x_edit.errors import InternalError, Step1XEditError
from step1x_edit.interfaces.http import problems, sse
from step1x_edit.interfaces.http.idempotency import Run
from step1x_edit.interfaces.http.openai.edits import (
    Event,
    FinishedImage,
    ImageRequest,
    ImagesAnswer,
    PartialImage,
)
from step1x_edit.interfaces.http.openai.requests import CONTENT_PATH, MODE_OF, STEPFUN_MODEL
from step1x_edit.schemas.openai import ImageGenerationRequest
from step1x_edit.waiting import heartbeats

log = logging.getLogger(__name__)

_NO_USAGE: Final = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""Tokens are not counted, but clients expect these fields."""


def render(answer: ImagesAnswer, asked: ImageRequest, base_url: str) -> dict[str, Any]:
    """The whole answer; links start with `base_url`."""
    return {
        "created": answer.created,
        "data": [_render_one(made, asked, base_url) for made in answer.pictures],
        **_form_of(answer.pictures[0], asked),
        "usage": _NO_USAGE,
        **_about(answer),
    }


def _render_one(made: FinishedImage, asked: ImageRequest, base_url: str) -> dict[str, Any]:
    one: dict[str, Any] = {}
    if asked.response_format == "url":
        one["url"] = base_url + CONTENT_PATH.format(image_id=made.image_id)
    else:
        one["b64_json"] = _base64(made.data)
    if asked.model == STEPFUN_MODEL:
        one["finish_reason"] = "success"
    return one | _how(made)


def _how(made: FinishedImage) -> dict[str, Any]:
    """The seed that repeats a picture, and its other metadata."""
    metadata = made.metadata.to_dict()
    names = (
        "seed",
        "evaluations_done",
        "evaluations_skipped",
        "changed_share",
        "region",
        "warning",
        "reasoning",
    )
    return {name: metadata[name] for name in names if name in metadata}


def _form_of(made: FinishedImage, asked: ImageRequest) -> dict[str, Any]:
    form = {
        "output_format": asked.output_format,
        "size": f"{made.width}x{made.height}",
        "background": "transparent" if made.is_see_through else "opaque",
    }
    return form | ({"quality": asked.quality} if asked.quality in MODE_OF else {})


def _about(answer: ImagesAnswer) -> dict[str, Any]:
    first = answer.pictures[0].metadata
    level = {} if first.size_level is None else {"size_level": first.size_level}
    loras = {} if first.loras is None else {"loras": first.loras}
    return {
        "id": answer.answer_id,
        "model": first.model,
        "num_inference_steps": first.num_steps,
        "guidance_scale": first.guidance_scale,
        "mode": first.mode,
        **level,
        "inference_time_s": answer.seconds,
        **loras,
    }


def _render_partial(event: PartialImage, asked: ImageRequest) -> str:
    return _sse(
        {
            "type": f"{_kind_of(asked)}.partial_image",
            "b64_json": _base64(event.data),
            "partial_image_index": event.index,
            "created_at": event.created,
            "size": f"{event.width}x{event.height}",
            "quality": asked.quality,
            "background": asked.background,
            "output_format": asked.output_format,
        }
    )


def _render_completed(answer: ImagesAnswer, asked: ImageRequest) -> str:
    made = answer.pictures[0]
    return _sse(
        {
            "type": f"{_kind_of(asked)}.completed",
            "b64_json": _base64(made.data),
            "created_at": answer.created,
            "quality": asked.quality,
            **_form_of(made, asked),
            "usage": _NO_USAGE,
            **_how(made),
            **_about(answer),
        }
    )


def _kind_of(asked: ImageRequest) -> str:
    return "image_generation" if isinstance(asked, ImageGenerationRequest) else "image_edit"


def _sse(event: Mapping[str, Any], name: str | None = None) -> str:
    return sse.named(name or event["type"], event)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


async def stream(
    run: Run[Event, ImagesAnswer], asked: ImageRequest, keep_alive_s: float
) -> AsyncIterator[str]:
    """The events of a run as text, with a comment after each `keep_alive_s` of silence."""
    with run.heard():
        try:
            async for event in heartbeats(run.events(), keep_alive_s):
                if event is None:
                    yield sse.STILL_THERE
                elif isinstance(event, PartialImage):
                    yield _render_partial(event, asked)
            yield _render_completed(await run.result(), asked)
        except Step1XEditError as error:
            yield _sse(problems.openai_body(problems.of_error(error)), "error")
        except Exception:  # the head of the answer is sent, so no other handler can answer
            log.exception("a stream failed")
            unknown = InternalError("the request failed unexpectedly; the server's log says more")
            yield _sse(problems.openai_body(problems.of_error(unknown)), "error")
