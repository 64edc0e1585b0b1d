"""The pairs of a training: read from any of three forms and checked before anything is loaded.

    a folder    targets, each with its instruction in a .txt file, and a folder of sources
    a .json     {target: {"ref_image_path": source, "caption": instruction}}, the authors' form
    a .jsonl    a manifest as of `step1x-edit batch`, with `target` or `"keep": true` in each line

Every fault is found in one go, each with its file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from step1x_edit import foreign_json
from step1x_edit.errors import InvalidParameterError, Step1XEditError
from step1x_edit.pictures.images import decode
from step1x_edit.schemas.requests import ImagePath, given, read_request
from step1x_edit.schemas.training import Pair
from step1x_edit.service.batches import PICTURES, Row, rows_of
from step1x_edit.service.files import FileAccess, expanded
from step1x_edit.settings import Limits

LARGEST_STRETCH: Final = 0.02
"""How far the proportions of a target may be from those of its source."""


class _PairRow(Row):
    """The fields of a manifest line; those that only an edit needs are ignored."""

    target: ImagePath | None = None
    keep: bool = False


@dataclass
class Pairs:
    """What was found in the data, and what is wrong with it."""

    pairs: list[Pair] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read_pairs(data: Path, sources: Path | None, files: FileAccess, limits: Limits) -> Pairs:
    """All pairs and all faults. Raises InvalidParameterError for data in none of the forms."""
    found = Pairs()
    if data.is_dir():
        if sources is None:
            raise InvalidParameterError(
                f"{data} is a folder of targets; --sources names the folder of their sources"
            )
        entries = _folder(data, sources, found)
    elif sources is not None:
        raise InvalidParameterError("--sources is for a folder of targets only")
    elif data.suffix.lower() == ".json":
        entries = _official(data, found)
    else:
        entries = _manifest(data, found)
    for place, pair in entries:
        before = len(found.faults)
        _check(place, pair, found, files, limits)
        if len(found.faults) == before:
            found.pairs.append(pair)
    if not found.pairs and not found.faults:
        found.faults.append(f"{data}: there are no pairs")
    return found


def _folder(targets: Path, sources: Path, found: Pairs) -> Iterator[tuple[str, Pair]]:
    originals: dict[str, Path] = {}
    for path in _pictures(sources):
        if path.stem in originals:
            found.faults.append(f"{path}: {originals[path.stem].name} has the same name")
        originals.setdefault(path.stem, path)
    for target in _pictures(targets):
        words = target.with_suffix(".txt")
        try:
            prompt = words.read_text("utf-8-sig").strip()
        except (OSError, UnicodeError):
            found.faults.append(f"{words}: there is no instruction in UTF-8 for {target.name}")
            continue
        source = originals.get(target.stem)
        if source is None:
            found.faults.append(f"{target}: {sources} has no picture {target.stem}")
            continue
        yield f"{words}:1", Pair(target.name, str(source), prompt, str(target))


def _pictures(folder: Path) -> list[Path]:
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise InvalidParameterError(f"{folder} cannot be read ({error.strerror})") from None
    return [each for each in found if each.suffix.lower() in PICTURES and each.name[0] != "."]


def _official(path: Path, found: Pairs) -> Iterator[tuple[str, Pair]]:
    try:
        text = path.read_text("utf-8-sig")
        data: Any = foreign_json.parse(text)
    except json.JSONDecodeError as error:
        found.faults.append(f"{path}:{error.lineno}: it is not JSON: {error.msg}")
        return
    except (OSError, ValueError) as error:
        raise InvalidParameterError(f"{path} cannot be read ({error})") from None
    if not isinstance(data, dict):
        found.faults.append(f"{path}:1: it is not an object with a target for each key")
        return
    for target, entry in data.items():
        place = f"{path}:{_line_of(target, text)}"
        source, caption = _fields(entry)
        if not isinstance(source, str) or not isinstance(caption, str):
            found.faults.append(f"{place}: {target} needs the texts ref_image_path and caption")
            continue
        files = (str(path.parent / expanded(each)) for each in (source, target))
        yield place, Pair(Path(target).name, next(files), caption, next(files))


def _fields(entry: object) -> tuple[object, object]:
    if not isinstance(entry, Mapping):
        return None, None
    return entry.get("ref_image_path"), entry.get("caption")


def _line_of(key: str, text: str) -> int:
    """The line where a key is written, whatever its characters are written as."""
    spelled = (json.dumps(key, ensure_ascii=ascii_only) for ascii_only in (True, False))
    place = max(text.find(each) for each in spelled)
    return text.count("\n", 0, max(0, place)) + 1


def _manifest(path: Path, found: Pairs) -> Iterator[tuple[str, Pair]]:
    for line, values in rows_of(path):
        place = f"{path}:{line}"
        try:
            if isinstance(values, str):
                raise InvalidParameterError(values)
            row = read_request(_PairRow, given(values))
            if (row.target is None) != row.keep:
                raise InvalidParameterError(
                    'target is missing; "keep": true keeps the edit as it is'
                    if row.target is None
                    else "it has a target and keep; one of them is enough"
                )
        except InvalidParameterError as error:
            found.faults.append(f"{place}: {str(error).removeprefix(f'{error.beginning}: ')}")
            continue
        source = path.parent / expanded(row.image)
        target = None if row.target is None else path.parent / expanded(row.target)
        name = f"{line:04}-{(target or source).name}"
        yield place, Pair(name, str(source), row.prompt, None if target is None else str(target))


def _check(place: str, pair: Pair, found: Pairs, files: FileAccess, limits: Limits) -> None:
    """Add what is wrong with the instruction and the pictures of a pair."""
    if pair.target is not None and not pair.prompt.strip():
        found.faults.append(f"{place}: the instruction is empty")
    shapes = []
    for path in filter(None, (pair.source, pair.target)):
        try:
            picture = decode(files.read(path).data, limits)
        except Step1XEditError as error:
            found.faults.append(f"{place}: {path}: {error}")
            continue
        shapes.append((picture.width, picture.height))
    if len(shapes) == 2:
        (width, height), (other_width, other_height) = shapes
        if abs(width * other_height / (height * other_width) - 1) > LARGEST_STRETCH:
            found.faults.append(
                f"{place}: the target is {other_width} x {other_height} and the source "
                f"{width} x {height}: crop one of them to the proportions of the other"
            )
