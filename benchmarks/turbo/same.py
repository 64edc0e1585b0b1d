"""Whether exact edits have the same bytes as those of another build."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

import step1x_edit
from bench_demo import PROMPTS
from demo_data import HELD_OUT_PHOTOS, load_photo

HERE: Final = Path(step1x_edit.__file__).parents[1]
REQUESTS: Final = (
    ("night", "png", "--seed 1"),
    ("bw", "png", "--seed 2 --guidance-scale 1"),
    ("sketch", "jpg", "--seed 3 --guidance-scale 9.5"),
    ("warm", "webp", "--seed 4 --num-steps 13"),
    ("dark", "tiff", "--seed 5"),
    ("vivid", "png", "--seed 6 --negative-prompt grey"),
    ("mosaic", "png", "--seed 7 --mask MASK"),
    ("painting", "jpg", "--seed 8 --num-steps 11"),
    ("invert", "bmp", "--seed 9 --guidance-scale 2"),
    ("blur", "png", "--seed 10 --size-level 768"),
)
"""Edit, format, and other parameters; otherwise 512 and 10 steps."""


def same(other: Path, number: int) -> list[dict[str, Any]]:
    """Make ten exact edits with the command line of both builds, and compare the files."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo, mask = folder / "photo.png", folder / "mask.png"
        pixels = (load_photo(*HELD_OUT_PHOTOS["coffee"]) * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(photo)
        Image.fromarray(pixels[..., 0] // 128 * 255).save(mask)
        for edit, suffix, words in REQUESTS[:number]:
            parameters = words.replace("MASK", str(mask)).split()
            if "--num-steps" not in parameters:
                parameters += ["--num-steps", "10"]
            if "--size-level" not in parameters:
                parameters += ["--size-level", "512"]
            results = []
            for build in (HERE, other):
                output = folder / f"result.{suffix}"
                edited(build, folder, photo, PROMPTS[edit], output, parameters)
                results.append(hashlib.sha256(output.read_bytes()).hexdigest())
                output.unlink()
            here, there = results
            rows.append({"request": f"{edit}.{suffix} {words}", "same": here == there})
    return rows


def edited(
    build: Path, folder: Path, photo: Path, prompt: str, output: Path, parameters: list[str]
) -> None:
    """Both builds use one folder of data, so that they compute with the same arithmetic."""
    command = [sys.executable, "-m", "step1x_edit.interfaces.cli", "edit", str(photo), prompt]
    environment = os.environ | {"PYTHONPATH": str(build), "DATA_DIR": str(folder / "data")}
    subprocess.run(
        [*command, "--output", str(output), *parameters], env=environment, check=True, cwd=folder
    )
