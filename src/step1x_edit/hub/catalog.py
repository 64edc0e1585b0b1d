"""The published checkpoints as data: names, files, and the parameters that their authors suggest.

Other models on the hub can be named by their id. This module reads no disk and no network.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from step1x_edit.errors import InvalidParameterError

SUFFIXES: Final = frozenset({".safetensors", ".json", ".txt", ".jinja"})
"""The types of files that are fetched: weights, configurations and vocabularies, no code."""

_HUB_ID: Final = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A repository of the hub, its required files, and the subfolder for them."""

    repo: str
    patterns: tuple[str, ...] = ("*",)
    subfolder: str = ""

    def wants(self, path: str) -> bool:
        """Whether a file is required, and of a type that is safe to store."""
        is_wanted = any(fnmatch.fnmatchcase(path, pattern) for pattern in self.patterns)
        return is_wanted and PurePosixPath(path).suffix in SUFFIXES


@dataclass(frozen=True)
class Model:
    """A model that can be fetched, and the name of its folder."""

    name: str
    sources: tuple[Source, ...]
    version: str | None = None
    published_bytes: int | None = None
    """The sum of the published file sizes, rounded as published; None if they are not stated."""
    note: str = ""

    @property
    def folder_name(self) -> str:
        """The name as a single path component."""
        return self.name.replace("/", "--")

    @property
    def repos(self) -> tuple[str, ...]:
        """The ids of its repositories."""
        return tuple(source.repo for source in self.sources)


OFFICIAL: Final = "stepfun-ai/Step1X-Edit"
QWEN: Final = Source("Qwen/Qwen2.5-VL-7B-Instruct", subfolder="Qwen2.5-VL-7B-Instruct")
"""The conditioner, which the official single files do not include."""

_TRANSFORMER, _VAE, _CONDITIONER = 24_900_000_000, 335_000_000, 16_600_000_000
_SINGLE_FILES: Final = _TRANSFORMER + _VAE + _CONDITIONER
_DIFFUSERS: Final = (
    "model_index.json",
    "transformer/*",
    "vae/*",
    "scheduler/*",
    "text_encoder/*",
    "tokenizer/*",
    "processor/*",
)

CATALOG: Final = (
    Model(
        "v1.0",
        (Source(OFFICIAL, ("step1x-edit-i1258.safetensors", "vae.safetensors")), QWEN),
        "v1.0",
        _SINGLE_FILES,
    ),
    Model(
        "v1.1",
        (Source(OFFICIAL, ("step1x-edit-v1p1-official.safetensors", "vae.safetensors")), QWEN),
        "v1.1",
        _SINGLE_FILES,
    ),
    Model(
        "v1.1-diffusers",
        (Source("stepfun-ai/Step1X-Edit-v1p1-diffusers", _DIFFUSERS),),
        "v1.1",
        41_800_000_000,
    ),
    Model(
        "v1.2",
        (Source("stepfun-ai/Step1X-Edit-v1p2", _DIFFUSERS),),
        "v1.2",
    ),
    Model(
        "v1.2-preview",
        (Source("stepfun-ai/Step1X-Edit-v1p2-preview", _DIFFUSERS),),
        "v1.2-preview",
    ),
)


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


def is_hub_id(text: str) -> bool:
    """Whether the name has the form of a hub id: owner/name."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def find_model(name: str) -> Model:
    """The model with a name in the catalog or a hub id. Raises InvalidParameterError."""
    named = {model.name: model for model in CATALOG}
    if name.lower() in named:
        return named[name.lower()]
    owners = [model for model in CATALOG if name in (model.name, model.repos[0])]
    if len(owners) == 1:
        return owners[0]
    if owners:
        several = " or ".join(model.name for model in owners)
        raise InvalidParameterError(f"{name} has several models; choose {several}")
    if is_hub_id(name):
        return Model(name, (Source(name),))
    close = difflib.get_close_matches(name.lower(), named, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}? " if close else ""
    raise InvalidParameterError(
        f"there is no model '{name}'; {hint}known are {', '.join(named)}, "
        "and ids of the hub (owner/name)"
    )
