"""What OpenAPI says about the HTTP routes, as data; the routes say what is done.

Each route has one entry here, whose keys are the arguments of FastAPI's decorators. The texts are
for people who write a client. The schemas come from `schemas`, the failures from `problems`.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel

from step1x_edit import __version__
from step1x_edit.errors import EditCancelledError
from step1x_edit.hub.catalog import CATALOG
from step1x_edit.interfaces.discovery import PROOF_HEADER
from step1x_edit.interfaces.http import problems
from step1x_edit.interfaces.http.sse import EVENT_STREAM, named
from step1x_edit.schemas.requests import (
    GpuAnswer,
    GpuStatistics,
    GpuStatus,
    JobState,
    ModelsAnswer,
    PlanStatus,
    PullAnswer,
    PulledModel,
    PullProgressAnswer,
    StatusAnswer,
)

_JSON: Final = "application/json"


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
