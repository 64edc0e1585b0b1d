"""The command line: progress on stderr, results on stdout, exit codes 0, 1, 2 (usage) and 130.

Flags are the parameter names of the operations with dashes; what they allow is said once, in
`schemas`. Commands import what they need when they run, so that `--help` is there at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from step1x_edit.errors import InvalidParameterError, SettingsError, Step1XEditError
from step1x_edit.interfaces.client_config import (
    ClientName,
    config_file,
    server_entry,
    write_entry,
)
from step1x_edit.interfaces.discovery import SERVER_NAME
from step1x_edit.schemas import PARAMETERS, EditAnswer, ErrorAnswer

if TYPE_CHECKING:
    from fastmcp.client.progress import ProgressHandler

    from step1x_edit.channel import Progress
    from step1x_edit.service import EditService, FinishedEdit
    from step1x_edit.settings import Settings

T = TypeVar("T")

FAILED, USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="step1x-edit",
    help="Edit pictures by saying what to change, on this machine, with the model Step1X-Edit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def _option(name: str, *flags: str, default: int | None = None) -> Any:
    """A flag for a parameter, described as the schema describes it; `default` is the command's."""
    parameter = PARAMETERS[name]
    notes = [parameter.range] if parameter.range and name != "seed" else []
    if default is not None:
        notes.append(f"default {default}")
    elif parameter.default not in (None, "", False):
        notes.append(f"default {parameter.default}, or DEFAULT_{name.upper()} where that is set")
    told = f" ({'; '.join(notes)})" if notes else ""
    return typer.Option(*flags, help=parameter.description + told, show_default=False)


def _argument(name: str) -> Any:
    return typer.Argument(help=PARAMETERS[name].description, show_default=False)


AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON")]


@app.command()
def edit(
    image: Annotated[str, _argument("image_path")],
    prompt: Annotated[str, _argument("prompt")],
    output: Annotated[str | None, _option("output_path")] = None,
    num_steps: Annotated[int | None, _option("num_steps")] = None,
    guidance_scale: Annotated[float | None, _option("guidance_scale")] = None,
    size_level: Annotated[int | None, _option("size_level")] = None,
    seed: Annotated[int | None, _option("seed")] = None,
    overwrite: Annotated[bool, _option("overwrite", "--overwrite")] = False,
    negative_prompt: Annotated[str | None, _option("negative_prompt")] = None,
    as_json: AsJson = False,
) -> None:
    """Edit one image as the prompt says and save the result as a new file."""
    arguments = {
        "image_path": image,
        "prompt": prompt,
        "output_path": output,
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "size_level": size_level,
        "seed": seed,
        "overwrite": overwrite,
        "negative_prompt": negative_prompt,
    }
    with _told_failures(as_json):
        with _service(_settings()) as service:
            answer = _edit(service, arguments).answer
        if as_json:
            _print_json(answer.to_dict())
        else:
            _print_edit(answer)


@app.command()
def status(as_json: AsJson = False) -> None:
    """Say where this command's own model is and what it occupies.

    Each command has a model of its own, Unloaded until it edits; a running MCP server tells about
    its model by get_gpu_status.
    """
    with _told_failures(as_json), _service(_settings()) as service:
        answer = service.status()
        if as_json:
            _print_json(answer.to_dict())
            return
        for name, value in answer.gpu_status.to_dict().items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {count}" for key, count in value.items())
            out.print(f"{name:<26} {value}", markup=False)


@app.command()
def serve(
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen at (default 127.0.0.1); one that other machines reach needs "
            "API_KEY",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port to listen at; 0: a free one (default 8000)", show_default=False),
    ] = None,
) -> None:
    """Serve REST, MCP over HTTP and their documentation, until a signal comes.

    Where to listen and what to open is also set by HOST, PORT, ENABLE_API, ENABLE_MCP and API_KEY.
    """
    with _told_failures(as_json=False):
        from step1x_edit.settings import load_server_settings

        settings = load_server_settings({"host": host, "port": port})
        from step1x_edit.interfaces import process, server

        process.log_to_stderr(settings)
        server.serve(settings)


mcp_app = typer.Typer(
    help="Serve the tools to an MCP client over stdin and stdout; or see the commands.",
    invoke_without_command=True,
)
app.add_typer(mcp_app, name="mcp")


@mcp_app.callback()
def mcp(
    context: typer.Context,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Do not join a server that runs on this machine")
    ] = False,
) -> None:
    """Serve the tools to an MCP client over stdin and stdout; or see the commands."""
    if context.invoked_subcommand is not None:
        return
    wire = os.dup(1)  # whatever is printed from here on must not reach the client
    os.dup2(2, 1)
    from step1x_edit.interfaces.stdio import serve

    serve(wire, standalone=standalone)


@mcp_app.command()
def call(
    tool: Annotated[str, typer.Argument(help="Name of the tool, such as edit_image")],
    arguments: Annotated[
        str, typer.Argument(metavar="JSON", help="Its arguments as a JSON object")
    ] = "{}",
) -> None:
    """Call a tool as an MCP client does, and print its answer."""
    with _told_failures(as_json=False):
        given = _json_object(arguments)
        from step1x_edit.interfaces.client import MCPClient

        async def called() -> dict[str, Any]:
            async with MCPClient() as client:
                with _call_bar(tool) as show:
                    return await client.call_tool(tool, given, on_progress=show)

        answer = asyncio.run(called())
        _print_json(answer)
        if answer.get("status") == "error":
            raise typer.Exit(FAILED)


@mcp_app.command()
def config(
    client: Annotated[ClientName, typer.Option(help="The program that is to start the server")],
    write: Annotated[
        bool,
        typer.Option("--write", help="Add it to the client's own file, which is backed up first"),
    ] = False,
) -> None:
    """Print the configuration by which an MCP client starts this server, or write it."""
    with _told_failures(as_json=False):
        file = config_file(client)
        entry = server_entry(_settings(), file)
        if not write:
            _print_json({file.key: {SERVER_NAME: entry}})
            err.print(f"belongs into {file.path}, or add --write", markup=False)
            return
        backup = write_entry(file, entry)
        typer.echo(file.path)
        if backup is not None:
            err.print(f"the file as it was: {backup}", markup=False)
        err.print("restart the client to have it read", markup=False)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        reason = f"it is no JSON: {error}"
    else:
        if isinstance(value, dict):
            return value
        reason = f"it is {text[:40]}"
    example = """'{"image_path": "photo.jpg", "prompt": "add a red hat"}'"""
    raise InvalidParameterError(f"the arguments must be a JSON object such as {example}; {reason}")


DEMO_PROMPTS = {
    "night": "change to night scene",
    "black-and-white": "turn it into a black and white photo",
    "winter": "make it look like winter",
    "purple": "give it a purple tint",
    "fog": "add thick fog",
}
DEMO_PHOTO = Path(__file__).parent / "assets" / "coffee.jpg"
DEMO_FOLDER = "demo-output"
DEMO_SIZE_LEVEL, DEMO_SEED = 768, 0


@app.command()
def demo(
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the pictures, created if missing; pictures in it are not replaced "
            f"(default {DEMO_FOLDER}, numbered when taken)",
            show_default=False,
        ),
    ] = None,
    num_steps: Annotated[int | None, _option("num_steps")] = None,
    size_level: Annotated[int, _option("size_level", default=DEMO_SIZE_LEVEL)] = DEMO_SIZE_LEVEL,
    seed: Annotated[int, _option("seed", default=DEMO_SEED)] = DEMO_SEED,
) -> None:
    """Edit a bundled photograph with the embedded demo checkpoint and show where it went."""
    with _told_failures(as_json=False):
        from step1x_edit.files import FileAccess
        from step1x_edit.interfaces.comparison import draw_comparison

        settings = _settings().model_copy(update={"model_path": None, "model_version": "auto"})
        files = FileAccess(settings.allowed_dirs, settings.max_bytes)
        folder = _free_folder(DEMO_FOLDER) if output_dir is None else output_dir
        names = ("before", *(f"after-{name}" for name in DEMO_PROMPTS), "side-by-side")
        # All are checked before the first is written.
        first, *_, last = [files.plan_output(str(folder / f"{name}.jpg"), ()) for name in names]
        chosen = {"num_steps": num_steps, "size_level": size_level, "seed": seed}
        results = {}
        with _service(settings) as service:
            service.read_edit({"image_path": DEMO_PHOTO, "prompt": "", **chosen})  # are they right?
            before = files.publish(first, DEMO_PHOTO.read_bytes())
            for name, prompt in DEMO_PROMPTS.items():
                arguments = {
                    "image_path": before,
                    "prompt": prompt,
                    "output_path": before.with_name(f"after-{name}.jpg"),
                    **chosen,
                }
                results[prompt] = Path(_edit(service, arguments, label=prompt).answer.output_path)
        comparison = files.publish(last, draw_comparison({"before": before, **results}))
        _print_demo(before, results, comparison)


def _free_folder(name: str) -> Path:
    """The first of name, name_2, name_3 … that is an empty folder or not there yet."""
    paths = (Path(name if number == 1 else f"{name}_{number}") for number in count(1))
    return next(path for path in paths if not os.path.lexists(path) or _is_empty_folder(path))


def _is_empty_folder(path: Path) -> bool:
    try:
        return not path.is_symlink() and not any(path.iterdir())
    except OSError:  # a file, or a folder that is not ours
        return False


def _print_demo(before: Path, results: Mapping[str, Path], comparison: Path) -> None:
    out.print(f"before        {before}", markup=False)
    for prompt, path in results.items():
        out.print(f"after         {path}   ({prompt})", markup=False)
    out.print(f"side by side  {comparison}", markup=False)
    out.print(
        f"""
Go on:
  your own picture    {_command("step1x-edit")} edit photo.jpg "make it a night scene"
  an MCP client       let it start: {_command("step1x-edit")} mcp   (mcp_config.json is an example)
  the real model      set MODEL_PATH to a folder with Step1X-Edit v1.0 or v1.1; the embedded
                      demo checkpoint knows edits of the whole picture, no objects""",
        markup=False,
    )


def _command(name: str) -> Path | str:
    """How to type a command that lies beside our interpreter, maybe not on the PATH."""
    path = Path(sys.executable).parent / name
    return path if path.exists() else name


# --- running an operation ------------------------------------------------------------------------


def _settings() -> Settings:
    from step1x_edit.settings import load_settings

    settings = load_settings()
    if logging.getLevelName(settings.log_level) < logging.WARNING:
        # Whoever looks at a bar needs no diary beside it, neither ours nor the worker's.
        settings = settings.model_copy(update={"log_level": "WARNING"})
    logging.basicConfig(
        level=settings.log_level,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_path=False)],
    )
    return settings


@contextlib.contextmanager
def _service(settings: Settings) -> Iterator[EditService]:
    from step1x_edit.service import build_service

    service = build_service(settings)
    try:
        yield service
    finally:
        service.close()


def _edit(
    service: EditService, arguments: Mapping[str, object], label: str = "edit"
) -> FinishedEdit:
    request = service.read_edit(arguments)
    with _progress_bar(label) as show:
        return asyncio.run(service.edit(request, show))


@contextlib.contextmanager
def _progress_bar(label: str) -> Iterator[Callable[[Progress], Awaitable[None]]]:
    """A bar on stderr: one step of denoising is one step of the bar."""
    with _bar(label) as (bar, task):

        async def show(event: Progress) -> None:
            bar.update(task, description=event.text)
            if event.phase == "denoising":
                bar.update(task, total=event.total, completed=event.step)

        yield show


@contextlib.contextmanager
def _call_bar(label: str) -> Iterator[ProgressHandler]:
    """A bar on stderr for what an MCP server reports."""
    with _bar(label) as (bar, task):

        async def show(progress: float, total: float | None, message: str | None) -> None:
            bar.update(task, description=message or "", total=total, completed=progress)

        yield show


@contextlib.contextmanager
def _bar(label: str) -> Iterator[tuple[ProgressBar, TaskID]]:
    with ProgressBar(
        TextColumn("{task.fields[label]}", markup=False),
        BarColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=err,
        transient=not err.is_terminal,
    ) as bar:
        yield bar, bar.add_task("starting", total=None, label=label)


@contextlib.contextmanager
def _told_failures(as_json: bool) -> Iterator[None]:
    """Turn our errors into one sentence and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Step1XEditError as error:
        if as_json:
            _print_json(ErrorAnswer.of(error).to_dict())
        else:
            err.print(str(error), style="red", markup=False)
        is_usage = isinstance(error, InvalidParameterError | SettingsError)
        raise typer.Exit(USAGE if is_usage else FAILED) from None


# --- printing ------------------------------------------------------------------------------------


def _print_json(answer: dict[str, Any]) -> None:
    typer.echo(json.dumps(answer, ensure_ascii=False, indent=2))


def _print_edit(answer: EditAnswer) -> None:
    metadata = answer.metadata
    err.print(
        f"{metadata.model} on {metadata.device}, {answer.processing_time:.1f} s, "
        f"seed {metadata.seed}",
        markup=False,
    )
    if metadata.warning is not None:
        err.print(f"Warning: {metadata.warning}", style="yellow", markup=False)
    typer.echo(answer.output_path)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
