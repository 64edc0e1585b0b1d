"""The commands around MCP: serve it over stdio, call a tool, configure a client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from step1x_edit import foreign_json
from step1x_edit.errors import InvalidParameterError
from step1x_edit.interfaces.cli.mcp_stdio import serve
from step1x_edit.interfaces.cli.progress import display
from step1x_edit.interfaces.cli.terminal import (
    FAILED,
    err,
    failures_on_stderr,
    print_json,
    print_line,
)
from step1x_edit.interfaces.cli.usage import HELP_NAMES, Command
from step1x_edit.interfaces.mcp.client_config import (
    ClientName,
    config_file,
    server_entry,
    snippet,
    write_entry,
)
from step1x_edit.settings import load_settings

if TYPE_CHECKING:
    from fastmcp.client.progress import ProgressHandler

mcp_app = typer.Typer(
    context_settings=HELP_NAMES,
    help="Serve the tools to an MCP client over stdin and stdout, or run a command.",
    invoke_without_command=True,
)


@mcp_app.callback()
def mcp(
    context: typer.Context,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Do not join a server that runs on this machine")
    ] = False,
) -> None:
    """Serve the tools to an MCP client over stdin and stdout, or run a command."""
    if context.invoked_subcommand is not None:
        return
    serve(standalone=standalone)


@mcp_app.command(cls=Command)
def call(
    tool: Annotated[str, typer.Argument(help="Name of the tool, such as edit_image")],
    arguments: Annotated[
        str, typer.Argument(metavar="JSON", help="Its arguments as a JSON object")
    ] = "{}",
) -> None:
    """Call a tool as an MCP client does, and print its answer."""
    with failures_on_stderr(as_json=False):
        given = _json_object(arguments)
        from step1x_edit.interfaces.mcp.client import MCPClient

        async def called() -> dict[str, Any]:
            async with MCPClient() as client:
                with _shown_call(tool) as show:
                    return await client.call_tool(tool, given, on_progress=show)

        answer = asyncio.run(called())
        print_json(answer)
        if answer.get("status") == "error":
            raise typer.Exit(FAILED)


@mcp_app.command(cls=Command)
def config(
    client: Annotated[ClientName, typer.Option(help="The program that will start the server")],
    write: Annotated[
        bool,
        typer.Option("--write", help="Add it to the client's file, after making a backup"),
    ] = False,
) -> None:
    """Print or write the configuration with which an MCP client starts this server."""
    with failures_on_stderr(as_json=False):
        file = config_file(client)
        settings = load_settings()
        entry = server_entry(settings, file)
        if settings.api_key is not None:
            err.print(
                "API_KEY is left out: a server that a client starts does not need it", markup=False
            )
        if not write:
            typer.echo(snippet(file, entry), nl=False)
            err.print(f"add this to {file.path}, or run again with --write", markup=False)
            return
        backup = write_entry(file, entry)
        print_line(file.path)
        if backup is not None:
            err.print(f"backup of the old file: {backup}", markup=False)
        err.print("restart the client to apply the change", markup=False)


@contextlib.contextmanager
def _shown_call(label: str) -> Iterator[ProgressHandler]:
    """Show the progress that an MCP server reports; a repeated message is only a heartbeat."""
    with display(err) as shown:
        shown.begin(label)
        last: str | None = None

        async def show(progress: float, total: float | None, message: str | None) -> None:
            nonlocal last
            if message and message != last:
                last = message
                shown.show(message.rstrip("0123456789/"), message, progress, total)

        yield show


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = foreign_json.parse(text)
    except ValueError as error:
        reason = f"it is not JSON: {error}"
    else:
        if isinstance(value, dict):
            return value
        reason = f"it is {text[:40]}"
    example = """'{"image_path": "photo.jpg", "prompt": "add a red hat"}'"""
    raise InvalidParameterError(f"the arguments must be a JSON object such as {example}; {reason}")
