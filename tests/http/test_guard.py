"""The guard stands before every route, and judges by the head of a request alone."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute

from conftest import MakeService
from fakes import FakeWorker
from http_server import guarded
from step1x_edit.interfaces.http.guard import WORK_PATHS, Guard
from step1x_edit.interfaces.http.metrics import Metrics
from step1x_edit.interfaces.http.rate_limit import RateLimit
from step1x_edit.interfaces.server import build_routes
from step1x_edit.service.service import EditService
from step1x_edit.settings import Settings

HOST = "127.0.0.1:8000"
KEY = "a-token-of-the-tests"
RIGHT = {"Authorization": f"Bearer {KEY}"}


def basic(user: str, password: str) -> dict[str, str]:
    """What a browser sends once its user has been asked."""
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


# Every route of the server. Add a new one once you have decided who may call it.
ROUTES = {
    "/": {"GET", "HEAD"},
    "/api/edit": {"POST"},
    "/api/gpu/offload": {"POST"},
    "/api/gpu/release": {"POST"},
    "/api/gpu/status": {"GET"},
    "/api/models": {"GET"},
    "/api/models/{name:path}/pull": {"DELETE", "POST"},
    "/assets/{path:path}": {"GET", "HEAD"},
    "/config": {"GET", "HEAD"},
    "/docs": {"GET", "HEAD"},
    "/docs/favicon.png": {"GET", "HEAD"},
    "/docs/start.js": {"GET", "HEAD"},
    "/docs/swagger-ui-bundle.js": {"GET", "HEAD"},
    "/docs/swagger-ui.css": {"GET", "HEAD"},
    "/favicon.ico": {"GET", "HEAD"},
    "/gradio_api/app_id": {"GET", "HEAD"},
    "/gradio_api/cancel": {"POST"},
    "/gradio_api/file={path:path}": {"GET", "HEAD"},
    "/gradio_api/heartbeat/{session_hash}": {"GET", "HEAD"},
    "/gradio_api/info": {"GET", "HEAD"},
    "/gradio_api/queue/data": {"GET", "HEAD"},
    "/gradio_api/queue/join": {"POST"},
    "/gradio_api/reset": {"POST"},
    "/gradio_api/upload": {"POST"},
    "/gradio_api/upload_progress": {"GET", "HEAD"},
    "/health": {"GET"},
    "/livez": {"GET"},
    "/manifest.json": {"GET", "HEAD"},
    "/mcp": set(),  # another protocol, any method
    "/metrics": {"GET"},
    "/openapi.json": {"GET", "HEAD"},
    "/readyz": {"GET"},
    "/static/{path:path}": {"GET", "HEAD"},
    "/theme.css": {"GET", "HEAD"},
    "/v1/images/edits": {"POST"},
    "/v1/images/edits/estimate": {"POST"},
    "/v1/images/generations": {"POST"},
    "/v1/recipes/read": {"POST"},
    "/v1/images/{image_id}/content": {"GET"},
    "/v1/jobs": {"GET", "POST"},
    "/v1/jobs/{job_id}": {"DELETE", "GET"},
    "/v1/jobs/{job_id}/cancel": {"POST"},
    "/v1/jobs/{job_id}/content": {"GET"},
    "/v1/jobs/{job_id}/events": {"GET"},
    "/v1/models": {"GET"},
    "/v1/models/{model}": {"GET"},
}
OF_THE_PAGE = {
    path
    for path in ROUTES
    if path.startswith(("/assets/", "/config", "/favicon", "/gradio_api/", "/manifest"))
    or path in ("/", "/theme.css", "/static/{path:path}")
}
ENDLESS = "/gradio_api/heartbeat/{session_hash}"
TAKES_A_BODY = {
    ("POST", path)
    for path in (
        "/api/edit",
        "/v1/images/edits",
        "/v1/images/edits/estimate",
        "/v1/images/generations",
        "/v1/jobs",
        "/v1/recipes/read",
    )
}
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW")


def settings(**chosen: object) -> Settings:
    return Settings(_env_file=None, **{"api_key": KEY, "rate_limit": 0, **chosen})  # type: ignore[arg-type]


class Answer:
    """What came back for a request, and how many pieces of its body were read for it."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.lines: list[tuple[str, str]] = []
        self.pieces_read = 0
        self.body = b""

    @property
    def problem(self) -> dict[str, Any]:
        problem: dict[str, Any] = json.loads(self.body)
        return problem

    def all(self, name: str) -> list[str]:
        """Every value of a header that may come more than once."""
        return [value for each, value in self.lines if each == name]


async def _pieces(given: Iterator[bytes] | AsyncIterable[bytes] | None) -> AsyncIterator[bytes]:
    if isinstance(given, AsyncIterable):
        async for piece in given:
            yield piece
    else:
        for piece in given or ():
            yield piece


async def ask(
    app: Guard,
    method: str,
    path: str,
    headers: Mapping[str, str] | list[tuple[str, str]] = {},  # noqa: B006 - never changed
    pieces: Iterator[bytes] | AsyncIterable[bytes] | None = None,
    host: str | None = HOST,
    client: str = "127.0.0.1",
) -> Answer:
    """Send a request as it is, with nothing that a client library would correct."""
    answer = Answer()
    given = list(headers.items() if isinstance(headers, Mapping) else headers)
    if host is not None:
        given.append(("host", host))
    raw_path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(raw_path),
        "raw_path": raw_path.encode("latin-1"),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("utf-8")) for name, value in given],
        "server": ("127.0.0.1", 8000),
        "client": (client, 50000),
    }
    remaining, is_over = _pieces(pieces), False

    async def receive() -> dict[str, Any]:
        nonlocal is_over
        if is_over:
            await asyncio.Event().wait()
        answer.pieces_read += 1
        piece = await anext(remaining, None)
        is_over = piece is None
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.lines = [
                (name.decode().lower(), value.decode("latin-1"))
                for name, value in message["headers"]
            ]
            answer.headers = dict(answer.lines)
        answer.body += message.get("body", b"")

    await app(scope, receive, send)
    return answer


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
def app(make_service: MakeService, worker: FakeWorker) -> Guard:
    return guarded(make_service(worker), settings())


# --- the census -----------------------------------------------------------------------------------


def found_routes(routes: list[BaseRoute], prefix: str = "") -> Iterator[tuple[str, set[str]]]:
    """Every route of an app and of all that is mounted in it."""
    for route in routes:
        path = prefix + getattr(route, "path", "")
        inner = getattr(route, "routes", None) or []
        if inner:
            yield from found_routes(inner, path)
            continue
        # An app that is the end of a route gets requests for this route only, as the MCP does.
        inside = getattr(getattr(route, "endpoint", None), "routes", None) or []
        assert {inner_path for inner_path, _ in found_routes(inside, prefix)} <= {path}
        yield path, set(getattr(route, "methods", None) or ())


def test_every_route_is_one_that_somebody_has_thought_about(make_service: MakeService) -> None:
    service = make_service()
    routes: FastAPI = build_routes(service, settings(), Metrics(service))

    found: dict[str, set[str]] = {}
    for path, methods in found_routes(routes.routes):
        found[path] = found.get(path, set()) | methods
    assert found == ROUTES


async def test_the_metrics_tell_routes_and_not_what_was_asked_for(
    make_service: MakeService, tmp_path: Path
) -> None:
    service = make_service()
    metrics = Metrics(service)
    chosen = settings(data_dir=tmp_path / "data", enable_mcp=False)
    routes = build_routes(service, chosen, metrics)
    app = Guard(routes, chosen, metrics.observe)
    async with routes.router.lifespan_context(routes):
        for pattern, methods in ROUTES.items():
            if pattern in (ENDLESS, "/mcp"):
                continue
            for method, name in product((*methods, "BREW"), ("secret", "secret/other.png")):
                await ask(app, method, re.sub(r"\{.*?\}", name, pattern), RIGHT)
        await ask(app, "GET", "/secret", RIGHT)
        await ask(app, "GET", "/secret")
        told = (await ask(app, "GET", "/metrics", RIGHT)).body.decode()

    labels = set(re.findall(r'step1x_http_requests_total\{path="([^"]*)"', told))
    assert labels == set(ROUTES) - {ENDLESS, "/mcp"} | {"other"}
    assert "secret" not in told


async def test_without_the_token_nothing_answers_but_that_the_process_lives(app: Guard) -> None:
    paths = set(ROUTES) | {"/", "/nope"}
    mutations = [
        path
        for one in paths
        for path in (
            one,
            f"/{one}",
            f"{one}/",
            f"{one}//",
            f"/.{one}",
            f"{one}/.",
            f"{one}/../livez",
            f"/livez/..{one}",
            f"/livez%2f..{one}",
            f"{one}?x=/livez",
            f"{one};/livez",
            f"{one}%20",
            f"{one}%00",
            one.upper(),
            one.replace("/", "/%2f", 1),
            one.replace("e", "%65"),
        )
    ]
    let_in = set()
    for method, path in product(METHODS, mutations):
        answer = await ask(app, method, path)
        if answer.status != 401:
            let_in.add(path.partition("?")[0].replace("%65", "e"))
        else:
            assert answer.headers["www-authenticate"] == "Bearer"

    assert len(mutations) >= 200
    assert let_in == {"/livez"}


async def test_the_token_opens_every_route(make_service: MakeService, tmp_path: Path) -> None:
    service = make_service()
    chosen = settings(data_dir=tmp_path / "data", enable_mcp=False)  # no method of which is known
    routes = build_routes(service, chosen, Metrics(service))
    app = Guard(routes, chosen)
    async with routes.router.lifespan_context(routes):
        for path, methods in ROUTES.items():
            if path in OF_THE_PAGE:  # test_ui opens it in a browser
                assert path == ENDLESS or (await ask(app, "GET", path, RIGHT)).status != 401
                continue
            for method in methods:
                answer = await ask(app, method, path, RIGHT)
                expected = 404 if "{" in path else 200
                if (method, path) in TAKES_A_BODY:
                    expected = 415
                assert answer.status == expected, (method, path)


async def test_no_name_in_an_address_is_more_than_not_found(
    make_service: MakeService, tmp_path: Path
) -> None:
    service = make_service()
    chosen = settings(data_dir=tmp_path / "data", enable_mcp=False)
    routes = build_routes(service, chosen, Metrics(service))
    app = Guard(routes, chosen)
    names = (
        "a" * 5000,
        "a/" * 3000,
        "%00",
        "a%00b",
        "%0a",
        "%ff",
        "%ed%a0%80",
        "..%2f..%2fa",
        "..",
    )
    async with routes.router.lifespan_context(routes):
        for pattern, methods in ROUTES.items():
            if "{" not in pattern or pattern == ENDLESS:
                continue
            for method, name in product(methods, names):
                path = re.sub(r"\{.*?\}", name, pattern)
                answer = await ask(app, method, path, RIGHT)
                assert 400 <= answer.status < 500, (method, path[:100])


# --- the token ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer ")],
        [("Authorization", f"Basic {KEY}")],
        [("Authorization", "Basic")],
        [("Authorization", "Basic 🔑")],
        [("Authorization", "Basic " + base64.b64encode(KEY.encode()).decode())],
        [("Authorization", "Basic " + base64.b64encode(b"user:").decode())],
        [("Authorization", "Basic " + base64.b64encode(b"user:\xff").decode())],
        [("Authorization", "Bearer " + base64.b64encode(f":{KEY}".encode()).decode())],
        [*basic("user", f"{KEY}x").items()],
        [*basic("user", KEY[:-1]).items()],
        [*basic(KEY, "").items()],
        [("Authorization", KEY)],
        [("Authorization", f"Bearer {KEY}x")],
        [("Authorization", f"Bearer {KEY[:-1]}")],
        [("Authorization", f"Bearer {KEY.upper()}")],
        [("Authorization", f"Bearer {KEY} {KEY}")],
        [("Authorization", "Bearer 🔑")],
        [("Authorization", "Bearer " + "x" * 60_000)],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer wrong")],
        [("X-Api-Key", KEY)],
        [("Cookie", f"token={KEY}")],
    ],
    ids=lambda headers: repr(headers)[:50],
)
async def test_nothing_but_the_token_is_the_token(
    app: Guard, headers: list[tuple[str, str]]
) -> None:
    refused = await ask(app, "GET", f"/api/gpu/status?token={KEY}", headers)

    assert refused.status == 401
    assert refused.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_token_is_taken(app: Guard, scheme: str) -> None:
    answer = await ask(app, "GET", "/api/gpu/status", {"Authorization": f"{scheme} {KEY}"})

    assert answer.status == 200


@pytest.mark.parametrize("user", ["", "step1x", "Zoë", KEY])
async def test_the_token_is_taken_as_the_password_of_anybody(app: Guard, user: str) -> None:
    answer = await ask(app, "GET", "/api/gpu/status", basic(user, KEY))

    assert answer.status == 200


@pytest.mark.parametrize(
    ("method", "headers", "is_asked"),
    [
        ("GET", {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}, True),
        ("GET", {"Accept": "*/*", "Sec-Fetch-Mode": "navigate"}, True),
        ("GET", {"Accept": "text/html", **basic("user", "wrong")}, True),
        ("GET", {"Accept": "*/*"}, False),
        ("GET", {"Accept": "application/json", "Sec-Fetch-Mode": "cors"}, False),
        ("GET", {}, False),
        ("POST", {"Accept": "text/html", "Sec-Fetch-Mode": "navigate"}, False),
    ],
)
async def test_only_the_user_of_a_browser_is_asked_for_a_password(
    app: Guard, method: str, headers: dict[str, str], is_asked: bool
) -> None:
    answer = await ask(app, method, "/docs", headers)

    asking = ["Bearer", 'Basic realm="step1x-edit", charset="UTF-8"']
    assert answer.status == 401
    assert answer.all("www-authenticate") == asking[: 1 + is_asked]


async def test_without_a_key_none_is_asked_for(make_service: MakeService) -> None:
    app = guarded(make_service(), settings(api_key=None))

    assert (await ask(app, "GET", "/api/gpu/status")).status == 200


# --- Host and Origin ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "host", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.0.0.1", "LOCALHOST", 200),
        ("127.0.0.1", "[::1]:8000", 200),
        ("127.0.0.1", "evil.example", 421),
        ("127.0.0.1", "127.0.0.1.evil.example", 421),
        ("127.0.0.1", "localhost.evil.example:8000", 421),
        ("127.0.0.1", "evil.example@127.0.0.1", 421),
        ("127.0.0.1", "127.0.0.1:8000:8000", 421),
        ("127.0.0.1", "192.168.1.5", 421),
        ("127.0.0.1", "[::1", 421),
        ("127.0.0.1", "", 421),
        ("127.0.0.1", None, 421),
        ("0.0.0.0", "192.168.1.5:8000", 200),
        ("0.0.0.0", "[fe80::1]:8000", 200),
        ("0.0.0.0", "localhost:8000", 200),
        ("0.0.0.0", "evil.example", 421),
        ("pictures.example", "pictures.example", 200),
        ("pictures.example", "other.example", 421),
    ],
)
async def test_the_host_has_to_be_a_name_of_ours(
    make_service: MakeService, bound: str, host: str | None, status: int
) -> None:
    app = guarded(make_service(), settings(host=bound))
    answer = await ask(app, "GET", "/livez", host=host)

    assert answer.status == status


@pytest.mark.parametrize(
    ("headers", "method", "status"),
    [
        ({}, "POST", 415),
        ({"Origin": "http://127.0.0.1:8000"}, "POST", 415),
        ({"Origin": "HTTP://127.0.0.1:8000"}, "POST", 415),
        ({"Origin": "https://127.0.0.1:8000"}, "POST", 415),  # behind a proxy with a certificate
        ({"Origin": "http://127.0.0.1:7000"}, "POST", 403),
        ({"Origin": "http://127.0.0.1"}, "POST", 403),
        ({"Origin": "http://localhost:8000"}, "POST", 403),
        ({"Origin": "http://evil.example"}, "POST", 403),
        ({"Origin": "http://evil.example"}, "GET", 403),
        ({"Origin": "http://evil.example"}, "OPTIONS", 403),
        ({"Origin": "null"}, "POST", 403),
        ({"Origin": ""}, "POST", 403),
        ({"Origin": "file://127.0.0.1:8000"}, "POST", 403),
        ({"Origin": "http://[127.0.0.1:8000"}, "POST", 403),
        ({"Sec-Fetch-Site": "same-origin"}, "POST", 415),
        ({"Sec-Fetch-Site": "none"}, "POST", 415),
        ({"Sec-Fetch-Site": "same-site"}, "POST", 403),
        ({"Sec-Fetch-Site": "cross-site"}, "POST", 403),
        ({"Sec-Fetch-Site": "cross-site"}, "GET", 405),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1:8000"}, "POST", 415),
    ],
)
async def test_pages_of_others_start_nothing(
    app: Guard, headers: dict[str, str], method: str, status: int
) -> None:
    answer = await ask(app, method, "/api/edit", {**RIGHT, **headers})

    assert answer.status == status
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data; boundary=b", "application/x-www-form-urlencoded", "text/plain"],
)
@pytest.mark.parametrize("path", [path for path in ROUTES if "POST" in ROUTES[path]] + ["/mcp"])
async def test_a_form_of_another_site_starts_nothing_and_is_not_read(
    make_service: MakeService, path: str, content_type: str
) -> None:
    worker = FakeWorker()
    app = guarded(make_service(worker), settings(api_key=None))
    headers = {"Content-Type": content_type, "Origin": "http://evil.example"}
    answer = await ask(app, "POST", path, headers, iter([b"--b--"]))

    assert (answer.status, answer.pieces_read) == (403, 0)
    assert worker.started == []


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("path", [path for path in ROUTES if "POST" in ROUTES[path]] + ["/mcp"])
async def test_a_browser_that_knows_the_password_starts_nothing_for_other_sites(
    make_service: MakeService, tmp_path: Path, path: str, site: str
) -> None:
    """Browsers add the password by themselves, also to what a page of somebody else sends."""
    worker = FakeWorker()
    app = guarded(make_service(worker), settings(data_dir=tmp_path / "data"))
    sent = {**basic("user", KEY), "Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    async with lifespan(app):
        posted = await ask(app, "POST", path, {**sent, **form}, iter([b"--b--"]))
        named = await ask(app, "POST", path, {**sent, **form, "Origin": "null"}, iter([b"--b--"]))
        followed = await ask(app, "GET", f"{path}?prompt=x&_method=POST", sent)

    assert (posted.status, posted.pieces_read) == (403, 0)
    assert (named.status, named.pieces_read) == (403, 0)
    assert followed.status in (404, 405, 406, 422)
    assert worker.started == []


@pytest.mark.parametrize(
    ("headers", "host", "status"),
    [
        ({}, "evil.example", 421),
        ({**RIGHT, "Origin": "null"}, HOST, 403),
        ({}, HOST, 401),
        ({**RIGHT, "Content-Length": str(2**40)}, HOST, 413),
        ({**RIGHT, "Content-Length": "-1"}, HOST, 413),
        ({**RIGHT, "Content-Length": "1e3"}, HOST, 413),
        ({**RIGHT, "Content-Length": "9" * 5000}, HOST, 413),
        ({**RIGHT, "Content-Encoding": "gzip"}, HOST, 415),
    ],
)
@pytest.mark.parametrize("path", ["/api/edit", "/mcp", "/nope"])
async def test_what_is_refused_is_refused_before_its_body_is_read(
    app: Guard, path: str, headers: dict[str, str], host: str, status: int
) -> None:
    answer = await ask(app, "POST", path, headers, iter([b"x" * 1000] * 10), host)

    assert (answer.status, answer.pieces_read) == (status, 0)
    assert answer.headers["connection"] == "close"
    assert answer.headers["content-type"] == "application/problem+json"


# --- names that the operator gives ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("pictures.example", 200),
        ("PICTURES.example:8443", 200),
        ("other.example", 200),
        ("localhost", 200),
        ("evil.example", 421),
        ("sub.pictures.example", 421),
    ],
)
async def test_a_proxy_may_call_the_server_by_the_names_it_is_given(
    make_service: MakeService, host: str, status: int
) -> None:
    chosen = settings(allowed_hosts="pictures.example, other.example")
    answer = await ask(guarded(make_service(), chosen), "GET", "/livez", host=host)

    assert answer.status == status


PAGE = {"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
ASKING = {
    **PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


@pytest.fixture
def shared(make_service: MakeService) -> Guard:
    """A server that pages of another site may use."""
    return guarded(make_service(), settings(allowed_origins="https://app.example"))


async def test_a_page_of_a_named_site_may_ask_first_and_then_call(shared: Guard) -> None:
    asked = await ask(shared, "OPTIONS", "/api/edit", ASKING)
    read = await ask(shared, "GET", "/api/gpu/status", {**RIGHT, **PAGE})

    assert (asked.status, read.status) == (200, 200)
    for answer in (asked, read):
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-credentials" not in answer.headers
        assert "origin" in answer.headers["vary"].lower()
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert "authorization" in asked.headers["access-control-allow-headers"].lower()
    exposed = read.headers["access-control-expose-headers"].split(", ")
    assert {"X-Seed", "X-Changed-Share"} <= set(exposed)


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("POST", {**PAGE}, 401),  # named or not, a page has to have the key
        ("OPTIONS", {**PAGE}, 401),
        ("OPTIONS", {**ASKING, "Access-Control-Request-Method": "BREW"}, 400),
        ("OPTIONS", {**ASKING, "Origin": "https://evil.example"}, 403),
        ("OPTIONS", {**ASKING, "Origin": "http://app.example"}, 403),
        ("OPTIONS", {**ASKING, "Origin": "https://app.example:444"}, 403),
        ("OPTIONS", {**ASKING, "Origin": "https://app.example.evil.example"}, 403),
        ("POST", {**RIGHT, **PAGE, "Origin": "https://evil.example"}, 403),
        ("POST", {**RIGHT, **PAGE, "Origin": "null"}, 403),
    ],
)
async def test_a_named_site_opens_nothing_else(
    shared: Guard, method: str, headers: dict[str, str], status: int
) -> None:
    answer = await ask(shared, method, "/api/edit", headers)

    assert answer.status == status


# --- how often ------------------------------------------------------------------------------------


class Clock:
    """A time that stands still until it is moved."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time


def limited(service: EditService, clock: Clock, **chosen: object) -> Guard:
    given = settings(**{"rate_limit": 60, **chosen})
    return Guard(build_routes(service, given, Metrics(service)), given, now=clock.now)


STARTED = 415  # the answer to an edit without a form, which the guard let through


async def post(app: Guard, path: str = "/api/edit", **headers: str) -> int:
    return (await ask(app, "POST", path, {**RIGHT, **headers})).status


async def test_work_may_be_started_so_often_and_not_more(make_service: MakeService) -> None:
    clock = Clock()
    app = limited(make_service(), clock)
    at_once = [await post(app) for _ in range(21)]
    clock.time += 0.999
    too_early = await post(app)
    clock.time += 0.001
    in_time = [await post(app), await post(app)]
    clock.time += 2.5
    later = [await post(app) for _ in range(3)]
    clock.time += 3600
    rested = [await post(app) for _ in range(21)]

    assert at_once == [STARTED] * 20 + [429]
    assert (too_early, in_time, later) == (429, [STARTED, 429], [STARTED, STARTED, 429])
    assert rested == [STARTED] * 20 + [429]


async def test_who_is_refused_hears_when_to_come_back(make_service: MakeService) -> None:
    clock = Clock()
    app = limited(make_service(), clock, rate_limit=3)  # one at once, then one in twenty seconds
    await post(app)
    clock.time += 4.5
    refused = await ask(app, "POST", "/api/edit", RIGHT, iter([b"x" * 1000] * 10))

    assert (refused.status, refused.pieces_read) == (429, 0)
    assert refused.headers["retry-after"] == "16"
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.problem["code"] == "rate_limited"
    assert "RATE_LIMIT" in refused.problem["detail"]


async def test_the_limit_is_for_callers_and_not_for_what_they_say_of_themselves(
    make_service: MakeService,
) -> None:
    app = limited(make_service(), Clock(), rate_limit=3)
    first = await post(app)
    again = [
        await post(app, **{"X-Forwarded-For": f"192.0.2.{number}", "Forwarded": "for=192.0.2.1"})
        for number in range(5)
    ]

    assert (first, again) == (STARTED, [429] * 5)


async def test_without_a_key_each_address_has_its_own_limit(make_service: MakeService) -> None:
    app = limited(make_service(), Clock(), rate_limit=3, api_key=None)
    statuses = [
        (await ask(app, "POST", "/api/edit", client=client)).status
        for client in ("127.0.0.1", "127.0.0.2", "127.0.0.1", "127.0.0.2", "127.0.0.3")
    ]

    assert statuses == [STARTED, STARTED, 429, 429, STARTED]


async def test_only_what_starts_work_is_counted(make_service: MakeService) -> None:
    app = limited(make_service(), Clock(), rate_limit=3)
    looking = [
        (await ask(app, "GET", path, RIGHT)).status
        for path in ("/api/gpu/status", "/health", "/livez", "/metrics") * 30
    ]
    moving = [await post(app, "/api/gpu/offload") for _ in range(10)]
    strangers = [(await ask(app, "POST", "/api/edit")).status for _ in range(30)]
    mine = [await post(app) for _ in range(2)]

    assert set(looking) == set(moving) == {200}
    assert set(strangers) == {401}  # refused callers do not use up the limit of others
    assert mine == [STARTED, 429]


@pytest.mark.parametrize("path", sorted(WORK_PATHS))
async def test_every_route_that_starts_work_is_counted(
    make_service: MakeService, path: str
) -> None:
    app = limited(make_service(), Clock(), rate_limit=3)

    assert [(await post(app, path)) == 429 for _ in range(2)] == [False, True]


async def test_zero_is_no_limit(make_service: MakeService) -> None:
    app = limited(make_service(), Clock(), rate_limit=0)

    assert [await post(app) for _ in range(200)] == [STARTED] * 200


class Caller(str):
    """A text of which a test can see whether somebody still keeps it."""


async def test_many_callers_are_not_remembered_for_ever() -> None:
    clock = Clock()
    limit = RateLimit(60, clock.now)
    seen = []
    for number in range(5000):
        caller = Caller(number)
        seen.append(weakref.ref(caller))
        limit.spend(caller)
        clock.time += 2

    assert 0 < sum(caller() is not None for caller in seen) <= 1001


# --- bodies and answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/edit", "/mcp"])
async def test_a_body_without_a_length_is_counted_while_it_is_read(
    make_service: MakeService, path: str
) -> None:
    piece = b"x" * 2**16
    allowed = 3 * 2**20 // len(piece)  # one megabyte each for picture, mask and the form around
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    guard = guarded(make_service(max_upload_mb=1), settings(max_upload_mb=1))
    headers = {**RIGHT, "Content-Type": "multipart/form-data; boundary=b"}
    if path == "/mcp":
        headers |= {
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
        }

    async with lifespan(guard):
        pieces = iter([head, *[piece] * 1000])
        answer = await ask(guard, "POST", path, headers, pieces)

    assert answer.pieces_read <= allowed + 2
    assert answer.status == 413


JSON_WITHOUT_PICTURES = [
    "/v1/images/generations",
    "/v1/images/edits/estimate",
    "/v1/jobs",
    "/gradio_api/cancel",
    "/gradio_api/queue/join",
    "/gradio_api/reset",
]


async def test_json_that_can_hold_no_picture_has_at_most_a_mebibyte(
    make_service: MakeService, tmp_path: Path
) -> None:
    piece = b" " * 2**16
    guard = guarded(make_service(), settings(data_dir=tmp_path / "data", enable_mcp=False))
    headers = {**RIGHT, "Content-Type": "application/json"}
    told_length = {"Content-Length": str(100 * len(piece))}

    async with lifespan(guard):
        for path in JSON_WITHOUT_PICTURES:
            told = await ask(guard, "POST", path, headers | told_length, iter([piece] * 100))
            counted = await ask(guard, "POST", path, headers, iter([piece] * 100))

            assert told.status == counted.status == 413, path
            assert told.pieces_read == 0
            assert counted.pieces_read <= 17
            for answer in (told, counted):
                error = answer.problem.get("error", answer.problem)
                assert error["code"] == "content_too_large"
                assert "A body without a picture may have at most 1 MiB" in answer.body.decode()


async def test_json_of_very_many_parts_is_refused_while_it_arrives(
    make_service: MakeService, tmp_path: Path
) -> None:
    """Sixty megabytes of empty lists would be twenty million objects."""
    guard = guarded(make_service(), settings(data_dir=tmp_path / "data", enable_mcp=False))
    headers = {**RIGHT, "Content-Type": "application/json"}

    async with lifespan(guard):
        for path in ("/v1/images/edits", *JSON_WITHOUT_PICTURES):
            pieces = iter([b'{"prompt":[[]', *[b",[]" * 2**14] * 1000])
            answer = await ask(guard, "POST", path, headers, pieces)

            assert answer.status in (400, 422), path
            assert answer.pieces_read <= 3
            assert "more than 20000 commas and brackets" in answer.body.decode()


@pytest.mark.parametrize("start", [b'{"prompt":"', b'{"n":1', b'{"image":"', b""])
async def test_json_has_at_most_a_mebibyte_beside_its_pictures(
    make_service: MakeService, tmp_path: Path, start: bytes
) -> None:
    """Parsing stops the server for a third of a second if one text or number has 60 MB."""
    guard = guarded(make_service(), settings(data_dir=tmp_path / "data", enable_mcp=False))
    headers = {**RIGHT, "Content-Type": "application/json"}
    pieces = iter([start, *[b"1" * 2**16] * 1000])

    async with lifespan(guard):
        answer = await ask(guard, "POST", "/v1/images/edits", headers, pieces)

    assert answer.status == 400
    assert answer.pieces_read <= 18
    assert "more than 1 MiB beside its pictures" in answer.body.decode()


@pytest.mark.parametrize("tells_its_length", [True, False])
async def test_bodies_find_room_beside_each_other_or_are_refused(
    make_service: MakeService, tells_its_length: bool
) -> None:
    """Eight of the longest are read at a time; more would be memory that nobody has counted."""
    app = guarded(make_service(max_upload_mb=1), settings(max_upload_mb=1))
    size = 3 * 2**20  # a picture, its mask, and what comes around them
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    all_wait, enough, waiting = asyncio.Event(), asyncio.Event(), itertools.count(1)

    async def slow_body() -> AsyncIterator[bytes]:
        yield head
        yield b"x" * (size - len(head))
        if next(waiting) == 8:
            all_wait.set()
        await enough.wait()

    form = {**RIGHT, "Content-Type": "multipart/form-data; boundary=b"}
    told = {"Content-Length": str(size)} if tells_its_length else {}
    slow = [
        asyncio.ensure_future(ask(app, "POST", "/api/edit", form | told, slow_body()))
        for _ in range(8)
    ]
    await asyncio.wait_for(all_wait.wait(), 60)
    ninth = await ask(app, "POST", "/api/edit", form, iter([head, b"x" * 1000]))
    looking = await ask(app, "GET", "/api/gpu/status", RIGHT)
    enough.set()
    ended = [answer.status for answer in await asyncio.gather(*slow)]
    later = await ask(app, "POST", "/api/edit", form, iter([head, b"x" * 1000]))

    assert (ninth.status, ninth.problem["code"]) == (503, "queue_full")
    assert int(ninth.headers["retry-after"]) > 0
    assert looking.status == 200
    assert ended == [422] * 8
    assert later.status == 422  # the form has no end; but there was room for it


class lifespan:  # noqa: N801 - reads like a function
    """The life of an app around some requests to it."""

    def __init__(self, app: Guard) -> None:
        self._app = app
        self._inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        self._outbox: asyncio.Queue[Any] = asyncio.Queue()

    async def __aenter__(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._task = asyncio.ensure_future(self._app(scope, self._inbox.get, self._outbox.put))
        await self._inbox.put({"type": "lifespan.startup"})
        assert (await self._outbox.get())["type"] == "lifespan.startup.complete"

    async def __aexit__(self, *_: object) -> None:
        await self._inbox.put({"type": "lifespan.shutdown"})
        assert (await self._outbox.get())["type"] == "lifespan.shutdown.complete"
        await self._task


@pytest.mark.parametrize("path", [*sorted(ROUTES.keys() - {ENDLESS}), "/nope"])
async def test_every_answer_keeps_browsers_from_guessing_and_storing(
    make_service: MakeService, path: str
) -> None:
    app = guarded(make_service(), settings())
    method = "POST" if "POST" in ROUTES.get(path, ()) else "GET"
    async with lifespan(app):
        answer = await ask(app, method, path, RIGHT)

    is_part_of_the_page = path in OF_THE_PAGE or (
        path.startswith("/docs/") and path != "/docs/start.js"
    )
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert ("no-store" in answer.headers["cache-control"]) or is_part_of_the_page
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert len(answer.headers["x-request-id"]) == 16
    assert "server" not in answer.headers


async def test_websockets_are_refused(app: Guard) -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "websocket", "path": "/mcp", "headers": []}, None, send)  # type: ignore

    assert sent == [{"type": "websocket.close", "code": 1008}]
