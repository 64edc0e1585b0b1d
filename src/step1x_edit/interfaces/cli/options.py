"""Flags and arguments that several commands share, described as in the schema."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Final, Optional, TypeAlias

import typer
from pydantic import BaseModel

from step1x_edit.errors import InvalidParameterError
from step1x_edit.schemas.parameters import Parameter, parameters_of
from step1x_edit.schemas.requests import CHOSEN_BY_THE_OPERATOR, MAX_STRENGTH

_Function: TypeAlias = Callable[..., None]

WHOLE: Final = "<int>"
_METAVARS: Final = {"integer": WHOLE, "number": "<float>"}
_FLAGS: Final = {"num_steps": ("--num-steps", "--steps"), "mask_path": ("--mask",)}
"""Flags that are not the parameter's name with dashes."""
_OWN_WORDS: Final = ("image_path", "prompt", "output_path")
"""The parameters that each command defines itself."""

_Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="NAME[:STRENGTH]",
        help="A LoRA to use, of those in LORA_PATH, with a strength from "
        f"-{MAX_STRENGTH} to {MAX_STRENGTH}; can be repeated. An empty text: none "
        "(default: those that LORA_PATH adds)",
        show_default=False,
    ),
]


def with_options_of(request: type[BaseModel]) -> Callable[[_Function], _Function]:
    """Replace a command's argument `asked` by an option for each parameter of a request.

    The command receives in `asked` the values that were given, by the names of the parameters.
    """
    options = {
        name: inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(parameter)
        )
        for name, parameter in parameters_of(request).items()
        if name not in _OWN_WORDS
    }

    def extend(command: _Function) -> _Function:
        @functools.wraps(command)
        def called(**values: Any) -> None:
            asked = {name: values.pop(name) for name in options}
            given = {name: value for name, value in asked.items() if value is not None}
            command(**values, asked=given)

        signature = inspect.signature(command, eval_str=True)
        own = list(signature.parameters.values())
        place = own.index(signature.parameters["asked"])
        own[place : place + 1] = options.values()
        called.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]  # typer reads it
        return called

    return extend


def _annotation(parameter: Parameter) -> Any:
    if parameter.name == "loras":
        return _Loras
    kind = bool if parameter.kind == "boolean" else str
    return Annotated[Optional[kind], option(parameter)]  # noqa: UP045 - the kind is a value


def option(parameter: Parameter, default: int | None = None) -> Any:
    """An option with the schema's description; `default` is the command's.

    Numbers stay texts here: the schema parses them and reports errors.
    """
    name = parameter.name
    notes = [parameter.range] if parameter.range and name != "seed" else []
    if default is not None:
        notes.append(f"default {default}")
    elif name in CHOSEN_BY_THE_OPERATOR:
        notes.append(f"default {parameter.default}, or DEFAULT_{name.upper()} if set")
    elif parameter.default not in (None, "", False):
        notes.append(f"default {parameter.default}")
    return typer.Option(
        *_FLAGS.get(name, (f"--{name.replace('_', '-')}",)),
        metavar=_METAVARS.get(parameter.kind),
        help=parameter.description + (f" ({'; '.join(notes)})" if notes else ""),
        show_default=False,
    )


def check_prompt(prompt: str, example: str = "add a red hat") -> None:
    """Raise InvalidParameterError if a prompt is empty, which is a mistake here."""
    if not prompt.strip():
        raise InvalidParameterError(f'prompt is empty; say what you want, such as "{example}"')


AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON")]
Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Use this server, such as http://127.0.0.1:8000 (default: the server that runs on "
        "this machine, if any)",
        show_default=False,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="The key of the server at --url (default: API_KEY)",
        show_default=False,
    ),
]
Standalone = Annotated[
    bool,
    typer.Option("--standalone", help="Use this process, even if a server runs"),
]
