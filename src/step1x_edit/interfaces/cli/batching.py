"""The command that edits many pictures and can be interrupted and run again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from step1x_edit.errors import InvalidParameterError
from step1x_edit.interfaces.cli.options import (
    ApiKey,
    AsJson,
    Standalone,
    Url,
    check_prompt,
    with_options_of,
)
from step1x_edit.interfaces.cli.terminal import (
    cli_settings,
    failures_on_stderr,
    of_several,
    print_batch,
    shown_progress,
)
from step1x_edit.schemas.requests import EditRequest, given, read_request
from step1x_edit.service.files import expanded

if TYPE_CHECKING:
    from step1x_edit.service.batches import Chosen, Item, Journal

_INTERRUPTED = "interrupted; finished results are kept, and the same command continues from there"


@with_options_of(EditRequest)
def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|MANIFEST",
            help="A folder with pictures, or a .csv or .jsonl file with the columns image and "
            "prompt and, if needed, output, mask and the parameters by name",
            show_default=False,
        ),
    ],
    *,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What to change, in plain words; required for a folder, and for lines of a "
            "manifest without a prompt",
            show_default=False,
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results and their journal, created if missing "
            "(default: <name>_edited next to the folder or manifest)",
            show_default=False,
        ),
    ] = None,
    asked: dict[str, Any],
    url: Url = None,
    api_key: ApiKey = None,
    standalone: Standalone = False,
    as_json: AsJson = False,
) -> None:
    """Edit a folder or a list of pictures; a second run edits only what is missing.

    A result is missing if it does not exist, or if its picture, prompt or
    parameters have changed. If a picture fails, the others are still edited,
    and the exit code is 1.
    """
    with failures_on_stderr(as_json, _INTERRUPTED):
        from step1x_edit.interfaces.cli.editors import opened_edits
        from step1x_edit.service.batches import Batch, Chosen, Journal

        if prompt is not None:
            check_prompt(prompt)
        overwrite, mask = asked.pop("overwrite", False), asked.pop("mask_path", None)
        chosen = read_request(Chosen, given({"prompt": prompt, "mask": mask, **asked}))
        settings = cli_settings()
        source = _absolute(source)
        folder = _absolute(output_dir or source.parent / f"{source.stem}_edited")
        journal = Journal(folder)
        items = _items(source, chosen, journal)
        with opened_edits(settings, url, api_key, standalone) as edits:
            work = Batch(edits, journal, folder, overwrite=overwrite)
            with shown_progress() as progress_of:
                reports = of_several(progress_of, [item.name for item in items])
                answer = asyncio.run(work.run(items, reports))
        print_batch(answer, as_json)


def _items(source: Path, chosen: Chosen, journal: Journal) -> list[Item]:
    from step1x_edit.service.batches import items_of_folder, items_of_manifest

    if not source.is_dir():
        return items_of_manifest(source, chosen)
    if not chosen.prompt:
        raise InvalidParameterError("--prompt is missing; it says what to change")
    return items_of_folder(source, chosen, journal.results)


def _absolute(path: Path) -> Path:
    return Path(expanded(str(path))).absolute()
