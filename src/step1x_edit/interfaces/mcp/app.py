"""The MCP App of an edit: a page in the chat that shows before and after.

Hosts that support apps (the extension io.modelcontextprotocol/ui) show the page beside the result
of a tool that names it; others ignore it. Data for the page alone is in the result's `_meta`, and
only for clients that declare the extension: some others show their model the whole result.
"""

from __future__ import annotations

import base64
from importlib import resources
from typing import Any, Final

from fastmcp import Context
from fastmcp.apps import UI_EXTENSION_ID, UI_MIME_TYPE
from fastmcp.resources import Resource
from fastmcp.server.dependencies import get_http_request
from fastmcp.tools import ToolResult

from step1x_edit.schemas.requests import EditRequest

PAGE_URI: Final = "ui://step1x-edit/compare.html"
SHOWN_IN_APP: Final[dict[str, Any]] = {"ui": {"resourceUri": PAGE_URI}}
"""The `_meta` of a tool whose results the page shows."""

BEFORE_KEY: Final = "step1x-edit/before"
ARGUMENTS_KEY: Final = "step1x-edit/arguments"
PASSED_ON_HEADER: Final = "X-Passed-On"
"""Sent by our proxy, which decides itself what its client receives."""


def app_page() -> Resource:
    """The page, as a resource."""
    page = resources.files("step1x_edit.interfaces.mcp") / "compare.html"
    return Resource.from_function(
        lambda: page.read_text("utf-8"),
        uri=PAGE_URI,
        name="compare",
        title="Before and after",
        description="A page that hosts with MCP Apps show beside the result of an edit",
        mime_type=UI_MIME_TYPE,
        meta={"ui": {"prefersBorder": True}},
    )


def app_meta(request: EditRequest, before: bytes) -> dict[str, Any]:
    """The data of an edit for the page: the JPEG of its input, and the arguments to repeat it.

    Another attempt writes another file, so the output path and the seed are left out.
    """
    of_this_one = {"seed", "output_path", "overwrite"}
    again = request.model_dump(mode="json", exclude=of_this_one, exclude_none=True)
    return {
        BEFORE_KEY: f"data:image/jpeg;base64,{base64.b64encode(before).decode('ascii')}",
        ARGUMENTS_KEY: again,
    }


def for_client(result: ToolResult, context: Context) -> ToolResult:
    """The result for the client of this call, without data for a page that it cannot show."""
    if result.meta is None or _has_apps(context):
        return result
    meta = {
        name: value
        for name, value in result.meta.items()
        if name not in (BEFORE_KEY, ARGUMENTS_KEY)
    }
    return ToolResult(
        result.content,
        structured_content=result.structured_content,
        is_error=result.is_error,
        meta=meta or None,
    )


def _has_apps(context: Context) -> bool:
    if context.client_supports_extension(UI_EXTENSION_ID):
        return True
    try:
        return PASSED_ON_HEADER in get_http_request().headers
    except RuntimeError:  # there is no HTTP
        return False
