"""The MCP server: the tools, the prompts, and two resources."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from fastmcp import FastMCP
from fastmcp.exceptions import ValidationError
from fastmcp.resources import Resource, ResourceContent, ResourceResult, ResourceTemplate

from step1x_edit import __version__
from step1x_edit.engine.engine import HEARTBEAT_S
from step1x_edit.errors import Step1XEditError
from step1x_edit.interfaces.discovery import SERVER_NAME
from step1x_edit.interfaces.mcp.app import app_page
from step1x_edit.interfaces.mcp.errors import OneErrorShape, explain
from step1x_edit.interfaces.mcp.hangups import EndWithConnection
from step1x_edit.interfaces.mcp.prompts import complete, prompts
from step1x_edit.interfaces.mcp.tools import Tools
from step1x_edit.pictures.output_formats import OUTPUT_FORMATS
from step1x_edit.service.service import EditService

INSTRUCTIONS: Final = """\
Edits pictures on this machine by plain-language instructions, with the open model Step1X-Edit.

- Give paths of this machine; a sandbox of yours does not exist here. Inputs are never changed: \
the result is a new file beside the input, or output_path.
- One short, concrete instruction per edit: "add a red hat", "change to night scene". The same \
seed repeats a picture, another one is another attempt.
- Several pictures: batch_edit_images, not many single calls. view_image shows a picture.
- With the model v1.1, generate_image makes a picture from words alone.
- The first edit also loads the model. Calls report progress and can be cancelled. If your \
calls end too soon: submit_edit, then get_job.
- When done, offload_gpu frees the GPU and keeps the model in memory; release_gpu frees all.
- Without MODEL_PATH a small demo model runs: it edits the whole picture (night, winter, sunset, \
fog, black and white, tints, ...), no objects; metadata.warning says what it did not understand.
"""

STEP_PAUSE_S: Final = 0.25


def build_mcp(
    service: EditService,
    heartbeat_s: float = HEARTBEAT_S,
    step_pause_s: float = STEP_PAUSE_S,
    max_wait_s: float = 0.0,
) -> FastMCP:
    """Make the server, with one tool for each operation of the service.

    Steps of an edit are reported at most every `step_pause_s` seconds. A call of `edit_image` or
    `generate_image` that lasts longer than `max_wait_s` returns, and its work continues; 0 means
    no limit.
    """
    tools = Tools(service, heartbeat_s, step_pause_s, max_wait_s)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastMCP) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await tools.close()

    server = FastMCP(
        SERVER_NAME,
        instructions=INSTRUCTIONS,
        version=__version__,
        lifespan=lifespan,
        middleware=[OneErrorShape(explain), EndWithConnection()],
        mask_error_details=True,
        tools=tools.all(),
    )
    server.add_resource(_gpu_status(service))
    server.add_template(_picture(service))
    server.add_resource(app_page())
    for prompt in prompts():
        server.add_prompt(prompt)
    server.completion(complete)
    return server


def _gpu_status(service: EditService) -> Resource:
    def gpu_status() -> str:
        return json.dumps(service.status().to_dict())

    return Resource.from_function(
        gpu_status,
        uri="step1x://gpu/status",
        title="GPU status",
        description="The location of the model and its memory use, as get_gpu_status reports them",
        mime_type="application/json",
    )


def _picture(service: EditService) -> ResourceTemplate:
    async def picture(path: str) -> ResourceResult:
        absolute = path if os.name == "nt" else f"/{path}"
        try:
            file = await asyncio.to_thread(service.files.read, absolute)
            await service.check_picture(file.data)
        except Step1XEditError as error:
            raise ValidationError(str(error), log_level=logging.DEBUG) from None
        known = OUTPUT_FORMATS.get(Path(path).suffix.lower())
        kind = "application/octet-stream" if known is None else known.media_type
        return ResourceResult([ResourceContent(file.data, mime_type=kind)])

    return ResourceTemplate.from_function(
        picture,
        uri_template="file:///{path*}",
        name="picture",
        title="Picture",
        description="A picture in the allowed folders in full size, by the link of an answer",
    )
