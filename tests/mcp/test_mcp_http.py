"""MCP over HTTP, byte by byte: a client that goes away takes its edit along, in both eras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from conftest import MakeService
from fakes import FakeWorker, Gate
from http_server import TOKEN, listening, until

HEADERS = {
    "Authorization": f"Bearer {TOKEN}",
    "Accept": "application/json, text/event-stream",
}
CLIENT = {"name": "test", "version": "1"}
HELLO = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": CLIENT},
}


def call(photo: Path, meta: dict[str, Any]) -> dict[str, Any]:
    arguments = {"image_path": str(photo), "prompt": "x", "num_steps": 50}
    params = {"name": "edit_image", "arguments": arguments, "_meta": {"progressToken": 1, **meta}}
    return {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": params}


def legacy(client: httpx2.Client, photo: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A call of the older revisions, in a separate session."""
    hello = client.post("/mcp", json=HELLO)
    headers = {
        "Mcp-Session-Id": hello.headers["Mcp-Session-Id"],
        "MCP-Protocol-Version": "2025-11-25",
    }
    client.post(
        "/mcp", json={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=headers
    ).raise_for_status()
    return call(photo, {}), headers


def modern(client: httpx2.Client, photo: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A call of the revision without sessions."""
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": CLIENT,
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    headers = {
        "MCP-Protocol-Version": "2026-07-28",
        "Mcp-Method": "tools/call",
        "Mcp-Name": "edit_image",
    }
    return call(photo, meta), headers


@pytest.mark.parametrize("era", [legacy, modern])
def test_a_connection_that_is_lost_stops_the_edit(
    make_service: MakeService, photo: Path, era: Any
) -> None:
    worker, gate = FakeWorker(), Gate(at_step=4)
    worker.before_step = gate
    service = make_service(worker)
    with listening(service) as url:
        with httpx2.Client(
            base_url=url.removesuffix("/mcp"), headers=HEADERS, timeout=240, trust_env=False
        ) as client:
            message, headers = era(client, photo)
            with client.stream("POST", "/mcp", json=message, headers=headers) as answer:
                assert answer.status_code == 200
                lines = answer.iter_lines()  # without a name it would be closed after the first
                assert next(lines)
                assert gate.reached.wait(60)
        until(lambda: service.outcomes.get("cancelled") == 1)
        gate.open()
        until(lambda: bool(worker.stopped_at))

    assert worker.stopped_at == {"x": 4}
    assert [path.name for path in photo.parent.iterdir()] == ["photo.png"]


NO_MESSAGES = (
    b"{",
    b"",
    b"\xff\xfe",
    b'"\\ud83c"',
    b"[]",
    b"7",
    b"{}",
    b'{"jsonrpc": "1.0", "id": 1, "method": "ping"}',
    b'{"jsonrpc": "2.0", "id": {}, "method": "ping"}',
    b'{"jsonrpc": "2.0", "id": 1, "method": 7}',
    b'{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": [1]}',
    b'{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": 7}}',
)


@pytest.mark.parametrize("revision", ["2025-11-25", "2026-07-28"])
def test_a_body_that_is_no_message_is_refused_in_one_sentence(
    make_service: MakeService, revision: str
) -> None:
    headers = {
        **HEADERS,
        "Content-Type": "application/json",
        "MCP-Protocol-Version": revision,
    }
    with listening(make_service()) as url:
        answers = [
            httpx2.post(url, content=body, headers=headers, trust_env=False, timeout=240)
            for body in NO_MESSAGES
        ]

    for body, answer in zip(NO_MESSAGES, answers, strict=True):
        assert answer.status_code == 400, body
        assert int(answer.headers["content-length"]) == len(answer.content)
        sentence = answer.json()["error"]["message"]
        assert len(sentence) < 200
        for text in ("\n", "alidation error", "pydantic", "JSONRPC", "line 1", "type="):
            assert text not in sentence


def test_a_body_with_very_many_parts_is_refused_before_it_is_parsed(
    make_service: MakeService,
) -> None:
    headers = {**HEADERS, "Content-Type": "application/json"}
    body = b'{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": {"x": [%s[]]}}' % (
        b"[]," * 60_000
    )
    with listening(make_service()) as url:
        many = httpx2.post(url, content=body, headers=headers, trust_env=False, timeout=240)
        long = httpx2.post(
            url, content=b" " * 2**22 + b"1", headers=headers, trust_env=False, timeout=240
        )

    assert many.status_code == 400
    assert many.json()["error"]["message"].startswith("Invalid request: more than 100000 commas")
    assert long.status_code == 413
    assert long.json()["detail"] == "A body without a picture may have at most 4 MiB."
