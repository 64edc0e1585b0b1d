"""What a training of a LoRA is asked for; names, ranges, defaults and descriptions of its options.

A parameter that an edit has too means the same here. Other requests do not import this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from step1x_edit.schemas.requests import MAX_SEED, Request, whole_number

STATE: Final = "state.safetensors"
"""The file from which a training continues, in its folder."""

LEAST_SIZE: Final = 64
LARGEST_SIZE: Final = 1536

_Whole = BeforeValidator(whole_number)


def _sizes(value: str) -> str:
    try:
        sizes = [int(size) for size in value.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < LEAST_SIZE or max(sizes) > LARGEST_SIZE:
        raise PydanticCustomError(
            "plain_text",
            "must be whole numbers between {least} and {most}, such as 512,768, got '{value}'",
            {"least": LEAST_SIZE, "most": LARGEST_SIZE, "value": value},
        )
    return value


@dataclass(frozen=True)
class Pair:
    """A picture, an instruction, and the picture that the edit is to make of it."""

    name: str
    """For messages and for the names of files."""
    source: str
    prompt: str
    target: str | None
    """None: the edit that the model makes now; training keeps it as it is."""


class TrainRequest(Request):
    """How a LoRA is trained."""

    steps: Annotated[
        int,
        Field(ge=1, le=10**6, description="Steps of the optimiser, earlier runs included"),
        _Whole,
    ] = 1000
    rank: Annotated[
        int, Field(ge=1, le=1024, description="Rank of the change of each layer"), _Whole
    ] = 16
    alpha: Annotated[
        float | None,
        Field(
            ge=0.001,
            le=10**6,
            allow_inf_nan=False,
            description="The change is scaled by alpha / rank (default: the rank)",
        ),
    ] = None
    learning_rate: Annotated[
        float,
        Field(
            ge=1e-7,
            le=1,
            allow_inf_nan=False,
            description="Learning rate, after 20 steps of warm-up",
        ),
    ] = 1e-4
    batch_size: Annotated[
        int,
        Field(ge=1, le=1024, description="Pairs whose gradients are averaged in a step"),
        _Whole,
    ] = 1
    size: Annotated[
        str,
        Field(
            description="Size level to train at, as of an edit; several, such as 512,768: each "
            "pair is used at each"
        ),
        AfterValidator(_sizes),
    ] = "512"
    shift: Annotated[
        float | None,
        Field(
            ge=0.01,
            le=100,
            allow_inf_nan=False,
            description="How far timesteps are moved towards noise (default: as far as those of an "
            "edit of the same size)",
        ),
    ] = None
    guidance: Annotated[
        float,
        Field(
            ge=1.0,
            le=15.0,
            allow_inf_nan=False,
            description="Guidance under which the velocity is compared. 1: that of the prompt "
            "alone, as published models are trained; the demo is trained under 6",
        ),
    ] = 1.0
    precision: Annotated[
        Literal["auto", "bf16", "int8"],
        Field(description="How the weights of the model are kept; the LoRA itself is float32"),
    ] = "auto"
    seed: Annotated[
        int, Field(ge=0, le=MAX_SEED, description="Seed of all random numbers"), _Whole
    ] = 0
    held_out: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="The last pairs with a target: they validate and teach nothing",
        ),
        _Whole,
    ] = 0
    validate_every: Annotated[
        int, Field(ge=1, description="Steps between two validations of the pairs held out"), _Whole
    ] = 250
    save_every: Annotated[
        int, Field(ge=1, description="Steps between two saved states to continue from"), _Whole
    ] = 100
    edit_steps: Annotated[
        int,
        Field(ge=1, le=50, description="Denoising steps of the edits that validate or are kept"),
        _Whole,
    ] = 28

    @property
    def sizes(self) -> list[int]:
        """The size levels."""
        return [int(size) for size in self.size.split(",")]
