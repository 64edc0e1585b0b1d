"""REST: a picture in, a picture out, and every failure as a problem with its status."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from conftest import MakeService
from fakes import STREAMED, FakeWorker, Gate, ManualClock
from http_server import TOKEN, calling, serving, until
from step1x_edit.channel import EditJob
from step1x_edit.errors import DeadlineExceededError, OutOfMemoryError, Step1XEditError
from step1x_edit.pictures.images import read_edit_record
from step1x_edit.service.service import EditService
from step1x_edit.settings import MOST, Settings


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def files(photo: Path) -> dict[str, Any]:
    return {"file": (photo.name, photo.read_bytes())}


@pytest.fixture
def client(make_service: MakeService) -> Iterator[httpx2.Client]:
    """A client of a server with the usual settings."""
    with calling(make_service()) as client:
        yield client


def problem(answer: httpx2.Response) -> dict[str, Any]:
    """The problem that an answer tells, after a look at what all of them have in common."""
    assert answer.headers["content-type"] == "application/problem+json"
    told: dict[str, Any] = answer.json()
    assert told.keys() - {"errors"} == {"type", "title", "status", "detail", "code", "instance"}
    assert told["status"] == answer.status_code
    assert told["instance"].endswith(answer.headers["x-request-id"])
    assert told["type"] == f"urn:step1x-edit:problem:{told['code']}"
    assert "\n" not in told["detail"]
    assert len(told["detail"]) <= 500
    return told


# --- good requests --------------------------------------------------------------------------------


def test_a_picture_comes_back_edited_with_what_repeats_it(
    client: httpx2.Client, photo: Path
) -> None:
    answer = client.post(
        "/api/edit",
        files=files(photo),
        data={"prompt": "invert", "num_steps": "10", "guidance_scale": "4.5", "seed": "7"},
    )

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-seed"] == "7"
    assert float(answer.headers["x-processing-time"]) >= 0
    assert answer.headers["content-disposition"] == 'inline; filename="edited.png"'
    assert answer.headers["cache-control"] == "no-store"
    assert np.array_equal(pixels_of(answer.content), 255 - pixels_of(photo.read_bytes()))
    record = read_edit_record(answer.content)
    assert record is not None
    assert (record.prompt, record.num_steps, record.guidance_scale) == ("invert", 10, 4.5)
    assert [path.name for path in photo.parent.iterdir()] == [photo.name]


def test_what_programs_edit_is_not_kept_in_the_history(
    make_service: MakeService, photo: Path, tmp_path: Path
) -> None:
    with calling(make_service(), history=True, data_dir=tmp_path / "data") as client:
        answer = client.post("/api/edit", files=files(photo), data={"prompt": "x"})

    assert answer.status_code == 200
    assert not (tmp_path / "data" / "history").exists()


def test_a_reflection_is_told_in_json_with_a_small_picture_of_each_round(
    make_service: MakeService, photo: Path
) -> None:
    asked = {"prompt": "invert", "num_steps": "10", "thinking": "true", "reflection": "true"}
    with calling(make_service(FakeWorker(model="v1.2"))) as client:
        answer = client.post(
            "/api/edit", files=files(photo), data=asked, headers={"Accept": "application/json"}
        )
        plain = client.post(
            "/api/edit",
            files=files(photo),
            data={"prompt": "invert", "thinking": "no"},
            headers={"Accept": "application/json"},
        )
        wrong = client.post("/api/edit", files=files(photo), data={**asked, "thinking": "maybe"})

    told = answer.json()
    reasoning = told["metadata"]["reasoning"]
    assert reasoning["prompt"] == "invert, and nothing else"
    assert (len(reasoning["rounds"]), reasoning["best"]) == (2, 2)
    before = pixels_of(photo.read_bytes()).astype(int)
    shown = [pixels_of(base64.b64decode(one["image"])).astype(int) for one in told["rounds"]]
    for small, expected in zip(shown, (before, 255 - before), strict=True):
        assert np.abs(small - expected).mean() < 8
    assert "rounds" not in plain.json()
    assert "reasoning" not in plain.json()["metadata"]
    assert problem(wrong)["detail"] == (
        "Invalid parameter: thinking must be true or false, got 'maybe'"
    )


@pytest.mark.parametrize("given", [{}, {"seed": "-1"}])
def test_a_missing_seed_is_drawn_and_reported(
    client: httpx2.Client, photo: Path, given: dict[str, str]
) -> None:
    first, second = (
        client.post("/api/edit", files=files(photo), data={"prompt": "x", **given})
        for _ in range(2)
    )

    record = read_edit_record(first.content)
    assert record is not None
    assert str(record.seed) == first.headers["x-seed"]
    assert first.headers["x-seed"] != second.headers["x-seed"]


def test_what_is_left_out_is_what_the_operator_has_chosen(
    make_service: MakeService, photo: Path
) -> None:
    with calling(make_service(default_num_steps=12, default_size_level=512)) as client:
        answer = client.post("/api/edit", files=files(photo), data={"prompt": "x"})
        form = client.get("/openapi.json").json()["paths"]["/api/edit"]["post"]["requestBody"]

    record = read_edit_record(answer.content)
    assert record is not None
    assert (record.num_steps, record.size_level) == (12, 512)
    fields = form["content"]["multipart/form-data"]["schema"]["properties"]
    assert (fields["num_steps"]["default"], fields["size_level"]["default"]) == (12, 512)


@pytest.mark.parametrize("prompt", ["给它一顶红帽子 🎩", "a\r\nX-Evil: 1", "naïve “quotes”"])
def test_no_text_of_the_caller_lands_in_a_header(
    client: httpx2.Client, photo: Path, prompt: str
) -> None:
    name = "evil\r\nX-Evil: 1😀.png"
    answer = client.post(
        "/api/edit", files={"file": (name, photo.read_bytes())}, data={"prompt": prompt}
    )

    assert answer.status_code == 200
    record = read_edit_record(answer.content)
    assert record is not None
    assert record.prompt == prompt
    told = " ".join(f"{key} {value}" for key, value in answer.headers.items()).lower()
    assert "evil" not in told


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("image/webp", "image/webp"),
        ("image/jpeg;q=0.5, image/webp;q=0.8", "image/webp"),
        ("text/html, image/bmp;q=0.1, */*;q=0.05", "image/bmp"),
        ("image/heic, image/*;q=0.5", "image/png"),
        ("application/json;q=0, */*", "image/png"),
        ("", "image/png"),
        (";q=x,,;", "image/png"),
    ],
)
def test_the_caller_chooses_the_format(
    client: httpx2.Client, photo: Path, accept: str, kind: str
) -> None:
    answer = client.post(
        "/api/edit", files=files(photo), data={"prompt": "x"}, headers={"Accept": accept}
    )

    assert answer.headers["content-type"] == kind
    assert Image.open(io.BytesIO(answer.content)).get_format_mimetype() == kind


@pytest.mark.parametrize("accept", ["image/heic", "text/html", "image/png;q=0", "image/jpg"])
def test_a_kind_that_cannot_be_made_is_refused(
    make_service: MakeService, photo: Path, accept: str
) -> None:
    worker = FakeWorker()
    with calling(make_service(worker)) as client:
        answer = client.post(
            "/api/edit", files=files(photo), data={"prompt": "x"}, headers={"Accept": accept}
        )

    assert (answer.status_code, answer.json()["code"]) == (406, "not_acceptable")
    kinds = "image/png, image/jpeg, image/webp, image/avif, image/tiff, image/bmp, application/json"
    assert answer.json()["detail"] == f"Accept must name one of {kinds}."
    assert worker.started == []


def test_a_caller_that_takes_any_json_gets_json(client: httpx2.Client, photo: Path) -> None:
    accept = {"Accept": "text/plain, application/*;q=0.9"}
    answer = client.post("/api/edit", files=files(photo), data={"prompt": "x"}, headers=accept)

    assert answer.json()["media_type"] == "image/png"


def test_the_answer_of_the_tools_is_there_as_json_with_the_picture(
    make_service: MakeService, photo: Path
) -> None:
    with calling(make_service(FakeWorker(warning="it does not know hats"))) as client:
        data = {"prompt": "x", "seed": "3"}
        accept = {"Accept": "application/json"}
        answer = client.post("/api/edit", files=files(photo), data=data, headers=accept).json()
        plain = client.post("/api/edit", files=files(photo), data=data)

    assert answer["status"] == "success"
    assert answer["metadata"]["seed"] == 3
    assert answer["metadata"]["warning"] == "it does not know hats"
    assert answer["media_type"] == "image/png"
    assert base64.b64decode(answer["image_base64"]) == plain.content


def test_what_was_unusual_about_a_file_stands_beside_the_warning_of_the_model(
    make_service: MakeService, photo: Path
) -> None:
    whole = io.BytesIO()
    Image.open(photo).save(whole, "JPEG")
    upload = {"file": ("photo.jpg", whole.getvalue()[:-2])}
    with calling(make_service(FakeWorker(warning="it does not know hats"))) as client:
        answer = client.post(
            "/api/edit", files=upload, data={"prompt": "x"}, headers={"Accept": "application/json"}
        ).json()

    assert answer["metadata"]["warning"] == (
        "it does not know hats; the JPEG lacks its end marker; its picture is complete"
    )


@pytest.mark.parametrize("accept", ["image/png", "application/json"])
def test_with_a_mask_the_rest_stays_and_the_answer_says_how_much_changed(
    client: httpx2.Client, photo: Path, accept: str
) -> None:
    mask = io.BytesIO()
    image = Image.new("L", (64, 48), 0)
    image.paste(255, (16, 0, 64, 48))
    image.save(mask, "PNG")
    sent = {**files(photo), "mask": ("mask.png", mask.getvalue())}
    answer = client.post("/api/edit", files=sent, data={"prompt": "x"}, headers={"Accept": accept})
    plain = client.post("/api/edit", files=files(photo), data={"prompt": "x"})

    is_json = accept == "application/json"
    data = base64.b64decode(answer.json()["image_base64"]) if is_json else answer.content
    before = pixels_of(photo.read_bytes())
    assert np.array_equal(pixels_of(data)[:, :16], before[:, :16])
    assert np.array_equal(pixels_of(data)[:, 20:], 255 - before[:, 20:])
    assert answer.headers["x-changed-share"] == "0.7500"
    if is_json:
        assert answer.json()["metadata"]["changed_share"] == 0.75
    assert "x-changed-share" not in plain.headers


def test_a_picture_and_its_mask_may_each_have_the_largest_size(
    make_service: MakeService, photo: Path
) -> None:
    limits = {"max_upload_mb": 1}
    buffer = io.BytesIO()
    Image.fromarray(np.frombuffer(NOISE, np.uint8)[: 3 * 580 * 580].reshape(580, 580, 3)).save(
        buffer, "PNG"
    )
    heavy = buffer.getvalue()
    assert 0.9 * 2**20 < len(heavy) <= 2**20
    with calling(make_service(**limits), **limits) as client:
        answer = client.post(
            "/api/edit", files={"file": heavy, "mask": heavy}, data={"prompt": "x"}
        )

    assert answer.status_code == 200


def test_the_gpu_operations_answer_as_the_tools_do(make_service: MakeService, photo: Path) -> None:
    with calling(make_service(FakeWorker(device="cuda:0"))) as client:
        client.post("/api/edit", files=files(photo), data={"prompt": "x"})
        status = client.get("/api/gpu/status").json()
        offloaded = client.post("/api/gpu/offload").json()
        released = client.post("/api/gpu/release").json()

    assert status["gpu_status"]["model_location"] == "GPU"
    assert offloaded["message"] == "GPU offloaded. Model now on CPU, GPU memory: 0.00GB"
    assert released["message"] == "GPU released. Model location: Unloaded, GPU memory: 0.00GB"
    assert released["gpu_status"]["statistics"]["full_releases"] == 1


# --- bad requests ---------------------------------------------------------------------------------


def a_png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


NOISE = np.random.default_rng(0).bytes(2**20)


@pytest.mark.parametrize(
    ("fields", "status", "detail"),
    [
        ({"num_steps": "5"}, 422, "Invalid parameter: num_steps must be between 10 and 50"),
        ({"num_steps": "28.5"}, 422, "Invalid parameter: num_steps must be a whole number"),
        ({"guidance_scale": "nan"}, 422, "Invalid parameter: guidance_scale must be a number"),
        ({"size_level": "600"}, 422, "Invalid parameter: size_level must be 512, 768 or 1024"),
        ({"seed": "4294967296"}, 422, "Invalid parameter: seed must be"),
        ({"setps": "10"}, 422, "Invalid parameter: 'setps' is unknown"),
        ({"num_step": "10"}, 422, "Invalid parameter: 'num_step' is unknown, did you mean num_st"),
        ({"image_path": "/etc/passwd"}, 422, "Invalid parameter: 'image_path' is unknown"),
        ({"output_path": "x.png"}, 422, "Invalid parameter: 'output_path' is unknown"),
        ({"prompt": None}, 422, "Invalid parameter: prompt is missing"),
        ({"prompt": "x" * 4001}, 422, "Invalid parameter: prompt must have at most 4000 chara"),
        ({"prompt": "x" * 70_000}, 422, "Invalid parameter: the form cannot be read: Part exce"),
        ({f"f{n}": "" for n in range(30)}, 422, "Invalid parameter: the form cannot be read: To"),
        ({"prompt": ["a", "b"]}, 422, "Invalid parameter: 'prompt' is given twice"),
        ({"file": None}, 422, "Invalid parameter: file is missing"),
        ({"image": b"x"}, 422, "Invalid parameter: 'image' takes no file; upload the picture as"),
        ({"file": b"GIF89a, no picture"}, 415, "Unsupported image format: the file is"),
        ({"file": b"no picture"}, 415, "Unsupported image format: the file is none of PNG"),
        ({"file": b""}, 415, "Unsupported image format: the file is none of PNG"),
        ({"file": a_png(64, 64)[:60]}, 422, "Cannot read image: the file is damaged or incompl"),
        ({"file": a_png(8, 8)}, 422, "Image too small: 8×8 pixels"),
        ({"file": a_png(640, 16)}, 422, "Image too elongated: 640×16 pixels"),
        ({"file": a_png(1600, 1600)}, 413, "Image too large: 1600×1600 pixels"),
        ({"file": NOISE + b"+"}, 413, "Image too large: at most 1 MB are allowed"),
        ({"mask": b"no picture"}, 415, "Unsupported image format: mask: the file is none of PNG"),
        ({"mask": b""}, 415, "Unsupported image format: mask: the file is none of PNG"),
        ({"mask": a_png(64, 48)[:60]}, 422, "Cannot read image: mask: the file is damaged or i"),
        ({"mask": a_png(1600, 1600)}, 413, "Image too large: mask: 1600×1600 pixels"),
        ({"mask": NOISE + b"+"}, 413, "Image too large: mask: at most 1 MB are allowed"),
        ({"mask": a_png(48, 64)}, 422, "Invalid parameter: mask is 48×64 pixels, the picture is 6"),
        ({"mask": a_png(64, 48)}, 422, "Invalid parameter: mask selects nothing"),
        ({"mask": "mask.png"}, 422, "Invalid parameter: mask must be an uploaded file"),
        ({"mask": ""}, 422, "Invalid parameter: mask must be an uploaded file"),
        ({"mask": [b"a", b"b"]}, 422, "Invalid parameter: 'mask' is given twice"),
        ({"mask_path": "mask.png"}, 422, "Invalid parameter: 'mask_path' is unknown"),
        ({"file": NOISE * 3}, 413, "Image too large: at most 1 MB are allowed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_wrong_with_a_request_is_said_by_name(
    make_service: MakeService, photo: Path, fields: dict[str, Any], status: int, detail: str
) -> None:
    worker = FakeWorker()
    limits = {"max_upload_mb": 1, "max_megapixels": 2}
    given = {"prompt": "x", "file": photo.read_bytes(), **fields}
    parts: list[tuple[str, Any]] = []
    for name, value in given.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, bytes):
                parts.append((name, ("a.png", each)))
            elif each is not None:
                parts.append((name, (None, each)))
    with calling(make_service(worker, **limits), **limits) as client:
        answer = client.post("/api/edit", files=parts)

    told = problem(answer)
    assert answer.status_code == status
    assert told["detail"].startswith(detail)
    assert worker.started == []


@pytest.mark.parametrize(
    "name",
    ["a%0D%0AX-Evil: 1.png", "戴红帽子 🎩.png", "x" * 2000, "../../etc/passwd", "\x1b[31m.png"],
)
def test_nothing_of_the_callers_file_name_comes_back(
    client: httpx2.Client, photo: Path, name: str
) -> None:
    answer = client.post(
        "/api/edit",
        files={"file": (name, photo.read_bytes())},
        data={"prompt": f"{name[:100]}\r\nX-Evil: 1", "num_steps": "10"},
        headers={"Accept": "image/webp"},
    )

    assert answer.status_code == 200
    assert answer.headers["content-disposition"] == 'inline; filename="edited.webp"'
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not [value for value in answer.headers.values() if "Evil" in value or name in value]


def test_each_wrong_parameter_is_told_by_itself_too(client: httpx2.Client, photo: Path) -> None:
    hostile = "x\u202e" * 1000  # turns the direction of what follows
    answer = client.post(
        "/api/edit",
        files={"file": photo.read_bytes()},
        data={"prompt": "x", "num_steps": "5", "seed": "many", hostile: "1"},
    )
    told = problem(answer)

    assert [wrong["field"] for wrong in told["errors"][:2]] == ["num_steps", "seed"]
    assert told["errors"][0]["message"] == "num_steps must be between 10 and 50, got 5"
    assert "; ".join(wrong["message"] for wrong in told["errors"][:2]) in told["detail"]
    assert len(told["errors"]) == 3
    assert len(told["errors"][2]["field"]) <= 500
    assert told["errors"][2]["field"].isprintable()


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"data": {"prompt": "x"}}, 415, "unsupported_media_type"),
        ({"json": {"prompt": "x"}}, 415, "unsupported_media_type"),
        ({"content": b"x"}, 415, "unsupported_media_type"),
        (
            {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
            422,
            "invalid_parameter",
        ),
        (
            {"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
            422,
            "invalid_parameter",
        ),
        ({"files": {"file": (None, "a text")}}, 422, "invalid_parameter"),
        ({"files": {"file": ("a", b""), "prompt": ("b", b"")}}, 422, "invalid_parameter"),
    ],
)
def test_what_is_no_form_with_a_picture_is_refused(
    client: httpx2.Client, request_: dict[str, Any], status: int, code: str
) -> None:
    answer = client.post("/api/edit", **request_)

    told = problem(answer)
    assert (answer.status_code, told["code"]) == (status, code)
    assert "form" in told["detail"] or "file" in told["detail"]


def test_routes_and_methods_that_do_not_exist_are_problems_as_well(
    client: httpx2.Client,
) -> None:
    missing = client.get("/nope")
    slashed = client.get("/health/")
    wrong = client.get("/api/edit")
    posted = client.post("/docs")
    put = [client.put(f"/v1/jobs{rest}") for rest in ("", "/x", "/x/events")]

    assert problem(missing)["code"] == "not_found"
    assert problem(slashed)["code"] == "not_found"
    assert problem(wrong)["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"
    assert posted.headers["allow"] == "GET, HEAD"
    assert [answer.headers["allow"] for answer in put] == ["GET, POST", "DELETE, GET", "GET"]


@pytest.mark.parametrize(
    ("error", "status", "comes_back"),
    [
        (OutOfMemoryError("use a smaller size_level"), 503, False),
        (DeadlineExceededError("it took too long"), 504, False),
        ("crash", 503, True),
    ],
)
def test_what_goes_wrong_in_the_worker_has_a_status(
    make_service: MakeService,
    photo: Path,
    error: Step1XEditError | str,
    status: int,
    comes_back: bool,
) -> None:
    worker = FakeWorker()

    def fail(job: EditJob, step: int) -> None:
        if isinstance(error, Step1XEditError):
            raise error
        worker.crash()

    worker.before_step = fail
    with calling(make_service(worker)) as client:
        answer = client.post("/api/edit", files=files(photo), data={"prompt": "x"})

    assert answer.status_code == status
    assert problem(answer)["title"]
    assert ("retry-after" in answer.headers) == comes_back


def test_what_nobody_expected_is_not_told_but_logged(
    make_service: MakeService,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def break_down(*arguments: object) -> None:
        raise RuntimeError("a secret at /root/secret")

    monkeypatch.setattr("step1x_edit.pictures.images.decode", break_down)
    with calling(make_service()) as client:
        answer = client.post("/api/edit", files=files(photo), data={"prompt": "x"})

    assert answer.status_code == 500
    assert problem(answer)["code"] == "internal"
    assert "secret" not in answer.text
    assert "a secret at /root/secret" in caplog.text


# --- load and leaving -----------------------------------------------------------------------------


def test_a_full_queue_is_told_at_once_with_when_to_come_back(
    make_service: MakeService, photo: Path
) -> None:
    gate = Gate()
    service = make_service(FakeWorker(before_step=gate), max_queue=1)
    with calling(service) as client:
        edits = [
            threading.Thread(
                target=client.post,
                args=("/api/edit",),
                kwargs={"files": files(photo), "data": {"prompt": "x"}},
            )
            for _ in range(2)
        ]
        edits[0].start()
        assert gate.reached.wait(60)
        edits[1].start()
        until(lambda: service.status().gpu_status.queue_length == 1)
        refused = client.post("/api/edit", files=files(photo), data={"prompt": "x"})
        not_ready = client.get("/readyz")
        checks = client.get("/readyz?verbose")
        health = client.get("/health")
        alive = client.get("/livez")
        gate.open()
        for edit in edits:
            edit.join(60)
        ready = client.get("/readyz")

    assert refused.status_code == 503
    assert problem(refused)["detail"].startswith("Server busy: 1 edit is waiting, try again in")
    assert int(refused.headers["retry-after"]) >= 1
    assert problem(not_ready)["code"] == "queue_full"
    assert checks.status_code == 503
    assert checks.text.startswith("[-] room in the queue: Server busy")
    assert "[+] worker\n[+] checkpoint\n[+] disk" in checks.text
    assert checks.text.endswith("\nnot ready\n")
    assert health.json()["status"] == "unavailable"
    assert health.json()["queue_length"] == 1
    assert (alive.status_code, alive.text) == (200, "ok\n")
    assert (ready.status_code, ready.text) == (200, "ready\n")


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
                client.post("/api/edit", files=files(photo), data={"prompt": "stop"}, timeout=240)
            )
            assert await asyncio.to_thread(gate.reached.wait, 60)
            call.cancel()
        await asyncio.to_thread(until, lambda: service.outcomes.get("cancelled") == 1)
        gate.open()
        await service.release()  # runs once the worker is free

    assert worker.stopped_at == {"stop": 2}


def test_who_goes_away_in_the_middle_of_an_upload_starts_nothing(
    make_service: MakeService, photo: Path
) -> None:
    worker = FakeWorker()

    def half() -> Any:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        yield photo.read_bytes()
        raise ConnectionError

    with calling(make_service(worker)) as client:
        with pytest.raises(ConnectionError):
            client.post(
                "/api/edit",
                content=half(),
                headers={"Content-Type": "multipart/form-data; boundary=b"},
            )
        health = client.get("/health")

    assert health.status_code == 200
    assert worker.started == []


def test_an_edit_works_with_every_number_at_its_upper_bound(
    make_service: MakeService, photo: Path
) -> None:
    most = {
        name: MOST
        for name, field in Settings.model_fields.items()
        if any(getattr(rule, "le", None) == MOST for rule in field.metadata)
    }
    with calling(make_service(**most), **most) as client:
        answer = client.post("/api/edit", files=files(photo), data={"prompt": "x"})
        job = client.post("/v1/jobs", files=files(photo), data={"prompt": "x"})

    assert len(most) > 8
    assert (answer.status_code, job.status_code) == (200, 202)


# --- watching -------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_there_is_seen_before_an_edit(
    make_service: MakeService, tmp_path: Path
) -> None:
    with calling(make_service(model_path=tmp_path / "none")) as client:
        ready = client.get("/readyz")
        checks = client.get("/readyz?verbose=1")

    assert ready.status_code == 503
    assert problem(ready)["detail"].startswith("Manager not initialized: there is nothing at MODEL")
    assert "[+] worker\n[-] checkpoint: Manager not" in checks.text


def test_a_server_whose_worker_keeps_dying_is_not_ready_until_it_may_start_again(
    make_service: MakeService, photo: Path
) -> None:
    clock, worker = ManualClock(), FakeWorker()
    worker.before_step = lambda job, step: worker.crash()
    with calling(make_service(worker, clock)) as client:

        def edit() -> httpx2.Response:
            return client.post("/api/edit", files=files(photo), data={"prompt": "x"})

        lost = [edit().status_code for _ in range(3)]
        ready = client.get("/readyz")
        lost.append(edit().status_code)
        refused, not_ready, checks = edit(), client.get("/readyz"), client.get("/readyz?verbose")
        health = client.get("/health").json()["status"]
        clock.advance(600)
        ready_again = client.get("/readyz")

    assert lost == [503] * 4
    assert (ready.status_code, ready_again.status_code) == (200, 200)
    assert not_ready.status_code == 503
    assert problem(not_ready)["detail"] == problem(refused)["detail"]
    assert "has ended 4 times within 10 minutes" in problem(refused)["detail"]
    assert not_ready.headers["retry-after"] == "600"
    assert "[-] worker: Manager not initialized: the worker process has ended 4 " in checks.text
    assert health == "unavailable"


def test_a_server_whose_disk_cannot_take_a_job_is_not_ready(
    make_service: MakeService, tmp_path: Path
) -> None:
    more_than_any_disk = {"max_upload_mb": 10**9, "data_dir": tmp_path / "not yet" / "there"}
    with calling(make_service(**more_than_any_disk)) as client:
        not_ready, checks = client.get("/readyz"), client.get("/readyz?verbose")
    with calling(make_service(**more_than_any_disk, enable_api=False)) as client:
        ready = client.get("/readyz")

    assert not_ready.status_code == checks.status_code == 503
    assert problem(not_ready)["code"] == "no_space"
    assert "free in DATA_DIR" in problem(not_ready)["detail"]
    assert str(tmp_path) not in not_ready.text + checks.text  # anybody may ask without API_KEY
    assert "[-] disk for stored jobs: " in checks.text
    assert ready.status_code == 200  # without jobs nothing is stored


def test_the_metrics_count_what_came_through_any_door(
    make_service: MakeService, photo: Path
) -> None:
    worker = FakeWorker()
    service: EditService = make_service(worker)
    with calling(service) as client:
        for steps in ("10", "5"):
            client.post("/api/edit", files=files(photo), data={"prompt": "x", "num_steps": steps})
        client.get("/nope/1")
        client.get("/nope/2", headers={"Authorization": "Bearer wrong"})
        request = service.read_picture({"prompt": "y"})
        asyncio.run(service.edit_picture(photo.read_bytes(), request))
        answer = client.get("/metrics")

    assert answer.headers["content-type"].startswith("text/plain; version=")
    for line in (
        'step1x_edits_total{outcome="success"} 2.0',
        'step1x_model_location{location="CPU"} 1.0',
        'step1x_model_moves_total{move="total_loads"} 1.0',
        "step1x_queue_length 0.0",
        'step1x_http_requests_total{path="/api/edit",status="200"} 1.0',
        'step1x_http_requests_total{path="/api/edit",status="422"} 1.0',
        'step1x_http_requests_total{path="other",status="404"} 1.0',
        'step1x_http_requests_total{path="other",status="401"} 1.0',
    ):
        assert f"\n{line}\n" in answer.text
    assert "nope" not in answer.text


def test_status_and_metrics_tell_how_the_model_is_placed(
    make_service: MakeService, photo: Path
) -> None:
    with calling(make_service(FakeWorker(device="cuda:0", placement=STREAMED))) as client:
        before = client.get("/api/gpu/status").json(), client.get("/metrics").text
        client.post("/api/edit", files=files(photo), data={"prompt": "x", "num_steps": "10"})
        status, metrics = client.get("/api/gpu/status").json(), client.get("/metrics").text

    assert "plan" not in before[0]["gpu_status"]
    assert "\nstep1x_plan_resident_share " not in before[1]
    assert status["gpu_status"]["plan"] == {
        "resident_share": 0.31,
        "precision": "bf16",
        "streaming": True,
        "slots": 2,
        "joint_branches": False,
        "reason": STREAMED.reason,
        "predicted_peak_gb": 7.4,
        "measured_peak_gb": 7.12,
        "host_gb": 39.0,
    }
    samples = dict(line.rsplit(" ", 1) for line in metrics.splitlines())
    for name, value in {
        "step1x_plan_resident_share": 0.31,
        "step1x_plan_slots": 2,
        'step1x_peak_memory_bytes{kind="predicted"}': 7.4e9,
        'step1x_peak_memory_bytes{kind="measured"}': 7.12e9,
        "step1x_host_memory_bytes": 39.0e9,
    }.items():
        assert float(samples[name]) == pytest.approx(value)


def test_each_request_is_a_line_in_the_log_with_its_id_and_without_its_text(
    client: httpx2.Client, photo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    answer = client.post("/api/edit", files=files(photo), data={"prompt": "a secret wish"})
    client.get("/a%0Ab?token=secret", headers={"X-Request-Id": "mine\x1b[1m"})

    def lines() -> list[str]:
        return [record.message for record in caplog.records if record.name.endswith(".guard")]

    # A line is written once its answer has been sent, so the client may be faster.
    until(lambda: any(line.startswith("GET /a%0Ab 404 ") for line in lines()))
    assert any(
        line.startswith("POST /api/edit 200 ")
        and line.endswith(f"id={answer.headers['x-request-id']}")
        for line in lines()
    )
    assert "secret" not in " ".join(lines())
    assert json.dumps(lines()).count("\\n") == 0


# --- settings -------------------------------------------------------------------------------------


def test_each_door_can_be_left_out(make_service: MakeService) -> None:
    service = make_service()
    found = {}
    for name in ("enable_api", "enable_mcp", "enable_ui"):
        with calling(service, **{name: False}) as client:
            found[name] = (
                client.get("/api/gpu/status").status_code != 404,
                client.get("/mcp").status_code != 404,
                client.get("/livez").status_code != 404,
                client.get("/theme.css").status_code != 404,
                "/api/edit" in client.get("/openapi.json").json()["paths"],
            )

    assert found == {
        "enable_api": (False, True, True, True, False),
        "enable_mcp": (True, False, True, True, True),
        "enable_ui": (True, True, True, False, True),
    }
