"""The routes of the web page: which of Gradio's the server offers, and how they answer.

Gradio is imported when the page is opened for the first time: that takes seconds and 100 MB, which
a server that is used only by assistants saves. Only the routes that our page requests exist; other
features of Gradio (its own API, a proxy, sign-in, saved runs) are not reachable. The layout of the
page is in `blocks`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import threading
from collections.abc import AsyncIterator, Collection
from concurrent.futures import Future
from http import HTTPStatus
from typing import Final
from urllib.parse import quote

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from step1x_edit.errors import InternalError, InvalidParameterError
from step1x_edit.hub.pulls import Pulls
from step1x_edit.interfaces import hosts, json_bodies
from step1x_edit.interfaces.page.files import PageFiles, own_folder
from step1x_edit.service.service import EditService
from step1x_edit.settings import Settings, keep_gradio_quiet

log = logging.getLogger(__name__)

_ROUTES: Final = {
    "/": ["GET"],
    "/assets/{path:path}": ["GET"],
    "/config": ["GET"],
    "/favicon.ico": ["GET"],
    "/gradio_api/app_id": ["GET"],
    "/gradio_api/cancel": ["POST"],
    "/gradio_api/file={path:path}": ["GET"],
    "/gradio_api/heartbeat/{session_hash}": ["GET"],
    "/gradio_api/info": ["GET"],
    "/gradio_api/queue/data": ["GET"],
    "/gradio_api/queue/join": ["POST"],
    "/gradio_api/reset": ["POST"],
    "/gradio_api/upload": ["POST"],
    "/gradio_api/upload_progress": ["GET"],
    "/manifest.json": ["GET"],
    "/static/{path:path}": ["GET"],
    "/theme.css": ["GET"],
}
_OUTDATED: Final = "the page and the server differ in version; reload the page"
_FILE: Final = "/gradio_api/file="
_HEARTBEAT: Final = "/gradio_api/heartbeat/"
_JOIN: Final = "/gradio_api/queue/join"
_EVENTS_OF_SESSION: Final = "/gradio_api/queue/data"
_UPLOAD: Final = "/gradio_api/upload"
_EVENTS: Final = {path for path, methods in _ROUTES.items() if "POST" in methods} - {_UPLOAD}
_FIXED: Final = ("/assets/", "/static/")
_LONGEST_NAME: Final = 255  # bytes, of a file or of a session
_TEXTS: Final = ("application/json", "text/event-stream", "text/html")  # events that can name files
_QUOTA: Final = 8  # uploads of the largest size, for all visitors together
# Gradio needs inline scripts and compiled shaders; nothing may come from another origin.
_POLICY: Final = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "media-src 'self' blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "manifest-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)


class Page:
    """The page as an application; built at the first request, inside of `lifespan`."""

    def __init__(self, service: EditService, settings: Settings, pulls: Pulls) -> None:
        self._service = service
        self._settings = settings
        self._pulls = pulls
        self._lock = asyncio.Lock()
        self._stack = contextlib.AsyncExitStack()
        self._files: PageFiles | None = None
        self._app: FastAPI | None = None

    def as_routes(self) -> list[Route]:
        """The routes of the page for the server."""
        return [Route(path, endpoint=self, methods=methods) for path, methods in _ROUTES.items()]

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Keep the files of the page's visitors until the context ends."""
        with own_folder(self._settings.data_dir) as folder:
            self._files = PageFiles(folder, _QUOTA * self._settings.max_bytes)
            async with self._stack:
                yield
            self._app = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "://" in scope["path"]:  # Gradio would fetch the URL for the caller
            raise HTTPException(404)
        path = scope["path"]
        can_be_a_name = path.isprintable() and len(path.encode()) <= _LONGEST_NAME
        if path.startswith((_HEARTBEAT, *_FIXED)) and not can_be_a_name:
            raise HTTPException(404)  # Gradio would answer 500
        page, files = await self._built()
        app: ASGIApp = page
        if path == _UPLOAD:
            app = self._upload
        elif path == _EVENTS_OF_SESSION:
            if Request(scope).query_params.get("session_hash") not in page.state.sessions:
                # Gradio would fail in the middle of its answer.
                raise HTTPException(404, "There is no such session, or it has ended.")
        elif path in _EVENTS:
            receive = await _checked(scope, receive, files, page.state.functions)
        elif path.startswith(_FILE):
            path = f"{_FILE}{files.real(path.removeprefix(_FILE))}"
        failure, is_text = 0, False

        async def allowed(message: Message) -> None:
            nonlocal failure, is_text
            if message["type"] == "http.response.start" and message["status"] >= 400:
                failure = message["status"]
            if failure:
                return  # our own error answer replaces it
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                if path.startswith(_FIXED):
                    headers.setdefault("Cache-Control", "private, max-age=3600")
                is_text = headers.get("content-type", "").startswith(_TEXTS)
                if is_text:
                    del headers["Content-Length"]
            elif is_text:
                message = {**message, "body": files.shown(message.get("body", b""))}
            await send(message)

        headers = [each for each in scope["headers"] if _is_understood(path, *each)]
        changed = {"path": path, "raw_path": quote(path).encode(), "headers": headers}
        inner = {**scope, "root_path": "", "app": app, **changed}
        async with contextlib.AsyncExitStack() as stack:
            if path.startswith(_HEARTBEAT):
                session = path.removeprefix(_HEARTBEAT)
                await stack.enter_async_context(files.open_page(session))
            try:
                await app(inner, receive, allowed)
            except Exception:
                if not failure:
                    raise
                log.exception("the page failed")
        match failure:
            case HTTPStatus.INTERNAL_SERVER_ERROR:
                raise InternalError("the page failed unexpectedly; the server's log says more")
            case HTTPStatus.UNPROCESSABLE_ENTITY:
                raise InvalidParameterError(_OUTDATED)
        if failure:
            raise HTTPException(failure)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        from step1x_edit.interfaces.page.uploads import receive_upload

        assert self._files is not None
        max_bytes = self._settings.max_bytes
        answer = await receive_upload(Request(scope, receive), self._files, max_bytes)
        await answer(scope, receive, send)

    async def _built(self) -> tuple[FastAPI, PageFiles]:
        async with self._lock:
            assert self._files is not None, "the page is used outside of its lifespan"
            if self._app is None:
                built: Future[FastAPI] = Future()
                # Not a thread of the loop's pool: the end of the process must not wait for it.
                threading.Thread(target=self._build, args=(built, self._files), daemon=True).start()
                app = await asyncio.wrap_future(built)
                from step1x_edit.interfaces.page import blocks

                await self._stack.enter_async_context(blocks.running(app))
                self._app = app
            return self._app, self._files

    def _build(self, built: Future[FastAPI], files: PageFiles) -> None:
        try:
            keep_gradio_quiet(files.folder)
            from step1x_edit.interfaces.page.blocks import build

            built.set_result(build(self._service, self._settings, self._pulls, files))
        except BaseException as error:  # noqa: BLE001 - `_built` raises it again
            built.set_exception(error)


def _is_understood(path: str, name: bytes, value: bytes) -> bool:
    """Whether to pass a header on to Gradio, which fails on several ranges and malformed hosts.

    Gradio must not compress answers that we rewrite, either.
    """
    match name:
        case b"accept-encoding":
            return path.startswith(_FIXED)
        case b"range":
            return re.fullmatch(rb"bytes=\d{1,18}-\d{0,18}", value) is not None
        case b"x-forwarded-host":
            host = hosts.name_of(value.decode("latin-1"))
            return hosts.is_address(host) or re.search("[a-z]", host) is not None
        case _:
            return True


async def _checked(
    scope: Scope, receive: Receive, files: PageFiles, functions: Collection[object]
) -> Receive:
    """Read an event of the page, refuse it if it names files of others, and provide it again.

    An event with an unknown function comes from a page of another version, or from no page.
    """
    body = await json_bodies.read_text(Request(scope, receive))
    event = await json_bodies.parse(body)
    session, function = event.get("session_hash"), event.get("fn_index")
    if scope["path"] == _JOIN and not (isinstance(function, int) and function in functions):
        raise InvalidParameterError(_OUTDATED)
    if scope["path"] == _JOIN and not (isinstance(session, str) and session):
        raise InvalidParameterError("session_hash must be the name of a session")
    await files.take_event(str(session), event)
    try:
        text = json.dumps(event, allow_nan=False)
    except ValueError:
        raise InvalidParameterError("the JSON has a number that is NaN or too large") from None
    except RecursionError:
        raise InvalidParameterError("the JSON is nested too deeply") from None
    return json_bodies.given_again(text.encode(), receive)
