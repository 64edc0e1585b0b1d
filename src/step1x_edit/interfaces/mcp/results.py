"""The results of MCP tools: the answer in both of its places, and pictures beside it.

Some clients show their model only `structuredContent`, some only the first text block, so each
holds the whole answer.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fastmcp.tools import ToolResult
from mcp_types import Annotations, ContentBlock, ImageContent, ResourceLink, TextContent

from step1x_edit.channel import Phase, Progress
from step1x_edit.errors import Step1XEditError
from step1x_edit.interfaces.mcp.app import app_meta
from step1x_edit.pictures.output_formats import OUTPUT_FORMATS
from step1x_edit.schemas.answers import EditAnswer, ErrorAnswer, RunningAnswer
from step1x_edit.schemas.requests import EditRequest

_PREVIEW_FOR_BOTH: Final = Annotations(audience=["user", "assistant"], priority=0.6)


def result_of(
    answer: dict[str, Any],
    *more: ContentBlock,
    is_error: bool = False,
    meta: dict[str, Any] | None = None,
) -> ToolResult:
    """The answer as structured content and as JSON text, and more content after it."""
    text = TextContent(type="text", text=json.dumps(answer, ensure_ascii=False))
    return ToolResult([text, *more], structured_content=answer, is_error=is_error, meta=meta)


def error_result(error: Step1XEditError) -> ToolResult:
    """The answer of a tool that failed."""
    return result_of(ErrorAnswer.of(error).to_dict(), is_error=True)


def running_result(job_id: str, progress: Progress | None) -> ToolResult:
    """The progress of an edit that continues without its call."""
    event = progress or Progress(Phase.QUEUED, step=1)
    waits = event.phase is Phase.QUEUED
    words = event.text if event.warning is None else f"{event.text}; {event.warning}"
    answer = RunningAnswer(
        job_id=job_id,
        message=f"The edit continues ({words}); get_job has its result",
        phase=event.phase.value,
        step=event.step if event.is_counted else None,
        total=event.total if event.is_counted else None,
        position=event.step if waits else None,
    )
    return result_of(answer.to_dict())


def edited_result(
    request: EditRequest,
    answer: EditAnswer,
    before: bytes,
    after: bytes,
    rounds: Sequence[bytes],
) -> ToolResult:
    """The answer, a preview, a link to the file, and a preview of each round."""
    link = link_to(answer, "The edited picture in full size")
    more: list[ContentBlock] = [jpeg_content(after), link, *map(jpeg_content, rounds)]
    return result_of(answer.to_dict(), *more, meta=app_meta(request, before))


def link_to(answer: EditAnswer, description: str) -> ResourceLink:
    """A link to the file of an answer."""
    path = Path(answer.output_path)
    return ResourceLink(
        type="resource_link",
        uri=path.as_uri(),
        name=path.name,
        mime_type=OUTPUT_FORMATS[path.suffix.lower()].media_type,
        description=description,
    )


def jpeg_content(data: bytes) -> ImageContent:
    """A small picture for the user and the assistant."""
    return ImageContent(
        type="image",
        data=base64.b64encode(data).decode("ascii"),
        mime_type="image/jpeg",
        annotations=_PREVIEW_FOR_BOTH,
    )
