"""Each event is one line of the log, whatever it has in it, and for programs one JSON object."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from server_process import started

TOY = Path(__file__).parents[1] / "serve_toy_http.py"
FORGED = '\r\n{"level": "CRITICAL", "message": "forged"}\n2026-01-01 00:00:00 CRITICAL forged'
HOSTILE = [
    FORGED,
    "\x1b[2J\x1b[31mred\x07",
    "\x00\x1f\x7f\x9b",
    "\u202eturned\u2066",
    "one\u2028two\u2029three\x85four\x0bfive\x0csix",
    "\ud800 alone",
    '"}, {"',
    "%s %(name)s {0}",
    "戴红帽子 🎩",
    "x" * 100_000,
]
LOGS = f"""
import logging, sys, warnings
from step1x_edit.logs import log_to_stderr

log_to_stderr("INFO", sys.argv[1], sys.argv[2])
for text in {HOSTILE!r}:
    logging.getLogger("step1x_edit.test").info("file %s", text)
    logging.getLogger("uvicorn.error").warning(text)
    logging.getLogger("uvicorn.error").info("told by uvicorn")
    warnings.warn(text)
    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger("step1x_edit.test").exception("it failed")
    logging.getLogger("step1x_edit.test").debug("prompt")
"""
EVENTS = 4 * len(HOSTILE)


def lines_of(log_format: str, process: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOGS, log_format, process],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=240,
        check=True,
    )
    assert done.stderr.endswith("\n")
    return done.stderr[:-1].split("\n")


@pytest.mark.parametrize("process", ["server", "worker"])
def test_hostile_text_stays_within_its_json(process: str) -> None:
    lines = lines_of("json", process)
    events = [json.loads(line) for line in lines]

    assert len(events) == EVENTS
    assert all(line.isprintable() and line.isascii() for line in lines)
    assert {event["process"] for event in events} == {process}
    assert {event["level"] for event in events} == {"INFO", "WARNING", "ERROR"}
    assert [event["message"] for event in events[::4]] == [f"file {text}" for text in HOSTILE]
    assert all("ValueError" in event["exception"] for event in events[3::4])
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z", e["time"]) for e in events)


@pytest.mark.parametrize("process", ["server", "worker"])
def test_hostile_text_stays_within_its_line(process: str) -> None:
    lines = lines_of("text", process)

    assert len(lines) == EVENTS
    assert all(line.isprintable() for line in lines)
    assert all(
        re.match(r"\d{4}-\d\d-\d\d [\d:,]{12} (INFO|WARNING|ERROR) ", line) for line in lines
    )
    assert sum("戴红帽子 🎩" in line for line in lines) == 4  # what can be read is left as it is
    assert sum("Traceback" in line for line in lines) == len(HOSTILE)


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_every_line_of_a_server_and_its_worker_is_an_event(
    tmp_path: Path, photo: Path, log_format: str
) -> None:
    wish = f"a secret wish {FORGED}"
    folder = tmp_path / "here \x1b[31m\nthere"
    folder.mkdir()
    paths = os.pathsep.join([str(TOY.parent), *sys.path])
    with started(TOY, folder, LOG_FORMAT=log_format, PYTHONPATH=paths) as process:
        url = process.heard("serving at").rpartition("serving at ")[2].strip(' \n"}')
        answers = [
            httpx2.post(
                f"{url}/api/edit",
                files={"file": (FORGED, photo.read_bytes())},
                data={"prompt": prompt, "num_steps": "10"},
                timeout=240,
            )
            for prompt in (wish, f"stumble {wish}", f"fail {wish}")
        ]
        httpx2.get(
            f"{url}/a%0d%0aforged%1b%5b31m?{'x' * 1000}",
            headers={"User-Agent": "x\x1b[1m"},
            timeout=240,
        )
        httpx2.post(f"{url}/v1/jobs", files={"file": b"x"}, data={"prompt": wish}, timeout=240)
        process.popen.send_signal(signal.SIGTERM)
        code = process.ended()

    assert code == 0
    assert [answer.status_code for answer in answers] == [200, 500, 503]
    assert not any("secret wish" in line for line in process.lines)
    assert all(line[:-1].isprintable() for line in process.lines)
    ids = [answer.headers["x-request-id"] for answer in answers]
    if log_format == "json":
        events = [json.loads(line) for line in process.lines]
        assert {event["process"] for event in events} == {"server", "worker"}
        assert [e["request_id"] for e in events if "POST /api/edit" in e["message"]] == ids
        assert [e for e in events if "ZeroDivisionError" in e.get("exception", "")]
    else:
        line_begins = re.compile(r"\d{4}-\d\d-\d\d [\d:,]{12} [A-Z]+ ")
        assert all(line_begins.match(line) for line in process.lines)
        posted = [line.strip() for line in process.lines if "POST /api/edit" in line]
        assert [line.rpartition("id=")[2] for line in posted] == ids
        assert [line for line in process.lines if "ERROR worker " in line]
