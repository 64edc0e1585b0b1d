"""The guard: the checks of every request before any other part of the application receives it.

It wraps all routes and mounted apps, so none of them can be left out, and decides by the head of
the request:

- the head has at most 64 kB, and declares the length of the body in one way;
- the Host must be a name of this server (otherwise a foreign page could reach us by rebinding its
  own name to our address);
- a request that a browser sends for a page must come from one of our pages, or from a site in
  ALLOWED_ORIGINS: forms of other sites and pages of other ports are refused;
- if API_KEY is set, every path but `/livez` requires it: as a bearer token, or as the password that
  browsers ask their users for;
- a caller may start at most RATE_LIMIT pieces of work per minute;
- the body may be as long as a picture and its form, or 1 MiB if it cannot contain a picture; the
  header is checked and the bytes are counted while they are read. It must arrive in time, and fit
  into the memory for all bodies.

It also gives each request an id, logs its end, and adds the headers that keep browsers from
sniffing, caching and framing. Of the routes it knows only which of them start work.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import re
import secrets
import socket
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from step1x_edit.errors import ImageTooLargeError, RateLimitedError, ServerBusyError
from step1x_edit.interfaces import hosts
from step1x_edit.interfaces.http import problems
from step1x_edit.interfaces.http.problems import Failure
from step1x_edit.interfaces.http.rate_limit import RateLimit
from step1x_edit.logs import current_request
from step1x_edit.settings import Settings

log = logging.getLogger(__name__)

OPEN_PATHS: Final = frozenset({"/livez"})
MCP_PATH: Final = "/mcp"
WORK_PATHS: Final = frozenset(
    {"/api/edit", "/v1/images/edits", "/v1/images/generations", "/v1/jobs"}
)
"""The paths at which a POST starts an edit or a generation. With MCP the calls of such tools count,
at any path."""
FORM_BYTES: Final = 1024 * 1024  # bytes of a form besides its pictures: fields, boundaries

_HEAD_BYTES: Final = 64 * 1024  # uvicorn has the same limit, but only while a head is incomplete
_JSON_WITH_PICTURES: Final = "/v1/images/edits"
_MCP_BYTES: Final = 4 * 2**20  # the library's limit; the largest batch fits
_PAGE_EVENTS: Final = "/gradio_api/"
_PAGE_UPLOAD: Final = "/gradio_api/upload"
_BODIES: Final = 8  # bodies of the maximum length held at a time
_START_S: Final = 10.0  # until a body must have arrived at the rate below
_BYTES_PER_S: Final = 16 * 1024
_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_SITES: Final = frozenset({"same-origin", "none"})  # none: typed by the user
_ASK_THE_USER: Final = 'Basic realm="step1x-edit", charset="UTF-8"'
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_ASKS_FIRST: Final = "access-control-request-method"
_TOLD_TO_PAGES: Final = (
    "Location",
    "Mcp-Session-Id",
    "Retry-After",
    "X-Changed-Share",
    "X-Processing-Time",
    "X-Request-Id",
    "X-Seed",
)
_GONE: Final[Message] = {"type": "http.disconnect"}

Observe = Callable[[Scope, int, float], None]
"""Called at the end of each request with its scope, status and duration in seconds."""


def request_id(scope: Scope) -> str:
    """The id that the guard has given to a request."""
    return str(scope["state"]["request_id"])


def start_work(scope: Scope) -> None:
    """Count additional work that a request starts; raises RateLimitedError."""
    scope["state"]["start_work"]()


class Guard:
    """Passes permitted requests to `app`, and answers the others itself."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        observe: Observe | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._origins = frozenset(settings.allowed_origins)
        if self._origins:
            self._app = CORSMiddleware(
                app,
                allow_origins=settings.allowed_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],  # answered by name; requests carry no cookies or passwords
                expose_headers=_TOLD_TO_PAGES,
            )
        self._rate_limit = RateLimit(settings.rate_limit, now)
        self._held = 0
        self._key = None
        if settings.api_key is not None:
            self._key = settings.api_key.get_secret_value().encode("ascii")
        self._names = hosts.LOOPBACK | {settings.host.lower(), *settings.allowed_hosts}
        self._is_open = not settings.is_loopback
        if self._is_open:
            self._names |= {socket.gethostname().lower()}
        self._max_picture = settings.max_bytes
        self._max_body = 2 * settings.max_bytes + FORM_BYTES  # a picture and its mask
        self._receive_s = settings.receive_timeout
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            state = scope.setdefault("state", {})
            state["request_id"] = secrets.token_hex(8)
            current_request.set(state["request_id"])
            state["start_work"] = lambda: self._rate_limit.spend(self._caller(scope))
            await _Passage(self, scope, receive, send).go(self._app)
        else:  # websockets are not supported
            await send({"type": "websocket.close", "code": 1008})

    def refusal(self, scope: Scope) -> Failure | None:
        """The reason to refuse a request, by its head; None if it is permitted."""
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy may use the other one to find the end of the body (RFC 9112).
            return problems.of_status(400, "Send Content-Length or Transfer-Encoding, not both.")
        if _size_of_head(scope) > _HEAD_BYTES:
            return problems.of_status(431, f"The head may have at most {_HEAD_BYTES // 1024} kB.")
        host = headers.get("host", "")
        if not self._is_ours(host):
            return problems.of_status(421, "The name in Host is not a name of this server.")
        origins = headers.getlist("origin")
        is_named = len(origins) == 1 and origins[0].lower() in self._origins
        if not is_named and not _is_from_our_pages(scope["method"], host, headers):
            return problems.of_status(403, "Requests from pages of other sites are refused.")
        if is_named and scope["method"] == "OPTIONS" and _ASKS_FIRST in headers:
            return None  # answered without further checks, because browsers send no key with it
        if not self._may_enter(scope["path"], headers.getlist("authorization")):
            return problems.of_status(
                401,
                "Send the server's API_KEY in the header 'Authorization: Bearer …'.",
                {"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "0")
        longest = self.longest_body(scope)
        if not re.fullmatch("[0-9]{1,18}", length) or int(length) > longest:
            return self.too_long(longest)
        if headers.get("content-encoding", "identity").lower() != "identity":
            return problems.of_status(415, "Compressed request bodies are not supported.")
        if scope["method"] == "POST" and scope["path"] in WORK_PATHS:
            try:
                start_work(scope)
            except RateLimitedError as error:
                return problems.of_error(error)
        return None

    def hold(self, length: int) -> Failure | None:
        """Reserve memory for this many bytes until `let_go`; the failure if there is none."""
        if self._held + length > _BODIES * self._max_body:
            return problems.of_error(ServerBusyError("too many uploads at a time, try again soon"))
        self._held += length
        return None

    def let_go(self, length: int) -> None:
        """Release reserved memory."""
        self._held -= length

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Report the end of a request to the log and to the observer."""
        path = scope.get("raw_path", scope["path"].encode())
        log.info(
            "%s %s %d %.3f s id=%s",
            scope["method"],
            path.decode("ascii", "backslashreplace"),
            status,
            seconds,
            request_id(scope),
        )
        if self._observe is not None:
            self._observe(scope, status, seconds)

    def longest_body(self, scope: Scope) -> int:
        """The maximum length of a request's body in bytes, by its head."""
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        is_event = scope["path"].startswith(_PAGE_EVENTS) and scope["path"] != _PAGE_UPLOAD
        if scope["path"] == MCP_PATH:
            return min(_MCP_BYTES, self._max_body)
        is_json = kind == "application/json" and scope["path"] != _JSON_WITH_PICTURES
        return FORM_BYTES if is_event or is_json else self._max_body

    def patience_s(self, length: int) -> float:
        """The total seconds to wait for a body of which `length` bytes have arrived."""
        return min(self._receive_s, _START_S + length / _BYTES_PER_S)

    def too_late(self) -> Failure:
        """The failure for a body that arrives too slowly."""
        return problems.of_status(
            408,
            f"The request must arrive within {self._receive_s} s (RECEIVE_TIMEOUT), and at no "
            f"less than {_BYTES_PER_S // 1024} KiB a second after {_START_S:g} s.",
        )

    def too_long(self, longest: int) -> Failure:
        """The failure for a body that is longer than `longest`."""
        if longest == self._max_body:
            return problems.of_error(self.too_long_error())
        most = f"A body without a picture may have at most {longest // 2**20} MiB."
        return Failure(413, "content_too_large", "Content too large", most, {})

    def too_long_error(self) -> ImageTooLargeError:
        """The same as an error."""
        return ImageTooLargeError(f"at most {self._max_picture / 2**20:g} MB are allowed")

    def _caller(self, scope: Scope) -> str:
        """The caller for the rate limit: the key, or else the address, never a forwarded one."""
        if self._key is not None:
            return "the key"
        client = scope.get("client")
        return "" if client is None else str(client[0])

    def _is_ours(self, host: str) -> bool:
        name = hosts.name_of(host)
        # An IP address cannot be rebound, and the addresses of a machine are hard to know.
        return name in self._names or (self._is_open and hosts.is_address(name))

    def _may_enter(self, path: str, shown: list[str]) -> bool:
        if self._key is None or path in OPEN_PATHS:
            return True
        # Bytes, because comparing texts raises for anything but ASCII.
        return len(shown) == 1 and hmac.compare_digest(_key_in(shown[0]), self._key)


class _Passage:
    """One request that passes through the guard."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self._guard = guard
        self._scope = scope
        self._receive = receive
        self._send = send
        self._started = time.monotonic()
        self._longest = guard.longest_body(scope)
        self._length = 0
        self._held = 0
        self._waited_s = 0.0
        self._has_arrived = False
        self._cut: Failure | None = None
        self._status: int | None = None

    async def go(self, app: ASGIApp) -> None:
        refusal = self._guard.refusal(self._scope)
        if refusal is None:
            refusal = self._hold(int(Headers(scope=self._scope).get("content-length", "0")))
        try:
            if refusal is not None:
                await self._refuse(refusal)
                return
            try:
                await app(self._scope, self._counted, self._answered)
            except Exception:
                if self._cut is None:
                    raise
            if self._cut is not None and self._status is None:
                await self._refuse(self._cut)
        finally:
            self._guard.let_go(self._held)
            seconds = time.monotonic() - self._started
            self._guard.observe(self._scope, self._status or 500, seconds)

    async def _refuse(self, failure: Failure) -> None:
        answer = problems.response(failure, request_id(self._scope), self._scope["path"])
        answer.headers["Connection"] = "close"  # the rest of the body will not be read
        if failure.status == 401 and _shows_a_page(self._scope):
            # In a separate header line: browsers read only the first challenge of each line.
            answer.headers.append("WWW-Authenticate", _ASK_THE_USER)
        await answer(self._scope, self._receive, self._hardened)

    async def _counted(self) -> Message:
        message = await (self._receive() if self._has_arrived else self._next_piece())
        self._length += len(message.get("body", b""))
        if self._length > self._longest:
            self._cut = self._guard.too_long(self._longest)
            raise self._guard.too_long_error()
        if self._length > self._held:  # its length was not declared
            self._cut = self._hold(self._length - self._held)
        return message if self._cut is None else _GONE

    def _hold(self, length: int) -> Failure | None:
        failure = self._guard.hold(length)
        if failure is None:
            self._held += length
        return failure

    async def _next_piece(self) -> Message:
        """The next part of the body; after the time-out the app receives a disconnect."""
        started = time.monotonic()
        patience_s = self._guard.patience_s(self._length) - self._waited_s
        try:
            message = await asyncio.wait_for(self._receive(), patience_s)
        except asyncio.TimeoutError:
            self._cut = self._guard.too_late()
            return _GONE
        self._waited_s += time.monotonic() - started
        self._has_arrived = not message.get("more_body", False)
        return message

    async def _answered(self, message: Message) -> None:
        """Send the app's answer, unless the body was cut off before it began."""
        if self._cut is None or self._status is not None:
            await self._hardened(message)

    async def _hardened(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = int(message["status"])
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            headers["X-Request-Id"] = request_id(self._scope)
        await self._send(message)


def _key_in(authorization: str) -> bytes:
    """The key in the header: a bearer token or a password; empty if it is neither."""
    scheme, _, shown = authorization.partition(" ")
    match scheme.lower():
        case "bearer":
            return shown.strip().encode("latin-1")
        case "basic":
            try:
                return base64.b64decode(shown.strip(), validate=True).partition(b":")[2]
            except ValueError:
                return b""
        case _:
            return b""


def _size_of_head(scope: Scope) -> int:
    """The bytes of a request's line and headers, with four more for each header."""
    line = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
    return line + sum(len(name) + len(value) + 4 for name, value in scope["headers"])


def _shows_a_page(scope: Scope) -> bool:
    """Whether a browser shows the answer as a page and can ask its user for the key."""
    headers = Headers(scope=scope)
    is_page = "text/html" in headers.get("accept", "").lower()
    return scope["method"] == "GET" and (is_page or headers.get("sec-fetch-mode") == "navigate")


def _is_from_our_pages(method: str, host: str, headers: Headers) -> bool:
    """Whether a request was sent by one of our pages, or by no page."""
    origins = headers.getlist("origin")
    if origins:
        return all(_authority(origin) == host.lower() for origin in origins)
    # Links from other sites may read: their answers are shown to the user, not to the page.
    return method in _READING or headers.get("sec-fetch-site", "none") in _OWN_SITES


def _authority(origin: str) -> str | None:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") else None
