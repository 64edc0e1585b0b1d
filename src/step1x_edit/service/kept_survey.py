"""The last survey of this machine, kept in DATA_DIR and used while nothing has changed.

A survey imports torch and may measure, which takes seconds; reading the file takes neither. With a
GPU no survey is kept: only torch can report how much of the card's memory is free.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from step1x_edit import cache
from step1x_edit.engine import host_memory
from step1x_edit.engine.machine import Survey, has_gpu_driver
from step1x_edit.errors import CheckpointError
from step1x_edit.hub.pulled import resolve_model_path
from step1x_edit.service.wiring import start_of
from step1x_edit.settings import Settings, inherited_environment

_FILE: Final = cache.FOLDER / "survey.json"
_LIBRARIES: Final = ("torch", "transformers")
_FOR_LIBRARIES: Final = ("ATEN_", "CUDA_", "DNNL_", "MKL_", "OMP_", "ONEDNN_", "PYTORCH_", "TORCH_")
"""How the variables begin that change what the libraries do."""
_PLENTY: Final = 3  # times the size of its files: a model is placed the same in more free memory
_SAME_MEMORY: Final = 0.1  # of all memory: what may be more or less free, if it is not plenty
_PACKAGE: Final = Path(__file__).parents[1]
_PROGRAM: Final = _PACKAGE / "__init__.py"
"""Has the version, so an update changes it."""
_EMBEDDED: Final = _PACKAGE / "model" / "demo"


@dataclass(frozen=True)
class KeptSurvey:
    """A survey, when it was taken, and what it depends on."""

    taken: datetime
    free: int
    """Bytes of memory that were free."""
    basis: str
    survey: Survey


def kept_survey(settings: Settings) -> KeptSurvey | None:
    """The survey in the file, if one taken now would say the same."""
    try:
        kept = TypeAdapter(KeptSurvey).validate_json((settings.data_dir / _FILE).read_bytes())
        is_same = kept.basis == _basis(settings) and _is_placed_alike(settings, kept.free)
    except (OSError, ValueError, CheckpointError):
        return None
    return kept if is_same else None


def keep_survey(settings: Settings, survey: Survey) -> None:
    """Write a survey to the file if it found no error and no GPU, and the file can be written."""
    memory = host_memory.measure()
    has_error = survey.torch_error or survey.device_error or survey.checkpoint_error
    if has_error or survey.device != "cpu" or memory is None:
        return
    with contextlib.suppress(OSError, CheckpointError):  # a file may be gone by now
        taken = datetime.now().astimezone().replace(microsecond=0)
        kept = KeptSurvey(taken, memory.available, _basis(settings), survey)
        content = TypeAdapter(KeptSurvey).dump_json(kept, indent=1)
        cache.replace_file(settings.data_dir / _FILE, content)


def _is_placed_alike(settings: Settings, free: int) -> bool:
    """Whether a model is placed now as when this many bytes of memory were free."""
    memory = host_memory.measure()
    if memory is None:
        return False
    plenty = _PLENTY * sum(file.stat().st_size for file in _files(settings))
    difference = abs(memory.available - free)
    return min(memory.available, free) >= plenty or difference < _SAME_MEMORY * memory.total


def _basis(settings: Settings) -> str:
    """A digest of what a survey depends on; raises CheckpointError or OSError without a model."""
    memory = host_memory.measure()
    environment = inherited_environment()
    basis = {
        "start": asdict(start_of(settings)),
        "programs": [platform.python_version(), *map(_library, _LIBRARIES), _stamp(_PROGRAM)],
        "machine": [platform.node(), platform.machine(), os.cpu_count(), memory and memory.total],
        "gpu": has_gpu_driver(),
        "environment": {
            name: value
            for name, value in sorted(environment.items())
            if name.startswith(_FOR_LIBRARIES)
        },
        "files": [_stamp(file) for file in _files(settings)],
    }
    return hashlib.sha256(json.dumps(basis).encode()).hexdigest()


def _library(name: str) -> list[object]:
    """The version and the place of a library, which is not imported; empty if it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return []
    versions = [found.version for found in importlib.metadata.distributions(name=name)]
    return [*versions, _stamp(Path(spec.origin))]


def _files(settings: Settings) -> Iterator[Path]:
    """The files of the checkpoint, also in linked folders, and its LoRAs."""
    path = resolve_model_path(settings.model_path, settings.data_dir) or _EMBEDDED
    folder = path if path.is_dir() else path.parent
    inside = (*folder.glob("*"), *folder.glob("*/*"))  # no checkpoint is deeper
    yield from sorted(file for file in inside if file.is_file())
    yield from sorted(settings.lora_path)


def _stamp(file: Path) -> tuple[str, int, int]:
    found = file.stat()
    return str(file), found.st_size, found.st_mtime_ns
