"""Files of codes that `models convert` has written: where they are, and whether they can be used.

There is one for each model, version and precision in `DATA_DIR/converted`, or a link to it there.
Such a file does not replace the model, from which all other weights are read, and those that a LoRA
changes: it is used as long as the model's files are as they were when it was written. Nothing here
needs torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from step1x_edit import foreign_json

FORMAT: Final = "1"
"""Of the files; another one if the codes or their meaning change."""
PARTIAL: Final = ".partial"
"""At the end of the name while a file is written."""

_SUFFIX: Final = ".safetensors"
_HEADER_LIMIT: Final = 16_000_000


class UnusableError(Exception):
    """A file cannot be used; says which, and why."""


class Stamp(NamedTuple):
    """A file of a model, and its state."""

    path: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself."""

    sources: frozenset[Stamp]
    """The files of the model whose matrices were rounded."""
    checksums: Mapping[str, int]
    """CRC-32 of the codes and scales of each matrix, by its name."""

    def metadata(self, precision: str) -> dict[str, str]:
        """The same as the metadata of a safetensors file, which has texts only."""
        return {
            "format": "step1x-edit codes",
            "format_version": FORMAT,
            "precision": precision,
            "sources": json.dumps(sorted(self.sources)),
            "checksums": json.dumps({name: f"{each:08x}" for name, each in self.checksums.items()}),
        }


@dataclass(frozen=True)
class Converted:
    """A file of a model."""

    file: Path
    precision: str
    size: int
    problem: str | None
    """Why it is not used."""


def converted_folder(data_dir: Path) -> Path:
    """The folder in which files are looked for."""
    return data_dir / "converted"


def file_name(model: Path, version: str, precision: str) -> str:
    """The name of the file of a model, given its folder or file."""
    return f"{version}-{precision}-{_digest(model)}{_SUFFIX}"


def converted_files(data_dir: Path, model: Path) -> list[Converted]:
    """All files of a model, also those that are not used."""
    found = sorted(converted_folder(data_dir).glob(f"*-{_digest(model)}{_SUFFIX}"))
    return [_described(file) for file in found]


def remove_converted(data_dir: Path, model: Path) -> int:
    """Delete all files of a model, and return the freed bytes."""
    freed = 0
    for found in converted_files(data_dir, model):
        found.file.resolve().unlink(missing_ok=True)  # it may be a link
        found.file.unlink(missing_ok=True)
        freed += found.size
    return freed


def read_header(file: Path) -> Header:
    """Raises UnusableError if the file cannot be used, whatever its model is."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(0)
            length = int.from_bytes(opened.read(8), "little")
            entries = foreign_json.parse(opened.read(min(length, _HEADER_LIMIT)))
        metadata = entries.pop("__metadata__")
        if metadata["format_version"] != FORMAT:
            raise UnusableError(f"{file.name} was written by another version of this program")
        if size != 8 + length + max(each["data_offsets"][1] for each in entries.values()):
            raise ValueError("its size is not what its header says")
        sources = foreign_json.parse(metadata["sources"].encode())
        checksums = foreign_json.parse(metadata["checksums"].encode())
        return Header(
            frozenset(Stamp(*each) for each in sources),
            {name: int(each, 16) for name, each in checksums.items()},
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UnusableError(f"{file.name} is damaged") from None


def check_sources(file: Path, header: Header, sources: Iterable[Stamp]) -> None:
    """Raises UnusableError unless the file was made from exactly these."""
    if header.sources != frozenset(sources):
        raise UnusableError(f"{file.name} was made from other files than the model has now")


def stamp(path: Path) -> Stamp:
    """The state of a file now. Raises OSError."""
    found = path.stat()
    return Stamp(str(path.resolve()), found.st_size, found.st_mtime_ns)


def _described(file: Path) -> Converted:
    precision = file.name.split("-")[-2]
    problem, size = None, 0
    with contextlib.suppress(OSError):  # a link to nothing
        size = file.stat().st_size
    try:
        header = read_header(file)
        check_sources(file, header, _now(header.sources))
    except UnusableError as error:
        problem = str(error)
    return Converted(file, precision, size, problem)


def _now(stamps: Iterable[Stamp]) -> Iterator[Stamp]:
    """The state of the same files now, without those that are gone."""
    for each in stamps:
        with contextlib.suppress(OSError):
            yield stamp(Path(each.path))


def _digest(model: Path) -> str:
    return hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:12]
