"""What the schema says about one parameter, for interfaces that show it and for errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel

CONTRACT: Final = (
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


def in_order(values: Mapping[str, Any], first: Iterable[str]) -> dict[str, Any]:
    """The same values, beginning with those that `first` names, in its order."""
    return {**{name: values[name] for name in first if name in values}, **values}


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
            return f"between {plain(self.minimum)} and {plain(self.maximum)}"
        if self.minimum is not None:
            return f"at least {plain(self.minimum)}"
        return "" if self.maximum is None else f"at most {plain(self.maximum)}"


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


def plain(number: float) -> str:
    """A number without a fraction of zero: 6 for 6.0."""
    return str(int(number)) if float(number).is_integer() else str(number)
