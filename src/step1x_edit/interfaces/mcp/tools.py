"""The tools of MCP. Parse, call, render; nothing else.

The docstring of a tool is its description for assistants. Its parameters come from the request
model, the schema of its answer from the answer models.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, cast

from fastmcp.server.dependencies import get_context, get_http_request
from fastmcp.tools import Tool, ToolResult
from mcp_types import TextContent, ToolAnnotations
from pydantic import BaseModel, ConfigDict, PrivateAttr

from step1x_edit.channel import Progress
from step1x_edit.errors import InvalidParameterError, Step1XEditError
from step1x_edit.interfaces.mcp.app import SHOWN_IN_APP, for_client
from step1x_edit.interfaces.mcp.budget import within_budget
from step1x_edit.interfaces.mcp.handles import Handles
from step1x_edit.interfaces.mcp.progress import ProgressReport, reporting_heartbeats
from step1x_edit.interfaces.mcp.results import (
    edited_result,
    error_result,
    jpeg_content,
    link_to,
    result_of,
    running_result,
)
from step1x_edit.interfaces.pursuits import Notify, Pursuit
from step1x_edit.schemas.answers import (
    BatchAnswer,
    CancelAnswer,
    EditAnswer,
    ErrorAnswer,
    GpuAnswer,
    RecipeAnswer,
    RunningAnswer,
    StatusAnswer,
)
from step1x_edit.schemas.requests import (
    BatchRequest,
    EditRequest,
    GenerateRequest,
    HandleRequest,
    RecipeRequest,
    ViewRequest,
    WaitRequest,
    read_request,
)
from step1x_edit.service.file_edits import FileEdits
from step1x_edit.service.recipes import read_made, recipe_of
from step1x_edit.service.service import EditService
from step1x_edit.waiting import until

MAX_WAIT_HEADER: Final = "X-Max-Wait"
"""Over HTTP, the number of seconds that the client waits for `edit_image`."""

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


class Tools:
    """One tool for each operation of the service."""

    def __init__(
        self, service: EditService, heartbeat_s: float, step_pause_s: float, max_wait_s: float
    ) -> None:
        self._service = service
        self._heartbeat_s = heartbeat_s
        self._step_pause_s = step_pause_s
        self._max_wait_s = max_wait_s
        self._handles: Handles[_Editing] = Handles()

    def all(self) -> list[Tool]:
        """The tools, in a fixed order."""
        of = partial(_Operation.of, defaults=self._service.defaults)
        edited = (EditAnswer, RunningAnswer)
        shown = SHOWN_IN_APP
        return [
            of(self.edit_image, "Edit image", _EDITING, EditRequest, edited, meta=shown),
            of(self.batch_edit_images, "Edit images", _EDITING, BatchRequest, [BatchAnswer]),
            of(self.get_gpu_status, "GPU status", _LOOKING, _NoParameters, [StatusAnswer]),
            of(self.offload_gpu, "Offload GPU", _MOVING, _NoParameters, [GpuAnswer]),
            of(self.release_gpu, "Release GPU", _MOVING, _NoParameters, [GpuAnswer]),
            of(self.submit_edit, "Start an edit", _EDITING, EditRequest, [RunningAnswer]),
            of(self.get_job, "Result of an edit", _LOOKING, WaitRequest, edited, meta=shown),
            of(self.cancel_job, "Cancel an edit", _MOVING, HandleRequest, [CancelAnswer]),
            of(self.view_image, "View image", _LOOKING, ViewRequest, []),
            of(self.generate_image, "Generate image", _EDITING, GenerateRequest, edited),
            of(self.read_recipe, "Recipe of an image", _LOOKING, RecipeRequest, [RecipeAnswer]),
        ]

    async def close(self) -> None:
        """Stop the edits that run."""
        await self._handles.close()

    async def edit_image(self, arguments: dict[str, Any]) -> ToolResult:
        """Edit one picture as the prompt says and save the result as a new file.

        The input is not changed, and the result has its size, unless outpaint or upscale enlarges
        it. Give one concrete instruction in plain words, such as 'add a red hat' or 'change to
        night scene'. With mask_path only the white (or transparent) pixels of the mask may change;
        with region 'full' too they get more detail. The answer holds the path of the result,
        the seed that repeats it, and a small preview to judge it by; metadata.warning, if present,
        says that the model did not understand. An edit takes seconds to minutes, and the
        first one also loads the model. If your calls end before that, use submit_edit and then
        get_job, which answer within seconds. If the answer has a job_id, the edit continues: ask
        get_job. With the model v1.2, thinking rewrites a vague prompt in clear words, and
        reflection judges and repeats the work, at up to reflection_rounds times the cost; the
        model's thoughts are in metadata.reasoning, and a small picture of each round follows the
        others.
        """
        return await self._followed(_Editing(self._service, self._service.read_edit(arguments)))

    async def batch_edit_images(self, arguments: dict[str, Any]) -> ToolResult:
        """Edit several pictures in one call and save the results as new files.

        There is one prompt for all pictures, or a list with one prompt for each. The results are
        saved in output_dir, or beside the inputs. The model stays loaded between the pictures, and
        one that fails does not stop the others: then status is 'partial', and results says for
        each input, in order, where its result is or what was wrong. Edits of other callers may run
        in between.
        """
        request = self._service.read_batch(arguments)
        images = len(request.image_paths)
        report = ProgressReport(get_context(), self._step_pause_s, images, request)
        answer = await FileEdits(self._service, self._service.files).edit_several(
            request.each(), request.output_dir, lambda index: partial(report.step, index)
        )
        return result_of(within_budget(answer.to_dict()), is_error=answer.status == "error")

    async def generate_image(self, arguments: dict[str, Any]) -> ToolResult:
        """Make one picture from a prompt alone and save it as a new file.

        Say what the picture shows: 'a red fox in fresh snow, early light'. It needs Step1X-Edit
        v1.1; the demo and the other versions only edit, for which there is edit_image. The answer
        holds the path of the picture, the seed that repeats it, and a small preview. It takes
        seconds to minutes.
        """
        request = self._service.read_generate(arguments)
        return await self._followed(_Editing(self._service, request))

    async def get_gpu_status(self, arguments: dict[str, Any]) -> ToolResult:
        """Report where the model is (Unloaded, CPU or GPU) and how much GPU memory it holds.

        The memory is measured. The answer also says how the model is placed and what an edit has
        needed, how long it has been idle and after which time it leaves the GPU, how often it was
        moved, and how many edits are queued. Answers at once, also during an edit.
        """
        read_request(_NoParameters, arguments)
        return result_of(self._service.status().to_dict())

    async def offload_gpu(self, arguments: dict[str, Any]) -> ToolResult:
        """Move the model from the GPU to host memory, so that other programs can use the GPU.

        The next edit moves it back in a moment. Waits for the running edit and runs ahead of
        queued edits. Does nothing if the model is not on the GPU.
        """
        read_request(_NoParameters, arguments)
        answer = await reporting_heartbeats(self._service.offload(), self._heartbeat_s)
        return result_of(answer.to_dict())

    async def release_gpu(self, arguments: dict[str, Any]) -> ToolResult:
        """Unload the model from GPU and host memory; the next edit loads it from disk again.

        Use it if no edit is expected for a long time or the memory is needed. Waits for the running
        edit and runs ahead of queued edits. Does nothing if no model is loaded.
        """
        read_request(_NoParameters, arguments)
        answer = await reporting_heartbeats(self._service.release(), self._heartbeat_s)
        return result_of(answer.to_dict())

    async def submit_edit(self, arguments: dict[str, Any]) -> ToolResult:
        """Start an edit and answer at once with a job_id.

        The edit continues by itself, even if you disconnect. It is for hosts that end a call before
        an edit is done. It takes the parameters of edit_image and does the same. Ask get_job for
        the result, with the job_id.
        """
        edit = _Editing(self._service, self._service.read_edit(arguments))
        with edit.ending_with_its_call():
            await edit.begun()
        if edit.is_done:
            await edit.result()  # raises an error in the picture or the queue
        return running_result(self._handles.add(edit), edit.last_event)

    async def get_job(self, arguments: dict[str, Any]) -> ToolResult:
        """Get the result of an edit that continues by itself, as edit_image would answer it.

        That is the answer with its preview, or the error that ended the edit. While the edit runs,
        wait up to wait_s seconds and then report its progress: then status is 'running', and you
        call get_job again until it is not. Finished edits are kept for a while, their files for
        good.
        """
        request = read_request(WaitRequest, arguments)
        edit = self._handles.get(request.job_id)
        await edit.follow(self._step_pause_s, request.wait_s)
        if edit.is_done:
            return await _answered(edit)
        return running_result(request.job_id, edit.last_event)

    async def cancel_job(self, arguments: dict[str, Any]) -> ToolResult:
        """Stop an edit that was started with submit_edit, within one step; nothing is saved.

        Does nothing if the edit has ended already.
        """
        job_id = read_request(HandleRequest, arguments).job_id
        edit = self._handles.get(job_id)
        message = "Nothing to cancel: the edit has ended" if edit.is_done else "Edit cancelled"
        edit.cancel()
        return result_of(CancelAnswer(message=message, job_id=job_id).to_dict())

    async def view_image(self, arguments: dict[str, Any]) -> ToolResult:
        """Show a picture of this machine, such as the result of an edit.

        It is scaled down to at most max_size pixels on its longer side. The answer is the image and
        a line of text.
        """
        request = read_request(ViewRequest, arguments)
        file = await asyncio.to_thread(self._service.files.read, request.path)
        picture = jpeg_content(await self._service.preview(file.data, request.max_size))
        shown = f"{Path(request.path).name}, at most {request.max_size} pixels on the longer side"
        return ToolResult([picture, TextContent(type="text", text=shown)])

    async def read_recipe(self, arguments: dict[str, Any]) -> ToolResult:
        """Read how a picture was made from its file: model, prompt, seed and all parameters.

        Only pictures that edit_image, batch_edit_images or generate_image has made, in any
        interface, have a recipe. To make the picture again, call the same tool with prompt,
        parameters, and the input whose SHA-256 is input_sha256; another input gets the same edit.
        """
        path = read_request(RecipeRequest, arguments).image_path
        made = await asyncio.to_thread(read_made, self._service.files, path)
        return result_of(recipe_of(made.record).to_dict())

    async def _followed(self, edit: _Editing) -> ToolResult:
        """The result of an edit, or its progress if it lasts longer than its client waits."""
        with edit.ending_with_its_call():
            await edit.follow(self._step_pause_s, _patience_of_client() or self._max_wait_s or None)
        if edit.is_done:
            return await _answered(edit)
        return running_result(self._handles.add(edit), edit.last_event)


async def _answered(edit: _Editing) -> ToolResult:
    return for_client(await edit.result(), get_context())


class _NoParameters(BaseModel):
    """The arguments of a tool that takes none."""

    model_config = ConfigDict(extra="forbid")


# --- edits ---------------------------------------------------------------------------------------


class _Editing(Pursuit[Progress, ToolResult]):
    """An edit, or a picture from a prompt alone, in a separate task.

    It keeps the result that is shown, not the pictures in full size.
    """

    def __init__(self, service: EditService, request: EditRequest | GenerateRequest) -> None:
        async def work(notify: Notify[Progress]) -> ToolResult:
            from step1x_edit.pictures.images import preview

            edits = FileEdits(service, service.files)
            if isinstance(request, GenerateRequest):
                made = await edits.generate(request, notify)
                shown = jpeg_content(await asyncio.to_thread(preview, made.edited.picture))
                link = link_to(made.answer, "The picture in full size")
                return result_of(made.answer.to_dict(), shown, link)
            saved = await edits.edit(request, notify)
            assert saved.edited.source is not None
            before, after = await asyncio.gather(
                asyncio.to_thread(preview, saved.edited.source),
                asyncio.to_thread(preview, saved.edited.picture),
            )
            return edited_result(request, saved.answer, before, after, saved.edited.rounds)

        # In an empty context, so that it does not keep the request of the starting call alive.
        contextvars.Context().run(super().__init__, work)
        self._request = request

    @contextlib.contextmanager
    def ending_with_its_call(self) -> Iterator[None]:
        """Stop the edit if its call is cancelled or can no longer be answered."""
        try:
            yield
        except BaseException:
            self.cancel()
            raise

    async def follow(self, step_pause_s: float, wait_s: float | None) -> None:
        """Report progress to the client of the running call, until the end or for `wait_s` s."""
        report = ProgressReport(get_context(), step_pause_s, 1, self._request)
        events = self.latest_events()
        if wait_s is not None:
            events = until(asyncio.sleep(wait_s), events)
        async with contextlib.aclosing(events):
            async for event in events:
                await report.step(0, event)


def _patience_of_client() -> int:
    """The seconds that the client of this call declares to wait; 0 if it declares none."""
    try:
        given = get_http_request().headers.get(MAX_WAIT_HEADER, "0")
    except RuntimeError:  # there is no HTTP
        return 0
    if not re.fullmatch("[0-9]{1,6}", given):
        raise InvalidParameterError(f"{MAX_WAIT_HEADER} must be whole seconds, got {given[:60]!r}")
    return int(given)


# --- definitions of tools ------------------------------------------------------------------------


class _Operation(Tool):
    """A tool that passes its arguments unread to an operation; the request model reads them."""

    _operation: Callable[[dict[str, Any]], Awaitable[ToolResult]] = PrivateAttr()

    @classmethod
    def of(
        cls,
        operation: Callable[[dict[str, Any]], Awaitable[ToolResult]],
        title: str,
        annotations: ToolAnnotations,
        request: type[BaseModel],
        answers: Sequence[type[BaseModel]],
        defaults: Mapping[str, object],
        meta: dict[str, Any] | None = None,
    ) -> _Operation:
        tool = cls(
            name=operation.__name__,
            title=title,
            description=" ".join((operation.__doc__ or "").split()),
            parameters=_with_defaults(_schema_of(request), defaults),
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
            return error_result(error)


def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model, which the caller may change; several tools share a model."""
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
    """One schema to which all answers of a tool conform: failures, and later fields, too."""
    models: list[type[BaseModel]] = [*answers, ErrorAnswer]
    schemas = [_schema_of(model) for model in models]
    schema, stati = schemas[0], list[str]()
    properties: dict[str, Any] = {"status": {}}
    for one in schemas:
        status = one["properties"]["status"]
        stati += status.get("enum", [status.get("const")])
        properties |= one["properties"] | properties  # the first describes it
    properties["status"] = {"type": "string", "enum": list(dict.fromkeys(stati))}
    schema["properties"] = properties
    for definition in (schema, *schema.get("$defs", {}).values()):
        definition.pop("additionalProperties", None)
        if "status" in definition["properties"]:
            definition["required"] = ["status"]
    return schema
