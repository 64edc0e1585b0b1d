"""How a picture was made is read from its file at every door, and leads to the same file again."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastmcp import Client
from PIL import Image

from conftest import MakeService
from fakes import NUMERICS, FakeWorker
from http_server import TOKEN, serving
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.pictures.images import Picture, encode
from step1x_edit.schemas.requests import EditRecord, HowToEdit
from step1x_edit.service.service import EditService

ASKED = {"num_steps": 11, "size_level": 512, "seed": 7, "mode": "turbo", "loras": ["look:0.5"]}


@pytest.fixture
def service(make_service: MakeService) -> EditService:
    return make_service(
        FakeWorker(usual_loras={"usual": 1.0}),
        model_version="v1.1",
        lora_path={Path("look.safetensors"): 0, Path("usual.safetensors"): 1},
        default_num_steps=20,
        default_mode="fast",
    )


@pytest.fixture
def client(service: EditService) -> Iterator[httpx2.Client]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with (
        serving(service) as url,
        httpx2.Client(base_url=url, headers=headers, timeout=240, trust_env=False) as client,
    ):
        yield client


async def called(service: EditService, tool: str, **arguments: Any) -> dict[str, Any]:
    async with Client(build_mcp(service)) as client:
        result = await client.call_tool(tool, arguments, raise_on_error=False)
    assert isinstance(result.structured_content, dict)
    return result.structured_content


async def test_an_edit_is_repeated_from_its_recipe_through_mcp_and_rest(
    service: EditService, client: httpx2.Client, photo: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made.png"
    await called(
        service, "edit_image", image_path=str(photo), prompt="x", output_path=str(made), **ASKED
    )

    recipe = await called(service, "read_recipe", image_path=str(made))
    sent = client.post("/v1/recipes/read", files={"file": made.read_bytes()})

    assert sent.json() == recipe
    assert recipe == {
        "status": "success",
        "model": "fake with LoRA look 0.5",
        "prompt": "x",
        "parameters": {**HowToEdit().model_dump(), **ASKED},
        "input_sha256": hashlib.sha256(photo.read_bytes()).hexdigest(),
        "arithmetic": "fp32 avx2",
        "numerics": NUMERICS,
    }
    asked = {"prompt": recipe["prompt"], **recipe["parameters"]}
    again = await called(service, "edit_image", image_path=str(photo), **asked)
    assert Path(again["output_path"]).read_bytes() == made.read_bytes()
    form = {name: json.dumps(v) if isinstance(v, list) else str(v) for name, v in asked.items()}
    by_rest = client.post("/api/edit", files={"file": photo.read_bytes()}, data=form)
    assert by_rest.content == made.read_bytes()


async def test_a_recipe_without_loras_asks_for_none_and_no_default_gets_in(
    service: EditService, photo: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made.jpg"
    asked = {"num_steps": 28, "mode": "exact", "loras": [], "seed": 1}
    await called(
        service, "edit_image", image_path=str(photo), prompt="x", output_path=str(made), **asked
    )

    parameters = (await called(service, "read_recipe", image_path=str(made)))["parameters"]

    assert {name: parameters[name] for name in asked} == asked


async def test_a_generated_picture_is_repeated_from_its_recipe(
    service: EditService, client: httpx2.Client, tmp_path: Path
) -> None:
    made = tmp_path / "fox.png"
    asked = {"prompt": "a fox", "width": 256, "height": 512, "seed": 7}
    await called(service, "generate_image", output_path=str(made), **asked)

    recipe = client.post("/v1/recipes/read", files={"file": made.read_bytes()}).json()
    parameters = {"prompt": recipe["prompt"], **recipe["parameters"]}
    again = await called(
        service, "generate_image", output_path=str(tmp_path / "again.png"), **parameters
    )

    assert "input_sha256" not in recipe
    assert Path(again["output_path"]).read_bytes() == made.read_bytes()


async def test_a_picture_without_a_recipe_is_told_in_one_sentence_at_both_doors(
    service: EditService, client: httpx2.Client, photo: Path
) -> None:
    by_mcp = await called(service, "read_recipe", image_path=str(photo))
    by_rest = client.post("/v1/recipes/read", files={"file": photo.read_bytes()})
    of_text = client.post("/v1/recipes/read", files={"file": b"no picture"})
    with_more = client.post(
        "/v1/recipes/read", files={"file": photo.read_bytes()}, data={"prompt": "x"}
    )

    sentence = (
        "No recipe: this is no picture that step1x-edit made, or its metadata has been removed"
    )
    assert by_mcp == {"status": "error", "error": sentence, "code": "no_recipe"}
    assert (by_rest.status_code, by_rest.json()["detail"]) == (422, sentence)
    assert of_text.json()["code"] == "no_recipe"
    assert with_more.json()["detail"] == (
        "Invalid parameter: only 'file' is read here; leave out the other fields"
    )


@pytest.mark.parametrize("loras", [["look:99"], ["look:nan"], [f"look{i}:1" for i in range(17)]])
async def test_a_record_with_loras_that_no_edit_accepts_is_refused_at_both_doors(
    service: EditService, client: httpx2.Client, tmp_path: Path, loras: list[str]
) -> None:
    """A server may add more LoRAs than a request can name, and anyone can write a record."""
    record = EditRecord(model="demo", prompt="x", seed=1, loras=loras)
    made = tmp_path / "made.png"
    made.write_bytes(encode(Picture(np.zeros((16, 16, 3), np.uint8)), ".png", record))

    by_mcp = await called(service, "read_recipe", image_path=str(made))
    by_rest = client.post("/v1/recipes/read", files={"file": made.read_bytes()})

    assert by_mcp["error"] == "No recipe: the LoRAs of its record are not accepted by an edit"
    assert (by_rest.status_code, by_rest.json()["detail"]) == (422, by_mcp["error"])


async def test_one_input_has_one_hash_at_every_door(
    service: EditService, client: httpx2.Client, photo: Path
) -> None:
    """OpenAI's interface gets it in base64."""
    Image.open(photo).save(photo.with_suffix(".webp"), lossless=True)
    data = photo.with_suffix(".webp").read_bytes()
    sent = client.post("/v1/images/edits", files={"image": data}, data={"prompt": "x"})
    in_json = client.post(
        "/v1/images/edits",
        json={
            "prompt": "x",
            "images": [{"image_url": f"data:image/webp;base64,{base64.b64encode(data).decode()}"}],
        },
    )
    for answer in (sent, in_json):
        made = base64.b64decode(answer.json()["data"][0]["b64_json"])
        recipe = client.post("/v1/recipes/read", files={"file": made}).json()
        assert recipe["input_sha256"] == hashlib.sha256(data).hexdigest()
