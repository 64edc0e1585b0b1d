"""The command line: results on stdout, progress on stderr, exit codes that scripts can trust."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import MakeService
from fakes import FakeWorker
from step1x_edit.interfaces.cli import DEMO_PROMPTS, app
from step1x_edit.service.service import EditService
from step1x_edit.settings import Settings

run = CliRunner()


@pytest.fixture
def _fake_model(make_service: MakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_service(settings: Settings) -> EditService:
        return make_service(FakeWorker(warning="does not know hats"))

    monkeypatch.setattr("step1x_edit.service.wiring.build_service", build_service)


@pytest.mark.usefixtures("_fake_model")
def test_edit_prints_the_path_of_the_result_and_nothing_else(photo: Path) -> None:
    result = run.invoke(app, ["edit", str(photo), "invert", "--seed", "7", "--num-steps", "10"])

    output = photo.with_name("photo_edited.png")
    assert result.exit_code == 0
    assert result.stdout == f"{output}\n"
    assert "seed 7" in result.stderr
    assert "Warning: does not know hats" in result.stderr
    assert np.array_equal(np.asarray(Image.open(output)), 255 - np.asarray(Image.open(photo)))


@pytest.mark.usefixtures("_fake_model")
def test_every_parameter_has_a_flag(photo: Path) -> None:
    output = photo.with_name("new") / "out.webp"
    flags = ["--output", str(output), "--num-steps", "11", "--guidance-scale", "3.5"]
    flags += ["--size-level", "512", "--seed", "5", "--overwrite", "--negative-prompt", "blurry"]

    result = run.invoke(app, ["edit", str(photo), "invert", *flags, "--json"])

    answer = json.loads(result.stdout)
    assert answer["output_path"] == str(output)
    metadata = answer["metadata"]
    assert metadata["num_steps"] == 11
    assert metadata["guidance_scale"] == 3.5
    assert metadata["size_level"] == 512
    assert metadata["seed"] == 5
    assert metadata["negative_prompt"] == "blurry"


@pytest.mark.usefixtures("_fake_model")
@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["missing.png", "x"], 1, "Image file not found: missing.png"),
        (["missing.png", "x", "--num-steps", "5"], 2, "Invalid parameter: num_steps must be"),
        (["missing.png"], 2, "prompt is missing"),
        (["missing.png", "x", "--hat"], 2, "No such option"),
    ],
)
def test_failures_have_a_sentence_and_an_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    exit_code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)

    result = run.invoke(app, ["edit", *arguments])

    assert result.exit_code == exit_code
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.usefixtures("_fake_model")
def test_a_failure_as_json_is_the_answer_of_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    result = run.invoke(app, ["edit", "missing.png", "x", "--json"])

    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "status": "error",
        "error": "Image file not found: missing.png",
        "code": "file_not_found",
    }


@pytest.mark.usefixtures("_fake_model")
def test_status_as_json_is_the_answer_of_the_contract() -> None:
    result = run.invoke(app, ["status", "--json"])

    answer = json.loads(result.stdout)
    assert answer["status"] == "success"
    assert answer["gpu_status"]["model_location"] == "Unloaded"


def test_wrong_settings_are_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICE", "toaster")

    result = run.invoke(app, ["status"])

    assert result.exit_code == 2
    assert result.stderr.startswith("Invalid settings: DEVICE")


@pytest.mark.usefixtures("_fake_model")
def test_the_demo_leaves_before_after_and_a_comparison_and_says_where(tmp_path: Path) -> None:
    folder = tmp_path / "demo"

    result = run.invoke(app, ["demo", "--output-dir", str(folder), "--num-steps", "10"])

    assert result.exit_code == 0, result.stderr
    written = {path.name for path in folder.iterdir()}
    assert written == {"before.jpg", "side-by-side.jpg"} | {
        f"after-{name}.jpg" for name in DEMO_PROMPTS
    }
    for name in written:
        assert str(folder / name) in result.stdout
    before = Image.open(folder / "before.jpg")
    assert all(
        Image.open(folder / f"after-{name}.jpg").size == before.size for name in DEMO_PROMPTS
    )
    marked = {path.name for path in folder.iterdir() if b"digitalsourcetype/" in path.read_bytes()}
    assert marked == written - {"before.jpg"}
    assert "models pull v1.1" in result.stdout


@pytest.mark.usefixtures("_fake_model")
def test_each_demo_without_a_folder_gets_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "demo-output_2").symlink_to("elsewhere")
    (tmp_path / "demo-output_3").write_bytes(b"mine")

    results = [run.invoke(app, ["demo", "--num-steps", "10"]) for _ in range(2)]

    assert [result.exit_code for result in results] == [0, 0]
    for folder in ("demo-output", "demo-output_4"):
        assert len(list((tmp_path / folder).iterdir())) == 2 + len(DEMO_PROMPTS)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.usefixtures("_fake_model")
@pytest.mark.parametrize("name", ["before.jpg", "after-winter.jpg", "side-by-side.jpg"])
def test_the_demo_replaces_nothing_and_then_writes_nothing(tmp_path: Path, name: str) -> None:
    kept = tmp_path / "kept.jpg"
    kept.write_bytes(b"mine")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).symlink_to(kept)

    result = run.invoke(app, ["demo", "--output-dir", str(folder)])

    assert result.exit_code == 1
    assert name in result.stderr
    assert [path.name for path in folder.iterdir()] == [name]
    assert kept.read_bytes() == b"mine"


@pytest.mark.usefixtures("_fake_model")
def test_a_demo_that_cannot_write_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")

    result = run.invoke(app, ["demo", "--output-dir", str(tmp_path / "file" / "below")])

    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "file is not a folder" in result.stderr


@pytest.mark.usefixtures("_fake_model")
def test_a_demo_with_a_wrong_flag_writes_nothing(tmp_path: Path) -> None:
    result = run.invoke(app, ["demo", "--output-dir", str(tmp_path / "a"), "--num-steps", "5"])

    assert result.exit_code == 2
    assert "num_steps must be" in result.stderr
    assert not (tmp_path / "a").exists()


def test_help_tells_the_default_of_each_command() -> None:
    wide = {"COLUMNS": "250", "TERMINAL_WIDTH": "250", "NO_COLOR": "1"}

    demo, edit = (run.invoke(app, [name, "--help"], env=wide).stdout for name in ("demo", "edit"))

    assert "default 768" in demo
    assert "1024)" not in demo
    assert "default 1024, or DEFAULT_SIZE_LEVEL if set" in edit


def test_help_is_there_without_torch_and_names_ranges() -> None:
    code = (
        "import sys\n"
        "from step1x_edit.interfaces.cli import app\n"
        "try: app(['edit', '--help'])\n"
        "finally: assert not {'torch', 'fastmcp'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )

    assert "between 10 and 50" in result.stdout
    assert "512, 768 or 1024" in result.stdout


def test_the_console_script_runs(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "step1x_edit.interfaces.cli", "edit", "missing.png", "x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )

    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.strip() == "Image file not found: missing.png"


def test_ctrl_c_ends_an_edit_with_130_and_leaves_no_file(tmp_path: Path, photo: Path) -> None:
    """The edit runs in a separate process, with a worker that never ends by itself."""
    script = tmp_path / "endless.py"
    script.write_text(
        "import sys, threading\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import step1x_edit.engine.local as local\n"
        "from fakes import FakeWorker\n"
        "def slow(job, step):\n"
        "    print('step', file=sys.stderr, flush=True)\n"
        "    threading.Event().wait(0.05)\n"
        "local.WorkerProcess = lambda start, ended: FakeWorker(before_step=slow)(ended)\n"
        "from step1x_edit.interfaces.cli import main\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), "edit", str(photo), "x", "--num-steps", "50"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, as a test run may be, ignores Ctrl-C and bequeaths that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    running = threading.Timer(60, process.kill)
    running.start()
    while "step" not in process.stderr.readline():
        pass

    process.send_signal(signal.SIGINT)
    out, log = process.communicate(timeout=240)  # a bound on hangs, not a measurement
    running.cancel()

    assert process.returncode == 130
    assert out == ""
    assert "interrupted" in log
    assert "Traceback" not in log
    assert not photo.with_name("photo_edited.png").exists()


HOLDS_A_FIFO = """
import os, sys
if "step1x_edit.worker.process" in sys.orig_argv:
    held = os.open(os.environ["FIFO"], os.O_WRONLY)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")
@pytest.mark.parametrize(
    ("is_interrupted", "exit_code", "said"),
    [(False, 1, "Unsupported image format: "), (True, 130, "interrupted")],
    ids=["no picture", "Ctrl-C"],
)
def test_a_worker_starts_before_the_picture_is_read_and_ends_unseen_without_one(
    is_interrupted: bool, exit_code: int, said: str, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "sitecustomize.py").write_text(HOLDS_A_FIFO)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", "step1x_edit", "edit", "-", "x", "--standalone"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "DATA_DIR": str(tmp_path), "FIFO": str(fifo)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with fifo.open("rb") as held_by_worker:  # opens when the worker starts
        if is_interrupted:
            process.send_signal(signal.SIGINT)
        out, log = process.communicate(b"" if is_interrupted else b"no picture", timeout=240)
        assert held_by_worker.read() == b""  # returns when the worker has ended

    assert process.returncode == exit_code
    assert out == b""
    assert len(log.splitlines()) == 1
    assert log.decode().startswith(said)
