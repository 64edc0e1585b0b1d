"""Edits of files, by any editor: the path handling of the command line, MCP and batches.

An edit is a linear sequence: read the inputs, decide the path of the result, have the picture
edited, publish the result. A batch repeats this for one picture after the other. This module knows
nothing about pixels and does not depend on where the editor runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from step1x_edit.errors import Step1XEditError, about_the_mask
from step1x_edit.schemas.answers import (
    EDITED,
    GENERATED,
    BatchAnswer,
    BatchItem,
    EditAnswer,
    ErrorAnswer,
)
from step1x_edit.schemas.requests import EditRequest, GenerateRequest
from step1x_edit.service.editor import EditedFile, Editor, Notify, unreported
from step1x_edit.service.files import FileAccess, FileIdentity, Output

E = TypeVar("E", bound=EditedFile)
T = TypeVar("T")

NotifyOf: TypeAlias = Callable[[int], Notify]
"""Maps the number of a picture in a batch, from 0, to the receiver of its progress."""


@dataclass(frozen=True)
class Inputs:
    """The files of an edit, read."""

    image: bytes
    mask: bytes | None
    identities: frozenset[FileIdentity]


@dataclass(frozen=True)
class Saved(Generic[E]):
    """The answer for a file that was written, and the pictures before and after."""

    answer: EditAnswer
    edited: E
    source: bytes = b""
    """The file that was edited; empty for a picture generated from a prompt alone."""


@dataclass(frozen=True)
class _Outputs:
    """Where results without an output_path go: beside the input, or into `folder`."""

    folder: str | None = None
    inputs: frozenset[FileIdentity] = frozenset()
    taken: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class FileEdits(Generic[E]):
    """The operations on files."""

    editor: Editor[E]
    files: FileAccess

    async def edit(
        self,
        request: EditRequest,
        report: Notify = unreported,
        image: bytes | None = None,
        output_dir: str | None = None,
    ) -> Saved[E]:
        """Edit one picture and save the result; cancelling the call cancels the edit, unsaved.

        `image` is the input if it was already read, and `output_dir` the folder for a result
        without an output_path.
        """
        await self.editor.check_room()  # a full server must not spend memory on pictures
        return await self._edit(
            self.editor.edit_picture, request, report, _Outputs(output_dir), image
        )

    async def edit_unsaved(
        self, request: EditRequest, report: Notify = unreported, image: bytes | None = None
    ) -> E:
        """Edit one picture and return the result as a PNG; otherwise as `edit`."""
        await self.editor.check_room()
        inputs = await asyncio.to_thread(self.read, request.image_path, request.mask_path, image)
        return await self.editor.edit_picture(inputs.image, request, report, mask=inputs.mask)

    async def edit_several(
        self, requests: Sequence[EditRequest], output_dir: str | None, report_of: NotifyOf
    ) -> BatchAnswer:
        """Edit several pictures as `edit_each` does; none of the inputs is overwritten."""
        paths = [request.image_path for request in requests]
        outputs = _Outputs(output_dir, await asyncio.to_thread(self.files.identify, paths))

        async def edit(index: int) -> EditAnswer:
            saved = await self._edit(
                self.editor.edit_next, requests[index], report_of(index), outputs
            )
            return saved.answer

        return await batch_answer(self.editor, paths, edit)

    async def generate(self, request: GenerateRequest, report: Notify = unreported) -> Saved[E]:
        """Generate one picture from a prompt alone and save it; otherwise as `edit`."""
        await self.editor.check_room()
        started = time.monotonic()
        output = await asyncio.to_thread(self._plan_new, request)
        made = await self.editor.generate_picture(request, report, output.suffix)
        return Saved(await self._published(output, made, started, GENERATED), made)

    def read(self, image_path: str, mask_path: str | None, image: bytes | None = None) -> Inputs:
        """Read the picture, unless it was already read, and the mask if there is one."""
        identities = set()
        if image is None:
            file = self.files.read(image_path)
            image = file.data
            identities.add(file.identity)
        mask = None
        if mask_path is not None:
            with about_the_mask():
                file = self.files.read(mask_path)
            mask = file.data
            identities.add(file.identity)
        return Inputs(image, mask, frozenset(identities))

    async def _edit(
        self,
        edit: Callable[..., Awaitable[E]],
        request: EditRequest,
        report: Notify,
        outputs: _Outputs,
        image: bytes | None = None,
    ) -> Saved[E]:
        started = time.monotonic()

        def opened() -> tuple[Inputs, Output]:
            inputs = self.read(request.image_path, request.mask_path, image)
            return inputs, self._plan(request, inputs.identities, outputs)

        inputs, output = await asyncio.to_thread(opened)
        edited = await edit(inputs.image, request, report, output.suffix, inputs.mask)
        return Saved(await self._published(output, edited, started, EDITED), edited, inputs.image)

    async def _published(
        self, output: Output, edited: E, started: float, message: str
    ) -> EditAnswer:
        # Publishing is short and comes last: an edit cancelled before it leaves nothing behind.
        path = await asyncio.to_thread(self.files.publish, output, edited.data)
        return EditAnswer(
            message=message,
            output_path=str(path),
            processing_time=round(time.monotonic() - started, 2),
            metadata=edited.metadata,
        )

    def _plan(
        self, request: EditRequest, inputs: frozenset[FileIdentity], outputs: _Outputs
    ) -> Output:
        if request.output_path is not None:
            return self.files.plan_output(request.output_path, inputs, overwrite=request.overwrite)
        return self.files.plan_default_output(
            request.image_path,
            inputs | outputs.inputs,
            output_dir=outputs.folder,
            overwrite=request.overwrite,
            taken=outputs.taken,
        )

    def _plan_new(self, request: GenerateRequest) -> Output:
        if request.output_path is None:
            return self.files.plan_new_output(request.prompt, overwrite=request.overwrite)
        return self.files.plan_output(request.output_path, (), overwrite=request.overwrite)


# --- several pictures -----------------------------------------------------------------------------


async def edit_each(
    editor: Editor[Any], total: int, edit: Callable[[int], Awaitable[T]]
) -> AsyncIterator[tuple[int, T | Step1XEditError]]:
    """Edit one picture after the other by its number, and yield each outcome.

    A failure of one does not stop the others. Other callers get their turn between two
    pictures if `edit` uses `Editor.edit_next`. Cancelling the call cancels the edit.
    """
    await editor.check_room()
    for index in range(total):
        outcome: T | Step1XEditError
        try:
            outcome = await edit(index)
        except Step1XEditError as error:
            outcome = error
        yield index, outcome


async def batch_answer(
    editor: Editor[Any], names: Sequence[str], edit: Callable[[int], Awaitable[EditAnswer]]
) -> BatchAnswer:
    """Edit the pictures of these names as `edit_each` does; saved results stay after a cancel."""
    items: list[BatchItem] = []
    async for index, outcome in edit_each(editor, len(names), edit):
        result = ErrorAnswer.of(outcome) if isinstance(outcome, Step1XEditError) else outcome
        items.append(BatchItem(input=names[index], result=result))
    return BatchAnswer.of(items)
