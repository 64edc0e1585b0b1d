"""Serves MCP over the stdin and stdout of this process."""

from __future__ import annotations

import gc
import os


def serve(*, standalone: bool) -> None:
    """Serve until the client closes our stdin or a signal comes, then end the process."""
    wire = os.dup(1)  # from here on, printed text must not reach the client
    os.dup2(2, 1)
    gc.disable()  # imports create no garbage; serving enables it again
    from step1x_edit.interfaces.mcp import stdio

    stdio.serve(wire, standalone=standalone)
