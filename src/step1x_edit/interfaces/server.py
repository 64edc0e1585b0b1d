"""The application of the unified server: every interface over HTTP, on one engine.

It has the routes of REST, MCP, the page and the documentation, without their guard. `serving` is
the process around it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from typing import Any, Final

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

from step1x_edit import __version__
from step1x_edit.errors import InternalError, SettingsError, Step1XEditError
from step1x_edit.hub.pulls import Pulls
from step1x_edit.interfaces.discovery import SERVER_NAME
from step1x_edit.interfaces.http import openapi, problems
from step1x_edit.interfaces.http.docs_page import docs_routes
from step1x_edit.interfaces.http.edits import edit_routes
from step1x_edit.interfaces.http.estimate import estimate_routes
from step1x_edit.interfaces.http.gpu import gpu_routes
from step1x_edit.interfaces.http.guard import MCP_PATH, request_id, start_work
from step1x_edit.interfaces.http.health import health_routes
from step1x_edit.interfaces.http.idempotency import Runs
from step1x_edit.interfaces.http.jobs import job_operation, job_routes
from step1x_edit.interfaces.http.metrics import Metrics
from step1x_edit.interfaces.http.models import model_routes
from step1x_edit.interfaces.http.openai.images import image_routes
from step1x_edit.interfaces.http.recipes import recipe_routes
from step1x_edit.interfaces.mcp.hangups import NoteHangUps
from step1x_edit.interfaces.mcp.refusals import OneSentence
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.interfaces.page.page import Page
from step1x_edit.service.job_runner import JobRunner
from step1x_edit.service.job_store import JobStore
from step1x_edit.service.service import EditService
from step1x_edit.settings import MEBI, Settings

MCP_SESSIONS: Final = 1000
"""Sessions of MCP that may be open at a time; each takes 50 kB."""
MCP_IDLE_S: Final = 300.0
"""Seconds without a request until a session of MCP ends."""

_EDITING_TOOLS: Final = frozenset(
    {"edit_image", "batch_edit_images", "submit_edit", "generate_image"}
)


def build_routes(
    service: EditService, settings: Settings, metrics: Metrics, secret: str = ""
) -> FastAPI:
    """The routes, unguarded; `secret` is that of the server's note.

    Setting `app.state.closing` ends the open streams of events.
    """
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
        # The library's guard runs behind ours and knows only the usual names.
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
        redirect_slashes=False,  # a redirect would be built from the caller's Host header
        lifespan=_lifespan(service, store, pulls, mcp, page),
    )
    app.state.closing = asyncio.Event()
    # Plain routes in one list, which a test compares with the reviewed ones.
    if store is not None:
        runs = Runs()
        app.router.routes.extend(edit_routes(service, runs).routes)
        app.router.routes.extend(gpu_routes(service).routes)
        app.router.routes.extend(image_routes(service, settings, runs).routes)
        app.router.routes.extend(estimate_routes(service).routes)
        app.router.routes.extend(recipe_routes().routes)
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
        app.add_exception_handler(kind, _explained)
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
            # What may fail is entered before MCP, which would wrap the failure in an exception
            # group.
            if store is not None:
                with _advising("ENABLE_API"):
                    await stack.enter_async_context(store)
                await stack.enter_async_context(
                    JobRunner(store, job_operation(service), lanes=service.lanes)
                )
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
    """Add the remedy to the error if another server uses the folder, or it cannot be created."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(
            f"{error}; give this server a separate DATA_DIR, or set {setting}=false"
        ) from None


def _limit_sessions(mcp: StarletteWithLifespan) -> None:
    """Make a running MCP refuse further sessions with 503; http_app has no option for it."""
    for route in mcp.routes:
        if isinstance(route, Route) and isinstance(route.endpoint, StreamableHTTPASGIApp):
            assert route.endpoint.session_manager is not None, "the MCP is not running"
            route.endpoint.session_manager.max_sessions = MCP_SESSIONS


class _CountedEdits(Middleware):
    """Counts the calls of tools that start work; other POSTs to MCP do not count."""

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        if context.message.name in _EDITING_TOOLS:
            start_work(get_http_request().scope)
        return await call_next(context)


async def _explained(request: Request, error: Exception) -> Response:
    """The answer for any exception; unexpected ones are logged by the server."""
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
    """All methods of a path; if it has several routes, the framework reports those of one."""
    methods: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))
