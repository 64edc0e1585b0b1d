"""The benchmark of full-size edits runs to its end on narrow networks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from extent import slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "full_size.py"
SMALL = ("--width", "narrow", "--blocks", "1", "2", "--sizes", "128", "--steps", "2")


@slow
@pytest.mark.parametrize("version", ["v1.1", "v1.2"])
def test_every_stage_has_figures(tmp_path: Path, version: str) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, *SMALL, "--version", version, "--folder", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )

    found = json.loads(done.stdout.splitlines()[-1])
    stages = ("conditioner, picture", "conditioner, words", "encoder", "prologue", "step")
    edit = found["128"]["stages"]
    assert set(edit) == {"reading", *stages, "decoder", "whole edit"}
    assert 0 < edit["decoder"]["alone_s"] < edit["decoder"]["cpu_seconds"]
    assert edit["whole edit"]["peak_gb"] > found["plain_read"]["gb"] > 0.05
    assert ("thinking" in found) is (version == "v1.2")
    assert not list(tmp_path.iterdir())
