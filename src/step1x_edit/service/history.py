"""The history: what a person has edited, as trees of steps on disk.

A step is one small file, published after its pictures, so a kill leaves a whole step or none.
Pictures are named by the SHA-256 of their bytes, and the same bytes are kept once. No caller needs
to name the parent of a step: it is the step whose result was edited. All steps that go back to one
original are a tree. If the trees need too much space, whole ones are removed, those first that were
left alone longest.

Everything is in `DATA_DIR/history`, readable by its user only. Several processes can use it at a
time: changes hold a lock.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from filelock import FileLock
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from step1x_edit.errors import (
    CorruptImageError,
    InvalidParameterError,
    NoSpaceError,
    OutputError,
    Step1XEditError,
)
from step1x_edit.schemas.answers import EditMetadata
from step1x_edit.schemas.requests import HowToEdit
from step1x_edit.service import durable
from step1x_edit.settings import MEBI, Limits, Settings

if TYPE_CHECKING:  # deferred: a server starts to answer before numpy is imported
    from step1x_edit.pictures.images import Picture

log = logging.getLogger(__name__)

FOLDER_NAME: Final = "history"
ORIGINAL: Final = "original"
"""The name of the picture that a tree began with, where others are named by their steps."""

_ID_LENGTH: Final = 12
_PREVIEW_SIDE: Final = 320
_DIGEST: Final = re.compile(r"\b[0-9a-f]{64}\b")
_ENDS: Final = ".!?…。！？"

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _known(metadata: object) -> object:
    """Without the fields of a newer version."""
    if not isinstance(metadata, dict):
        return metadata
    return {name: metadata[name] for name in metadata if name in EditMetadata.model_fields}


@dataclass(frozen=True)
class NewStep:
    """A picture that was edited, or generated, and what from."""

    name: str
    """Of the input; or of the result, if it was generated."""
    image: bytes | None
    """The input; None if the picture was generated."""
    mask: bytes | None
    result: bytes
    suffix: str
    metadata: EditMetadata


class Step(BaseModel):
    """One edit, or the generation of a picture; files are named by the SHA-256 of their bytes."""

    model_config = ConfigDict(frozen=True)

    id: str
    parent: str | None
    """The step whose result was edited; None if that was the original, or if there was none."""
    name: str
    """Of the original."""
    original: Digest
    """The picture that the tree began with; the result itself if it was generated."""
    source: Digest | None
    """The picture that was edited; None if this one was generated."""
    mask: Digest | None
    result: Digest
    preview: Digest
    """A small JPEG of the result."""
    suffix: str
    made_at: datetime
    metadata: Annotated[EditMetadata, BeforeValidator(_known)]
    """The prompt and all parameters, as an answer has them."""
    drift: float | None
    """How many levels, of 255, the rest of the picture has moved since the original."""

    @property
    def pictures(self) -> set[str]:
        """The SHA-256 of each of its pictures."""
        named = (self.original, self.source, self.mask, self.result, self.preview)
        return {digest for digest in named if digest is not None}

    @property
    def arguments(self) -> dict[str, Any]:
        """The parameters of an edit with the same settings, by name."""
        made = self.metadata.model_dump(include={"prompt", *HowToEdit.model_fields})
        region = None if self.metadata.region is None else "full"  # an answer has its place
        return {**made, "loras": made["loras"] or [], "region": region}


@dataclass(frozen=True)
class Again:
    """An edit of an original, in place of several edits one after the other."""

    image: bytes
    mask: bytes | None
    arguments: Mapping[str, Any]


def history_of(settings: Settings) -> History | None:
    """The history in which edits are kept; None if HISTORY is off."""
    return History(settings) if settings.history else None


class History:
    """The steps and pictures in one folder."""

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.data_dir / FOLDER_NAME
        self._steps = self._folder / "steps"
        self._pictures = self._folder / "pictures"
        self._max_bytes = settings.history_mb * MEBI
        self._limits: Limits = settings.limits

    # --- reading ----------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """All steps, the oldest first."""
        found = []
        for file in self._steps.glob("*.json"):
            try:
                found.append(Step.model_validate_json(file.read_bytes()))
            except FileNotFoundError:  # deleted meanwhile
                continue
            except (OSError, ValidationError) as error:
                log.warning("the history leaves out %s, which cannot be read", file)
                log.debug("%s", error)
        return sorted(found, key=lambda step: (step.made_at, step.id))

    def find(self, step_id: str) -> Step:
        """The step with this id, or the only one whose id begins so.

        Raises InvalidParameterError.
        """
        found = [step for step in self.steps() if step.id.startswith(step_id) and step_id]
        if len(found) != 1:
            there_is = "has several steps that begin with" if found else "has no step"
            raise InvalidParameterError(
                f"the history {there_is} {step_id!r}; step1x-edit history list shows all"
            )
        return found[0]

    def read(self, digest: str) -> bytes:
        """The bytes of a picture; raises CorruptImageError if they are no longer there."""
        try:
            data = (self._pictures / digest).read_bytes()
        except OSError:
            data = b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise CorruptImageError("a picture of the history is missing or damaged")
        return data

    def path_to(self, step: Step) -> list[Step]:
        """The edits that lead from the original to this step, which is the last one."""
        by_id = {each.id: each for each in self.steps()}
        path = [step]
        while (parent := by_id.get(path[0].parent or "")) is not None:
            path.insert(0, parent)
        return [each for each in path if each.source is not None]

    def drift(self, before: str, after: str) -> float | None:
        """How much the rest of a picture differs from another, both by their SHA-256."""
        from step1x_edit.pictures import images

        after_it = images.decode(self.read(after), self._limits)
        return self._drift(self.read(before), after_it, [None])

    def from_original(self, step: Step, prompt: str = "") -> Again:
        """The edit that makes of the original at once what this step, and a prompt, make of it.

        Its parameters are those of the step. Raises InvalidParameterError if nothing was edited, or
        if the edits changed different regions, because one edit has one mask and one canvas.
        """
        path = self.path_to(step)
        prompts = [*(each.metadata.prompt for each in path), prompt]
        masks = {each.mask for each in path}
        if not any(prompts):
            raise InvalidParameterError(f"step {step.id} is an original; say what to change")
        has_grown = len(path) > 1 and any(each.arguments["outpaint"] for each in path)
        if len(masks) > 1 or has_grown:
            raise InvalidParameterError(
                f"the edits up to step {step.id} changed different regions, which one edit of the "
                "original cannot do; edit the step instead"
            )
        mask = next(iter(masks), None)
        return Again(
            self.read(step.original),
            None if mask is None else self.read(mask),
            {**step.arguments, "prompt": merged(prompts)},
        )

    # --- keeping and deleting ---------------------------------------------------------------------

    def keep(self, made: NewStep) -> Step | None:
        """Add a step; None, and a warning in the log, if it cannot be kept.

        The same edit with the same result is kept once.
        """
        try:
            return self._keep(made)
        except Step1XEditError as error:
            log.warning("this edit is not kept in the history: %s", error)
            return None

    def delete(self, step: Step) -> int:
        """Delete a step and all that were made from it; returns how many."""
        with self._held():
            left, doomed = self.steps(), [step]
            for parent in doomed:  # which grows
                doomed += [each for each in left if each.parent == parent.id]
            return self._forget(doomed)

    def delete_tree(self, step: Step) -> int:
        """Delete all steps that go back to the original of this one, and the original."""
        with self._held():
            return self._forget(each for each in self.steps() if each.original == step.original)

    def delete_all(self) -> int:
        """Delete everything, also what this version cannot read."""
        with self._held():
            files = [*self._steps.iterdir()]
            for file in files:
                file.unlink()
            self._sweep()
            return len(files)

    def _keep(self, made: NewStep) -> Step:
        with self._held():
            self._sweep()
            steps = self.steps()
            step, preview = self._step_of(made, steps)
            pictures = {
                _digest(data): data
                for data in (made.image, made.mask, made.result, preview)
                if data is not None
            }
            self._make_room(step, pictures, steps)
            for digest, data in pictures.items():
                if not (self._pictures / digest).exists():
                    durable.publish(self._pictures / digest, data)
            durable.publish(self._file(step), step.model_dump_json().encode())
            return step

    def _step_of(self, made: NewStep, steps: Sequence[Step]) -> tuple[Step, bytes]:
        """The step, without keeping it, and its preview."""
        from step1x_edit.pictures import images

        picture = images.decode(made.result, self._limits)
        preview = images.preview(picture, _PREVIEW_SIDE)
        result = _digest(made.result)
        source = None if made.image is None else _digest(made.image)
        mask = None if made.mask is None else _digest(made.mask)
        parent = next((each for each in reversed(steps) if each.result == source), None)
        original = source or result if parent is None else parent.original
        drifted = None
        if made.image is not None:
            first = made.image if original == source else self.read(original)
            before = [] if parent is None else self.path_to(parent)
            masks = [None if each.mask is None else self.read(each.mask) for each in before]
            drifted = self._drift(first, picture, [*masks, made.mask])
        identity = (None if parent is None else parent.id, source, mask, result)
        step = Step(
            id=_digest(repr(identity).encode())[:_ID_LENGTH],
            parent=identity[0],
            name=made.name if parent is None else parent.name,
            original=original,
            source=source,
            mask=mask,
            result=result,
            preview=_digest(preview),
            suffix=made.suffix,
            made_at=datetime.now(timezone.utc),
            metadata=made.metadata,
            drift=drifted,
        )
        return step, preview

    def _drift(self, before: bytes, after: Picture, masks: Sequence[bytes | None]) -> float | None:
        """The drift of some edits with these masks; one without a mask could change everything."""
        import numpy as np

        from step1x_edit.pictures import images
        from step1x_edit.pictures.drift import drift

        first, size = images.decode(before, self._limits), (after.width, after.height)
        if first.pixels.shape != after.pixels.shape:
            return None
        regions = [images.decode_mask(mask, self._limits, size) for mask in masks if mask]
        may_change = np.maximum.reduce(regions) if len(regions) == len(masks) else None
        moved = drift(first.in_srgb, after.in_srgb, may_change)
        return None if moved is None else round(moved, 2)

    def _make_room(self, step: Step, pictures: Mapping[str, bytes], steps: Sequence[Step]) -> None:
        """Delete the trees that were left alone longest, but not that of the step."""
        sizes = {file.name: file.stat().st_size for file in self._pictures.iterdir()}
        sizes |= {digest: len(data) for digest, data in pictures.items()}
        trees = {step.original: [step]}
        for each in reversed(steps):
            trees.setdefault(each.original, []).append(each)
        wanted: set[str] = set()
        for number, tree in enumerate(trees.values()):
            wanted.update(digest for each in tree for digest in each.pictures)
            if sum(sizes.get(digest, 0) for digest in wanted) <= self._max_bytes:
                continue
            if number == 0:
                raise NoSpaceError(
                    f"the steps of {step.name} alone need more than {self._max_bytes // MEBI} MiB; "
                    "delete some, or raise HISTORY_MB"
                )
            older = [each for tree in [*trees.values()][number:] for each in tree]
            self._forget(older)
            return

    def _forget(self, steps: Iterable[Step]) -> int:
        """Delete these steps, of which no other was made; returns how many."""
        number = 0
        for step in steps:
            self._file(step).unlink(missing_ok=True)
            number += 1
        durable.sync_folder(self._steps)
        self._sweep()
        return number

    def _sweep(self) -> None:
        """Remove pictures that no step names, and what kills have left.

        Steps are searched as text: one that cannot be read may be of a newer version.
        """
        for file in _files_in(self._steps):
            if file.name.startswith("."):
                file.unlink()
        named = {
            digest
            for file in _files_in(self._steps)
            for digest in _DIGEST.findall(file.read_text("utf-8", "replace"))
        }
        for file in _files_in(self._pictures):
            if file.name not in named:
                file.unlink()

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the lock of the folder, which is made if it is missing; raises OutputError."""
        try:
            for folder in (self._steps, self._pictures):
                folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.mkdir(mode=0o700, exist_ok=True)
            with FileLock(self._folder / "lock", mode=0o600):
                yield
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO).lower()
            raise OutputError(f"the history in DATA_DIR cannot be changed ({reason})") from error

    def _file(self, step: Step) -> Path:
        return self._steps / f"{step.id}.json"


def _files_in(folder: Path) -> list[Path]:
    """Without the folders that programs which synchronise files make."""
    return [file for file in folder.iterdir() if file.is_file()]


def merged(prompts: Iterable[str]) -> str:
    """Several prompts as one: each becomes a sentence, in order. A single prompt is unchanged."""
    said = [prompt for prompt in prompts if prompt.strip()]
    return said[0] if len(said) == 1 else " ".join(map(_sentence, said))


def _sentence(prompt: str) -> str:
    text = " ".join(prompt.split())
    is_wide = unicodedata.east_asian_width(text[-1]) in "FW"  # Chinese, Japanese
    end = "" if text[-1] in _ENDS else "。" if is_wide else "."
    return text[0].upper() + text[1:] + end


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
