"""What the page takes from its visitors, over HTTP: only files that it received or made."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fakes import FakeWorker
from http_server import calling, running, serving
from step1x_edit.errors import NoSpaceError, PathNotAllowedError
from step1x_edit.hub.pulls import Pulls
from step1x_edit.interfaces.page.files import PageFiles, own_folder
from step1x_edit.service.service import EditService
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings, keep_gradio_quiet

MARK = b"nobody outside may read this"
FUNCTIONS = 56  # of the page; a change of their number is no fault, but none at all would be

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def service() -> Iterator[EditService]:
    service = build_service(Settings(_env_file=None), FakeWorker())
    yield service
    service.close()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def page(service: EditService, data_dir: Path) -> Iterator[httpx2.Client]:
    """A client of a server whose page is built; the limit of an upload is 1 MiB."""
    with (
        serving(service, api_key=None, max_upload_mb=1, data_dir=data_dir) as url,
        httpx2.Client(base_url=url, timeout=240, trust_env=False) as client,
    ):
        assert client.get("/").status_code == 200
        yield client


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside.txt"
    path.write_bytes(MARK)
    return path


def file_data(path: object) -> dict[str, Any]:
    """A file as the page's script names it in an event."""
    return {"path": str(path), "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}


def dependencies(page: httpx2.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = page.get("/config").json()["dependencies"]
    assert len(found) >= FUNCTIONS // 2
    return found


def upload(page: httpx2.Client, data: bytes = b"a picture", name: str = "a.png") -> str:
    answer = page.post("/gradio_api/upload", files={"files": (name, data)})
    answer.raise_for_status()
    return str(answer.json()[0])


def join(
    page: httpx2.Client, function: int, data: list[Any], session: str = "one", **more: Any
) -> httpx2.Response:
    event = {"fn_index": function, "data": data, "session_hash": session, **more}
    return page.post("/gradio_api/queue/join", json=event)


def is_refused(answer: httpx2.Response) -> bool:
    return answer.status_code == 403 and answer.json()["code"] == "path_not_allowed"


def is_marked(folder: Path) -> bool:
    return any(path.is_file() and MARK in path.read_bytes() for path in folder.rglob("*"))


# --- events ---------------------------------------------------------------------------------------


def test_no_event_of_the_page_takes_a_file_from_elsewhere(
    page: httpx2.Client, outside: Path, data_dir: Path
) -> None:
    shapes: list[Any] = [
        file_data(outside),
        {"path": str(outside)},
        [file_data(outside)],
        {"image": file_data(outside), "caption": None},
        {"background": None, "layers": [file_data(outside)], "composite": None},
    ]

    for one in dependencies(page):
        for shape in shapes:
            data = [shape] * max(1, len(one["inputs"]))
            assert is_refused(join(page, one["id"], data)), (one["id"], shape)
        nothing = [None] * len(one["inputs"])
        assert is_refused(join(page, one["id"], nothing, event_data=file_data(outside)))
    assert not is_marked(data_dir)


@pytest.mark.parametrize("path", ["/page/\ud83c", "/page/a\0b", "/page/" + "a/" * 3000, 5, {}, []])
def test_what_can_be_no_path_is_refused(page: httpx2.Client, path: object) -> None:
    event = {"fn_index": 0, "data": [{"path": path}], "session_hash": "one"}
    head = {"Content-Type": "application/json"}
    assert is_refused(
        page.post("/gradio_api/queue/join", content=json.dumps(event).encode(), headers=head)
    )


def test_gradio_s_own_check_of_uploads_is_active_behind_ours(
    service: EditService, outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from step1x_edit.interfaces.page import blocks

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # that of the other page is set again in the end

    folder = tmp_path / "page"
    folder.mkdir()
    settings = Settings(_env_file=None)
    keep_gradio_quiet(folder)
    app = blocks.build(service, settings, Pulls(settings), PageFiles(folder, 2**20))
    with (
        running(app) as url,
        httpx2.Client(base_url=url, timeout=240, trust_env=False) as client,
    ):
        asked = 0
        for one in dependencies(client):
            if one["inputs"]:
                data = [file_data(outside)] * len(one["inputs"])
                asked += join(client, one["id"], data).status_code == 200
        failures = list(completions(client, "one", asked))

    assert asked > 0
    assert not any(failures), "an event took the file"
    assert not is_marked(folder)


def completions(client: httpx2.Client, session: str, number: int) -> Iterator[bool]:
    """Whether each of `number` events of a session succeeded."""
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as told:
        for line in told.iter_lines():
            if line.startswith("data:"):
                message = json.loads(line.removeprefix("data:"))
                if message["msg"] == "process_completed":
                    yield message["success"]
                    number -= 1
            if number == 0:
                return


def test_an_upload_belongs_to_the_session_that_names_it_first(page: httpx2.Client) -> None:
    path = upload(page)
    function = dependencies(page)[0]["id"]

    assert join(page, function, [file_data(path)], "first").status_code == 200
    assert is_refused(join(page, function, [file_data(path)], "second"))
    assert join(page, function, [file_data(path)], "first").status_code == 200
    assert upload(page) != path  # also where two visitors send the same picture


def test_what_is_made_for_one_session_is_not_taken_from_another(page: httpx2.Client) -> None:
    photo = next(
        one["id"]
        for one in dependencies(page)
        if not one["inputs"] and len(one["outputs"]) == 1 and one["targets"][0][1] == "click"
    )
    for one in dependencies(page):
        if not one["inputs"] and one["targets"][0][1] == "click":
            assert join(page, one["id"], [], "first").status_code == 200
    path = made_for(page, "first")

    assert is_refused(join(page, photo, [file_data(path)], "second"))
    assert join(page, photo, [file_data(path)], "first").status_code == 200


def made_for(client: httpx2.Client, session: str) -> str:
    """The first path of a file that the events of a session bring about."""
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as told:
        for line in told.iter_lines():
            if '"path":"' in line:
                return line.partition('"path":"')[2].partition('"')[0]
    raise AssertionError("nothing was made")


# --- a result as a picture ------------------------------------------------------------------------


def settings_of_page(page: httpx2.Client, path: str, name: str, session: str) -> dict[str, Any]:
    """What the tab *Edit* shows after a visitor has given it a picture, by the ids of its parts."""
    config = page.get("/config").json()
    named = {one["id"]: one["props"].get("elem_id") for one in config["components"]}
    (take,) = [
        one
        for one in config["dependencies"]
        if [(named[part], event) for part, event in one["targets"] if part in named]
        == [("edit-picture", "change")]
    ]
    join(page, take["id"], [{**file_data(path), "orig_name": name}], session).raise_for_status()
    output = completed(page, session)
    return {named[part]: value for part, value in zip(take["outputs"], output, strict=True)}


def completed(page: httpx2.Client, session: str) -> list[Any]:
    """The values that the next event of a session ends with."""
    with page.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as told:
        for line in told.iter_lines():
            if '"process_completed"' in line:
                message = json.loads(line.removeprefix("data:"))
                assert message["success"], message
                return list(message["output"]["data"])
    raise AssertionError("nothing was completed")


def test_a_result_that_is_dropped_into_the_box_brings_its_settings_back(
    page: httpx2.Client, service: EditService, photo: Path
) -> None:
    asked = {
        "prompt": "add a hat",
        "negative_prompt": "blur",
        "num_steps": 11,
        "guidance_scale": 4.5,
        "size_level": 512,
        "seed": 7,
        "mode": "turbo",
    }
    made = asyncio.run(service.edit_picture(photo.read_bytes(), service.read_picture(asked)))

    with_recipe = settings_of_page(page, upload(page, made.data), "<b>hat.png", "dropped")
    without = settings_of_page(page, upload(page, photo.read_bytes()), "photo.png", "dropped")

    skipped = {"__type__": "update"}
    for name, value in asked.items():
        assert with_recipe[f"edit-{name.replace('_', '-')}"] == value
        assert without[f"edit-{name.replace('_', '-')}"] == skipped
    assert with_recipe["edit-picture"] == with_recipe["edit-thinking"] == skipped
    assert "Settings of &lt;b&gt;hat.png taken from the picture" in with_recipe["edit-line"]
    assert "another seed than 7" in with_recipe["edit-line"]
    assert without["edit-line"] == ""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_what_never_ends_or_leads_elsewhere_is_refused_before_it_is_opened(
    page: httpx2.Client, outside: Path, tmp_path: Path, data_dir: Path
) -> None:
    shown = Path(upload(page)).parent
    folder = data_dir / "page" / "0" / shown.relative_to("/page")
    os.mkfifo(folder / "pipe")
    os.mkfifo(tmp_path / "pipe")
    (folder / "link").symlink_to(outside)

    function = dependencies(page)[0]["id"]
    up = "/.." * len(folder.parts)
    for path in (
        shown / "pipe",
        tmp_path / "pipe",
        shown / "link",
        shown,
        shown / "gone.png",
        f"/page{up}{outside}",
        f"{shown}/a\0.png",
        folder / "a.png",  # by its real path
        "a.png",
        "",
    ):
        assert is_refused(join(page, function, [file_data(path)])), path
        if "\0" not in str(path):
            answer = page.get(f"/gradio_api/file={path}")
            assert answer.status_code in (403, 404), path
    assert page.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"[", b"[]", b'"text"', b'{"a":' + b"[" * 9000, b'{"a":' + b"[]," * 9000],
    ids=["empty", "cut", "list", "text", "deep", "many"],
)
def test_an_event_that_is_no_event_is_refused_in_a_sentence(
    page: httpx2.Client, body: bytes
) -> None:
    for path in ("queue/join", "cancel", "reset"):
        answer = page.post(
            f"/gradio_api/{path}", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 422, path
        assert answer.json()["code"] == "invalid_parameter"


@pytest.mark.parametrize(
    "wanted", ["bytes=" + ",".join(["0-1"] * 10_000), "bytes=1-2-3", "bytes=-", "lines=1-2", "-"]
)
def test_a_range_that_nobody_understands_is_ignored(page: httpx2.Client, wanted: str) -> None:
    path = upload(page, b"0123456789")

    answer = page.get(f"/gradio_api/file={path}", headers={"Range": wanted})
    part = page.get(f"/gradio_api/file={path}", headers={"Range": "bytes=2-4"})

    assert (answer.status_code, answer.content) == (200, b"0123456789")
    assert part.status_code == 206
    assert part.content.startswith(b"234")


@pytest.mark.parametrize(
    "path",
    [
        "/assets/" + "a" * 300,
        "/assets/" + "%F0%9F%96%8C" * 70,
        "/assets/" + "a/" * 3000,
        "/assets/a%00b",
        "/static/" + "a" * 300,
        "/static/a%00b",
        "/gradio_api/heartbeat/a%00b",
        "/gradio_api/queue/data",
        "/gradio_api/queue/data?session_hash=nobody",
        "/gradio_api/queue/data?session_hash=%00",
    ],
)
def test_a_file_or_session_that_there_cannot_be_is_not_found(
    page: httpx2.Client, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = page.get(path)

    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "not_found"
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("host", ["[::1", "[1:::2]", "999.999.999.999", "[", ""])
def test_a_malformed_host_of_a_proxy_is_ignored(page: httpx2.Client, host: str) -> None:
    assert page.get("/config", headers={"X-Forwarded-Host": host}).status_code == 200


def test_the_page_has_the_address_that_a_proxy_says(page: httpx2.Client) -> None:
    config = page.get("/config", headers={"X-Forwarded-Host": "pictures.example:81"}).json()

    assert config["root"] == "http://pictures.example:81"


@pytest.mark.parametrize(
    "event",
    [
        {"fn_index": 99_999, "data": [], "session_hash": "one"},
        {"fn_index": {}, "data": [], "session_hash": "one"},
        {"data": [], "session_hash": "one"},
        {"fn_index": 0, "data": [], "session_hash": ""},
        {"fn_index": 0, "data": "no list", "session_hash": "one"},  # refused by Gradio itself
        {"fn_index": 0, "data": [float("nan")], "session_hash": "one"},
    ],
)
def test_an_event_that_no_page_of_this_server_sends_is_refused(
    page: httpx2.Client, event: dict[str, Any]
) -> None:
    head = {"Content-Type": "application/json"}
    answer = page.post("/gradio_api/queue/join", content=json.dumps(event), headers=head)

    assert answer.status_code == 422
    assert answer.json()["code"] == "invalid_parameter"


def test_failures_of_gradio_have_the_form_of_all_others(
    page: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("gradio.routes.favicon")
    answer = page.get("/favicon.ico")

    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "internal"


def test_no_path_of_the_server_is_shown(page: httpx2.Client, data_dir: Path) -> None:
    assert upload(page).startswith("/page/uploads/")
    for one in dependencies(page):
        if not one["inputs"] and one["targets"][0][1] == "click":
            join(page, one["id"], [], "looking").raise_for_status()
    path = made_for(page, "looking")

    assert path.startswith("/page/made/")
    assert page.get(f"/gradio_api/file={path}").status_code == 200
    for answer in (page.get("/"), page.get("/config")):
        assert str(data_dir) not in answer.text
        assert answer.status_code == 200


# --- room -----------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def sent(files: PageFiles, size: int, name: str = "a.png") -> str:
    """An upload of this many bytes, and its path."""
    async with files.upload(size) as upload:
        path = upload.folder / name
        path.write_bytes(b"x" * size)
    return files.shown(str(path).encode()).decode()


def event(path: str) -> dict[str, Any]:
    return {"data": [file_data(path)]}


async def test_uploads_that_were_named_fill_the_room_until_their_sessions_leave(
    tmp_path: Path,
) -> None:
    clock = Clock()
    files = PageFiles(tmp_path, 1_000_000, clock)
    async with files.open_page("open"), files.open_page("other"):
        for session in ("open", "open", "other", "other"):
            await files.take_event(session, event(await sent(files, 250_000)))
        with pytest.raises(NoSpaceError, match="the pictures of all visitors take more than 0 MB"):
            await sent(files, 250_000)

    await sent(files, 250_000)  # both have left
    clock.now += 3601
    await files.take_event("open", {})
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


async def test_uploads_that_nobody_has_named_give_way_to_others(tmp_path: Path) -> None:
    files = PageFiles(tmp_path, 1_000_000)
    async with files.open_page("open"):
        named = await sent(files, 400_000)
        await files.take_event("open", event(named))
        paths = [await sent(files, 300_000) for _ in range(5)]

        with pytest.raises(PathNotAllowedError, match="upload it again"):
            await files.take_event("open", event(paths[0]))
        await files.take_event("open", event(paths[-1]))
        assert Path(files.real(named)).exists()


async def test_the_files_of_a_session_stay_while_its_page_is_open(tmp_path: Path) -> None:
    clock = Clock()
    files = PageFiles(tmp_path, 1_000_000, clock)
    path = await sent(files, 10)
    made = files.folder_of("open") / "result.png"
    made.parent.mkdir(parents=True)
    made.write_bytes(b"x")
    async with files.open_page("open"):
        await files.take_event("open", event(path))
        clock.now += 100_000
        await files.take_event("open", event(path))
        await files.take_event("open", event(files.shown(bytes(made)).decode()))

    lies = Path(files.real(path))
    clock.now += 601
    await files.take_event("other", {})
    assert not made.exists()
    assert not lies.exists()


async def test_sessions_that_never_open_the_page_are_forgotten(tmp_path: Path) -> None:
    """Anybody can invent names of sessions, and have something made for each."""
    files = PageFiles(tmp_path, 1_000_000)
    for number in range(1100):
        folder = files.folder_of(str(number))
        folder.mkdir(parents=True)
        await files.take_event(str(number), {})

    assert len(list((tmp_path / "made").iterdir())) <= 1001


def test_an_upload_without_room_is_refused_and_what_is_refused_leaves_nothing(
    service: EditService, tmp_path: Path
) -> None:
    with calling(service, max_upload_mb=1, data_dir=tmp_path) as page:
        function = dependencies(page)[0]["id"]
        folder = tmp_path / "page" / "0" / "uploads"
        with page.stream("GET", "/gradio_api/heartbeat/open") as open_page:
            lines = open_page.iter_lines()
            assert next(lines)
            for _ in range(8):
                path = upload(page, b"x" * 1_000_000)
                assert join(page, function, [file_data(path)], "open").status_code == 200
            before = set(folder.iterdir())
            no_room = page.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 900_000)})
            too_large = page.post(
                "/gradio_api/upload", files={"files": ("a.png", b"x" * 1_048_577)}
            )
            no_form = page.post(
                "/gradio_api/upload",
                content=b"--b\r\nnonsense",
                headers={"Content-Type": "multipart/form-data; boundary=b"},
            )
            no_file = page.post("/gradio_api/upload", files={"files": (None, b"a text")})
            after = set(folder.iterdir())

    assert (no_room.status_code, no_room.json()["code"]) == (507, "no_space")
    assert "the pictures of all visitors take more than 8 MB" in no_room.json()["detail"]
    assert too_large.status_code in (413, 507)
    assert no_form.status_code == no_file.status_code == 400
    assert before == after


def test_each_server_has_a_folder_and_none_is_left_of_those_that_were_killed(
    tmp_path: Path,
) -> None:
    with own_folder(tmp_path) as first, own_folder(tmp_path) as second:
        assert first != second
        (first / "picture").write_bytes(b"x")
        left = tmp_path / "page" / "5" / "picture"
        left.parent.mkdir()
        left.write_bytes(b"x")
        with own_folder(tmp_path) as third:
            assert not left.exists()
            assert third not in (first, second)
        assert (first / "picture").exists()
    assert not first.exists()
