"""The stdio server as a client meets it: a process, its two pipes, and nothing else on them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastmcp import Client
from fastmcp.client.transports import PythonStdioTransport
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from PIL import Image

from conftest import MakeService
from http_server import announcing
from mcp_answers import answer_of, text_of
from step1x_edit.interfaces.cli import DEMO_PHOTO
from step1x_edit.interfaces.mcp.stdin import Messages
from step1x_edit.interfaces.mcp.stdio import _Pipe, _Wire

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "mcp_server.py"
FAKE = (str(ROOT / "tests" / "serve_fake.py"),)
"""A server whose worker is a fake."""

QUICK = {"DEFAULT_SIZE_LEVEL": "512", "DEFAULT_NUM_STEPS": "10"}

PATIENCE_S = 240  # a bound on hangs, not a measurement: the machine may be busy

HELLO = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    },
}
READY = {"jsonrpc": "2.0", "method": "notifications/initialized"}


def environment(**settings: str) -> dict[str, str]:
    return {**os.environ, "MODEL_PATH": "", **settings}


_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_outlives_its_test() -> Iterator[None]:
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()


def start(
    tmp_path: Path,
    command: tuple[str, ...] = (str(SERVER),),
    log_file: Path | None = None,
    **settings: str,
) -> subprocess.Popen[str]:
    with contextlib.ExitStack() as files:
        log = subprocess.PIPE if log_file is None else files.enter_context(log_file.open("w"))
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=tmp_path,
            env=environment(**settings),
        )
    _started.append(process)
    return process


def say(process: subprocess.Popen[str], *messages: dict[str, Any]) -> None:
    assert process.stdin is not None
    for message in messages:
        process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next answer, passing over notifications."""
    assert process.stdout is not None
    while True:
        message: dict[str, Any] = json.loads(process.stdout.readline())
        if "id" in message:
            return message


def call(number: int | str, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    params = {"name": tool, "arguments": arguments}
    return {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params}


def transport(folder: Path, **settings: str) -> PythonStdioTransport:
    return PythonStdioTransport(
        SERVER,
        python_cmd=sys.executable,
        cwd=str(folder),
        env=environment(**settings),
        keep_alive=False,
    )


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client[PythonStdioTransport]]:
    async with Client(transport(tmp_path)) as client:
        yield client


async def failure(client: Client[Any], tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Call a tool that must fail; both halves of its answer must say the same."""
    result = await client.call_tool(tool, arguments, raise_on_error=False)
    assert result.is_error
    assert json.loads(text_of(result)) == result.structured_content
    assert result.structured_content is not None
    assert result.structured_content["status"] == "error"
    return result.structured_content


async def test_the_tools_carry_the_names_defaults_and_ranges_of_the_contract(
    client: Client[Any],
) -> None:
    tools = {tool.name: tool for tool in await client.list_tools()}

    edit = tools["edit_image"].input_schema
    properties = edit["properties"]
    assert list(properties)[:7] == [
        "image_path",
        "prompt",
        "output_path",
        "num_steps",
        "guidance_scale",
        "size_level",
        "seed",
    ]
    assert edit["required"] == ["image_path", "prompt"]
    assert edit["additionalProperties"] is False
    steps, guidance = properties["num_steps"], properties["guidance_scale"]
    assert (steps["default"], steps["minimum"], steps["maximum"]) == (28, 10, 50)
    assert (guidance["default"], guidance["minimum"], guidance["maximum"]) == (6.0, 1.0, 15.0)
    assert properties["size_level"]["default"] == 1024
    assert properties["size_level"]["enum"] == [512, 768, 1024]
    assert properties["seed"]["default"] is None
    assert all(property_.get("description") for property_ in properties.values())
    status = tools["get_gpu_status"]
    assert status.input_schema["properties"] == {}
    assert status.annotations is not None
    assert status.annotations.read_only_hint


@pytest.mark.timeout(300)  # imports torch
async def test_the_tools_with_the_real_model_do_what_the_contract_says(tmp_path: Path) -> None:
    shutil.copy(DEMO_PHOTO, tmp_path / "a.jpg")
    heard: list[str | None] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append(message)

    async with Client(transport(tmp_path, **QUICK)) as client:
        edit = await client.call_tool(
            "edit_image",
            {"image_path": "a.jpg", "prompt": "turn it into a black and white photo", "seed": 42},
            progress_handler=listen,
        )
        view = await client.call_tool("view_image", {"path": "a_edited.jpg", "max_size": 64})
        batch = await client.call_tool(
            "batch_edit_images",
            {
                "image_paths": ["a.jpg", "no.jpg"],
                "prompts": ["turn it into a black and white photo", "x"],
                "output_dir": "out",
                "seed": 42,
            },
        )
        status = await client.call_tool("get_gpu_status", {})
        offloaded = await client.call_tool("offload_gpu", {})
        released = await client.call_tool("release_gpu", {})

    answer = edit.structured_content
    assert answer["status"] == "success"
    assert answer["message"] == "Image edited successfully"
    assert answer["output_path"] == str(tmp_path / "a_edited.jpg")
    assert answer["processing_time"] > 0
    expected = {
        "prompt": "turn it into a black and white photo",
        "num_steps": 10,
        "guidance_scale": 6.0,
        "size_level": 512,
        "seed": 42,
        "gpu_location": "CPU",
        "gpu_memory_gb": 0.0,
    }
    assert {name: answer["metadata"].get(name) for name in expected} == expected
    assert {"loading model", "encoding", "denoising 10/10", "decoding", "saving"} <= set(heard)
    colours = np.asarray(Image.open(tmp_path / "a_edited.jpg").convert("RGB"), dtype=float)
    before = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"), dtype=float)
    assert colours.shape == before.shape
    assert np.ptp(colours, axis=-1).mean() < np.ptp(before, axis=-1).mean() / 2  # it is grey now
    shown = Image.open(io.BytesIO(base64.b64decode(view.content[0].data)))
    assert max(shown.size) == 64

    answer = batch.structured_content
    assert answer["status"] == "partial"
    assert answer["summary"] == {"total": 2, "successes": 1, "failures": 1}
    assert answer["results"][1] == {
        "input": "no.jpg",
        "result": {
            "status": "error",
            "error": "Image file not found: no.jpg",
            "code": "file_not_found",
        },
    }
    again = tmp_path / "out" / "a_edited.jpg"
    assert answer["results"][0]["result"]["output_path"] == str(again)
    assert again.read_bytes() == (tmp_path / "a_edited.jpg").read_bytes()

    assert status.structured_content["gpu_status"]["model_location"] == "CPU"
    assert status.structured_content["gpu_status"]["statistics"]["total_loads"] == 1
    message = offloaded.structured_content["message"]
    assert message == "GPU offloaded. Model now on CPU, GPU memory: 0.00GB"
    message = released.structured_content["message"]
    assert message == "GPU released. Model location: Unloaded, GPU memory: 0.00GB"
    assert released.structured_content["gpu_status"]["statistics"]["full_releases"] == 1


async def test_status_before_the_first_edit(client: Client[Any]) -> None:
    result = await client.call_tool("get_gpu_status", {})

    assert json.loads(text_of(result)) == result.structured_content
    gpu_status = answer_of(result)["gpu_status"]
    assert gpu_status["model_location"] == "Unloaded"
    assert gpu_status["idle_timeout"] == 60
    assert gpu_status["gpu_memory_allocated_gb"] == 0
    assert gpu_status["statistics"] == {
        "total_loads": 0,
        "gpu_to_cpu": 0,
        "cpu_to_gpu": 0,
        "full_releases": 0,
    }


async def test_every_failure_has_the_shape_of_the_contract(client: Client[Any]) -> None:
    picture: dict[str, Any] = {"image_path": "a.png", "prompt": "x"}
    cases: list[tuple[dict[str, Any], str]] = [
        (picture | {"image_path": "missing.jpg"}, "Image file not found: missing.jpg"),
        (picture | {"num_steps": 5}, "Invalid parameter: num_steps must be"),
        (picture | {"num_steps": True}, "Invalid parameter: num_steps must be"),
        (picture | {"guidance_scale": "nan"}, "Invalid parameter: guidance_scale must be"),
        (picture | {"size_level": 100}, "Invalid parameter: size_level must be 512, 768 or 1024"),
        (picture | {"hat": "red"}, "Invalid parameter: 'hat' is unknown"),
        ({"prompt": "x"}, "Invalid parameter: image_path is missing"),
        (picture | {"image_path": "/etc/hostname"}, "Path not allowed: "),
    ]
    for arguments, beginning in cases:
        answer = await failure(client, "edit_image", arguments)

        assert answer["error"].startswith(beginning)
        assert "\n" not in answer["error"]
        assert len(answer["error"]) <= 500


async def test_the_other_tools_fail_in_the_same_shape(client: Client[Any]) -> None:
    batch = {"image_paths": ["a.png", "b.png"], "prompts": "x"}
    others: list[tuple[str, dict[str, Any], str]] = [
        ("batch_edit_images", batch | {"prompts": ["x"]}, "Invalid parameter: prompts must be one"),
        ("batch_edit_images", batch | {"image_paths": []}, "Invalid parameter: image_paths must"),
        ("batch_edit_images", batch | {"num_steps": 51}, "Invalid parameter: num_steps must be"),
        ("batch_edit_images", batch, "Processed 2 images: 0 succeeded, 2 failed"),
        ("view_image", {"path": "no.png"}, "Image file not found: no.png"),
        ("get_gpu_status", {"verbose": True}, "Invalid parameter: 'verbose' is unknown"),
        ("offload_gpu", {"now": True}, "Invalid parameter: 'now' is unknown"),
        ("release_gpu", {"now": True}, "Invalid parameter: 'now' is unknown"),
    ]
    for tool, arguments, beginning in others:
        answer = await failure(client, tool, arguments)

        assert answer["error"].startswith(beginning)


@pytest.mark.timeout(300)  # imports torch
async def test_a_model_path_that_leads_nowhere_is_told_by_the_first_edit(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    async with Client(transport(tmp_path, MODEL_PATH=str(tmp_path / "nowhere"))) as client:
        answer = await failure(client, "edit_image", {"image_path": "a.png", "prompt": "x"})

    assert answer["error"].startswith("Manager not initialized: ")
    assert answer["code"] == "model_unavailable"
    assert not (tmp_path / "a_edited.png").exists()


async def test_the_official_client_session_is_served(tmp_path: Path) -> None:
    server = StdioServerParameters(
        command=sys.executable, args=[str(SERVER)], cwd=tmp_path, env=environment()
    )
    async with stdio_client(server) as streams, ClientSession(*streams) as session:
        await session.initialize()
        result = await session.call_tool("edit_image", {"image_path": "no.png", "prompt": "x"})

    assert result.is_error
    assert result.structured_content["error"] == "Image file not found: no.png"


@pytest.mark.usefixtures("real_programs")
def test_the_handshake_does_not_wait_for_torch(tmp_path: Path) -> None:
    process = start(tmp_path)
    say(process, HELLO)
    hello = hear(process)
    say(process, READY, call(2, "get_gpu_status", {}))
    status = hear(process)
    maps = Path(f"/proc/{process.pid}/maps")
    loaded = maps.read_text() if maps.exists() else ""
    process.communicate(timeout=PATIENCE_S)

    assert hello["result"]["serverInfo"]["name"] == "step1x-edit"
    assert "instructions" in hello["result"]
    assert status["result"]["structuredContent"]["status"] == "success"
    assert "libtorch" not in loaded


def test_the_command_line_starts_the_same_server(tmp_path: Path) -> None:
    process = start(tmp_path, ("-m", "step1x_edit.interfaces.cli", "mcp"))

    say(process, HELLO, READY, call(2, "get_gpu_status", {}))

    assert hear(process)["result"]["serverInfo"]["name"] == "step1x-edit"
    assert hear(process)["result"]["structuredContent"]["status"] == "success"
    rest, _ = process.communicate(timeout=PATIENCE_S)
    assert rest == ""
    assert process.returncode == 0


NOISE = """
import atexit, builtins, ctypes, faulthandler, logging, os, subprocess, sys, threading, warnings

def noise():
    print("noise of print")
    sys.stdout.write("noise of sys.stdout\\n")
    sys.stdout.flush()
    sys.stdout.buffer.write(b"noise of its buffer\\n")
    sys.stdout.buffer.flush()
    os.write(1, b"noise of os.write\\n")
    os.write(sys.stdout.fileno(), b"noise of its descriptor\\n")
    c = ctypes.CDLL(None)
    c.puts(b"noise of C")
    c.fflush(None)
    subprocess.run(["echo", "noise of a child"])
    warnings.showwarning("noise of warnings", UserWarning, "x.py", 1, file=sys.stdout)
    handler = logging.StreamHandler(sys.stdout)
    handler.handle(logging.LogRecord("x", logging.ERROR, "x.py", 1, "noise of logging", (), None))
    faulthandler.dump_traceback(file=sys.stdout)
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None:
        for _ in tqdm.tqdm(range(2), desc="noise of tqdm", file=sys.stdout):
            pass

def again_and_again():
    while True:
        threading.Event().wait(1)
        noise()

import_, exit_, begun, busy = builtins.__import__, os._exit, [], []

def noisy_import(name, *args, **kwargs):
    top = name.partition(".")[0]
    if not busy and top in ("fastmcp", "step1x_edit", "PIL", "numpy", "torch") and top not in begun:
        begun.append(top)
        busy.append(True)
        noise()
        busy.clear()
        if len(begun) == 1:
            threading.Thread(target=again_and_again, daemon=True).start()
    return import_(name, *args, **kwargs)

def noisy_exit(code):
    print("noise of the exit")
    noise()
    exit_(code)

builtins.__import__, os._exit = noisy_import, noisy_exit
atexit.register(noise)
"""


@pytest.mark.timeout(300)  # imports torch
def test_nothing_but_protocol_is_on_stdout_whatever_libraries_do(tmp_path: Path) -> None:
    """The noise comes at imports, all the time in a thread, in the worker too, and at the end."""
    noise = tmp_path / "noise"
    noise.mkdir()
    (noise / "sitecustomize.py").write_text(NOISE)
    paths = os.pathsep.join([str(noise), os.environ.get("PYTHONPATH", "")])
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    log_file = tmp_path / "log"
    process = start(tmp_path, (str(SERVER),), log_file, PYTHONPATH=paths, **QUICK)

    say(process, HELLO, READY, call(2, "edit_image", {"image_path": "a.png", "prompt": "invert"}))
    assert hear(process)["id"] == 1
    answer = hear(process)
    rest, _ = process.communicate(timeout=PATIENCE_S)

    log = log_file.read_text(errors="replace")
    assert answer["result"]["structuredContent"]["status"] == "success"  # so each line was JSON
    assert all(json.loads(line)["jsonrpc"] == "2.0" for line in rest.splitlines())
    for kind in (
        "print",
        "sys.stdout",
        "its buffer",
        "os.write",
        "its descriptor",
        "C",
        "a child",
        "warnings",
        "logging",
        "tqdm",
        "the exit",
    ):
        assert f"noise of {kind}" in log
    assert "most recent call first" in log  # of faulthandler


def test_another_thread_finds_no_way_to_the_client_while_the_transport_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment `sys.stdout` is the client's; only the thread that put it there may use it."""
    client, wire = os.pipe()
    with (tmp_path / "log").open("w+") as log, os.fdopen(client, "rb") as heard:
        monkeypatch.setattr(sys, "stdout", log)
        ours = _Wire(_Pipe(wire, lambda: None))

        def intrude() -> None:
            os.write(sys.stdout.fileno(), b"its descriptor\n")
            sys.stdout.buffer.write(b"its buffer\n")
            sys.stdout.buffer.flush()
            sys.stdout.write("its text\n")

        assert sys.stdout is ours
        intruder = threading.Thread(target=intrude)
        intruder.start()
        intruder.join()
        os.close(wire)

        assert heard.read() == b""
        assert (tmp_path / "log").read_text() == "its descriptor\nits buffer\n"


# --- lines that are not messages ------------------------------------------------------------------

BAD_LINES: list[tuple[bytes, int, int | str | None]] = [
    # as JSON.stringify of JavaScript writes a text that slice() has cut inside an emoji
    (json.dumps(call(7, "view_image", {"path": "night \ud83c"})).encode(), -32602, 7),
    (json.dumps(call("a", "view_image", {"path": "\udf19 night"})).encode(), -32602, "a"),
    (b'{"jsonrpc": "2.0", "method": "notifications/x", "params": {"y": "\\ud83c"}}', -32700, None),
    (b'{"jsonrpc": "2.0", "id": "\\ud83c", "method": "ping"}', -32700, None),
    (b"{bad", -32700, None),
    (b"Hello?", -32700, None),
    (b'{"jsonrpc": "2.0", "id": 7, "method": "ping"', -32700, None),
    (b'{"jsonrpc": "2.0", "id": 7, "method": "p\xffng"}', -32700, None),
    (b"[" * 100_000, -32700, None),
    (b"{}", -32600, None),
    (b"[]", -32600, None),
    (b"42", -32600, None),
    (b'[{"jsonrpc": "2.0", "id": 7, "method": "ping"}]', -32600, None),
    (b'{"jsonrpc": "2.0", "id": true, "method": "ping"}', -32600, None),
    (b'{"jsonrpc": "2.0", "id": 7, "result": 1}', -32600, None),  # the id would be one of ours
    (b'{"jsonrpc": "1.0", "id": 7, "method": "ping"}', -32600, 7),
    (b'{"jsonrpc": "2.0", "id": 7, "method": "ping", "params": [1]}', -32602, 7),
    (
        b'{"jsonrpc": "2.0", "id": 7, "method": "ping", "params": {"a": %s}}'
        % (b"[" * 300 + b"]" * 300),
        -32602,
        7,
    ),
]
GOOD = b'{"jsonrpc": "2.0", "id": 8, "method": "ping"}\n'


def read_through(data: bytes, **limits: int) -> tuple[bytes, list[dict[str, Any]]]:
    """What the library gets to read of some bytes, and what was answered instead."""
    ours, theirs = os.pipe()
    sent: list[bytes] = []
    writer = threading.Thread(target=lambda: os.fdopen(theirs, "wb").write(data))
    writer.start()
    messages = Messages(ours, sent.append, **limits)
    read = b"".join(iter(lambda: messages.read1(8192), b""))
    writer.join()
    assert all(line.count(b"\n") == 1 and line.endswith(b"\n") for line in sent)
    return read, [json.loads(line) for line in sent]


@pytest.mark.parametrize(("line", "code", "request_id"), BAD_LINES)
def test_a_line_that_is_not_a_message_is_answered_and_not_read(
    line: bytes, code: int, request_id: int | str | None
) -> None:
    read, [answer] = read_through(line + b"\n" + GOOD)

    assert read == GOOD
    assert answer["id"] == request_id
    assert answer["error"]["code"] == code
    assert "pydantic" not in answer["error"]["message"]
    assert "validation error" not in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 200


def test_a_line_that_is_too_long_is_answered_and_the_next_one_is_read() -> None:
    at_the_limit = GOOD.replace(b"ping", b"p" * 200_000)

    read, answers = read_through(
        at_the_limit + b"x" * 1_000_000 + b"\n" + GOOD, max_line_bytes=len(at_the_limit)
    )

    assert read == at_the_limit + GOOD
    assert [(answer["id"], answer["error"]["code"]) for answer in answers] == [(None, -32600)]


def test_blank_lines_and_blanks_between_the_parts_of_a_message_are_no_mistakes() -> None:
    read, answers = read_through(b"\n \r\n" + b'{"jsonrpc": "2.0",\r"id": 8, "method": "ping"}\r\n')

    assert [json.loads(line)["id"] for line in read.splitlines()] == [8]
    assert answers == []


def say_raw(process: subprocess.Popen[str], *lines: bytes) -> None:
    assert process.stdin is not None
    process.stdin.flush()
    assert isinstance(process.stdin, io.TextIOWrapper)
    process.stdin.buffer.write(b"".join(line + b"\n" for line in lines))
    process.stdin.buffer.flush()


def check_answers_to_bad_lines(process: subprocess.Popen[str]) -> None:
    """Each bad line is answered at once, the next call works, and the log has a line for each."""
    say(process, HELLO, READY)
    assert hear(process)["id"] == 1
    for line, code, request_id in BAD_LINES:
        say_raw(process, line)
        answer = hear(process)
        assert (answer["error"]["code"], answer["id"]) == (code, request_id)
    say(process, call(8, "view_image", {"path": "no.png"}))
    answer = hear(process)
    assert answer["id"] == 8
    assert answer["result"]["structuredContent"]["error"] == "Image file not found: no.png"
    _, log = process.communicate(timeout=PATIENCE_S)
    lines = [line for line in log.splitlines() if "a line from the client was refused" in line]
    assert len(lines) == len(BAD_LINES)
    assert "Traceback" not in log


def test_a_client_of_the_process_gets_an_answer_to_every_line(tmp_path: Path) -> None:
    check_answers_to_bad_lines(start(tmp_path))


def test_a_client_gets_these_answers_from_a_process_that_has_joined_a_server(
    make_service: MakeService, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    with announcing(make_service(), data_dir):
        process = start(tmp_path, DATA_DIR=str(data_dir))
        check_answers_to_bad_lines(process)


def test_a_call_that_is_too_long_for_the_joined_server_gets_a_sentence_that_says_so(
    make_service: MakeService, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    with announcing(make_service(max_upload_mb=1), data_dir):
        process = start(tmp_path, DATA_DIR=str(data_dir))
        say(process, HELLO, READY)
        hear(process)
        say(process, call(2, "view_image", {"path": "x" * 8_000_000}))
        answer = hear(process)["result"]["structuredContent"]
        say(process, call(3, "view_image", {"path": "no.png"}))
        next_answer = hear(process)["result"]["structuredContent"]

    # The refusal arrives, or the connection breaks while the rest of the call is sent.
    assert re.search("the call may be too long|call is very long, send less", answer["error"])
    assert next_answer["error"] == "Image file not found: no.png"


# --- the end --------------------------------------------------------------------------------------

ENDS = [("eof", 0), ("SIGTERM", 0), ("SIGINT", 130)]


def end(process: subprocess.Popen[str], how: str) -> None:
    if how == "eof":
        assert process.stdin is not None
        process.stdin.close()
    else:
        process.send_signal(getattr(signal, how))


def start_editing(tmp_path: Path, prompt: str, steps: int = 50) -> subprocess.Popen[str]:
    """A server in the middle of an edit by a fake worker."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    process = start(tmp_path, FAKE)
    arguments = {"image_path": "a.png", "prompt": prompt, "num_steps": steps}
    say(process, HELLO, READY, call(2, "edit_image", arguments))
    hear(process)
    assert process.stderr is not None
    while "step" not in process.stderr.readline():
        pass
    return process


@pytest.mark.parametrize(("how", "exit_code"), ENDS)
def test_the_process_leaves_when_told(tmp_path: Path, how: str, exit_code: int) -> None:
    process = start(tmp_path)
    say(process, HELLO)
    hear(process)

    end(process, how)

    assert process.wait(timeout=PATIENCE_S) == exit_code
    assert process.stderr is not None
    assert process.stderr.read() == ""


@pytest.mark.parametrize(("how", "exit_code"), ENDS)
def test_a_running_edit_is_stopped_and_leaves_no_file(
    tmp_path: Path, how: str, exit_code: int
) -> None:
    process = start_editing(tmp_path, "x")

    end(process, how)
    if how != "eof":  # the client is still there and gets to know
        assert hear(process)["result"]["structuredContent"] == {
            "status": "error",
            "error": "Server shutting down",
            "code": "shutting_down",
        }

    assert process.wait(timeout=PATIENCE_S) == exit_code
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_a_call_ends_after_the_longest_wait_and_its_edit_with_the_process(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    process = start(tmp_path, FAKE, MCP_MAX_WAIT="1")

    edit = call(2, "edit_image", {"image_path": "a.png", "prompt": "hang"})
    say(process, HELLO, READY, edit)
    assert hear(process)["id"] == 1
    answer = hear(process)["result"]["structuredContent"]
    say(process, call(3, "get_job", {"job_id": answer["job_id"], "wait_s": 0}))
    again = hear(process)["result"]["structuredContent"]
    end(process, "eof")

    assert answer["status"] == "running"
    assert again == answer
    assert process.wait(timeout=PATIENCE_S) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_edit_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    process = start_editing(tmp_path, "hang")

    end(process, "eof")

    assert process.wait(timeout=PATIENCE_S) == 0


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    process = start_editing(tmp_path, "hang")

    end(process, "SIGINT")
    assert hear(process)["result"]["isError"]  # so the first one has been heard
    end(process, "SIGINT")

    assert process.wait(timeout=PATIENCE_S) == -signal.SIGINT


def test_a_client_that_reads_no_more_ends_it(tmp_path: Path) -> None:
    process = start(tmp_path)
    say(process, HELLO)
    hear(process)
    assert process.stdout is not None
    assert process.stdin is not None

    process.stdout.close()
    say(process, READY, call(2, "get_gpu_status", {}))

    assert process.wait(timeout=PATIENCE_S) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""


# --- the start ------------------------------------------------------------------------------------


def test_wrong_settings_stop_the_start_with_one_message(tmp_path: Path) -> None:
    process = start(tmp_path, MAX_QUEUE="none", DEVICE="toaster")
    out, log = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 1
    assert out == ""
    assert log.startswith("Invalid settings: ")
    assert "MAX_QUEUE" in log
    assert "DEVICE" in log
    assert "Traceback" not in log


def test_the_defaults_of_the_operator_show_in_the_schema(tmp_path: Path) -> None:
    async def steps() -> int:
        async with Client(transport(tmp_path, DEFAULT_NUM_STEPS="12")) as client:
            tools = {tool.name: tool for tool in await client.list_tools()}
        default: int = tools["edit_image"].input_schema["properties"]["num_steps"]["default"]
        return default

    assert asyncio.run(steps()) == 12


def test_without_an_installation_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    server = tmp_path / "mcp_server.py"
    server.write_bytes(SERVER.read_bytes())

    bare = ("-S", str(server))  # -S: a Python without installed packages
    process = start(tmp_path, bare, PYTHONPATH="")
    out, log = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 1
    assert out == ""
    assert log.strip() == f"step1x-edit is not installed: run `make setup` in {tmp_path}"
