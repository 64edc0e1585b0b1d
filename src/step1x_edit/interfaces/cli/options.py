"""Flags and arguments that several commands have, worded as the schema words them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from step1x_edit.schemas import DEFAULT_REFLECTION_ROUNDS, MAX_STRENGTH, PARAMETERS


def option(name: str, *flags: str, default: int | None = None) -> Any:
    """A flag for a parameter, described as the schema describes it; `default` is the command's."""
    parameter = PARAMETERS[name]
    notes = [parameter.range] if parameter.range and name != "seed" else []
    if default is not None:
        notes.append(f"default {default}")
    elif parameter.default not in (None, "", False):
        notes.append(f"default {parameter.default}, or DEFAULT_{name.upper()} where that is set")
    told = f" ({'; '.join(notes)})" if notes else ""
    return typer.Option(*flags, help=parameter.description + told, show_default=False)


NumSteps = Annotated[int | None, option("num_steps")]
GuidanceScale = Annotated[float | None, option("guidance_scale")]
SizeLevel = Annotated[int | None, option("size_level")]
Seed = Annotated[int | None, option("seed")]
NegativePrompt = Annotated[str | None, option("negative_prompt")]
Overwrite = Annotated[bool, option("overwrite", "--overwrite")]
Thinking = Annotated[bool | None, option("thinking", "--thinking")]
Reflection = Annotated[bool | None, option("reflection", "--reflection")]
ReflectionRounds = Annotated[
    int | None, option("reflection_rounds", default=DEFAULT_REFLECTION_ROUNDS)
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
