"""Every failure over HTTP, as `application/problem+json` (RFC 9457) with a stable `code`.

`STATUS_OF` holds the status of each code. The guard and all routes render failures through this
module. Under the paths of OpenAI's interface failures have the form that OpenAI's clients expect,
with the same sentence and `code`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field
from starlette.responses import Response

from step1x_edit.errors import (
    DeadlineExceededError,
    EditCancelledError,
    ImageError,
    InternalError,
    InvalidParameterError,
    ModelNotFoundError,
    Step1XEditError,
)

MEDIA_TYPE: Final = "application/problem+json"
OPENAI_MEDIA_TYPE: Final = "application/json"
OPENAI_PATHS: Final = ("/v1/images", "/v1/models")
CLIENT_GONE: Final = 499  # for the log only: the client has disconnected
_LONGEST_NAME: Final = 60  # of a field; longer ones are not repeated in an answer
_LATER: Final = {HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS}
_RETRY_AFTER_S: Final = 5.0  # if the error does not say

STATUS_OF: Final[Mapping[str, int]] = {
    "invalid_parameter": 422,
    "file_not_found": 404,
    "path_not_allowed": 403,
    "unsupported_image": 415,
    "corrupt_image": 422,
    "image_too_large": 413,
    "image_too_small": 422,
    "image_aspect": 422,
    "no_recipe": 422,
    "output_exists": 409,
    "output_not_writable": 403,
    "no_space": 507,
    "queue_full": 503,
    "rate_limited": 429,
    "shutting_down": 503,
    "out_of_memory": 503,
    "model_unavailable": 503,
    "worker_lost": 503,
    "model_not_found": 404,
    "idempotency_key": 409,
    EditCancelledError.code: CLIENT_GONE,
    "deadline_exceeded": 504,
    "not_found": 404,
    "job_conflict": 409,
    "interrupted": 503,  # never an answer, only in the records of stored jobs
    InternalError.code: 500,
}
"""The status for each code of `errors`."""


class WrongField(BaseModel):
    """One parameter that is wrong."""

    field: Annotated[str, Field(description="The name of the parameter")]
    message: Annotated[str, Field(description="What is wrong with it and what to change")]


class Problem(BaseModel):
    """A failure: a code for programs and one sentence for people."""

    type: Annotated[str, Field(description="The kind of failure, as a name")]
    title: Annotated[str, Field(description="The kind of failure, in words")]
    status: Annotated[int, Field(description="The status of this answer")]
    detail: Annotated[str, Field(description="What is wrong and what to change")]
    code: Annotated[str, Field(description="The kind of failure, the same in every interface")]
    instance: Annotated[
        str, Field(description="The id of the request, as in X-Request-Id and in the log")
    ]
    errors: Annotated[
        list[WrongField] | None, Field(description="Each wrong parameter, if known")
    ] = None


class OpenAIError(BaseModel):
    """A failure as clients of OpenAI's interface expect it in `error`."""

    message: Annotated[str, Field(description="What is wrong and what to change")]
    type: Annotated[str, Field(description="Whether the request or the server is at fault")]
    param: Annotated[str | None, Field(description="The wrong field, if it is one")]
    code: Annotated[str, Field(description="The kind of failure, the same in every interface")]


class OpenAIFailure(BaseModel):
    """The answer that holds an `OpenAIError`."""

    error: OpenAIError


@dataclass(frozen=True)
class Failure:
    """A failure before it is bound to a request."""

    status: int
    code: str
    title: str
    detail: str
    headers: Mapping[str, str]
    param: str | None = None
    is_worth_another_try: bool = True
    """False if a retry would take as long again and fail."""
    wrong_fields: tuple[tuple[str, str], ...] = ()


def of_error(error: Step1XEditError) -> Failure:
    """The failure for one of our errors."""
    status = STATUS_OF.get(error.code, 500)
    headers = {}
    if status in _LATER and (error.retry_after_s or error.retryable):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s or _RETRY_AFTER_S))
    fields = error.fields if isinstance(error, InvalidParameterError) else ()
    return Failure(
        status,
        error.code,
        error.beginning,
        str(error),
        headers,
        wrong_fields=fields,
        param=_param(error),
        is_worth_another_try=error.retryable and not isinstance(error, DeadlineExceededError),
    )


def _param(error: Step1XEditError) -> str | None:
    """The field of a request that is wrong, if the error names it."""
    match error:
        case InvalidParameterError():
            name = error.param or ""
            return name if name and name.isprintable() and len(name) <= _LONGEST_NAME else None
        case ModelNotFoundError():
            return "model"
        case ImageError():
            return "mask" if str(error).startswith(f"{error.beginning}: mask: ") else "image"
    return None


def of_status(status: int, detail: str = "", headers: Mapping[str, str] | None = None) -> Failure:
    """The failure of a request for which no operation ran, such as 404 or 405.

    A `detail` that only repeats the name of the status, as frameworks do, is ignored.
    """
    known = HTTPStatus(status)
    code = known.phrase.lower().replace(" ", "_").replace("-", "_")
    if detail in ("", known.phrase):
        detail = known.description
    return Failure(status, code, known.phrase, detail, headers or {})


def response(failure: Failure, request_id: str, path: str = "") -> Response:
    """The answer to the request with this id, in the form that clients of this path expect."""
    if is_of_openai(path):
        return _openai_response(failure)
    problem = Problem(
        type=f"urn:step1x-edit:problem:{failure.code}",
        title=failure.title,
        status=failure.status,
        detail=failure.detail,
        code=failure.code,
        instance=f"urn:step1x-edit:request:{request_id}",
        errors=[WrongField(field=field, message=message) for field, message in failure.wrong_fields]
        or None,
    )
    return Response(
        json.dumps(problem.model_dump(exclude_none=True), ensure_ascii=False).encode(),
        failure.status,
        {"Content-Type": MEDIA_TYPE, **failure.headers},
    )


def is_of_openai(path: str) -> bool:
    """Whether the path belongs to OpenAI's interface."""
    return any(path == known or path.startswith(f"{known}/") for known in OPENAI_PATHS)


def openai_body(failure: Failure) -> dict[str, Any]:
    """The failure as clients of OpenAI's interface expect it."""
    is_of_client = _openai_status(failure) < HTTPStatus.INTERNAL_SERVER_ERROR
    error = OpenAIError(
        message=failure.detail,
        type="invalid_request_error" if is_of_client else "server_error",
        param=failure.param,
        code=failure.code,
    )
    return OpenAIFailure(error=error).model_dump()


def _openai_response(failure: Failure) -> Response:
    status = _openai_status(failure)
    headers = {"Content-Type": OPENAI_MEDIA_TYPE, **failure.headers}
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR and not failure.is_worth_another_try:
        headers["X-Should-Retry"] = "false"  # these clients repeat any 5xx twice
    return Response(json.dumps(openai_body(failure), ensure_ascii=False).encode(), status, headers)


def _openai_status(failure: Failure) -> int:
    """The status under OpenAI's paths, where a wrong field or picture is a bad request."""
    if failure.status == HTTPStatus.UNPROCESSABLE_ENTITY or failure.code == "unsupported_image":
        return int(HTTPStatus.BAD_REQUEST)  # FastAPI describes it by its name in Python 3.10
    return failure.status
