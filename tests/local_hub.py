"""A local hub on this machine: it lists and serves files, and fails as the real world does."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" * 6 + "c0ff"
LISTING = "the listing"


@dataclass
class Fault:
    """The faults of one request."""

    status: int = 0
    """Answer with this status and nothing else."""
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Break the connection after this many bytes."""
    stall_after: int | None = None
    """Send nothing more after this many bytes, until the hub closes."""
    go_on: threading.Event | None = None
    """Set: a stalled response gets the rest after all."""
    lengthen: int = 0
    """Announce this many bytes more than there are (and send them, if there are any)."""
    announce: bool = True
    """Whether to send the length of the response; if not, it ends with the connection."""
    flip: bool = False
    """Send the last byte wrong."""
    ranges: bool = True
    """Whether `Range` is supported."""
    compress: bool = False
    """Send it compressed, although the client did not request that."""
    body: bytes = b""


class Hub:
    """Repositories and their files; the requests, and the bytes of each file that were sent."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.faults: dict[str, Iterator[Fault]] = {}
        self.served: Counter[str] = Counter()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.closing = threading.Event()
        self.url = ""

    def fault(self, name: str) -> Fault:
        return next(self.faults.get(name, iter(())), Fault())

    def listing(self, repo: str) -> dict[str, Any]:
        siblings = []
        for path, content in self.repos[repo].items():
            about: dict[str, Any] = {"rfilename": path, "size": len(content)}
            header = b"blob %d\0" % len(content)
            about["blobId"] = hashlib.sha1(header + content).hexdigest()
            if path.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                about["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 134}
            siblings.append(about)
        return {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False}


def asked_by_default(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    """Make this process use the hub, like one that was started with its HF_ENDPOINT."""
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that were killed; other failures fail their test."""


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub on a free port of the loopback."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(60)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.requests.append((path, headers))
            match path.strip("/").split("/", 4):
                case ["api", "models", owner, name]:
                    self._list(f"{owner}/{name}")
                case ["cdn", owner, name, file]:
                    self._send_file(f"{owner}/{name}", file)
                case ["cdn", owner, name, first, rest]:
                    self._send_file(f"{owner}/{name}", f"{first}/{rest}")
                case [owner, name, "resolve", commit, file] if commit == COMMIT:
                    if file.endswith(".safetensors"):  # the real one stores them elsewhere
                        host = hub.url.replace("127.0.0.1", "localhost")
                        location = f"{host}/cdn/{owner}/{name}/{file}"
                        self._answer(Fault(302, {"Location": location}))
                    else:
                        self._send_file(f"{owner}/{name}", file)
                case _:
                    self._answer(Fault(404))

        def _list(self, repo: str) -> None:
            fault = hub.fault(LISTING)
            if fault.status:
                self._answer(fault)
            elif repo not in hub.repos:
                self._answer(Fault(404, {"X-Error-Code": "RepoNotFound"}))
            else:
                body = json.dumps(hub.listing(repo)).encode()
                self._answer(Fault(200, {"Content-Type": "application/json"}, body=body))

        def _answer(self, fault: Fault) -> None:
            self.send_response(fault.status)
            for name, value in fault.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(fault.body)))
            self.end_headers()
            self.wfile.write(fault.body)

        def _send_file(self, repo: str, file: str) -> None:
            fault = hub.fault(file)
            if fault.status:
                self._answer(fault)
                return
            content = hub.repos[repo][file]
            if fault.flip:
                content = content[:-1] + bytes([content[-1] ^ 1])
            if fault.compress:
                packed = gzip.compress(content)
                self._answer(Fault(200, {"Content-Encoding": "gzip"}, body=packed))
                return
            asked = self.headers.get("Range") if fault.ranges else None
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            body = content[start:]
            self.send_response(206 if asked else 200)
            if asked:
                end, size = len(content) - 1, len(content)
                self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
            if fault.announce:
                self.send_header("Content-Length", str(len(body) + fault.lengthen))
            else:
                self.send_header("Connection", "close")
            self.end_headers()
            stop = fault.cut_after if fault.cut_after is not None else fault.stall_after
            sent = body if stop is None else body[:stop]
            with contextlib.suppress(ConnectionError):
                self.wfile.write(sent)
                hub.served[file] += len(sent)
            if fault.go_on is not None:
                assert fault.go_on.wait(120), "the test never let it continue"
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body[len(sent) :])
                    hub.served[file] += len(body) - len(sent)
            elif fault.stall_after is not None:
                hub.closing.wait(120)
            if stop is not None or fault.lengthen:
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    return Handler
