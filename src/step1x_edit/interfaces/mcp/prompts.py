"""Prompts that help an assistant to use `edit_image` well, and completions for them.

A prompt is text for the assistant, not for the model: it names the tool, the form of a good
instruction and what to do with the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from fastmcp.prompts import Prompt
from fastmcp.prompts.base import PromptArgument
from mcp_types import (
    CompletionArgument,
    CompletionContext,
    PromptReference,
    ResourceTemplateReference,
)

_NEXT_STEPS: Final = """\
Look at the preview in the answer. If it does not match the request, try once more with another \
seed or a higher guidance_scale (up to 10), and tell the user which seed was used. If there is a \
metadata.warning, tell the user what it says. Give output_path as the result; the input \
is never changed."""


def _restyle(image_path: str, style: str) -> str:
    return (
        f"Call edit_image with image_path {image_path!r} and the prompt "
        f'"turn it into {style}". '
        f"Leave the other parameters at their defaults.\n\n{_NEXT_STEPS}"
    )


def _replace_background(image_path: str, background: str) -> str:
    return (
        f"Look at {image_path!r} with view_image and find the subject. Then call edit_image on it "
        f'with a prompt such as "replace the background with {background}, keep the <subject> '
        'unchanged", naming the subject in two or three words. Leave the other parameters at '
        f"their defaults.\n\n{_NEXT_STEPS}"
    )


def _fix_colours(image_path: str, problem: str = "not said") -> str:
    return (
        f"Look at {image_path!r} with view_image; the user's complaint about its colours: "
        f"{problem}. Choose one concrete instruction that fixes it, for example "
        '"make it brighter", "more contrast", "make the colours more vivid" or "remove the yellow '
        'tint", and call edit_image with it. Fix one problem per call; if another remains, edit '
        f"the output_path of the last call.\n\n{_NEXT_STEPS}"
    )


_ARGUMENTS: Final = {
    "image_path": "Path of the picture on this machine",
    "style": "What it should become, such as 'an oil painting'",
    "background": "What should be behind the subject",
    "problem": "What is wrong with the colours",
}

SUGGESTIONS: Final[Mapping[tuple[str, str], tuple[str, ...]]] = {
    ("restyle", "style"): (
        "a black and white photo",
        "a comic",
        "a mosaic",
        "a pencil sketch",
        "a sepia photo",
        "a watercolour",
        "an anime picture",
        "an oil painting",
    ),
    ("replace_background", "background"): (
        "a beach at sunset",
        "a city street at night",
        "a forest in autumn",
        "a plain white studio wall",
        "mountains in fog",
        "snow",
    ),
    ("fix_colours", "problem"): (
        "colours look faded",
        "too bright",
        "too dark",
        "too little contrast",
        "yellow tint",
        "blue tint",
    ),
}


def prompts() -> list[Prompt]:
    """The prompts, in a fixed order."""
    return [
        _prompt(
            _restyle,
            "Change the style",
            "Give a picture another style and keep its content.",
        ),
        _prompt(
            _replace_background,
            "Replace the background",
            "Put the subject of a picture in front of something else.",
        ),
        _prompt(_fix_colours, "Fix the colours", "Fix the light and colours of a picture."),
    ]


def _prompt(function: Callable[..., str], title: str, description: str) -> Prompt:
    """A prompt of a function, with its description, so that fastmcp loads no docstring parser."""
    prompt = Prompt.from_function(
        function, name=function.__name__.lstrip("_"), title=title, description=description
    )
    described = [
        PromptArgument(
            name=argument.name,
            description=_ARGUMENTS[argument.name],
            required=argument.required,
        )
        for argument in prompt.arguments or ()
    ]
    return prompt.model_copy(update={"arguments": described})


def complete(
    reference: PromptReference | ResourceTemplateReference,
    argument: CompletionArgument,
    context: CompletionContext | None,
) -> list[str] | None:
    """The suggestions that contain the typed text."""
    if not isinstance(reference, PromptReference):
        return None
    known = SUGGESTIONS.get((reference.name, argument.name), ())
    return [value for value in known if argument.value.casefold() in value.casefold()]
