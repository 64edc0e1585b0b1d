"""OpenAI's Images: their own client, and the requests of others, are understood and answered."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import c2pa
import httpx2
import numpy as np
import openai
import pytest
from fastapi import FastAPI
from openai.types import ImageEditCompletedEvent, ImageEditPartialImageEvent
from PIL import Image

from certificates import certified
from conftest import MakeService
from fakes import FakeWorker, Gate
from http_server import TOKEN, calling, running, serving, until
from step1x_edit.channel import EditJob, Start
from step1x_edit.engine.worker_process import WorkerProcess
from step1x_edit.errors import DeadlineExceededError, OutOfMemoryError, Step1XEditError
from step1x_edit.interfaces.http.idempotency import Runs
from step1x_edit.interfaces.http.openai.images import image_routes
from step1x_edit.interfaces.http.openai.requests import EDITS_PATH
from step1x_edit.pictures.images import read_edit_record
from step1x_edit.service.service import EditService
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decoded(picture: Any) -> bytes:
    return base64.b64decode(picture.b64_json)


@contextlib.contextmanager
def theirs(service: EditService, **options: Any) -> Iterator[openai.OpenAI]:
    """OpenAI's client, of a server that listens here."""
    settings = options.pop("settings", {})
    with serving(service, **settings) as url:
        given = {"api_key": TOKEN, "max_retries": 0, "timeout": 60.0, **options}
        with openai.OpenAI(base_url=f"{url}/v1", **given) as client:
            yield client


@contextlib.asynccontextmanager
async def theirs_async(service: EditService, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    with serving(service) as url:
        given = {"api_key": TOKEN, "max_retries": 0, "timeout": 60.0, **options}
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", **given) as client:
            yield client


@pytest.fixture
def client(make_service: MakeService) -> Iterator[openai.OpenAI]:
    """OpenAI's client, of a server with the usual settings."""
    with theirs(make_service()) as client:
        yield client


@pytest.fixture
def plain(make_service: MakeService) -> Iterator[httpx2.Client]:
    """A client of the same that sends what it is given."""
    with calling(make_service()) as client:
        yield client


def failure(answer: httpx2.Response) -> dict[str, Any]:
    """The error that an answer tells, after a look at what all of them have in common."""
    assert answer.headers["content-type"] == "application/json"
    told: dict[str, Any] = answer.json()
    assert told.keys() == {"error"}
    error: dict[str, Any] = told["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    is_theirs = answer.status_code < 500
    assert error["type"] == ("invalid_request_error" if is_theirs else "server_error")
    assert "\n" not in error["message"]
    return error


# --- what comes back ------------------------------------------------------------------------------


def test_their_client_gets_the_edited_picture(client: openai.OpenAI, photo: Path) -> None:
    answer = client.images.edit(image=photo, prompt="invert")

    assert answer.data is not None
    (picture,) = answer.data
    data = decoded(picture)
    assert np.array_equal(pixels_of(data), 255 - pixels_of(photo.read_bytes()))
    assert (answer.size, answer.output_format, answer.background) == ("64x48", "png", "opaque")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 0
    extra = answer.model_extra or {}
    assert extra["model"] == "fake"
    assert extra["inference_time_s"] >= 0
    record = read_edit_record(data)
    assert record is not None
    assert (picture.model_extra or {})["seed"] == record.seed


async def test_their_async_client_does_too(make_service: MakeService, photo: Path) -> None:
    async with theirs_async(make_service()) as client:
        answer = await client.images.edit(image=("a.png", photo.read_bytes()), prompt="invert")

    assert answer.data is not None
    assert np.array_equal(pixels_of(decoded(answer.data[0])), 255 - pixels_of(photo.read_bytes()))


def test_a_worker_process_serves_their_client(
    photo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    settings = Settings(allowed_dirs=(tmp_path,), _env_file=None)
    service = build_service(
        settings, lambda on_end: WorkerProcess(Start(), on_end, module="toy_worker")
    )
    try:
        with theirs(service) as client:
            answer = client.images.edit(image=photo, prompt="invert")
            with pytest.raises(openai.InternalServerError, match="CUDA out of memory: on purpose"):
                client.images.edit(image=photo, prompt="fail")
            with pytest.raises(openai.InternalServerError, match="Worker process lost") as lost:
                client.images.edit(image=photo, prompt="die SIGKILL")
    finally:
        service.close()

    assert answer.data is not None
    assert np.array_equal(pixels_of(decoded(answer.data[0])), 255 - pixels_of(photo.read_bytes()))
    assert (answer.model_extra or {})["model"] == "toy"
    assert lost.value.code == "worker_lost"


def test_several_pictures_have_seeds_that_follow_each_other(
    make_service: MakeService, photo: Path
) -> None:
    worker = FakeWorker()
    with theirs(make_service(worker)) as client:
        answer = client.images.edit(image=photo, prompt="x", n=3, extra_body={"seed": 2**32 - 2})

    assert answer.data is not None
    records = [read_edit_record(decoded(picture)) for picture in answer.data]
    seeds = [record.seed for record in records if record is not None]
    assert seeds == [2**32 - 2, 2**32 - 1, 0]
    assert seeds == [(picture.model_extra or {})["seed"] for picture in answer.data]
    assert len(worker.started) == 3


def test_several_pictures_wait_for_room_once_they_have_begun(
    make_service: MakeService, photo: Path
) -> None:
    gates = {1: Gate(), 2: Gate()}
    worker = FakeWorker()

    def hold(job: EditJob, step: int) -> None:
        if len(worker.started) in gates:
            gates[len(worker.started)](job, step)

    worker.before_step = hold
    service = make_service(worker, max_queue=1)
    with theirs(service) as client:
        answers: list[Any] = []

        def ask(prompt: str, n: int) -> None:
            answers.append(client.images.edit(image=photo, prompt=prompt, n=n))

        several = threading.Thread(target=ask, args=("several", 2))
        several.start()
        assert gates[1].reached.wait(60)
        other = threading.Thread(target=ask, args=("other", 1))
        other.start()
        until(lambda: service.status().gpu_status.queue_length == 1)
        gates[1].open()
        assert gates[2].reached.wait(60)
        gates[2].open()
        several.join(60)
        other.join(60)

    assert worker.started == ["several", "other", "several"]
    assert sorted(len(answer.data) for answer in answers) == [1, 2]


def test_what_others_call_their_extensions_is_understood(
    make_service: MakeService, photo: Path
) -> None:
    jobs: list[EditJob] = []
    worker = FakeWorker(before_step=lambda job, step: jobs.append(job))
    extensions = [
        {"num_inference_steps": 11, "guidance_scale": 3.5, "size_level": 768, "seed": 5},
        {"num_steps": 11, "true_cfg_scale": 3.5, "size_level": 768, "seed": 5},
    ]
    with theirs(make_service(worker)) as client:
        for extra in extensions:
            answer = client.images.edit(
                image=photo, prompt="x", extra_body={**extra, "negative_prompt": "blurry"}
            )

    extra = answer.model_extra or {}
    assert (extra["num_inference_steps"], extra["guidance_scale"]) == (11, 3.5)
    for job in (jobs[0], jobs[-1]):
        assert (job.num_steps, job.guidance_scale, job.size_level) == (11, 3.5, 768)
        assert (job.seed, job.negative_prompt) == (5, "blurry")


@pytest.mark.parametrize(
    ("quality", "mode"),
    [
        ("auto", "fast"),
        ("standard", "fast"),
        ("low", "turbo"),
        ("medium", "fast"),
        ("high", "exact"),
        ("hd", "exact"),
    ],
)
def test_quality_chooses_the_mode(
    make_service: MakeService, photo: Path, quality: Any, mode: str
) -> None:
    with theirs(make_service(default_num_steps=13, default_mode="fast")) as client:
        answer = client.images.edit(image=photo, prompt="x", quality=quality)

    assert answer.data is not None
    record = read_edit_record(decoded(answer.data[0]))
    assert record is not None
    assert (record.mode, record.num_steps) == (mode, 13)
    assert (answer.model_extra or {})["mode"] == mode
    assert answer.quality == (None if quality in ("auto", "standard") else quality)


@pytest.mark.parametrize(
    ("asked", "kind"),
    [("png", "image/png"), ("webp", "image/webp"), ("jpeg", "image/jpeg"), ("avif", "image/avif")],
)
def test_the_caller_chooses_the_format(
    client: openai.OpenAI, photo: Path, asked: Any, kind: str
) -> None:
    answer = client.images.edit(image=photo, prompt="x", output_format=asked)

    assert answer.data is not None
    assert Image.open(io.BytesIO(decoded(answer.data[0]))).get_format_mimetype() == kind
    assert answer.output_format == asked


@pytest.mark.parametrize("asked", ["webp", "jpeg", "avif"])
def test_compression_makes_the_file_smaller_and_keeps_the_record(
    client: openai.OpenAI, photo: Path, asked: Any
) -> None:
    sizes = []
    for compression in (100, 40, 0):
        answer = client.images.edit(
            image=photo, prompt="x", output_format=asked, output_compression=compression
        )
        assert answer.data is not None
        data = decoded(answer.data[0])
        sizes.append(len(data))

    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    record = read_edit_record(data)
    assert record is not None
    assert record.prompt == "x"
    assert b"digitalsourcetype/compositeWithTrainedAlgorithmicMedia" in data


@pytest.mark.parametrize(("asked", "size"), [("auto", (64, 48)), ("64x48", (64, 48))])
def test_the_size_is_that_of_the_input(
    client: openai.OpenAI, photo: Path, asked: Any, size: tuple[int, int]
) -> None:
    answer = client.images.edit(image=photo, prompt="x", size=asked)

    assert answer.data is not None
    assert Image.open(io.BytesIO(decoded(answer.data[0]))).size == size


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ("1024x1024", "1024x768"),
        ("512x512", "512x384"),
        ("1024x1536", "1024x768"),
        ("1536x256", "341x256"),
        ("1x1", "1x1"),
    ],
)
def test_a_size_of_another_ratio_is_a_box_to_fit_into(
    client: openai.OpenAI, photo: Path, asked: Any, made: str
) -> None:
    answer = client.images.edit(image=photo, prompt="invert", size=asked)

    assert answer.data is not None
    picture = Image.open(io.BytesIO(decoded(answer.data[0])))
    assert "{}x{}".format(*picture.size) == made == answer.size
    corner = np.asarray(picture.convert("RGB"))[0, 0].astype(int)
    assert made == "1x1" or np.abs(corner - (255 - pixels_of(photo.read_bytes())[0, 0])).max() < 9


@pytest.mark.parametrize("asked", ["128x96", "32x24", "100x75", "101x75"])
def test_another_size_of_the_same_ratio_is_made(
    client: openai.OpenAI, photo: Path, asked: str
) -> None:
    answer = client.images.edit(image=photo, prompt="x", size=asked)

    assert answer.data is not None
    data = decoded(answer.data[0])
    assert "{}x{}".format(*Image.open(io.BytesIO(data)).size) == asked == answer.size
    assert read_edit_record(data) is not None


@pytest.mark.parametrize("asked", [{}, {"size": "32x24"}, {"output_compression": 40}])
def test_every_version_of_a_picture_is_signed(
    make_service: MakeService, photo: Path, tmp_path: Path, asked: Any
) -> None:
    with theirs(make_service(**certified(tmp_path / "c2pa"))) as client:
        answer = client.images.edit(image=photo, prompt="x", output_format="webp", **asked)

    assert answer.data is not None
    with c2pa.Reader("image/webp", io.BytesIO(decoded(answer.data[0]))) as reader:
        assert reader.get_validation_state() == "Valid"


def test_transparency_stays_unless_an_opaque_picture_is_asked_for(
    client: openai.OpenAI,
) -> None:
    image = Image.new("RGBA", (64, 48), (10, 20, 30, 128))
    answers = [
        client.images.edit(image=("a.png", png(image)), prompt="x", **given)
        for given in ({}, {"background": "opaque"}, {"output_format": "jpeg"})
    ]

    modes = [Image.open(io.BytesIO(decoded((answer.data or [])[0]))).mode for answer in answers]
    assert modes == ["RGBA", "RGB", "RGB"]
    assert [answer.background for answer in answers] == ["transparent", "opaque", "opaque"]


def test_only_what_is_transparent_in_the_mask_changes(client: openai.OpenAI, photo: Path) -> None:
    mask = Image.new("RGBA", (64, 48), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 48))
    answer = client.images.edit(image=photo, prompt="x", mask=("mask.png", png(mask)))

    assert answer.data is not None
    before, after = pixels_of(photo.read_bytes()), pixels_of(decoded(answer.data[0]))
    assert np.array_equal(after[:, 32:], before[:, 32:])
    assert np.array_equal(after[:, :24], 255 - before[:, :24])
    assert 0.3 < (answer.data[0].model_extra or {})["changed_share"] <= 0.5


def test_a_link_leads_to_the_picture_for_who_has_the_token(
    client: openai.OpenAI, photo: Path
) -> None:
    answer = client.images.edit(
        image=photo, prompt="x", n=2, response_format="url", output_format="webp"
    )
    assert answer.data is not None
    links = [picture.url or "" for picture in answer.data]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    pictures = [httpx2.get(link, headers=headers, trust_env=False, timeout=240) for link in links]
    stranger = httpx2.get(links[0], trust_env=False, timeout=240)
    wrong = httpx2.get(f"{links[0][:-8]}x/content", headers=headers, trust_env=False, timeout=240)
    under_another_name = httpx2.get(
        links[0], headers={**headers, "Host": "evil.example"}, trust_env=False, timeout=240
    )
    base_url = str(client.base_url)

    assert len(set(links)) == 2
    for link, picture in zip(links, pictures, strict=True):
        assert link.startswith(f"{base_url}images/img_")
        assert picture.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(picture.content)).size == (64, 48)
    assert all(picture.b64_json is None for picture in answer.data)
    assert (stranger.status_code, failure(stranger)["code"]) == (401, "unauthorized")
    assert (wrong.status_code, failure(wrong)["code"]) == (404, "not_found")
    assert under_another_name.status_code == 421


# --- others than their client ---------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt-image-1", ""])
@pytest.mark.parametrize("name", ["image", "image[]", "image[0]"])
def test_the_request_of_open_webui_is_understood(
    plain: httpx2.Client, photo: Path, name: str, model: str
) -> None:
    """Its fields, as it sends them: the picture, alone or in a list, and texts around it."""
    parts: list[tuple[str, Any]] = [
        ("model", (None, model)),
        ("prompt", (None, "invert")),
        ("n", (None, "1")),
        ("size", (None, "64x48")),
        ("background", (None, "auto")),
        ("response_format", (None, "b64_json")),
        (name, ("image.png", photo.read_bytes(), "image/png")),
    ]
    answer = plain.post(EDITS_PATH, files=parts)

    assert answer.status_code == 200
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert np.array_equal(pixels_of(data), 255 - pixels_of(photo.read_bytes()))


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_json_with_data_urls_is_understood(plain: httpx2.Client, photo: Path) -> None:
    mask = Image.new("L", (64, 48))
    mask.paste(255, (0, 0, 32, 48))
    body = {
        "images": [{"image_url": data_url(photo.read_bytes())}],
        "mask": {"image_url": data_url(png(mask))},
        "prompt": "给它一顶红帽子",
        "n": 1,
        "seed": 5,
        "size": None,
        "stream": False,
    }
    answer = plain.post(EDITS_PATH, json=body)

    assert answer.status_code == 200
    (picture,) = answer.json()["data"]
    assert picture["seed"] == 5
    before, after = pixels_of(photo.read_bytes()), pixels_of(base64.b64decode(picture["b64_json"]))
    assert np.array_equal(after[:, 32:], before[:, 32:])
    assert not np.array_equal(after, before)


@pytest.mark.parametrize("name", ["image", "images"])
@pytest.mark.parametrize("in_list", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_picture_in_json_may_stand_in_any_of_the_ways_that_clients_know(
    plain: httpx2.Client, photo: Path, name: str, in_list: bool, wrapped: bool
) -> None:
    url = data_url(photo.read_bytes())
    picture: Any = {"image_url": url} if wrapped else url
    answer = plain.post(
        EDITS_PATH, json={name: [picture] if in_list else picture, "prompt": "x", "size": ""}
    )

    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert np.array_equal(pixels_of(data), 255 - pixels_of(photo.read_bytes()))


@pytest.mark.parametrize(
    "escapes",
    [{}, {"/": r"\/"}, {"+": r"\u002B", "=": r"\u003d", "/": r"\u002f"}],
    ids=["none", "PHP", "dotnet"],
)
@pytest.mark.parametrize("length", [1, 7, 10_000])
def test_a_picture_in_json_is_the_same_in_any_pieces_and_with_any_escapes(
    plain: httpx2.Client, photo: Path, escapes: dict[str, str], length: int
) -> None:
    padding = b"\xfb\xef\xbe\xff" * 3  # after the picture, which ignores it
    url = data_url(photo.read_bytes() + padding)
    text = json.dumps({"mask": None, "image": url, "prompt": r"\"data:x;base64,"})
    for sign, escaped in escapes.items():
        text = text.replace(sign, escaped)
    pieces = (text[at : at + length].encode() for at in range(0, len(text), length))
    answer = plain.post(EDITS_PATH, content=pieces, headers={"Content-Type": "application/json"})

    assert "+" in url
    assert "/" in url.partition(",")[2]
    assert url.endswith("=")
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert np.array_equal(pixels_of(data), 255 - pixels_of(photo.read_bytes()))


def test_their_client_gets_stepfuns_interface_by_the_name_of_its_model(
    make_service: MakeService, tmp_path: Path
) -> None:
    """As StepFun's guide calls it, and by its defaults: links, sizes that are areas, any seed."""
    jobs: list[EditJob] = []
    worker = FakeWorker(before_step=lambda job, step: jobs.append(job))
    photo = tmp_path / "photo.png"
    Image.new("RGB", (96, 64), "teal").save(photo)
    extra = {"steps": 20, "cfg_scale": 10.0, "seed": 0, "negative_prompt": "blurry"}
    with theirs(make_service(worker)) as client:
        answers = [
            client.images.edit(
                model="step-1x-edit", image=photo, prompt="x", size="512x512", extra_body=extra
            )
            for _ in range(2)
        ]
        whole = client.images.edit(
            model="step-1x-edit", image=photo, prompt="x", response_format="b64_json"
        )
        named = client.models.retrieve("step-1x-edit")
        link = (answers[0].data or [])[0].url or ""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        fetched = httpx2.get(link, headers=headers, trust_env=False, timeout=240)

    assert (jobs[0].num_steps, jobs[0].guidance_scale, jobs[0].size_level) == (20, 10.0, 512)
    assert jobs[0].negative_prompt == "blurry"
    assert jobs[0].seed != jobs[20].seed  # 0 is none
    assert answers[0].size == "627x418"  # the ratio of the picture, and about 512 x 512 pixels
    assert Image.open(io.BytesIO(fetched.content)).size == (627, 418)
    told = (answers[0].data or [])[0].model_extra or {}
    assert (told["finish_reason"], told["seed"]) == ("success", jobs[0].seed)
    assert (whole.data or [])[0].b64_json is not None
    assert (whole.size, named.id) == ("96x64", "step-1x-edit")


def test_a_seed_of_zero_is_a_seed_for_everybody_else(client: openai.OpenAI, photo: Path) -> None:
    answer = client.images.edit(image=photo, prompt="x", extra_body={"seed": 0})

    assert ((answer.data or [])[0].model_extra or {})["seed"] == 0


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"images": [{"image_url": "https://x.example/a.png"}]}, "images", "no other URL is fet"),
        ({"images": [{"file_id": "file-1"}]}, "images", "no files are kept"),
        ({"images": [{"image_url": "data:image/png;base64,%%"}]}, "images", "not valid base64"),
        ({"images": ["data:image/png;base64,AA==AA=="]}, "images", "not valid base64"),
        ({"images": ["data:image/png;base64,AA"]}, "images", "not valid base64"),
        ({"images": ["data:image/png,AAAA"]}, "images", "images must be a data URL in base64"),
        ({"images": ["iVBORw0KGgo"]}, "images", "images must be a data URL in base64 (data:image"),
        ({"prompt": "data:image/png;base64,AA=="}, None, "only image, images and mask take data"),
        ({"images": []}, "images", "images is missing"),
        ({"images": {}}, "images", "images must be a data URL in base64"),
        ({"image": "data:image/png;base64,AA=="}, "image", "image and images mean the same"),
        ({"images": [{}, {}]}, "images", "images must be one picture, got 2"),
        ({"mask": {"image_url": "http://x.example/m.png"}}, "mask", "mask must be a data URL"),
        ({"mask": "no"}, "mask", "mask must be a data URL"),
        ({"n": True}, "n", "n must be a whole number"),
        ({"prompt": 7}, "prompt", "prompt must be a text, got 7"),
        ({"prompt": "\ud800"}, "prompt", "prompt must be valid Unicode text"),
        ({"\ud800": 1}, None, "is unknown"),
        ({"x" * 100: 1}, None, "is unknown"),
        ({"n": [1]}, "n", "n must be a whole number"),
        ({"size": {}}, "size", "size must be a text"),
        ({"model": "step-1x-edit", "seed": False}, "seed", "seed must be a whole number"),
    ],
)
def test_what_is_wrong_with_json_is_said_by_name(
    make_service: MakeService,
    photo: Path,
    changes: dict[str, Any],
    param: str | None,
    message: str,
) -> None:
    worker = FakeWorker()
    body = {"images": [{"image_url": data_url(photo.read_bytes())}], "prompt": "x", **changes}
    with calling(make_service(worker)) as client:
        answer = client.post(
            EDITS_PATH,
            content=json.dumps(body),
            headers={"Content-Type": "application/json"},
        )

    error = failure(answer)
    assert (answer.status_code, error["param"]) == (400, param)
    assert message in error["message"]
    assert worker.started == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe{}", b"7"])
def test_what_is_no_json_is_refused(plain: httpx2.Client, body: bytes) -> None:
    answer = plain.post(EDITS_PATH, content=body, headers={"Content-Type": "application/json"})

    assert answer.status_code == 400
    assert "JSON" in failure(answer)["message"]


# --- refusals -------------------------------------------------------------------------------------

MASK_OF_ANOTHER_SIZE = png(Image.new("L", (32, 24), 255))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"setps": "10"}, "setps", "'setps' is unknown"),
        ({"num_step": "10"}, "num_step", "'num_step' is unknown, did you mean num_steps?"),
        ({"imag": "x"}, "imag", "did you mean image?"),
        ({"num_steps": "5"}, "num_steps", "num_steps must be between 10 and 50, got 5"),
        (
            {"num_inference_steps": "5"},
            "num_inference_steps",
            "num_inference_steps must be between 10 and 50, got 5",
        ),
        ({"true_cfg_scale": "0"}, "true_cfg_scale", "true_cfg_scale must be between 1 and 15"),
        (
            {"guidance_scale": "2", "true_cfg_scale": "3"},
            "true_cfg_scale",
            "true_cfg_scale is given twice, by two names",
        ),
        ({"n": "0"}, "n", "n must be between 1 and 10, got 0"),
        ({"n": "11"}, "n", "n must be between 1 and 10, got 11"),
        ({"seed": "x"}, "seed", "seed must be a whole number"),
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": "x" * 4001}, "prompt", "prompt must have at most 4000 characters"),
        ({"prompt": ["a", "b"]}, "prompt", "'prompt' is given twice"),
        ({"image": None}, "image", "image is missing"),
        ({"image": "https://x.example/a.png"}, "image", "image must be an uploaded file; no URL"),
        ({"image[]": b"x"}, "image", "image must be one picture, got 2"),
        ({"image": b"x"}, "image", "Unsupported image format"),
        ({"mask": "x"}, "mask", "mask must be an uploaded file"),
        ({"mask": b"x"}, "mask", "Unsupported image format: mask: the file"),
        ({"mask": MASK_OF_ANOTHER_SIZE}, "mask", "mask is 32×24 pixels, the picture is 64×48"),
        ({"seed": b"7"}, "seed", "'seed' takes no file; upload the picture as 'image'"),
        ({"file": b"7"}, "file", "'file' takes no file; upload the picture as 'image'"),
        ({"url": "https://x.example/a.png"}, "url", "'url' is not supported: no URL is fetched"),
        ({"url[]": "https://x.example/a.png"}, "url[]", "no URL is fetched"),
        ({"markup": b"x"}, "markup", "'markup' is not supported: send a mask"),
        ({"complexity": "low"}, "complexity", "'complexity' is not supported"),
        ({"frame_count": "3"}, "frame_count", "'frame_count' is not supported"),
        ({"svg[model]": "x"}, "svg[model]", "'svg[model]' is not supported"),
        ({"lora": "x"}, "lora", "'lora' is unknown"),
        ({"background": "transparent"}, "background", "the model adds no transparency"),
        ({"background": "white"}, "background", "background must be auto or opaque"),
        ({"style": "natural"}, "style", "style 'natural' is not supported: say in the prompt"),
        ({"steps": "5", "model": "step-1x-edit"}, "steps", "steps must be between 10 and 50, got"),
        ({"cfg_scale": "0.5"}, "cfg_scale", "cfg_scale must be between 1 and 15, got 0.5"),
        ({"image[1]": b"x"}, "image", "image must be one picture, got 2"),
        ({"output_format": "gif"}, "output_format", "must be png, webp, jpeg or avif, got 'gif'"),
        ({"output_format": "svg"}, "output_format", "must be png, webp, jpeg or avif"),
        ({"output_compression": "50"}, "output_compression", "needs output_format jpeg, webp"),
        ({"output_compression": "101"}, "output_compression", "must be between 0 and 100"),
        ({"quality": "max"}, "quality", "quality must be auto, standard, low, medium, high or hd"),
        ({"quality": "low", "mode": "fast"}, "quality", "both choose the mode; give one"),
        ({"response_format": "png"}, "response_format", "must be b64_json or url"),
        ({"moderation": "high"}, "moderation", "moderation must be auto or low"),
        ({"stream": "maybe"}, "stream", "stream must be true or false"),
        ({"partial_images": "2"}, "partial_images", "partial_images needs stream=true"),
        ({"stream": "true", "partial_images": "4"}, "partial_images", "must be between 0 and 3"),
        ({"stream": "true", "n": "2"}, "n", "n must be 1 with stream=true"),
        ({"stream": "true", "response_format": "url"}, "response_format", "must be b64_json with"),
        ({"size": "big"}, "size", "size is not valid, got 'big'"),
        ({"size": "0x0"}, "size", "size is not valid"),
        ({"size": "8000x6000"}, "size", "size may have 2 megapixels at most"),
        ({f"f{n}": "" for n in range(60)}, None, "the form cannot be read: To"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) and len(value) < 5 else None,
)
def test_what_cannot_be_honoured_is_refused_by_name(
    make_service: MakeService,
    photo: Path,
    fields: dict[str, Any],
    param: str | None,
    message: str,
) -> None:
    worker = FakeWorker()
    parts: list[tuple[str, Any]] = []
    for name, value in {"prompt": "x", "image": photo.read_bytes(), **fields}.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, bytes):
                parts.append((name, ("a.png", each)))
            elif each is not None:
                parts.append((name, (None, each)))
    with calling(make_service(worker), max_megapixels=2) as client:
        answer = client.post(EDITS_PATH, files=parts)

    error = failure(answer)
    assert (answer.status_code, error["param"]) == (400, param)
    assert message in error["message"]
    assert worker.started == []


def test_values_that_ask_for_nothing_are_taken(client: openai.OpenAI, photo: Path) -> None:
    answer = client.images.edit(
        image=photo,
        prompt="x",
        background="auto",
        input_fidelity="high",
        n=1,
        output_compression=100,
        quality="auto",
        safety_identifier="somebody",
        size="auto",
        stream=False,
        user="somebody",
        extra_body={"moderation": "low", "style": "vivid", "response_format": ""},
    )

    assert answer.data is not None
    assert len(answer.data) == 1


@pytest.mark.parametrize(
    "name", ["step1x-edit", "fake", "gpt-image-1", "gpt-image-2.5-flare", "dall-e-2"]
)
def test_the_models_that_clients_name_are_this_one(
    client: openai.OpenAI, photo: Path, name: str
) -> None:
    client.images.edit(image=photo, prompt="x")  # only a loaded model has a version
    answer = client.images.edit(image=photo, prompt="x", model=name)

    assert (answer.model_extra or {})["model"] == "fake"


def test_another_model_is_not_here(make_service: MakeService, photo: Path) -> None:
    worker = FakeWorker()
    with theirs(make_service(worker)) as client:
        with pytest.raises(openai.NotFoundError, match="Model not found: 'flux'") as missing:
            client.images.edit(image=photo, prompt="x", model="flux")
        with pytest.raises(openai.NotFoundError, match="Model not found: 'flux'"):
            client.models.retrieve("flux")

    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    assert worker.started == []


def test_the_list_has_the_model_that_runs(client: openai.OpenAI, photo: Path) -> None:
    (before,) = client.models.list().data
    client.images.edit(image=photo, prompt="x")
    (after,) = client.models.list().data
    retrieved = client.models.retrieve("step1x-edit")
    version = client.models.retrieve("fake")

    assert before.id == after.id == "step1x-edit"
    assert (before.model_extra or {}) == {"version": None, "location": "Unloaded"}
    assert (after.model_extra or {}) == {"version": "fake", "location": "CPU"}
    assert retrieved == after
    assert (version.id, version.object) == ("fake", "model")


# --- errors as their client raises them -----------------------------------------------------------


def test_their_client_raises_its_own_errors(client: openai.OpenAI, photo: Path) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.edit(image=photo, prompt="x", background="transparent")
    with pytest.raises(openai.BadRequestError, match="image must be one picture, got 2"):
        client.images.edit(image=[photo, photo], prompt="x")
    with pytest.raises(openai.AuthenticationError) as stranger:
        client.with_options(api_key="wrong").images.edit(image=photo, prompt="x")
    with pytest.raises(openai.NotFoundError):
        client.images.create_variation(image=photo)

    assert (bad.value.param, bad.value.type) == ("background", "invalid_request_error")
    assert stranger.value.code == "unauthorized"
    assert "API_KEY" in stranger.value.message


def test_who_asks_too_often_is_told_so_by_their_client(
    make_service: MakeService, photo: Path
) -> None:
    with theirs(make_service(), settings={"rate_limit": 1}) as client:
        client.images.edit(image=photo, prompt="x")
        with pytest.raises(openai.RateLimitError) as refused:
            client.images.edit(image=photo, prompt="x")

    assert refused.value.code == "rate_limited"
    assert int(refused.value.response.headers["retry-after"]) >= 1


def test_a_full_queue_is_told_with_when_to_come_back(
    make_service: MakeService, photo: Path
) -> None:
    gate = Gate()
    service = make_service(FakeWorker(before_step=gate), max_queue=1)
    with theirs(service) as client:

        def ask() -> None:
            client.images.edit(image=photo, prompt="x")

        edits = [threading.Thread(target=ask) for _ in range(2)]
        edits[0].start()
        assert gate.reached.wait(60)
        edits[1].start()
        until(lambda: service.status().gpu_status.queue_length == 1)
        with pytest.raises(openai.InternalServerError, match="Server busy") as busy:
            client.images.edit(image=photo, prompt="x")
        gate.open()
        for edit in edits:
            edit.join(60)

    assert busy.value.status_code == 503
    assert busy.value.code == "queue_full"
    assert int(busy.value.response.headers["retry-after"]) >= 1
    assert "x-should-retry" not in busy.value.response.headers


@pytest.mark.parametrize(
    ("error", "status"),
    [(OutOfMemoryError("use a smaller size_level"), 503), (DeadlineExceededError("too long"), 504)],
)
def test_what_would_fail_again_is_not_tried_again_by_their_client(
    make_service: MakeService, photo: Path, error: Step1XEditError, status: int
) -> None:
    def fail(job: EditJob, step: int) -> None:
        raise error

    worker = FakeWorker(before_step=fail)
    with (
        theirs(make_service(worker), max_retries=2) as client,
        pytest.raises(openai.InternalServerError) as failed,
    ):
        client.images.edit(image=photo, prompt="x")

    assert failed.value.status_code == status
    assert failed.value.code == error.code
    assert len(worker.started) == 1


def test_answers_that_no_route_gives_have_their_form_too(
    make_service: MakeService, photo: Path
) -> None:
    limits = {"max_upload_mb": 1}
    with calling(make_service(**limits), **limits) as client:
        missing = client.post("/v1/images/nope")
        wrong = client.get(EDITS_PATH)
        texts = client.post(EDITS_PATH, data={"prompt": "x"})
        long = client.post(EDITS_PATH, files={"image": b"x" * 4 * 2**20}, data={"prompt": "x"})
        large = client.post(EDITS_PATH, files={"image": b"x" * (2**20 + 1)}, data={"prompt": "x"})
        foreign = client.post(EDITS_PATH, headers={"Origin": "http://evil.example"})
        elsewhere = client.get("/v1/imagesque")

    assert (missing.status_code, failure(missing)["code"]) == (404, "not_found")
    assert (wrong.status_code, failure(wrong)["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert (texts.status_code, failure(texts)["code"]) == (415, "unsupported_media_type")
    assert (long.status_code, failure(long)["code"]) == (413, "image_too_large")
    assert (large.status_code, failure(large)["code"]) == (413, "image_too_large")
    assert (foreign.status_code, failure(foreign)["code"]) == (403, "forbidden")
    assert elsewhere.headers["content-type"] == "application/problem+json"


# --- streams --------------------------------------------------------------------------------------


class StepByStep:
    """Lets a worker continue after a preview only when the listener has received it."""

    def __init__(self) -> None:
        self._seen = threading.Semaphore(0)

    def __call__(self, job: EditJob, step: int) -> None:
        if step - 1 in job.preview_steps:
            assert self._seen.acquire(timeout=240)

    def next(self) -> None:
        self._seen.release()


@pytest.mark.parametrize("output_format", ["png", "jpeg"])
def test_a_stream_shows_previews_and_then_the_picture(
    make_service: MakeService, photo: Path, output_format: Any
) -> None:
    steps = StepByStep()
    events = []
    with theirs(make_service(FakeWorker(before_step=steps))) as client:
        stream = client.images.edit(
            image=photo,
            prompt="x",
            stream=True,
            partial_images=2,
            output_format=output_format,
            extra_body={"seed": 3},
        )
        for event in stream:
            events.append(event)
            steps.next()

    *partial, completed = events
    assert [type(event) for event in partial] == [ImageEditPartialImageEvent] * 2
    assert isinstance(completed, ImageEditCompletedEvent)
    assert [
        event.partial_image_index
        for event in partial
        if isinstance(event, ImageEditPartialImageEvent)
    ] == [0, 1]
    shown = [Image.open(io.BytesIO(decoded(event))) for event in events]
    assert [image.format for image in shown] == [output_format.upper()] * 3
    assert len({image.tobytes() for image in shown}) == 3
    assert [event.size for event in events] == ["64x48"] * 3
    assert all(event.created_at > 0 for event in events)
    assert completed.usage.total_tokens == 0
    assert (completed.model_extra or {})["seed"] == 3
    record = read_edit_record(decoded(completed))
    assert record is not None
    assert record.seed == 3


_ONCE = {"reflection_rounds": 1}


def test_a_reflection_is_told_beside_the_picture_and_in_a_stream(
    make_service: MakeService, photo: Path
) -> None:
    extra = {"thinking": True, "reflection": True}
    with theirs(make_service(FakeWorker(model="v1.2"))) as client:
        answer = client.images.edit(image=photo, prompt="x", n=2, extra_body=extra)
        stream = client.images.edit(
            image=photo, prompt="x", stream=True, partial_images=1, extra_body=extra
        )
        *_, completed = stream
        once = client.images.edit(image=photo, prompt="x", extra_body={**extra, **_ONCE})

    assert once.data is not None
    (judged,) = once.data
    assert len((judged.model_extra or {})["reasoning"]["rounds"]) == 1
    assert answer.data is not None
    told = [(one.model_extra or {})["reasoning"] for one in (*answer.data, completed)]
    assert len(told) == 3
    for reasoning in told:
        assert reasoning["prompt"] == "x, and nothing else"
        assert [one["score"] for one in reasoning["rounds"]] == [6.5, 9.0]


def test_who_cannot_reason_says_so_in_their_words(make_service: MakeService, photo: Path) -> None:
    sentence = "Invalid parameter: reflection needs Step1X-Edit v1.2; the model here is fake"
    with (
        theirs(make_service()) as client,
        pytest.raises(openai.BadRequestError, match=sentence) as raised,
    ):
        client.images.edit(image=photo, prompt="x", extra_body={"reflection": True})

    assert raised.value.code == "invalid_parameter"


async def test_their_async_client_streams_too(make_service: MakeService, photo: Path) -> None:
    async with theirs_async(make_service()) as client:
        stream = await client.images.edit(image=photo, prompt="invert", stream=True)
        (event,) = [event async for event in stream]

    assert isinstance(event, ImageEditCompletedEvent)
    assert np.array_equal(pixels_of(decoded(event)), 255 - pixels_of(photo.read_bytes()))


def test_what_fails_in_the_middle_of_a_stream_is_raised(
    make_service: MakeService, photo: Path
) -> None:
    def fail(job: EditJob, step: int) -> None:
        if step == 5:
            raise OutOfMemoryError("use a smaller size_level")

    with theirs(make_service(FakeWorker(before_step=fail))) as client:
        stream = client.images.edit(image=photo, prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="CUDA out of memory: use a smaller") as failed:
            list(stream)

    assert failed.value.code == "out_of_memory"


def test_what_is_wrong_with_the_picture_is_told_before_a_stream_begins(
    make_service: MakeService,
) -> None:
    with (
        theirs(make_service()) as client,
        pytest.raises(openai.BadRequestError, match="Unsupported image format"),
    ):
        client.images.edit(image=("a.png", b"x"), prompt="x", stream=True)


def test_who_leaves_a_stream_ends_the_edit(make_service: MakeService, photo: Path) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    service = make_service(worker)
    data = {"prompt": "stop", "stream": "true"}
    with (
        calling(service) as client,
        client.stream("POST", EDITS_PATH, files={"image": photo.read_bytes()}, data=data) as answer,
    ):
        assert gate.reached.wait(60)
        assert answer.headers["content-type"].startswith("text/event-stream")
        answer.close()
        until(lambda: service.outcomes.get("cancelled") == 1)
        gate.open()
        until(lambda: worker.stopped_at == {"stop": 2})


def test_their_client_that_closes_a_stream_ends_the_edit(
    make_service: MakeService, photo: Path
) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    service = make_service(worker)
    with theirs(service) as client:
        stream = client.images.edit(image=photo, prompt="stop", stream=True)
        assert gate.reached.wait(60)
        stream.close()
        until(lambda: service.outcomes.get("cancelled") == 1)
        gate.open()
        until(lambda: worker.stopped_at == {"stop": 2})


async def test_who_goes_away_ends_the_edit_within_a_step(
    make_service: MakeService, photo: Path
) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    service = make_service(worker)
    with serving(service) as url:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx2.AsyncClient(
            base_url=url, headers=headers, trust_env=False, timeout=240
        ) as client:
            call = asyncio.ensure_future(
                client.post(
                    EDITS_PATH,
                    files={"image": photo.read_bytes()},
                    data={"prompt": "stop"},
                    timeout=240,
                )
            )
            assert await asyncio.to_thread(gate.reached.wait, 60)
            call.cancel()
        await asyncio.to_thread(until, lambda: service.outcomes.get("cancelled") == 1)
        gate.open()
        await service.release()  # runs once the worker is free

    assert worker.stopped_at == {"stop": 2}


def test_a_stream_that_is_silent_shows_that_it_lives(
    make_service: MakeService, photo: Path
) -> None:
    gate = Gate(at_step=2)
    service = make_service(FakeWorker(before_step=gate))
    app = FastAPI()
    settings = Settings(_env_file=None)
    app.include_router(image_routes(service, settings, Runs(), keep_alive_s=0.01))
    request = {
        "files": {"image": photo.read_bytes()},
        "data": {"prompt": "x", "stream": "true"},
        "timeout": 60,
    }
    with (
        running(app) as url,
        httpx2.stream("POST", url + EDITS_PATH, trust_env=False, **request) as answer,  # type: ignore
    ):
        lines = answer.iter_lines()
        first = next(lines)
        gate.open()
        events = [line for line in lines if line.startswith("data: ")]

    assert first == ": still there"
    assert [json.loads(line[6:])["type"] for line in events] == ["image_edit.completed"]
