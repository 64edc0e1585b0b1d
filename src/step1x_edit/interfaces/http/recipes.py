"""The REST route that reads how a picture was made from its file; it runs nothing."""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from step1x_edit.errors import InvalidParameterError
from step1x_edit.interfaces.http import openapi
from step1x_edit.interfaces.http.forms import FILE, read_form
from step1x_edit.service.recipes import recipe_of, record_in

READ_PATH: Final = "/v1/recipes/read"


def recipe_routes() -> APIRouter:
    """The route that reads a recipe."""
    router = APIRouter(tags=["Editing"])

    @router.post(READ_PATH, **openapi.READ_RECIPE)
    async def read(request: Request) -> Response:
        form = await read_form(request)
        if form.fields or form.mask is not None:
            raise InvalidParameterError(f"only {FILE!r} is read here; leave out the other fields")
        record = await asyncio.to_thread(record_in, form.picture)
        return JSONResponse(recipe_of(record).to_dict())

    return router
