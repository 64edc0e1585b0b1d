"""Batches that can be killed and run again: only missing results are made.

The items of a batch come from a folder or a manifest. The path of each result follows from them
alone and is the same in every run. A journal beside the results records by digest what each result
was made from and what it contains. A result is done if its file exists, is the one that was made,
and was made from the same picture and request. Files of other origin are never replaced unless
overwriting was requested.

The journal line is written before the result is published. So even after a kill every published
result is recorded; a line without a result only means that the result is made again.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TextIO

from pydantic import ValidationError

from step1x_edit import foreign_json
from step1x_edit.errors import (
    ImageFileNotFoundError,
    InvalidParameterError,
    OutputExistsError,
    OutputNotWritableError,
)
from step1x_edit.pictures.output_formats import OUTPUT_FORMATS
from step1x_edit.schemas.answers import KEPT, BatchAnswer, EditAnswer
from step1x_edit.schemas.requests import (
    EditRequest,
    ImagePath,
    MaskPath,
    OutputPath,
    PictureRequest,
    Prompt,
    given,
    given_in,
    read_request,
)
from step1x_edit.service.editor import EditedFile
from step1x_edit.service.file_edits import FileEdits, Inputs, Opened, ReporterOf
from step1x_edit.service.files import FileIdentity, expanded

JOURNAL_NAME: Final = ".step1x-edit-batch.jsonl"
PICTURES: Final = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif", ".heic", ".heif"}
)
"""The suffixes of the pictures in a folder.

HEIC is included even if its decoder is not installed: an error message is better than silence.
"""

_TABLES: Final = (".csv",)
_LINES: Final = (".jsonl", ".ndjson")
_SEPARATORS: Final = (";", "\t", ",")  # `;` in locales with a decimal comma
_BAD_ROWS_NAMED: Final = 3


@dataclass(frozen=True)
class Item:
    """One picture of a batch and the name that messages use for it."""

    name: str
    request: EditRequest
    """Its `output_path` is relative to the result folder. None: `<stem>_edited<suffix>`, numbered
    within the batch."""


class Chosen(PictureRequest):
    """The defaults for pictures whose manifest line sets nothing else."""

    prompt: Prompt = ""
    mask: MaskPath = None


class Row(PictureRequest):
    """The fields of a manifest line."""

    image: ImagePath
    output: OutputPath = None
    mask: MaskPath = None


# --- the items of a batch ------------------------------------------------------------------------


def items_of_folder(folder: Path, chosen: Chosen, apart_from: Iterable[Path] = ()) -> list[Item]:
    """The pictures directly in a folder, sorted by name; `apart_from` are results to leave out."""
    results = {path.absolute() for path in apart_from}
    try:
        found = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise InvalidParameterError(f"{folder} cannot be read ({error.strerror})") from None
    pictures = [
        path
        for path in found
        if path.suffix.lower() in PICTURES
        and not path.name.startswith(".")
        and path.absolute() not in results
    ]
    if not pictures:
        raise ImageFileNotFoundError(f"{folder} (there are no pictures in this folder)")
    return [Item(path.name, _request(chosen, str(path), chosen.mask)) for path in pictures]


def items_of_manifest(path: Path, chosen: Chosen) -> list[Item]:
    """The lines of a CSV or JSONL file; `chosen` fills in what a line leaves out.

    Input paths are relative to its folder, outputs to the result folder. Raises
    InvalidParameterError that names the invalid lines.
    """
    usual = chosen.model_dump(exclude_unset=True, exclude_none=True)
    items: list[Item] = []
    wrong: list[str] = []
    taken: dict[str, int] = {}
    for line, values in rows_of(path):
        try:
            items.append(_item(path.parent, line, values, usual))
        except InvalidParameterError as error:
            wrong.append(f"line {line}: {str(error).removeprefix(f'{error.beginning}: ')}")
            continue
        if (output := items[-1].request.output_path) is not None:
            if output in taken:
                wrong.append(f"line {line}: the output is that of line {taken[output]}")
            taken.setdefault(output, line)
    if wrong:
        more = len(wrong) - _BAD_ROWS_NAMED
        named = wrong[:_BAD_ROWS_NAMED] + ([f"and {more} more lines"] if more > 0 else [])
        raise InvalidParameterError(f"{path.name} {'; '.join(named)}")
    if not items:
        raise InvalidParameterError(f"{path.name} has no lines with pictures")
    return items


def _item(
    folder: Path, line: int, values: Mapping[str, object] | str, usual: Mapping[str, object]
) -> Item:
    if isinstance(values, str):
        raise InvalidParameterError(values)
    row = read_request(Row, {**usual, **given(values)})
    if not row.prompt.strip():
        raise InvalidParameterError("prompt is empty")
    if row.output is not None and Path(row.output).suffix.lower() not in OUTPUT_FORMATS:
        raise InvalidParameterError(
            f"output must end in {', '.join(OUTPUT_FORMATS)}, got {row.output!r}"
        )
    mask = row.mask
    if mask is not None and "mask" in given(values):  # otherwise it came from the command line
        mask = str(_below(folder, mask))
    request = _request(row, str(_below(folder, row.image)), mask, row.output)
    return Item(f"line {line}: {row.image}", request)


def _request(
    how: PictureRequest, image: str, mask: str | None, output: str | None = None
) -> EditRequest:
    files = {"image_path": image, "mask_path": mask, "output_path": output}
    return read_request(EditRequest, {**given_in(how, PictureRequest), **files})


def _below(folder: Path, path: str) -> Path:
    return folder / expanded(path)


def rows_of(path: Path) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    """Each line number with its values, or with the reason why the line is invalid."""
    kind = path.suffix.lower()
    if kind not in _TABLES + _LINES:
        raise InvalidParameterError(
            f"{path} must be a folder, or a manifest that ends in .csv or .jsonl"
        )
    try:
        with path.open(encoding=_encoding_of(path), newline="") as file:
            yield from _csv_rows(file) if kind in _TABLES else _json_rows(file)
    except UnicodeError:
        raise InvalidParameterError(
            f"{path} is not a text in UTF-8; save it as UTF-8 (in Excel: CSV UTF-8)"
        ) from None
    except OSError as error:
        raise InvalidParameterError(f"{path} cannot be read ({error.strerror})") from None


def _encoding_of(path: Path) -> str:
    """UTF-8, or the UTF-16 that spreadsheets write as "Unicode text"; the first bytes decide."""
    with path.open("rb") as file:
        first = file.read(2)
    if first in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    if b"\0" in first:  # half of an ASCII letter; every manifest begins with one
        return "utf-16-be" if first.startswith(b"\0") else "utf-16-le"
    return "utf-8-sig"


def _csv_rows(file: TextIO) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    columns = file.readline()
    separator = next((sign for sign in _SEPARATORS if sign in columns), ",")
    file.seek(0)
    reader = csv.DictReader(file, restval="", strict=True, delimiter=separator)
    try:
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        if "image" not in names:
            raise InvalidParameterError(
                f"the first line must name the columns, image among them, got {', '.join(names)}"
            )
        if twice := [name for name in names if names.count(name) > 1]:
            raise InvalidParameterError(f"the first line names {twice[0]!r} twice")
        reader.fieldnames = names
        line = reader.line_num + 1
        for row in reader:
            if None in row:
                yield line, "it has more cells than the first line"
            else:
                yield line, {name: cell for name, cell in row.items() if cell != ""}
            line = reader.line_num + 1
    except csv.Error as error:
        raise InvalidParameterError(f"line {reader.line_num} is not CSV: {error}") from None


def _json_rows(file: Iterable[str]) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            values = foreign_json.parse(text)
        except ValueError:
            yield line, "it is not JSON"
            continue
        yield line, values if isinstance(values, dict) else "it is not a JSON object"


# --- the journal ---------------------------------------------------------------------------------


class Journal:
    """The results made in a folder, one line for each; later lines take precedence."""

    def __init__(self, folder: Path) -> None:
        """Read the existing lines; lines truncated by a kill are ignored."""
        self._path = folder / JOURNAL_NAME
        self._entries: dict[str, list[_Entry]] = {}
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            text = ""
        except OSError as error:
            raise OutputNotWritableError(f"{self._path} ({error.strerror})") from None
        self._is_torn = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            self._remember(line)

    @property
    def results(self) -> list[Path]:
        """The paths of the results."""
        return [self._path.parent / name for name in self._entries]

    def made(self, output: Path, content: str) -> _Entry | None:
        """How the file with this content was made, if a batch made it here."""
        entries = self._entries.get(self._name(output), [])
        return next((entry for entry in reversed(entries) if entry.content == content), None)

    def note(self, output: Path, request: str, answer: EditAnswer, data: bytes) -> None:
        """Record, synced to disk, the result that is about to be published."""
        values = {
            "output": self._name(output),
            "request": request,
            "content": hashlib.sha256(data).hexdigest(),
            "answer": answer.to_dict(),
        }
        line = json.dumps(values, ensure_ascii=False)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n" if self._is_torn else f"{line}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputNotWritableError(f"{self._path} ({error.strerror})") from None
        self._is_torn = False
        self._remember(line)

    def _remember(self, line: str) -> None:
        try:
            values: dict[str, Any] = foreign_json.parse(line)
            answer = EditAnswer.model_validate(values["answer"])
            entry = _Entry(str(values["request"]), str(values["content"]), answer)
            self._entries.setdefault(str(values["output"]), []).append(entry)
        except (ValueError, KeyError, TypeError, ValidationError):
            return

    def _name(self, output: Path) -> str:
        """Relative to the journal where possible, so that the folder can be moved."""
        output = output.absolute()
        folder = self._path.parent.absolute()
        return str(output.relative_to(folder) if output.is_relative_to(folder) else output)


@dataclass(frozen=True)
class _Entry:
    request: str
    content: str
    answer: EditAnswer


# --- running the batch ---------------------------------------------------------------------------


class Batch:
    """Makes the missing results of some items."""

    def __init__(
        self,
        edits: FileEdits[EditedFile],
        journal: Journal,
        output_dir: Path,
        *,
        overwrite: bool = False,
    ) -> None:
        self._edits = edits
        self._journal = journal
        self._output_dir = output_dir
        self._overwrite = overwrite
        self._taken: set[str] = set()
        self._outputs: set[str] = set()

    async def run(self, items: Sequence[Item], report_of: ReporterOf) -> BatchAnswer:
        """Edit one after the other, as `FileEdits.edit_several` does.

        Cancelling the call cancels the edit; finished results stay, and the next run finds them.
        """
        names, requests = [item.name for item in items], [item.request for item in items]
        return await self._edits.edit_opened(names, requests, self._open, report_of)

    def _open(self, request: EditRequest, inputs: frozenset[FileIdentity]) -> Opened | EditAnswer:
        started = time.monotonic()
        path = self._path(request, inputs)
        read = self._edits.read(request)
        asked = _digest_of_request(read, request)
        existing = _digest_of_file(path)
        if existing is not None:
            made = self._journal.made(path, existing)
            if made is not None and made.request == asked:
                return made.answer.model_copy(update={"message": KEPT, "output_path": str(path)})
            if made is None and not self._overwrite:
                raise OutputExistsError(f"{path}, and this batch has not made it")
        output = self._edits.files.plan_output(
            str(path), inputs | read.identities, overwrite=existing is not None
        )
        return Opened(started, read, output, partial(self._journal.note, path, asked))

    def _path(self, request: EditRequest, inputs: frozenset[FileIdentity]) -> Path:
        """The path of the result: the same in every run, whether or not a file exists there.

        Whether it can be written is checked later: a finished result is kept either way.
        """
        if request.output_path is not None:
            named = str(_below(self._output_dir, request.output_path))
            output = self._edits.files.named_output(named)
        else:
            output = self._edits.files.default_output(
                request.image_path, inputs, output_dir=str(self._output_dir), taken=self._taken
            )
        if (name := output.shown.casefold()) in self._outputs:
            raise OutputExistsError(f"{output.shown} is the result of an earlier line")
        self._outputs.add(name)
        return Path(output.shown)


def _digest_of_request(inputs: Inputs, request: PictureRequest) -> str:
    asked = {
        "image": hashlib.sha256(inputs.image).hexdigest(),
        "mask": None if inputs.mask is None else hashlib.sha256(inputs.mask).hexdigest(),
        "arguments": given_in(request, PictureRequest),
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _digest_of_file(path: Path) -> str | None:
    """The digest of a file; None if there is no readable file."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()
