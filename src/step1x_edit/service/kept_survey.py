"""The last survey of this machine, kept in DATA_DIR and used while nothing has changed: by
`doctor`, by the list of models and by estimates.

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
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from step1x_edit import cache
from step1x_edit.checkpoints.converted import converted_files
from step1x_edit.engine import host_memory, machine
from step1x_edit.engine.machine import Survey
from step1x_edit.engine.worker_process import start_of
from step1x_edit.errors import CheckpointError
from step1x_edit.hub.pulled import resolve_model_path
from step1x_edit.settings import Settings, inherited_environment

_FILE: Final = cache.FOLDER / "survey.json"
_LIBRARIES: Final = ("torch", "transformers", "spandrel")
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


def current_survey(settings: Settings, timeout_s: float = machine.TIMEOUT_S) -> Survey:
    """The kept survey while it holds, or a new one."""
    kept = kept_survey(settings)
    return new_survey(settings, timeout_s) if kept is None else kept.survey


def kept_survey(settings: Settings) -> KeptSurvey | None:
    """The survey in the file, if one taken now would say the same."""
    try:
        kept = TypeAdapter(KeptSurvey).validate_json((settings.data_dir / _FILE).read_bytes())
        now = _conditions(settings)
    except (OSError, ValueError, CheckpointError):
        return None
    return kept if now is not None and now.still_hold(kept) else None


def new_survey(settings: Settings, timeout_s: float = machine.TIMEOUT_S) -> Survey:
    """Inspect the machine; the survey is kept if it found no error and no GPU."""
    survey = machine.inspect_machine(start_of(settings), timeout_s)
    errors = (
        survey.torch_error,
        survey.device_error,
        survey.checkpoint_error,
        survey.upscale_error,
    )
    has_error = any(errors)
    if has_error or survey.device != "cpu":
        return survey
    with contextlib.suppress(OSError, CheckpointError):  # a file may be gone by now
        if (now := _conditions(settings)) is not None:
            taken = datetime.now().astimezone().replace(microsecond=0)
            kept = KeptSurvey(taken, now.free, now.basis, survey)
            content = TypeAdapter(KeptSurvey).dump_json(kept, indent=1)
            cache.replace_file(settings.data_dir / _FILE, content)
    return survey


@dataclass(frozen=True)
class _Conditions:
    """What a survey depends on."""

    basis: str
    """A digest of all that must be the same."""
    free: int
    """Bytes of memory that are free."""
    total: int
    """Bytes of memory."""
    plenty: int
    """Free bytes from which on more make no difference."""

    def still_hold(self, kept: KeptSurvey) -> bool:
        """Whether a survey taken under these conditions would say the same as a kept one."""
        has_plenty = min(self.free, kept.free) >= self.plenty
        is_alike = abs(self.free - kept.free) < _SAME_MEMORY * self.total
        return self.basis == kept.basis and (has_plenty or is_alike)


def _conditions(settings: Settings) -> _Conditions | None:
    """Those of now; None if the system does not report its memory.

    Raises CheckpointError or OSError without a model.
    """
    memory = host_memory.measure()
    if memory is None:
        return None
    files = [_stamp(file) for file in _files(settings)]
    environment = inherited_environment()
    # The command line logs less than a server.
    start = replace(start_of(settings), log_level="", log_format="")
    basis = {
        "start": asdict(start),
        "programs": [platform.python_version(), *map(_library, _LIBRARIES), _stamp(_PROGRAM)],
        "machine": [platform.node(), platform.machine(), os.cpu_count(), memory.total],
        "gpu": machine.has_gpu_driver(),
        "environment": {
            name: value
            for name, value in sorted(environment.items())
            if name.startswith(_FOR_LIBRARIES)
        },
        "files": files,
    }
    return _Conditions(
        basis=hashlib.sha256(json.dumps(basis).encode()).hexdigest(),
        free=memory.available,
        total=memory.total,
        plenty=_PLENTY * sum(size for _, size, _ in files),
    )


def _library(name: str) -> list[object]:
    """The version and the place of a library, which is not imported; empty if it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return []
    versions = [found.version for found in importlib.metadata.distributions(name=name)]
    return [*versions, _stamp(Path(spec.origin))]


def _files(settings: Settings) -> Iterator[Path]:
    """The files of the checkpoint (also in linked folders), its codes, LoRAs and the upscaler."""
    path = resolve_model_path(settings.model_path, settings.data_dir) or _EMBEDDED
    folder = path if path.is_dir() else path.parent
    inside = (*folder.glob("*"), *folder.glob("*/*"))  # no checkpoint is deeper
    yield from sorted(file for file in inside if file.is_file())
    yield from (found.file for found in converted_files(settings.data_dir, path))
    yield from sorted(settings.lora_path)
    if settings.upscale_model is not None:
        yield settings.upscale_model


def _stamp(file: Path) -> tuple[str, int, int]:
    found = file.stat()
    return str(file), found.st_size, found.st_mtime_ns
