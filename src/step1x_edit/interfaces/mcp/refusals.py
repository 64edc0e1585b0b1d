"""Answers over HTTP to a body that is not a message of MCP.

The library answers with the whole text of its parser or validator, whose classes and lines mean
nothing to a client. Here such an answer becomes one sentence. The library parses on the event loop,
so a body with too many parts, which would block it, is refused first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from mcp_types import INVALID_REQUEST, PARSE_ERROR
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from step1x_edit.errors import InvalidParameterError
from step1x_edit.interfaces import json_bodies

MAX_MARKS: Final = 100_000
"""Commas and opening brackets in a message: the largest batch with a long prompt for each picture.
Parsing that many takes less than 100 ms."""

_BAD_REQUEST: Final = 400
_SENTENCES: Final[Mapping[str, tuple[int, str]]] = {
    "Parse error:": (PARSE_ERROR, "Parse error: the body is not JSON in UTF-8"),
    "Validation error:": (
        INVALID_REQUEST,
        "Invalid request: the body must be one message of JSON-RPC 2.0, an object with jsonrpc, "
        "method, params as an object, and an id if it is a request",
    ),
}
"""Our code and sentence, by the beginning of the library's."""


class OneSentence:
    """An application that refuses malformed messages in one sentence."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            try:
                body = await json_bodies.read_text(Request(scope, receive), MAX_MARKS)
            except InvalidParameterError:
                await _refusal()(scope, receive, send)
                return
            receive = json_bodies.given_again(body, receive)
        held: Message | None = None  # the start of a refusal, until its body is known

        async def answer(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and message["status"] == _BAD_REQUEST:
                held = message
                return
            if held is not None:
                body = _in_one_sentence(message.get("body", b""))
                headers = MutableHeaders(raw=list(held["headers"]))
                headers["Content-Length"] = str(len(body))
                await send({**held, "headers": headers.raw})
                message, held = {**message, "body": body}, None
            await send(message)

        await self._app(scope, receive, answer)


def _refusal() -> JSONResponse:
    sentence = f"Invalid request: more than {MAX_MARKS} commas and brackets; send less at once"
    error = {"code": INVALID_REQUEST, "message": sentence}
    return JSONResponse({"jsonrpc": "2.0", "id": None, "error": error}, _BAD_REQUEST)


def _in_one_sentence(body: bytes) -> bytes:
    try:
        answer: dict[str, Any] = json.loads(body)
        message: str = answer["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return body
    for beginning, (code, sentence) in _SENTENCES.items():
        if message.startswith(beginning):
            answer["error"] = {"code": code, "message": sentence}
            return json.dumps(answer).encode()
    return body
