"""The command line: progress on stderr, results on stdout, exit codes 0, 1, 2 (usage) and 130.

Flags are the parameter names of the operations with dashes; `schemas` defines what they allow.
Importing this package imports nothing else, because an MCP client waits for the server to start.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from step1x_edit.interfaces.cli.program import DEMO_PHOTO, DEMO_PROMPTS, app

__all__ = ["DEMO_PHOTO", "DEMO_PROMPTS", "app", "main"]


def main() -> None:
    """Run the command line."""
    command, *flags = sys.argv[1:] or [""]
    if command == "mcp" and set(flags) <= {"--standalone"}:
        # What the command does, without importing and describing all the others: 0.15 s less.
        from step1x_edit.interfaces.cli.mcp_stdio import serve

        serve(standalone=bool(flags))
        return
    from step1x_edit.interfaces.cli.program import run

    run()


def __getattr__(name: str) -> object:
    """Import the commands when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.program"), name)
