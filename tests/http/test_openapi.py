"""The REST routes are described in full, and their page loads nothing from elsewhere."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from conftest import MakeService
from http_server import calling
from step1x_edit.interfaces.http.guard import WORK_PATHS
from step1x_edit.schemas.openai import ImageEditRequest
from step1x_edit.schemas.parameters import parameters_of
from step1x_edit.schemas.requests import PARAMETERS, PictureRequest
from write_openapi import FILE, openapi

DESCRIBED = json.loads(FILE.read_text("utf-8"))
OPERATIONS = [
    pytest.param(path, method, operation, id=f"{method} {path}")
    for path, operations in DESCRIBED["paths"].items()
    for method, operation in operations.items()
]


def test_the_file_is_what_the_server_tells() -> None:
    assert FILE.read_text("utf-8") == openapi(), "run make openapi"


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_every_operation_is_described_with_examples_and_errors(
    path: str, method: str, operation: dict[str, Any]
) -> None:
    responses = operation["responses"]
    successes = {status: answer for status, answer in responses.items() if status < "300"}
    failures = {status: answer for status, answer in responses.items() if status >= "300"}

    assert operation["summary"]
    assert len(operation["tags"]) == 1
    assert ("security" in operation) == (path == "/livez")
    assert operation["description"].endswith(".")
    assert successes
    for status, answer in successes.items():
        assert any("example" in content for content in answer.get("content", {}).values()) or (
            status == "204"
        )
    assert ("401" in failures) == (path != "/livez")
    assert {"403", "421", "500"} <= failures.keys()
    starts_work = path in WORK_PATHS or path.endswith("/pull")
    assert ("429" in failures) == (starts_work and method == "post")
    for status, answer in failures.items():
        ((kind, content),) = answer["content"].items()
        schema, is_of_openai = content["schema"], path.startswith(("/v1/images", "/v1/models"))
        if is_of_openai:
            assert kind == "application/json"
            assert schema == {"$ref": "#/components/schemas/OpenAIFailure"}
        else:
            assert kind == "application/problem+json"
            assert schema == {"$ref": "#/components/schemas/Problem"}
        for code, example in content["examples"].items():
            told = example["value"]["error"] if is_of_openai else example["value"]
            assert told["code"] == code
            assert is_of_openai or str(told["status"]) == status


def references_in(value: Any) -> list[str]:
    """Each `$ref` anywhere in a document."""
    if isinstance(value, list):
        return [found for each in value for found in references_in(each)]
    if not isinstance(value, dict):
        return []
    own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
    return own + [found for each in value.values() for found in references_in(each)]


def test_every_reference_leads_to_a_schema() -> None:
    found = set(references_in(DESCRIBED))

    assert "#/components/schemas/WrongField" in found
    for reference in found:
        target: Any = DESCRIBED
        for name in reference.removeprefix("#/").split("/"):
            target = target[name]
        assert "type" in target


def test_the_first_kind_of_an_answer_is_the_default() -> None:
    answer = DESCRIBED["paths"]["/api/edit"]["post"]["responses"]["200"]

    first, *_, last = answer["content"]
    assert (first, last) == ("image/png", "application/json")
    assert answer["content"][last]["schema"] == {"$ref": "#/components/schemas/PictureAnswer"}


@pytest.mark.parametrize("path", ["/api/edit", "/v1/jobs"])
def test_the_form_is_that_of_the_schema(path: str) -> None:
    body = DESCRIBED["paths"][path]["post"]["requestBody"]
    form = body["content"]["multipart/form-data"]["schema"]

    assert list(form["properties"]) == ["file", "mask", *parameters_of(PictureRequest)]
    assert form["required"] == ["file", "prompt"]
    for name in PictureRequest.model_fields:
        assert form["properties"][name]["description"].startswith(PARAMETERS[name].description)
    assert form["properties"]["num_steps"]["maximum"] == PARAMETERS["num_steps"].maximum


def test_the_form_of_openai_is_that_of_the_schema() -> None:
    body = DESCRIBED["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    form = body["multipart/form-data"]["schema"]
    whole = body["application/json"]["schema"]

    assert list(form["properties"]) == ["image", "mask", *parameters_of(ImageEditRequest)]
    assert list(whole["properties"]) == ["images", "mask", *parameters_of(ImageEditRequest)]
    assert form["required"] == ["image", "prompt"]
    assert form["properties"]["n"]["maximum"] == 10
    assert form["properties"]["num_inference_steps"]["default"] == 28
    assert all("description" in field for field in form["properties"].values())


def test_the_page_loads_nothing_from_elsewhere(make_service: MakeService) -> None:
    with calling(make_service()) as client:
        page = client.get("/docs")
        links = re.findall(r'(?:src|href)="([^"]*)"', page.text)
        parts = {link: client.get(link) for link in links}
        described = client.get("/openapi.json")

    policy = page.headers["content-security-policy"]
    assert "http" not in policy
    assert "'unsafe-eval'" not in policy
    assert len(links) == 4
    assert all(link.startswith("/") for link in links)
    assert not re.search(r"<script>|<style>|\bon\w+=", page.text)
    for part in parts.values():
        assert part.status_code == 200
        assert part.content
    styles = parts["/docs/swagger-ui.css"].text
    assert re.findall(r"@import|url\(\s*[\"']?(?!data:|[\"'])[^)]{0,20}", styles) == []
    assert '"/openapi.json"' in parts["/docs/start.js"].text
    assert described.json() == DESCRIBED
