"""What an edit would take, told beforehand: the fields of OpenAI's Images without the picture.

Nothing is run for it, so that it does not count as work. What is wrong with the fields is told as
the edit itself would tell it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from step1x_edit.interfaces.http import problems
from step1x_edit.interfaces.http.openai.images import (
    TAGS,
    check_model,
    described_fields,
    plain,
    request_of,
)
from step1x_edit.interfaces.http.openai.requests import EDITS_PATH, read_estimate, understood
from step1x_edit.schemas.requests import EstimateAnswer, ImageEditRequest, PictureSize, read_request
from step1x_edit.service.service import EditService

ESTIMATE_PATH: Final = f"{EDITS_PATH}/estimate"

_DESCRIPTION: Final = """\
Takes the fields of an edit without the picture, as JSON or as a form with the same fields, and \
answers without running anything: the working size, the steps, the memory and, once such an edit \
has been made, the time. `width` and `height` are those of the picture; without them a square is \
assumed. What is not known is null. If the model is not loaded, a separate process inspects the \
checkpoint; this can take a few seconds."""

_EXAMPLE: Final = EstimateAnswer(
    width=1248,
    height=832,
    num_steps=28,
    guidance_scale=6.0,
    size_level=1024,
    n=1,
    predicted_seconds=15.3,
    predicted_peak_gb=41.9,
    must_load=False,
    queue_length=0,
    model="Step1X-Edit v1.1",
    device="cuda",
    reason="everything fits",
    note=None,
)


def estimate_routes(service: EditService) -> APIRouter:
    """The route that tells what an edit would take."""
    router = APIRouter(tags=list(TAGS))

    @router.post(
        ESTIMATE_PATH,
        operation_id="estimate_edit",
        summary="Say what an edit would take",
        description=_DESCRIPTION,
        response_model=EstimateAnswer,
        responses={
            200: {
                "description": "What it would take",
                "content": {"application/json": {"example": _EXAMPLE.model_dump(mode="json")}},
            },
            **problems.described(
                "invalid_parameter",
                "image_too_large",
                "image_too_small",
                "image_aspect",
                "model_not_found",
                "model_unavailable",
                "internal",
                path=ESTIMATE_PATH,
            ),
            **problems.described_status(415, path=ESTIMATE_PATH),
        },
        openapi_extra={"requestBody": {"required": True, "content": _body(service.defaults)}},
    )
    async def estimate(request: Request) -> Response:
        fields = await read_estimate(request)
        sides = {name: fields.pop(name) for name in PictureSize.model_fields if name in fields}
        asked = understood(ImageEditRequest, fields)
        size = read_request(PictureSize, sides)
        check_model(service, asked.model)
        answer = await service.estimate(
            request_of(service, asked),
            None if size.width is None or size.height is None else (size.width, size.height),
            n=asked.n,
            previews=asked.partial_images,
        )
        return JSONResponse(answer.model_dump(mode="json"))  # here null says something

    return router


def _body(defaults: Mapping[str, object]) -> dict[str, Any]:
    """The JSON, as OpenAPI describes it; a form with the same fields has nothing to add."""
    sides = PictureSize.model_json_schema()["properties"]
    schema = {
        **ImageEditRequest.model_json_schema(),
        "title": "EstimateRequest",
        "description": EstimateAnswer.__doc__,
        "properties": {
            **{name: plain(field) for name, field in sides.items()},
            **described_fields(defaults),
        },
        "dependentRequired": {"width": ["height"], "height": ["width"]},
        "example": {"prompt": "change to night scene", "width": 1536, "height": 1024},
    }
    return {"application/json": {"schema": schema}}
