"""A parameter of an edit is named once: what `HowToEdit` has is at every door, by its name."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import json
import re
import sys
import types
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastmcp import Client
from PIL import Image
from typer.testing import CliRunner

from fakes import FakeWorker
from http_server import TOKEN, client_of, serving, until
from step1x_edit.channel import EditJob
from step1x_edit.interfaces.cli import app as cli
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.interfaces.page.texts import translations
from step1x_edit.model.request import NetworkRequest
from step1x_edit.pictures.images import read_edit_record
from step1x_edit.schemas.openai import ImageEditRequest
from step1x_edit.schemas.parameters import Parameter, parameters_of
from step1x_edit.schemas.requests import AROUND_THE_NETWORK, HowToEdit
from step1x_edit.service.service import EditService
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings

PARAMETERS = parameters_of(HowToEdit)
NAMES = list(PARAMETERS)
SEEN = [name for name in NAMES if name not in AROUND_THE_NETWORK]
"""Those that the network sees."""
FLAGS = {"loras": "--lora"}
IN_OPENAIS_WORDS = {
    name: ImageEditRequest.model_fields[name].alias or name for name in HowToEdit.model_fields
}
PROMPT = "add a red hat"


def unusual(parameter: Parameter) -> Any:
    """A value that is allowed and not the default."""
    match parameter.name:
        case "loras":
            return ["look:1"]
        case "outpaint":
            return "0 10% 8"  # right and left 6 of 64 pixels, below 8 of 48
    if parameter.choices:
        return next(choice for choice in parameter.choices if choice != parameter.default)
    match parameter.kind:
        case "boolean":
            return not parameter.default
        case "string":
            return "blurry"
    is_most = parameter.default == parameter.maximum
    number = parameter.minimum if is_most else parameter.maximum
    assert number is not None
    return int(number) if parameter.kind == "integer" else number


ASKED = {name: unusual(parameter) for name, parameter in PARAMETERS.items()}
AS_TEXTS = {
    name: json.dumps(value) if isinstance(value, list) else str(value)
    for name, value in ASKED.items()
}


@dataclasses.dataclass(frozen=True)
class House:
    """A service, where it is served, and the jobs that have reached its worker."""

    service: EditService
    url: str
    client: httpx2.Client
    photo: Path
    jobs: list[EditJob]
    new_service: Callable[[Settings], EditService]
    """Another service of this kind, for a command that edits in its own process."""


@contextlib.contextmanager
def some_spandrel() -> Iterator[None]:
    """A library of this name: a fake worker does not use it, but edits are refused without it."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("spandrel") is None:
            module = types.ModuleType("spandrel")
            module.__spec__ = importlib.machinery.ModuleSpec("spandrel", None)
            patch.setitem(sys.modules, "spandrel", module)
        yield


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)).save(
        photo := folder / "photo.png"
    )
    jobs: list[EditJob] = []

    def before_step(job: EditJob, step: int) -> None:
        if step == 1:
            jobs.append(job)

    (upscaler := folder / "upscaler.pth").touch()
    settings = Settings(
        allowed_dirs=(tmp_path_factory.getbasetemp(),),
        lora_path={Path("look.safetensors"): 0.5},
        upscale_model=upscaler,
        _env_file=None,
    )

    def new_service(_: Settings) -> EditService:
        return build_service(settings, FakeWorker(before_step, model="fake v1.2"))

    service = new_service(settings)
    with (
        some_spandrel(),
        serving(service, allowed_dirs=(folder,)) as url,
        client_of(url) as client,
    ):
        yield House(service, url, client, photo, jobs, new_service)
    service.close()


# --- what each door passes on ---------------------------------------------------------------------

Result = tuple[bytes, dict[str, Any] | None]
"""The file of the picture, and what the answer says about it if the door has metadata."""


def _of(answer: dict[str, Any]) -> Result:
    return Path(answer["output_path"]).read_bytes(), answer["metadata"]


async def _called(house: House, tool: str, **arguments: Any) -> dict[str, Any]:
    async with Client(build_mcp(house.service)) as client:
        answer = (await client.call_tool(tool, arguments)).structured_content
        if answer["status"] == "running":
            job_id = answer["job_id"]
            while answer["status"] == "running":
                arguments = {"job_id": job_id, "wait_s": 50}
                answer = (await client.call_tool("get_job", arguments)).structured_content
        return dict(answer)


async def edit_image(house: House) -> Result:
    path = str(house.photo)
    return _of(await _called(house, "edit_image", image_path=path, prompt=PROMPT, **ASKED))


async def submit_edit(house: House) -> Result:
    path = str(house.photo)
    return _of(await _called(house, "submit_edit", image_path=path, prompt=PROMPT, **ASKED))


async def batch_edit_images(house: House) -> Result:
    paths = [str(house.photo)]
    answer = await _called(house, "batch_edit_images", image_paths=paths, prompts=PROMPT, **ASKED)
    return _of(answer["results"][0]["result"])


async def rest(house: House) -> Result:
    answer = house.client.post(
        "/api/edit",
        files={"file": house.photo.read_bytes()},
        data={"prompt": PROMPT, **AS_TEXTS},
        headers={"Accept": "application/json"},
    ).json()
    return base64.b64decode(answer["image_base64"]), answer["metadata"]


async def stored_job(house: House) -> Result:
    sent = house.client.post(
        "/v1/jobs",
        files={"file": house.photo.read_bytes()},
        data={"prompt": PROMPT, **AS_TEXTS},
    ).json()
    assert sent["request"] == {"prompt": PROMPT, **ASKED}
    path = f"/v1/jobs/{sent['id']}"
    until(lambda: house.client.get(path).json()["status"] == "succeeded")
    return house.client.get(f"{path}/content").content, house.client.get(path).json()["metadata"]


async def page(house: House) -> Result:
    config = house.client.get("/config").json()
    ids = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
    (run,) = [
        one
        for one in config["dependencies"]
        if one["targets"] and one["targets"][0] == [ids["edit-run"], "click"]
    ]
    files = {"files": ("photo.png", house.photo.read_bytes())}
    (path,) = house.client.post("/gradio_api/upload", files=files).json()
    values = {
        ids["edit-picture"]: {"path": path, "meta": {"_type": "gradio.FileData"}},
        ids["edit-prompt"]: PROMPT,
        **{ids[f"edit-{name.replace('_', '-')}"]: value for name, value in ASKED.items()},
    }
    event = {
        "fn_index": run["id"],
        "data": [values[each] for each in run["inputs"]],
        "session_hash": "one",
    }
    house.client.post("/gradio_api/queue/join", json=event).raise_for_status()
    with house.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "one"}) as s:
        said = "".join(line for line in s.iter_lines() if "_edited.png" in line)
    (file,) = set(re.findall(r'"path":"([^"]*_edited\.png)"', said))
    return house.client.get(f"/gradio_api/file={file}").content, None


async def openai(house: House) -> Result:
    answer = house.client.post(
        "/v1/images/edits",
        files={"image": house.photo.read_bytes()},
        data={
            "prompt": PROMPT,
            **{IN_OPENAIS_WORDS[name]: value for name, value in AS_TEXTS.items()},
        },
    ).json()
    return base64.b64decode(answer["data"][0]["b64_json"]), None


def _words() -> list[str]:
    words = []
    for name, value in ASKED.items():
        flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
        values = value if isinstance(value, list) else [value]
        words += [flag if value is True else f"{flag}={each}" for each in values]
    return words


Command = Callable[..., dict[str, Any]]


@pytest.fixture(params=["through a server", "in this process"])
def command(
    request: pytest.FixtureRequest, house: House, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Run a command and return its answer."""
    monkeypatch.setattr("step1x_edit.service.wiring.build_service", house.new_service)
    is_local = request.param == "in this process"
    way = ["--standalone"] if is_local else ["--url", house.url, "--api-key", TOKEN]

    def run(*words: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            CliRunner().invoke(cli, [*words, *way, "--json"]).stdout
        )
        return answer

    return run


def edit(command: Command, photo: Path, _: Path) -> Result:
    return _of(command("edit", str(photo), PROMPT, *_words()))


def batch(command: Command, photo: Path, folder: Path) -> Result:
    manifest = folder / "list.jsonl"
    manifest.write_text(json.dumps({"image": str(photo)}))
    answer = command("batch", str(manifest), "--prompt", PROMPT, *_words())
    return _of(answer["results"][0]["result"])


def manifest(command: Command, photo: Path, folder: Path) -> Result:
    file = folder / "list.jsonl"
    file.write_text(json.dumps({"image": str(photo), "prompt": PROMPT, **ASKED}))
    return _of(command("batch", str(file))["results"][0]["result"])


def _check(house: House, result: Result) -> None:
    data, metadata = result
    record = read_edit_record(data)

    assert record is not None
    assert {name: getattr(record, name, "missing") for name in NAMES} == ASKED
    job = house.jobs[-1]
    network = {name: getattr(job, name, "missing") for name in SEEN}
    assert network == {**{name: ASKED[name] for name in SEEN}, "loras": {"look": 1.0}}
    if metadata is not None:
        answered = {name: metadata.get(name, "missing") for name in NAMES}
        assert answered == {**ASKED, "region": {"box": [0, 0, 152, 112], "scale": 3.92}}


@pytest.mark.parametrize(
    "door", [edit_image, submit_edit, batch_edit_images, rest, stored_job, openai, page]
)
async def test_every_parameter_reaches_network_file_and_answer(
    house: House, door: Callable[[House], Awaitable[Result]]
) -> None:
    house.jobs.clear()
    _check(house, await door(house))


@pytest.mark.parametrize("call", [edit, batch, manifest])
def test_every_flag_and_column_reaches_network_file_and_answer(
    house: House,
    tmp_path: Path,
    command: Command,
    call: Callable[[Command, Path, Path], Result],
) -> None:
    house.jobs.clear()
    _check(house, call(command, house.photo, tmp_path))


# --- what each door says that it takes ------------------------------------------------------------


@pytest.mark.parametrize("tool", ["edit_image", "submit_edit", "batch_edit_images"])
async def test_every_parameter_is_in_the_schema_of_the_tool(house: House, tool: str) -> None:
    async with Client(build_mcp(house.service)) as client:
        (found,) = [one for one in await client.list_tools() if one.name == tool]

    properties = found.input_schema["properties"]
    assert {name: properties.get(name, {}).get("description") for name in NAMES} == {
        name: parameter.description for name, parameter in PARAMETERS.items()
    }


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/api/edit", "multipart/form-data"),
        ("/v1/jobs", "multipart/form-data"),
        ("/v1/images/edits", "multipart/form-data"),
        ("/v1/images/edits", "application/json"),
        ("/v1/images/edits/estimate", "application/json"),
    ],
)
def test_every_parameter_is_in_the_description_of_the_route(
    house: House, path: str, kind: str
) -> None:
    described = house.client.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]
    fields = described["content"][kind]["schema"]["properties"]
    names = IN_OPENAIS_WORDS if path.startswith("/v1/images") else {}

    for name, parameter in PARAMETERS.items():
        assert fields[names.get(name, name)]["description"].startswith(parameter.description)


@pytest.mark.parametrize("command", ["edit", "batch"])
def test_every_parameter_is_in_the_help(command: str) -> None:
    shown = CliRunner().invoke(cli, [command, "--help"], env={"COLUMNS": "200"}).stdout

    for name in NAMES:
        assert f"{FLAGS.get(name, '--' + name.replace('_', '-'))} " in shown.replace(",", " ")


def test_every_parameter_is_on_the_page_in_every_language(house: House) -> None:
    config = house.client.get("/config").json()
    ids = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
    runs = {one["targets"][0][0]: one["inputs"] for one in config["dependencies"] if one["targets"]}

    for tab in ("edit", "region", "batch"):
        sent = runs[ids[f"{tab}-run"]]
        for name in NAMES:
            assert ids[f"{tab}-{name.replace('_', '-')}"] in sent, name
    for language, texts in translations().items():
        assert set(NAMES) <= texts.keys(), language


# --- what is not said twice -----------------------------------------------------------------------


def test_the_network_s_defaults_are_those_of_the_schema() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(NetworkRequest)}
    drawn = {"seed": None}  # by the service; the network only takes a number

    for name in SEEN:
        assert {**defaults, **drawn}[name] == HowToEdit.model_fields[name].default, name
