"""Failures of MCP tools: one form for all exceptions."""

from __future__ import annotations

import logging
from collections.abc import Callable

import mcp_types
from fastmcp.exceptions import NotFoundError
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.tools import ToolResult
from mcp.shared.exceptions import MCPError
from mcp_types import CallToolRequestParams
from pydantic import ValidationError

from step1x_edit.errors import InternalError, Step1XEditError
from step1x_edit.interfaces.mcp.results import error_result
from step1x_edit.schemas.complaints import invalid_parameter
from step1x_edit.schemas.requests import PARAMETERS

log = logging.getLogger(__name__)


class OneErrorShape(Middleware):
    """Converts every failure of a tool to the form of the contract.

    `explain` converts any other exception to one of our errors.
    """

    def __init__(self, explain: Callable[[Exception], Step1XEditError]) -> None:
        self._explain = explain

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        try:
            return await call_next(context)
        except NotFoundError as error:  # a mistake in the protocol, not of a tool
            raise MCPError(mcp_types.INVALID_PARAMS, str(error)) from None
        except Exception as error:  # noqa: BLE001 - the outermost handler of this interface
            return error_result(self._explain(error))


def explain(error: Exception) -> Step1XEditError:
    """The error to report for an exception; fastmcp wraps the original as its cause.

    Raises errors of the protocol, which are not failures of the tool.
    """
    for candidate in (error, error.__cause__):
        match candidate:
            case MCPError():
                raise candidate
            case Step1XEditError():
                return candidate
            case ValidationError():
                return invalid_parameter(candidate, PARAMETERS)
    log.error("a tool failed", exc_info=error)
    return InternalError("the call failed unexpectedly; the server's log says more")
