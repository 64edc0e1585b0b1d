"""What a door imports before its first answer. `benchmarks/bench_startup.py` measures the time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).parents[2] / "mcp_server.py"
COMMANDS = ("-m", "step1x_edit.interfaces.cli")

HEAVY = {
    "PIL",
    "c2pa",
    "diffusers",
    "fastapi",
    "gradio",
    "griffe",
    "huggingface_hub",
    "numpy",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
}
"""Packages that take long to import, and that only pictures, models or the web page need."""

PROTOCOL = {"fastmcp", "mcp", "mcp_types"}

ASKED: tuple[dict[str, Any], ...] = (
    {
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-11-25",
            "capabilities": {},
            "clientInfo": {"name": "test", "version": "1"},
        },
    },
    {"method": "tools/list"},
    {"method": "prompts/list"},
    {"method": "tools/call", "params": {"name": "get_gpu_status", "arguments": {}}},
)
"""What a client asks before anybody wants a picture."""


def imported(log: str) -> set[str]:
    """The packages that `python -X importtime` names."""
    lines = [line.rsplit("|", 1)[1] for line in log.splitlines() if line.startswith("import time:")]
    return {line.strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize(
    "command", [(str(SERVER), "--standalone"), (*COMMANDS, "mcp", "--standalone")]
)
def test_a_client_learns_all_about_the_tools_without_what_only_pictures_need(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-X", "importtime", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=tmp_path,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.closing(process.stdin), contextlib.closing(process.stdout):
        for number, question in enumerate(ASKED):
            process.stdin.write(json.dumps({"jsonrpc": "2.0", "id": number} | question) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert answer["id"] == number
            assert "result" in answer
        packages = imported(log.read_text())
    process.wait()

    assert packages >= {"fastmcp", "step1x_edit"}
    assert not packages & (HEAVY | {"typer"})


@pytest.mark.parametrize("arguments", [("--help",), ("edit", "--help"), ("status", "--json")])
def test_the_command_line_answers_without_what_only_pictures_or_protocols_need(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    process = subprocess.run(
        [sys.executable, "-X", "importtime", *COMMANDS, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "DATA_DIR": str(tmp_path)},
        check=True,
    )
    packages = imported(process.stderr)

    assert process.stdout
    assert packages >= {"typer", "step1x_edit"}
    assert not packages & (HEAVY | PROTOCOL)


LIBRARIES = """
import gc, sys
from step1x_edit.worker.libraries import import_libraries
assert not {"numpy", "pydantic", "torch"} & set(sys.modules), "a worker listens before"
import_libraries()
from step1x_edit.checkpoints.read import open_checkpoint
open_checkpoint().loras.changes()
import torch
torch.randn(1, generator=torch.Generator().manual_seed(1))
print("libraries are there", file=sys.stderr, flush=True)
from transformers.processing_utils import ProcessorMixin, transformers_module
from transformers.utils.import_utils import _LazyModule
from step1x_edit.checkpoints.read import Qwen2_5_VLModel
assert not isinstance(transformers_module, _LazyModule), "all names are listed"
assert ProcessorMixin.get_possibly_dynamic_module("Qwen2_5_VLModel") is Qwen2_5_VLModel
import scipy, sklearn, torch._dynamo, transformers
assert transformers.Qwen2_5_VLModel is Qwen2_5_VLModel
assert torch.distributed.is_available()
print(gc.isenabled())
"""


def test_a_worker_imports_its_libraries_without_what_no_model_needs() -> None:
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", LIBRARIES],
        capture_output=True,
        text=True,
        check=True,
    )
    libraries, _, _ = process.stderr.partition("libraries are there")
    packages = imported(libraries)

    assert packages >= {"torch", "transformers"}
    assert not packages & {"pydantic", "scipy", "sklearn", "sympy"}
    assert process.stdout == "True\n"


ANOTHER_VERSION = """
import sys
from types import ModuleType
from step1x_edit.worker.libraries import import_libraries

class NeedsTheWholePackage:
    def find_spec(self, name, path, target=None):
        is_bare = type(sys.modules.get("transformers")) is ModuleType
        if name == "transformers.masking_utils" and is_bare:
            raise AttributeError("a version that asks its package for something")

sys.meta_path.insert(0, NeedsTheWholePackage())
import_libraries()
from step1x_edit.checkpoints.read import Qwen2_5_VLModel
print(Qwen2_5_VLModel is sys.modules["transformers"].Qwen2_5_VLModel)
"""


def test_a_transformers_that_needs_all_of_itself_is_imported_whole() -> None:
    process = subprocess.run(
        [sys.executable, "-c", ANOTHER_VERSION], capture_output=True, text=True, check=True
    )

    assert process.stdout == "True\n"
