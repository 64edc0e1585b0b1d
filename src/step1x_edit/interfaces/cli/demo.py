"""The command that shows what the program does: edits of a photograph, without any download."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from step1x_edit.interfaces.cli.options import option
from step1x_edit.interfaces.cli.terminal import (
    as_typed,
    cli_settings,
    failures_on_stderr,
    out,
    shown_progress,
)
from step1x_edit.schemas.requests import PARAMETERS, EditRequest, given, read_request

if TYPE_CHECKING:
    from step1x_edit.service.editor import EditedFile
    from step1x_edit.service.file_edits import FileEdits

DEMO_PROMPTS = {
    "night": "change to night scene",
    "black-and-white": "turn it into a black and white photo",
    "winter": "make it look like winter",
    "purple": "give it a purple tint",
    "fog": "add thick fog",
}
DEMO_PHOTO = Path(__file__).parents[1] / "assets" / "coffee.jpg"
DEMO_FOLDER = "demo-output"
DEMO_SIZE_LEVEL, DEMO_SEED = 768, 0


def demo(
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the pictures, created if missing; pictures in it are not replaced "
            f"(default {DEMO_FOLDER}, with a number if taken)",
            show_default=False,
        ),
    ] = None,
    num_steps: Annotated[str | None, option(PARAMETERS["num_steps"])] = None,
    size_level: Annotated[str, option(PARAMETERS["size_level"], DEMO_SIZE_LEVEL)] = str(
        DEMO_SIZE_LEVEL
    ),
    seed: Annotated[str, option(PARAMETERS["seed"], DEMO_SEED)] = str(DEMO_SEED),
) -> None:
    """Edit a bundled photograph with the built-in demo checkpoint and print the result paths."""
    with failures_on_stderr(as_json=False):
        from step1x_edit.interfaces.cli.comparison import draw_comparison
        from step1x_edit.interfaces.cli.editors import opened_edits
        from step1x_edit.pictures.images import encode

        settings = cli_settings().model_copy(update={"model_path": None, "model_version": "auto"})
        folder = _free_folder(DEMO_FOLDER) if output_dir is None else output_dir
        names = ("before", *(f"after-{name}" for name in DEMO_PROMPTS), "side-by-side")
        with opened_edits(settings, url=None, api_key=None, standalone=True) as edits:
            # Check everything before writing the first picture.
            outputs = [edits.files.plan_output(str(folder / f"{name}.jpg"), ()) for name in names]
            first, *after, last = outputs
            asked = {"num_steps": num_steps, "size_level": size_level, "seed": seed}
            chosen = given({"image_path": first.shown, **asked})
            requests = [
                read_request(EditRequest, {**chosen, "prompt": prompt, "output_path": output.shown})
                for prompt, output in zip(DEMO_PROMPTS.values(), after, strict=True)
            ]
            before = edits.files.publish(first, DEMO_PHOTO.read_bytes())
            results = asyncio.run(_edited(edits, requests))
            sheet = encode(draw_comparison({"before": before, **results}), last.suffix)
            comparison = edits.files.publish(last, sheet)
        _print_demo(before, results, comparison)


async def _edited(edits: FileEdits[EditedFile], requests: Sequence[EditRequest]) -> dict[str, Path]:
    """The results by prompt."""
    results = {}
    with shown_progress() as progress_of:
        for request in requests:
            saved = await edits.edit(request, progress_of(request.prompt))
            results[request.prompt] = Path(saved.answer.output_path)
    return results


def _free_folder(name: str) -> Path:
    """The first of name, name_2, name_3 … that is an empty folder or does not exist."""
    paths = (Path(name if number == 1 else f"{name}_{number}") for number in count(1))
    return next(path for path in paths if not os.path.lexists(path) or _is_empty_folder(path))


def _is_empty_folder(path: Path) -> bool:
    try:
        return not path.is_symlink() and not any(path.iterdir())
    except OSError:  # a file, or another user's folder
        return False


def _print_demo(before: Path, results: Mapping[str, Path], comparison: Path) -> None:
    out.print(f"before        {before}", markup=False)
    for prompt, path in results.items():
        out.print(f"after         {path}   ({prompt})", markup=False)
    out.print(f"side by side  {comparison}", markup=False)
    out.print(
        f"""
Next steps:
  your own picture    {as_typed("step1x-edit")} edit photo.jpg "make it a night scene"
  a web page          {as_typed("step1x-edit")} serve
  an MCP client       let it start: {as_typed("step1x-edit")} mcp   (mcp_config.json is an example)
  published model     {as_typed("step1x-edit")} models pull v1.1   (41.8 GB; the built-in demo
                      checkpoint knows edits of the whole picture, but no objects)""",
        markup=False,
    )
