"""The program: all commands, each in the module of its topic.

Commands import what they need when they run, so that `--help` is fast.
"""

from __future__ import annotations

from typing import Annotated

import typer

from step1x_edit import __version__
from step1x_edit.interfaces.cli.batching import batch
from step1x_edit.interfaces.cli.cluster import cluster_app
from step1x_edit.interfaces.cli.demo import DEMO_PHOTO, DEMO_PROMPTS, demo
from step1x_edit.interfaces.cli.doctor import doctor
from step1x_edit.interfaces.cli.editing import EditCommand, edit
from step1x_edit.interfaces.cli.generating import generate
from step1x_edit.interfaces.cli.gpu import offload, release, status
from step1x_edit.interfaces.cli.history import history_app
from step1x_edit.interfaces.cli.inspecting import inspect
from step1x_edit.interfaces.cli.mcp_commands import mcp_app
from step1x_edit.interfaces.cli.models import models_app
from step1x_edit.interfaces.cli.replaying import replay
from step1x_edit.interfaces.cli.serving import Serve, serve
from step1x_edit.interfaces.cli.terminal import print_line
from step1x_edit.interfaces.cli.training import train_lora
from step1x_edit.interfaces.cli.usage import HELP_NAMES, Command, Program, show_any_text

__all__ = ["DEMO_PHOTO", "DEMO_PROMPTS", "app", "run"]


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print_line(f"step1x-edit {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="step1x-edit",
    cls=Program,
    context_settings=HELP_NAMES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(cls=Command)(demo)
app.command(cls=EditCommand)(edit)
app.command(cls=Command)(batch)
app.command(cls=Command)(generate)
app.command(cls=Command)(replay)
app.command(cls=Command)(inspect)
app.command(cls=Command)(train_lora)
app.command(cls=Serve)(serve)
for command in (status, offload, release, doctor):
    app.command(cls=Command)(command)
app.add_typer(history_app, name="history")
app.add_typer(models_app, name="models")
app.add_typer(mcp_app, name="mcp")
app.add_typer(cluster_app, name="cluster")


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            help="Print the version",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Edit pictures by saying what to change, on this machine, with the model Step1X-Edit."""


def run() -> None:
    """Run a command."""
    show_any_text()
    app()
