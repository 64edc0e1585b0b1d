"""Conversions: a request to the engine's job, and a result to its record and metadata.

The record is written into the picture's file, so that the edit can be repeated. The metadata is
returned in an answer.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from step1x_edit.channel import EditJob
from step1x_edit.engine.engine import EditResult
from step1x_edit.model.config import DEMO
from step1x_edit.model.sizes import fit_size
from step1x_edit.schemas.answers import EditedRegion, EditMetadata, Reasoning
from step1x_edit.schemas.requests import (
    AROUND_THE_NETWORK,
    MAX_PROMPT_LENGTH,
    MAX_SEED,
    SIDE_MULTIPLE,
    EditRecord,
    GeneratePictureRequest,
    GenerationRecord,
    HowToGenerate,
    HowToMake,
    PictureRequest,
    Record,
    how_of,
    loras_of,
    strengths_of,
)
from step1x_edit.service.source import Source

if TYPE_CHECKING:  # deferred: a server starts to answer before numpy is imported
    from step1x_edit.pictures.images import Picture, Pixels
    from step1x_edit.pictures.regions import Box

PictureOrder: TypeAlias = PictureRequest | GeneratePictureRequest
"""A request for one picture, edited or generated."""
_Request = TypeVar("_Request", bound=HowToMake)


def with_seed(request: _Request, input_record: Record | None = None) -> _Request:
    """The same request; if its seed is random, with one drawn now that did not make the input."""
    if request.seed is not None:
        return request
    seed = secrets.randbelow(MAX_SEED + 1)
    while input_record is not None and seed == input_record.seed:
        seed = secrets.randbelow(MAX_SEED + 1)
    return request.model_copy(update={"seed": seed})


def job_of(
    request: PictureOrder,
    image: Pixels | None = None,
    mask: Pixels | None = None,
    previews: int = 0,
) -> EditJob:
    """The engine's job for a request with a seed; without an image, a picture is generated.

    Only turbo makes use of a mask; every other edit is that of the whole picture.
    """
    loras = None if request.loras is None else strengths_of(request.loras)
    asked = {**how_of(request), "prompt": request.prompt, "loras": loras}
    asked = {name: value for name, value in asked.items() if name not in AROUND_THE_NETWORK}
    used = mask if request.mode == "turbo" else None
    return EditJob(image=image, previews=previews, mask=used, upscale=request.upscale, **asked)


def record_of(request: PictureOrder, result: EditResult, source: Source) -> Record:
    """The parameters that the picture was made with, from its request (with a seed) and result."""
    residence = result.residence
    made = {
        **how_of(request),
        "model": residence.model_with_loras or "",
        "prompt": request.prompt,
        "loras": loras_of(residence.loras) or None,
        "precision": residence.placement and residence.placement.precision,
        "arithmetic": residence.arithmetic,
        "numerics": residence.numerics,
    }
    if isinstance(request, HowToGenerate):
        return GenerationRecord(**made)
    if not request.reflection:
        made["reflection_rounds"] = None
    rewritten = (result.painted.reasoning or {}).get("prompt") or ""
    return EditRecord(
        **made,
        input_sha256=source.sha256,
        mask_sha256=source.mask_sha256,
        rewritten_prompt=None if len(rewritten) > MAX_PROMPT_LENGTH else rewritten or None,
    )


def metadata_of(
    record: Record,
    result: EditResult,
    source: Source,
    picture: Picture,
    changed_share: float | None,
) -> EditMetadata:
    """The metadata of the picture in an answer."""
    residence, reasoning = result.residence, result.painted.reasoning
    made = record.model_dump(include=set(EditMetadata.model_fields))
    if isinstance(record, EditRecord):
        made["negative_prompt"] = record.negative_prompt or None  # empty is the default
        made["region"] = None if source.box is None else _edited(source.box, record)
    made["mode"] = record.mode  # left out of a file if exact
    made["width"], made["height"] = picture.width, picture.height
    if (evaluations := result.painted.evaluations) is not None:
        made["evaluations_done"] = evaluations.done
        made["evaluations_skipped"] = evaluations.skipped
    halo = _seed_warning(record, picture, source.record)
    warnings = (result.painted.warning, picture.warning, halo, _outside(record, result))
    return EditMetadata(
        **made,
        gpu_location=residence.location,
        gpu_memory_gb=round(residence.memory.allocated_gb, 2),
        device=residence.device,
        warning="; ".join(filter(None, warnings)) or None,
        changed_share=None if changed_share is None else round(changed_share, 4),
        reasoning=None if reasoning is None else Reasoning.model_validate(reasoning),
    )


def _seed_warning(record: Record, picture: Picture, made: Record | None) -> str | None:
    """A warning if the input was made from the noise of this edit, which can leave a halo."""
    if made is None or made.seed != record.seed or not isinstance(record, EditRecord):
        return None
    if isinstance(made, EditRecord):
        is_same_size = made.size_level == record.size_level
    else:
        fitted = fit_size(picture.width, picture.height, record.size_level, SIDE_MULTIPLE)
        is_same_size = fitted == (made.width, made.height)
    if not is_same_size:
        return None
    return f"seed {record.seed} also made the input, which can leave a halo; use another seed"


def _edited(box: Box, record: EditRecord) -> EditedRegion:
    from step1x_edit.pictures import regions

    left, top, right, bottom = (side * record.upscale for side in box)
    scale = regions.scale_of((right - left) * (bottom - top), record.size_level)
    return EditedRegion(box=[left, top, right, bottom], scale=round(scale, 2))


def _outside(record: Record, result: EditResult) -> str | None:
    """The warning that the demo was asked for what it cannot do."""
    if not isinstance(record, EditRecord) or not record.outpaint:
        return None
    if result.residence.version != DEMO.version:
        return None
    return (
        "the demo checkpoint cannot invent what lies outside of a picture: the old pixels stay, "
        "and the new area is an edit of their blurred reflection. For the real model set "
        "MODEL_PATH to a Step1X-Edit checkpoint"
    )
