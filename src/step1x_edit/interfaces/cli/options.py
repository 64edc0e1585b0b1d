"""Flags and arguments that several commands have, worded as the schema words them."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from step1x_edit.errors import InvalidParameterError
from step1x_edit.schemas import DEFAULT_REFLECTION_ROUNDS, MAX_STRENGTH, PARAMETERS


def option(name: str, *flags: str, default: int | None = None, metavar: str | None = None) -> Any:
    """A flag for a parameter, described as the schema describes it; `default` is the command's.

    Numbers are texts here: the schema reads them, and says what is wrong with them.
    """
    parameter = PARAMETERS[name]
    notes = [parameter.range] if parameter.range and name != "seed" else []
    if default is not None:
        notes.append(f"default {default}")
    elif parameter.default not in (None, "", False):
        notes.append(f"default {parameter.default}, or DEFAULT_{name.upper()} where that is set")
    told = f" ({'; '.join(notes)})" if notes else ""
    return typer.Option(
        *flags, metavar=metavar, help=parameter.description + told, show_default=False
    )


def check_prompt(prompt: str, example: str = "add a red hat") -> None:
    """Raise InvalidParameterError if a prompt says nothing: a person has forgotten it."""
    if not prompt.strip():
        raise InvalidParameterError(f'prompt is empty; say what you want, such as "{example}"')


WHOLE: Final = "<int>"

NumSteps = Annotated[str | None, option("num_steps", "--num-steps", "--steps", metavar=WHOLE)]
GuidanceScale = Annotated[str | None, option("guidance_scale", metavar="<float>")]
SizeLevel = Annotated[str | None, option("size_level", metavar=WHOLE)]
Seed = Annotated[str | None, option("seed", metavar=WHOLE)]
NegativePrompt = Annotated[str | None, option("negative_prompt")]
Overwrite = Annotated[bool, option("overwrite", "--overwrite")]
Thinking = Annotated[bool | None, option("thinking", "--thinking")]
Reflection = Annotated[bool | None, option("reflection", "--reflection")]
ReflectionRounds = Annotated[
    str | None,
    option("reflection_rounds", default=DEFAULT_REFLECTION_ROUNDS, metavar=WHOLE),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="NAME[:STRENGTH]",
        help="A LoRA to edit with, of those that LORA_PATH names, with a strength from "
        f"-{MAX_STRENGTH} to {MAX_STRENGTH}; may be given several times. An empty text: none "
        "(default: what LORA_PATH says)",
        show_default=False,
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON")]
Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Have this server do it, such as http://127.0.0.1:8000 (default: the one that runs "
        "on this machine, if there is one)",
        show_default=False,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="The key that the server at --url asks for (default: API_KEY)",
        show_default=False,
    ),
]
Standalone = Annotated[
    bool,
    typer.Option("--standalone", help="Do it in this process, whether a server runs or not"),
]
