"""Every request and every answer; the only home of names, ranges, defaults and descriptions.

The request models, the MCP tools and the settings use the annotated types (`NumSteps`, `Seed`, …)
directly; `PARAMETERS` has the same as plain values for interfaces such as the command line.
Common deviations are accepted ("28", 28.0, a list encoded as JSON), which the JSON schema does
not show. This module knows nothing about its callers.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    Literal,
    TypeAlias,
    TypeVar,
)

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError, PydanticKnownError
from typing_extensions import Self

from step1x_edit.errors import InvalidParameterError, Step1XEditError
from step1x_edit.schemas.plan import PlanStatus

Size = Literal[512, 768, 1024]
Location = Literal["Unloaded", "CPU", "GPU"]
Precision = Literal["auto", "bf16", "fp8", "int8", "nf4"]
"""How the model's weights are kept; auto: as the checkpoint has them, if memory allows."""

DEFAULT_NUM_STEPS: Final = 28
DEFAULT_GUIDANCE_SCALE: Final = 6.0
DEFAULT_SIZE_LEVEL: Final[Size] = 1024
DEFAULT_SIDE: Final = 1024
DEFAULT_REFLECTION_ROUNDS: Final = 3
DEFAULT_MAX_SIZE: Final = 768
DEFAULT_JOBS_LISTED: Final = 20
DEFAULT_WAIT_S: Final = 4.0  # the shortest known limit of a client is 5 s
SIDE_MULTIPLE: Final = 16  # one token of the published models
MAX_BATCH: Final = 1000  # the number of results without metadata that an MCP answer can hold
MAX_SEED: Final = 2**32 - 1
MAX_PROMPT_LENGTH: Final = 4000
MAX_PATH_LENGTH: Final = 4096  # PATH_MAX of Linux
MAX_LORAS: Final = 16  # of one edit
MAX_STRENGTH: Final = 4
"""Of a LoRA; larger strengths destroy the picture."""


CHOSEN_BY_THE_OPERATOR: Final = ("num_steps", "guidance_scale", "size_level")
"""The parameters whose default is a setting: DEFAULT_ and the name."""


@dataclass(frozen=True)
class Suggestion:
    """What the authors of a version recommend."""

    num_steps: int
    guidance_scale: float


SUGGESTED: Final[Mapping[str, Suggestion]] = {
    "v1.0": Suggestion(28, 6.0),
    "v1.1": Suggestion(28, 6.0),
    "v1.2-preview": Suggestion(28, 4.0),
    "v1.2": Suggestion(50, 6.0),
}
"""By version. These are only suggestions: the defaults are the same for all versions."""


# --- reading leniently ---------------------------------------------------------------------------


def _whole_number(value: object) -> object:
    if isinstance(value, bool):  # an int for Python, but surely a mistake of the caller
        raise PydanticKnownError("int_type")
    return value


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


def _choice(value: object) -> object:
    """Read "768" and 768.0 as 768; other values are checked against the choices."""
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    try:
        number = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        return value
    return int(number) if number.is_integer() else value


def _path(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def read_list(value: object) -> object:
    """Read a list that is encoded as JSON, as language models often send it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            decoded = json.loads(value)
        except ValueError:
            return value
        return decoded if isinstance(decoded, list) else value
    return list(value) if isinstance(value, tuple) else value


def _text_or_list(value: object) -> object:
    value = read_list(value)
    if not isinstance(value, str | list):
        raise PydanticCustomError("text_or_list", "must be a text or a list of texts")
    return value


def _plain_text(value: str) -> str:
    if "\0" in value:
        raise PydanticCustomError("plain_text", "must not contain a NUL character")
    return value


def _drawn_if_negative(value: int | None) -> int | None:
    return None if value == -1 else value


def _loras(value: object) -> object:
    """Read "hand, look:0.5" and {"hand": 1} as lists; empty texts are left out."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict):
        return [f"{name}:{strength}" for name, strength in value.items()]
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple):
        return value
    return [each for each in value if not isinstance(each, str) or each.strip()]


def _lora(value: str) -> str:
    name, strength = _name_and_strength(value)
    if not name or not abs(strength) <= MAX_STRENGTH:  # refuses NaN too
        raise PydanticCustomError(
            "plain_text",
            "must be a name or name:strength with a strength between -{most} and {most}, "
            "got {value}",
            {"most": _plain(MAX_STRENGTH), "value": _shown(value)},
        )
    return f"{name}:{_plain(strength)}"


def _name_and_strength(value: str) -> tuple[str, float]:
    name, mark, strength = value.rpartition(":")
    if not mark:
        return value.strip(), 1.0
    try:
        return name.strip(), float(strength)
    except ValueError:
        return name.strip(), math.nan


def _each_lora_once(values: list[str] | None) -> list[str] | None:
    names = [_name_and_strength(value)[0] for value in values or []]
    for name in names:
        if names.count(name) > 1:
            raise PydanticCustomError("plain_text", "names {name} twice", {"name": _shown(name)})
    return values


def strengths_of(loras: Iterable[str]) -> dict[str, float]:
    """The strengths by name of a list of `name:strength`; those of 0 are left out."""
    strengths = dict(map(_name_and_strength, loras))
    return {name: strengths[name] for name in sorted(strengths) if strengths[name] != 0}


def loras_of(strengths: Mapping[str, float]) -> list[str]:
    """The inverse: a list of `name:strength`."""
    return [f"{name}:{_plain(strength)}" for name, strength in strengths.items()]


def check_loras(wanted: Iterable[str], known: Collection[str]) -> None:
    """Raise InvalidParameterError unless all these names are known LoRAs."""
    for name in wanted:
        if name not in known:
            there_are = f"there are {', '.join(known)}" if known else "LORA_PATH names none"
            wrong = f"loras has {_shown(name)}, which is not here{_suggestion(name, known)}"
            sentence = f"{wrong}; {there_are}"
            raise InvalidParameterError(sentence, param="loras", fields=[("loras", sentence)])


# --- parameters ----------------------------------------------------------------------------------
# Constraints come before the readers: in the other order they would not reach the JSON schema.

_PathText = Annotated[
    str,
    Field(min_length=1, max_length=MAX_PATH_LENGTH),
    AfterValidator(_plain_text),
    BeforeValidator(_path),
]
_PromptText = Annotated[str, Field(max_length=MAX_PROMPT_LENGTH), AfterValidator(_plain_text)]
_SeedNumber = Annotated[int, Field(ge=-1, le=MAX_SEED), BeforeValidator(_whole_number)]

ImagePath = Annotated[_PathText, Field(description="Path of the image to edit")]
Prompt = Annotated[
    _PromptText,
    Field(
        description="What to change, in plain words, such as 'add a red hat'; "
        "an empty text leaves the picture unchanged"
    ),
]
OutputPath = Annotated[
    _PathText | None,
    Field(
        description="Where to save the result; the suffix (.png, .jpg, .webp, .avif, .tiff, .bmp) "
        "chooses the format. Default: <name>_edited next to the input"
    ),
]
NumSteps = Annotated[
    int,
    Field(ge=10, le=50, description="Denoising steps: more steps are slower and give more detail"),
    BeforeValidator(_whole_number),
]
GuidanceScale = Annotated[
    float,
    Field(
        ge=1.0,
        le=15.0,
        allow_inf_nan=False,
        description="How strongly the picture follows the prompt",
    ),
    BeforeValidator(_number),
]
SizeLevel = Annotated[
    Size,
    Field(
        description="Working resolution: the edit runs at about this number of pixels squared; "
        "the result has the size of the input"
    ),
    BeforeValidator(_choice),
]
Seed = Annotated[
    _SeedNumber | None,
    AfterValidator(_drawn_if_negative),
    Field(
        description="Seed of the random numbers: the same seed gives the same picture. "
        "Left out or -1: a random seed, which is reported"
    ),
]
Overwrite = Annotated[bool, Field(description="Replace the output file if it already exists")]
NegativePrompt = Annotated[
    _PromptText, Field(description="What the picture should not show, such as 'blurry'")
]
Thinking = Annotated[
    bool,
    Field(
        description="Let the model rewrite the prompt more clearly before it edits; "
        "needs Step1X-Edit v1.2"
    ),
]
Reflection = Annotated[
    bool,
    Field(
        description="Let the model judge its result, try again if it is not satisfied, and "
        "keep the best of up to reflection_rounds edits; needs Step1X-Edit v1.2"
    ),
]
ReflectionRounds = Annotated[
    int,
    Field(
        ge=1,
        le=3,
        description="With reflection: the maximum number of edits, which limits the time; "
        "1 judges the result without trying again",
    ),
    BeforeValidator(_whole_number),
]
MaskPath = Annotated[
    _PathText | None,
    Field(
        description="Path of a mask, a picture of the same size: its white pixels (or, if it has "
        "transparency, its transparent ones) may change, all others stay exactly the same. "
        "Default: the whole picture may change"
    ),
]
Loras = Annotated[
    list[
        Annotated[
            str,
            Field(min_length=1, max_length=300),
            AfterValidator(_plain_text),
            AfterValidator(_lora),
        ]
    ]
    | None,
    Field(
        max_length=MAX_LORAS,
        description="LoRAs to use, of those that get_gpu_status lists: each a name, or "
        "name:strength with a strength from -4 to 4. Default: those that the server was started "
        "with; an empty list: none",
    ),
    AfterValidator(_each_lora_once),
    BeforeValidator(_loras),
]
ImagePaths = Annotated[
    list[_PathText],
    Field(min_length=1, max_length=MAX_BATCH, description="Paths of the images to edit"),
    BeforeValidator(read_list),
]
Prompts = Annotated[
    _PromptText | list[_PromptText],
    Field(description="What to change: one text for all images, or a list with one per image"),
    BeforeValidator(_text_or_list),
]
NewPrompt = Annotated[
    _PromptText, Field(description="What the picture shows, such as 'a red fox in the snow'")
]
NewOutputPath = Annotated[
    _PathText | None,
    Field(
        description="Where to save the picture; the suffix (.png, .jpg, .webp, .avif, .tiff, .bmp) "
        "chooses the format. Default: a PNG named after the prompt in the start folder"
    ),
]
NewNegativePrompt = Annotated[
    _PromptText | None,
    Field(
        description="What the picture should not show, such as 'blurry'. Default: the list of "
        "flaws that the model was published with"
    ),
]
_NewSide = Annotated[
    int, Field(ge=256, le=2048, multiple_of=SIDE_MULTIPLE), BeforeValidator(_whole_number)
]
Width = Annotated[_NewSide, Field(description="Width in pixels, a multiple of 16")]
Height = Annotated[_NewSide, Field(description="Height in pixels, a multiple of 16")]
MaxSize = Annotated[
    int,
    Field(ge=64, le=1024, description="Longest side of the shown picture, in pixels"),
    BeforeValidator(_whole_number),
]
JOB_ID_PATTERN: Final = "^[0-9a-f]{44}$"

JobsListed = Annotated[
    int,
    Field(ge=1, le=100, description="Maximum number of jobs to list"),
    BeforeValidator(_whole_number),
]
OutputDir = Annotated[
    _PathText | None,
    Field(description="Folder for the results, created if missing. Default: next to each input"),
]


JobId = Annotated[
    str,
    Field(
        min_length=1, max_length=100, description="The id that submit_edit or edit_image returned"
    ),
]
WaitSeconds = Annotated[
    float,
    Field(
        ge=0.0,
        le=50.0,  # many clients give a call 60 s
        allow_inf_nan=False,
        description="Seconds to wait for the edit to end; 0 answers immediately",
    ),
    BeforeValidator(_number),
]


# --- requests ------------------------------------------------------------------------------------

_CONTRACT: Final = (
    "image_path",
    "image_paths",
    "prompt",
    "prompts",
    "output_path",
    "output_dir",
    "num_steps",
    "guidance_scale",
    "size_level",
    "width",
    "height",
    "seed",
    "overwrite",
    "negative_prompt",
    "mask_path",
)
"""The order in which the contract lists parameters; later additions follow."""


def _in_order(values: Mapping[str, Any], first: Iterable[str]) -> dict[str, Any]:
    return {**{name: values[name] for name in first if name in values}, **values}


def _list_as_the_contract_does(schema: dict[str, Any]) -> None:
    schema["properties"] = _in_order(schema["properties"], _CONTRACT)
    if "required" in schema:
        schema["required"].sort(key=[*schema["properties"]].index)


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HowToMake(_Request):
    """The parameters that editing a picture and generating one from text share."""

    model_config = ConfigDict(json_schema_extra=_list_as_the_contract_does)

    num_steps: NumSteps = DEFAULT_NUM_STEPS
    guidance_scale: GuidanceScale = DEFAULT_GUIDANCE_SCALE
    seed: Seed = None
    loras: Loras = None


class HowToEdit(HowToMake):
    """How an edit runs: all its parameters but the prompt, the input and the output.

    Every interface, record and answer derives from it; `model.request.NetworkRequest` has a field
    for each of these.
    """

    size_level: SizeLevel = DEFAULT_SIZE_LEVEL
    negative_prompt: NegativePrompt = ""
    thinking: Thinking = False
    reflection: Reflection = False
    reflection_rounds: ReflectionRounds = DEFAULT_REFLECTION_ROUNDS


class HowToGenerate(HowToMake):
    """How a picture is generated from text; otherwise as `HowToEdit`."""

    width: Width = DEFAULT_SIDE
    height: Height = DEFAULT_SIDE
    negative_prompt: NewNegativePrompt = None


def how_of(request: HowToEdit | HowToGenerate) -> dict[str, Any]:
    """The parameters of a request that say how to run it, by name."""
    kind = HowToEdit if isinstance(request, HowToEdit) else HowToGenerate
    return {name: getattr(request, name) for name in kind.model_fields}


class PictureRequest(HowToEdit):
    """How to edit a picture that is sent with the request instead of being a file on this disk."""

    prompt: Prompt


class EditRequest(PictureRequest):
    """One picture to edit."""

    image_path: ImagePath
    output_path: OutputPath = None
    overwrite: Overwrite = False
    mask_path: MaskPath = None


class GeneratePictureRequest(HowToGenerate):
    """A picture to generate from text and to return, without a file on this disk."""

    prompt: NewPrompt


class GenerateRequest(GeneratePictureRequest):
    """A picture to generate from text."""

    output_path: NewOutputPath = None
    overwrite: Overwrite = False


class BatchRequest(HowToEdit):
    """Several pictures to edit with the same parameters."""

    image_paths: ImagePaths
    prompts: Prompts
    output_dir: OutputDir = None
    overwrite: Overwrite = False

    @model_validator(mode="after")
    def _one_prompt_per_image(self) -> Self:
        if isinstance(self.prompts, list) and len(self.prompts) != len(self.image_paths):
            raise PydanticCustomError(
                "prompt_count",
                "prompts must be one text or a list of {images}, one for each of image_paths, "
                "got {prompts}",
                {"images": len(self.image_paths), "prompts": len(self.prompts)},
            )
        return self

    def each(self) -> list[EditRequest]:
        """The request for each image, in order."""
        prompts = self.prompts
        if isinstance(prompts, str):
            prompts = [prompts] * len(self.image_paths)
        shared = self.model_dump(include=set(EditRequest.model_fields), exclude_unset=True)
        return [
            EditRequest(image_path=path, prompt=prompt, **shared)
            for path, prompt in zip(self.image_paths, prompts, strict=True)
        ]


class ViewRequest(_Request):
    """A picture to look at."""

    path: Annotated[_PathText, Field(description="Path of the picture to look at")]
    max_size: MaxSize = DEFAULT_MAX_SIZE


class HandleRequest(_Request):
    """An edit that runs in the background."""

    job_id: JobId


class WaitRequest(HandleRequest):
    """An edit that runs in the background, and how long to wait for its end."""

    wait_s: WaitSeconds = DEFAULT_WAIT_S


_OPENAI_NAMES: Final = {"num_steps": "num_inference_steps"}
"""The parameters that have another name in OpenAI's API and its extensions."""


class OpenAIRequest(_Request):
    """The fields of OpenAI's Images API and its usual extensions that every request shares.

    Parameters that the request leaves out are not passed on.
    """

    model_config = ConfigDict(
        alias_generator=lambda name: _OPENAI_NAMES.get(name, name), json_schema_extra=None
    )

    prompt: Prompt
    model: Annotated[
        str,
        Field(
            max_length=200,
            description="`step1x-edit`, the loaded version, StepFun's `step-1x-edit`, or a name "
            "of OpenAI's for clients that require one; the response names the model that was used",
        ),
    ] = "step1x-edit"
    n: Annotated[
        int,
        Field(ge=1, le=10, description="Number of pictures; they have consecutive seeds"),
        BeforeValidator(_whole_number),
    ] = 1
    quality: Annotated[
        Literal["auto", "standard", "low", "medium", "high", "hd"],
        Field(description="Number of steps: low 10, medium 28, high and hd 50"),
    ] = "auto"
    style: Annotated[
        Literal["vivid"] | None,
        Field(description="`vivid` has no effect; describe a style in the prompt"),
    ] = None
    response_format: Annotated[
        Literal["b64_json", "url"],
        Field(description="The picture in the response, or a link that is valid for an hour"),
    ] = "b64_json"
    output_format: Annotated[
        Literal["png", "webp", "jpeg", "avif"], Field(description="The format of the result")
    ] = "png"
    output_compression: Annotated[
        int | None,
        Field(ge=0, le=100, description="Quality of a WebP, JPEG or AVIF; a PNG accepts only 100"),
        BeforeValidator(_whole_number),
    ] = None
    moderation: Annotated[
        Literal["auto", "low"], Field(description="Ignored: there is no moderation")
    ] = "auto"
    user: Annotated[str | None, Field(max_length=1000, description="Ignored")] = None
    safety_identifier: Annotated[str | None, Field(max_length=1000, description="Ignored")] = None
    stream: Annotated[bool, Field(description="Whether to answer with server-sent events")] = False
    partial_images: Annotated[
        int,
        Field(ge=0, le=3, description="Number of previews in a stream"),
        BeforeValidator(_whole_number),
    ] = 0


class ImageEditRequest(HowToEdit, OpenAIRequest):
    """How to edit a picture, in the fields of OpenAI's Images API and its usual extensions."""

    size: Annotated[
        str,
        Field(
            pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
            description="`auto`: the size of the input; `WIDTHxHEIGHT` scales the result to fit "
            "into it and keeps the input's ratio; the response has the actual size",
        ),
    ] = "auto"
    background: Annotated[
        Literal["auto", "opaque"],
        Field(description="`auto` keeps the input's transparency, `opaque` places it on white"),
    ] = "auto"
    input_fidelity: Annotated[
        Literal["low", "high"] | None,
        Field(description="Ignored: the model always sees the whole picture"),
    ] = None


_Side = Annotated[
    int | None,
    Field(ge=1, le=100_000, description="Size in pixels of the picture that would be sent"),
    BeforeValidator(_whole_number),
]


class PictureSize(_Request):
    """The size of a picture that has not been sent: both sides or none."""

    width: _Side = None
    height: _Side = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.width is None) != (self.height is None):
            raise PydanticCustomError("both_or_none", "width and height must be given together")
        return self


class ImageGenerationRequest(HowToMake, OpenAIRequest):
    """A picture to generate from text, in the fields of OpenAI's Images API."""

    prompt: NewPrompt
    size: Annotated[
        str,
        Field(
            pattern=r"^(auto|[1-9][0-9]{2,3}x[1-9][0-9]{2,3})$",
            description="`auto`: 1024x1024; or `WIDTHxHEIGHT`, each a multiple of 16 from 256 to "
            "2048",
        ),
    ] = "auto"
    background: Annotated[
        Literal["auto", "opaque"], Field(description="Ignored: the picture is always opaque")
    ] = "auto"
    negative_prompt: NewNegativePrompt = None


class JobsRequest(_Request):
    """Which stored jobs to list."""

    limit: JobsListed = DEFAULT_JOBS_LISTED
    after: Annotated[
        str | None,
        Field(
            description="The id of a job: list only older ones",
            json_schema_extra={"pattern": JOB_ID_PATTERN},
        ),
    ] = None


_IN_A_FILE: Final = (
    "software",
    "model",
    "prompt",
    "negative_prompt",
    "num_steps",
    "guidance_scale",
    "size_level",
    "width",
    "height",
    "seed",
    "mask_sha256",
)
"""The order of the parameters in a file; later additions follow."""


class _Record(HowToMake):
    """What a picture was made with, as stored in its file."""

    software: Literal["step1x-edit"] = "step1x-edit"
    model: str
    seed: _SeedNumber
    loras: list[str] | None = None
    """Those that were in the model, as `name:strength`, if there were any."""

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out switches that are off."""
        values = {name: value for name, value in write(self).items() if value is not False}
        return _in_order(values, _IN_A_FILE)


class EditRecord(_Record, HowToEdit):
    """What a picture was made with, written into its file so that the edit can be replayed."""

    prompt: Prompt
    mask_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Of the bytes of the mask, if there was one: replaying the edit needs the same mask."""
    reflection_rounds: ReflectionRounds | None = None  # type: ignore[assignment]
    """The maximum number of rounds, if there was a reflection."""
    rewritten_prompt: Annotated[str, Field(max_length=MAX_PROMPT_LENGTH)] | None = None
    """The prompt as thinking has rewritten it, unless it is too long for a file."""


class GenerationRecord(_Record, HowToGenerate):
    """What a picture was generated with from text, written into its file like an `EditRecord`."""

    prompt: NewPrompt
    negative_prompt: NewNegativePrompt = None
    """None, which is left out: the list that the model was published with."""


Record: TypeAlias = EditRecord | GenerationRecord


# --- answers -------------------------------------------------------------------------------------


class _Answer(BaseModel):
    """An answer; optional fields that are None are left out of its dictionary."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain JSON values, in the order of the contract."""
        return self.model_dump(mode="json", exclude_none=True)


class ReasoningRound(_Answer):
    """One edit of a reflection and how the model judged it; scores from 0 to 10."""

    prompt: Annotated[str, Field(description="The prompt of this round")]
    from_round: Annotated[
        int, Field(description="The round whose picture it edited, from 1; 0 is the input")
    ]
    verdict: Annotated[
        str | None,
        Field(
            description="<#Think> and the reasoning, then <#Success>, <#Others>, <#Failed>, or "
            "<#Reflection> and what to change next"
        ),
    ] = None
    description: Annotated[
        str | None, Field(description="The model's description of what the picture should show")
    ] = None
    score: Annotated[
        float | None, Field(description="How well the picture matches the description")
    ] = None
    reason: Annotated[str | None, Field(description="The reason for this score")] = None
    edit_score: Annotated[
        list[float] | None, Field(description="Scores for how well the edit follows the prompt")
    ] = None
    quality_score: Annotated[
        list[float] | None, Field(description="Scores for how natural and clean the picture is")
    ] = None
    value: Annotated[
        float | None,
        Field(description="The lowest score of the edit times the lowest of the quality"),
    ] = None


class Reasoning(_Answer):
    """The model's reasoning, and the edits that it tried."""

    prompt: Annotated[
        str | None, Field(description="The prompt as the model rewrote it, with thinking")
    ] = None
    rounds: list[ReasoningRound]
    best: Annotated[int, Field(description="The round whose picture is the result, from 1")]


if TYPE_CHECKING:

    class _HowItWasMade(_Answer):
        """The parameters of an edit, by name, as an answer repeats them."""

else:
    _HowItWasMade = create_model(
        "_HowItWasMade",
        __base__=_Answer,
        prompt=(str, ...),
        **{  # without the limits of a request, and left out if without effect
            name: (field.annotation | None, None)
            for name, field in _in_order(HowToEdit.model_fields, _CONTRACT).items()
        },
    )


class EditMetadata(_HowItWasMade):
    """The parameters, the model and the device of an edit or a generated picture."""

    prompt: str
    num_steps: int
    guidance_scale: float
    size_level: Annotated[
        int | None, Field(description="Left out for a picture that was generated from text")
    ] = None
    seed: int
    gpu_location: Location
    gpu_memory_gb: float
    model: str | None = None
    device: str | None = None
    width: int | None = None
    height: int | None = None
    negative_prompt: str | None = None
    warning: str | None = None
    changed_share: Annotated[
        float | None,
        Field(description="Share of the pixels that changed, 0 to 1, if there was a mask"),
    ] = None
    loras: Annotated[
        list[str] | None,
        Field(description="The LoRAs that were used, as name:strength, if there were any"),
    ] = None
    reasoning: Annotated[
        Reasoning | None, Field(description="The outcome of thinking and reflection, if requested")
    ] = None


EDITED: Final = "Image edited successfully"
GENERATED: Final = "Image generated successfully"
KEPT: Final = "Kept from an earlier run"


class EditAnswer(_Answer):
    """One picture was edited, or generated from text, and saved."""

    status: Literal["success"] = "success"
    message: str = EDITED
    output_path: str
    processing_time: float
    metadata: EditMetadata


class RunningAnswer(_Answer):
    """The edit continues in the background; `get_job` returns its answer once it has ended."""

    status: Literal["running"] = "running"
    job_id: Annotated[str, Field(description="The id for get_job and cancel_job")]
    message: Annotated[str, Field(description="The progress of the edit in words")]
    phase: Annotated[
        str | None,
        Field(
            description="queued, loading, thinking, encoding, denoising, decoding, reflecting or "
            "saving"
        ),
    ] = None
    step: Annotated[int | None, Field(description="Completed denoising steps")] = None
    total: Annotated[int | None, Field(description="All denoising steps")] = None
    position: Annotated[int | None, Field(description="Position in the queue, from 1")] = None


class CancelAnswer(_Answer):
    """The answer of `cancel_job`."""

    status: Literal["success"] = "success"
    message: Annotated[str, Field(description="What was cancelled, or why nothing was")]
    job_id: Annotated[str, Field(description="The id of the edit")]


class RoundPicture(_Answer):
    """The picture of a round of a reflection, as a small JPEG in base64."""

    image: str


class PictureAnswer(_Answer):
    """One picture was edited; the answer contains it."""

    status: Literal["success"] = "success"
    message: str = EDITED
    processing_time: float
    metadata: EditMetadata
    media_type: str
    image_base64: str
    rounds: Annotated[
        list[RoundPicture] | None,
        Field(description="The pictures of the rounds in metadata.reasoning, in order"),
    ] = None


class ErrorAnswer(_Answer):
    """The call failed; `error` is one sentence that says what to change."""

    status: Literal["error"] = "error"
    error: str
    code: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: Step1XEditError) -> ErrorAnswer:
        """The answer that reports `error`."""
        return cls(error=str(error), code=error.code, retry_after_s=error.retry_after_s)


class BatchItem(_Answer):
    """The result for one input of a batch."""

    input: str
    result: EditAnswer | ErrorAnswer


class BatchSummary(_Answer):
    """How many inputs a batch had, and how many succeeded and failed."""

    total: int
    successes: int
    failures: int


class BatchAnswer(_Answer):
    """The results of a batch; `partial` if some items failed, `error` if all did."""

    status: Literal["success", "partial", "error"]
    message: str
    error: str | None = None
    results: list[BatchItem]
    summary: BatchSummary

    @classmethod
    def of(cls, items: Sequence[BatchItem]) -> BatchAnswer:
        """Count the items and derive the status of the batch."""
        total = len(items)
        successes = sum(isinstance(item.result, EditAnswer) for item in items)
        failures = total - successes
        message = f"Processed {total} images: {successes} succeeded, {failures} failed"
        if failures == 0:
            status: Literal["success", "partial", "error"] = "success"
        else:
            status = "partial" if successes else "error"
        return cls(
            status=status,
            message=message,
            error=message if status == "error" else None,
            results=list(items),
            summary=BatchSummary(total=total, successes=successes, failures=failures),
        )


class JobState(str, Enum):
    """The state of a job; the last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        """Whether the state can no longer change."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


class JobProgress(_Answer):
    """The progress of a job: `step` of `total` if the phase has steps, or its `position`."""

    phase: str
    step: Annotated[int | None, Field(description="Completed steps of the phase")] = None
    total: Annotated[int | None, Field(description="All steps of the phase")] = None
    position: Annotated[
        int | None, Field(description="Position in the queue of edits, from 1, while it waits")
    ] = None


class JobResult(_Answer):
    """What is stored of a job that has succeeded, besides the picture."""

    processing_time: float
    metadata: EditMetadata


class JobAnswer(_Answer):
    """A stored job as it is now; times in seconds since 1970."""

    id: str
    status: JobState
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    position: int | None = None
    progress: JobProgress | None = None
    request: PictureRequest | GeneratePictureRequest
    processing_time: float | None = None
    metadata: EditMetadata | None = None
    error: str | None = None
    code: str | None = None
    retry_after_s: float | None = None


class JobsAnswer(_Answer):
    """Some stored jobs, newest first, and whether there are older ones than `last_id`."""

    object: Literal["list"] = "list"
    data: list[JobAnswer]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class JobEventAnswer(_Answer):
    """An event of a stored job: a new status, or progress."""

    at: float
    status: JobState
    progress: JobProgress | None = None


class PulledModel(_Answer):
    """A published model and its state on this disk."""

    name: str
    version: str | None = None
    repos: Annotated[list[str], Field(description="Its repositories on the hub")]
    note: str | None = None
    size_bytes: Annotated[int | None, Field(description="Its size on the disk, if published")] = (
        None
    )
    state: Literal["available", "partial", "pulled"]
    folder: Annotated[
        str | None, Field(description="Its folder on this disk, complete or partial")
    ] = None
    disk_bytes: Annotated[int | None, Field(description="The size of that folder")] = None
    runs: Annotated[bool, Field(description="Whether MODEL_PATH selects it")]


class PullProgressAnswer(_Answer):
    """The progress of a pull in bytes; both are 0 while the hub is asked for the list of files."""

    phase: Literal["asking", "downloading", "checking", "waiting"]
    done: int
    total: int
    text: Annotated[str, Field(description="The file, or what the pull waits for")]


class PullAnswer(_Answer):
    """The state of a pull, or its outcome."""

    name: str
    status: JobState
    progress: PullProgressAnswer
    path: Annotated[str | None, Field(description="The folder of the pulled model")] = None
    error: str | None = None
    code: str | None = None


class ModelsAnswer(_Answer):
    """The published models, and the running or last pull."""

    status: Literal["success"] = "success"
    models: list[PulledModel]
    pull: PullAnswer | None = None


class GpuStatistics(_Answer):
    """How often the model was moved since the start."""

    total_loads: int = 0
    gpu_to_cpu: int = 0
    cpu_to_gpu: int = 0
    full_releases: int = 0


class GpuStatus(_Answer):
    """Where the model is and how much memory it uses; times in seconds, memory in GiB."""

    model_location: Location
    idle_time: float
    idle_timeout: int | float  # int first: 60 stays 60 in JSON
    gpu_memory_allocated_gb: float
    gpu_memory_reserved_gb: float
    auto_monitor_running: bool
    statistics: GpuStatistics
    model: str | None = None
    device: str | None = None
    queue_length: int | None = None
    plan: Annotated[
        PlanStatus | None,
        Field(
            description="How the model is placed; while it is in host memory, how it was on the "
            "device. Left out if no model is loaded"
        ),
    ] = None
    loras: Annotated[
        list[str] | None,
        Field(description="The names of the LoRAs that edits can use, if there are any"),
    ] = None
    loras_in_model: Annotated[
        list[str] | None,
        Field(description="Those that the last edit used, as name:strength"),
    ] = None


class StatusAnswer(_Answer):
    """The answer of `get_gpu_status`."""

    status: Literal["success"] = "success"
    gpu_status: GpuStatus


class GpuAnswer(_Answer):
    """The answer of `offload_gpu` and `release_gpu`."""

    status: Literal["success"] = "success"
    message: str
    gpu_status: GpuStatus


class EstimateAnswer(_Answer):
    """The estimated time and memory of an edit that was not run; null if unknown."""

    status: Literal["success"] = "success"
    width: Annotated[int, Field(description="Width in pixels at which the picture is edited")]
    height: Annotated[int, Field(description="Height in pixels at which the picture is edited")]
    num_steps: int
    guidance_scale: float
    size_level: int
    n: Annotated[int, Field(description="Number of pictures, one after the other")]
    predicted_seconds: Annotated[
        float | None,
        Field(
            description="For all n pictures, from the last edit of the same kind, without waiting "
            "and loading; with reflection the time of all rounds, an upper bound"
        ),
    ]
    predicted_peak_gb: Annotated[float | None, Field(description="Estimated device memory in GiB")]
    must_load: Annotated[
        bool, Field(description="Whether the model must first be loaded or moved to the device")
    ]
    queue_length: Annotated[int, Field(description="Number of waiting edits")]
    model: str | None
    device: str | None
    reason: Annotated[str | None, Field(description="The memory plan in words")]
    note: Annotated[str | None, Field(description="Why less is known than usual, if so")]


# --- what is allowed, in plain values -------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """What the schema says about one parameter, for interfaces and error sentences."""

    name: str
    kind: str
    description: str
    default: Any
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[int | str, ...] = ()
    max_length: int | None = None

    @property
    def range(self) -> str:
        """The allowed values in words: "between 10 and 50", "512, 768 or 1024", or empty."""
        if self.choices:
            *others, last = map(str, self.choices)
            return f"{', '.join(others)} or {last}" if others else last
        if self.minimum is not None and self.maximum is not None:
            return f"between {_plain(self.minimum)} and {_plain(self.maximum)}"
        if self.minimum is not None:
            return f"at least {_plain(self.minimum)}"
        return "" if self.maximum is None else f"at most {_plain(self.maximum)}"


def parameters_of(model: type[BaseModel]) -> dict[str, Parameter]:
    """The parameters of a model by name, derived from its JSON schema."""
    properties: dict[str, dict[str, Any]] = model.model_json_schema()["properties"]
    return {name: _parameter(name, schema) for name, schema in properties.items()}


def _parameter(name: str, schema: Mapping[str, Any]) -> Parameter:
    options = schema.get("anyOf", [])
    values = next((option for option in options if option["type"] != "null"), schema)
    return Parameter(
        name=name,
        kind=values.get("type", ""),
        description=schema.get("description", ""),
        default=schema.get("default"),
        minimum=values.get("minimum"),
        maximum=values.get("maximum"),
        choices=tuple(values.get("enum", ())),
        max_length=values.get("maxLength"),
    )


PARAMETERS: Final[Mapping[str, Parameter]] = {
    **parameters_of(ViewRequest),
    **parameters_of(GenerateRequest),
    **parameters_of(BatchRequest),
    **parameters_of(EditRequest),
}


# --- what is wrong, in plain words ----------------------------------------------------------------

_Model = TypeVar("_Model", bound=BaseModel)


def given(values: Mapping[str, object]) -> dict[str, object]:
    """The values without those that are None, which count as not given."""
    return {name: value for name, value in values.items() if value is not None}


def given_in(request: BaseModel, kind: type[BaseModel]) -> dict[str, Any]:
    """The parameters of `kind` that a request gives, by name, without those that it leaves out."""
    fields = set(kind.model_fields)
    return request.model_dump(include=fields, exclude_unset=True, exclude_none=True)


def read_request(model: type[_Model], values: Mapping[str, object]) -> _Model:
    """Make a request from `values`, or raise InvalidParameterError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise invalid_parameter(error, parameters_of(model)) from None


def invalid_parameter(
    error: ValidationError, parameters: Mapping[str, Parameter] = PARAMETERS
) -> InvalidParameterError:
    """Turn a validation error of pydantic into plain sentences."""
    first = error.errors(include_url=False)[0]["loc"]
    name = str(first[0]) if first else ""
    sentences = complaints(error, parameters)
    return InvalidParameterError(
        "; ".join(sentences),
        param=parameters[name].name if name in parameters else name or None,
        fields=zip(_wrong_fields(error), sentences, strict=True),
    )


def complaints(error: ValidationError, parameters: Mapping[str, Parameter]) -> list[str]:
    """One sentence for each invalid parameter, in the order of the call."""
    return [_complaint(details, parameters) for details in _wrong_fields(error).values()]


def _wrong_fields(error: ValidationError) -> dict[str, ErrorDetails]:
    """The error of each parameter, by name; errors of the whole request have an empty name."""
    found: dict[str, ErrorDetails] = {}
    for details in error.errors(include_url=False):
        name = str(details["loc"][0]) if details["loc"] else ""
        # A union reports an error for each of its types; the deepest one is the relevant one.
        if name not in found or len(details["loc"]) > len(found[name]["loc"]):
            found[name] = details
    return _in_order(found, _CONTRACT)


def _complaint(details: ErrorDetails, parameters: Mapping[str, Parameter]) -> str:
    if not details["loc"]:
        return details["msg"]
    name = str(details["loc"][0])
    parameter = parameters.get(name, Parameter(name, kind="", description="", default=None))
    label = parameter.name + "".join(
        f"[{index}]" for index in details["loc"][1:] if isinstance(index, int)
    )
    kind, got = details["type"], f", got {_shown_as(parameter, details['input'])}"
    match kind:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{_shown(name)} is unknown{_suggestion(name, parameters)}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{label} is missing"
        case "multiple_of":
            kind = f"a multiple of {details['ctx']['multiple_of']:g}"
            return f"{label} must be {_worded(kind, parameter)}{got}"
        case "greater_than_equal" | "less_than_equal" | "literal_error" if parameter.range:
            return f"{label} must be {parameter.range}{got}"
        case "int_type" | "int_parsing" | "int_from_float" | "int_parsing_size":
            return f"{label} must be {_worded('a whole number', parameter)}{got}"
        case "finite_number" if parameter.kind == "integer":
            return f"{label} must be {_worded('a whole number', parameter)}{got}"
        case "float_type" | "float_parsing" | "finite_number":
            return f"{label} must be {_worded('a number', parameter)}{got}"
        case "string_type":
            return f"{label} must be a text{got}"
        case "string_unicode":
            return f"{label} must be valid Unicode text"
        case "string_too_long":
            limit = details["ctx"]["max_length"]
            return f"{label} must have at most {limit} characters, got {len(details['input'])}"
        case "too_long":
            limit = details["ctx"]["max_length"]
            return f"{label} must have at most {limit} items, got {len(details['input'])}"
        case "string_too_short" | "too_short":
            return f"{label} must not be empty"
        case "bool_type" | "bool_parsing":
            return f"{label} must be true or false{got}"
        case "list_type":
            return f"{label} must be a list of texts{got}"
        case "text_or_list" | "plain_text":
            return f"{label} {details['msg']}"
    return f"{label} is not valid{got}"


def _worded(kind: str, parameter: Parameter) -> str:
    return parameter.range if parameter.choices else f"{kind} {parameter.range}".rstrip()


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)


def _shown_as(parameter: Parameter, value: object) -> str:
    """A value of the caller; a number in a form, which is text, looks like any other number."""
    if parameter.kind in ("integer", "number") and isinstance(value, str):
        with contextlib.suppress(ValueError):
            float(value)
            return _shown(value)[1:-1]
    return _shown(value)


def _shown(value: object, width: int = 60) -> str:
    """A value of the caller, quoted and shortened, so that it fits into a sentence."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"  # Python refuses to format very long integers
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"
