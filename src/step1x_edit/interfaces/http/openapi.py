"""The OpenAPI descriptions of the HTTP routes, as data.

Each route has one entry here, whose keys are the arguments of FastAPI's decorators. The texts are
for developers of clients. The schemas come from `schemas`, the failures from `problems`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from step1x_edit import __version__
from step1x_edit.errors import EditCancelledError, rebuild
from step1x_edit.hub.catalog import CATALOG
from step1x_edit.interfaces.discovery import PROOF_HEADER
from step1x_edit.interfaces.http import problems
from step1x_edit.interfaces.http.forms import FILE, MASK
from step1x_edit.interfaces.http.guard import OPEN_PATHS, WORK_PATHS
from step1x_edit.interfaces.http.idempotency import KEY
from step1x_edit.interfaces.http.sse import EVENT_STREAM, named
from step1x_edit.pictures.output_formats import OUTPUT_FORMATS
from step1x_edit.schemas.answers import (
    EditMetadata,
    EstimateAnswer,
    GpuAnswer,
    GpuStatistics,
    GpuStatus,
    JobAnswer,
    JobEventAnswer,
    JobsAnswer,
    JobState,
    ModelsAnswer,
    PictureAnswer,
    PullAnswer,
    PulledModel,
    PullProgressAnswer,
    RecipeAnswer,
    StatusAnswer,
)
from step1x_edit.schemas.openai import (
    ImageEditRequest,
    ImageGenerationRequest,
    OpenAIRequest,
)
from step1x_edit.schemas.parameters import parameters_of
from step1x_edit.schemas.plan import PlanStatus
from step1x_edit.schemas.requests import (
    GeneratePictureRequest,
    HowToEdit,
    JobsRequest,
    PictureRequest,
    PictureSize,
)

DESCRIPTION: Final = """\
Edit pictures by saying what to change, with the open model Step1X-Edit on this machine.

Failures are `application/problem+json`: `code` is the same in every interface, and `detail` is \
one sentence that says what to change. Under `/v1/images` and `/v1/models` failures have the form \
that OpenAI's clients expect, with the same code and sentence. Every answer has an \
`X-Request-Id`, which is also in the log."""
"""The description of the whole API."""

_JSON: Final = "application/json"
_OPENAI: Final = problems.OPENAI_PATHS[0]


def description_of(app: FastAPI, defaults: Mapping[str, object]) -> dict[str, Any]:
    """The routes of `app` in OpenAPI, with the operator's defaults and the guard's answers."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {}).update(_schemas_of_failures())
        components["securitySchemes"] = {
            "API_KEY": {
                "type": "http",
                "scheme": "bearer",
                "description": "Required if the server has an API_KEY",
            }
        }
        schema["security"] = [{}, {"API_KEY": []}]
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                _add_failures(operation, method, path)
                _set_defaults(operation.get("requestBody", {}).get("content", {}), defaults)
        app.openapi_schema = schema
    return app.openapi_schema


def _add_failures(operation: dict[str, Any], method: str, path: str) -> None:
    """Add what every operation can answer, and the guard's answers to this method of a path."""
    kinds = [403, 421] if path in OPEN_PATHS else [401, 403, 408, 421]
    limited = ["rate_limited"] if method == "post" and path in WORK_PATHS else []
    failures = _failures(*kinds, *limited, "internal", path=path)
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


# --- failures -------------------------------------------------------------------------------------

_REFERENCE: Final = "#/components/schemas/{model}"

_DETAIL_OF: Final = {
    "invalid_parameter": "num_steps must be between 10 and 50, got 5",
    "unsupported_image": "the file is none of PNG, JPEG, WebP, AVIF, TIFF, BMP and GIF, "
    "or it is damaged",
    "corrupt_image": "the file is damaged or incomplete",
    "image_too_large": "at most 32 MB are allowed",
    "rate_limited": "at most 60 a minute (RATE_LIMIT), try again in 1 s",
    "queue_full": "32 edits are waiting, try again in 330 s",
    "model_unavailable": "there is nothing at MODEL_PATH",
    "deadline_exceeded": "the edit took longer than 900 s",
    "no_space": "no space left for stored jobs",
    "not_found": "0000000000078f14e45fceea167a5a36dedd4bea2543",
    "job_conflict": "job 0000000000078f14e45fceea167a5a36dedd4bea2543 has no result, it is queued",
    "model_not_found": "'v9'; /v1/models lists what there is",
    "idempotency_key": "it came with another request before; send each request with its own",
    "internal": "the request failed unexpectedly; the server's log says more",
}
"""The example of each failure, by its code."""


def _failures(*kinds: str | int, path: str = "") -> dict[int | str, dict[str, Any]]:
    """The responses for failures, each given by its code, or by its status if that is all."""
    responses: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        failure = _failure(kind)
        answer = problems.response(failure, "0123456789abcdef", path)
        media_type = answer.headers["Content-Type"]
        schema = "OpenAIFailure" if problems.is_of_openai(path) else "Problem"
        response = responses.setdefault(
            answer.status_code,
            {
                "description": failure.title,
                "content": {
                    media_type: {
                        "schema": {"$ref": _REFERENCE.format(model=schema)},
                        "examples": {},
                    }
                },
            },
        )
        if failure.title not in response["description"]:
            response["description"] += f"; {failure.title}"
        response["content"][media_type]["examples"][failure.code] = {
            "summary": failure.title,
            "value": json.loads(bytes(answer.body)),
        }
    return responses


def _failure(kind: str | int) -> problems.Failure:
    if isinstance(kind, int):
        return problems.of_status(kind)
    return problems.of_error(rebuild(kind, _DETAIL_OF.get(kind, "")))


def _schemas_of_failures() -> dict[str, Any]:
    _, found = models_json_schema(
        [(problems.Problem, "validation"), (problems.OpenAIFailure, "validation")],
        ref_template=_REFERENCE,
    )
    return dict(found["$defs"])


# --- parts ----------------------------------------------------------------------------------------

_STRING: Final = {"type": "string"}
_FILE: Final = {"schema": {"type": "string", "format": "binary"}}


def _json(description: str, answer: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """The response of a route whose schema is its `response_model`, or any object."""
    content: dict[str, Any] = {"schema": {"type": "object"}, "example": answer}
    if isinstance(answer, BaseModel):
        content = {"example": answer.model_dump(mode="json", exclude_none=True)}
    return {"description": description, "content": {_JSON: content}}


def _text(description: str, example: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"text/plain": {"schema": {"type": "string"}, "example": example}},
    }


def _parameter(
    name: str, place: str, description: str, schema: Mapping[str, Any] = _STRING, **more: object
) -> dict[str, Any]:
    return {"name": name, "in": place, "description": description, "schema": schema, **more}


def _in_path(
    name: str, description: str, example: str, schema: Mapping[str, Any] = _STRING
) -> dict[str, Any]:
    return _parameter(name, "path", description, schema, required=True, example=example)


def _sse(names: Sequence[str], description: str) -> dict[str, Any]:
    """The schema of a stream of named events, one of which is described."""
    return {
        "type": "object",
        "description": description,
        "required": ["event", "data"],
        "properties": {
            "event": {"type": "string", "enum": names},
            "data": {"type": "string", "contentMediaType": "application/json"},
        },
    }


def _fields(kind: type[BaseModel]) -> dict[str, Any]:
    """The fields of a request by name; null is expressed by leaving a field out."""
    return {
        name: _without_null(field) for name, field in kind.model_json_schema()["properties"].items()
    }


def _without_null(field: Mapping[str, Any]) -> dict[str, Any]:
    values = [value for value in field.get("anyOf", ()) if value != {"type": "null"}]
    rest = {name: value for name, value in field.items() if name != "anyOf"}
    return {**values[0], **rest} if values else rest


def _in_form(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as a form holds them: a list is one text."""
    return {
        name: {
            "type": "string",
            "title": field["title"],
            "description": f"{field['description']}. In a form: separated by commas, or a list in "
            "JSON",
        }
        if field.get("type") == "array"
        else field
        for name, field in fields.items()
    }


_IDEMPOTENCY_KEY: Final = _parameter(
    KEY,
    "header",
    "A name for this request, chosen by the client. The same request with the same name is not run "
    "again within ten minutes, but gets the same answer",
    {"type": "string", "minLength": 1, "maxLength": 255},
)


# --- editing --------------------------------------------------------------------------------------

_PICTURE_UPLOAD: Final = {
    "type": "string",
    "format": "binary",
    "description": "The picture to edit: PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF",
}
_MASK_UPLOAD: Final = {
    "type": "string",
    "format": "binary",
    "description": "A picture of the same size. Its white pixels (or, if it has transparency, its "
    "transparent pixels) may change; all others keep their exact values. Without a mask the whole "
    "picture may change",
}
_PICTURE_FORM: Final = {
    "multipart/form-data": {
        "schema": {
            **PictureRequest.model_json_schema(),
            "properties": {
                FILE: _PICTURE_UPLOAD,
                MASK: _MASK_UPLOAD,
                **_in_form(_fields(PictureRequest)),
            },
            "required": [FILE, "prompt"],
            "example": {"prompt": "change to night scene", "seed": 42},
        }
    }
}
_METADATA: Final = EditMetadata(
    prompt="change to night scene",
    num_steps=28,
    guidance_scale=6.0,
    size_level=1024,
    seed=42,
    gpu_location="GPU",
    gpu_memory_gb=41.9,
    model="v1.1",
    device="cuda:0",
    width=1536,
    height=1024,
    mode="exact",
    evaluations_done=56,
    evaluations_skipped=0,
)
_EDITED: Final = PictureAnswer(
    processing_time=15.3,
    metadata=_METADATA,
    media_type="image/png",
    image_base64="iVBORw0KGgo…",
)
_FAILURES_OF_WORK: Final = (
    "idempotency_key",
    "image_too_large",
    "queue_full",
    "model_unavailable",
    "out_of_memory",
    "deadline_exceeded",
)

EDIT_PICTURE: Final[dict[str, Any]] = {
    "operation_id": "edit_picture",
    "summary": "Edit a picture",
    "description": "Edits the picture as the prompt says. The result has the size of the input, "
    "unless `outpaint` or `upscale` enlarges it; nothing is stored on the server. The answer "
    "is `image/png` unless `Accept` names another type: `image/jpeg`, `image/webp`, "
    "`image/avif`, `image/tiff`, `image/bmp`, or `application/json` for the picture in base64 "
    "together with its parameters. Any other type gives 406. `X-Seed` is the seed that repeats "
    "the picture; with a `mask` or `outpaint`, `X-Changed-Share` is the share of the pixels "
    "that changed. Closing the connection cancels the edit.",
    "responses": {
        200: {
            "model": PictureAnswer,
            "headers": {
                "X-Seed": {
                    "description": "The seed that repeats the picture",
                    "schema": {"type": "integer"},
                },
                "X-Processing-Time": {
                    "description": "Duration of the edit in seconds",
                    "schema": {"type": "number"},
                },
                "X-Changed-Share": {
                    "description": "Share of the pixels that changed, 0 to 1, if there was a mask "
                    "or outpaint",
                    "schema": {"type": "number", "minimum": 0, "maximum": 1},
                },
            },
            "description": "The edited picture: a PNG unless `Accept` names another type",
            # The first is the default, which generated clients expect.
            "content": {
                **{output.media_type: _FILE for output in OUTPUT_FORMATS.values()},
                _JSON: {"example": _EDITED.to_dict()},
            },
        },
        **_failures(
            "unsupported_image", "invalid_parameter", "corrupt_image", *_FAILURES_OF_WORK, 406
        ),
    },
    "response_class": Response,
    "openapi_extra": {
        "requestBody": {"required": True, "content": _PICTURE_FORM},
        "parameters": [_IDEMPOTENCY_KEY],
    },
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
    "responses": {200: _json("The current status", StatusAnswer(gpu_status=_STATUS))},
}

OFFLOAD_GPU: Final[dict[str, Any]] = {
    "operation_id": "offload_gpu",
    "summary": "Move the model to host memory",
    "description": "Waits for the running edit and runs ahead of queued edits. Does nothing if the "
    "model is not on the GPU. The next edit moves it back.",
    "response_model": GpuAnswer,
    "responses": {
        200: _json("The new location", _OFFLOADED),
        **_failures("shutting_down"),
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
        **_failures("shutting_down"),
    },
}

# --- OpenAI Images --------------------------------------------------------------------------------

_IMAGE_FIELDS: Final = _fields(ImageEditRequest)
_DATA_URL: Final = {
    "type": "object",
    "properties": {
        "image_url": {"type": "string", "description": "A data URL: data:image/png;base64,…"}
    },
    "required": ["image_url"],
    "additionalProperties": False,
}
_IMAGE_BODIES: Final = {
    "multipart/form-data": {
        "schema": {
            **ImageEditRequest.model_json_schema(),
            "properties": {
                "image": _PICTURE_UPLOAD,
                "mask": _MASK_UPLOAD,
                **_in_form(_IMAGE_FIELDS),
            },
            "required": ["image", "prompt"],
            "example": {"prompt": "change to night scene", "seed": 42},
        }
    },
    _JSON: {
        "schema": {
            **ImageEditRequest.model_json_schema(),
            "properties": {
                "images": {"type": "array", "items": _DATA_URL, "minItems": 1, "maxItems": 1},
                "mask": _DATA_URL,
                **_IMAGE_FIELDS,
            },
            "required": ["images", "prompt"],
            "example": {
                "prompt": "change to night scene",
                "seed": 42,
                "images": [{"image_url": "data:image/png;base64,iVBORw0KGgo…"}],
            },
        }
    },
}
_EDITED_IMAGE: Final = {
    "id": "imgedit_0123456789abcdef01234567",
    "model": "v1.1",
    "num_inference_steps": 28,
    "guidance_scale": 6.0,
    "mode": "exact",
    "size_level": 1024,
    "inference_time_s": 15.3,
    "output_format": "png",
    "size": "1536x1024",
    "background": "opaque",
    "usage": {
        "input_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "output_tokens": 0,
        "total_tokens": 0,
    },
}
_NEW_IMAGE: Final = {
    **{name: value for name, value in _EDITED_IMAGE.items() if name != "size_level"},
    "size": "1024x1024",
    "id": "imggen_0123456789abcdef01234567",
}
_MODEL: Final = {
    "id": "step1x-edit",
    "object": "model",
    "created": 1767225600,
    "owned_by": "step1x-edit",
    "version": "v1.1",
    "location": "GPU",
}


def _images(description: str, event: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """The response with pictures, whole or as a stream of events."""
    completed = {
        "type": f"{event}.completed",
        "b64_json": "iVBORw0KGgo…",
        "created_at": 1767225617,
        "quality": "auto",
        "seed": 42,
        **about,
    }
    names = [f"{event}.partial_image", f"{event}.completed", "error"]
    pictures = [{"b64_json": "iVBORw0KGgo…", "seed": 42}]
    response = _json(description, {"created": 1767225617, "data": pictures, **about})
    response["content"][EVENT_STREAM] = {
        "schema": _sse(names, "One event, whose data is the picture or the error as JSON"),
        "example": named(completed["type"], completed),
    }
    return response


EDIT_IMAGE_OPENAI: Final[dict[str, Any]] = {
    "operation_id": "edit_image_openai",
    "summary": "Edit a picture, as OpenAI's Images API does",
    "description": "The interface of OpenAI's Images, for its clients: "
    '`OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").images.edit(…)`. `image` (or '
    "`image[]`) is the one picture to edit. The fully transparent pixels of `mask` may change, or "
    "its white pixels if it has no transparency. The body may be JSON instead of a form, with "
    '`images: [{"image_url": "data:…"}]`; a data URL alone and the name `image` are accepted as '
    "well. `num_steps` and `steps` are aliases of `num_inference_steps`, `true_cfg_scale` and "
    "`cfg_scale` of `guidance_scale`. An unsupported field is refused by name. An empty "
    "text counts as left out. With the model `step-1x-edit` the defaults and the meaning of `size` "
    "are those of StepFun's own interface: links, and an area. With `stream=true` the answer is a "
    "stream of `image_edit.partial_image` and `image_edit.completed`, or `error`. Closing the "
    "connection cancels the edit, unless the request has an `Idempotency-Key`, or comes from one "
    "of OpenAI's clients without `stream`: then the edit continues for half a minute, so that a "
    "repeated request finds it.",
    "responses": {
        200: _images("The edited picture", "image_edit", _EDITED_IMAGE),
        **_failures(
            "invalid_parameter",
            "unsupported_image",
            "corrupt_image",
            "model_not_found",
            *_FAILURES_OF_WORK,
            415,
            path=_OPENAI,
        ),
    },
    "response_class": JSONResponse,
    "openapi_extra": {
        "requestBody": {"required": True, "content": _IMAGE_BODIES},
        "parameters": [_IDEMPOTENCY_KEY],
    },
}

GENERATE_IMAGE_OPENAI: Final[dict[str, Any]] = {
    "operation_id": "generate_image_openai",
    "summary": "Make a picture from a prompt, as OpenAI's Images API does",
    "description": "Makes a picture from the prompt alone, which needs Step1X-Edit v1.1; the demo "
    "and the other versions only edit. The body is JSON, as "
    '`OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").images.generate(…)` sends it. '
    "Fields, answers, streams (of `image_generation.partial_image` and "
    "`image_generation.completed`) and what happens when the connection closes are as at "
    "`/v1/images/edits`, except that no picture is sent.",
    "responses": {
        200: _images("The picture", "image_generation", _NEW_IMAGE),
        **_failures(
            "invalid_parameter",
            "model_not_found",
            *_FAILURES_OF_WORK,
            415,
            path=_OPENAI,
        ),
    },
    "response_class": JSONResponse,
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                _JSON: {
                    "schema": {
                        **ImageGenerationRequest.model_json_schema(),
                        "properties": _fields(ImageGenerationRequest),
                        "example": {"prompt": "a red fox in the snow", "seed": 42},
                    }
                }
            },
        },
        "parameters": [_IDEMPOTENCY_KEY],
    },
}

GET_IMAGE_CONTENT: Final[dict[str, Any]] = {
    "operation_id": "get_image_content",
    "summary": "Download a picture by the link of an answer",
    "description": "The target of the links of `response_format=url`. A link is valid for an hour, "
    "or less if many are made, and until the server stops.",
    "responses": {
        200: {
            "description": "The picture, in the `output_format` of its request",
            "content": {
                OUTPUT_FORMATS[f".{name}"].media_type: {**_FILE, "example": "(bytes)"}
                for name in parameters_of(OpenAIRequest)["output_format"].choices
            },
        },
        **_failures(404, path=_OPENAI),
    },
    "response_class": Response,
    "openapi_extra": {
        "parameters": [_in_path("image_id", "The id of the picture", "img_0123456789abcdef")]
    },
}

LIST_MODELS: Final[dict[str, Any]] = {
    "operation_id": "list_models",
    "summary": "List the models, as OpenAI does",
    "description": "There is one model. Its version is known once it has been loaded.",
    "responses": {200: _json("The model", {"object": "list", "data": [_MODEL]})},
    "response_class": JSONResponse,
}

GET_MODEL: Final[dict[str, Any]] = {
    "operation_id": "get_model",
    "summary": "Get a model, as OpenAI does",
    "description": "By its name in the list, or by the name of the loaded version.",
    "responses": {
        200: _json("The model", _MODEL),
        **_failures("model_not_found", path=_OPENAI),
    },
    "response_class": JSONResponse,
    "openapi_extra": {"parameters": [_in_path("model", "The id of the model", "step1x-edit")]},
}

_ESTIMATE: Final = EstimateAnswer(
    width=1248,
    height=832,
    num_steps=28,
    guidance_scale=6.0,
    size_level=1024,
    mode="exact",
    n=1,
    predicted_seconds=15.3,
    predicted_peak_gb=41.9,
    must_load=False,
    queue_length=0,
    model="Step1X-Edit v1.1",
    device="cuda",
    reason="everything fits",
    note=None,
)
_ESTIMATE_BODY: Final = {
    _JSON: {  # a form with the same fields adds nothing
        "schema": {
            **ImageEditRequest.model_json_schema(),
            "title": "EstimateRequest",
            "description": EstimateAnswer.__doc__,
            "properties": {**_fields(PictureSize), **_IMAGE_FIELDS},
            "dependentRequired": {"width": ["height"], "height": ["width"]},
            "example": {"prompt": "change to night scene", "width": 1536, "height": 1024},
        }
    }
}

ESTIMATE_EDIT: Final[dict[str, Any]] = {
    "operation_id": "estimate_edit",
    "summary": "Estimate the cost of an edit",
    "description": "Takes the fields of an edit without the picture, as JSON or as a form with the "
    "same fields, and answers without running anything: the working size, the steps, the memory "
    "and, once such an edit has been made, the time. `width` and `height` are those of the "
    "picture; without them a square is assumed. Unknown values are null. If the model is not "
    "loaded, a separate process inspects the checkpoint; this can take a few seconds.",
    "response_model": EstimateAnswer,
    "responses": {
        200: {
            "description": "The estimate",
            "content": {
                _JSON: {"example": _ESTIMATE.model_dump(mode="json")}
            },  # null has a meaning
        },
        **_failures(
            "invalid_parameter",
            "image_too_large",
            "image_too_small",
            "image_aspect",
            "model_not_found",
            "model_unavailable",
            415,
            path=_OPENAI,
        ),
    },
    "openapi_extra": {"requestBody": {"required": True, "content": _ESTIMATE_BODY}},
}

# --- recipes --------------------------------------------------------------------------------------

_MADE_FILE: Final = {**_PICTURE_UPLOAD, "description": "A picture that was made here"}
_RECIPE: Final = RecipeAnswer(
    model="Step1X-Edit v1.1",
    prompt="change to night scene",
    parameters=HowToEdit(seed=42, loras=[]),
    input_sha256="0123456789abcdef" * 4,
    precision="bf16",
    numerics="NVIDIA H100/torch 2.13.0",
)

READ_RECIPE: Final[dict[str, Any]] = {
    "operation_id": "read_recipe",
    "summary": "Read how a picture was made",
    "description": "The file of a result contains the parameters that it was made with. With "
    "`prompt` and `parameters` as the fields of a request, and the input whose SHA-256 is "
    "`input_sha256`, the same model makes the same picture again. Nothing is run or stored.",
    "response_model": RecipeAnswer,
    "responses": {
        200: _json("The recipe", _RECIPE),
        **_failures("invalid_parameter", "no_recipe", "image_too_large", 415),
    },
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {FILE: _MADE_FILE},
                        "required": [FILE],
                        "additionalProperties": False,
                    }
                }
            },
        }
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
        "metadata": _METADATA,
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
_JOB_EVENT_DATA: Final = JobEventAnswer.model_json_schema(ref_template=_REFERENCE)
del _JOB_EVENT_DATA["$defs"]  # JobAnswer contains the same ones
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
_JOB_ID: Final = _in_path("job_id", "The id of the job", _ID)
_OF_JOB: Final = {"parameters": [_JOB_ID]}
_LIST_QUERY: Final = [
    _parameter(
        name, "query", field["description"], {k: v for k, v in field.items() if k != "description"}
    )
    for name, field in _fields(JobsRequest).items()
]
_GENERATION: Final = {
    _JSON: {
        "schema": {
            **GeneratePictureRequest.model_json_schema(),
            "example": {"prompt": "a red fox in the snow", "seed": 42},
        }
    }
}

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
        **_failures(
            "image_too_large",
            "unsupported_image",
            "invalid_parameter",
            "corrupt_image",
            "idempotency_key",
            "deadline_exceeded",
            "queue_full",
            "shutting_down",
            "no_space",
        ),
    },
    "openapi_extra": {
        "requestBody": {"required": True, "content": {**_PICTURE_FORM, **_GENERATION}},
        "parameters": [_IDEMPOTENCY_KEY],
    },
}

LIST_JOBS: Final[dict[str, Any]] = {
    "operation_id": "list_jobs",
    "summary": "List stored jobs",
    "description": "Newest first. If `has_more` is true, send the `last_id` of this answer as "
    "`after` to get the next page.",
    "response_model": JobsAnswer,
    "responses": {
        200: _json("One page of jobs", _JOBS),
        **_failures("invalid_parameter", "shutting_down"),
    },
    "openapi_extra": {"parameters": _LIST_QUERY},
}

GET_JOB: Final[dict[str, Any]] = {
    "operation_id": "get_job",
    "summary": "Get a stored job",
    "description": "`status` is `queued`, `running`, or one of the final states `succeeded`, "
    "`failed`, `cancelled` and `expired`. If the job has failed, `error` and `code` say why, as in "
    "every other interface.",
    "response_model": JobAnswer,
    "responses": {
        200: _json("The job in its current state", _SUCCEEDED),
        **_failures("not_found", "shutting_down"),
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
        **_failures("not_found", "invalid_parameter", "shutting_down"),
    },
    "response_class": StreamingResponse,
    "openapi_extra": {
        "parameters": [
            _JOB_ID,
            _parameter(
                LAST_EVENT_ID,
                "header",
                "The id of the last event that the client received",
                {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
            ),
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
            "content": {"image/png": {**_FILE, "example": "(bytes)"}},
        },
        **_failures("not_found", "job_conflict", "shutting_down"),
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
        **_failures("not_found", "shutting_down", "no_space"),
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
        **_failures("not_found", "job_conflict", "shutting_down", "no_space"),
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
_PULL_EVENT: Final = _sse(
    ["progress", "pulled", "error", "cancelled"],
    "One event: `progress` with a `PullProgressAnswer`, `pulled` with the path of the folder, "
    "`error` with the sentence and its code, or `cancelled` with a message",
)
_MODEL_NAME: Final = {"type": "string", "enum": [model.name for model in CATALOG]}
_OF_MODEL: Final = {
    "parameters": [_in_path("name", "The name of the model, as listed", "v1.1", _MODEL_NAME)]
}

LIST_PUBLISHED_MODELS: Final[dict[str, Any]] = {
    "operation_id": "list_published_models",
    "summary": "List the published models",
    "description": "For each model how much of it is on this disk and where. Also the running "
    "pull, or the last one since the server started.",
    "response_model": ModelsAnswer,
    "responses": {200: _json("The models", _MODELS)},
}

PULL_MODEL: Final[dict[str, Any]] = {
    "operation_id": "pull_model",
    "summary": "Download a published model",
    "description": "Answers with server-sent events: `progress` up to four times a second, then "
    "`pulled` with the folder for `MODEL_PATH`, `error` or `cancelled`. Closing the connection "
    "does not stop the pull; the same request again receives the events of the running pull. A "
    "pull continues from the part that is on the disk, and a complete model is not "
    "downloaded again. One model is pulled at a time.",
    "responses": {
        200: {
            "description": "The events",
            "content": {EVENT_STREAM: {"schema": _PULL_EVENT, "example": _PULL_EVENTS}},
        },
        **_failures("model_not_found", "job_conflict", "rate_limited"),
    },
    "response_class": StreamingResponse,
    "openapi_extra": _OF_MODEL,
}

STOP_PULL: Final[dict[str, Any]] = {
    "operation_id": "stop_pull",
    "summary": "Stop downloading a model",
    "description": "Answers once the pull has ended, which takes some seconds if the hub does not "
    "respond. The downloaded part is kept, and the next pull of this model continues from it.",
    "response_model": PullAnswer,
    "responses": {
        200: _json("The outcome of the pull", _STOPPED_PULL),
        **_failures("model_not_found", "job_conflict"),
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
    "edits are queued. While an edit loads the model, `loading` says how much of it was read.",
    "responses": {
        200: _json(
            "The server responds",
            {
                "status": "healthy",
                "version": __version__,
                "model_location": "Unloaded",
                "queue_length": 0,
                "loading": "reading 12.4 of 41.8 GB, about 40 s",
            },
        ),
    },
    "response_class": JSONResponse,
}

GET_LIVENESS: Final[dict[str, Any]] = {
    "operation_id": "get_liveness",
    "summary": "Check that the process is alive",
    "description": "Needs no token. Does not check whether edits are possible. If a `nonce` is "
    f"given, the header `{PROOF_HEADER}` holds the HMAC-SHA256 of the server's port and the nonce. "
    "Programs on this machine use it to recognise the server that wrote the note in DATA_DIR.",
    "responses": {200: _text("The process is alive", "ok\n")},
    "response_class": PlainTextResponse,
    "openapi_extra": {
        "parameters": [
            _parameter("nonce", "query", f"A random text of at most {MAX_NONCE} characters")
        ]
    },
}

GET_READINESS: Final[dict[str, Any]] = {
    "operation_id": "get_readiness",
    "summary": "Check whether the server would accept an edit now",
    "description": "With `?verbose` the answer has one line for each check.",
    "responses": {
        200: _text("The server would accept an edit", "ready\n"),
        **_failures("queue_full", "model_unavailable", "shutting_down"),
    },
    "response_class": PlainTextResponse,
    "openapi_extra": {
        "parameters": [
            _parameter("verbose", "query", "Report the result of each check", allowEmptyValue=True)
        ]
    },
}

GET_METRICS: Final[dict[str, Any]] = {
    "operation_id": "get_metrics",
    "summary": "Get metrics for Prometheus",
    "description": "Requests, edits, the queue and the location of the model, in the text format "
    "of Prometheus.",
    "responses": {200: _text("The metrics", "step1x_queue_length 0.0\n")},
    "response_class": PlainTextResponse,
}
