"""Turns validation errors into sentences of one line that say what to change."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterable, Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from step1x_edit.errors import InvalidParameterError
from step1x_edit.schemas.parameters import CONTRACT, Parameter, in_order


def invalid_parameter(
    error: ValidationError, parameters: Mapping[str, Parameter]
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
    return in_order(found, CONTRACT)


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
            return f"{shown(name)} is unknown{suggestion(name, parameters)}"
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


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: a similar known name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _shown_as(parameter: Parameter, value: object) -> str:
    """A value of the caller; a number in a form, which is text, is shown as a number."""
    if parameter.kind in ("integer", "number") and isinstance(value, str):
        with contextlib.suppress(ValueError):
            float(value)
            return shown(value)[1:-1]
    return shown(value)


def shown(value: object, width: int = 60) -> str:
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
