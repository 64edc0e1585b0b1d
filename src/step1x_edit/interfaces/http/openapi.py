"""What OpenAPI says about the HTTP routes, as data; the routes say what is done.

Each route has one entry here, whose keys are the arguments of FastAPI's decorators. The texts are
for people who write a client. The schemas come from `schemas`, the failures from `problems`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel

from step1x_edit import __version__
from step1x_edit.errors import EditCancelledError
from step1x_edit.hub.catalog import CATALOG
from step1x_edit.interfaces.discovery import PROOF_HEADER
from step1x_edit.interfaces.http import problems
from step1x_edit.interfaces.http.edits import METADATA, form_body, json_content, without_null
from step1x_edit.interfaces.http.guard import OPEN_PATHS
from step1x_edit.interfaces.http.idempotency import KEY_PARAMETER
from step1x_edit.interfaces.http.sse import EVENT_STREAM, named
from step1x_edit.schemas.requests import (
    GeneratePictureRequest,
    GpuAnswer,
    GpuStatistics,
    GpuStatus,
    JobAnswer,
    JobEventAnswer,
    JobsAnswer,
    JobsRequest,
    JobState,
    ModelsAnswer,
    PictureRequest,
    PlanStatus,
    PullAnswer,
    PulledModel,
    PullProgressAnswer,
    StatusAnswer,
)

DESCRIPTION: Final = """\
Edit pictures by saying what to change, with the open model Step1X-Edit on this machine.

Failures are `application/problem+json`: `code` is the same on every door, and `detail` is one \
sentence that says what to change. Under `/v1/images` and `/v1/models` failures have the form that \
OpenAI's clients expect, with the same code and sentence. Every answer has an `X-Request-Id`, \
which is also in the log."""
"""The description of the whole API."""

_JSON: Final = "application/json"


def description_of(app: FastAPI, defaults: Mapping[str, object]) -> dict[str, Any]:
    """The routes of `app` in OpenAPI, with the operator's defaults and what the guard answers."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {}).update(problems.schemas())
        components["securitySchemes"] = {
            "API_KEY": {
                "type": "http",
                "scheme": "bearer",
                "description": "Required if the server has an API_KEY",
            }
        }
        schema["security"] = [{}, {"API_KEY": []}]
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                _add_guard(operation, path)
                _set_defaults(operation.get("requestBody", {}).get("content", {}), defaults)
        app.openapi_schema = schema
    return app.openapi_schema


def _add_guard(operation: dict[str, Any], path: str) -> None:
    """Add what the guard answers at this path."""
    statuses = [403, 421] if path in OPEN_PATHS else [401, 403, 408, 421]
    failures = problems.described_status(*statuses, path=path)
    operation["responses"] |= {str(status): answer for status, answer in failures.items()}
    if path in OPEN_PATHS:
        operation["security"] = []


def _set_defaults(contents: Mapping[str, Any], defaults: Mapping[str, object]) -> None:
    """Set the operator's defaults in each form of a body."""
    for content in contents.values():
        properties = content["schema"]["properties"]
        for name, default in {**defaults, "num_inference_steps": defaults["num_steps"]}.items():
            if name in properties:
                properties[name]["default"] = default


def _json(description: str, answer: BaseModel) -> dict[str, Any]:
    example = answer.model_dump(mode="json", exclude_none=True)
    return {"description": description, "content": {_JSON: {"example": example}}}


def _plain(description: str, example: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"text/plain": {"schema": {"type": "string"}, "example": example}},
    }


# --- the GPU -------------------------------------------------------------------------------------

_STATUS: Final = GpuStatus(
    model_location="CPU",
    idle_time=45.2,
    idle_timeout=60,
    gpu_memory_allocated_gb=0.0,
    gpu_memory_reserved_gb=0.0,
    auto_monitor_running=True,
    statistics=GpuStatistics(total_loads=5, gpu_to_cpu=5, cpu_to_gpu=4, full_releases=0),
    model="v1.1",
    device="cuda:0",
    queue_length=0,
    plan=PlanStatus(
        resident_share=0.31,
        precision="bf16",
        streaming=True,
        slots=2,
        joint_branches=False,
        reason="31 % of the core stays on the device, the rest passes through 2 slots, prompts "
        "one after the other",
        predicted_peak_gb=7.4,
        measured_peak_gb=7.1,
        host_gb=39.2,
    ),
)
_OFFLOADED: Final = GpuAnswer(
    message="GPU offloaded. Model now on CPU, GPU memory: 0.00GB", gpu_status=_STATUS
)
_RELEASED: Final = GpuAnswer(
    message="GPU released. Model location: Unloaded, GPU memory: 0.00GB",
    gpu_status=_STATUS.model_copy(update={"model_location": "Unloaded", "plan": None}),
)

GET_GPU_STATUS: Final[dict[str, Any]] = {
    "operation_id": "get_gpu_status",
    "summary": "Get the location of the model",
    "description": "Where the model is, how much memory it occupies as measured, how it is placed "
    "and why, and how many edits are queued. Answers at once, also during an edit.",
    "response_model": StatusAnswer,
    "responses": {
        200: _json("The current status", StatusAnswer(gpu_status=_STATUS)),
        **problems.described("internal"),
    },
}

OFFLOAD_GPU: Final[dict[str, Any]] = {
    "operation_id": "offload_gpu",
    "summary": "Move the model to host memory",
    "description": "Waits for the running edit and runs ahead of queued edits. Does nothing if the "
    "model is not on the GPU. The next edit moves it back.",
    "response_model": GpuAnswer,
    "responses": {
        200: _json("The new location", _OFFLOADED),
        **problems.described("internal", "shutting_down"),
    },
}

RELEASE_GPU: Final[dict[str, Any]] = {
    "operation_id": "release_gpu",
    "summary": "Unload the model",
    "description": "Frees GPU and host memory; the next edit loads the model from disk again. "
    "Waits for the running edit and runs ahead of queued edits.",
    "response_model": GpuAnswer,
    "responses": {
        200: _json("The new location", _RELEASED),
        **problems.described("internal", "shutting_down"),
    },
}

# --- stored jobs ----------------------------------------------------------------------------------

LAST_EVENT_ID: Final = "Last-Event-ID"

_ID: Final = "0000000000078f14e45fceea167a5a36dedd4bea2543"
_QUEUED: Final = JobAnswer(
    id=_ID,
    status=JobState.QUEUED,
    created_at=1767225600.0,
    position=1,
    request=PictureRequest(prompt="change to night scene", seed=42),
)
_SUCCEEDED: Final = _QUEUED.model_copy(
    update={
        "status": JobState.SUCCEEDED,
        "started_at": 1767225601.5,
        "finished_at": 1767225617.0,
        "position": None,
        "processing_time": 15.3,
        "metadata": METADATA,
    }
)
_CANCELLED: Final = _QUEUED.model_copy(
    update={
        "status": JobState.CANCELLED,
        "finished_at": 1767225602.0,
        "position": None,
        "error": str(EditCancelledError()),
        "code": EditCancelledError.code,
    }
)
_JOBS: Final = JobsAnswer(data=[_QUEUED], has_more=False, first_id=_ID, last_id=_ID)
_JOB_EVENTS: Final = (
    'id: 1\ndata: {"at": 1767225600.0, "status": "queued"}\n\n'
    'id: 2\ndata: {"at": 1767225601.5, "status": "running"}\n\n'
    ": still there\n\n"
    'id: 3\ndata: {"at": 1767225617.0, "status": "succeeded"}\n\n'
)
_JOB_EVENT_DATA: Final = JobEventAnswer.model_json_schema(ref_template=problems.SCHEMA_REFERENCE)
del _JOB_EVENT_DATA["$defs"]  # JobAnswer brings the same ones
_JOB_EVENT: Final = {
    "type": "object",
    "description": "One event",
    "required": ["id", "data"],
    "properties": {
        "id": {"type": "string", "description": "Its number"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": _JOB_EVENT_DATA,
        },
    },
}
_JOB_ID: Final = {
    "name": "job_id",
    "in": "path",
    "required": True,
    "description": "The id of the job",
    "schema": {"type": "string"},
    "example": _ID,
}
_OF_JOB: Final = {"parameters": [_JOB_ID]}
_LIST_QUERY: Final = [
    {
        "name": name,
        "in": "query",
        "description": schema.pop("description"),
        "schema": without_null(schema),
    }
    for name, schema in JobsRequest.model_json_schema()["properties"].items()
]
_JOB_BODY: Final = form_body({})
_JOB_BODY["content"] |= json_content(
    GeneratePictureRequest, {}, {"prompt": "a red fox in the snow", "seed": 42}
)

CREATE_JOB: Final[dict[str, Any]] = {
    "operation_id": "create_job",
    "summary": "Create a stored job",
    "description": "Takes the same form as `/api/edit` and answers as soon as the job is on the "
    "disk. From then on the job runs even if the client disconnects or the server restarts. "
    "`Location` is the path of the job. A JSON body instead of a form makes a picture from the "
    "prompt alone, which needs Step1X-Edit v1.1.",
    "status_code": 202,
    "response_model": JobAnswer,
    "responses": {
        202: {
            "headers": {
                "Location": {"description": "The path of the job", "schema": {"type": "string"}}
            },
            **_json("The job is accepted", _QUEUED),
        },
        **problems.described(
            "image_too_large",
            "unsupported_image",
            "invalid_parameter",
            "corrupt_image",
            "idempotency_key",
            "internal",
            "queue_full",
            "shutting_down",
            "no_space",
        ),
    },
    "openapi_extra": {"requestBody": _JOB_BODY, "parameters": [KEY_PARAMETER]},
}

LIST_JOBS: Final[dict[str, Any]] = {
    "operation_id": "list_jobs",
    "summary": "List stored jobs",
    "description": "Newest first. If `has_more` is true, send the `last_id` of this answer as "
    "`after` to get the next page.",
    "response_model": JobsAnswer,
    "responses": {
        200: _json("One page of jobs", _JOBS),
        **problems.described("invalid_parameter", "internal", "shutting_down"),
    },
    "openapi_extra": {"parameters": _LIST_QUERY},
}

GET_JOB: Final[dict[str, Any]] = {
    "operation_id": "get_job",
    "summary": "Get a stored job",
    "description": "`status` is `queued`, `running`, or one of the final states `succeeded`, "
    "`failed`, `cancelled` and `expired`. If the job has failed, `error` and `code` say why, as on "
    "every other door.",
    "response_model": JobAnswer,
    "responses": {
        200: _json("The job in its current state", _SUCCEEDED),
        **problems.described("not_found", "internal", "shutting_down"),
    },
    "openapi_extra": _OF_JOB,
}

GET_JOB_EVENTS: Final[dict[str, Any]] = {
    "operation_id": "get_job_events",
    "summary": "Stream the events of a stored job",
    "description": "All past and future events of the job as server-sent events, until the job "
    "ends. A client that was disconnected sends the id of the last event it received in "
    "`Last-Event-ID` and gets the later ones; browsers do so by themselves. If no event is left "
    "the answer is 204, after which browsers do not reconnect.",
    "responses": {
        200: {
            "description": "The events",
            "content": {EVENT_STREAM: {"schema": _JOB_EVENT, "example": _JOB_EVENTS}},
        },
        204: {"description": "The job has ended and no event is left"},
        **problems.described("not_found", "invalid_parameter", "internal", "shutting_down"),
    },
    "response_class": StreamingResponse,
    "openapi_extra": {
        "parameters": [
            _JOB_ID,
            {
                "name": LAST_EVENT_ID,
                "in": "header",
                "description": "The id of the last event that the client received",
                "schema": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
            },
        ]
    },
}

GET_JOB_CONTENT: Final[dict[str, Any]] = {
    "operation_id": "get_job_content",
    "summary": "Download the result of a stored job",
    "description": "The edited picture as PNG, once the job has succeeded.",
    "responses": {
        200: {
            "description": "The edited picture",
            "content": {
                "image/png": {
                    "schema": {"type": "string", "format": "binary"},
                    "example": "(bytes)",
                }
            },
        },
        **problems.described("not_found", "job_conflict", "internal", "shutting_down"),
    },
    "response_class": Response,
    "openapi_extra": _OF_JOB,
}

CANCEL_JOB: Final[dict[str, Any]] = {
    "operation_id": "cancel_job",
    "summary": "Cancel a stored job",
    "description": "A queued job does not start; a running job stops within one step. A job that "
    "has ended does not change.",
    "response_model": JobAnswer,
    "responses": {
        200: _json("The job in its current state", _CANCELLED),
        **problems.described("not_found", "internal", "shutting_down", "no_space"),
    },
    "openapi_extra": _OF_JOB,
}

DELETE_JOB: Final[dict[str, Any]] = {
    "operation_id": "delete_job",
    "summary": "Delete a stored job",
    "description": "Removes the job and its pictures. A running job must be cancelled first.",
    "status_code": 204,
    "responses": {
        204: {"description": "The job is deleted"},
        **problems.described("not_found", "job_conflict", "internal", "shutting_down", "no_space"),
    },
    "openapi_extra": _OF_JOB,
}

# --- published models -----------------------------------------------------------------------------

_MODEL_FOLDER: Final = "/home/me/.local/share/step1x-edit/models/v1.1"
_PULL_BEGINS: Final = PullProgressAnswer(phase="asking", done=0, total=0, text="asking the hub")
_PULL_PROGRESS: Final = PullProgressAnswer(
    phase="downloading",
    done=3_100_000_000,
    total=41_800_000_000,
    text="step1x-edit-v1p1-official.safetensors",
)
_PULL: Final = PullAnswer(name="v1.1", status=JobState.RUNNING, progress=_PULL_PROGRESS)
_STOPPED_PULL: Final = _PULL.model_copy(
    update={
        "status": JobState.CANCELLED,
        "error": str(EditCancelledError()),
        "code": EditCancelledError.code,
    }
)
_MODELS: Final = ModelsAnswer(
    models=[
        PulledModel(
            name="v1.1",
            version="v1.1",
            repos=["stepfun-ai/Step1X-Edit", "Qwen/Qwen2.5-VL-7B-Instruct"],
            size_bytes=41_800_000_000,
            state="partial",
            folder=f"{_MODEL_FOLDER}.partial",
            disk_bytes=3_100_000_000,
            runs=False,
        )
    ],
    pull=_PULL,
)
_PULL_EVENTS: Final = (
    named("progress", _PULL_BEGINS.to_dict())
    + named("progress", _PULL_PROGRESS.to_dict())
    + named("pulled", {"path": _MODEL_FOLDER})
)
_PULL_EVENT: Final = {
    "type": "object",
    "description": "One event: `progress` with a `PullProgressAnswer`, `pulled` with the path of "
    "the folder, `error` with the sentence and its code, or `cancelled` with a message",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string", "enum": ["progress", "pulled", "error", "cancelled"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
_OF_MODEL: Final = {
    "parameters": [
        {
            "name": "name",
            "in": "path",
            "required": True,
            "description": "The name of the model, as listed",
            "schema": {"type": "string", "enum": [model.name for model in CATALOG]},
            "example": "v1.1",
        }
    ]
}

LIST_PUBLISHED_MODELS: Final[dict[str, Any]] = {
    "operation_id": "list_published_models",
    "summary": "List the published models",
    "description": "For each model how much of it is on this disk and where. Also the running "
    "pull, or the last one since the server started.",
    "response_model": ModelsAnswer,
    "responses": {
        200: _json("The models", _MODELS),
        **problems.described("internal"),
    },
}

PULL_MODEL: Final[dict[str, Any]] = {
    "operation_id": "pull_model",
    "summary": "Download a published model",
    "description": "Answers with server-sent events: `progress` up to four times a second, then "
    "`pulled` with the folder for `MODEL_PATH`, `error` or `cancelled`. Closing the connection "
    "does not stop the pull; the same request again receives the events of the running pull. A "
    "pull continues from what an earlier one has left, and a model that is on the disk is not "
    "downloaded again. One model is pulled at a time.",
    "responses": {
        200: {
            "description": "The events",
            "content": {EVENT_STREAM: {"schema": _PULL_EVENT, "example": _PULL_EVENTS}},
        },
        **problems.described("model_not_found", "job_conflict", "rate_limited", "internal"),
    },
    "response_class": StreamingResponse,
    "openapi_extra": _OF_MODEL,
}

STOP_PULL: Final[dict[str, Any]] = {
    "operation_id": "stop_pull",
    "summary": "Stop downloading a model",
    "description": "Answers once the pull has ended, which takes some seconds if the hub does not "
    "respond. What arrived is kept, and the next pull of this model continues from there.",
    "response_model": PullAnswer,
    "responses": {
        200: _json("The outcome of the pull", _STOPPED_PULL),
        **problems.described("model_not_found", "job_conflict", "internal"),
    },
    "openapi_extra": _OF_MODEL,
}

# --- monitoring -----------------------------------------------------------------------------------

MAX_NONCE: Final = 64
"""Characters of a nonce for /livez."""

GET_HEALTH: Final[dict[str, Any]] = {
    "operation_id": "get_health",
    "summary": "Get a summary of the server's state",
    "description": "Whether the server would accept an edit now, where the model is, and how many "
    "edits are queued.",
    "responses": {
        200: {
            "description": "The server responds",
            "content": {
                _JSON: {
                    "schema": {"type": "object"},
                    "example": {
                        "status": "healthy",
                        "version": __version__,
                        "model_location": "Unloaded",
                        "queue_length": 0,
                    },
                }
            },
        },
        **problems.described("internal"),
    },
    "response_class": JSONResponse,
}

GET_LIVENESS: Final[dict[str, Any]] = {
    "operation_id": "get_liveness",
    "summary": "Check that the process is alive",
    "description": "Needs no token. Does not check whether edits are possible. If a `nonce` is "
    f"given, the header `{PROOF_HEADER}` holds the HMAC-SHA256 of the server's port and the nonce. "
    "Programs on this machine use it to recognise the server that wrote the note in DATA_DIR.",
    "responses": {200: _plain("The process is alive", "ok\n"), **problems.described("internal")},
    "response_class": PlainTextResponse,
    "openapi_extra": {
        "parameters": [
            {
                "name": "nonce",
                "in": "query",
                "description": f"A random text of at most {MAX_NONCE} characters",
                "schema": {"type": "string"},
            }
        ]
    },
}

GET_READINESS: Final[dict[str, Any]] = {
    "operation_id": "get_readiness",
    "summary": "Check whether the server would accept an edit now",
    "description": "With `?verbose` the answer has one line for each check.",
    "responses": {
        200: _plain("The server would accept an edit", "ready\n"),
        **problems.described("internal", "queue_full", "model_unavailable", "shutting_down"),
    },
    "response_class": PlainTextResponse,
    "openapi_extra": {
        "parameters": [
            {
                "name": "verbose",
                "in": "query",
                "description": "Report the result of each check",
                "allowEmptyValue": True,
                "schema": {"type": "string"},
            }
        ]
    },
}

GET_METRICS: Final[dict[str, Any]] = {
    "operation_id": "get_metrics",
    "summary": "Get metrics for Prometheus",
    "description": "Requests, edits, the queue and the location of the model, in the text format "
    "of Prometheus.",
    "responses": {
        200: _plain("The metrics", "step1x_queue_length 0.0\n"),
        **problems.described("internal"),
    },
    "response_class": PlainTextResponse,
}
