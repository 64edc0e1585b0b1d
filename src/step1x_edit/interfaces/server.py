"""The unified server: every door over HTTP, in one process, on one engine.

`build_app` makes the application: the routes of REST, MCP and the documentation behind one guard.
`serve` is the process around it: it listens, tells other programs of this machine where, and leaves
when a signal comes, with a short time for the running edit to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from fastmcp.server.dependencies import get_http_request
from fastmcp.server.http import StarletteWithLifespan, StreamableHTTPASGIApp
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.tools import ToolResult
from mcp_types import CallToolRequestParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from step1x_edit import __version__
from step1x_edit.errors import InternalError, SettingsError, Step1XEditError
from step1x_edit.hub.pulls import Pulls
from step1x_edit.interfaces.discovery import SERVER_NAME, announced, new_secret
from step1x_edit.interfaces.http import connections, openapi, problems
from step1x_edit.interfaces.http.docs_page import docs_routes
from step1x_edit.interfaces.http.edits import edit_routes
from step1x_edit.interfaces.http.estimate import estimate_routes
from step1x_edit.interfaces.http.gpu import gpu_routes
from step1x_edit.interfaces.http.guard import MCP_PATH, Guard, request_id, start_work
from step1x_edit.interfaces.http.health import health_routes
from step1x_edit.interfaces.http.idempotency import Runs
from step1x_edit.interfaces.http.jobs import job_operation, job_routes
from step1x_edit.interfaces.http.metrics import Metrics
from step1x_edit.interfaces.http.models import model_routes
from step1x_edit.interfaces.http.openai.images import image_routes
from step1x_edit.interfaces.mcp.hangups import NoteHangUps
from step1x_edit.interfaces.mcp.refusals import OneSentence
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.interfaces.page.page import Page
from step1x_edit.interfaces.process import hear_signals
from step1x_edit.service.job_runner import JobRunner
from step1x_edit.service.job_store import JobStore
from step1x_edit.service.service import EditService
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import MEBI, Settings
from step1x_edit.waiting import first_of

log = logging.getLogger(__name__)

MCP_SESSIONS: Final = 1000
"""Sessions of MCP that may be open at a time; each takes 50 kB."""
MCP_IDLE_S: Final = 300.0
"""Seconds without a request until a session of MCP ends."""

_EDITING_TOOLS: Final = frozenset(
    {"edit_image", "batch_edit_images", "submit_edit", "generate_image"}
)
_GRACE_S: Final = 3.0  # for the running step to end
_LAST_WORDS_S: Final = 1  # for the answers of the requests that were ended


# --- the application ------------------------------------------------------------------------------


def build_app(service: EditService, settings: Settings, secret: str = "") -> Guard:
    """Everything that the server answers, behind its guard; `secret` is that of its note."""
    metrics = Metrics(service)
    return Guard(build_routes(service, settings, metrics, secret), settings, metrics.observe)


def build_routes(
    service: EditService, settings: Settings, metrics: Metrics, secret: str = ""
) -> FastAPI:
    """The routes, unguarded. Answers without an end are ended by setting `app.state.closing`."""
    mcp, store, page = None, None, None
    pulls = Pulls(settings)
    if settings.enable_api:
        store = JobStore(
            settings.data_dir,
            max_queued=settings.max_queue,
            max_bytes=settings.jobs_max_mb * MEBI,
            max_age_s=settings.jobs_max_age,
        )
    if settings.enable_mcp:
        tools = build_mcp(service, max_wait_s=settings.mcp_max_wait)
        tools.add_middleware(_CountedEdits())
        # Its own guard is the second line behind ours, and knows no names but the usual ones.
        has_names = bool(settings.allowed_hosts or settings.allowed_origins)
        mcp = tools.http_app(
            path=MCP_PATH,
            host_origin_protection=False if has_names else "auto",
            session_idle_timeout=MCP_IDLE_S,
        )
    if settings.enable_ui:
        page = Page(service, settings, pulls)
    app = FastAPI(
        title=SERVER_NAME,
        version=__version__,
        description=openapi.DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would be built from what the caller calls us
        lifespan=_lifespan(service, store, pulls, mcp, page),
    )
    app.state.closing = asyncio.Event()
    # Plain routes in one list, which a test compares with those that somebody has thought about.
    if store is not None:
        runs = Runs()
        app.router.routes.extend(edit_routes(service, runs).routes)
        app.router.routes.extend(gpu_routes(service).routes)
        app.router.routes.extend(image_routes(service, settings, runs).routes)
        app.router.routes.extend(estimate_routes(service).routes)
        app.router.routes.extend(job_routes(service, store, runs, app.state.closing).routes)
        app.router.routes.extend(model_routes(pulls, app.state.closing).routes)
    app.router.routes.extend(health_routes(service, metrics, secret).routes)
    app.router.routes.extend(docs_routes())
    if mcp is not None:
        # As a route, not as a mount: mounts answer /mcp with a redirect.
        app.router.routes.append(Route(MCP_PATH, endpoint=NoteHangUps(OneSentence(mcp))))
    if page is not None:
        app.router.routes.extend(page.as_routes())
    for kind in (Step1XEditError, HTTPException, Exception):
        app.add_exception_handler(kind, _told)
    app.openapi = lambda: openapi.description_of(app, service.defaults)  # type: ignore[method-assign]
    return app


def _lifespan(
    service: EditService,
    store: JobStore | None,
    pulls: Pulls,
    mcp: StarletteWithLifespan | None,
    page: Page | None,
) -> Any:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            # What may fail comes before MCP, which would wrap the failure in a group of its own.
            if store is not None:
                with _advising("ENABLE_API"):
                    await stack.enter_async_context(store)
                await stack.enter_async_context(JobRunner(store, job_operation(service)))
            if page is not None:
                with _advising("ENABLE_UI"):
                    await stack.enter_async_context(page.lifespan())
            await stack.enter_async_context(pulls)
            if mcp is not None:
                await stack.enter_async_context(mcp.lifespan(mcp))
                _limit_sessions(mcp)
            yield

    return lifespan


@contextlib.contextmanager
def _advising(setting: str) -> Iterator[None]:
    """Say what to do if another server has the folder, or there can be none."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(
            f"{error}; give this server a DATA_DIR of its own, or set {setting}=false"
        ) from None


def _limit_sessions(mcp: StarletteWithLifespan) -> None:
    """Have a running MCP refuse further sessions with 503; http_app takes no such limit."""
    for route in mcp.routes:
        if isinstance(route, Route) and isinstance(route.endpoint, StreamableHTTPASGIApp):
            assert route.endpoint.session_manager is not None, "the MCP is not running"
            route.endpoint.session_manager.max_sessions = MCP_SESSIONS


class _CountedEdits(Middleware):
    """Counts the tools that start work; a POST to the MCP alone may as well ask for the status."""

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        if context.message.name in _EDITING_TOOLS:
            start_work(get_http_request().scope)
        return await call_next(context)


async def _told(request: Request, error: Exception) -> Response:
    """The answer for anything that was raised; what nobody expected is logged by the server."""
    match error:
        case Step1XEditError():
            failure = problems.of_error(error)
        case HTTPException(status_code=HTTPStatus.METHOD_NOT_ALLOWED):
            failure = problems.of_status(error.status_code, headers={"Allow": _allowed(request)})
        case HTTPException():
            failure = problems.of_status(error.status_code, error.detail, error.headers)
        case _:
            failure = problems.of_error(
                InternalError("the request failed unexpectedly; the server's log says more")
            )
    return problems.response(failure, request_id(request.scope), request.scope["path"])


def _allowed(request: Request) -> str:
    """The methods of a path; where it has several routes, the framework names those of one."""
    methods: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


# --- the process ----------------------------------------------------------------------------------


def serve(settings: Settings) -> None:
    """Serve until a signal comes, then end the process.

    Raises SettingsError if stored jobs or the page cannot have their place in DATA_DIR.
    """
    listener = listen(settings.host, settings.port)
    settings = connections.within_file_limit(settings)
    service = build_service(settings)
    try:
        exit_code = asyncio.run(_serve(settings, service, listener))
    except SettingsError:
        service.close()
        raise
    logging.shutdown()
    os._exit(exit_code)  # threads that still decode or encode are not waited for


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ends the process with one sentence if there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(connections.BACKLOG)
    except OSError as error:
        hint = "choose another HOST"
        if error.errno == errno.EADDRINUSE:
            hint = "another program listens there; stop it, or choose another PORT"
        reason = error.strerror or type(error).__name__
        sys.exit(f"Cannot listen on {host}, port {port} ({reason}): {hint}")
    return listener


async def _serve(settings: Settings, service: EditService, listener: socket.socket) -> int:
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()  # gets the exit code
    hear_signals(told)
    asyncio.get_running_loop().set_exception_handler(connections.TellOnce())
    metrics = Metrics(service)
    secret = new_secret()
    routes = build_routes(service, settings, metrics, secret)
    server = _Server(Guard(routes, settings, metrics.observe), settings)
    # Not left to uvicorn, which tells with a traceback what stops the start.
    async with routes.router.lifespan_context(routes):
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        ready = asyncio.ensure_future(server.ready.wait())
        await first_of(serving, ready)
        if ready.done():
            with _findable(settings, listener, secret):
                await first_of(serving, told)
        ready.cancel()
        server.should_exit = True
        routes.state.closing.set()
        # In a thread, so that the answers to the requests that it ends still leave.
        await asyncio.to_thread(service.close, _GRACE_S)
        await serving
    return told.result() if told.done() else 1


class _Server(uvicorn.Server):
    """A server that says when it is ready, and leaves the signals to us."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            http=connections.protocol(settings),
            timeout_keep_alive=connections.idle_s(settings),
            log_config=None,
            backlog=connections.BACKLOG,
            access_log=False,  # the guard logs requests, with their ids
            lifespan="off",
            ws="none",
            proxy_headers=False,  # whoever may set them may pretend to be anybody
            server_header=False,
            timeout_graceful_shutdown=_LAST_WORDS_S,
        )
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _findable(settings: Settings, listener: socket.socket, secret: str) -> Iterator[None]:
    """Say where we are: in the log, and to programs of this machine that may join us."""
    address, port = listener.getsockname()[:2]
    # Where we listen and not by a name: under `localhost` somebody else can have the other address
    # of the same port, and pass our proof on.
    local = _local_address(address)
    with contextlib.ExitStack() as stack:
        if local is not None and settings.enable_mcp:
            key = None if settings.api_key is None else settings.api_key.get_secret_value()
            url = _url(local, port) + MCP_PATH
            stack.enter_context(announced(settings.data_dir, url, secret, key))
        log.info("serving at %s", _url(settings.host, port))
        yield


def _local_address(host: str) -> str | None:
    """The loopback address under which a server that listens at `host` is reached, if any."""
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return host if host in ("127.0.0.1", "::1") else None


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
