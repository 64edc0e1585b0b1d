"""The commands about checkpoints: which there are, where they lie, and which would run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from step1x_edit.interfaces.cli.options import AsJson
from step1x_edit.interfaces.cli.terminal import (
    cli_settings,
    out,
    print_json,
    told_failures,
)

if TYPE_CHECKING:
    from step1x_edit.settings import Settings

_GIGA: Final = 10**9

models_app = typer.Typer(help="See which checkpoints there are.", no_args_is_help=True)

# The lists of files of the repositories, in GB as they count (1e9 bytes): transformer, autoencoder
# and, where it belongs to the repository, Qwen2.5-VL-7B-Instruct. The memory is what the authors
# publish for their own code in bfloat16 at 1024 px on an H800, without offloading.
_VLM_GB: Final = 16.6
_PUBLISHED_MEMORY: Final = "49.8 GB of GPU memory, as published"
OFFICIAL: Final = (
    ("v1.0", "stepfun-ai/Step1X-Edit: step1x-edit-i1258.safetensors", 24.9 + 0.3 + _VLM_GB),
    ("v1.1", "stepfun-ai/Step1X-Edit: step1x-edit-v1p1-official.safetensors", 24.9 + 0.3 + _VLM_GB),
    ("v1.1", "stepfun-ai/Step1X-Edit-v1p1-diffusers", 41.8),
)


@models_app.callback()
def models() -> None:
    """See which checkpoints there are."""


@models_app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the checkpoints: the embedded one, that of MODEL_PATH, and the published ones.

    The one that an edit would run is marked with *. The published ones are not
    downloaded: put the files into a folder and set MODEL_PATH to it. Those of
    stepfun-ai/Step1X-Edit need vae.safetensors from there and the folder
    Qwen2.5-VL-7B-Instruct beside them.
    """
    with told_failures(as_json):
        found = _found(cli_settings())
        if as_json:
            print_json({"status": "success", "models": found})
            return
        for model in found:
            mark = "*" if model["runs"] else " "
            out.print(f"{mark} {model['name']:<18}{_needs(model)}", markup=False)
            out.print(f"{'':<20}{model['place']}", markup=False)
            if "error" in model:
                out.print(f"{'':<20}does not run: {model['error']}", markup=False)


def _found(settings: Settings) -> list[dict[str, Any]]:
    """Each checkpoint, as JSON tells it."""
    from step1x_edit.machine import look
    from step1x_edit.service import start_of

    path = settings.model_path
    seen = look(replace(start_of(settings), device="cpu"))  # of the one that would run
    problem = seen.torch_error or seen.checkpoint_error
    of_chosen = {
        "memory": "" if seen.weights_gb is None else f"{seen.weights_gb:.2f} GiB for its weights",
        "runs": problem is None,
        **({} if problem is None else {"error": problem}),
    }
    embedded = Path(str(files("step1x_edit"))) / "model" / "demo"
    found = [
        {
            "name": "demo",
            "place": str(embedded),
            "disk_gb": _size_gb(embedded),
            **(of_chosen if path is None else {"memory": "", "runs": False}),
        }
    ]
    if path is not None:
        name = seen.checkpoint or "MODEL_PATH"
        found.append({"name": name, "place": str(path), "disk_gb": _size_gb(path), **of_chosen})
    for version, place, size in OFFICIAL:
        found.append(
            {
                "name": f"Step1X-Edit {version}",
                "place": place,
                "disk_gb": round(size, 1),
                "memory": _PUBLISHED_MEMORY,
                "runs": False,
            }
        )
    return found


def _size_gb(path: Path) -> float:
    """Size on disk of a file, or of all files below a folder."""
    inside = [path] if path.is_file() else path.rglob("*")
    return round(sum(file.stat().st_size for file in inside if file.is_file()) / _GIGA, 3)


def _needs(model: Mapping[str, Any]) -> str:
    size = model["disk_gb"]
    disk = f"{size:.1f} GB" if size >= 1 else f"{size * 1000:.0f} MB"
    return ", ".join(filter(None, (f"{disk} on disk", model["memory"])))
