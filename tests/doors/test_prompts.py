"""What prompts may hold, through the REST routes to a small model of the published kind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from extent import by_extent
from http_server import TOKEN, calling
from layouts import narrow_pipeline, write_published
from step1x_edit import MCPClient
from step1x_edit.interfaces.cli import app
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings
from tiny import VAE, a_picture, tiny_tokenizer

TEXT_LENGTH, IMAGE_TOKENS = 640, 324
"""Positions that v1.1 keeps, and how many of them a square picture takes."""

HEAD = ":Picture 1: <|vision_start|><|vision_end|>"
"""What is kept of the chat text before the prompt, beside the picture."""

ROOM = TEXT_LENGTH - IMAGE_TOKENS - len(tiny_tokenizer().encode(HEAD).ids)
"""Tokens of the longest prompt that is read to its end."""

CUT = "was cut: this checkpoint reads at most 640 tokens of picture and prompt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of the model, and a photograph."""
    folder = tmp_path_factory.mktemp("prompts")
    write_published(folder / "model", narrow_pipeline(1, 1, vae_sizes=VAE))
    Image.fromarray(a_picture(48, 48)).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx2.Client]:
    """A client of a server whose worker is a process with the model."""
    given = {"model_path": folder / "model", "device": "cpu", "allowed_dirs": (folder,)}
    settings = Settings(_env_file=None, **given)  # type: ignore[arg-type]
    with contextlib.closing(build_service(settings)) as service, calling(service) as client:
        yield client


Told = tuple[bytes, str | None]
"""The pixels of a picture and the warning that came with it."""

Ask = Callable[..., Told]


@pytest.fixture(scope="module")
def ask(client: httpx2.Client, folder: Path) -> Ask:
    """Edits the photograph; without guidance, so that only the prompt is read."""

    def ask(prompt: str, **asked: Any) -> Told:
        fields = {"num_steps": 10, "size_level": 512, "guidance_scale": 1, "seed": 1, **asked}
        answer = client.post(
            "/api/edit",
            files={"file": (folder / "photo.png").read_bytes()},
            data={"prompt": prompt, **fields},
            headers={"Accept": "application/json"},
        )
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert told["metadata"]["prompt"] == prompt
        return pixels_of(base64.b64decode(told["image_base64"])), told["metadata"].get("warning")

    return ask


def pixels_of(data: bytes) -> bytes:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes()


DIFFERENT = [
    "make it night",
    "make it\nnight",
    "make it\N{ZERO WIDTH SPACE}night",
    "把天空变成夜晚",
    "🌙👩‍🚀✨",
    "write 「NO」",
    'write "NO"',
    'write "NO',
    "",
]
MORE = [
    "make it\tnight",
    "夜の空にしてください",
    "اجعل السماء ليلا",
    "write 『NO』",
    'write NO"',
    'write ""',
    "the “girl's” hat",
]


def test_each_language_and_sign_is_read(ask: Ask) -> None:
    prompts = DIFFERENT + by_extent([], MORE)
    told = {prompt: ask(prompt) for prompt in prompts}

    assert len({pixels for pixels, _ in told.values()}) == len(prompts)
    assert {warning for _, warning in told.values()} == {None}


def test_quotes_of_every_kind_that_the_model_knows_are_one(ask: Ask) -> None:
    told = {ask(prompt) for prompt in ("write “NO”", "write ”NO“", "write 'NO'", 'write "NO"')}

    assert len(told) == 1


@pytest.mark.parametrize(
    ("beginning", "beyond"),
    [("", "z"), ("girl's", " in red, 夜")],
    ids=["by a token", "by words behind a quote that stays open"],
)
def test_only_a_prompt_that_is_too_long_is_warned_about(
    ask: Ask, beginning: str, beyond: str
) -> None:
    longest = beginning + "z" * (ROOM - len(beginning))
    pixels, warning = ask(longest)
    shorter, _ = ask(longest[:-1])

    assert warning is None
    assert pixels != shorter
    assert ask(longest + beyond) == (pixels, f"the end of the prompt {CUT}")


# --- the negative prompt --------------------------------------------------------------------------

GUIDED = {"num_steps": 10, "size_level": 512, "guidance_scale": 3, "seed": 1}


def by_job(client: httpx2.Client, photo: Path, asked: dict[str, Any]) -> bytes:
    job = client.post("/v1/jobs", files={"file": photo.read_bytes()}, data=asked).json()
    client.get(f"/v1/jobs/{job['id']}/events").raise_for_status()
    return client.get(f"/v1/jobs/{job['id']}/content").content


def by_openai(client: httpx2.Client, photo: Path, asked: dict[str, Any]) -> bytes:
    answer = client.post("/v1/images/edits", files={"image": photo.read_bytes()}, data=asked)
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def by_json(client: httpx2.Client, photo: Path, asked: dict[str, Any]) -> bytes:
    url = f"data:image/png;base64,{base64.b64encode(photo.read_bytes()).decode()}"
    body = {"images": [{"image_url": url}], **asked}
    answer = client.post("/v1/images/edits", json=body)
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def by_command_line(client: httpx2.Client, photo: Path, asked: dict[str, Any]) -> bytes:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
    words.remove(f"--prompt={asked['prompt']}")
    words += ["--output", "-", "--url", str(client.base_url), "--api-key", TOKEN]
    return CliRunner().invoke(app, ["edit", str(photo), asked["prompt"], *words]).stdout_bytes


async def by_tool(client: httpx2.Client, photo: Path, asked: dict[str, Any]) -> bytes:
    place = photo.with_name("by_tool.png")
    async with MCPClient(f"{client.base_url}/mcp", TOKEN) as mcp:
        await mcp.call_tool(
            "edit_image", {"image_path": str(photo), "output_path": str(place), **asked}
        )
    return place.read_bytes()


async def by_batch(client: httpx2.Client, photo: Path, asked: dict[str, Any]) -> bytes:
    many = {"image_paths": [str(photo)], **asked}
    many["prompts"] = many.pop("prompt")
    async with MCPClient(f"{client.base_url}/mcp", TOKEN) as mcp:
        answer = await mcp.call_tool("batch_edit_images", many)
    return Path(answer["results"][0]["result"]["output_path"]).read_bytes()


def test_every_door_hands_the_negative_prompt_to_the_model(
    client: httpx2.Client, ask: Ask, folder: Path
) -> None:
    asked = {"prompt": "make it night", "negative_prompt": "模糊, 'fog'", **GUIDED}
    plain, _ = ask("make it night", **GUIDED)
    expected, _ = ask(**asked)

    found = {
        door.__name__: door(client, folder / "photo.png", asked)
        for door in (by_job, by_openai, by_json, by_command_line)
    }
    for tool in (by_tool, by_batch):
        found[tool.__name__] = asyncio.run(tool(client, folder / "photo.png", asked))

    assert expected != plain
    assert {name: pixels_of(data) for name, data in found.items()} == dict.fromkeys(found, expected)


def test_a_negative_prompt_that_loses_words_is_warned_about(ask: Ask) -> None:
    longer = "z" * (ROOM + 1)

    def warning(prompt: str, **asked: Any) -> str | None:
        return ask(prompt, negative_prompt=longer, **asked)[1]

    assert warning("night", **GUIDED) == f"the end of the negative prompt {CUT}"
    assert warning(longer, **GUIDED) == f"the end of the prompt and of the negative prompt {CUT}"
    assert warning("night") is None  # nobody reads it without guidance
