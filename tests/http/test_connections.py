"""Clients that keep the server waiting are dropped and do not block others, on real sockets."""

from __future__ import annotations

import contextlib
import io
import socket
import sys
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
from PIL import Image

from conftest import MakeService
from fakes import FakeWorker, Gate
from http_server import TOKEN, serving, until

HEAD = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n"
POST = (
    f"POST /api/edit HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
    "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n"
).encode()


@contextlib.contextmanager
def connected(url: str, sent: bytes = b"", host: str | None = None) -> Iterator[socket.socket]:
    """A connection on which something has been sent; reading from it fails after a minute."""
    parts = urlsplit(url)
    assert parts.port is not None
    with socket.create_connection((host or parts.hostname, parts.port), 60) as connection:
        connection.sendall(sent)
        yield connection


def rest_of(connection: socket.socket) -> bytes:
    """All that still comes, up to the end of the connection."""
    pieces = []
    with contextlib.suppress(ConnectionError):  # an end as well
        while piece := connection.recv(2**16):
            pieces.append(piece)
    return b"".join(pieces)


class Dripping:
    """Sends a byte now and then for as long as the connection lasts."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._drip, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(60)

    def _drip(self) -> None:
        with contextlib.suppress(OSError):
            while not self._is_over.wait(0.1):
                self._connection.sendall(b"x")


# --- how long -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"G", HEAD, HEAD + b"X-Long: "], ids=repr)
def test_a_head_that_does_not_arrive_ends_the_connection(
    make_service: MakeService, sent: bytes
) -> None:
    with serving(make_service(), receive_timeout=1) as url, connected(url, sent) as connection:
        assert rest_of(connection) == b""


def test_a_head_that_drips_ends_the_connection(make_service: MakeService) -> None:
    sent = HEAD + b"X-Long: "
    with (
        serving(make_service(), receive_timeout=1) as url,
        connected(url, sent) as connection,
        Dripping(connection),
    ):
        assert rest_of(connection) == b""


def test_a_second_head_that_drips_ends_the_connection(make_service: MakeService) -> None:
    sent = HEAD + b"\r\n" + HEAD + b"X-Long: "
    with (
        serving(make_service(), receive_timeout=1) as url,
        connected(url, sent) as connection,
        Dripping(connection),
    ):
        assert rest_of(connection).count(b"HTTP/1.1 200") == 1


def test_a_connection_that_is_kept_for_nothing_is_closed(make_service: MakeService) -> None:
    with (
        serving(make_service(), receive_timeout=1) as url,
        connected(url, HEAD + b"\r\n") as connection,
    ):
        assert rest_of(connection).endswith(b"ok\n")


def test_a_body_that_does_not_arrive_is_told_so(make_service: MakeService) -> None:
    with serving(make_service(), receive_timeout=1) as url, connected(url, POST) as connection:
        answer = rest_of(connection)

    assert answer.startswith(b"HTTP/1.1 408")
    assert b"application/problem+json" in answer
    assert b"within 1 s (RECEIVE_TIMEOUT)" in answer


@pytest.mark.parametrize("path", [b"/api/edit", b"/v1/jobs", b"/mcp"])
def test_a_body_that_drips_is_told_so_at_every_door(make_service: MakeService, path: bytes) -> None:
    sent = POST.replace(b"/api/edit", path)
    begun = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
    if path == b"/mcp":
        begun = b"{"
        sent = sent.replace(b"multipart/form-data; boundary=b", b"application/json")
        sent = sent.replace(b"\r\n\r\n", b"\r\nAccept: application/json, text/event-stream\r\n\r\n")
    with (
        serving(make_service(), receive_timeout=1) as url,
        connected(url, sent + begun) as connection,
        Dripping(connection),
    ):
        assert rest_of(connection).startswith(b"HTTP/1.1 408")


def test_a_body_that_nobody_waits_for_does_not_keep_the_connection(
    make_service: MakeService,
) -> None:
    """The answer does not need the body, and is there before it."""
    sent = POST.replace(b"/api/edit", b"/api/gpu/offload")
    with (
        serving(make_service(), receive_timeout=1) as url,
        connected(url, sent) as connection,
        Dripping(connection),
    ):
        assert rest_of(connection).startswith(b"HTTP/1.1 200")


def test_an_edit_may_take_longer_than_its_request(make_service: MakeService) -> None:
    """The deadlines are for the caller; the caller waits for us as long as it takes."""
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    picture = np.zeros((32, 32, 3), np.uint8)
    with serving(make_service(worker), receive_timeout=1) as url:
        answers: list[httpx2.Response] = []

        def edit() -> None:
            answers.append(post_picture(url, picture))

        editing = threading.Thread(target=edit, daemon=True)
        editing.start()
        assert gate.reached.wait(60)
        with connected(url) as connection:  # whose own deadlines have passed when it is closed
            rest_of(connection)
        with connected(url) as connection:
            rest_of(connection)
        gate.open()
        editing.join(60)

    assert [answer.status_code for answer in answers] == [200]


def post_picture(url: str, pixels: np.ndarray, accept: str = "image/png") -> httpx2.Response:
    return httpx2.post(
        f"{url}/api/edit",
        files={"file": png(pixels)},
        data={"prompt": "x", "num_steps": "10"},
        headers={"Authorization": f"Bearer {TOKEN}", "Accept": accept},
        timeout=240,
    )


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def test_an_answer_that_nobody_reads_ends_the_connection(make_service: MakeService) -> None:
    """It is larger than what the kernel takes for the caller; the server must not hold the rest."""
    data = png(np.zeros((3000, 3000, 3), np.uint8))
    form = (
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        + data
        + b"\r\n--b--\r\n"
    )
    sent = POST.replace(b"100000", str(len(form)).encode())
    sent = sent.replace(b"\r\n\r\n", b"\r\nAccept: image/bmp\r\n\r\n")
    with (
        serving(make_service(), receive_timeout=1) as url,
        connected(url, sent + form) as connection,
    ):
        first = connection.recv(2**16)  # it has been edited
        until(lambda: is_reset(connection))
        answer = first + rest_of(connection)

    assert answer.startswith(b"HTTP/1.1 200")
    assert len(answer) < 3000 * 3000 * 3


def is_reset(connection: socket.socket) -> bool:
    """Whether the other side has given the connection up, with our side unread."""
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def test_an_answer_may_be_read_slowly(make_service: MakeService) -> None:
    data = png(np.zeros((1500, 1500, 3), np.uint8))
    with (
        serving(make_service(), receive_timeout=1) as url,
        httpx2.stream(
            "POST",
            f"{url}/api/edit",
            files={"file": data},
            data={"prompt": "x", "num_steps": "10"},
            headers={"Authorization": f"Bearer {TOKEN}", "Accept": "image/bmp"},
            timeout=240,
        ) as answer,
    ):
        length = 0
        for piece in answer.iter_raw(2**18):
            length += len(piece)
            threading.Event().wait(0.1)  # the reader is slow, the test does not wait for anything

    assert length == int(answer.headers["content-length"]) > 1500 * 1500 * 3


# --- how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", HEAD, POST], ids=["idle", "head", "body"])
def test_who_keeps_the_server_waiting_gives_way(make_service: MakeService, sent: bytes) -> None:
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(make_service(), max_connections=4))
        slow = [stack.enter_context(connected(url, sent)) for _ in range(12)]
        statuses = [httpx2.get(f"{url}/livez", timeout=240).status_code for _ in range(20)]
        first = rest_of(slow[0])

    assert statuses == [200] * 20
    assert first == b""


def test_who_is_being_answered_does_not_give_way(make_service: MakeService) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    picture = np.zeros((32, 32, 3), np.uint8)
    answers: list[httpx2.Response] = []
    service = make_service(worker)
    with serving(service, max_connections=2) as url:
        editing = [
            threading.Thread(target=lambda: answers.append(post_picture(url, picture)), daemon=True)
            for _ in range(2)
        ]
        for one in editing:
            one.start()
        assert gate.reached.wait(60)
        until(lambda: service.status().gpu_status.queue_length == 1)
        assert is_refused(url)
        gate.open()
        for one in editing:
            one.join(60)
        later = httpx2.get(f"{url}/livez", timeout=240).status_code

    assert [answer.status_code for answer in answers] == [200, 200]
    assert later == 200


def is_refused(url: str) -> bool:
    with connected(url) as connection:
        return rest_of(connection).startswith(b"HTTP/1.1 503")


def own_address() -> str | None:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return None
        address: str = probe.getsockname()[0]
        return None if address.startswith("127.") else address


def test_one_machine_cannot_have_all_connections(make_service: MakeService) -> None:
    other = own_address()
    if other is None or sys.platform != "linux":
        pytest.skip("there is no address but loopback")
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(make_service(), host="0.0.0.0", max_connections=16))
        local = [stack.enter_context(connected(url)) for _ in range(4)]
        far = [stack.enter_context(connected(url, host=other)) for _ in range(6)]
        ended = [rest_of(one) for one in far[:4]]  # sixteen eighths are two
        for one in (*local, *far[4:]):
            one.sendall(HEAD + b"Connection: close\r\n\r\n")
        answered = [rest_of(one).endswith(b"ok\n") for one in (*local, *far[4:])]

    assert ended == [b""] * 4
    assert answered == [True] * 6


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"400"),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"400"),
        (b"X-Long: " + b"x" * 70_000 + b"\r\n", b"431"),
        (b"".join(b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(70)), b"431"),
    ],
    ids=["length first", "length last", "long", "many"],
)
def test_a_head_that_is_ambiguous_or_too_long_ends_the_connection(
    make_service: MakeService, lines: bytes, status: bytes
) -> None:
    """All at once, so that the head is complete when it is looked at."""
    body = b"0\r\n\r\nGET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with serving(make_service()) as url, connected(url, HEAD + lines + b"\r\n" + body) as one:
        answer = rest_of(one)

    assert answer.startswith(b"HTTP/1.1 " + status)
    assert answer.count(b"HTTP/1.1") == 1
    assert b"connection: close" in answer.lower()
