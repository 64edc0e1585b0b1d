"""LoRAs by name at the doors with a separate form of request, and in their answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fastmcp import Client
from typer.testing import CliRunner

from conftest import MakeService
from fakes import FakeWorker
from http_server import TOKEN, serving, until
from step1x_edit.interfaces.cli import app as cli
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.service.service import EditService

LORA_PATH = {Path("/secret/hand.safetensors"): 0.0, Path("/secret/look.safetensors"): 0.5}
WANTED = ["look:-1", "hand"]
USED = ["hand:1", "look:-1"]
KEY = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def service(make_service: MakeService) -> EditService:
    return make_service(FakeWorker(usual_loras={"look": 0.5}), lora_path=LORA_PATH)


@pytest.fixture
def url(service: EditService) -> Iterator[str]:
    with serving(service) as url:
        yield url


async def test_the_tools_take_them_and_tell_which_were_used(
    service: EditService, photo: Path
) -> None:
    asked = {"prompt": "x", "loras": json.dumps(WANTED)}
    async with Client(build_mcp(service)) as client:

        async def called(tool: str, **arguments: object) -> dict[str, Any]:
            answer = (await client.call_tool(tool, arguments)).structured_content
            assert answer is not None
            return dict(answer)

        edit = await called("edit_image", image_path=str(photo), **asked)
        usual = await called("edit_image", image_path=str(photo), prompt="x")
        batch = await called("batch_edit_images", image_paths=[str(photo)], prompts="x", loras="")
        status = (await called("get_gpu_status"))["gpu_status"]
        job_id = (await called("submit_edit", image_path=str(photo), **asked))["job_id"]
        later = await called("get_job", job_id=job_id)

    assert edit["metadata"]["loras"] == later["metadata"]["loras"] == USED
    assert edit["metadata"]["model"] == "fake with LoRA hand 1, look -1"
    assert usual["metadata"]["loras"] == ["look:0.5"]
    assert "loras" not in batch["results"][0]["result"]["metadata"]
    assert status["loras"] == ["hand", "look"]
    assert "loras_in_model" not in status
    assert "secret" not in json.dumps([edit, status])


def test_openais_client_says_them_in_a_form(url: str, photo: Path) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client:

        def told(**fields: object) -> Any:
            answer = client.images.edit(image=photo, prompt="x", extra_body=fields)
            return (answer.model_extra or {}).get("loras")

        assert told(loras=WANTED) == USED
        assert told(loras="look:-1, hand") == USED
        assert told(loras="") is None
        assert told() == ["look:0.5"]
        with pytest.raises(
            openai.BadRequestError, match="loras has 'hnd', which is not here"
        ) as no:
            told(loras=["hnd"])
        assert no.value.param == "loras"
        with pytest.raises(openai.BadRequestError, match="'loras' is given twice"):
            client.images.edit(image=photo, prompt="x", extra_body={"loras": "a", "loras[]": "b"})


def test_a_stored_job_keeps_what_it_was_asked_for(url: str, photo: Path) -> None:
    fields = {"prompt": "x", "loras": ",".join(WANTED)}
    with httpx2.Client(base_url=url, headers=KEY, timeout=240) as client:
        sent = client.post("/v1/jobs", files={"file": photo.read_bytes()}, data=fields).json()
        path = f"/v1/jobs/{sent['id']}"
        until(lambda: client.get(path).json()["status"] == "succeeded")
        job = client.get(path).json()
        wrong = client.post(
            "/v1/jobs", files={"file": photo.read_bytes()}, data={**fields, "loras": "no"}
        )

    assert job["request"]["loras"] == ["look:-1", "hand:1"]
    assert job["metadata"]["loras"] == USED
    assert wrong.status_code == 422
    assert wrong.json()["detail"].startswith("Invalid parameter: loras has 'no'")


def test_the_command_line_asks_a_server_for_them_and_shows_which_it_has(
    url: str, photo: Path, tmp_path: Path
) -> None:
    way = ["--url", url, "--api-key", TOKEN]
    words = ["batch", str(photo.parent), "--prompt", "x", "--output-dir", str(tmp_path / "out")]

    def said(*more: str) -> str:
        done = CliRunner().invoke(cli, [*words, *way, "--json", *more])
        assert done.exit_code == 0, done.output
        (item,) = json.loads(done.stdout)["results"]
        return f"{item['result']['metadata'].get('loras')} {item['result']['message']}"

    lora = [word for each in WANTED for word in ("--lora", each)]
    assert said(*lora) == f"{USED} Image edited successfully"
    assert said(*lora) == f"{USED} Kept from an earlier run"
    shown = CliRunner().invoke(cli, ["status", *way]).stdout
    assert said("--lora", "") == "None Image edited successfully"

    assert [line.split(maxsplit=1) for line in shown.splitlines() if line.startswith("lora")] == [
        ["loras", "hand, look"],
        ["loras_in_model", "hand:1, look:-1"],
    ]
