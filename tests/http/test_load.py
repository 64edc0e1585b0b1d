"""Many at once: uploads of which some break off, and clients that only pretend to send something.

All over real sockets, against the server's process with a fake worker.
"""

from __future__ import annotations

import contextlib
import io
import re
import resource
import selectors
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
from PIL import Image

from http_server import until
from server_process import FAKE, Process, started
from step1x_edit.service.job_store import FOLDER_NAME

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at memory in /proc")

UPLOADS = 64
MB = 1_000_000


def noise(width: int, height: int) -> bytes:
    """A picture that nothing compresses."""
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


WIDTH, HEIGHT = 720, 500
PICTURE = noise(WIDTH, HEIGHT)


def request_to(url: str) -> httpx2.Request:
    return httpx2.Request(
        "POST",
        url,
        files={"file": ("photo.png", PICTURE)},
        data={"prompt": "x", "num_steps": "10"},
    )


def head_of(request: httpx2.Request) -> bytes:
    lines = [f"POST {request.url.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.port is not None
    return socket.create_connection((parts.hostname, parts.port), 60)


def break_off(url: str) -> None:
    """Send half of an upload and hang up, as a client does that has crashed."""
    request = request_to(url)
    body = request.read()
    with connect(url) as connection:
        connection.sendall(head_of(request) + body[: len(body) // 2])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def upload(url: str) -> httpx2.Response:
    with httpx2.Client(timeout=240, trust_env=False) as client:
        answer: httpx2.Response = client.send(request_to(url))
        return answer


def memory_mb(process: Process, name: str) -> float:
    """What the kernel says of the server's memory: VmRSS now, VmHWM at most."""
    told = Path(f"/proc/{process.popen.pid}/status").read_text("ascii")
    found = re.search(rf"{name}:\s+(\d+) kB", told)
    assert found is not None
    return int(found[1]) / 1000


def storm(url: str) -> list[httpx2.Response]:
    """64 uploads at once; every third breaks off, the others go to both doors."""
    with ThreadPoolExecutor(UPLOADS) as pool:
        broken = [pool.submit(break_off, f"{url}/api/edit") for _ in range(UPLOADS // 6)]
        broken += [pool.submit(break_off, f"{url}/v1/jobs") for _ in range(UPLOADS // 6)]
        rest = UPLOADS - len(broken)
        doors = [f"{url}/api/edit", f"{url}/v1/jobs"] * (rest // 2)
        answers = [answer.result() for answer in [pool.submit(upload, door) for door in doors]]
        for each in broken:
            each.result()
    return answers


@pytest.mark.timeout(600)
def test_uploads_of_which_a_third_breaks_off_leave_nothing_behind(tmp_path: Path) -> None:
    places = tmp_path / "temp"
    places.mkdir()
    chosen = {"TMPDIR": str(places), "RATE_LIMIT": "0", "ENABLE_UI": "false"}  # it has a folder
    with started(FAKE, tmp_path, **chosen) as process:
        url = process.url()
        assert upload(f"{url}/api/edit").status_code == 200
        kept = process.data_dir / FOLDER_NAME
        before = memory_mb(process, "VmRSS")
        after = []
        for _ in range(2):
            answers = storm(url)

            statuses = Counter(answer.status_code for answer in answers)
            assert set(statuses) <= {200, 202, 503}
            assert statuses[200] > 0
            assert statuses[202] > 0
            for answer in answers:
                if answer.status_code == 503:
                    assert answer.json()["code"] == "queue_full"
                    assert int(answer.headers["retry-after"]) >= 1
            accepted = {answer.json()["id"] for answer in answers if answer.status_code == 202}
            assert {folder.name for folder in kept.iterdir()} == accepted
            for job in accepted:
                until(lambda job=job: deleted(url, job))  # type: ignore[misc]
            assert list(kept.iterdir()) == []
            assert list(places.iterdir()) == []
            after.append(memory_mb(process, "VmRSS"))
        peak = memory_mb(process, "VmHWM")

    # An upload may be in memory as it came, as pixels, edited and encoded again: never more than
    # that for each. Between the storms it goes; of what the allocator keeps, a storm of leaks would
    # be four times as much.
    one = (2 * len(PICTURE) + 2 * WIDTH * HEIGHT * 3) / MB
    assert peak - before < UPLOADS * one
    assert after[-1] - after[0] < UPLOADS / 4 * one


def deleted(url: str, job: str) -> bool:
    """Forget a job as soon as it may be forgotten."""
    httpx2.post(f"{url}/v1/jobs/{job}/cancel", timeout=240)
    return httpx2.delete(f"{url}/v1/jobs/{job}", timeout=240).status_code == 204


# --- slow connections ----------------------------------------------------------------------------

SLOW = 500
BEGINNINGS = (
    b"",
    b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: ",
    b"POST /api/edit HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n"
    b"Content-Type: multipart/form-data; boundary=b\r\n\r\n",
)


def _socket_of(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


class SlowClients:
    """Connections that each send a byte now and then, for as long as the server bears it."""

    def __init__(self, url: str) -> None:
        self.left = SLOW
        self._selector = selectors.DefaultSelector()
        for number in range(SLOW):
            connection = connect(url)
            with contextlib.suppress(ConnectionError):  # it has been let go already
                connection.sendall(BEGINNINGS[number % len(BEGINNINGS)])
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._drip, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join(60)
        for key in list(self._selector.get_map().values()):
            self._end(_socket_of(key))

    def _drip(self) -> None:
        while self.left and not self._is_over.wait(0.2):
            for key, _ in self._selector.select(0):
                if self._has_ended(_socket_of(key)):
                    self._end(_socket_of(key))
            for key in list(self._selector.get_map().values()):
                with contextlib.suppress(OSError):  # told by the next look
                    _socket_of(key).send(b"x")

    def _has_ended(self, connection: socket.socket) -> bool:
        try:
            return connection.recv(2**16) == b""
        except ConnectionError:
            return True

    def _end(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        self.left -= 1


@contextlib.contextmanager
def slow_clients(url: str) -> Iterator[SlowClients]:
    clients = SlowClients(url)
    try:
        yield clients
    finally:
        clients.close()


@pytest.mark.parametrize("max_connections", [256, 1000], ids=["too many", "few enough"])
def test_slow_clients_do_not_keep_others_out_and_are_let_go(
    tmp_path: Path, max_connections: int
) -> None:
    settings = {"RECEIVE_TIMEOUT": "4", "MAX_CONNECTIONS": str(max_connections), "RATE_LIMIT": "0"}
    with started(FAKE, tmp_path, **settings) as process:
        url = process.url()
        with slow_clients(url) as slow:
            with ThreadPoolExecutor(8) as pool:
                reading = [pool.submit(httpx2.get, f"{url}/health", timeout=240) for _ in range(40)]
                editing = [pool.submit(upload, f"{url}/api/edit") for _ in range(8)]
                statuses = [answer.result().status_code for answer in (*reading, *editing)]
            until(lambda: slow.left == 0)
        after = upload(f"{url}/api/edit")

    assert statuses == [200] * 48
    assert after.status_code == 200


# --- file descriptors -----------------------------------------------------------------------------

LIMITED = """
import resource, runpy, sys
from pathlib import Path

resource.setrlimit(resource.RLIMIT_NOFILE, (96, {hard}))
sys.path.insert(0, {folder!r})
runpy.run_path({script!r}, run_name="__main__")
"""


def limited(tmp_path: Path, hard: int) -> Path:
    """The server in a process whose soft limit for files is 96."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED.format(hard=hard, folder=str(FAKE.parent), script=str(FAKE)))
    return script


def test_few_file_descriptors_lower_the_number_of_connections(tmp_path: Path) -> None:
    with (
        started(limited(tmp_path, 96), tmp_path) as process,
        contextlib.ExitStack() as stack,
    ):
        url = process.url()
        for _ in range(150):
            stack.enter_context(connect(url))
        assert httpx2.get(f"{url}/livez", timeout=240).status_code == 200

    told = process.heard("MAX_CONNECTIONS is 32 here")
    assert told.endswith("this process may open 96 files (ulimit -n), raise that for 256\n")
    assert len(process.lines) < 20


def test_the_soft_limit_of_file_descriptors_is_raised(tmp_path: Path) -> None:
    with started(limited(tmp_path, 4096), tmp_path) as process:
        process.url()

    assert not any("MAX_CONNECTIONS" in line for line in process.lines)


@pytest.mark.skipif(sys.platform != "linux", reason="changes the limit of another process")
def test_without_a_free_file_descriptor_the_server_says_so_once_a_second_and_recovers(
    tmp_path: Path,
) -> None:
    with started(FAKE, tmp_path) as process:
        url, pid = process.url(), process.popen.pid
        usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        opened = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        begun = time.monotonic()
        with contextlib.ExitStack() as stack:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (opened + 2, usual[1]))
            for _ in range(100):
                stack.enter_context(connect(url))
            process.heard("a connection cannot be accepted now")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
        assert httpx2.get(f"{url}/livez", timeout=60).status_code == 200
        seconds = time.monotonic() - begun

    assert sum("cannot be accepted" in line for line in process.lines) <= seconds + 1
    assert not any("Traceback" in line for line in process.lines)
