"""The requests of OpenAI's Images, with the parameters of this server."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from step1x_edit.schemas.requests import (
    HowToEdit,
    HowToMake,
    NewNegativePrompt,
    NewPrompt,
    Prompt,
    Request,
    whole_number,
)

_OPENAI_NAMES: Final = {"num_steps": "num_inference_steps"}
"""The parameters that have another name in OpenAI's API and its extensions."""


class OpenAIRequest(Request):
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
        BeforeValidator(whole_number),
    ] = 1
    quality: Annotated[
        Literal["auto", "standard", "low", "medium", "high", "hd"],
        Field(
            description="Chooses the `mode`: low turbo, medium fast, high and hd exact; auto and "
            "standard: the server's default"
        ),
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
        BeforeValidator(whole_number),
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
        BeforeValidator(whole_number),
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
        Field(description="Ignored: the model always sees the picture itself"),
    ] = None


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
