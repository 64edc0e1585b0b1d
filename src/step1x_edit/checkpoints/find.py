"""Finding the parts of a checkpoint among files, by their tensors and never by their names.

A set of safetensors is one file, or its shards: `name-00001-of-00003.safetensors`, with or without
an index that lists them. A file in GGUF is a set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from step1x_edit import foreign_json
from step1x_edit.checkpoints.dialects import not_read, prefix_of, quantiser
from step1x_edit.checkpoints.gguf_file import SUFFIX as GGUF
from step1x_edit.checkpoints.gguf_file import read_header
from step1x_edit.checkpoints.keymap import SCALE_FACTOR, some_of
from step1x_edit.checkpoints.stored import PICKLES, is_gguf, shortened, stored_names
from step1x_edit.errors import CheckpointError

MAPPING_WEIGHT: Final = "text_token_mapping.weight"

_SUFFIXES: Final = frozenset({".safetensors", ".sft", GGUF})
_SHARD: Final = re.compile(r"(.+)-(\d+)-of-(\d+)\.(safetensors|sft)", re.IGNORECASE)
_UNFINISHED: Final = frozenset({".incomplete", ".partial", ".part", ".aria2", ".crdownload"})
# One tensor identifies the part and its layout: official, diffusers.
_TRANSFORMER: Final = (
    "double_blocks.0.img_attn.qkv.weight",
    "transformer_blocks.0.attn.to_q.weight",
)
_VAE: Final = ("decoder.up.0.block.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight")
_CONNECTOR: Final = "connector.S.input_embedder.weight"
_LORA: Final = re.compile(r"\b(lora_(down|up|A|B)|lokr_w\w+|hada_w\w+|diff)\b")


@dataclass(frozen=True)
class FileSet:
    """Files that belong together, and the names of all their tensors."""

    files: tuple[Path, ...]
    names: frozenset[str]
    prefix: str = ""
    """What precedes the names in the files, as a tool wrote them."""
    packed: str = ""
    """The type of most numbers of a file in GGUF: GGUF Q4_K."""
    architecture: str | None = None
    """What a file in GGUF says that it is."""

    @property
    def is_transformer(self) -> bool:
        """Whether it is the transformer of any version."""
        return not self.names.isdisjoint(_TRANSFORMER) and _CONNECTOR in self.names

    @property
    def is_vae(self) -> bool:
        """Whether it is an autoencoder of the supported kind."""
        return not self.names.isdisjoint(_VAE)

    @property
    def is_official(self) -> bool:
        """Whether the names are those of the official layout."""
        return _TRANSFORMER[0] in self.names or _VAE[0] in self.names

    @property
    def version(self) -> str:
        """The version of a transformer."""
        if MAPPING_WEIGHT in self.names:
            return "v1.2"
        return "v1.0" if SCALE_FACTOR in self.names else "v1.1"

    def __str__(self) -> str:
        return self.files[0].name


def file_sets(folder: Path) -> list[FileSet]:
    """The sets of a folder, those in GGUF first.

    Raises CheckpointError if a shard is missing or cannot be read.
    """
    shards: dict[tuple[str, int], list[Path]] = {}
    found = [each for each in folder.glob("*") if each.suffix.lower() in _SUFFIXES]
    for file in sorted(found, key=lambda each: (not is_gguf(each), each)):
        match = _SHARD.fullmatch(file.name)
        key = (match[1], int(match[3])) if match else (file.name, 1)
        shards.setdefault(key, []).append(file)
    for file in sorted(folder.glob("*.safetensors.index.json")):
        if below := _listed_below(file):
            shards[file.name, len(below)] = below
    for (name, count), files in shards.items():
        if len(files) < count:
            raise CheckpointError(
                f"{folder} has {len(files)} of the {count} files of {name}: the others are missing"
            )
    return [file_set(files) for files in shards.values()]


def file_set(files: Iterable[Path]) -> FileSet:
    """These files as one set."""
    files = tuple(files)
    names = frozenset[str]().union(*(stored_names(file) for file in files))
    prefix = prefix_of(names, _TRANSFORMER)
    plain = frozenset(name.removeprefix(prefix) for name in names)
    if not is_gguf(files[0]):
        return FileSet(files, plain, prefix)
    header = read_header(files[0])
    return FileSet(files, plain, prefix, f"GGUF {header.kind}", header.architecture)


def _listed_below(file: Path) -> list[Path]:
    """The files of an index that lie in folders below. Raises CheckpointError if one is missing."""
    try:
        listed = set(foreign_json.parse(file.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {file}: {error!r}") from error
    if missing := {name for name in listed if not (file.parent / str(name)).is_file()}:
        raise CheckpointError(f"{file.parent} lacks {some_of(missing)}, which its index lists")
    folder = Path(os.path.normpath(file.parent))
    paths = sorted({Path(os.path.normpath(folder / str(name))) for name in listed})
    return [path for path in paths if path.is_relative_to(folder) and path.parent != folder]


def choose_transformer(sets: Iterable[FileSet], place: Path, wanted: str | None) -> FileSet:
    """The transformer of the requested version, or else the newest; of two of them the last one.

    Raises CheckpointError if there is none.
    """
    sets = list(sets)
    found = {each.version: each for each in sets if each.is_transformer}
    if not found:
        raise CheckpointError(f"no Step1X-Edit transformer in {place}{_what_there_is(sets, place)}")
    return found[wanted if wanted in found else max(found)]


def _what_there_is(sets: list[FileSet], place: Path) -> str:
    """A hint about a file that may have been mistaken for one."""
    folder = place if place.is_dir() else place.parent
    entries = sorted(folder.iterdir())
    if unfinished := [entry for entry in entries if entry.suffix in _UNFINISHED]:
        return f"; {unfinished[0].name} is not complete: download it again"
    if refused := [entry for entry in entries if entry.suffix.lower() in PICKLES]:
        return f"; {refused[0].name} is not read: only safetensors are accepted"
    others = [each for each in sets if not each.is_vae]
    if not others:
        return f"; {sets[0]} is the autoencoder alone" if sets else ""
    if not others[0].names.isdisjoint(_TRANSFORMER):
        return f"; {others[0]} has no connector: it is another model of this kind, such as FLUX"
    if any(_LORA.search(name) for name in others[0].names):
        return f"; {others[0]} is a LoRA: set LORA_PATH to it"
    if tool := quantiser(others[0].names):
        return f"; {not_read(others[0], tool)}"
    if others[0].architecture:
        return f"; {others[0]} is a GGUF of {shortened(others[0].architecture)}"
    return f"; {others[0]} is of another model"


def find_vae(folder: Path) -> FileSet:
    """The autoencoder in a folder or in its subfolder `vae`. Raises CheckpointError."""
    for place in (folder, folder / "vae"):
        for each in file_sets(place):
            if each.is_vae:
                return each
    raise CheckpointError(f"no autoencoder (vae.safetensors) in {folder}")


def find_vlm(folder: Path) -> Path:
    """The folder of the conditioner inside this one. Raises CheckpointError."""
    for config in sorted(folder.glob("*/config.json")):
        if read_json(config).get("model_type") == "qwen2_5_vl":
            return config.parent
    raise CheckpointError(f"no folder with Qwen2.5-VL-7B-Instruct in {folder}")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = foreign_json.parse(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold an object")
    return content
