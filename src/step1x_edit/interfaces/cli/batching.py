"""The command for many pictures, which can be stopped at any time and run again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from step1x_edit.errors import InvalidParameterError
from step1x_edit.files import FileAccess
from step1x_edit.interfaces.cli.options import (
    ApiKey,
    AsJson,
    Standalone,
    Url,
    check_prompt,
    with_options_of,
)
from step1x_edit.interfaces.cli.terminal import (
    FAILED,
    cli_settings,
    err,
    print_json,
    print_line,
    print_results,
    shown_progress,
    told_failures,
)
from step1x_edit.schemas import BatchAnswer, EditAnswer, EditRequest, PictureRequest, read_request

_INTERRUPTED = "interrupted; what is finished stays, and the same command goes on from there"


@with_options_of(EditRequest)
def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|MANIFEST",
            help="A folder with pictures, or a file .csv or .jsonl with the columns image and "
            "prompt, and as wanted output, mask and the parameters by their names",
            show_default=False,
        ),
    ],
    *,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What to change, in plain words; needed for a folder, and in a manifest for "
            "lines without one",
            show_default=False,
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results and their journal, created if missing "
            "(default: <name>_edited beside the folder or manifest)",
            show_default=False,
        ),
    ] = None,
    asked: dict[str, Any],
    url: Url = None,
    api_key: ApiKey = None,
    standalone: Standalone = False,
    as_json: AsJson = False,
) -> None:
    """Edit a folder or a list of pictures; run again, it does only what is missing.

    A result is missing if it is not there, or if its picture, prompt or
    parameters have changed. The exit code is 1 if a picture failed; the others
    are edited all the same.
    """
    with told_failures(as_json, _INTERRUPTED):
        from step1x_edit.interfaces import batches
        from step1x_edit.interfaces.editor import given, opened_editor

        chosen = {"prompt": prompt, **asked}
        mask, overwrite = chosen.pop("mask_path", None), chosen.pop("overwrite", False)
        if prompt is not None:
            check_prompt(prompt)
        read_request(PictureRequest, given({**chosen, "prompt": prompt or ""}))
        chosen["mask"] = mask
        settings = cli_settings()
        source = source.expanduser().absolute()
        folder = source.parent / f"{source.stem}_edited" if output_dir is None else output_dir
        folder = folder.expanduser().absolute()
        journal = batches.Journal(folder)
        if source.is_dir():
            if prompt is None:
                raise InvalidParameterError("--prompt is missing; it says what to change")
            items = batches.items_of_folder(source, chosen, journal.results)
        else:
            items = batches.items_of_manifest(source, chosen)
        files = FileAccess(settings.allowed_dirs, settings.max_bytes)
        with opened_editor(settings, url, api_key, standalone) as editor:
            work = batches.Batch(editor, files, journal, folder, overwrite=overwrite)
            with shown_progress() as progress_of:
                answer = asyncio.run(
                    work.run(
                        items,
                        lambda index, item: progress_of(f"{index + 1}/{len(items)} {item.name}"),
                    )
                )
        _tell(answer, as_json, batches.KEPT)


def _tell(answer: BatchAnswer, as_json: bool, kept: str) -> None:
    if as_json:
        print_json(answer.to_dict())
    else:
        results = [(item.input, item.result) for item in answer.results]
        for _, result in results:
            if isinstance(result, EditAnswer):
                print_line(result.output_path)
        print_results(results, kept)
        count = sum(isinstance(r, EditAnswer) and r.message == kept for _, r in results)
        from_before = f"; {count} of them from an earlier run" if count else ""
        err.print(answer.message + from_before, markup=False)
    if answer.status != "success":
        raise typer.Exit(FAILED)
