"""The estimate of an edit before it runs: the fields of OpenAI's Images without the picture.

It runs nothing, so it does not count as work. Wrong fields are reported as in an edit.
"""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from step1x_edit.interfaces.http import openapi
from step1x_edit.interfaces.http.openai.requests import (
    EDITS_PATH,
    check_model,
    read_estimate,
    request_of,
    understood,
)
from step1x_edit.schemas.openai import ImageEditRequest
from step1x_edit.schemas.requests import PictureSize, read_request
from step1x_edit.service.service import EditService

ESTIMATE_PATH: Final = f"{EDITS_PATH}/estimate"


def estimate_routes(service: EditService) -> APIRouter:
    """The route that estimates an edit."""
    router = APIRouter(tags=["OpenAI Images"])

    @router.post(ESTIMATE_PATH, **openapi.ESTIMATE_EDIT)
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
        return JSONResponse(answer.model_dump(mode="json"))  # here null has a meaning

    return router
