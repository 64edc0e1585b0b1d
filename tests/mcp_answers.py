"""The answers of MCP tools and resources, with the types that a test expects."""

from __future__ import annotations

from typing import Any

from fastmcp.client.client import CallToolResult
from mcp_types import BlobResourceContents, TextContent, TextResourceContents


def answer_of(result: CallToolResult) -> dict[str, Any]:
    """The structured part of an answer."""
    assert result.structured_content is not None
    return result.structured_content


def text_of(result: CallToolResult) -> str:
    """The text at the start of an answer."""
    block = result.content[0]
    assert isinstance(block, TextContent)
    return block.text


def text_in(resource: TextResourceContents | BlobResourceContents) -> str:
    """A resource that is text."""
    assert isinstance(resource, TextResourceContents)
    return resource.text
