"""Parameters are read leniently, refused in plain words, and described in one place."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError, validate_call

import step1x_edit
from step1x_edit import errors
from step1x_edit.errors import ImageFileNotFoundError, InvalidParameterError, Step1XEditError
from step1x_edit.schemas import requests
from step1x_edit.schemas.answers import (
    BatchAnswer,
    BatchItem,
    EditAnswer,
    EditMetadata,
    ErrorAnswer,
    GpuAnswer,
    GpuStatistics,
    GpuStatus,
    StatusAnswer,
)
from step1x_edit.schemas.complaints import invalid_parameter
from step1x_edit.schemas.openai import ImageEditRequest
from step1x_edit.schemas.parameters import parameters_of
from step1x_edit.schemas.requests import (
    PARAMETERS,
    BatchRequest,
    EditRequest,
    GenerateRequest,
    NumSteps,
    PictureRequest,
    ViewRequest,
    read_request,
)

EDIT = {"image_path": "cat.jpg", "prompt": "add a red hat"}
STATUS = GpuStatus(
    model_location="CPU",
    idle_time=45.2,
    idle_timeout=60,
    gpu_memory_allocated_gb=0.12,
    gpu_memory_reserved_gb=0.5,
    auto_monitor_running=True,
    statistics=GpuStatistics(total_loads=5, gpu_to_cpu=5, cpu_to_gpu=4, full_releases=1),
)


def refusal(model: type[EditRequest] | type[BatchRequest], values: dict[str, Any]) -> str:
    with pytest.raises(InvalidParameterError) as caught:
        read_request(model, values)
    return str(caught.value)


def subclasses(root: type[Step1XEditError]) -> list[type[Step1XEditError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in subclasses(child))]


# --- requests ---


def test_the_parameters_and_defaults_are_those_of_the_contract() -> None:
    contract = {
        "image_path": "cat.jpg",
        "prompt": "add a red hat",
        "output_path": None,
        "num_steps": 28,
        "guidance_scale": 6.0,
        "size_level": 1024,
        "seed": None,
        "overwrite": False,
        "negative_prompt": "",
        "mask_path": None,
        "loras": None,
        "mode": "exact",
        "upscale": 1,
        "thinking": False,
        "reflection": False,
        "reflection_rounds": 3,
        "region": "whole",
        "outpaint": "",
    }
    assert read_request(EditRequest, EDIT).model_dump() == contract
    for model in (BatchRequest, PictureRequest, ImageEditRequest):
        assert model.model_fields["thinking"].default is False
        assert model.model_fields["reflection"].default is False
        assert model.model_fields["reflection_rounds"].default == 3
    for tool in (EditRequest, BatchRequest, PictureRequest):
        assert list(parameters_of(tool))[-1] == "outpaint"
    assert list(parameters_of(EditRequest)) == list(contract)
    assert list(parameters_of(BatchRequest))[:3] == ["image_paths", "prompts", "output_dir"]
    assert EditRequest.model_json_schema()["required"] == ["image_path", "prompt"]


def test_the_schema_shows_ranges_and_no_leniency() -> None:
    properties = EditRequest.model_json_schema()["properties"]
    steps, scale, size = (
        properties[name] for name in ("num_steps", "guidance_scale", "size_level")
    )
    assert (steps["type"], steps["minimum"], steps["maximum"]) == ("integer", 10, 50)
    assert (scale["type"], scale["minimum"], scale["maximum"]) == ("number", 1.0, 15.0)
    assert (size["type"], size["enum"]) == ("integer", [512, 768, 1024])
    assert properties["seed"]["anyOf"] == [
        {"type": "integer", "minimum": -1, "maximum": 2**32 - 1},
        {"type": "null"},
    ]
    paths = BatchRequest.model_json_schema()["properties"]["image_paths"]
    assert paths["type"] == "array"
    assert all("description" in schema for schema in properties.values())


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("num_steps", "28", 28),
        ("num_steps", 28.0, 28),
        ("num_steps", 10, 10),
        ("num_steps", 50, 50),
        ("guidance_scale", "7.5", 7.5),
        ("guidance_scale", 1, 1.0),
        ("guidance_scale", 15, 15.0),
        ("size_level", "768", 768),
        ("size_level", 512.0, 512),
        ("seed", 0, 0),
        ("seed", "7", 7),
        ("seed", 2**32 - 1, 2**32 - 1),
        ("seed", -1, None),
        ("seed", None, None),
        ("overwrite", "true", True),
        ("thinking", "true", True),
        ("reflection", "False", False),
        ("reflection_rounds", "2", 2),
        ("reflection_rounds", 1.0, 1),
        ("prompt", "", ""),
        ("prompt", "x" * 4000, "x" * 4000),
        ("image_path", Path("cat.jpg"), "cat.jpg"),
        ("output_path", None, None),
    ],
)
def test_what_callers_mean_is_understood(name: str, value: object, read: object) -> None:
    found = getattr(read_request(EditRequest, {**EDIT, name: value}), name)
    assert found == read
    assert type(found) is type(read)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("num_steps", 5, "num_steps must be between 10 and 50, got 5"),
        ("num_steps", 51, "num_steps must be between 10 and 50, got 51"),
        ("num_steps", 28.5, "num_steps must be a whole number between 10 and 50, got 28.5"),
        ("num_steps", True, "num_steps must be a whole number between 10 and 50, got true"),
        ("num_steps", None, "num_steps must be a whole number between 10 and 50, got null"),
        ("num_steps", "many", "num_steps must be a whole number between 10 and 50, got 'many'"),
        ("num_steps", 1 << 900, "num_steps must be between 10 and 50, got a huge number"),
        ("guidance_scale", 0.5, "guidance_scale must be between 1 and 15, got 0.5"),
        ("guidance_scale", "nan", "guidance_scale must be a number between 1 and 15, got nan"),
        ("guidance_scale", "inf", "guidance_scale must be a number between 1 and 15, got inf"),
        ("guidance_scale", False, "guidance_scale must be a number between 1 and 15, got false"),
        ("size_level", 600, "size_level must be 512, 768 or 1024, got 600"),
        ("size_level", "big", "size_level must be 512, 768 or 1024, got 'big'"),
        ("size_level", True, "size_level must be 512, 768 or 1024, got true"),
        ("seed", -2, "seed must be between -1 and 4294967295, got -2"),
        ("seed", 2**32, "seed must be between -1 and 4294967295, got 4294967296"),
        ("seed", True, "seed must be a whole number between -1 and 4294967295, got true"),
        ("prompt", "x" * 4001, "prompt must have at most 4000 characters, got 4001"),
        ("prompt", "a\0b", "prompt must not contain a NUL character"),
        ("prompt", "\ud800", "prompt must be valid Unicode text"),
        ("prompt", 5, "prompt must be a text, got 5"),
        ("image_path", "", "image_path must not be empty"),
        ("image_path", "a\0", "image_path must not contain a NUL character"),
        ("image_path", ["a"], "image_path must be a text, got a list of 1"),
        ("mask_path", "", "mask_path must not be empty"),
        ("mask_path", 5, "mask_path must be a text, got 5"),
        ("mask", "m.png", "'mask' is unknown, did you mean mask_path?"),
        ("overwrite", "perhaps", "overwrite must be true or false, got 'perhaps'"),
        ("thinking", "much", "thinking must be true or false, got 'much'"),
        ("reflect", True, "'reflect' is unknown, did you mean reflection?"),
        ("num_step", 20, "'num_step' is unknown, did you mean num_steps?"),
        ("bogus", 20, "'bogus' is unknown"),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(name: str, value: object, sentence: str) -> None:
    assert refusal(EditRequest, {**EDIT, name: value}) == f"Invalid parameter: {sentence}"


def test_everything_that_is_wrong_is_said_at_once() -> None:
    sentence = refusal(EditRequest, {"image_path": "a", "num_steps": 5, "nope": 1})
    assert sentence == (
        "Invalid parameter: prompt is missing; num_steps must be between 10 and 50, got 5; "
        "'nope' is unknown"
    )


@pytest.mark.parametrize(
    ("paths", "prompts", "each"),
    [
        (["a", "b"], "hat", ["hat", "hat"]),
        (["a", "b"], ["hat", "fog"], ["hat", "fog"]),
        ('["a", "b"]', '["hat", "fog"]', ["hat", "fog"]),
        (("a",), "[sic] a hat", ["[sic] a hat"]),
    ],
)
def test_a_batch_has_a_prompt_for_each_image(
    paths: object, prompts: object, each: list[str]
) -> None:
    request = read_request(BatchRequest, {"image_paths": paths, "prompts": prompts})
    assert [one.prompt for one in request.each()] == each
    assert len(request.image_paths) == len(each)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"image_paths": []}, "image_paths must not be empty"),
        ({"image_paths": "a.png"}, "image_paths must be a list of texts, got 'a.png'"),
        ({"image_paths": ["a", 3]}, "image_paths[1] must be a text, got 3"),
        ({"prompts": 5}, "prompts must be a text or a list of texts"),
        ({"prompts": ["x", None]}, "prompts[1] must be a text, got null"),
        ({"prompts": ["x" * 4001, ""]}, "prompts[0] must have at most 4000 characters, got 4001"),
        (
            {"prompts": ["x"]},
            "prompts must be one text or a list of 2, one for each of image_paths, got 1",
        ),
        # A mask belongs to one picture.
        ({"mask_path": "m.png"}, "'mask_path' is unknown, did you mean image_paths?"),
    ],
)
def test_what_is_wrong_with_a_batch_is_said(values: dict[str, Any], sentence: str) -> None:
    given = {"image_paths": ["a", "b"], "prompts": "x", **values}
    assert refusal(BatchRequest, given) == f"Invalid parameter: {sentence}"


def test_the_types_work_as_parameters_of_a_function() -> None:
    @validate_call
    def tool(num_steps: NumSteps = 28) -> int:
        return num_steps

    assert tool("30") == 30  # type: ignore[arg-type]
    with pytest.raises(ValidationError) as caught:
        tool(num_step=5)  # type: ignore[call-arg]
    assert "did you mean num_steps" in str(invalid_parameter(caught.value, PARAMETERS))
    assert TypeAdapter(NumSteps).json_schema()["maximum"] == 50


def test_plain_values_come_from_the_schema() -> None:
    steps, size, seed = (PARAMETERS[name] for name in ("num_steps", "size_level", "seed"))
    assert (steps.minimum, steps.maximum, steps.default) == (10, 50, 28)
    assert (size.choices, size.default) == ((512, 768, 1024), 1024)
    assert (seed.minimum, seed.maximum, seed.default) == (-1, 2**32 - 1, None)
    assert set(PARAMETERS) == {
        *EditRequest.model_fields,
        *BatchRequest.model_fields,
        *GenerateRequest.model_fields,
        *ViewRequest.model_fields,
    }


# --- answers ---


def edited() -> EditAnswer:
    return EditAnswer(
        output_path="/path/to/output.jpg",
        processing_time=15.3,
        metadata=EditMetadata(
            prompt="add a red hat",
            num_steps=28,
            guidance_scale=6.0,
            size_level=1024,
            seed=42,
            gpu_location="CPU",
            gpu_memory_gb=0.5,
        ),
    )


def test_the_answers_are_those_of_the_contract() -> None:
    assert json.dumps(edited().to_dict()) == json.dumps(
        {
            "status": "success",
            "message": "Image edited successfully",
            "output_path": "/path/to/output.jpg",
            "processing_time": 15.3,
            "metadata": {
                "prompt": "add a red hat",
                "num_steps": 28,
                "guidance_scale": 6.0,
                "size_level": 1024,
                "seed": 42,
                "gpu_location": "CPU",
                "gpu_memory_gb": 0.5,
            },
        }
    )
    assert json.dumps(StatusAnswer(gpu_status=STATUS).to_dict()) == (
        '{"status": "success", "gpu_status": {"model_location": "CPU", "idle_time": 45.2, '
        '"idle_timeout": 60, "gpu_memory_allocated_gb": 0.12, "gpu_memory_reserved_gb": 0.5, '
        '"auto_monitor_running": true, "statistics": {"total_loads": 5, "gpu_to_cpu": 5, '
        '"cpu_to_gpu": 4, "full_releases": 1}}}'
    )
    released = GpuAnswer(message="GPU released.", gpu_status=STATUS).to_dict()
    assert list(released) == ["status", "message", "gpu_status"]


def test_an_error_answer_tells_the_error_and_its_code() -> None:
    assert ErrorAnswer.of(ImageFileNotFoundError("/path/to/image.jpg")).to_dict() == {
        "status": "error",
        "error": "Image file not found: /path/to/image.jpg",
        "code": "file_not_found",
    }
    busy = errors.ServerBusyError("32 edits are waiting", retry_after_s=12.0)
    assert ErrorAnswer.of(busy).to_dict()["retry_after_s"] == 12.0


@pytest.mark.parametrize(
    ("good", "bad", "status"), [(3, 0, "success"), (2, 1, "partial"), (0, 3, "error")]
)
def test_a_batch_says_how_many_succeeded(good: int, bad: int, status: str) -> None:
    failed = ErrorAnswer.of(ImageFileNotFoundError("x.jpg"))
    items = [BatchItem(input=f"{i}.jpg", result=edited()) for i in range(good)]
    items += [BatchItem(input="x.jpg", result=failed) for _ in range(bad)]
    answer = BatchAnswer.of(items).to_dict()
    assert answer["status"] == status
    assert answer["message"] == f"Processed 3 images: {good} succeeded, {bad} failed"
    assert answer["summary"] == {"total": 3, "successes": good, "failures": bad}
    assert [item["input"] for item in answer["results"]] == [item.input for item in items]
    assert ("error" in answer) == (status == "error")
    assert BatchAnswer.model_validate(answer).to_dict() == answer


# --- errors ---


@pytest.mark.parametrize("kind", subclasses(Step1XEditError))
def test_every_error_is_one_safe_line(kind: type[Step1XEditError]) -> None:
    nasty = "a\nb\x1b[31m\u202e <PIL at 0x7f12ab34cd56> " + "x" * 9000
    sentence = str(kind(nasty))
    assert sentence.startswith(f"{kind.beginning}: a b")
    assert sentence.isprintable()
    assert "0x7f12" not in sentence
    assert len(sentence) == kind.max_length
    assert str(kind()) == kind.beginning


@pytest.mark.parametrize("kind", subclasses(Step1XEditError))
def test_every_error_survives_the_way_to_another_process(kind: type[Step1XEditError]) -> None:
    error = pickle.loads(pickle.dumps(kind("why", retry_after_s=3.0)))
    assert (type(error), str(error)) == (kind, f"{kind.beginning}: why")
    assert error.retry_after_s == 3.0
    assert str(kind(str(error))) == str(error)


def test_the_tree_on_top_of_the_module_is_the_tree() -> None:
    drawn = [line for line in str(errors.__doc__).splitlines() if "──" in line]
    kinds = {kind.__name__: kind for kind in subclasses(Step1XEditError)}
    for line in drawn:
        name, *rest = line.lstrip(" │├└─").split(maxsplit=2)
        if rest:
            assert rest[0] == kinds[name].code
            assert rest[1].removesuffix(": …") == kinds[name].beginning
    assert len(drawn) == len(kinds) - 1


# --- the package ---


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, step1x_edit; before = set(sys.modules); "
        "assert 'pydantic' not in before; "
        "[getattr(step1x_edit, name) for name in step1x_edit.__all__ if name != 'MCPClient']; "
        "assert 'torch' not in sys.modules and 'fastmcp' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_can_be_fetched() -> None:
    assert step1x_edit.EditRequest is requests.EditRequest
    assert set(step1x_edit.__all__) <= {*dir(step1x_edit)}
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = step1x_edit.nope


def test_only_a_parameter_of_this_request_is_suggested() -> None:
    with pytest.raises(InvalidParameterError, match=r"'image_path' is unknown$"):
        read_request(PictureRequest, {"prompt": "x", "image_path": "a.png"})
    with pytest.raises(InvalidParameterError, match="'image_path' is unknown, did you mean image_"):
        read_request(BatchRequest, {"image_paths": ["a"], "prompts": "x", "image_path": "a.png"})


def test_a_list_in_a_text_that_is_nested_too_deeply_is_no_list() -> None:
    with pytest.raises(InvalidParameterError, match=r"loras\[0\] must have at most"):
        read_request(EditRequest, {"image_path": "a.png", "prompt": "x", "loras": "[" * 100_000})
