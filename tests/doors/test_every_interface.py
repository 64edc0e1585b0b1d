"""Through every door the same: the same picture for the same request, the same error sentence."""

from __future__ import annotations

import asyncio
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import c2pa
import httpx2
import numpy as np
import pytest
from fastmcp import Client
from PIL import Image
from typer.testing import CliRunner

from certificates import certified
from conftest import MakeService, edits_of
from fakes import FakeWorker, canvas
from http_server import TOKEN, serving
from mcp_answers import answer_of
from step1x_edit import MCPClient
from step1x_edit.channel import EditJob
from step1x_edit.errors import CheckpointError, OutOfMemoryError, Step1XEditError
from step1x_edit.interfaces.cli import app as cli
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.pictures.images import Pixels, read_edit_record
from step1x_edit.service.service import EditService
from step1x_edit.settings import Settings

Result = bytes | str
"""The file of the edited picture, or the sentence of an error."""

TAKES_NO_PATH = {"REST"}

USUAL_LORAS = {"look": 0.5}
MODEL_PATH = Path(__file__).with_name("weights")
MARK = b"http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
LORA_PATH = {Path("hand.safetensors"): 0.0, Path("look.safetensors"): 0.5}


def painted(job: EditJob) -> Pixels:
    """A picture that differs with everything that an edit is asked for."""
    asked = (
        job.prompt,
        job.negative_prompt,
        job.num_steps,
        job.guidance_scale,
        job.size_level,
        job.seed,
        USUAL_LORAS if job.loras is None else job.loras,
        job.thinking,
        job.reflection,
        job.reflection_rounds,
    )
    random = np.random.default_rng(zlib.crc32(repr(asked).encode()))
    image = canvas(job)
    return image ^ random.integers(0, 256, image.shape, dtype=np.uint8)


def worked(job: EditJob, step: int) -> None:
    if job.prompt == "too much":
        raise OutOfMemoryError("use a smaller size_level")
    if job.prompt == "damaged":
        raise CheckpointError(f"cannot read {MODEL_PATH / 'vae.safetensors'}: it ends too early")


class Doors:
    """Every way to ask one service for an edit of the same picture."""

    def __init__(self, service: EditService, url: str, folder: Path) -> None:
        self._service = service
        self._url = url
        self._folder = folder

    async def service(self, picture: Path, asked: dict[str, Any]) -> Result:
        try:
            given = {"image_path": picture, **_by_path(asked), **self._out("s")}
            request = self._service.read_edit(given)
            answer = (await edits_of(self._service).edit(request)).answer
        except Step1XEditError as error:
            return str(error)
        return Path(answer.output_path).read_bytes()

    async def mcp_in_memory(self, picture: Path, asked: dict[str, Any]) -> Result:
        return await self._tool(Client(build_mcp(self._service)), picture, asked)

    async def mcp_over_http(self, picture: Path, asked: dict[str, Any]) -> Result:
        return await self._tool(Client(f"{self._url}/mcp", auth=TOKEN), picture, asked)

    async def mcp_client(self, picture: Path, asked: dict[str, Any]) -> Result:
        arguments = {"image_path": str(picture), **_by_path(asked), **self._out("c")}
        async with MCPClient(f"{self._url}/mcp", TOKEN) as client:
            return _result(await client.call_tool("edit_image", arguments))

    async def rest(self, picture: Path, asked: dict[str, Any]) -> Result:
        fields = dict(asked)
        files = {"file": ("any name", picture.read_bytes())}
        if mask := fields.pop("mask", None):
            files["mask"] = ("any other", mask.read_bytes())
        async with httpx2.AsyncClient(trust_env=False, timeout=240) as client:
            answer = await client.post(
                f"{self._url}/api/edit",
                files=files,
                data={name: _as_text(value) for name, value in fields.items()},
                headers={"Authorization": f"Bearer {TOKEN}"},
            )
        if answer.status_code == 200:
            return bytes(answer.content)
        sentence: str = answer.json()["detail"]
        return sentence

    async def command_line_through_server(self, picture: Path, asked: dict[str, Any]) -> Result:
        return await self.command_line(picture, asked, "--url", self._url, "--api-key", TOKEN)

    async def command_line(self, picture: Path, asked: dict[str, Any], *way: str) -> Result:
        given = dict(asked)
        words = ["edit", str(picture), given.pop("prompt"), "--json", "--overwrite", *way]
        words += ["--output", self._out("l")["output_path"]]
        words += [f"--lora={lora}" for lora in given.pop("loras", None) or ()]
        for name, value in given.items():
            flag = f"--{name.replace('_', '-')}"
            words.append(flag if value is True else f"{flag}={value}")
        # In a thread, because the command has its own event loop.
        done = await asyncio.to_thread(CliRunner().invoke, cli, words)
        return _result(json.loads(done.stdout))

    def every(self) -> dict[str, Callable[..., Any]]:
        return {
            "service": self.service,
            "MCP in memory": self.mcp_in_memory,
            "MCP over HTTP": self.mcp_over_http,
            "MCPClient": self.mcp_client,
            "REST": self.rest,
            "command line": self.command_line,
            "command line through a server": self.command_line_through_server,
        }

    async def _tool(self, client: Client[Any], picture: Path, asked: dict[str, Any]) -> Result:
        arguments = {"image_path": str(picture), **_by_path(asked), **self._out("m")}
        async with client:
            result = await client.call_tool("edit_image", arguments, raise_on_error=False)
        answer = answer_of(result)
        assert result.is_error == (answer["status"] == "error")
        return _result(answer)

    def _out(self, name: str) -> dict[str, Any]:
        return {"output_path": str(self._folder / f"{name}.png"), "overwrite": True}


def _by_path(asked: dict[str, Any]) -> dict[str, Any]:
    """The parameters in the form of doors that read files themselves."""
    named = dict(asked)
    mask = named.pop("mask", None)
    return named if mask is None else {**named, "mask_path": str(mask)}


def _as_text(value: object) -> str:
    """How a form says it."""
    return ", ".join(value) if isinstance(value, list) else str(value)


def _result(answer: dict[str, Any]) -> Result:
    if answer["status"] == "error":
        sentence: str = answer["error"]
        return sentence
    return Path(answer["output_path"]).read_bytes()


@pytest.fixture
def model() -> str:
    """Which model the doors lead to."""
    return "v1.2"


@pytest.fixture
def more_settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """What the operator has set besides."""
    return certified(tmp_path / "c2pa") if hasattr(request, "param") else {}


@pytest.fixture
def doors(
    make_service: MakeService,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    more_settings: dict[str, Any],
) -> Iterator[Doors]:
    paths = {"lora_path": LORA_PATH, "model_path": MODEL_PATH}
    limits = {"max_megapixels": 1, "default_num_steps": 11, **paths, **more_settings}

    def build_service(settings: Settings | None = None) -> EditService:
        worker = FakeWorker(before_step=worked, paint=painted, model=model, usual_loras=USUAL_LORAS)
        return make_service(worker, **limits)

    service = build_service()
    monkeypatch.setattr("step1x_edit.service.wiring.build_service", build_service)
    with serving(service) as url:
        yield Doors(service, url, tmp_path)


GOOD: list[dict[str, Any]] = [
    {"prompt": "add a red hat", "seed": 42},
    {"prompt": "给它一顶红帽子", "seed": 0, "num_steps": 10, "size_level": 512},
    {"prompt": "x", "seed": 2**32 - 1, "guidance_scale": 1.5, "negative_prompt": "blurry, 模糊"},
    {"prompt": "a\nb", "seed": 7, "num_steps": 50, "guidance_scale": 15, "size_level": 768},
    {"prompt": "x", "seed": 1, "loras": ["hand", "look:-1.25"]},
    {"prompt": "x", "seed": 1, "loras": [""]},
    {"prompt": "x", "seed": 1},
    {"prompt": "x", "seed": 1, "negative_prompt": "blurry"},
    {"prompt": "add a red hat", "seed": 42, "thinking": True},
    {"prompt": "add a red hat", "seed": 42, "thinking": True, "reflection": True},
    {"prompt": "add a red hat", "seed": 42, "reflection": True, "reflection_rounds": 1},
    {"prompt": "add a red hat", "seed": 42, "reflection": True, "reflection_rounds": 2},
    {"prompt": "x", "seed": 1, "outpaint": "16", "region": "full"},
]

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("photo", {"num_steps": 5}, "Invalid parameter: num_steps must be between 10 and 50, got 5"),
    ("photo", {"guidance_scale": 15.5}, "Invalid parameter: guidance_scale must be between 1 and"),
    ("photo", {"guidance_scale": "nan"}, "Invalid parameter: guidance_scale must be a number bet"),
    ("photo", {"size_level": 600}, "Invalid parameter: size_level must be 512, 768 or 1024, got 6"),
    ("photo", {"seed": -2}, "Invalid parameter: seed must be"),
    (
        "photo",
        {"reflection_rounds": 4},
        "Invalid parameter: reflection_rounds must be between 1 and 3, got 4",
    ),
    ("photo", {"reflection_rounds": 0}, "Invalid parameter: reflection_rounds must be between 1"),
    ("photo", {"seed": 2**32}, "Invalid parameter: seed must be"),
    ("photo", {"prompt": "x" * 4001}, "Invalid parameter: prompt must have at most 4000 characte"),
    ("photo", {"num_steps": 1, "seed": -5}, "Invalid parameter: num_steps must be between 10 and"),
    ("photo", {"loras": ["hand:5"]}, "Invalid parameter: loras[0] must be a name or name:strength"),
    ("photo", {"loras": ["hand", "hand:2"]}, "Invalid parameter: loras names 'hand' twice"),
    (
        "photo",
        {"loras": ["look", "../hand.safetensors"]},
        "Invalid parameter: loras has '../hand.safetensors', which is not here; there are hand, l",
    ),
    ("photo", {"region": "full"}, "Invalid parameter: region full needs a mask, which says"),
    ("photo", {"outpaint": "wide"}, "Invalid parameter: outpaint must be one to four sizes"),
    ("photo", {"outpaint": "1000"}, "Image too large: 2064×2048 pixels, at most 1 megapixel"),
    ("photo", {"prompt": "too much"}, "CUDA out of memory: use a smaller size_level"),
    (
        "photo",
        {"prompt": "damaged"},
        f"Manager not initialized: cannot read MODEL_PATH{os.sep}vae.safetensors: it ends too ea",
    ),
    ("text", {}, "Unsupported image format: the file is none of PNG, JPEG, WebP"),
    ("cut", {}, "Cannot read image: the file is damaged or incomplete"),
    ("small", {}, "Image too small: 8×8 pixels"),
    ("long", {}, "Image too elongated: 320×16 pixels"),
    ("large", {}, "Image too large: 1100×1000 pixels, at most 1 megapixels are allowed"),
]


@pytest.fixture
def pictures(tmp_path: Path, photo: Path) -> dict[str, Path]:
    """Good and bad pictures by name."""

    def png(width: int, height: int, white: tuple[int, ...] | None = None) -> bytes:
        buffer = io.BytesIO()
        image = Image.new("RGB", (width, height))
        if white is not None:
            image.paste("white", white)  # type: ignore[arg-type]
        image.save(buffer, "PNG")
        return buffer.getvalue()

    made = {
        "text": b"this is no picture",
        "cut": photo.read_bytes()[:-30],
        "small": png(8, 8),
        "long": png(320, 16),
        "large": png(1100, 1000),
        "black": png(64, 48),
        "half": png(64, 48, white=(32, 0, 64, 48)),
        "turned": png(48, 64, white=(0, 0, 48, 64)),
    }
    for name, data in made.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    return {"photo": photo, **{name: tmp_path / f"{name}.png" for name in made}}


async def test_the_same_request_gives_the_same_file(doors: Doors, photo: Path) -> None:
    found: dict[str, list[Result]] = {}
    for name, door in doors.every().items():
        found[name] = [await door(photo, asked) for asked in GOOD]
    expected = found.pop("service")

    assert all(isinstance(result, bytes) for result in expected)
    assert len(set(expected)) == len(GOOD)
    assert all(MARK in result for result in expected)
    for name, results in found.items():
        for asked, result, same in zip(GOOD, results, expected, strict=True):
            if name.startswith("command line") and not asked["prompt"]:  # a person forgot it
                assert "prompt is empty" in str(result)
            else:
                assert result == same, (name, asked)


@pytest.mark.parametrize("more_settings", [{"record_prompt": False}])
async def test_a_file_without_prompts_has_everything_else(doors: Doors, photo: Path) -> None:
    asked = {"prompt": "red hat", "seed": 42, "negative_prompt": "blurry", "thinking": True}
    found = {name: await door(photo, asked) for name, door in doors.every().items()}
    data = found["service"]

    assert found == dict.fromkeys(found, data)
    assert isinstance(data, bytes)
    assert MARK in data
    assert not any(word in data for word in (b"red hat", b"blurry", b"nothing else"))
    record = read_edit_record(data)
    assert record is not None
    assert (record.prompt, record.negative_prompt, record.rewritten_prompt) == (None, None, None)
    assert (record.seed, record.num_steps, record.thinking) == (42, 11, True)


@pytest.mark.parametrize("more_settings", ["a certificate"], indirect=True)
async def test_every_result_is_signed(doors: Doors, photo: Path) -> None:
    found = {name: await door(photo, {"prompt": "x"}) for name, door in doors.every().items()}

    for name, data in found.items():
        assert isinstance(data, bytes)
        with c2pa.Reader("image/png", io.BytesIO(data)) as reader:
            assert reader.get_validation_state() == "Valid", name


async def test_an_empty_prompt_is_an_edit_for_programs_and_a_mistake_of_a_person(
    doors: Doors, photo: Path
) -> None:
    found = {
        name: await door(photo, {"prompt": "", "seed": 1}) for name, door in doors.every().items()
    }

    for name, result in found.items():
        if "command line" in name:
            assert str(result).startswith("Invalid parameter: prompt is empty; say what you want")
        else:
            assert result == found["service"]
            assert isinstance(result, bytes)


async def test_the_loras_of_an_edit_stand_in_its_file(doors: Doors, photo: Path) -> None:
    for asked, used in (
        ({"loras": ["look:-1.25", "hand:0"]}, ["look:-1.25"]),
        ({"loras": ["look", "hand:2"]}, ["hand:2", "look:1"]),
        ({"loras": []}, None),
        ({}, ["look:0.5"]),
    ):
        result = await doors.rest(photo, {"prompt": "x", "seed": 1, **asked})
        assert isinstance(result, bytes)
        record = read_edit_record(result)
        assert record is not None
        assert record.loras == used


async def test_the_same_mistake_gives_the_same_sentence(
    doors: Doors, pictures: dict[str, Path]
) -> None:
    for picture, asked, beginning in BAD:
        given = {"prompt": "x", **asked}
        found = {name: await door(pictures[picture], given) for name, door in doors.every().items()}

        assert str(found["service"]).startswith(beginning), asked
        assert found == dict.fromkeys(found, found["service"]), asked


@pytest.mark.parametrize("model", ["demo"])
@pytest.mark.parametrize("asked", ["thinking", "reflection"])
async def test_a_model_that_cannot_reason_gives_the_same_sentence(
    doors: Doors, photo: Path, asked: str
) -> None:
    given = {"prompt": "x", asked: True}
    found = {name: await door(photo, given) for name, door in doors.every().items()}

    sentence = f"Invalid parameter: {asked} needs Step1X-Edit v1.2; the model here is demo"
    assert found == dict.fromkeys(found, sentence)


@pytest.mark.parametrize("region", ["whole", "full"])
async def test_the_same_mask_gives_the_same_file(
    doors: Doors, pictures: dict[str, Path], region: str
) -> None:
    asked = {"prompt": "add a red hat", "seed": 42, "mask": pictures["half"], "region": region}
    found = {name: await door(pictures["photo"], asked) for name, door in doors.every().items()}
    expected = found["service"]

    assert isinstance(expected, bytes)
    assert found == dict.fromkeys(found, expected)
    before = np.asarray(Image.open(pictures["photo"]))
    after = np.asarray(Image.open(io.BytesIO(expected)))
    assert np.array_equal(after[:, :32], before[:, :32])
    assert not np.array_equal(after[:, 32:], before[:, 32:])


async def test_the_same_wrong_mask_gives_the_same_sentence(
    doors: Doors, pictures: dict[str, Path]
) -> None:
    missing = pictures["photo"].with_name("no.png")
    for mask, beginning, left_out in (
        (
            pictures["turned"],
            "Invalid parameter: mask is 48×64 pixels, the picture is 64×48",
            set(),
        ),
        (pictures["black"], "Invalid parameter: mask selects nothing; make what", set()),
        (pictures["text"], "Unsupported image format: mask: the file is none of PNG, JPEG", set()),
        (pictures["cut"], "Cannot read image: mask: the file is damaged or incomplete", set()),
        (pictures["large"], "Image too large: mask: 1100×1000 pixels", set()),
        (missing, f"Image file not found: {missing}", TAKES_NO_PATH),
        (Path("/etc/hostname"), "Path not allowed: /etc/hostname", TAKES_NO_PATH),
    ):
        asked = {"prompt": "x", "mask": mask}
        found = {
            name: await door(pictures["photo"], asked)
            for name, door in doors.every().items()
            if name not in left_out
        }

        assert str(found["service"]).startswith(beginning), mask
        assert found == dict.fromkeys(found, found["service"]), mask
