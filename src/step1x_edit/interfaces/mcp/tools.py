"""The MCP face: the tools, their progress and their errors. Parse, call, render; nothing else.

A tool's parameters come from the request model, the shape of its answer from the answer model. The
answer stands in `structuredContent` and, as the same JSON, in the first text block, because some
clients show their model only the one and some only the other.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import math
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import mcp_types
from fastmcp import Context, FastMCP
from fastmcp.exceptions import NotFoundError
from fastmcp.exceptions import ValidationError as InvalidParams
from fastmcp.resources import Resource, ResourceContent, ResourceResult, ResourceTemplate
from fastmcp.server.dependencies import get_context, get_http_request
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.tools import Tool, ToolResult
from mcp.shared.exceptions import MCPError
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
from step1x_edit.engine.engine import HEARTBEAT_S
from step1x_edit.errors import InternalError, InvalidParameterError, Step1XEditError
from step1x_edit.interfaces.discovery import SERVER_NAME
from step1x_edit.interfaces.mcp.app import SHOWN_IN_APP, app_meta, app_page, for_client
from step1x_edit.interfaces.mcp.budget import within_budget
from step1x_edit.interfaces.mcp.handles import Handles, Pursuit
from step1x_edit.interfaces.mcp.hangups import EndWithConnection
from step1x_edit.interfaces.mcp.prompts import complete, prompts
from step1x_edit.pictures.output_formats import OUTPUT_FORMATS
from step1x_edit.schemas.requests import (
    BatchAnswer,
    BatchRequest,
    CancelAnswer,
    EditAnswer,
    EditRequest,
    ErrorAnswer,
    GenerateRequest,
    GpuAnswer,
    HandleRequest,
    RunningAnswer,
    StatusAnswer,
    ViewRequest,
    WaitRequest,
    invalid_parameter,
    read_request,
)
from step1x_edit.service.file_edits import FileEdits
from step1x_edit.service.service import EditService

log = logging.getLogger(__name__)

T = TypeVar("T")

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
_OF_MANY_STEPS: Final = (Phase.THINKING, Phase.DENOISING, Phase.REFLECTING)
MAX_WAIT_HEADER: Final = "X-Max-Wait"
"""Over HTTP, for how many seconds the caller waits for `edit_image`."""

_PREVIEW_FOR_BOTH: Final = Annotations(audience=["user", "assistant"], priority=0.6)
_STATUS_URI: Final = "step1x://gpu/status"

_DESCRIPTIONS: Final = {
    "edit_image": "Edit one picture as the prompt says and save the result as a new file; the "
    "input is not changed, and the result has its size. Give one concrete instruction in plain "
    "words, such as 'add a red hat' or 'change to night scene'. With mask_path only what is white "
    "(or transparent) in the mask may change. The answer holds the path of the result, the seed "
    "that repeats it, and a small preview to judge it by; metadata.warning, where present, says "
    "that the model did not understand. An edit takes seconds to minutes, the first one also loads "
    "the model. If your calls end before that, use submit_edit and then get_job, which answer "
    "within seconds. If the answer has a job_id, the edit continues: ask get_job. With the model "
    "v1.2, thinking has it put a vague prompt into clear words, and reflection has it judge and "
    "repeat its work, at up to reflection_rounds times the cost; what it thought is in "
    "metadata.reasoning, and a small picture of each round follows the others.",
    "batch_edit_images": "Edit several pictures in one call, with one prompt for all or a list "
    "with one prompt for each, and save the results as new files (in output_dir, or beside the "
    "inputs). The model stays loaded between them, and one picture that fails does not stop the "
    "others: status is 'partial' then, and results says for each input, in order, where its result "
    "is or what was wrong. Edits of other callers may come in between.",
    "generate_image": "Make one picture from words alone and save it as a new file. Say what it "
    "shows: 'a red fox in fresh snow, early light'. It needs Step1X-Edit v1.1; the demo and the "
    "other versions only edit, for which edit_image is there. The answer holds the path of the "
    "picture, the seed that repeats it, and a small preview. It takes seconds to minutes.",
    "get_gpu_status": "Say where the model is (Unloaded, CPU or GPU), how much GPU memory it holds "
    "as measured, how it is placed there and what an edit has needed, how long it has been idle "
    "and after which time it leaves the GPU, how often it was moved, and how many edits wait. "
    "Answers at once, also during an edit.",
    "offload_gpu": "Move the model from the GPU to host memory, so that other programs can use the "
    "GPU; the next edit brings it back in a moment. Waits for the picture that is being edited and "
    "goes ahead of waiting edits. Does nothing if the model is not on the GPU.",
    "release_gpu": "Forget the model, in GPU and host memory; the next edit loads it from disk "
    "again. For when no edit is expected for a long time or the memory is needed. Waits for the "
    "picture that is being edited and goes ahead of waiting edits. Does nothing if no model is "
    "loaded.",
    "submit_edit": "Start an edit and answer at once with a job_id; the edit continues by itself, "
    "even if you go away. For hosts that end a call before an edit is done. It takes the "
    "parameters of edit_image and does the same. Ask get_job for the result, with the job_id.",
    "get_job": "Give the result of an edit that continues by itself, with its preview, or the "
    "error that ended it, as edit_image would have answered. While it still runs, wait up to "
    "wait_s seconds and then report how far it is: status is 'running'; call get_job again until "
    "it is not. Finished edits are kept for a while, their files for good.",
    "cancel_job": "Stop an edit that was started with submit_edit, within one step; nothing is "
    "saved. Does nothing if the edit has ended already.",
    "view_image": "Show a picture of this machine, such as the result of an edit, scaled down to "
    "at most max_size pixels on its longer side. The answer is the image and a line of text.",
}
_EDITING: Final = ToolAnnotations(
    read_only_hint=False,
    destructive_hint=True,  # with overwrite it replaces a file
    idempotent_hint=False,
    open_world_hint=False,
)
_LOOKING: Final = ToolAnnotations(
    read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False
)
_MOVING: Final = ToolAnnotations(
    read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False
)


class _NoParameters(BaseModel):
    """The arguments of a tool that takes none."""

    model_config = ConfigDict(extra="forbid")


def build_mcp(
    service: EditService,
    heartbeat_s: float = HEARTBEAT_S,
    step_pause_s: float = STEP_PAUSE_S,
    max_wait_s: float = 0.0,
) -> FastMCP:
    """Make the server, with one tool for each operation of the service.

    Steps of an edit are told at most every `step_pause_s` seconds. A call of `edit_image` or
    `generate_image` that lasts longer than `max_wait_s` leaves its work to go on by itself; 0 is
    never.
    """
    handles: Handles[_Editing] = Handles()

    def answered(edit: _Editing) -> ToolResult:
        return for_client(edit.result(), get_context())

    async def followed(edit: _Editing) -> ToolResult:
        with edit.ending_with_its_call():
            await edit.tell(step_pause_s, _patience_of_this_caller() or max_wait_s or None)
        return answered(edit) if edit.is_done else _running(handles.add(edit), edit)

    async def edit_image(arguments: dict[str, Any]) -> ToolResult:
        return await followed(_Editing(service, service.read_edit(arguments)))

    async def generate_image(arguments: dict[str, Any]) -> ToolResult:
        return await followed(_Editing(service, service.read_generate(arguments)))

    async def submit_edit(arguments: dict[str, Any]) -> ToolResult:
        edit = _Editing(service, service.read_edit(arguments))
        with edit.ending_with_its_call():
            await edit.begun()
        if edit.is_done:
            edit.result()  # raises what is wrong with the picture or the line
        return _running(handles.add(edit), edit)

    async def get_job(arguments: dict[str, Any]) -> ToolResult:
        request = read_request(WaitRequest, arguments)
        edit = handles.get(request.job_id)
        await edit.tell(step_pause_s, request.wait_s)
        return answered(edit) if edit.is_done else _running(request.job_id, edit)

    async def cancel_job(arguments: dict[str, Any]) -> ToolResult:
        job_id = read_request(HandleRequest, arguments).job_id
        edit = handles.get(job_id)
        message = "Nothing to cancel: the edit has ended" if edit.is_done else "Edit cancelled"
        edit.cancel()
        return result_of(CancelAnswer(message=message, job_id=job_id).to_dict())

    async def batch_edit_images(arguments: dict[str, Any]) -> ToolResult:
        request = service.read_batch(arguments)
        report = _ProgressReport(get_context(), step_pause_s, len(request.image_paths), request)
        answer = await FileEdits(service, service.files).edit_several(
            request.each(), request.output_dir, lambda index: partial(report.step, index)
        )
        return result_of(within_budget(answer.to_dict()), is_error=answer.status == "error")

    async def get_gpu_status(arguments: dict[str, Any]) -> ToolResult:
        read_request(_NoParameters, arguments)
        return result_of(service.status().to_dict())

    async def offload_gpu(arguments: dict[str, Any]) -> ToolResult:
        read_request(_NoParameters, arguments)
        return result_of((await _patiently(service.offload(), heartbeat_s)).to_dict())

    async def release_gpu(arguments: dict[str, Any]) -> ToolResult:
        read_request(_NoParameters, arguments)
        return result_of((await _patiently(service.release(), heartbeat_s)).to_dict())

    async def view_image(arguments: dict[str, Any]) -> ToolResult:
        request = read_request(ViewRequest, arguments)
        file = await asyncio.to_thread(service.files.read, request.path)
        picture = _jpeg(await service.preview(file.data, request.max_size))
        shown = f"{Path(request.path).name}, at most {request.max_size} pixels on the longer side"
        return ToolResult([picture, TextContent(type="text", text=shown)])

    def gpu_status() -> str:
        return json.dumps(service.status().to_dict())

    async def picture(path: str) -> ResourceResult:
        absolute = path if os.name == "nt" else f"/{path}"
        try:
            file = await asyncio.to_thread(service.files.read, absolute)
            await service.check_picture(file.data)
        except Step1XEditError as error:
            raise InvalidParams(str(error), log_level=logging.DEBUG) from None
        known = OUTPUT_FORMATS.get(Path(path).suffix.lower())
        kind = "application/octet-stream" if known is None else known.media_type
        return ResourceResult([ResourceContent(file.data, mime_type=kind)])

    @contextlib.asynccontextmanager
    async def lifespan(_: FastMCP) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await handles.close()

    defaults = service.defaults
    server = FastMCP(
        SERVER_NAME,
        instructions=INSTRUCTIONS,
        version=__version__,
        lifespan=lifespan,
        middleware=[OneErrorShape(_told), EndWithConnection()],
        mask_error_details=True,
        tools=[
            _Operation.of(
                edit_image,
                "Edit image",
                _EDITING,
                EditRequest,
                [EditAnswer, RunningAnswer],
                defaults,
                SHOWN_IN_APP,
            ),
            _Operation.of(
                batch_edit_images, "Edit images", _EDITING, BatchRequest, [BatchAnswer], defaults
            ),
            _Operation.of(get_gpu_status, "GPU status", _LOOKING, _NoParameters, [StatusAnswer]),
            _Operation.of(offload_gpu, "Offload GPU", _MOVING, _NoParameters, [GpuAnswer]),
            _Operation.of(release_gpu, "Release GPU", _MOVING, _NoParameters, [GpuAnswer]),
            _Operation.of(
                submit_edit, "Start an edit", _EDITING, EditRequest, [RunningAnswer], defaults
            ),
            _Operation.of(
                get_job,
                "Result of an edit",
                _LOOKING,
                WaitRequest,
                [EditAnswer, RunningAnswer],
                meta=SHOWN_IN_APP,
            ),
            _Operation.of(cancel_job, "Cancel an edit", _MOVING, HandleRequest, [CancelAnswer]),
            _Operation.of(view_image, "View image", _LOOKING, ViewRequest),
            _Operation.of(
                generate_image,
                "Generate image",
                _EDITING,
                GenerateRequest,
                [EditAnswer, RunningAnswer],
                defaults,
            ),
        ],
    )
    server.add_resource(
        Resource.from_function(
            gpu_status,
            uri=_STATUS_URI,
            title="GPU status",
            description="Where the model is now and what it occupies, as get_gpu_status says it",
            mime_type="application/json",
        )
    )
    server.add_template(
        ResourceTemplate.from_function(
            picture,
            uri_template="file:///{path*}",
            name="picture",
            title="Picture",
            description="A picture in the allowed folders in full size, by the link of an answer",
        )
    )
    server.add_resource(app_page())
    for prompt in prompts():
        server.add_prompt(prompt)
    server.completion(complete)
    return server


# --- tools ---------------------------------------------------------------------------------------


class _Operation(Tool):
    """A tool that hands its arguments, unread, to an operation: the request model reads them."""

    _operation: Callable[[dict[str, Any]], Awaitable[ToolResult]] = PrivateAttr()

    @classmethod
    def of(
        cls,
        operation: Callable[[dict[str, Any]], Awaitable[ToolResult]],
        title: str,
        annotations: ToolAnnotations,
        request: type[BaseModel],
        answers: Sequence[type[BaseModel]] = (),
        defaults: Mapping[str, object] | None = None,
        meta: dict[str, Any] | None = None,
    ) -> _Operation:
        tool = cls(
            name=operation.__name__,
            title=title,
            description=_DESCRIPTIONS[operation.__name__],
            parameters=_with_defaults(_schema_of(request), defaults or {}),
            output_schema=_answer_schema(answers) if answers else None,
            annotations=annotations.model_copy(update={"title": title}),
            meta=meta,
        )
        tool._operation = operation
        return tool

    async def run(self, arguments: dict[str, Any]) -> ToolResult:
        try:
            return await self._operation(arguments)
        except Step1XEditError as error:  # expected, so no traceback in the log
            return _error_result(error)


class OneErrorShape(Middleware):
    """Gives every failure of a tool the shape of the contract, whatever raised it.

    `explain` finds the sentence for an exception that is none of ours.
    """

    def __init__(self, explain: Callable[[Exception], Step1XEditError]) -> None:
        self._explain = explain

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        try:
            return await call_next(context)
        except NotFoundError as error:  # a mistake in the protocol, not of a tool
            raise MCPError(mcp_types.INVALID_PARAMS, str(error)) from None
        except Exception as error:  # noqa: BLE001 - the outermost handler of this face
            return _error_result(self._explain(error))


def _told(error: Exception) -> Step1XEditError:
    """What to tell the caller about an exception; fastmcp wraps the original as its cause.

    Raises what concerns the protocol and not the tool.
    """
    for candidate in (error, error.__cause__):
        match candidate:
            case MCPError():
                raise candidate
            case Step1XEditError():
                return candidate
            case ValidationError():
                return invalid_parameter(candidate)
    log.error("a tool failed", exc_info=error)
    return InternalError("the call failed unexpectedly; the server's log says more")


# --- schemas -------------------------------------------------------------------------------------


def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model, for the caller to change; several tools share their models."""
    return cast("dict[str, Any]", json.loads(_schema_text(model)))


@cache
def _schema_text(model: type[BaseModel]) -> str:
    return json.dumps(model.model_json_schema())


def _with_defaults(schema: dict[str, Any], defaults: Mapping[str, object]) -> dict[str, Any]:
    for name, default in defaults.items():
        if name in schema["properties"]:
            schema["properties"][name]["default"] = default
    return schema


def _answer_schema(answers: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """What a tool answers, so that each of its answers, failure and later fields conform."""
    told: list[type[BaseModel]] = [*answers, ErrorAnswer]
    schemas = [_schema_of(answer) for answer in told]
    schema, stati = schemas[0], list[str]()
    properties: dict[str, Any] = {"status": {}}
    for one in schemas:
        status = one["properties"]["status"]
        stati += status.get("enum", [status.get("const")])
        properties |= one["properties"] | properties  # the first says what it is
    properties["status"] = {"type": "string", "enum": list(dict.fromkeys(stati))}
    schema["properties"] = properties
    for definition in (schema, *schema.get("$defs", {}).values()):
        definition.pop("additionalProperties", None)
        if "status" in definition["properties"]:
            definition["required"] = ["status"]
    return schema


# --- answers -------------------------------------------------------------------------------------


def result_of(
    answer: dict[str, Any],
    *more: ContentBlock,
    is_error: bool = False,
    meta: dict[str, Any] | None = None,
) -> ToolResult:
    """The answer in both of its places, and what is shown beside it."""
    text = TextContent(type="text", text=json.dumps(answer, ensure_ascii=False))
    return ToolResult([text, *more], structured_content=answer, is_error=is_error, meta=meta)


def _error_result(error: Step1XEditError) -> ToolResult:
    return result_of(ErrorAnswer.of(error).to_dict(), is_error=True)


def _running(job_id: str, edit: _Editing) -> ToolResult:
    """Where an edit that goes on by itself has got to."""
    event = edit.progress or Progress(Phase.QUEUED, step=1)
    denoises, waits = event.phase is Phase.DENOISING, event.phase is Phase.QUEUED
    answer = RunningAnswer(
        job_id=job_id,
        message=f"The edit goes on ({event.text}); get_job has its result",
        phase=event.phase.value,
        step=event.step if denoises else None,
        total=event.total if denoises else None,
        position=event.step if waits else None,
    )
    return result_of(answer.to_dict())


def _shown(
    request: EditRequest,
    answer: EditAnswer,
    before: bytes,
    after: bytes,
    rounds: Sequence[bytes],
) -> ToolResult:
    """The answer, a small picture for whoever can see, a link to the file, and the rounds."""
    link = _link(answer, "The edited picture in full size")
    more: list[ContentBlock] = [_jpeg(after), link, *map(_jpeg, rounds)]
    return result_of(answer.to_dict(), *more, meta=app_meta(request, before))


def _link(answer: EditAnswer, description: str) -> ResourceLink:
    path = Path(answer.output_path)
    return ResourceLink(
        type="resource_link",
        uri=path.as_uri(),
        name=path.name,
        mime_type=OUTPUT_FORMATS[path.suffix.lower()].media_type,
        description=description,
    )


def _jpeg(data: bytes) -> ImageContent:
    return ImageContent(
        type="image",
        data=base64.b64encode(data).decode("ascii"),
        mime_type="image/jpeg",
        annotations=_PREVIEW_FOR_BOTH,
    )


# --- edits ---------------------------------------------------------------------------------------


class _Editing(Pursuit[ToolResult]):
    """An edit in a task of its own. What it leaves is what is shown of it, not its pictures.

    A picture that is made from words alone counts as one.
    """

    def __init__(self, service: EditService, request: EditRequest | GenerateRequest) -> None:
        async def work(report: Callable[[Progress], Awaitable[None]]) -> ToolResult:
            from step1x_edit.pictures.images import PREVIEW_SIDE, preview

            edits = FileEdits(service, service.files)
            if isinstance(request, GenerateRequest):
                made = await edits.generate(request, report)
                shown = _jpeg(await asyncio.to_thread(preview, made.edited.picture))
                link = _link(made.answer, "The picture in full size")
                return result_of(made.answer.to_dict(), shown, link)
            saved = await edits.edit(request, report)
            before, after = await asyncio.gather(
                service.preview(saved.source, PREVIEW_SIDE),
                asyncio.to_thread(preview, saved.edited.picture),
            )
            return _shown(request, saved.answer, before, after, saved.edited.rounds)

        super().__init__(work)
        self._request = request

    @contextlib.contextmanager
    def ending_with_its_call(self) -> Iterator[None]:
        """Stop the edit when its call is cancelled, or cannot be answered any more."""
        try:
            yield
        except BaseException:
            self.cancel()
            raise

    async def tell(self, step_pause_s: float, wait_s: float | None) -> None:
        """Tell the client of the running call how it goes, until the end or for `wait_s` s."""
        report = _ProgressReport(get_context(), step_pause_s, 1, self._request)
        async with contextlib.aclosing(self.events(wait_s)) as events:
            async for event in events:
                await report.step(0, event)


def _patience_of_this_caller() -> int:
    """For how many seconds it waits, as it says itself; 0 if it does not."""
    try:
        told = get_http_request().headers.get(MAX_WAIT_HEADER, "0")
    except RuntimeError:  # there is no HTTP
        return 0
    if not re.fullmatch("[0-9]{1,6}", told):
        raise InvalidParameterError(f"{MAX_WAIT_HEADER} must be whole seconds, got {told[:60]!r}")
    return int(told)


# --- progress ------------------------------------------------------------------------------------


class _ProgressReport:
    """Tells the client, from the tool's own task, how far its edits have come.

    One scale for all images. The protocol wants numbers that only rise, so a repeated event rises
    by a hair.

    Steps that follow each other faster than anybody reads are not all told: a message costs the
    processor milliseconds, which a model on the CPU lacks then.
    """

    _HAIR: Final = 0.0001

    def __init__(
        self,
        context: Context,
        pause_s: float,
        images: int,
        request: EditRequest | BatchRequest | GenerateRequest,
    ) -> None:
        self._context = context
        self._pause_s = pause_s  # between two steps that are told
        self._ways = [_Way(request) for _ in range(images)]
        self._phase: Phase | None = None
        self._last = 0.0
        self._told_step_at = -math.inf

    async def step(self, index: int, event: Progress) -> None:
        """Tell an event of the image with this number, from 0."""
        images, units = len(self._ways), self._ways[0].units
        position = index * units + self._ways[index].position(event)
        if event.phase in _OF_MANY_STEPS and event.step < event.total:
            now = time.monotonic()
            if event.phase is self._phase and now < self._told_step_at + self._pause_s:
                return
            self._told_step_at = now
        self._phase = event.phase
        self._last = max(position, self._last + self._HAIR)
        text = event.text
        if images > 1:
            text = f"image {index + 1}/{images}, {text}"
        await self._context.report_progress(self._last, float(images * units), text)


class _Way:
    """How far an edit has come on its way through the phases, in units.

    There is one unit per step, and one more each for every other phase. A reflection has room for
    as many rounds as there may be; where fewer do, the last of its way is one leap.
    """

    def __init__(self, request: EditRequest | BatchRequest | GenerateRequest) -> None:
        thinks = reflects = False
        rounds = 1
        if not isinstance(request, GenerateRequest):
            thinks, reflects = request.thinking, request.reflection
            rounds = request.reflection_rounds if reflects else 1
        self._before = int(thinks)
        self._steps = request.num_steps
        self._units_of_round = self._steps + 2 + int(reflects)
        self._last_round = rounds - 1
        self._round = 0
        self._has_reflected = False
        self.units = self._before + rounds * self._units_of_round + 1

    def position(self, event: Progress) -> float:
        """Where an event stands; to be told of each, because a round follows the reflection."""
        if self._has_reflected and event.phase in (Phase.ENCODING, Phase.DENOISING):
            self._round = min(self._round + 1, self._last_round)
            self._has_reflected = False
        start = self._before + self._round * self._units_of_round
        match event.phase:
            case Phase.ENCODING:
                return float(start)
            case Phase.DENOISING:
                return start + event.step + 1.0
            case Phase.DECODING:
                return start + self._steps + 1.0
            case Phase.REFLECTING:
                self._has_reflected = True
                return start + self._steps + 2.0
            case Phase.SAVING:
                return self.units - 1.0
        return 0.0


async def _patiently(work: Awaitable[T], heartbeat_s: float) -> T:
    """Wait for something that may have to wait itself, with signs of life for the client."""
    context, beats = get_context(), 0
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=heartbeat_s))[0]:
            beats += 1
            await context.report_progress(beats, None, "waiting for the running edit")
        return task.result()
    finally:
        task.cancel()  # does nothing to one that has ended
