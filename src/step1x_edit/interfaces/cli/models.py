"""The commands about checkpoints: list, fetch, find, convert and remove them.

The code that talks to the hub is imported when a model is pulled.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import DownloadColumn, TransferSpeedColumn

from step1x_edit.channel import GIGA
from step1x_edit.checkpoints.converted import converted_files, remove_converted
from step1x_edit.engine import host_memory
from step1x_edit.errors import CheckpointError
from step1x_edit.hub.catalog import CATALOG, Model, find_model
from step1x_edit.hub.pulled import (
    Kept,
    find_pulled,
    kept_models,
    models_folder,
    remove_model,
    resolve_model_path,
)
from step1x_edit.interfaces.cli.options import AsJson
from step1x_edit.interfaces.cli.progress import display
from step1x_edit.interfaces.cli.terminal import (
    cli_settings,
    err,
    failures_on_stderr,
    out,
    print_json,
    print_line,
)
from step1x_edit.interfaces.cli.usage import HELP_NAMES, Command

if TYPE_CHECKING:
    from step1x_edit.engine.machine import Survey
    from step1x_edit.hub.fetch import PullProgress
    from step1x_edit.settings import Settings

_EMBEDDED: Final = "demo"
_REAL: Final = "v1.1"
# docs/models.md: the core in nf4 with a GPU; in int8, or exact from a fast disk, without one.
_HOST_GB_BESIDE_A_GPU: Final = 10
_HOST_GB_WITHOUT_A_GPU: Final = 16

models_app = typer.Typer(
    help="List, fetch, find and remove checkpoints.",
    context_settings=HELP_NAMES,
    no_args_is_help=True,
)

# The authors' figure for their own code in bfloat16 at 1024 px on an H800, without offloading.
_PUBLISHED_MEMORY: Final = "49.8 GB of GPU memory, as published"


class CodePrecision(str, Enum):
    """The precisions that have codes."""

    INT8 = "int8"
    FP8 = "fp8"
    NF4 = "nf4"


Name = Annotated[
    str,
    typer.Argument(
        help=f"{', '.join(model.name for model in CATALOG)}, or an id of the hub (owner/name)",
        show_default=False,
    ),
]


@models_app.command("list", cls=Command)
def list_models(as_json: AsJson = False) -> None:
    """List the checkpoints: the built-in one, that of MODEL_PATH, and the published ones.

    * marks the one that an edit would use. `pull` fetches the others.
    """
    from step1x_edit.service.kept_survey import current_survey

    with failures_on_stderr(as_json):
        settings = cli_settings()
        seen = current_survey(settings)
        found = _found(settings, seen)
        recommended, reason = recommendation(seen.device, host_memory.measure())
        if as_json:
            print_json({"status": "success", "models": found, "recommended": recommended})
            return
        for model in found:
            mark = "*" if model["runs"] else " "
            out.print(f"{mark} {model['name']:<18}{_needs(model)}", markup=False)
            out.print(f"{'':<20}{model['place']}", markup=False)
            for codes in model.get("converted", ()):
                unused = f", not used: {codes['problem']}" if codes["problem"] else ""
                text = f"{codes['precision']} codes, {_gigabytes(codes['disk_gb'] * GIGA)}"
                out.print(f"{'':<20}{text} in {codes['file']}{unused}", markup=False)
            if "error" in model:
                out.print(f"{'':<20}does not run: {model['error']}", markup=False)
        out.print(f"Recommended for this machine: {recommended} ({reason})", markup=False)


@models_app.command(cls=Command)
def pull(name: Name) -> None:
    """Fetch a model; after an interruption the same command continues.

    HF_ENDPOINT sets a mirror to fetch from; HF_TOKEN is sent if a model requires it.
    """
    with failures_on_stderr(False, "interrupted; run the same command again to continue"):
        models = models_folder(cli_settings().data_dir)
        model = find_model(name)
        if model.note:
            err.print(f"Note: {model.note}", style="yellow", markup=False)
        from step1x_edit.hub.fetch import pull as fetch

        with _bar(model.name) as show:
            folder = fetch(name, models, show)
        print_line(f"MODEL_PATH={shlex.quote(str(folder))}")


@models_app.command(cls=Command)
def where(name: Name) -> None:
    """Print the folder of a pulled model."""
    with failures_on_stderr(False):
        print_line(find_pulled(name, models_folder(cli_settings().data_dir)))


@models_app.command(cls=Command)
def convert(
    model: Annotated[
        str, typer.Argument(help="demo, a model that was pulled, or its folder", metavar="MODEL")
    ],
    precision: Annotated[CodePrecision, typer.Option(help="The codes", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, exists=True, help="Write to this folder instead of DATA_DIR/converted"
        ),
    ] = None,
) -> None:
    """Round a model once, so that later starts need not.

    The codes are written into a file that starts with this PRECISION, or auto,
    find; the model is still needed. If it changes, convert it again.
    """
    with failures_on_stderr(False, "interrupted; nothing is left"):
        from step1x_edit.engine.conversion import convert as write
        from step1x_edit.engine.worker_process import start_of

        settings = cli_settings()
        path = None if model == _EMBEDDED else Path(model)
        chosen = settings.model_copy(update={"model_path": path})
        start = replace(start_of(chosen), precision=precision.value, loras={})
        with display(err, DownloadColumn(), TransferSpeedColumn()) as shown:
            shown.begin(model, "opening")

            def show(done: int, total: int) -> None:
                shown.show("rounding", f"rounding to {precision.value}", done, total)

            file = write(start, output, show)
        err.print(f"{_gigabytes(file.stat().st_size)} of codes; remove the file to undo this")
        print_line(file)


@models_app.command(cls=Command)
def rm(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")] = False,
) -> None:
    """Remove a pulled model and its codes, or the files of an unfinished pull."""
    with failures_on_stderr(False):
        models = models_folder(cli_settings().data_dir)
        model = find_model(name)
        data_dir, folder = cli_settings().data_dir, models / model.folder_name
        sizes = [kept.size for kept in kept_models(models) if kept.name == model.name]
        sizes += [found.size for found in converted_files(data_dir, folder)]
        if sizes and not yes:
            question = f"Remove {model.name} ({_gigabytes(sum(sizes))}) from {models}?"
            typer.confirm(question, abort=True, err=True)
        freed = remove_model(name, models) + remove_converted(data_dir, folder)
        err.print(f"removed {model.name}, {_gigabytes(freed)}", markup=False)


def recommendation(device: str | None, memory: host_memory.HostMemory | None) -> tuple[str, str]:
    """The checkpoint that suits a machine, and why."""
    has_gpu = device is not None and device.startswith("cuda")
    needed = _HOST_GB_BESIDE_A_GPU if has_gpu else _HOST_GB_WITHOUT_A_GPU
    if memory is None:
        return _EMBEDDED, "this system does not report its memory"
    place = "with a GPU" if has_gpu else "without a GPU"
    needs = f"needs {needed} GB of memory {place}; this machine has {memory.total / GIGA:.0f} GB"
    if memory.total < needed * GIGA:
        return _EMBEDDED, f"{_REAL} {needs}"
    slowly = "" if has_gpu else "; edits are slow without a GPU"
    return _REAL, f"it {needs}{slowly}"


def _found(settings: Settings, seen: Survey) -> list[dict[str, Any]]:
    """Each checkpoint, as in the JSON answer."""
    path = settings.model_path
    with contextlib.suppress(CheckpointError):  # reported below in the worker's words
        path = resolve_model_path(path, settings.data_dir)
    problem = seen.torch_error or seen.checkpoint_error
    of_chosen = {
        "memory": "" if seen.weights_gb is None else f"{seen.weights_gb:.2f} GB for its weights",
        "runs": problem is None,
        **({} if problem is None else {"error": problem}),
    }
    embedded = Path(str(files("step1x_edit"))) / "model" / "demo"
    found = [
        {
            "name": _EMBEDDED,
            "place": str(embedded),
            "disk_gb": _size_gb(embedded),
            **(of_chosen if path is None else {"memory": "", "runs": False}),
            **_codes(settings, embedded),
        }
    ]
    if path is not None:
        name = seen.checkpoint or "MODEL_PATH"
        of_chosen |= _codes(settings, path)
        found.append({"name": name, "place": str(path), "disk_gb": _size_gb(path), **of_chosen})
    kept = {item.name: item for item in kept_models(models_folder(settings.data_dir))}
    others = [find_model(name) for name in kept if name not in {m.name for m in CATALOG}]
    for model in (*CATALOG, *others):
        here = kept.get(model.name)
        codes = {} if here is None else _codes(settings, here.folder)
        found.append(_published(model, here) | codes)
    return found


def _codes(settings: Settings, model: Path) -> dict[str, Any]:
    """The files that `convert` has written for a model."""
    files = converted_files(settings.data_dir, model)
    if not files:
        return {}
    return {
        "converted": [
            {
                "precision": found.precision,
                "file": str(found.file.resolve()),
                "disk_gb": round(found.size / GIGA, 3),
                "problem": found.problem,
            }
            for found in files
        ]
    }


def _published(model: Model, kept: Kept | None) -> dict[str, Any]:
    """A model of the hub, and how much of it is on this disk."""
    size = model.published_bytes if kept is None else kept.size
    return {
        "name": model.name,
        "place": str(kept.folder) if kept else " + ".join(model.repos),
        "state": kept.state if kept else "available",
        "disk_gb": None if size is None else round(size / GIGA, 1),
        "memory": _PUBLISHED_MEMORY if model in CATALOG else "",
        "note": model.note,
        "runs": False,
    }


def _size_gb(path: Path) -> float:
    """Size on disk of a file, or of all files below a folder."""
    inside = [path] if path.is_file() else path.rglob("*")
    return round(sum(file.stat().st_size for file in inside if file.is_file()) / GIGA, 3)


def _needs(model: Mapping[str, Any]) -> str:
    size = model["disk_gb"]
    disk = "" if size is None else _gigabytes(size * GIGA) + " on disk"
    return ", ".join(
        filter(None, (model.get("state", ""), disk, model["memory"], model.get("note", "")))
    )


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[PullProgress], None]]:
    """Show on stderr how many bytes have been downloaded."""
    with display(err, DownloadColumn(), TransferSpeedColumn()) as shown:
        shown.begin(name, "asking the hub")

        def show(progress: PullProgress) -> None:
            text = progress.text if progress.phase != "checking" else f"checking {progress.text}"
            if not err.is_terminal:  # no column for it
                done, total = _gigabytes(progress.done), _gigabytes(progress.total)
                text = f"{text}, {done} of {total}"
            shown.show("arriving", text, progress.done, progress.total)

        yield show


def _gigabytes(count: float) -> str:
    return f"{count / GIGA:.1f} GB" if count >= GIGA else f"{count / 10**6:.0f} MB"
