"""The command that serves everybody else."""

from __future__ import annotations

from typing import Annotated

import typer

from step1x_edit.interfaces.cli.terminal import told_failures


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
    """Serve the web page, REST and MCP over HTTP until a signal comes.

    Where to listen and what to open is also set by HOST, PORT, ENABLE_API,
    ENABLE_MCP and API_KEY.
    """
    with told_failures(as_json=False):
        from step1x_edit.settings import load_server_settings

        settings = load_server_settings({"host": host, "port": port})
        from step1x_edit.interfaces import process, server

        process.log_to_stderr(settings)
        server.serve(settings)
