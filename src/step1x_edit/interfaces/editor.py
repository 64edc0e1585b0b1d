"""Who edits pictures for the command line: this process, or a server that runs already.

Either way files are read and written here, so that paths mean what they mean to the caller, and the
answers, the bytes and the sentences of errors are the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from step1x_edit.errors import InvalidParameterError
from step1x_edit.interfaces.discovery import find_server
from step1x_edit.schemas import (
    GENERATED,
    EditAnswer,
    EditMetadata,
    EditRequest,
    GenerateRequest,
    GpuAnswer,
    StatusAnswer,
    read_request,
)

if TYPE_CHECKING:
    from step1x_edit.files import FileAccess, FileIdentity, Output
    from step1x_edit.service import EditService, Report
    from step1x_edit.settings import Settings


@dataclass(frozen=True)
class Edited:
    """The bytes of a picture that was edited or made, and how."""

    data: bytes
    metadata: EditMetadata


class Editor(Protocol):
    """What the command line asks of whoever edits."""

    @property
    def url(self) -> str | None:
        """Where the server is; None if there is none."""

    async def edit_picture(
        self,
        data: bytes,
        arguments: Mapping[str, object],
        report: Report,
        suffix: str = ".png",
        mask: bytes | None = None,
    ) -> Edited:
        """Edit a picture; cancelling the call stops the work. `suffix` chooses the format.

        `arguments` are fields of a `PictureRequest`; those left out are chosen by who edits.
        """

    async def generate_picture(
        self, arguments: Mapping[str, object], report: Report, suffix: str = ".png"
    ) -> Edited:
        """Make a picture from words alone, as `edit_picture` edits one.

        `arguments` are fields of a `GeneratePictureRequest`.
        """

    async def status(self) -> StatusAnswer:
        """Where the model is."""

    async def offload(self) -> GpuAnswer:
        """Move the model to host memory."""

    async def release(self) -> GpuAnswer:
        """Forget the model."""


class InProcess:
    """A model of our own, Unloaded until it edits, which goes when the command ends."""

    url = None

    def __init__(self, service: EditService) -> None:
        self._service = service

    async def edit_picture(
        self,
        data: bytes,
        arguments: Mapping[str, object],
        report: Report,
        suffix: str = ".png",
        mask: bytes | None = None,
    ) -> Edited:
        """Edit a picture with our own model."""
        request = self._service.read_picture(arguments)
        edited = await self._service.edit_picture(data, request, report, suffix, mask)
        return Edited(edited.data, edited.metadata)

    async def generate_picture(
        self, arguments: Mapping[str, object], report: Report, suffix: str = ".png"
    ) -> Edited:
        """Make a picture with our own model."""
        request = self._service.read_generate_picture(arguments)
        made = await self._service.generate_picture(request, report, suffix)
        return Edited(made.data, made.metadata)

    async def status(self) -> StatusAnswer:
        """Our own model is not loaded: nothing has been edited."""
        return self._service.status()

    async def offload(self) -> GpuAnswer:
        """There is nothing to offload."""
        return self._nothing_to("offload")

    async def release(self) -> GpuAnswer:
        """There is nothing to release."""
        return self._nothing_to("release")

    def _nothing_to(self, move: str) -> GpuAnswer:
        return GpuAnswer(
            message=f"Nothing to {move} here: no server is running on this machine",
            gpu_status=self._service.status().gpu_status,
        )


@contextlib.contextmanager
def opened_editor(
    settings: Settings, url: str | None, api_key: str | None, standalone: bool
) -> Iterator[Editor]:
    """Who edits: the server at `url`, or one that runs on this machine, or this process."""
    if standalone and url is not None:
        raise InvalidParameterError("--standalone and --url exclude each other")
    key = None if settings.api_key is None else settings.api_key.get_secret_value()
    token = (api_key or "").strip() or key
    if url is None and not standalone:
        found = asyncio.run(find_server(settings.data_dir))
        if found is not None:
            url, token = found.url, found.token
    if url is not None:
        from step1x_edit.interfaces.remote import RemoteServer

        server = RemoteServer(url, token, settings.limits)
        asyncio.run(server.check())
        yield server
        return
    from step1x_edit.service import build_service

    service = build_service(settings)
    try:
        yield InProcess(service)
    finally:
        service.close()


# --- requests and files --------------------------------------------------------------------------


def given(arguments: Mapping[str, object]) -> dict[str, object]:
    """Those of the arguments that were given."""
    return {name: value for name, value in arguments.items() if value is not None}


def read_edit(arguments: Mapping[str, object]) -> EditRequest:
    """The request that is made of these arguments; raises InvalidParameterError."""
    return read_request(EditRequest, given(arguments))


def read_generate(arguments: Mapping[str, object]) -> GenerateRequest:
    """The request that is made of these arguments; raises InvalidParameterError."""
    return read_request(GenerateRequest, given(arguments))


@dataclass(frozen=True)
class Inputs:
    """The files of an edit, read."""

    image: bytes
    mask: bytes | None
    identities: frozenset[FileIdentity]


def read_inputs(files: FileAccess, image: str | bytes, mask_path: str | None) -> Inputs:
    """Read the picture, unless it is here already, and the mask if there is one."""
    identities = set()
    if isinstance(image, str):
        file = files.read(image)
        image = file.data
        identities.add(file.identity)
    mask = None if mask_path is None else files.read(mask_path)
    if mask is not None:
        identities.add(mask.identity)
    return Inputs(image, None if mask is None else mask.data, frozenset(identities))


async def generate_file(
    editor: Editor,
    files: FileAccess,
    arguments: Mapping[str, object],
    plan: Callable[[], Output],
    report: Report,
) -> EditAnswer:
    """Have a picture made from words alone and save it where `plan` wants it."""
    started = time.monotonic()
    output = await asyncio.to_thread(plan)
    made = await editor.generate_picture(arguments, report, output.suffix)
    path = await asyncio.to_thread(files.publish, output, made.data)
    return EditAnswer(
        message=GENERATED,
        output_path=str(path),
        processing_time=round(time.monotonic() - started, 2),
        metadata=made.metadata,
    )


async def edit_file(
    editor: Editor,
    files: FileAccess,
    image: str | bytes,
    mask_path: str | None,
    arguments: Mapping[str, object],
    plan: Callable[[frozenset[FileIdentity]], Output],
    report: Report,
) -> EditAnswer:
    """Read a picture, have it edited and save the result where `plan` wants it."""
    started = time.monotonic()

    def opened() -> tuple[Inputs, Output]:
        inputs = read_inputs(files, image, mask_path)
        return inputs, plan(inputs.identities)

    inputs, output = await asyncio.to_thread(opened)
    edited = await editor.edit_picture(inputs.image, arguments, report, output.suffix, inputs.mask)
    path = await asyncio.to_thread(files.publish, output, edited.data)
    return EditAnswer(
        output_path=str(path),
        processing_time=round(time.monotonic() - started, 2),
        metadata=edited.metadata,
    )
