"""Recipes: how a picture was made here, read from its file, and whether it comes out the same.

The file of a result has the parameters, the hashes of its input and its mask, and what computed it.
This module reads them, finds the files with these hashes, and compares a picture with the one that
the same recipe gives now. It makes no picture itself.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from step1x_edit.channel import Progress
from step1x_edit.errors import ModelNotFoundError, NoRecipeError, Step1XEditError
from step1x_edit.pictures.output_formats import OUTPUT_FORMATS
from step1x_edit.schemas.answers import CheckAnswer, Difference, EditMetadata, RecipeAnswer
from step1x_edit.schemas.requests import (
    EditRecord,
    HowToEdit,
    HowToGenerate,
    Record,
    given,
    how_of,
)
from step1x_edit.service.batches import PICTURES
from step1x_edit.service.editor import Reporter
from step1x_edit.service.files import FileAccess, InputFile
from step1x_edit.settings import Limits

if TYPE_CHECKING:  # deferred: a server starts to answer before numpy is imported
    from step1x_edit.pictures.images import Picture, Pixels

MAX_CANDIDATES: Final = 500
"""Pictures of a folder whose hashes are compared."""
_OF_A_MODEL: Final = (" (", " with LoRA ")
"""What may follow the name of a model: its precision, and LoRAs."""
_OF_A_CPU: Final = ("device", "instruction set", "threads", "library")
_OF_A_GPU: Final = ("device", "library")
"""The parts of the numerics, in order."""


@dataclass(frozen=True)
class Made:
    """A picture that was made here: its file and its record."""

    file: InputFile
    record: Record

    @property
    def suffix(self) -> str:
        """The suffix of its format, whatever its name says."""
        from step1x_edit.pictures import images

        name = images.format_of(self.file.data)
        suffixes = [suffix for suffix, output in OUTPUT_FORMATS.items() if output.name == name]
        own = self.file.path.suffix.lower()
        return own if own in suffixes else suffixes[0]


# --- reading -------------------------------------------------------------------------------------


def recipe_of(record: Record) -> RecipeAnswer:
    """A record as an answer."""
    return RecipeAnswer(
        model=record.model,
        prompt=record.prompt,
        parameters=how_again(record),
        upscaler=record.upscaler,
        upscaler_sha256=record.upscaler_sha256,
        precision=record.precision,
        arithmetic=record.arithmetic,
        numerics=record.numerics,
        **_of_an_edit(record),
    )


def record_in(data: bytes) -> Record:
    """The record in the bytes of a file; raises NoRecipeError."""
    from step1x_edit.pictures import images

    record = images.read_record(data)
    if record is None:
        raise NoRecipeError(
            "this is no picture that step1x-edit made, or its metadata has been removed"
        )
    return record


def how_again(record: Record) -> HowToEdit | HowToGenerate:
    """The parameters of a record for another request: complete, so that no default is added.

    Raises NoRecipeError if no request accepts them.
    """
    values = given({**how_of(record), "loras": record.loras or []})
    try:
        return HowToEdit(**values) if isinstance(record, EditRecord) else HowToGenerate(**values)
    except ValidationError:  # a record names any LoRAs that were in the model, and may be forged
        raise NoRecipeError("the LoRAs of its record are not accepted by an edit") from None


def _of_an_edit(record: Record) -> dict[str, str | None]:
    if not isinstance(record, EditRecord):
        return {}
    names = ("input_sha256", "mask_sha256", "rewritten_prompt")
    return {name: getattr(record, name) for name in names}


def read_made(files: FileAccess, path: str) -> Made:
    """A picture that was made here; raises NoRecipeError, or the error that its path has."""
    file = files.read(path)
    return Made(file, record_in(file.data))


# --- what it was made from -----------------------------------------------------------------------


def find_beside(files: FileAccess, made: Made, sha256: str) -> InputFile | None:
    """The picture with this hash in the folder of the result, among the first MAX_CANDIDATES."""
    for path in files.beside(made.file.path, PICTURES, MAX_CANDIDATES):
        with contextlib.suppress(Step1XEditError):  # it is unreadable, or has just gone
            file = files.read(str(path))
            if hash_of(file) == sha256:
                return file
    return None


def hash_of(file: InputFile) -> str:
    """The SHA-256 by which a record names a file."""
    return hashlib.sha256(file.data).hexdigest()


def only_with_model(
    record: Record, loaded_model: Callable[[], Awaitable[str | None]], report: Reporter
) -> Reporter:
    """Progress that ends an edit, with ModelNotFoundError, once another model has been loaded.

    Which model MODEL_PATH names is known for certain only then. Another precision is the same one.
    """
    is_known = False

    async def checked(event: Progress) -> None:
        nonlocal is_known
        model = None if is_known else await loaded_model()
        if model is not None:
            is_known = True
            if _base(model) != _base(record.model):
                raise ModelNotFoundError(
                    f"the picture was made with {_base(record.model)}, the model here is "
                    f"{_base(model)}; set MODEL_PATH (step1x-edit models pull gets published ones)"
                )
        await report(event)

    return checked


def _base(model: str) -> str:
    for mark in _OF_A_MODEL:
        model = model.partition(mark)[0]
    return model


# --- comparing -----------------------------------------------------------------------------------


def compare(then: bytes, now: bytes, metadata: EditMetadata, limits: Limits) -> CheckAnswer:
    """How the file of a picture differs from the one that its recipe gives now, and why."""
    if then == now:
        return CheckAnswer(message="equal to the byte", equal=True, metadata=metadata)
    import numpy as np

    from step1x_edit.pictures import images

    before, after = images.decode(then, limits), images.decode(now, limits)
    found = _differences(record_in(then), record_in(now))
    reasons = "; ".join(each.text for each in found)
    if before.pixels.shape != after.pixels.shape:
        what = f"the sizes differ, {_size(before)} and now {_size(after)}"
        reasons = reasons or "the picture was resized after the edit"
        return CheckAnswer(
            message=f"{what}: {reasons}",
            equal=False,
            differences=found or None,
            metadata=metadata,
        )
    has_alpha = not (before.alpha is None and after.alpha is None)
    left, right = (_with_alpha(each) if has_alpha else each.pixels for each in (before, after))
    distance = np.maximum(left, right) - np.minimum(left, right)
    most, share = int(distance.max()), float((distance > 0).mean())
    if most == 0:
        what = "the pixels are equal, the metadata differs"
        reasons = reasons or "a signature, a later change, or the version of step1x-edit"
    else:
        levels = "1 level" if most == 1 else f"{most} levels"
        what = f"pixels differ by up to {levels} in {share:.4%} of the values"
        reasons = reasons or (
            "the record names no cause; it may be the version of step1x-edit, the memory plan, or "
            "the quality of a lossy format"
        )
    return CheckAnswer(
        message=f"{what}: {reasons}",
        equal=False,
        max_difference=most,
        changed_share=share,
        differences=found or None,
        metadata=metadata,
    )


def _size(picture: Picture) -> str:
    return f"{picture.width}×{picture.height}"


def _with_alpha(picture: Picture) -> Pixels:
    """The values of a picture as (H, W, 4), with its transparency."""
    import numpy as np

    opaque = np.full(picture.pixels.shape[:2], 255, np.uint8)
    return np.dstack([picture.pixels, opaque if picture.alpha is None else picture.alpha])


def _differences(then: Record, now: Record) -> list[Difference]:
    """What two records of one recipe say differently; of the numerics, the parts that differ."""
    before, after = _said(then), _said(now)
    return [
        Difference(name=name, then=before.get(name), now=after.get(name))
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]


def _said(record: Record) -> dict[str, str]:
    values: dict[str, Any] = record.model_dump(exclude_none=True)
    said = {name: str(value) for name, value in values.items()}
    parts = [part.removesuffix(" threads") for part in said.pop("numerics", "").split("/")]
    is_of_cpu = len(parts) == len(_OF_A_CPU)
    return said | dict(zip(_OF_A_CPU if is_of_cpu else _OF_A_GPU, parts, strict=False))
