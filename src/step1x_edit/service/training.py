"""A training in a child process, as its parent sees it: started, stopped, and its events."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from step1x_edit.engine.machine import check_device
from step1x_edit.engine.worker_process import start_of
from step1x_edit.errors import OutputExistsError, OutputNotWritableError, WorkerLostError, rebuild
from step1x_edit.schemas.training import STATE, Pair, TrainRequest
from step1x_edit.settings import Settings, inherited_environment

SUFFIX = ".safetensors"


def folder_of(output: Path) -> Path:
    """The folder of everything else that a training writes, beside its output."""
    return output.with_suffix(".train")


def check_output(output: Path, overwrite: bool) -> None:
    """Raise an OutputError if the LoRA cannot be written, or a file of another origin is there."""
    if output.suffix != SUFFIX:
        raise OutputNotWritableError(f"{output} must end in {SUFFIX}")
    if not output.parent.is_dir():
        raise OutputNotWritableError(f"{output.parent} is not a folder")
    if output.is_dir():
        raise OutputNotWritableError(f"{output} is a folder")
    if output.exists() and not overwrite and not (folder_of(output) / STATE).exists():
        raise OutputExistsError(f"{output}; --overwrite replaces it")


def train(
    settings: Settings,
    request: TrainRequest,
    pairs: Sequence[Pair],
    output: Path,
    overwrite: bool,
) -> Generator[dict[str, Any], None, None]:
    """Yield the events of `training.process`; closing the generator saves the state and stops.

    Raises SettingsError if DEVICE has no driver here.
    """
    check_device(settings.device, 1)
    yield from _events(_work(settings, request, pairs, output, overwrite))


def estimate(settings: Settings, request: TrainRequest) -> Generator[dict[str, Any], None, None]:
    """Yield what a step needs at each size."""
    work = _work(settings, request, (), Path("none"), False)
    yield from _events({**work, "only_estimate": True})


def _work(
    settings: Settings,
    request: TrainRequest,
    pairs: Sequence[Pair],
    output: Path,
    overwrite: bool,
) -> dict[str, Any]:
    return {
        "start": asdict(start_of(settings)),
        "request": request.model_dump(),
        "pairs": [asdict(pair) for pair in pairs],
        "limits": asdict(settings.limits),
        "output": str(output),
        "folder": str(folder_of(output)),
        "overwrite": overwrite,
        "only_estimate": False,
    }


def _events(work: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    with subprocess.Popen(
        [sys.executable, "-m", "step1x_edit.training.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=inherited_environment(PYTHONSAFEPATH="1"),
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        last: dict[str, Any] = {}
        try:
            child.stdin.write(json.dumps(work) + "\n")
            child.stdin.flush()
            for line in child.stdout:
                last = json.loads(line)
                if "failed" in last:
                    raise rebuild(last["failed"], last["sentence"])
                yield last
        finally:
            child.stdin.close()  # it saves its state and exits
            child.stdout.read()
    if not last.keys() & {"trained", "stopped", "needs"}:
        raise WorkerLostError(f"training ended with exit code {child.returncode}; run it again")
