"""The command line: progress on stderr, results on stdout, exit codes 0, 1, 2 (usage) and 130.

Flags are the parameter names of the operations with dashes; what they allow is said once, in
`schemas`. Each module holds the commands of one matter. Commands import what they need when they
run, so that `--help` is there at once.
"""

from __future__ import annotations

import typer

from step1x_edit.interfaces.cli.batching import batch
from step1x_edit.interfaces.cli.demo import DEMO_PHOTO, DEMO_PROMPTS, demo
from step1x_edit.interfaces.cli.doctor import doctor
from step1x_edit.interfaces.cli.editing import edit
from step1x_edit.interfaces.cli.generating import generate
from step1x_edit.interfaces.cli.gpu import offload, release, status
from step1x_edit.interfaces.cli.mcp_commands import mcp_app
from step1x_edit.interfaces.cli.models import models_app
from step1x_edit.interfaces.cli.serving import serve

__all__ = ["DEMO_PHOTO", "DEMO_PROMPTS", "app", "main"]

app = typer.Typer(
    name="step1x-edit",
    help="Edit pictures by saying what to change, on this machine, with the model Step1X-Edit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, edit, batch, generate, serve, status, offload, release, doctor):
    app.command()(command)
app.add_typer(models_app, name="models")
app.add_typer(mcp_app, name="mcp")


def main() -> None:
    """Run the command line."""
    app()
