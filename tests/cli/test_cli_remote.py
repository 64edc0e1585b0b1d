"""The command line through a running server: the same answers, bytes and sentences."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import c2pa
import httpx2
import numpy as np
import pytest
from PIL import Image, ImageCms
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typer.testing import CliRunner

from certificates import certified
from conftest import MakeService
from fakes import STREAMED, FakeWorker
from http_server import TOKEN, guarded, listening_stranger, running, serving, until
from server_process import FAKE, started
from step1x_edit import __version__
from step1x_edit.channel import EditJob
from step1x_edit.errors import OutOfMemoryError
from step1x_edit.interfaces.cli import app
from step1x_edit.pictures.manifests import carries_manifest
from step1x_edit.service.service import EditService
from step1x_edit.settings import Settings

run = CliRunner()
QUICK = ["--num-steps", "10", "--seed", "1"]


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker(device="cuda:0", model="v1.2", warning="does not know hats")


@pytest.fixture
def server(make_service: MakeService, worker: FakeWorker) -> Iterator[str]:
    with serving(make_service(worker)) as url:
        yield url


@pytest.fixture(autouse=True)
def _own_model(make_service: MakeService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build_service(settings: Settings) -> EditService:
        return make_service(FakeWorker(device="cuda:0", model="v1.2", warning="does not know hats"))

    monkeypatch.setattr("step1x_edit.service.wiring.build_service", build_service)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def at(server: str) -> list[str]:
    return ["--url", server, "--api-key", TOKEN]


@pytest.fixture
def rich_photo(photo: Path) -> Path:
    """A picture with all that a picture can have: transparency, a profile and EXIF."""
    pixels = np.asarray(Image.open(photo))
    alpha = np.full((*pixels.shape[:2], 1), 200, np.uint8)
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = photo.with_name("rich.png")
    image = Image.fromarray(np.concatenate([pixels, alpha], axis=2))
    image.save(path, exif=exif, icc_profile=profile)
    return path


def jobs_left(url: str) -> list[object]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx2.get(f"{url}/v1/jobs", headers=headers, trust_env=False, timeout=240)
    jobs: list[object] = answer.json()["data"]
    return jobs


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "tiff", "bmp"])
def test_the_bytes_are_those_of_an_edit_in_process(
    rich_photo: Path, at: list[str], worker: FakeWorker, suffix: str
) -> None:
    words = ["edit", str(rich_photo), "invert", *QUICK, "--negative-prompt", "blur"]

    there = run.invoke(app, [*words, "--output", f"there.{suffix}", *at])
    here = run.invoke(app, [*words, "--output", f"here.{suffix}", "--standalone"])

    assert there.exit_code == here.exit_code == 0, there.stderr
    assert worker.started == ["invert"]
    assert there.stdout == f"{Path(f'there.{suffix}').absolute()}\n"
    assert Path(f"there.{suffix}").read_bytes() == Path(f"here.{suffix}").read_bytes()
    assert "Warning: does not know hats" in there.stderr
    for done in (there, here):
        assert ("BMP cannot say that a model made" in done.stderr) == (suffix == "bmp")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_command_with_a_certificate_signs_what_its_server_does_not(
    photo: Path, at: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    for name, path in certified(tmp_path / "c2pa").items():
        monkeypatch.setenv(name.upper(), str(path))
    path = tmp_path / f"signed.{suffix}"

    done = run.invoke(app, ["edit", str(photo), "x", *QUICK, "--output", str(path), *at])

    assert done.exit_code == 0, done.stderr
    with c2pa.Reader("", path.open("rb")) as reader:
        manifest = reader.get_active_manifest()
        assert reader.get_validation_state() == "Valid"
    assert manifest is not None
    assert [each["relationship"] for each in manifest["ingredients"]] == ["parentOf"]


def test_a_signature_that_another_format_cannot_keep_is_told(
    make_service: MakeService, photo: Path, tmp_path: Path
) -> None:
    with serving(make_service(**certified(tmp_path / "c2pa"))) as url:
        words = ["edit", str(photo), "x", *QUICK, "--url", url, "--api-key", TOKEN, "--output"]
        kept = run.invoke(app, [*words, "o.png"])
        lost = run.invoke(app, [*words, "o.jpg"])

    assert carries_manifest(Path("o.png").read_bytes())
    assert "signature" not in kept.stderr
    assert "Warning: the server's signature is lost in this format; save it as" in lost.stderr


def test_the_answer_is_that_of_an_edit_in_process(photo: Path, at: list[str]) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save("mask.png")
    words = ["edit", str(photo), "x", "--mask", "mask.png", "--json", "--overwrite", *QUICK]
    words += ["--thinking", "--reflection"]

    answers = [
        json.loads(run.invoke(app, [*words, "--output", "o.png", *way]).stdout)
        for way in (at, ["--standalone"])
    ]

    for answer in answers:
        del answer["processing_time"]
    assert answers[0] == answers[1]
    assert answers[0]["metadata"]["reasoning"]["best"] == 2
    assert "changed_share" in answers[0]["metadata"]


def test_progress_is_heard_and_no_job_stays(photo: Path, at: list[str], server: str) -> None:
    result = run.invoke(app, ["edit", str(photo), "x", *QUICK, *at])

    assert result.exit_code == 0, result.stderr
    assert "edit: denoising" in result.stderr
    assert jobs_left(server) == []


def test_a_picture_goes_from_stdin_to_stdout_through_a_server(photo: Path, at: list[str]) -> None:
    result = run.invoke(app, ["edit", "-", "invert", *QUICK, *at], input=photo.read_bytes())

    assert result.exit_code == 0, result.stderr
    Path("o.png").write_bytes(result.stdout_bytes)
    assert np.array_equal(np.asarray(Image.open("o.png")), 255 - np.asarray(Image.open(photo)))


BAD = [
    ("missing.png", []),
    ("broken.png", []),
    ("photo.png", ["--num-steps", "99"]),
    ("photo.png", ["--output", "o.txt"]),
    ("photo.png", ["--output", "/etc/o.png"]),
    ("photo.png", ["--output", "photo.png", "--overwrite"]),
    ("photo.png", ["--mask", "small.png"]),
    ("photo.png", ["--mask", "broken.png"]),
]


@pytest.mark.parametrize(("name", "flags"), BAD)
def test_errors_have_the_sentence_and_the_exit_code_of_an_edit_in_process(
    photo: Path, at: list[str], server: str, name: str, flags: list[str]
) -> None:
    Path("broken.png").write_bytes(b"no picture")
    Image.new("L", (16, 16)).save("small.png")
    words = ["edit", name, "x", "--json", *flags]

    there, here = (run.invoke(app, [*words, *way]) for way in (at, ["--standalone"]))

    assert there.exit_code == here.exit_code != 0
    assert json.loads(there.stdout) == json.loads(here.stdout)
    assert json.loads(there.stdout)["status"] == "error"
    assert jobs_left(server) == []


def test_an_edit_that_fails_at_the_server_fails_as_it_would_here(
    photo: Path, make_service: MakeService
) -> None:
    def no_memory(job: EditJob, step: int) -> None:
        raise OutOfMemoryError("it needs 3 GB more")

    with serving(make_service(FakeWorker(before_step=no_memory))) as url:
        at = ["--url", url, "--api-key", TOKEN]
        result = run.invoke(app, ["edit", str(photo), "x", *at])

        assert jobs_left(url) == []
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "CUDA out of memory: it needs 3 GB more"


def test_a_batch_goes_through_a_server_and_is_gone_on_with_here(
    photo: Path, at: list[str], worker: FakeWorker
) -> None:
    Path("in").mkdir()
    for name in ("a.png", "b.png"):
        (Path("in") / name).write_bytes(photo.read_bytes())
    words = ["batch", "in", "--prompt", "invert", *QUICK]

    there = run.invoke(app, [*words, *at])
    Path("in_edited/b_edited.png").unlink()
    here = run.invoke(app, [*words, "--standalone", "--json"])

    assert there.exit_code == here.exit_code == 0, there.stderr
    assert worker.started == ["invert", "invert"]
    items = json.loads(here.stdout)["results"]
    assert [item["result"]["message"].startswith("Kept") for item in items] == [True, False]


def test_the_model_of_the_server_is_told_of_offloaded_and_released(
    photo: Path, at: list[str], server: str, worker: FakeWorker
) -> None:
    worker.placement = STREAMED
    run.invoke(app, ["edit", str(photo), "x", *QUICK, *at])

    loaded = run.invoke(app, ["status", *at])
    offload = run.invoke(app, ["offload", *at])
    release = run.invoke(app, ["release", *at, "--json"])

    assert loaded.exit_code == offload.exit_code == release.exit_code == 0
    assert server in loaded.stdout
    assert "model_location           GPU" in loaded.stdout
    assert f"plan reason              {STREAMED.reason}\n" in loaded.stdout
    assert "plan predicted_peak_gb   7.4\nplan measured_peak_gb    7.12\n" in loaded.stdout
    assert offload.stdout == "GPU offloaded. Model now on CPU, GPU memory: 0.00GB\n"
    assert json.loads(release.stdout)["gpu_status"]["model_location"] == "Unloaded"
    assert json.loads(release.stdout)["gpu_status"]["statistics"]["gpu_to_cpu"] == 1


def test_without_a_server_there_is_nothing_to_tell_of_and_nothing_to_move() -> None:
    status = run.invoke(app, ["status"])
    as_json = run.invoke(app, ["status", "--json"])
    moves = [run.invoke(app, [name]) for name in ("offload", "release")]

    assert status.exit_code == 0
    assert status.stdout.startswith("No server is running on this machine")
    assert json.loads(as_json.stdout)["server"] is None
    assert [move.exit_code for move in moves] == [0, 0]
    assert [move.stdout for move in moves] == [
        "Nothing to offload: no server is running on this machine\n",
        "Nothing to release: no server is running on this machine\n",
    ]


def test_the_key_is_also_taken_from_the_settings(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", TOKEN)

    assert run.invoke(app, ["status", "--url", server]).exit_code == 0


@pytest.mark.parametrize("command", ["edit", "batch", "status", "offload", "release"])
def test_a_server_that_is_not_there_or_not_ours_is_told_of_in_one_sentence(
    photo: Path, server: str, command: str
) -> None:
    words = {
        "edit": ["edit", str(photo), "x"],
        "batch": ["batch", str(photo.parent), "--prompt", "x"],
    }.get(command, [command])

    nobody = run.invoke(app, [*words, "--url", "http://127.0.0.1:9"])
    no_key = run.invoke(app, [*words, "--url", server])
    no_url = run.invoke(app, [*words, "--url", "localhost:8000"])

    assert nobody.exit_code == 1
    assert "the server at http://127.0.0.1:9 does not answer" in nobody.stderr
    assert no_key.exit_code == 2
    assert f"the server at {server} requires its API key; set API_KEY or use" in no_key.stderr
    assert no_url.exit_code == 2
    assert "--url must be like http://127.0.0.1:8000, got 'localhost:8000'" in no_url.stderr
    for result in (nobody, no_key, no_url):
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


def test_a_server_without_our_routes_is_told_of(photo: Path) -> None:
    from fastmcp import FastMCP

    with listening_stranger(FastMCP("stranger")) as url:
        result = run.invoke(app, ["edit", str(photo), "x", "--url", url])

    assert result.exit_code == 1
    assert "there is no REST API of step1x-edit at" in result.stderr


def test_a_server_without_its_rest_routes_is_told_of(
    photo: Path, make_service: MakeService
) -> None:
    with serving(make_service(), enable_api=False) as url:
        result = run.invoke(app, ["edit", str(photo), "x", "--url", url, "--api-key", TOKEN])

    assert result.exit_code == 1
    assert "start the server with ENABLE_API=true, or use --standalone" in result.stderr


def test_a_picture_that_is_too_large_for_the_server_is_told_of(
    tmp_path: Path, make_service: MakeService
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    Image.fromarray(noise).save("noise.png")
    with serving(make_service(max_upload_mb=1), max_upload_mb=1) as url:
        result = run.invoke(app, ["edit", "noise.png", "x", "--url", url, "--api-key", TOKEN])

    assert result.exit_code == 1
    assert re.search(
        "Image too large|may be larger than the server.s MAX_UPLOAD_MB allows", result.stderr
    )


class Endless(socketserver.ThreadingTCPServer):
    """A server that begins a good answer and never ends it."""

    daemon_threads = True

    def __init__(self, packed: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Endless)
        self.head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        self.head += b"Content-Encoding: gzip\r\n\r\n" if packed else b"\r\n"


class _Endless(socketserver.BaseRequestHandler):
    server: Endless

    def handle(self) -> None:
        self.request.recv(1 << 16)
        self.request.sendall(self.server.head)
        with contextlib.suppress(OSError):  # at last the client hangs up
            while True:
                self.request.sendall(b" " * (1 << 16))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("words", [["status"], ["edit", "photo.png", "x"]])
@pytest.mark.usefixtures("fake_model", "photo")
def test_an_answer_without_end_is_given_up(words: list[str], packed: bool) -> None:
    with Endless(packed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        result = run.invoke(app, [*words, "--url", url])
        server.shutdown()

    assert result.exit_code == 1
    assert f"the server at {url} sends a longer answer than step1x-edit ever does" in result.stderr


# --- servers and commands in separate processes --------------------------------------------------


def command(*words: str, folder: Path, **settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "step1x_edit.interfaces.cli", *words],
        cwd=folder,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


class LateAnswers:
    """An app whose answers to POST wait until `go`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.go = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_late(message: Message) -> None:
            if scope["method"] == "POST":
                await asyncio.to_thread(self.go.wait, 60)
            await send(message)

        await self.app(scope, receive, send_late if scope["type"] == "http" else send)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.run cancels all tasks at Ctrl-C")
def test_ctrl_c_before_the_answer_with_its_id_deletes_the_job(
    make_service: MakeService, photo: Path, tmp_path: Path
) -> None:
    given = Settings(_env_file=None, data_dir=tmp_path, api_key=TOKEN)
    app = LateAnswers(guarded(make_service(FakeWorker()), given))
    with running(app, given) as url:
        edit = command("edit", str(photo), "x", "--url", url, folder=tmp_path, API_KEY=TOKEN)
        until(lambda: jobs_left(url) != [])
        edit.send_signal(signal.SIGINT)
        app.go.set()
        _, log = edit.communicate(timeout=240)
        assert jobs_left(url) == []

    assert edit.returncode == 130, log
    assert "Traceback" not in log


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_server_on_this_machine_is_found_and_ctrl_c_frees_it(photo: Path, tmp_path: Path) -> None:
    with started(FAKE, tmp_path, API_KEY=TOKEN) as server:
        url = server.url()
        found = {"DATA_DIR": str(server.data_dir)}
        edit = command("edit", str(photo), "x", "--num-steps", "50", folder=tmp_path, **found)
        server.heard("step\n")
        edit.send_signal(signal.SIGINT)
        out, log = edit.communicate(timeout=240)
        headers = {"Authorization": f"Bearer {TOKEN}"}

        def is_idle() -> bool:
            answer = httpx2.get(f"{url}/health", headers=headers, trust_env=False, timeout=240)
            assert answer.json()["version"] == __version__
            return bool(answer.json()["queue_length"] == 0)

        until(is_idle)
        assert jobs_left(url) == []
        begun = server.lines.count("step\n")

    assert edit.returncode == 130, log
    assert out == ""
    assert "interrupted" in log
    assert "Traceback" not in log
    assert begun < 50
    assert not photo.with_name("photo_edited.png").exists()


def test_standalone_does_not_look_for_a_server(photo: Path, tmp_path: Path) -> None:
    with started(FAKE, tmp_path) as server:
        url = server.url()
        found = {"DATA_DIR": str(server.data_dir)}
        through = command("status", folder=tmp_path, **found).communicate(timeout=240)[0]
        alone = command("status", "--standalone", folder=tmp_path, **found).communicate(
            timeout=240
        )[0]

    assert url in through
    assert url not in alone
    assert "No server is running" not in alone
