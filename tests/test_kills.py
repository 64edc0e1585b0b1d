"""Sudden deaths: whatever is killed, files are whole or absent and no process stays behind."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

KILLS = 50
HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")


def has_gone(pid: int, within_s: float = 5.0) -> bool:
    """Only its parent can wait for a process; of a stranger we can see no more than its absence."""
    limit = time.monotonic() + within_s
    while time.monotonic() < limit:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def a_life(picture: Path, folder: Path, seconds: float) -> list[Path]:
    """Start a server that edits without a pause, kill it, and return what it said was finished."""
    folder.mkdir()
    paths = os.pathsep.join([str(HERE), *sys.path])
    server = subprocess.Popen(
        [sys.executable, str(HERE / "toy_server.py"), str(picture), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert server.stdout is not None
    worker = int(server.stdout.readline())
    first = server.stdout.readline()

    time.sleep(seconds)  # not for anything: the moment of death is to be any
    server.kill()
    rest = server.stdout.read().splitlines(keepends=True)
    server.wait()

    assert has_gone(worker)
    return [Path(line.rstrip("\n")) for line in [first, *rest] if line.endswith("\n")]


@pytest.mark.timeout(600)
def test_a_server_that_is_killed_while_it_writes_leaves_whole_files_and_nothing_else(
    tmp_path: Path,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    picture = tmp_path / "photo.png"
    Image.fromarray(pixels).save(picture)
    before = picture.read_bytes()
    moments = random.Random(7)
    folders = [tmp_path / f"life-{number}" for number in range(KILLS)]
    lives = [moments.uniform(0, 0.3) for _ in folders]

    with ThreadPoolExecutor(2) as pool:
        finished = list(
            pool.map(lambda life: a_life(picture, *life), zip(folders, lives, strict=True))
        )

    for folder, told in zip(folders, finished, strict=True):
        found = {*folder.iterdir()}
        assert found >= {*told}, "what it said was finished is there"
        assert len(found) <= len(told) + 1, "one more may have been published but not told"
        for path in found:
            assert path.suffix == ".png", f"{path} was left behind"
            assert np.array_equal(np.asarray(Image.open(path)), 255 - pixels)
    assert picture.read_bytes() == before
