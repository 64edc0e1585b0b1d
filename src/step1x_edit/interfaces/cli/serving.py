"""The command that starts the server."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from step1x_edit.interfaces.cli.options import WHOLE
from step1x_edit.interfaces.cli.terminal import failures_on_stderr, out, print_table
from step1x_edit.interfaces.cli.usage import Command


class Serve(Command):
    """The command `serve`, whose help names all settings."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, and the settings below it."""
        from step1x_edit.schemas.parameters import parameters_of
        from step1x_edit.settings import Settings

        super().format_help(ctx, formatter)
        out.print(" Settings, from the environment or from .env:\n")
        rows = [
            (f" {name.upper()}", parameter.description)
            for name, parameter in parameters_of(Settings).items()
        ]
        print_table((), rows, out)


def serve(
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen at (default 127.0.0.1); if other machines can reach it, set "
            "API_KEY",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        str | None,
        typer.Option(
            metavar=WHOLE,
            help="Port to listen at; 0: a free one (default 8000)",
            show_default=False,
        ),
    ] = None,
    standby: Annotated[
        bool,
        typer.Option(
            "--standby", help="While another server uses DATA_DIR, wait; then take its place"
        ),
    ] = False,
) -> None:
    """Serve the web page, REST and MCP over HTTP until a signal ends the server.

    Flags override the settings of the same names.
    """
    with failures_on_stderr(as_json=False):
        from step1x_edit.settings import load_server_settings

        settings = load_server_settings({"host": host, "port": port})
        from step1x_edit.interfaces import process, serving

        process.log_to_stderr(settings)
        if standby:
            asyncio.run(serving.wait_for_turn(settings))
        serving.serve(settings)
