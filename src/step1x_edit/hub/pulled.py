"""Pulled models: each is a folder below `DATA_DIR/models`, complete or absent.

A model being fetched is kept beside it as `NAME.partial` and gets its name when it is complete; a
model being removed loses its name first. So a folder with a model's name can be used. This module
knows nothing about networks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from filelock import FileLock, Timeout

from step1x_edit.errors import CheckpointError, InvalidParameterError, ModelFetchError
from step1x_edit.hub.catalog import CATALOG, Model, find_model, is_hub_id

PARTIAL, REMOVED, LOCK = ".partial", ".removed", ".lock"
PULL_COMMAND: Final = "step1x-edit models pull"


@dataclass(frozen=True)
class Kept:
    """A model on this disk."""

    name: str
    folder: Path
    state: Literal["pulled", "partial"]
    size: int


def models_folder(data_dir: Path) -> Path:
    """The folder of the models."""
    return data_dir / "models"


def kept_models(models: Path) -> list[Kept]:
    """The complete and partial models, by name."""
    if not models.is_dir():
        return []
    known = {model.folder_name: model.name for model in CATALOG}
    found = []
    for folder in sorted(path for path in models.iterdir() if path.is_dir()):
        name = folder.name.removesuffix(PARTIAL)
        if name.endswith(REMOVED):
            continue
        state: Literal["pulled", "partial"] = "pulled" if name == folder.name else "partial"
        name = known.get(name, name.replace("--", "/"))
        if name not in known.values() and not is_hub_id(name):
            continue  # not ours
        found.append(Kept(name, folder, state, folder_size(folder)))
    return found


def folder_size(folder: Path) -> int:
    """The total size of its files in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def find_pulled(name: str, models: Path) -> Path:
    """The folder of a pulled model. Raises ModelFetchError if it is not completely there."""
    model = find_model(name)
    folder = models / model.folder_name
    if not folder.is_dir():
        raise ModelFetchError(_not_pulled(model))
    return folder


def _not_pulled(model: Model) -> str:
    return f"{model.name} is not pulled; run {PULL_COMMAND} {model.name}"


def resolve_model_path(value: str | Path | None, data_dir: Path) -> Path | None:
    """The path that MODEL_PATH means: itself, or the folder of the pulled model that it names.

    A value that exists as a path is one. Raises CheckpointError for a model that is not pulled.
    """
    if value is None:
        return None
    path = Path(value).expanduser()
    if os.path.exists(path):  # noqa: PTH110 - pathlib's raises without permission
        return path
    name = Path(value).as_posix()
    with contextlib.suppress(InvalidParameterError):
        is_listed = name.lower() in {model.name for model in CATALOG}
        if is_listed or is_hub_id(name):
            model = find_model(name)
            folder = models_folder(data_dir) / model.folder_name
            if not folder.is_dir():
                raise CheckpointError(f"MODEL_PATH {_not_pulled(model)}")
            return folder
    return path


def pulled_version(folder: Path | None, data_dir: Path) -> str | None:
    """The version that a folder was pulled as, if it is in the catalog."""
    if folder is None or folder.resolve().parent != models_folder(data_dir).resolve():
        return None
    known = {model.folder_name: model.version for model in CATALOG}
    return known.get(folder.resolve().name)


def remove_model(name: str, models: Path) -> int:
    """Delete a model, or what a pull has left of it, and return the freed bytes.

    Raises InvalidParameterError if there is nothing.
    """
    model = find_model(name)
    whole = models / model.folder_name
    partial = partial_folder(model, models)
    removed = whole.with_name(whole.name + REMOVED)
    if not any(path.is_dir() for path in (whole, partial, removed)):
        raise InvalidParameterError(f"{model.name} is not pulled, so there is nothing to remove")
    with held(model, models):
        shutil.rmtree(removed, ignore_errors=True)  # left by an interrupted removal
        freed = 0
        for folder in (whole, partial):
            if folder.is_dir():
                freed += folder_size(folder)
                folder.rename(removed)
                shutil.rmtree(removed)
    return freed


def partial_folder(model: Model, models: Path) -> Path:
    """The folder of a model until it is complete."""
    return models / (model.folder_name + PARTIAL)


def publish(model: Model, models: Path) -> Path:
    """Give a complete model its final name, under which it is found."""
    folder = models / model.folder_name
    partial_folder(model, models).rename(folder)
    if os.name != "nt":
        descriptor = os.open(models, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return folder


@contextlib.contextmanager
def held(model: Model, models: Path) -> Iterator[None]:
    """Lock a model against changes by other processes. Raises ModelFetchError if one holds it.

    The system releases the lock when its process ends, however it ends.
    """
    models.mkdir(parents=True, exist_ok=True)
    lock = FileLock(models / (model.folder_name + LOCK), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ModelFetchError(
            f"another process is pulling or removing {model.name} now; wait until it is done"
        ) from None
    try:
        yield
    finally:
        lock.release()
