"""`step1x-edit models`: see what can be pulled, pull it, find it, remove it.

Results on stdout, progress and questions on stderr; the exit codes are those of the other
commands. What speaks to the hub is imported when something is pulled.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from step1x_edit.checkpoints.catalog import CATALOG, Model, find_model
from step1x_edit.checkpoints.pulled import (
    Kept,
    find_pulled,
    kept_models,
    models_folder,
    remove_model,
)
from step1x_edit.errors import InvalidParameterError, SettingsError, Step1XEditError

if TYPE_CHECKING:
    from step1x_edit.checkpoints.fetch import PullProgress

FAILED, USAGE, INTERRUPTED = 1, 2, 130

models_app = typer.Typer(
    help="Fetch the published models, find and remove them.",
    no_args_is_help=True,
    add_completion=False,
)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Name = Annotated[
    str,
    typer.Argument(
        help=f"{', '.join(model.name for model in CATALOG)}, or an id of the hub (owner/name)",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON")]


@models_app.command()
def pull(name: Name) -> None:
    """Fetch a model; after a cut, the same command goes on from where it was.

    HF_ENDPOINT names a mirror to fetch from; HF_TOKEN is shown where a model wants one.
    """
    with _told_failures():
        models = _models()
        model = find_model(name)
        if model.note:
            err.print(f"Note: {model.note}", style="yellow", markup=False)
        from step1x_edit.checkpoints.fetch import pull as fetch

        try:
            with _bar(model.name) as show:
                folder = fetch(name, models, show)
        except KeyboardInterrupt:
            err.print("interrupted; what arrived is kept, and the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
        typer.echo(f"MODEL_PATH={shlex.quote(str(folder))}")


@models_app.command()
def where(name: Name) -> None:
    """Print the folder of a pulled model."""
    with _told_failures():
        typer.echo(find_pulled(name, _models()))


@models_app.command()
def rm(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")] = False,
) -> None:
    """Remove a pulled model, or what a pull has left of it."""
    with _told_failures():
        models = _models()
        model = find_model(name)
        sizes = [kept.size for kept in kept_models(models) if kept.name == model.name]
        if sizes and not yes:
            question = f"Remove {model.name} ({_gigabytes(sum(sizes))}) from {models}?"
            typer.confirm(question, abort=True, err=True)
        freed = remove_model(name, models)
        err.print(f"removed {model.name}, {_gigabytes(freed)}", markup=False)


@models_app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """Show what can be pulled and what is there."""
    with _told_failures():
        rows = _rows(_models())
        if as_json:
            typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))
            return
        for row in rows:
            size = row["bytes"] or row["published_bytes"]
            told = "" if size is None else _gigabytes(size)
            line = f"{row['name']:<16} {row['state']:<10} {told:>8}  {', '.join(row['repos'])}"
            note = f"  ({row['note']})" if row["note"] else ""
            typer.echo(line + note)


def _rows(models: Path) -> list[dict[str, Any]]:
    """What the catalog has, then what was pulled besides."""
    kept: dict[str, list[Kept | None]] = {}
    for item in kept_models(models):
        kept.setdefault(item.name, []).append(item)
    listed = {model.name: model for model in CATALOG}
    others = {name: find_model(name) for name in kept if name not in listed}
    return [
        _row(model, item)
        for model in [*listed.values(), *others.values()]
        for item in kept.get(model.name) or [None]
    ]


def _row(model: Model, kept: Kept | None) -> dict[str, Any]:
    return {
        "name": model.name,
        "state": kept.state if kept else "available",
        "path": str(kept.folder) if kept and kept.state == "pulled" else None,
        "bytes": kept.size if kept else None,
        "published_bytes": model.published_bytes,
        "repos": list(model.repos),
        "note": model.note,
    }


def _models() -> Path:
    from step1x_edit.settings import load_settings

    return models_folder(load_settings().data_dir)


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[PullProgress], None]]:
    """A bar of bytes on stderr."""
    with Progress(
        TextColumn("{task.fields[model]}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=err,
        transient=not err.is_terminal,
    ) as bar:
        task = bar.add_task("asking the hub", total=None, model=name)

        def show(progress: PullProgress) -> None:
            text = progress.text if progress.phase != "checking" else f"checking {progress.text}"
            bar.update(task, completed=progress.done, total=progress.total, description=text)

        yield show


@contextlib.contextmanager
def _told_failures() -> Iterator[None]:
    """Turn our errors into one sentence and an exit code."""
    try:
        yield
    except Step1XEditError as error:
        err.print(str(error), style="red", markup=False)
        is_usage = isinstance(error, InvalidParameterError | SettingsError)
        raise typer.Exit(USAGE if is_usage else FAILED) from None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
