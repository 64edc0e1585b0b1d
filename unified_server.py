"""Every door over HTTP: `python3 unified_server.py`, the same as `step1x-edit serve`."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
_VENV = _FOLDER / ".venv"
_VENV_PYTHON = _VENV / "bin" / "python"

if find_spec("step1x_edit") is None:
    # Many systems start python3 of their own, while `make setup` installs into .venv.
    if not _VENV_PYTHON.exists() or Path(sys.prefix) == _VENV:
        sys.exit(f"step1x-edit is not installed: run `make setup` in {_FOLDER}")
    os.execv(_VENV_PYTHON, [str(_VENV_PYTHON), *sys.argv])  # noqa: S606

from step1x_edit.interfaces.cli import app  # noqa: E402

if __name__ == "__main__":
    app(["serve", *sys.argv[1:]])
