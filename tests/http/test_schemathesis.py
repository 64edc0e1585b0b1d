"""Whatever is sent to the routes, they answer as their own description says.

Requests are made up from the OpenAPI description, valid and invalid ones, and sent to a real server
whose edits are instant. `SCHEMATHESIS_EXAMPLES=500 pytest tests/http/test_schemathesis.py` looks
longer.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any

import httpx2
import hypothesis
import pytest
import schemathesis
from huggingface_hub import constants
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from extent import by_extent
from fakes import FakeWorker
from http_server import TOKEN, serving
from step1x_edit.engine.machine import Survey
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings
from write_openapi import FILE

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", by_extent("4", "8")))
"""Made-up requests for each operation."""

KEY = {"Authorization": f"Bearer {TOKEN}"}


def _picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), "teal").save(file, "PNG")
    return file.getvalue()


PICTURE = _picture()

# Random bytes are never a picture; without pictures no edit would ever begin.
schemathesis.openapi.format("binary", st.just(PICTURE) | st.binary())

LONG = hypothesis.settings(max_examples=EXAMPLES, deadline=None, database=None)

api = schemathesis.openapi.from_path(FILE)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("pictures")
    # Without room there would be "Server busy" at times; v1.1 can generate.
    room: dict[str, Any] = {"max_queue": 1_000_000, "model_version": "v1.1"}
    settings = Settings(allowed_dirs=(folder,), _env_file=None, **room)
    service = build_service(settings, FakeWorker(), take_survey=Survey)
    with pytest.MonkeyPatch.context() as patch, serving(service, **room) as url:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)  # models are asked for, and not fetched
        yield url
    service.close()


def a_new_job(url: str) -> str:
    picture = {"file": ("photo.png", PICTURE)}
    fields = {"prompt": "x", "num_steps": "10"}
    answer = httpx2.post(f"{url}/v1/jobs", files=picture, data=fields, headers=KEY, timeout=240)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


@api.parametrize()
@LONG
def test_every_answer_is_as_described(case: schemathesis.Case[Any], url: str) -> None:
    excluded: list[CheckFunction] = []
    if isinstance(case.body, dict):
        # In a form true is the text "true" and an empty list is nothing at all: both may be right.
        excluded.append(negative_data_rejection)
        body: dict[str, Any] = case.body
        # Any bytes are a file to the description, and any name is a LoRA's.
        if body.get("file") != PICTURE or body.get("loras"):
            excluded.append(positive_data_acceptance)
    case.call_and_validate(url, headers=KEY, timeout=240, excluded_checks=excluded)


@api.include(path_regex="job_id").parametrize()
@LONG
def test_every_answer_about_a_job_that_there_is_is_as_described(
    case: schemathesis.Case[Any], url: str
) -> None:
    case.path_parameters["job_id"] = a_new_job(url)

    case.call_and_validate(url, headers=KEY, timeout=240)
