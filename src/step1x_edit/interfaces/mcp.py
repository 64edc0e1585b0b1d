"""The MCP face: the tools, their progress and their errors. Parse, call, render; nothing else.

A tool's parameters come from the request model. Its answer stands in `structuredContent` and, as
the same JSON, in the first text block, because some clients show their model only the one and
some only the other.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from fastmcp import Context, FastMCP
from fastmcp.exceptions import NotFoundError
from fastmcp.server.dependencies import get_context
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.tools import Tool, ToolResult
from mcp_types import (
    Annotations,
    CallToolRequestParams,
    ContentBlock,
    ImageContent,
    ResourceLink,
    TextContent,
    ToolAnnotations,
)
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from step1x_edit import __version__
from step1x_edit.channel import Phase, Progress
from step1x_edit.errors import InternalError, SettingsError, Step1XEditError
from step1x_edit.images import OUTPUT_FORMATS, preview
from step1x_edit.schemas import EditRequest, ErrorAnswer, invalid_parameter, read_request
from step1x_edit.service import EditService, FinishedEdit, build_service
from step1x_edit.settings import load_settings

log = logging.getLogger(__name__)

INSTRUCTIONS: Final = """\
Edits pictures from plain-language instructions with the open model Step1X-Edit, on this machine.

- edit_image takes the path of a picture on this machine (relative paths start at the server's \
folder; only allowed folders can be read) and writes the result to a new file beside it, or to \
output_path. The input is never changed. Paths inside an assistant's own sandbox do not exist here.
- One instruction per call, short and concrete: "add a red hat", "make it a night scene". Repeat \
with the reported seed to get the same picture again; another seed gives another attempt.
- The first edit also loads the model. Progress is reported; a call can be cancelled.
- Without MODEL_PATH a small demo model runs. It knows edits of the whole picture (black and \
white, sepia, invert, brighter, darker, night, sunset, winter, fog, colour tints, ...) in English, \
Chinese and Japanese, and no objects; metadata.warning says when it did not understand.
- get_gpu_status says at once where the model is and how many edits wait.
"""

_PREVIEW_FOR_BOTH: Final = Annotations(audience=["user", "assistant"], priority=0.6)

# Any object with a status conforms: success and error have different fields, and more may be added.
_ANSWER_SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {
        "status": {"type": "string", "enum": ["success", "partial", "error"]},
        "error": {"type": "string", "description": "What went wrong and what to change"},
    },
    "required": ["status"],
}

_SHUTDOWN_S: Final = 3.0  # for the running step to end; the process must be gone within 5 s


class _NoParameters(BaseModel):
    """The arguments of a tool that takes none."""

    model_config = ConfigDict(extra="forbid")


def build_mcp(service: EditService) -> FastMCP:
    """Make the server, with one tool for each operation of the service."""

    async def edit_image(arguments: dict[str, Any]) -> ToolResult:
        report = _ProgressReport(get_context())
        edit = await service.edit(service.read_edit(arguments), report)
        return await asyncio.to_thread(_shown, edit)

    async def get_gpu_status(arguments: dict[str, Any]) -> ToolResult:
        read_request(_NoParameters, arguments)
        return _result(service.status().to_dict())

    return FastMCP(
        "step1x-edit",
        instructions=INSTRUCTIONS,
        version=__version__,
        middleware=[_OneErrorShape()],
        tools=[
            _Operation.of(
                edit_image,
                schema=_with_defaults(EditRequest.model_json_schema(), service.defaults),
                description="Edit one image as the prompt says and save the result as a new file.",
                annotations=ToolAnnotations(
                    title="Edit image",
                    read_only_hint=False,
                    destructive_hint=True,  # with overwrite it replaces a file
                    idempotent_hint=False,
                    open_world_hint=False,
                ),
            ),
            _Operation.of(
                get_gpu_status,
                schema=_NoParameters.model_json_schema(),
                description="Say where the model is (Unloaded, CPU or GPU), how much GPU memory "
                "it holds, and how long it has been idle. Never waits.",
                annotations=ToolAnnotations(
                    title="GPU status",
                    read_only_hint=True,
                    destructive_hint=False,
                    idempotent_hint=True,
                    open_world_hint=False,
                ),
            ),
        ],
    )


# --- tools ---------------------------------------------------------------------------------------


class _Operation(Tool):
    """A tool that hands its arguments, unread, to an operation: the request model reads them."""

    _operation: Callable[[dict[str, Any]], Awaitable[ToolResult]] = PrivateAttr()

    @classmethod
    def of(
        cls,
        operation: Callable[[dict[str, Any]], Awaitable[ToolResult]],
        *,
        schema: dict[str, Any],
        description: str,
        annotations: ToolAnnotations,
    ) -> _Operation:
        tool = cls(
            name=operation.__name__,
            title=annotations.title,
            description=description,
            parameters=schema,
            output_schema=dict(_ANSWER_SCHEMA),
            annotations=annotations,
        )
        tool._operation = operation
        return tool

    async def run(self, arguments: dict[str, Any]) -> ToolResult:
        try:
            return await self._operation(arguments)
        except Step1XEditError as error:  # expected, so no traceback in the log
            return _error_result(error)


class _OneErrorShape(Middleware):
    """Gives every failure of a tool the shape of the contract, whatever raised it."""

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        try:
            return await call_next(context)
        except NotFoundError:  # an unknown tool is a mistake in the protocol, not of a tool
            raise
        except Exception as error:  # noqa: BLE001 - the outermost handler of this face
            return _error_result(_told(error))


def _told(error: Exception) -> Step1XEditError:
    """What to tell the caller about an exception; fastmcp wraps the original as its cause."""
    for candidate in (error, error.__cause__):
        match candidate:
            case Step1XEditError():
                return candidate
            case ValidationError():
                return invalid_parameter(candidate)
    log.error("a tool failed", exc_info=error)
    return InternalError("the call failed unexpectedly; the server's log says more")


def _with_defaults(schema: dict[str, Any], defaults: Mapping[str, object]) -> dict[str, Any]:
    for name, default in defaults.items():
        schema["properties"][name]["default"] = default
    return schema


# --- answers -------------------------------------------------------------------------------------


def _result(answer: dict[str, Any], *more: ContentBlock, is_error: bool = False) -> ToolResult:
    text = TextContent(type="text", text=json.dumps(answer, ensure_ascii=False))
    return ToolResult(content=[text, *more], structured_content=answer, is_error=is_error)


def _error_result(error: Step1XEditError) -> ToolResult:
    return _result(ErrorAnswer.of(error).to_dict(), is_error=True)


def _shown(edit: FinishedEdit) -> ToolResult:
    """The answer, a small picture for whoever can see, and a link to the file."""
    path = Path(edit.answer.output_path)
    image = ImageContent(
        type="image",
        data=base64.b64encode(preview(edit.picture)).decode("ascii"),
        mime_type="image/jpeg",
        annotations=_PREVIEW_FOR_BOTH,
    )
    link = ResourceLink(
        type="resource_link",
        uri=path.as_uri(),
        name=path.name,
        mime_type=OUTPUT_FORMATS[path.suffix.lower()].media_type,
        description="The edited picture in full size",
    )
    return _result(edit.answer.to_dict(), image, link)


class _ProgressReport:
    """Tells the client, from the tool's own task, how far its edit has come.

    The protocol wants numbers that only rise, so a repeated event rises by a hair.
    """

    _HAIR: Final = 0.001

    def __init__(self, context: Context) -> None:
        self._context = context
        self._last = 0.0
        self._total: float | None = None

    async def __call__(self, event: Progress) -> None:
        self._last = max(self._position(event), self._last + self._HAIR)
        await self._context.report_progress(self._last, self._total, event.text)

    def _position(self, event: Progress) -> float:
        """The event on a scale of one per step, with one more each for encode, decode and save."""
        match event.phase:
            case Phase.DENOISING:
                self._total = event.total + 3.0
                return event.step + 1.0
            case Phase.DECODING if self._total is not None:
                return self._total - 2.0
            case Phase.SAVING if self._total is not None:
                return self._total - 1.0
        return 0.0


# --- running -------------------------------------------------------------------------------------


def start_service() -> EditService:
    """Build the service from the settings; ends the process with one message if they are wrong."""
    try:
        settings = load_settings()
    except SettingsError as error:
        sys.exit(str(error))
    logging.basicConfig(
        level=settings.log_level,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    return build_service(settings)


def run_stdio(server: FastMCP, service: EditService) -> None:
    """Serve until the client closes our stdin or a signal comes, then end the process."""
    asyncio.run(_serve_stdio(server, service))


class _Wire(io.TextIOWrapper):
    """A stdout whose bytes go to the client, for the transport, and whose text goes to stderr."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def keep_stdout_for_protocol(wire: int) -> None:
    """Let nobody but the transport write to `wire`, a duplicate of the real stdout.

    Descriptor 1 has been pointed at stderr before, and stays there for native code and children.
    """
    sys.stdout.flush()
    sys.stdout = _Wire(os.fdopen(wire, "wb"), encoding="utf-8")


async def _serve_stdio(server: FastMCP, service: EditService) -> None:
    loop = asyncio.get_running_loop()
    # The reader of stdin waits in a thread that nothing can wake, so a signal has to end it all.
    with contextlib.suppress(NotImplementedError):  # Windows; its clients close stdin instead
        loop.add_signal_handler(signal.SIGINT, _leave, service, 130)
        loop.add_signal_handler(signal.SIGTERM, _leave, service, 0)
    exit_code = 1
    try:
        await server.run_async("stdio", show_banner=False)
        exit_code = 0
    except Exception:
        log.exception("the connection failed")
    finally:
        _leave(service, exit_code)


def _leave(service: EditService, exit_code: int) -> None:
    """Stop the running edit and go, without waiting for threads that may be deep in native code."""
    service.close(_SHUTDOWN_S)
    logging.shutdown()
    os._exit(exit_code)
