"""The guard: what every request has to pass before anything else of ours sees it.

It stands outside of all routes and mounted apps, so that none of them can be forgotten, and judges
by the head of the request alone:

- the Host must be a name of this server (or else a page of somebody could reach us by rebinding
  its own name to our address);
- a request that a browser sends for a page must come from a page of ours: forms of other sites
  start nothing, neither do programs on other ports of this machine;
- where there is an API_KEY, it has to be shown everywhere but at `/livez`: as a bearer token, or as
  the password that browsers ask their users for;
- the body may be no longer than a picture and its form, by its header and by count while it is
  read.

It also numbers the requests, logs their ends, and gives every answer the headers that keep browsers
from guessing, storing and framing. It knows nothing about what the routes do.
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import logging
import re
import secrets
import socket
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from step1x_edit.errors import ImageTooLargeError
from step1x_edit.interfaces import problems
from step1x_edit.interfaces.problems import Failure
from step1x_edit.settings import Settings

log = logging.getLogger(__name__)

OPEN_PATHS: Final = frozenset({"/livez"})
FORM_BYTES: Final = 1024 * 1024  # what may come around the pictures: other fields, boundaries

_LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
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

Observe = Callable[[Scope, int, float], None]
"""Told of each request when it has ended: its scope, its status and its seconds."""


def request_id(scope: Scope) -> str:
    """The id that the guard has given to a request."""
    return str(scope["state"]["request_id"])


class Guard:
    """Lets requests through to `app` that may come in, and answers the others itself."""

    def __init__(self, app: ASGIApp, settings: Settings, observe: Observe | None = None) -> None:
        self._app = app
        self._key = None
        if settings.api_key is not None:
            self._key = settings.api_key.get_secret_value().encode("ascii")
        self._names = _LOOPBACK_NAMES | {settings.host.lower()}
        self._is_open = not settings.is_loopback
        if self._is_open:
            self._names |= {socket.gethostname().lower()}
        self._max_picture = settings.max_bytes
        self._max_body = 2 * settings.max_bytes + FORM_BYTES  # a picture and its mask
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            scope.setdefault("state", {})["request_id"] = secrets.token_hex(8)
            await _Passage(self, scope, receive, send).go(self._app)
        else:  # there are no websockets here
            await send({"type": "websocket.close", "code": 1008})

    def refusal(self, scope: Scope) -> Failure | None:
        """Why a request may not come in, judged by its head."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(host):
            return problems.of_status(421, "This server is not known under the name in Host.")
        if not _is_from_our_pages(scope["method"], host, headers):
            return problems.of_status(403, "Requests from pages of other sites are refused.")
        if not self._may_enter(scope["path"], headers.getlist("authorization")):
            return problems.of_status(
                401,
                "Send the server's API_KEY in the header 'Authorization: Bearer …'.",
                {"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,18}", length) or int(length) > self._max_body:
            return self.too_long()
        if headers.get("content-encoding", "identity").lower() != "identity":
            return problems.of_status(415, "Compressed request bodies are not read.")
        return None

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Tell whoever listens, and the log, that a request has ended."""
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

    @property
    def max_body(self) -> int:
        """The longest body that is read, in bytes."""
        return self._max_body

    def too_long(self) -> Failure:
        """The failure for a body that is too long."""
        return problems.of_error(self.too_long_error())

    def too_long_error(self) -> ImageTooLargeError:
        """The same as an error."""
        return ImageTooLargeError(f"at most {self._max_picture / 2**20:g} MB are allowed")

    def _is_ours(self, host: str) -> bool:
        name = _name_of(host)
        # Nobody can rebind a number, and which numbers a machine has is hard to know.
        return name in self._names or (self._is_open and _is_address(name))

    def _may_enter(self, path: str, shown: list[str]) -> bool:
        if self._key is None or path in OPEN_PATHS:
            return True
        # Bytes, because the comparison of texts raises for anything but ASCII.
        return len(shown) == 1 and hmac.compare_digest(_key_in(shown[0]), self._key)


class _Passage:
    """One request on its way through the guard."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self._guard = guard
        self._scope = scope
        self._receive = receive
        self._send = send
        self._started = time.monotonic()
        self._length = 0
        self._is_too_long = False
        self._status: int | None = None

    async def go(self, app: ASGIApp) -> None:
        refusal = self._guard.refusal(self._scope)
        try:
            if refusal is not None:
                await self._refuse(refusal)
                return
            try:
                await app(self._scope, self._counted, self._told)
            except Exception:
                if not self._is_too_long:
                    raise
            if self._is_too_long and self._status is None:
                await self._refuse(self._guard.too_long())
        finally:
            seconds = time.monotonic() - self._started
            self._guard.observe(self._scope, self._status or 500, seconds)

    async def _refuse(self, failure: Failure) -> None:
        answer = problems.response(failure, request_id(self._scope))
        answer.headers["Connection"] = "close"  # what is left of the body will not be read
        if failure.status == 401 and _shows_a_page(self._scope):
            # In a line of its own: browsers look at the first challenge of each.
            answer.headers.append("WWW-Authenticate", _ASK_THE_USER)
        await answer(self._scope, self._receive, self._hardened)

    async def _counted(self) -> Message:
        message = await self._receive()
        self._length += len(message.get("body", b""))
        if self._length > self._guard.max_body:
            self._is_too_long = True
            raise self._guard.too_long_error()
        return message

    async def _told(self, message: Message) -> None:
        """What the app answers; after too long a body that does not matter any more."""
        if not self._is_too_long or self._status is not None:
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
    """What was shown as the key: a bearer token or a password; nothing if it is neither."""
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


def _shows_a_page(scope: Scope) -> bool:
    """Whether the answer goes to the window of a browser, whose user can be asked for the key."""
    headers = Headers(scope=scope)
    is_page = "text/html" in headers.get("accept", "").lower()
    return scope["method"] == "GET" and (is_page or headers.get("sec-fetch-mode") == "navigate")


def _is_from_our_pages(method: str, host: str, headers: Headers) -> bool:
    """Whether a request is sent by a page of ours, or by no page at all."""
    origins = headers.getlist("origin")
    if origins:
        return all(_authority(origin) == host.lower() for origin in origins)
    # Reading is open to links from elsewhere: they show our answer to the user, not to the page.
    return method in _READING or headers.get("sec-fetch-site", "none") in _OWN_SITES


def _authority(origin: str) -> str | None:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") else None


def _name_of(host: str) -> str:
    """The name in a Host header, without port and brackets; nothing if it is malformed."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::\d+)?", host)
    return "" if match is None else (match[1] or match[2]).lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
