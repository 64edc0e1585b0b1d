"""The editors of the command line: a running server, or this process.

In both cases this process reads and writes the files, so paths are relative to the caller's folder.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from step1x_edit.errors import InvalidParameterError
from step1x_edit.interfaces.discovery import find_server
from step1x_edit.service.editor import EditedFile
from step1x_edit.service.file_edits import FileEdits
from step1x_edit.service.files import FileAccess

if TYPE_CHECKING:
    from step1x_edit.interfaces.cli.remote import RemoteServer
    from step1x_edit.service.history import History
    from step1x_edit.settings import Settings


@contextlib.contextmanager
def opened_edits(
    settings: Settings,
    url: str | None,
    api_key: str | None,
    standalone: bool,
    history: History | None = None,
) -> Iterator[FileEdits[EditedFile]]:
    """Edits of files, by the server that `found_server` finds, or by a model of this process.

    Results are kept in `history`, if it is given.
    """
    server = found_server(settings, url, api_key, standalone)
    if server is not None:
        yield FileEdits(server, FileAccess(settings.allowed_dirs, settings.max_bytes), history)
        return
    from step1x_edit.service.wiring import build_service

    service = build_service(settings)
    try:
        service.prepare()
        yield FileEdits(service, service.files, history)
    finally:
        service.close()


def found_server(
    settings: Settings, url: str | None, api_key: str | None, standalone: bool
) -> RemoteServer | None:
    """The server at `url`, or one that runs on this machine; None if there is none."""
    if standalone and url is not None:
        raise InvalidParameterError("--standalone and --url exclude each other")
    if standalone:
        return None
    key = None if settings.api_key is None else settings.api_key.get_secret_value()
    token = (api_key or "").strip() or key
    if url is None:
        found = asyncio.run(find_server(settings.data_dir))
        if found is None:
            return None
        url, token = found.url, found.token
    from step1x_edit.interfaces.cli.remote import RemoteServer

    return RemoteServer(url, token, settings)
