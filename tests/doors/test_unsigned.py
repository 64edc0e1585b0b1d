"""A key that stops working while the server runs costs the signature, and not the edit."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_one_request import (
    PROMPT,
    House,
    Result,
    batch_edit_images,
    edit_image,
    openai,
    page,
    rest,
    some_spandrel,
    stored_job,
    submit_edit,
)
from typer.testing import CliRunner

from certificates import certified
from fakes import FakeWorker
from http_server import TOKEN, client_of, serving
from step1x_edit.channel import EditJob
from step1x_edit.interfaces.cli import app as cli
from step1x_edit.pictures.images import read_edit_record
from step1x_edit.pictures.manifests import carries_manifest
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings

UNSIGNED = "the result is not signed: "


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server whose key works when it starts, and no longer when its first edit runs."""
    folder = tmp_path_factory.mktemp("house")
    pixels = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
    Image.fromarray(pixels).save(photo := folder / "photo.png")
    (upscaler := folder / "upscaler.pth").touch()

    def break_key(job: EditJob, step: int) -> None:
        signatory = service._result_files._signatory
        assert signatory is not None
        signatory._context.close()  # signing raises from now on

    settings = Settings(
        allowed_dirs=(tmp_path_factory.getbasetemp(),),
        lora_path={Path("look.safetensors"): 0.5},
        upscale_model=upscaler,
        _env_file=None,
        **certified(folder / "c2pa"),  # type: ignore[arg-type]
    )
    service = build_service(settings, FakeWorker(break_key, model="fake v1.2"))
    with (
        some_spandrel(),
        serving(service, allowed_dirs=(folder,)) as url,
        client_of(url) as client,
    ):
        yield House(service, url, client, photo, [], lambda _: service)
    service.close()


@pytest.mark.parametrize(
    "door", [edit_image, submit_edit, batch_edit_images, rest, stored_job, openai, page]
)
async def test_the_edit_is_answered_unsigned_and_with_a_warning(
    house: House, door: Callable[[House], Awaitable[Result]]
) -> None:
    data, metadata = await door(house)

    assert read_edit_record(data) is not None
    assert not carries_manifest(data)
    if metadata is not None:
        assert UNSIGNED in metadata["warning"]


def test_openai_s_answer_has_the_warning(house: House) -> None:
    answer = house.client.post(
        "/v1/images/edits", files={"image": house.photo.read_bytes()}, data={"prompt": PROMPT}
    ).json()

    assert UNSIGNED in answer["data"][0]["warning"]


@pytest.mark.parametrize("name", ["result.png", "result.webp"])
def test_a_command_through_the_server_says_it_too(house: House, name: str) -> None:
    words = ["--output", str(house.photo.with_name(name)), "--url", house.url, "--api-key", TOKEN]

    result = CliRunner().invoke(cli, ["edit", str(house.photo), PROMPT, "--json", *words])

    assert result.exit_code == 0, result.stderr
    assert UNSIGNED in json.loads(result.stdout)["metadata"]["warning"]
    assert read_edit_record(house.photo.with_name(name)) is not None


def test_a_command_in_this_process_says_it_too(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("step1x_edit.service.wiring.build_service", house.new_service)
    output = house.photo.with_name("local.jpg")
    words = ["--output", str(output), "--standalone"]

    result = CliRunner().invoke(cli, ["edit", str(house.photo), PROMPT, *words])

    assert result.exit_code == 0, result.stderr
    assert f"Warning: {UNSIGNED}" in " ".join(result.stderr.split())
    assert read_edit_record(output) is not None
