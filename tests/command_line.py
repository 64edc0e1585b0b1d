"""The command line as a separate process, with the settings of a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def edit(folder: Path, output: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `make it night` on `photo.png` of a folder, with the demo if no setting names a model."""
    arguments = ["edit", str(folder / "photo.png"), "night", "--output", str(folder / output)]
    arguments += ["--num-steps", "10", "--size-level", "512", "--seed", "1", "--json"]
    kept_apart = {"ALLOWED_DIRS": str(folder), "DATA_DIR": str(folder / "data"), "MODEL_PATH": ""}
    return subprocess.run(
        [sys.executable, "-m", "step1x_edit.interfaces.cli", *arguments],
        env=os.environ | kept_apart | settings,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
