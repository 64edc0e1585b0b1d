"""Every request; names, ranges, defaults and descriptions are defined only here.

The request models, the MCP tools and the settings use the annotated types (`NumSteps`, `Seed`, …)
directly; `PARAMETERS` has the same as plain values for interfaces such as the command line.
Common deviations are accepted ("28", 28.0, a list encoded as JSON), which the JSON schema does
not show. This module knows nothing about its callers.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError
from typing_extensions import Self

from step1x_edit import foreign_json
from step1x_edit.errors import InvalidParameterError
from step1x_edit.model.request import Mode
from step1x_edit.schemas.complaints import invalid_parameter, shown, suggestion
from step1x_edit.schemas.parameters import CONTRACT, Parameter, in_order, parameters_of, plain

Size = Literal[512, 768, 1024]


Precision = Literal["auto", "bf16", "fp8", "int8", "nf4"]
"""How the model's weights are kept; auto: as the checkpoint has them, if memory allows."""

Arithmetic = Literal["auto", "fp32", "bf16"]
"""The numbers that a CPU computes with; auto: those with which it is faster, by a measurement."""

Region = Literal["whole", "full"]
"""What the network edits of a masked picture: all of it, or the masked part enlarged."""

Factor = Literal[1, 2, 4]
"""How many times a finished picture is enlarged by a model for that; 1: it keeps its size."""

DEFAULT_NUM_STEPS: Final = 28
DEFAULT_GUIDANCE_SCALE: Final = 6.0
DEFAULT_SIZE_LEVEL: Final[Size] = 1024
DEFAULT_MODE: Final[Mode] = "exact"
DEFAULT_REGION: Final[Region] = "whole"
DEFAULT_UPSCALE: Final[Factor] = 1
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


CHOSEN_BY_THE_OPERATOR: Final = ("num_steps", "guidance_scale", "size_level", "mode")
"""The parameters whose default is a setting: DEFAULT_ and the name."""

AROUND_THE_NETWORK: Final = frozenset({"region", "outpaint", "upscale"})
"""The parameters of an edit that decide which picture the network gets, and what happens to its
result; it does not see them."""

_ADDED: Final = re.compile(r"[0-9]{1,5}(px)?|[0-9]{1,3}(\.[0-9]{1,2})?%")
_SIDES: Final = 4
MAX_ADDED: Final = 100_000  # pixels on one side


# --- reading leniently ---------------------------------------------------------------------------


def whole_number(value: object) -> object:
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
            decoded = foreign_json.parse(value)
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
            value = foreign_json.parse(value)
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
            {"most": plain(MAX_STRENGTH), "value": shown(value)},
        )
    return f"{name}:{plain(strength)}"


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
            raise PydanticCustomError("plain_text", "names {name} twice", {"name": shown(name)})
    return values


def _sizes_as_text(value: object) -> object:
    """Read 256 and [0, "25%"] as texts."""
    value = read_list(value)
    sizes = value if isinstance(value, list) else [value]
    if all(isinstance(each, str) or (type(each) is int and each < MAX_ADDED) for each in sizes):
        return " ".join(map(str, sizes))
    return value


def _outpaint(value: str) -> str:
    """The sizes separated by spaces and without units of pixels; empty if they add nothing."""
    sizes = value.replace(",", " ").lower().split()
    if len(sizes) > _SIDES or not all(map(_ADDED.fullmatch, sizes)):
        raise PydanticCustomError(
            "plain_text",
            "must be one to four sizes in pixels or percent, such as '25%' for every side or "
            "'0 256 0 256' for top, right, bottom and left, got {value}",
            {"value": shown(value)},
        )
    is_something = any(digit in value for digit in "123456789")
    return " ".join(size.removesuffix("px") for size in sizes) if is_something else ""


def strengths_of(loras: Iterable[str]) -> dict[str, float]:
    """The strengths by name of a list of `name:strength`; those of 0 are left out."""
    strengths = dict(map(_name_and_strength, loras))
    return {name: strengths[name] for name in sorted(strengths) if strengths[name] != 0}


def loras_of(strengths: Mapping[str, float]) -> list[str]:
    """The inverse: a list of `name:strength`."""
    return [f"{name}:{plain(strength)}" for name, strength in strengths.items()]


def check_loras(wanted: Iterable[str], known: Collection[str]) -> None:
    """Raise InvalidParameterError unless all these names are known LoRAs."""
    for name in wanted:
        if name not in known:
            there_are = f"there are {', '.join(known)}" if known else "LORA_PATH names none"
            wrong = f"loras has {shown(name)}, which is not here{suggestion(name, known)}"
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
_SeedNumber = Annotated[int, Field(ge=-1, le=MAX_SEED), BeforeValidator(whole_number)]

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
    BeforeValidator(whole_number),
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
ModeOfWork = Annotated[
    Mode,
    Field(
        description="How many of the steps the network computes: exact all; fast about half, with "
        "differences that are hard to see; turbo about 40 %, with small differences"
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
    BeforeValidator(whole_number),
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
RegionEdited = Annotated[
    Region,
    Field(
        description="With a mask or outpaint, what the network edits: whole the whole picture, "
        "full only the part that may change and its surroundings, at the whole size_level, which "
        "gives more detail"
    ),
]
Upscale = Annotated[
    Factor,
    Field(
        description="Enlarge the finished picture 2 or 4 times along each side, with the model "
        "that the setting UPSCALE_MODEL names; 1: it keeps its size"
    ),
    BeforeValidator(_choice),
]
Outpaint = Annotated[
    str,
    Field(
        max_length=60,
        description="Enlarge the canvas and paint the new area; the old pixels stay exactly the "
        "same. Pixels or percent of the picture: '25%' on every side, '0 256' left and right, or "
        "four sizes for top, right, bottom and left. Default: the size of the input",
    ),
    AfterValidator(_outpaint),
    BeforeValidator(_sizes_as_text),
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
    int, Field(ge=256, le=2048, multiple_of=SIDE_MULTIPLE), BeforeValidator(whole_number)
]
Width = Annotated[_NewSide, Field(description="Width in pixels, a multiple of 16")]
Height = Annotated[_NewSide, Field(description="Height in pixels, a multiple of 16")]
MaxSize = Annotated[
    int,
    Field(ge=64, le=1024, description="Longest side of the shown picture, in pixels"),
    BeforeValidator(whole_number),
]
JOB_ID_PATTERN: Final = "^[0-9a-f]{44}$"

JobsListed = Annotated[
    int,
    Field(ge=1, le=100, description="Maximum number of jobs to list"),
    BeforeValidator(whole_number),
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


def _list_as_the_contract_does(schema: dict[str, Any]) -> None:
    schema["properties"] = in_order(schema["properties"], CONTRACT)
    if "required" in schema:
        schema["required"].sort(key=[*schema["properties"]].index)


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HowToMake(Request):
    """The parameters that editing a picture and generating one from text share."""

    model_config = ConfigDict(json_schema_extra=_list_as_the_contract_does)

    num_steps: NumSteps = DEFAULT_NUM_STEPS
    guidance_scale: GuidanceScale = DEFAULT_GUIDANCE_SCALE
    seed: Seed = None
    loras: Loras = None
    mode: ModeOfWork = DEFAULT_MODE
    upscale: Upscale = DEFAULT_UPSCALE


class HowToEdit(HowToMake):
    """How an edit runs: all its parameters but the prompt, the input and the output.

    Every interface, record and answer derives from it; `model.request.NetworkRequest` has a field
    for each of these, except those around the network.
    """

    size_level: SizeLevel = DEFAULT_SIZE_LEVEL
    negative_prompt: NegativePrompt = ""
    thinking: Thinking = False
    reflection: Reflection = False
    reflection_rounds: ReflectionRounds = DEFAULT_REFLECTION_ROUNDS
    region: RegionEdited = DEFAULT_REGION
    outpaint: Outpaint = ""


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


class ViewRequest(Request):
    """A picture to look at."""

    path: Annotated[_PathText, Field(description="Path of the picture to look at")]
    max_size: MaxSize = DEFAULT_MAX_SIZE


class RecipeRequest(Request):
    """A picture whose recipe to read."""

    image_path: Annotated[_PathText, Field(description="Path of a picture that was made here")]


class HandleRequest(Request):
    """An edit that runs in the background."""

    job_id: JobId


class WaitRequest(HandleRequest):
    """An edit that runs in the background, and how long to wait for its end."""

    wait_s: WaitSeconds = DEFAULT_WAIT_S


_Side = Annotated[
    int | None,
    Field(ge=1, le=100_000, description="Size in pixels of the picture that would be sent"),
    BeforeValidator(whole_number),
]


class PictureSize(Request):
    """The size of a picture that has not been sent: both sides or none."""

    width: _Side = None
    height: _Side = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.width is None) != (self.height is None):
            raise PydanticCustomError("both_or_none", "width and height must be given together")
        return self


class JobsRequest(Request):
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

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

_LEFT_OUT: Final = {
    "mode": DEFAULT_MODE,
    "upscale": DEFAULT_UPSCALE,
    "region": DEFAULT_REGION,
    "outpaint": "",
}
"""Values that a file does not mention: with them an edit does nothing more, and nothing less."""


class _Record(HowToMake):
    """What a picture was made with, as stored in its file."""

    software: Literal["step1x-edit"] = "step1x-edit"
    model: str
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    loras: list[str] | None = None
    """Those that were in the model, as `name:strength`, if there were any."""
    precision: str | None = None
    """How the weights were kept, such as bf16 or int8."""
    arithmetic: str | None = None
    """The numbers of a CPU and products of codes, as `channel.Residence` has them."""
    numerics: str | None = None
    """What else the bytes depend on: device, instruction set, threads and library."""
    upscaler: str | None = None
    """The name of the model file that enlarged the picture, if one did."""
    upscaler_sha256: _Sha256 | None = None
    """Of the bytes of this file."""

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out switches that are off, and parameters that change nothing."""
        values = {
            name: value
            for name, value in write(self).items()
            if value is not False and (name not in _LEFT_OUT or value != _LEFT_OUT[name])
        }
        return in_order(values, _IN_A_FILE)


class EditRecord(_Record, HowToEdit):
    """What a picture was made with, written into its file so that the edit can be replayed.

    Without a prompt it cannot: the operator has left the prompts out of the file.
    """

    prompt: Prompt | None = None
    negative_prompt: NegativePrompt | None = None  # type: ignore[assignment]
    input_sha256: _Sha256 | None = None
    """Of the bytes of the input: replaying the edit needs the same one."""
    mask_sha256: _Sha256 | None = None
    """Of the bytes of the mask, if there was one: replaying the edit needs the same mask."""
    reflection_rounds: ReflectionRounds | None = None  # type: ignore[assignment]
    """The maximum number of rounds, if there was a reflection."""
    rewritten_prompt: Annotated[str, Field(max_length=MAX_PROMPT_LENGTH)] | None = None
    """The prompt as thinking has rewritten it, unless it is too long for a file."""


class GenerationRecord(_Record, HowToGenerate):
    """What a picture was generated with from text, written into its file like an `EditRecord`."""

    prompt: NewPrompt | None = None
    negative_prompt: NewNegativePrompt = None
    """None, which is left out: the list that the model was published with."""


Record: TypeAlias = EditRecord | GenerationRecord


def without_prompts(record: Record) -> Record:
    """The record without the texts of people; what it describes cannot be repeated from it."""
    texts = {"prompt", "negative_prompt", "rewritten_prompt"} & type(record).model_fields.keys()
    return record.model_copy(update=dict.fromkeys(texts))


PARAMETERS: Final[Mapping[str, Parameter]] = {
    **parameters_of(ViewRequest),
    **parameters_of(GenerateRequest),
    **parameters_of(BatchRequest),
    **parameters_of(EditRequest),
}


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
