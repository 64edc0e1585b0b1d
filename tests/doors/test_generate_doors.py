"""Pictures from words alone through every door: the same file, the same sentence when it fails."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from fastmcp import Client
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image
from typer.testing import CliRunner

from conftest import MakeService, edits_of
from fakes import NUMERICS, FakeWorker, Gate, canvas
from http_server import TOKEN, calling, serving
from step1x_edit import MCPClient
from step1x_edit.channel import EditJob
from step1x_edit.errors import OutOfMemoryError, Step1XEditError
from step1x_edit.interfaces.cli import app as cli
from step1x_edit.interfaces.http.openai.requests import GENERATIONS_PATH
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.pictures.images import read_edit_record, read_record
from step1x_edit.schemas.requests import GenerationRecord
from step1x_edit.service.files import FileAccess
from step1x_edit.service.service import EditService

Result = bytes | str
"""The file of the picture, or the sentence of an error."""

AUTH = {"Authorization": f"Bearer {TOKEN}"}
ONLY_EDITS = "Invalid parameter: text to image needs Step1X-Edit v1.1; the model here is demo"


@pytest.fixture
def make_service(make_service: MakeService) -> MakeService:
    """Services whose model is said to be one that generates."""

    def make(*arguments: Any, **settings: Any) -> EditService:
        return make_service(*arguments, **{"model_version": "v1.1", **settings})

    return make


def worked(job: EditJob, step: int) -> None:
    if job.prompt == "too much":
        raise OutOfMemoryError(f"try {job.smaller}")


class Doors:
    """Every way to ask one service for a picture."""

    def __init__(self, service: EditService, url: str, folder: Path) -> None:
        self._service = service
        self._url = url
        self._folder = folder

    async def service(self, asked: dict[str, Any]) -> Result:
        try:
            request = self._service.read_generate({**asked, **self._out("s")})
            answer = (await edits_of(self._service).generate(request)).answer
        except Step1XEditError as error:
            return str(error)
        return Path(answer.output_path).read_bytes()

    async def mcp(self, asked: dict[str, Any]) -> Result:
        async with Client(build_mcp(self._service)) as client:
            result = await client.call_tool(
                "generate_image", {**asked, **self._out("m")}, raise_on_error=False
            )
        assert result.is_error == (result.structured_content["status"] == "error")
        return _result(result.structured_content)

    async def mcp_client(self, asked: dict[str, Any]) -> Result:
        async with MCPClient(f"{self._url}/mcp", TOKEN) as client:
            return _result(await client.call_tool("generate_image", {**asked, **self._out("c")}))

    async def openai(self, asked: dict[str, Any]) -> Result:
        fields = dict(asked)
        if "width" in fields:
            fields["size"] = f"{fields.pop('width')}x{fields.pop('height', 1024)}"
        if "num_steps" in fields:
            fields["num_inference_steps"] = fields.pop("num_steps")
        async with self._http() as client:
            answer = await client.post(GENERATIONS_PATH, json=fields)
        if answer.status_code != 200:
            sentence: str = answer.json()["error"]["message"]
            return sentence
        return base64.b64decode(answer.json()["data"][0]["b64_json"])

    async def stored_job(self, asked: dict[str, Any]) -> Result:
        async with self._http() as client:
            accepted = await client.post("/v1/jobs", json=asked)
            if accepted.status_code != 202:
                sentence: str = accepted.json()["detail"]
                return sentence
            path = accepted.headers["location"]
            await client.get(f"{path}/events")
            job = (await client.get(path)).json()
            if job["status"] != "succeeded":
                return str(job["error"])
            return bytes((await client.get(f"{path}/content")).content)

    async def command_line_through_server(self, asked: dict[str, Any]) -> Result:
        return await self.command_line(asked, "--url", self._url, "--api-key", TOKEN)

    async def command_line(self, asked: dict[str, Any], *way: str) -> Result:
        given = dict(asked)
        words = ["generate", given.pop("prompt"), "--json", "--overwrite", *way]
        words += ["--output", self._out("l")["output_path"]]
        words += [f"--lora={lora}" for lora in given.pop("loras", [])]
        words += [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        # In a thread, because the command has its own event loop.
        done = await asyncio.to_thread(CliRunner().invoke, cli, words)
        return _result(json.loads(done.stdout))

    def every(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[Result]]]:
        return {
            "service": self.service,
            "MCP": self.mcp,
            "MCPClient": self.mcp_client,
            "OpenAI": self.openai,
            "stored job": self.stored_job,
            "command line": self.command_line,
            "command line through a server": self.command_line_through_server,
        }

    def _http(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=self._url, headers=AUTH, trust_env=False, timeout=240)

    def _out(self, name: str) -> dict[str, Any]:
        return {"output_path": str(self._folder / f"{name}.png"), "overwrite": True}


def _result(answer: dict[str, Any]) -> Result:
    if answer["status"] == "error":
        sentence: str = answer["error"]
        return sentence
    assert answer["message"] == "Image generated successfully"
    return Path(answer["output_path"]).read_bytes()


@pytest.fixture
def doors_of(
    make_service: MakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Doors]]:
    """Doors to a fake worker of the given kind."""
    servers = []

    def of(model_version: str = "v1.1", **worker: Any) -> Doors:
        def service() -> EditService:
            return make_service(
                FakeWorker(before_step=worked, **worker),
                model_version=model_version,
                default_num_steps=11,
                lora_path={Path("/there/hand.safetensors"): 0.0},
            )

        monkeypatch.setattr("step1x_edit.service.wiring.build_service", lambda settings: service())
        one = service()
        server = serving(one)
        servers.append(server)
        return Doors(one, server.__enter__(), tmp_path)

    yield of
    for server in servers:
        server.__exit__(None, None, None)


async def test_the_same_request_gives_the_same_file(doors_of: Callable[..., Doors]) -> None:
    doors = doors_of()
    for asked in (
        {"prompt": "a red fox in the snow", "seed": 42},
        {"prompt": "雪地里的狐狸", "seed": 0, "num_steps": 10, "width": 256, "height": 2048},
        {"prompt": "", "seed": 2**32 - 1, "guidance_scale": 1.5, "negative_prompt": "blurry"},
        {"prompt": "a hand", "seed": 1, "loras": ["hand:0.5"], "width": 256},
    ):
        found = {name: await door(asked) for name, door in doors.every().items()}

        assert isinstance(found["service"], bytes), found["service"]
        if not asked["prompt"]:  # a person forgot it; programs may leave it empty
            refusals = [found.pop(name) for name in list(found) if name.startswith("command line")]
            assert all("prompt is empty" in str(refusal) for refusal in refusals)
        assert found == dict.fromkeys(found, found["service"]), asked
        size = (asked.get("width", 1024), asked.get("height", 1024))
        assert Image.open(io.BytesIO(found["service"])).size == size
        record = read_record(found["service"])
        assert isinstance(record, GenerationRecord)
        assert record.loras == asked.get("loras")


async def test_the_same_mistake_gives_the_same_sentence(doors_of: Callable[..., Doors]) -> None:
    doors = doors_of()
    for asked, sentence in (
        ({"num_steps": 5}, "Invalid parameter: num_steps must be between 10 and 50, got 5"),
        ({"seed": -2}, "Invalid parameter: seed must be"),
        ({"prompt": "x" * 4001}, "Invalid parameter: prompt must have at most 4000 characters"),
        ({"prompt": "too much"}, "CUDA out of memory: try a smaller width and height"),
        (
            {"width": 1000},
            "Invalid parameter: width must be a multiple of 16 between 256 and 2048, got 1000",
        ),
        ({"loras": ["feet"]}, "Invalid parameter: loras has 'feet', which is not here; there are"),
        ({"width": 2064}, "Invalid parameter: width must be between 256 and 2048, got 2064"),
    ):
        found = {name: await door({"prompt": "x", **asked}) for name, door in doors.every().items()}
        expected = str(found["service"])
        assert expected.startswith(sentence), asked
        if "width" in asked:  # there the parameter is size
            assert str(found.pop("OpenAI")) == (
                "Invalid parameter: size must be auto, or WIDTHxHEIGHT with multiples of 16 "
                f"between 256 and 2048, got {asked['width']}x1024"
            )
        if "num_steps" in asked:
            assert str(found.pop("OpenAI")) == expected.replace("num_", "num_inference_", 1)

        assert found == dict.fromkeys(found, expected), asked


async def test_a_model_that_only_edits_says_so_at_every_door(
    doors_of: Callable[..., Doors],
) -> None:
    doors = doors_of(can_generate=False)
    found = {name: await door({"prompt": "a fox"}) for name, door in doors.every().items()}

    assert found == dict.fromkeys(found, ONLY_EDITS)


async def test_a_model_that_is_known_only_to_edit_is_not_loaded_to_say_so(
    doors_of: Callable[..., Doors],
) -> None:
    """The fake one would generate if it were asked."""
    doors = doors_of(model_version="demo")
    found = {name: await door({"prompt": "a fox"}) for name, door in doors.every().items()}

    assert found == dict.fromkeys(found, ONLY_EDITS)


# --- the file -------------------------------------------------------------------------------------


async def test_the_file_tells_what_it_was_made_with(
    make_service: MakeService, tmp_path: Path
) -> None:
    service = make_service()
    for suffix, negative in ((".png", None), (".jpg", "")):
        asked = {"prompt": "a fox", "seed": 5, "width": 512, "negative_prompt": negative}
        out = str(tmp_path / f"o{suffix}")
        answer = (
            await edits_of(service).generate(service.read_generate({**asked, "output_path": out}))
        ).answer
        data = Path(out).read_bytes()

        record = read_record(data)
        assert record == GenerationRecord(
            model="fake",
            prompt="a fox",
            negative_prompt=negative,
            num_steps=28,
            guidance_scale=6.0,
            width=512,
            height=1024,
            seed=5,
            arithmetic="fp32 avx2",
            numerics=NUMERICS,
        )
        assert read_edit_record(data) is None
        assert b"newscodes/digitalsourcetype/trainedAlgorithmicMedia" in data
        told = answer.to_dict()["metadata"]
        assert (told["width"], told["height"], told["seed"]) == (512, 1024, 5)
        assert "size_level" not in told


async def test_without_a_path_the_file_is_named_after_the_prompt(
    make_service: MakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    service = make_service()

    async def name_of(prompt: str, **asked: object) -> str:
        request = service.read_generate({"prompt": prompt, "width": 256, "height": 256, **asked})
        path = Path((await edits_of(service).generate(request)).answer.output_path)
        assert path.parent == tmp_path
        return path.name

    assert await name_of("A red fox, in snow!") == "a-red-fox-in-snow.png"
    assert await name_of("a red fox in snow") == "a-red-fox-in-snow_2.png"
    assert await name_of("a red fox in snow", overwrite=True) == "a-red-fox-in-snow.png"
    assert await name_of("../../etc/passwd") == "etc-passwd.png"
    assert await name_of("  ...  ") == "generated.png"
    assert await name_of("雪地里的狐狸") == "雪地里的狐狸.png"
    assert len((await name_of("word " * 100)).encode()) <= 64
    assert len((await name_of("雪" * 1000)).encode()) <= 64


def test_where_the_start_folder_is_not_allowed_it_goes_into_the_first_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)

    output = FileAccess([tmp_path / "in"], 1000).plan_new_output("a fox")

    assert output.shown == str(tmp_path / "in" / "a-fox.png")


# --- MCP ------------------------------------------------------------------------------------------


async def test_the_tool_shows_a_preview_and_a_link_and_tells_its_steps(
    make_service: MakeService, tmp_path: Path
) -> None:
    heard: list[str | None] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        heard.append(message)

    path = tmp_path / "fox.webp"
    arguments = {"prompt": "a fox", "output_path": str(path), "num_steps": 10}
    async with Client(build_mcp(make_service(), step_pause_s=0)) as client:
        result = await client.call_tool("generate_image", arguments, progress_handler=hear)

    text, image, link = result.content
    assert json.loads(text.text) == result.structured_content
    assert Image.open(io.BytesIO(base64.b64decode(image.data))).size == (512, 512)
    assert (str(link.uri), link.mime_type) == (path.as_uri(), "image/webp")
    assert {"encoding", "denoising 7/10", "saving"} <= set(heard)


async def test_a_call_that_is_cancelled_stops_the_model(make_service: MakeService) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    async with Client(build_mcp(make_service(worker))) as client:
        call = asyncio.ensure_future(client.call_tool("generate_image", {"prompt": "stop me"}))
        assert await asyncio.to_thread(gate.reached.wait, 60)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await client.call_tool("get_gpu_status", {})  # comes after the cancellation
        gate.open()
        worker.before_step = lambda job, step: None
        await client.call_tool("generate_image", {"prompt": "next", "width": 256})

    assert worker.stopped_at == {"stop me": 2}


async def test_a_call_that_lasts_long_leaves_its_work_to_go_on(make_service: MakeService) -> None:
    gate = Gate(at_step=2)
    service = make_service(FakeWorker(before_step=gate))
    async with Client(build_mcp(service, max_wait_s=0.01)) as client:
        running = await client.call_tool("generate_image", {"prompt": "a fox"})
        gate.open()
        job_id = running.structured_content["job_id"]
        done = await client.call_tool("get_job", {"job_id": job_id, "wait_s": 50})

    assert running.structured_content["status"] == "running"
    assert done.structured_content["message"] == "Image generated successfully"


# --- OpenAI's Images ------------------------------------------------------------------------------


@pytest.fixture
def theirs(make_service: MakeService) -> Iterator[openai.OpenAI]:
    with (
        serving(make_service()) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0, timeout=240) as client,
    ):
        yield client


def test_their_client_gets_pictures(theirs: openai.OpenAI) -> None:
    answer = theirs.images.generate(
        prompt="a fox",
        model="gpt-image-1",
        n=2,
        size="1536x1024",
        quality="low",
        output_format="jpeg",
        background="opaque",
        moderation="low",
        user="me",
        extra_body={"seed": 7, "guidance_scale": 4.5, "negative_prompt": "fog"},
    )

    assert answer.data is not None
    records = []
    for picture in answer.data:
        data = base64.b64decode(str(picture.b64_json))
        assert (Image.open(io.BytesIO(data)).format, Image.open(io.BytesIO(data)).size) == (
            "JPEG",
            (1536, 1024),
        )
        records.append(read_record(data))
    assert [record.seed for record in records if record] == [7, 8]
    assert isinstance(records[0], GenerationRecord)
    assert (records[0].mode, records[0].negative_prompt) == ("turbo", "fog")
    assert (answer.size, answer.quality, answer.background) == ("1536x1024", "low", "opaque")
    assert (answer.model_extra or {})["guidance_scale"] == 4.5
    assert "size_level" not in (answer.model_extra or {})


def test_a_link_leads_to_the_picture(theirs: openai.OpenAI) -> None:
    answer = theirs.images.generate(prompt="a fox", size="256x256", response_format="url")
    assert answer.data is not None
    found = httpx2.get(str(answer.data[0].url), headers=AUTH, trust_env=False, timeout=240)

    assert Image.open(io.BytesIO(found.content)).size == (256, 256)


def test_a_stream_shows_previews_and_then_the_picture(make_service: MakeService) -> None:
    heard = Gate(at_step=19)  # beyond the second preview, of steps 9 and 18
    service = make_service(FakeWorker(before_step=heard))
    events = []
    with (
        serving(service) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0, timeout=240) as client,
    ):
        for event in client.images.generate(
            prompt="a fox", size="256x512", stream=True, partial_images=2
        ):
            events.append(event)
            heard.open()

    *partial, completed = events
    assert partial
    assert {type(event) for event in partial} == {ImageGenPartialImageEvent}
    assert isinstance(completed, ImageGenCompletedEvent)
    assert [event.size for event in events] == ["256x512"] * len(events)
    assert completed.usage.total_tokens == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("style", "natural"),
        ("image", "data:image/png;base64,AA=="),
        ("mask", "x"),
        ("size_level", 512),
        ("background", "transparent"),
        ("size", "1000x1000"),
        ("size", "128x128"),
        ("size", "1024"),
        ("n", 11),
        ("partial_images", 1),
        ("output_compression", 50),
        ("response_format", "file"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    theirs: openai.OpenAI, field: str, value: object
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        theirs.images.generate(prompt="a fox", extra_body={field: value})

    assert refused.value.param == field
    assert field in refused.value.message


def test_what_is_no_json_is_refused(make_service: MakeService) -> None:
    with calling(make_service()) as client:
        form = client.post(GENERATIONS_PATH, data={"prompt": "a fox"})
        broken = client.post(
            GENERATIONS_PATH, content=b"{", headers={"Content-Type": "application/json"}
        )
        none = client.post(GENERATIONS_PATH, json={})

    assert [answer.status_code for answer in (form, broken, none)] == [415, 400, 400]
    assert none.json()["error"]["param"] == "prompt"


def test_what_is_asked_for_again_is_not_done_again(make_service: MakeService) -> None:
    worker = FakeWorker()
    key = {"Idempotency-Key": "one"}
    body = {"prompt": "a fox", "size": "256x256"}
    with calling(make_service(worker)) as client:
        answers = [client.post(GENERATIONS_PATH, json=body, headers=key) for _ in range(2)]
        other = client.post(GENERATIONS_PATH, json=body | {"prompt": "a dog"}, headers=key)

    assert answers[0].json() == answers[1].json()
    assert worker.started == ["a fox"]
    assert other.status_code == 409


# --- stored jobs, and the command line ------------------------------------------------------------


def test_a_stored_job_has_its_request_and_is_forgotten(make_service: MakeService) -> None:
    with calling(make_service()) as client:
        job = client.post("/v1/jobs", json={"prompt": "a fox", "width": 256}).json()
        listed = client.get("/v1/jobs").json()["data"]

    assert (job["request"]["width"], job["request"]["height"]) == (256, 1024)
    assert job["request"]["seed"] >= 0
    assert "size_level" not in job["request"]
    assert [each["id"] for each in listed] == [job["id"]]


@pytest.mark.usefixtures("fake_model")
def test_the_command_tells_how_it_goes_and_where_the_picture_is(tmp_path: Path) -> None:
    words = ["generate", "a red fox", "--width", "256", "--height", "512", "--num-steps", "10"]
    done = CliRunner().invoke(cli, words)

    path = tmp_path / "a-red-fox.png"
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{path}\n"
    assert "generate: denoising 1/10" in done.stderr
    assert "fake on cpu" in done.stderr
    assert Image.open(path).size == (256, 512)


@pytest.mark.usefixtures("fake_model")
def test_the_command_writes_to_stdout_and_refuses_what_does_not_go_together() -> None:
    run, size = CliRunner(), ["--width", "256", "--height", "256"]
    piped = run.invoke(cli, ["generate", "a fox", "--output", "-", "--seed", "1", *size])
    both = run.invoke(cli, ["generate", "a fox", "--output", "-", "--json"])
    wrong = run.invoke(cli, ["generate", "a fox", "--width", "100"])

    assert piped.exit_code == 0, piped.stderr
    picture = np.asarray(Image.open(io.BytesIO(piped.stdout_bytes)))
    expected = EditJob(None, "a fox", None, 28, 6.0, 0, seed=1, width=256, height=256)
    assert np.array_equal(picture, 255 - canvas(expected))
    assert (both.exit_code, wrong.exit_code) == (2, 2)
    assert "width must be a multiple of 16 between 256 and 2048, got 100" in wrong.stderr


@pytest.mark.usefixtures("fake_model")
def test_the_command_makes_a_picture_again_from_its_file() -> None:
    run, size = CliRunner(), ["--width", "256", "--height", "256"]
    run.invoke(cli, ["generate", "a fox", "--output", "made.webp", *size])

    checked = run.invoke(cli, ["replay", "made.webp", "--check"])
    again = run.invoke(cli, ["replay", "made.webp", "--output", "again.webp"])
    with_input = run.invoke(cli, ["replay", "made.webp", "--on", "made.webp"])

    assert (checked.exit_code, checked.stdout) == (0, "equal to the byte\n")
    assert again.exit_code == 0, again.stderr
    assert Path("again.webp").read_bytes() == Path("made.webp").read_bytes()
    assert with_input.exit_code == 2
    assert "was generated from text" in with_input.stderr


def test_through_a_server_progress_is_heard_the_format_is_chosen_and_no_job_stays(
    make_service: MakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["generate", "a fox", "--output", "o.jpg", "--width", "256", "--seed", "3"]
    with serving(make_service()) as url:
        done = CliRunner().invoke(cli, [*words, "--url", url, "--api-key", TOKEN])
        left = httpx2.get(f"{url}/v1/jobs", headers=AUTH, trust_env=False, timeout=240).json()[
            "data"
        ]

    assert done.exit_code == 0, done.stderr
    assert "generate: denoising" in done.stderr
    record = read_record(Path("o.jpg"))
    assert isinstance(record, GenerationRecord)
    assert record.seed == 3
    assert left == []
