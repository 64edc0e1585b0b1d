"""Edits of files, by any editor: the path handling of the command line, MCP and batches.

An edit is a linear sequence: read the inputs, decide the path of the result, have the picture
edited, publish the result. A batch repeats this for one picture after the other. This module knows
nothing about pixels and does not depend on where the editor runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

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
from step1x_edit.service.editor import EditedFile, Editor, Reporter, unreported
from step1x_edit.service.files import FileAccess, FileIdentity, Output

if TYPE_CHECKING:
    from step1x_edit.service.history import History

E = TypeVar("E", bound=EditedFile)
T = TypeVar("T")

ReporterOf: TypeAlias = Callable[[int], Reporter]
"""Maps the number of a picture in a batch, from 0, to the receiver of its progress."""


@dataclass(frozen=True)
class Inputs:
    """The files of an edit, read."""

    image: bytes
    mask: bytes | None
    identities: frozenset[FileIdentity]


_NO_INPUTS = Inputs(b"", None, frozenset())  # of a picture that is generated


@dataclass(frozen=True)
class Opened:
    """An edit about to run: its inputs, and where its result goes."""

    started: float
    inputs: Inputs
    output: Output
    before_publishing: Callable[[EditAnswer, bytes], None] = lambda answer, data: None
    """Called with the answer and the bytes of the file, in the thread that publishes it."""


Open: TypeAlias = Callable[[EditRequest, frozenset[FileIdentity]], Opened | EditAnswer]
"""Opens an edit of a batch whose inputs have these identities, or answers that it is done."""


@dataclass(frozen=True)
class Saved(Generic[E]):
    """The answer for a file that was written, and its picture."""

    answer: EditAnswer
    edited: E


@dataclass(frozen=True)
class FileEdits(Generic[E]):
    """The operations on files."""

    editor: Editor[E]
    files: FileAccess
    history: History | None = None
    """Where all results are kept, if they are."""

    async def edit(
        self,
        request: EditRequest,
        report: Reporter = unreported,
        image: bytes | None = None,
        output_dir: str | None = None,
        mask: bytes | None = None,
        others: frozenset[FileIdentity] = frozenset(),
    ) -> Saved[E]:
        """Edit one picture and save the result; cancelling the call cancels the edit, unsaved.

        `image` and `mask` are the inputs if they were already read, `output_dir` is the folder for
        a result without an output_path, and `others` are files that it must not replace either.
        """
        await self.editor.check_room()  # a full server must not spend memory on pictures
        opened = await asyncio.to_thread(
            self._open, request, others, output_dir=output_dir, image=image, mask=mask
        )
        return await self._edit(self.editor.edit_picture, request, opened, report)

    async def edit_unsaved(
        self,
        request: EditRequest,
        report: Reporter = unreported,
        image: bytes | None = None,
        mask: bytes | None = None,
    ) -> E:
        """Edit one picture and return the result as a PNG; otherwise as `edit`."""
        await self.editor.check_room()
        inputs = await asyncio.to_thread(self.read, request, image, mask)
        edited = await self.editor.edit_picture(inputs.image, request, report, mask=inputs.mask)
        await asyncio.to_thread(self._keep, request.image_path, inputs, edited, ".png")
        return edited

    async def edit_several(
        self, requests: Sequence[EditRequest], output_dir: str | None, report_of: ReporterOf
    ) -> BatchAnswer:
        """Edit one picture after the other as `edit_each` does; no input is overwritten."""
        names = [request.image_path for request in requests]
        opened = partial(self._open, output_dir=output_dir, taken=set())
        return await self.edit_opened(names, requests, opened, report_of)

    async def edit_opened(
        self,
        names: Sequence[str],
        requests: Sequence[EditRequest],
        opened_of: Open,
        report_of: ReporterOf,
    ) -> BatchAnswer:
        """As `edit_several`, with the names of the pictures in the answer and where each goes."""
        paths = [path for each in requests for path in (each.image_path, each.mask_path) if path]
        inputs = await asyncio.to_thread(self.files.identify, paths)

        async def edit(index: int) -> EditAnswer:
            request = requests[index]
            opened = await asyncio.to_thread(opened_of, request, inputs)
            if isinstance(opened, EditAnswer):
                return opened
            saved = await self._edit(self.editor.edit_next, request, opened, report_of(index))
            return saved.answer

        items: list[BatchItem] = []
        async for index, outcome in edit_each(self.editor, len(requests), edit):
            result = ErrorAnswer.of(outcome) if isinstance(outcome, Step1XEditError) else outcome
            items.append(BatchItem(input=names[index], result=result))
        return BatchAnswer.of(items)

    async def generate(self, request: GenerateRequest, report: Reporter = unreported) -> Saved[E]:
        """Generate one picture from a prompt alone and save it; otherwise as `edit`."""
        await self.editor.check_room()
        opened = await asyncio.to_thread(self._open_new, request)
        made = await self.editor.generate_picture(request, report, opened.output.suffix)
        return await self._saved(opened, made, GENERATED, opened.output.shown)

    async def generate_unsaved(self, request: GenerateRequest, report: Reporter = unreported) -> E:
        """Generate one picture and return it as a PNG; otherwise as `generate`."""
        made = await self.editor.generate_picture(request, report)
        await asyncio.to_thread(self._keep, "generated.png", _NO_INPUTS, made, ".png")
        return made

    def read(
        self, request: EditRequest, image: bytes | None = None, mask: bytes | None = None
    ) -> Inputs:
        """Read the picture and the mask, if there is one, unless they were already read."""
        identities = set()
        if image is None:
            file = self.files.read(request.image_path)
            image = file.data
            identities.add(file.identity)
        if mask is None and request.mask_path is not None:
            with about_the_mask():
                file = self.files.read(request.mask_path)
            mask = file.data
            identities.add(file.identity)
        return Inputs(image, mask, frozenset(identities))

    def _open(
        self,
        request: EditRequest,
        others: frozenset[FileIdentity] = frozenset(),
        *,
        output_dir: str | None,
        taken: set[str] | None = None,
        image: bytes | None = None,
        mask: bytes | None = None,
    ) -> Opened:
        started = time.monotonic()
        inputs = self.read(request, image, mask)
        known = inputs.identities | others
        if request.output_path is not None:
            output = self.files.plan_output(request.output_path, known, overwrite=request.overwrite)
        else:
            output = self.files.plan_default_output(
                request.image_path,
                known,
                output_dir=output_dir,
                overwrite=request.overwrite,
                taken=taken,
            )
        return Opened(started, inputs, output)

    def _open_new(self, request: GenerateRequest) -> Opened:
        started = time.monotonic()
        if request.output_path is None:
            output = self.files.plan_new_output(request.prompt, overwrite=request.overwrite)
        else:
            output = self.files.plan_output(request.output_path, (), overwrite=request.overwrite)
        return Opened(started, _NO_INPUTS, output)

    async def _edit(
        self,
        edit: Callable[..., Awaitable[E]],
        request: EditRequest,
        opened: Opened,
        report: Reporter,
    ) -> Saved[E]:
        inputs, suffix = opened.inputs, opened.output.suffix
        edited = await edit(inputs.image, request, report, suffix, inputs.mask)
        return await self._saved(opened, edited, EDITED, request.image_path)

    async def _saved(self, opened: Opened, edited: E, message: str, begun_with: str) -> Saved[E]:
        answer = EditAnswer(
            message=message,
            output_path=opened.output.shown,
            processing_time=round(time.monotonic() - opened.started, 2),
            metadata=edited.metadata,
        )

        def publish() -> str:
            opened.before_publishing(answer, edited.data)
            path = str(self.files.publish(opened.output, edited.data))
            self._keep(begun_with, opened.inputs, edited, opened.output.suffix)
            return path

        # Publishing is short and comes last: an edit cancelled before it leaves nothing behind.
        path = await asyncio.to_thread(publish)
        answer = answer.model_copy(update={"output_path": path})
        return Saved(answer, edited)

    def _keep(self, begun_with: str, inputs: Inputs, edited: E, suffix: str) -> None:
        """Add the result to the history, if there is one."""
        if self.history is None:
            return
        from step1x_edit.service.history import NewStep

        name, image = PurePath(begun_with).name, inputs.image or None
        self.history.keep(NewStep(name, image, inputs.mask, edited.data, suffix, edited.metadata))


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
