"""The web page in a real browser, before a worker process that needs no model."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from string import Formatter

import axe_playwright_python
import httpx2
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Locator,
    Page,
    Request,
    Response,
    expect,
    sync_playwright,
)

from conftest import MakeService
from extent import by_extent
from fakes import FakeWorker, Gate, HeldDisk, ManualClock
from http_server import TOKEN, serving, until
from local_hub import Fault, Hub, asked_by_default, running_hub
from step1x_edit.channel import EditJob, Phase, Progress, Start
from step1x_edit.engine.worker_process import WorkerProcess
from step1x_edit.errors import Step1XEditError
from step1x_edit.hub.catalog import find_model
from step1x_edit.interfaces.page import blocks
from step1x_edit.interfaces.page.progress import ProgressLine
from step1x_edit.interfaces.page.texts import LANGUAGES, language_of, text, translations
from step1x_edit.pictures import images
from step1x_edit.schemas.requests import EditRequest
from step1x_edit.service.file_edits import FileEdits
from step1x_edit.service.files import FileAccess
from step1x_edit.service.history import History
from step1x_edit.service.service import EditService
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings

# The first has no window system: it computes a third less than the others without a window.
BROWSERS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "chrome",
)
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-features=PaintHolding,SpareRendererForSitePerProcess",  # no process in reserve
]
PATIENCE_MS = 90_000  # mask editors draw without a GPU here

pytestmark = pytest.mark.timeout(300)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def service() -> Iterator[EditService]:
    settings = Settings(_env_file=None, max_queue=1, default_num_steps=10)
    worker = partial(WorkerProcess, Start(), module="toy_worker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        service = build_service(settings, worker)
        yield service
        service.close()


@pytest.fixture(scope="module")
def url(service: EditService) -> Iterator[str]:
    """A page that shows the state of the model at the beginning and after an edit, but not every
    three seconds, which would need a second of the processors for each test.
    """
    with serving(service, api_key=None, max_queue=1, max_upload_mb=1) as url:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "_REFRESH_S", 3600.0)
            httpx2.get(url, timeout=240, trust_env=False)  # the first request builds the page
        yield url


@pytest.fixture(autouse=True)
def _files_of_this_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio keeps the folder of uploads in the environment from when the page is built, so a test
    that starts another page would take it from the page of this file.
    """
    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ.get("GRADIO_TEMP_DIR", ""))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def visitor(browser: Browser) -> Callable[[str], BrowserContext]:
    """A visitor with this language; what the browser has read once is kept for the next page."""
    return cache(lambda language: browser.new_context(locale=language))


@pytest.fixture
def open_page(
    browser: Browser, visitor: Callable[[str], BrowserContext], url: str
) -> Iterator[OpenPage]:
    """Open the page; in the end nothing may have gone wrong in it, or have left the machine."""
    pages: list[Page] = []
    wrong: list[str] = []

    def note(error: str) -> None:
        # What a page reads from the server is broken off when the page is reloaded or closed.
        if not error.startswith("AbortError") and "Connection errored out" not in error:
            wrong.append(error)

    def open_one(language: str = "en", address: str = url, **options: object) -> Page:
        if options:
            page = browser.new_page(locale=language, **options)  # type: ignore[arg-type]
        else:
            page = visitor(language).new_page()
        pages.append(page)
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: note(str(error)))
        page.on("console", lambda said: note(said.text) if said.type == "error" else None)

        def check_request(request: Request) -> None:
            if not request.url.startswith((address, "data:", "blob:")):
                wrong.append(request.url)

        def check_response(answer: Response) -> None:
            if answer.status >= 400:
                wrong.append(f"{answer.status} {answer.url}")

        page.on("request", check_request)
        page.on("response", check_response)
        page.goto(address)
        page.wait_for_selector("#edit-run")
        return page

    expect.set_options(timeout=PATIENCE_MS)
    yield open_one
    for page in pages:
        page.close()
    assert wrong == []


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other one.png"
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(path)
    return path


def choose(page: Page, name: str, path: Path) -> None:
    """Give the page a picture, and wait until it has arrived."""
    page.locator(f"#{name}-picture input[type=file]").set_input_files(path)
    page.wait_for_selector(f"#{name}-picture img")


def downloaded(page: Page, button: str) -> bytes:
    with page.expect_download() as download:
        page.click(button)
    return Path(download.value.path()).read_bytes()


def begin(page: Page, photo: Path, prompt: str) -> None:
    """Ask for an edit of a picture."""
    choose(page, "edit", photo)
    page.fill("#edit-prompt textarea", prompt)
    page.click("#edit-run")


def paint(page: Page) -> None:
    """Paint over the middle of the picture."""
    canvas = page.locator("#region-mask canvas").first
    canvas.wait_for()
    box = canvas.bounding_box()
    assert box is not None
    left, middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(left, middle)
    page.mouse.down()
    page.mouse.move(left + 6, middle + 3)
    page.mouse.up()


def pixels(source: Path | bytes) -> np.ndarray:
    opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    return np.asarray(opened.convert("RGB"))


def cancelled(service: EditService) -> int:
    return service.outcomes.get("cancelled", 0)


# --- editing --------------------------------------------------------------------------------------


@needs_browser
def test_a_picture_is_edited_and_downloaded_as_the_service_made_it(
    open_page: OpenPage, photo: Path
) -> None:
    page = open_page()
    choose(page, "edit", photo)
    page.fill("#edit-prompt textarea", "invert")
    page.click("#edit-run")
    page.wait_for_selector("#edit-download")
    expect(page.locator("#edit-line")).to_contain_text("Done in")
    result = downloaded(page, "#edit-download")

    assert np.array_equal(pixels(result), 255 - pixels(photo))
    record = images.read_edit_record(result)
    assert record is not None
    assert record.prompt == "invert"
    expect(page.locator("#edit-line")).to_contain_text(str(record.seed))

    page.click("#edit-again")
    expect(page.locator("#edit-history img")).to_have_count(2)
    again = images.read_edit_record(downloaded(page, "#edit-download"))
    assert again is not None
    assert again.seed != record.seed
    page.locator("#edit-history img").nth(1).click()
    expect(page.locator("#edit-line")).to_contain_text(str(record.seed))

    picture = page.locator("#edit-picture img").first
    before = str(picture.get_attribute("src"))
    page.click("#edit-reuse")
    expect(picture).not_to_have_attribute("src", before)
    expect(page.locator("#edit-line")).to_have_text("")  # its settings, and its seed, stay away
    page.click("#edit-run")
    expect(page.locator("#edit-history img")).to_have_count(3)
    assert np.array_equal(pixels(downloaded(page, "#edit-download")), pixels(photo))


@needs_browser
def test_the_settings_reach_the_edit_and_then_its_time_is_foretold(
    open_page: OpenPage, photo: Path
) -> None:
    page = open_page()
    choose(page, "edit", photo)
    modes = page.locator("#edit-mode label")
    modes.get_by_text("Fast").click()
    page.get_by_role("button", name="Advanced").first.click()
    page.get_by_role("radio", name="512").first.check()
    for label, value in (("Steps", "11"), ("Seed", "7"), ("What to avoid", "blur")):
        box = page.get_by_label(label).locator("visible=true").first
        box.fill(value)
        box.press("Tab")  # a slider takes what was typed when it is left
        expect(box).to_have_value(value)
    page.fill("#edit-prompt textarea", "invert")
    page.click("#edit-run")
    page.wait_for_selector("#edit-download")
    record = images.read_edit_record(downloaded(page, "#edit-download"))

    assert record is not None
    assert (record.num_steps, record.size_level, record.seed) == (11, 512, 7)
    assert (record.mode, record.negative_prompt) == ("turbo", "blur")
    timed = [re.compile(f"{name} · ≈ [0-9]+ s") for name in ("Best", "Good", "Fast")]
    expect(modes).to_have_text(timed)
    expect(modes.last.locator("input")).to_be_checked()
    page.get_by_role("radio", name="768").first.check()  # no edit had this size
    expect(modes).to_have_text(["Best", "Good", "Fast"])


@needs_browser
def test_what_is_shown_and_what_the_buttons_mean_is_one_result(
    open_page: OpenPage, photo: Path
) -> None:
    page = open_page()
    begin(page, photo, "invert")
    result = page.locator("#edit-result").get_by_alt_text("The edited picture")
    finished = result.get_attribute("src")
    seed = images.read_edit_record(downloaded(page, "#edit-download"))
    buttons = [page.locator(f"#edit-{name}") for name in ("download", "reuse", "again")]

    page.fill("#edit-prompt textarea", "wait in denoising")
    page.click("#edit-run")
    expect(page.locator("#edit-line")).to_contain_text("Step 1 of 10")
    expect(result).to_have_count(0)
    for button in buttons:
        expect(button).to_be_disabled()
    page.locator("#edit-history img").click()  # waits until nothing else is shown
    page.press("#edit-prompt textarea", "Control+Enter")
    expect(page.locator("#edit-line")).to_contain_text("Step 1 of 10")
    expect(result).to_have_count(0)
    page.click("#edit-stop")
    expect(page.locator("#edit-line")).to_have_text("Stopped.")
    expect(result).to_have_attribute("src", str(finished))
    for button in buttons:
        expect(button).to_be_enabled()
    assert images.read_edit_record(downloaded(page, "#edit-download")) == seed

    page.fill("#edit-prompt textarea", "fail")
    page.click("#edit-run")
    expect(page.locator("#edit-line [role=alert]")).to_contain_text("on purpose")
    expect(result).to_have_attribute("src", str(finished))
    page.click("#edit-again")
    expect(page.locator("#edit-history img")).to_have_count(2)
    record = images.read_edit_record(downloaded(page, "#edit-download"))
    assert record is not None
    assert record.prompt == "invert"


@needs_browser
def test_one_tab_is_stopped_and_the_other_one_continues_in_the_queue_that_all_pages_share(
    open_page: OpenPage, photo: Path
) -> None:
    page = open_page()
    begin(page, photo, "wait in denoising")
    expect(page.locator("#edit-line")).to_contain_text("Step 1 of 10")
    page.get_by_role("tab", name="Batch").click()
    page.locator("#batch-files input[type=file]").set_input_files([photo])
    page.fill("#batch-prompt textarea", "invert")
    page.press("#batch-prompt textarea", "Control+Enter")
    expect(page.locator("#batch-line")).to_contain_text("Waiting, position 1")
    other = open_page()
    expect(other.locator(".pill")).to_have_text("Editing · 1 waiting")
    begin(other, photo, "invert")
    expect(other.locator("#edit-line")).to_contain_text("Server busy")  # the queue is full
    other.close()
    page.click("#batch-stop")
    expect(page.locator("#batch-line")).to_have_text("Stopped.")

    page.get_by_role("tab", name="Edit", exact=True).click()
    expect(page.locator("#edit-line")).to_contain_text("Step 1 of 10")
    page.click("#edit-stop")
    expect(page.locator("#edit-line")).to_have_text("Stopped.")


def press_until(page: Page, prompt: str, line: Locator, words: str) -> None:
    """Press as often as a person would: Gradio may lose one of two updates that arrive together."""
    for _ in range(5):
        page.press(prompt, "Control+Enter")
        with contextlib.suppress(AssertionError):
            expect(line).to_have_text(words, timeout=5_000)
            return
    expect(line).to_have_text(words)


@needs_browser
def test_each_tab_asks_at_once_for_what_is_missing(open_page: OpenPage, photo: Path) -> None:
    page = open_page("zh-HK")
    arrived = {"edit": "#edit-picture img", "region": "#region-picture img", "batch": "td.filename"}
    for tab, name in enumerate(arrived):
        page.get_by_role("tab").nth(tab).click()
        prompt, line = f"#{name}-prompt textarea", page.locator(f"#{name}-line [role=alert]")
        page.fill(prompt, " \n ")
        press_until(page, prompt, line, text("no_picture", "zh-TW"))
        box = f"#{name}-{'files' if name == 'batch' else 'picture'}"
        page.locator(f"{box} input[type=file]").set_input_files(photo)
        page.wait_for_selector(arrived[name])
        if name == "region":
            paint(page)
        press_until(page, prompt, line, text("no_prompt", "zh-TW"))


@needs_browser
@pytest.mark.parametrize("language", by_extent(["ja"], ["en", "ja"]))
def test_a_file_that_cannot_be_edited_is_refused_when_it_is_chosen(
    open_page: OpenPage, tmp_path: Path, language: str
) -> None:
    files = {"half.png": "corrupt_image", "layers.psd": "unsupported_image"}
    noise = np.random.default_rng(1).integers(0, 255, (99, 99, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:9999])
    (tmp_path / "layers.psd").write_bytes(b"8BPS\0\1" + bytes(20))
    page = open_page(language)
    for tab, name in enumerate(("edit", "region")):
        page.get_by_role("tab").nth(tab).click()
        for file, code in files.items():
            page.locator(f"#{name}-picture input[type=file]").set_input_files(tmp_path / file)
            line = page.locator(f"#{name}-line [role=alert]")
            expect(line).to_contain_text(text(f"error.{code}", language))
            expect(line.locator("small[lang=en]")).to_contain_text(re.compile(".+: .+"))
            expect(page.locator(f"#{name}-picture img")).to_have_count(0)


@needs_browser
def test_an_edit_that_the_model_has_not_learned_is_reported_before_the_wait(
    open_page: OpenPage, photo: Path
) -> None:
    page = open_page("zh-CN")
    begin(page, photo, "unknown wait in denoising")
    line = page.locator("#edit-line")
    expect(line).to_contain_text("第 1 步")
    expect(line.locator(".notice[role=alert]")).to_have_text(text("unknown_edit", "zh-CN"))
    page.click("#edit-stop")
    expect(line).to_have_text(text("stopped", "zh-CN"))

    page.fill("#edit-prompt textarea", "unknown")
    page.click("#edit-run")
    page.wait_for_selector("#edit-download")
    expect(line.locator(".notice[role=alert]")).to_have_text(text("unknown_edit", "zh-CN"))


def lines(progress: ProgressLine, clock: ManualClock, *events: tuple[float, Progress]) -> list[str]:
    """The text after the step at each event, which comes this many seconds after the last one."""
    shown = []
    for seconds, event in events:
        clock.advance(seconds)
        words = re.sub("<.*?>", "", progress.show(event))
        shown.append(words.partition(" · ")[2])
    return shown


def step(number: int) -> Progress:
    return Progress(Phase.DENOISING, number, 10)


def test_the_time_left_counts_down_until_the_next_step_says_more() -> None:
    clock = ManualClock()
    progress = ProgressLine("en", now=clock.now)

    shown = lines(
        progress,
        clock,
        (0, Progress(Phase.ENCODING)),
        (9, step(1)),
        (4, step(1)),  # the engine reports the last step again, as a sign of life
        (2, step(2)),
        (4, step(2)),
        (4, step(2)),
        (2, step(3)),
        (60, step(3)),
        (0, Progress(Phase.ENCODING)),  # the next round
        (5, step(1)),
    )

    left = ["about 48 s left", "about 44 s left", "about 40 s left", "about 56 s left"]
    assert shown == ["", "", "", *left, "", "", ""]


def test_the_wait_in_the_queue_is_no_part_of_how_long_an_edit_took() -> None:
    clock = ManualClock()
    progress = ProgressLine("en", now=clock.now)

    lines(
        progress,
        clock,
        (0, Progress(Phase.QUEUED, 1)),
        (100, Progress(Phase.QUEUED, 1)),
        (20, Progress(Phase.LOADING)),
        (3, step(1)),
        (2, step(10)),
    )

    assert progress.seconds == 5


@needs_browser
def test_stop_cancels_the_edit(open_page: OpenPage, service: EditService, photo: Path) -> None:
    before = cancelled(service)
    page = open_page()
    choose(page, "edit", photo)
    page.fill("#edit-prompt textarea", "wait in denoising")
    page.click("#edit-run")
    expect(page.locator("#edit-line")).to_contain_text("Step 1 of 10")
    page.click("#edit-stop")
    expect(page.locator("#edit-line")).to_contain_text("Stopped.")

    assert cancelled(service) == before + 1
    expect(page.locator("#edit-run")).to_be_enabled()


@needs_browser
def test_closing_the_tab_cancels_the_edit(
    open_page: OpenPage, service: EditService, photo: Path
) -> None:
    before = cancelled(service)
    page = open_page()
    choose(page, "edit", photo)
    page.fill("#edit-prompt textarea", "wait in denoising")
    page.click("#edit-run")
    expect(page.locator("#edit-line")).to_contain_text("Step 1 of 10")
    page.close()

    until(lambda: cancelled(service) == before + 1)


@needs_browser
def test_failures_are_one_sentence_on_the_page(open_page: OpenPage, photo: Path) -> None:
    page = open_page()
    page.click("#edit-run")
    expect(page.locator("#edit-line")).to_have_text("Choose a picture first.")

    begin(page, photo, "fail")
    expect(page.locator("#edit-line [role=alert]")).to_contain_text("on purpose")
    page.fill("#edit-prompt textarea", "long " * 801)
    page.click("#edit-run")
    expect(page.locator("#edit-line [role=alert]")).to_contain_text("Invalid parameter: prompt")
    page.fill("#edit-prompt textarea", "stumble <b>")
    page.click("#edit-run")
    expect(page.locator("#edit-line [role=alert]")).to_contain_text("Internal error")
    expect(page.locator("#edit-run")).to_be_enabled()
    assert "secret" not in page.content()
    assert "Traceback" not in page.content()


@needs_browser
def test_only_what_is_painted_over_changes(open_page: OpenPage, photo: Path) -> None:
    Image.open(photo).resize((320, 240)).save(photo)
    page = open_page()
    page.get_by_role("tab", name="Edit a region").click()
    choose(page, "region", photo)
    page.locator("#region-mask canvas").first.wait_for()
    page.fill("#region-prompt textarea", "invert")
    page.click("#region-run")
    expect(page.locator("#region-line")).to_have_text("Paint over what may change first.")

    paint(page)
    page.fill("#region-prompt textarea", "invert")
    page.locator("#region-region").get_by_text("Full", exact=True).click()
    page.click("#region-run")
    page.wait_for_selector("#region-download")
    expect(page.locator("#region-line")).to_contain_text("% of the picture changed")
    expect(page.locator("#edit-region")).to_be_hidden()
    result = downloaded(page, "#region-download")
    before, after = pixels(photo), pixels(result)
    record = images.read_edit_record(result)
    assert record is not None
    assert record.region == "full"

    changed = (before != after).any(axis=-1)
    assert 0 < changed.mean() < 0.25
    assert np.array_equal(after[120, 160], 255 - before[120, 160])
    assert not changed[:, :80].any()


@needs_browser
def test_what_the_model_s_authors_suggest_is_taken_over_by_a_button(
    open_page: OpenPage, photo: Path
) -> None:
    page = open_page("ja")
    begin(page, photo, "invert")
    page.wait_for_selector("#edit-download")
    page.locator("#edit-advanced button").first.click()
    steps = page.locator("#edit-advanced input[type=number]").first
    expect(page.locator("#edit-suggested")).to_contain_text("50 ステップ")
    expect(steps).to_have_value("10")

    page.click("#edit-use-suggested")

    expect(steps).to_have_value("50")


@needs_browser
def test_several_pictures_are_edited_and_packed(
    open_page: OpenPage, photo: Path, other: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    page = open_page()
    page.get_by_role("tab", name="Batch").click()
    page.locator("#batch-files input[type=file]").set_input_files([photo, damaged, other])
    expect(page.locator("#batch-line [role=alert]")).to_contain_text("damaged.png: This file is")
    page.fill("#batch-prompt textarea", "invert")
    page.click("#batch-run")
    expect(page.locator("#batch-line")).to_contain_text("2 of 3 edited")
    expect(page.locator("#batch-line [role=alert]")).to_contain_text("damaged.png: This file is")
    expect(page.locator("#batch-line [role=alert]")).to_contain_text("Unsupported image format")
    page.wait_for_selector("#batch-download")

    with zipfile.ZipFile(io.BytesIO(downloaded(page, "#batch-download"))) as archive:
        found = {name: pixels(archive.read(name)) for name in archive.namelist()}
    assert found.keys() == {"photo_edited.png", "other_one_edited.png"}
    assert np.array_equal(found["photo_edited.png"], 255 - pixels(photo))
    assert np.array_equal(found["other_one_edited.png"], 255 - pixels(other))


@needs_browser
def test_the_model_is_told_of_and_moved_from_the_page(open_page: OpenPage, photo: Path) -> None:
    page = open_page()
    begin(page, photo, "invert")
    page.wait_for_selector("#edit-download")
    expect(page.locator(".pill")).to_have_text("Model on the GPU")
    page.get_by_role("tab", name="System").click()
    expect(page.locator(".status table")).to_contain_text(
        "31 % of the core stays on the GPU, the rest passes through 2 slots"
    )
    expect(page.locator(".status table")).to_contain_text("planned 7.4 GB · measured 7.12 GB")
    expect(page.locator(".status tr", has_text="GPU memory")).to_contain_text("0.5 GB used")
    page.click("#offload")
    expect(page.locator(".pill")).to_contain_text("Model in memory")
    expect(page.locator(".line").get_by_text("Model in memory")).to_be_visible()
    expect(page.locator(".status tr", has_text="Idle")).not_to_contain_text("GPU")
    page.click("#release")
    expect(page.locator(".pill")).to_contain_text("Model not loaded")


# --- the history ----------------------------------------------------------------------------------


@needs_browser
def test_the_history_survives_a_restart_and_its_steps_bring_back_what_made_them(
    service: EditService, open_page: OpenPage, photo: Path, tmp_path: Path
) -> None:
    settings = {"api_key": None, "history": True, "data_dir": tmp_path / "data"}
    line, steps, prompt = "#edit-line", "#edit-history img", "#edit-prompt textarea"
    with serving(service, **settings) as url:
        page = open_page(address=url)
        begin(page, photo, "invert")
        expect(page.locator(line)).to_contain_text(re.compile(r"Done in .* the rest moved \d"))
        picture = page.locator("#edit-picture img").first
        before = str(picture.get_attribute("src"))
        page.click("#edit-reuse")
        expect(picture).not_to_have_attribute("src", before)
        page.fill(prompt, "invert it back")
        page.click("#edit-run")
        expect(page.locator(steps)).to_have_count(2)
        page.close()

    with serving(service, **settings) as url:
        page = open_page(address=url)
        expect(page.locator(steps)).to_have_count(2)
        page.locator(steps).first.click()
        expect(page.locator(prompt)).to_have_value("invert it back")
        expect(page.locator(line)).to_contain_text("the rest moved 0.0 levels")
        page.wait_for_selector("#edit-picture img")
        assert np.array_equal(pixels(downloaded(page, "#edit-download")), pixels(photo))
        assert complaints(page) == []

        page.get_by_label("Compare with").click()
        page.get_by_role("option", name="the original").click()
        expect(page.locator(line)).to_have_text("the rest differs by 0.0 levels")
        page.click("#edit-merge")
        expect(page.locator(steps)).to_have_count(3)
        merged = downloaded(page, "#edit-download")
        record = images.read_edit_record(merged)
        assert record is not None
        assert record.prompt == "Invert. Invert it back."
        assert np.array_equal(pixels(merged), 255 - pixels(photo))
        expect(page.locator("#edit-merge")).to_be_disabled()

        page.locator(steps).nth(1).click()
        expect(page.locator("#edit-merge")).to_be_enabled()
        page.click("#edit-undo")
        expect(page.locator(prompt)).to_have_value("invert")
        expect(page.locator("#edit-history .selected")).to_have_count(0)
        page.click("#edit-undo")
        expect(page.locator("#edit-result figure img")).to_have_count(1)
        page.wait_for_selector("#edit-picture img")
        page.close()


@needs_browser
def test_a_step_of_the_command_line_is_repeated_on_the_page_with_its_mask(
    service: EditService, open_page: OpenPage, photo: Path, tmp_path: Path
) -> None:
    mask = np.zeros(pixels(photo).shape[:2], np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    history = History(Settings(_env_file=None, data_dir=tmp_path / "data"))
    files = FileEdits(service, FileAccess([tmp_path], 2**20), history)
    asked = EditRequest(image_path=photo, prompt="invert", mask_path=tmp_path / "mask.png")
    with ThreadPoolExecutor() as threads:  # this one has the event loop of the browser
        threads.submit(asyncio.run, files.edit(asked)).result()
    (step,) = history.steps()

    with serving(service, api_key=None, history=True, data_dir=tmp_path / "data") as url:
        page = open_page(address=url)
        page.locator("#edit-history img").click()
        expect(page.locator("#edit-line")).to_contain_text("the rest moved 0.0 levels")
        page.click("#edit-again")
        expect(page.locator("#edit-history img")).to_have_count(2)
        again = pixels(downloaded(page, "#edit-download"))
        page.close()

    assert np.array_equal(again[:, 32:], pixels(photo)[:, 32:])
    assert not np.array_equal(again, pixels(photo))
    assert {each.mask for each in history.steps()} == {step.mask}


@needs_browser
def test_what_is_deleted_of_the_history_is_asked_first(
    service: EditService, open_page: OpenPage, photo: Path, tmp_path: Path
) -> None:
    history = History(Settings(_env_file=None, data_dir=tmp_path / "data"))
    files = FileEdits(service, FileAccess([tmp_path], 2**20), history)
    with ThreadPoolExecutor() as threads:  # this one has the event loop of the browser
        for prompt in ("first", "second", "third"):
            edit = files.edit(EditRequest(image_path=photo, prompt=prompt))
            threads.submit(asyncio.run, edit).result()

    with serving(service, api_key=None, history=True, data_dir=tmp_path / "data") as url:
        page = open_page("ja", url)
        page.locator("#edit-history img").first.click()
        page.click("#edit-delete")
        expect(page.locator("#edit-delete-sure")).to_contain_text("元に戻せません")
        page.click("#edit-delete-nothing")
        expect(page.locator("#edit-delete-sure")).to_be_hidden()
        assert len(history.steps()) == 3

        page.click("#edit-delete")
        page.click("#edit-delete-step")
        expect(page.locator("#edit-line")).to_contain_text("1 件のステップを削除しました")
        expect(page.locator("#edit-history img")).to_have_count(2)
        assert [each.metadata.prompt for each in history.steps()] == ["first", "second"]

        page.locator("#edit-history img").first.click()
        page.click("#edit-delete")
        page.click("#edit-delete-all")
        expect(page.locator("#edit-line")).to_contain_text("2 件のステップを削除しました")
        expect(page.locator("#edit-history img")).to_have_count(0)
        assert history.steps() == []
        page.close()


# --- languages ------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_speaks_the_language_of_the_browser(open_page: OpenPage, language: str) -> None:
    page = open_page(language)
    expect(page.locator("#edit-run")).to_have_text(text("run", language))
    expect(page.get_by_role("tab").nth(1)).to_have_text(text("tab.region", language))
    expect(page.locator("#edit-prompt textarea")).to_have_attribute(
        "placeholder", text("prompt.hint", language)
    )
    modes = [text(f"mode.{mode}", language) for mode in ("exact", "fast", "turbo")]
    expect(page.locator("#edit-mode label")).to_contain_text(modes)
    expect(page.locator(".pill b")).to_have_count(1)
    expect(page.locator(".demo")).to_contain_text(text("demo.about", language))
    page.click("#edit-night")
    expect(page.locator("#edit-prompt textarea")).to_have_value(text("edit.night", language))
    page.click("#edit-run")
    expect(page.locator("#edit-line")).to_have_text(text("no_picture", language))

    page.get_by_role("tab").last.click()
    expect(page.locator("#models-fetch")).to_have_text(text("models.fetch", language))
    expect(page.get_by_label(text("models", language))).to_have_value(
        f"v1.1 · 41.8 GB · {text('model.available', language)}"
    )


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("", "en"),
        ("fr-FR,fr;q=0.9", "en"),
        ("en-GB,en;q=0.9,ja;q=0.8", "en"),
        ("ja", "ja"),
        ("zh", "zh-CN"),
        ("zh-SG", "zh-CN"),
        ("zh-HK,zh;q=0.9", "zh-TW"),
        ("zh-MO", "zh-TW"),
        ("zh-Hant", "zh-TW"),
        ("zh-Hant-TW", "zh-TW"),
        ("fr,zh-TW;q=0.5", "zh-TW"),
    ],
)
def test_the_first_language_that_is_known_is_spoken(accepted: str, language: str) -> None:
    assert language_of(accepted) == language


def kinds(root: type[Step1XEditError]) -> set[type[Step1XEditError]]:
    return {root}.union(*map(kinds, root.__subclasses__()))


@pytest.mark.parametrize("code", sorted({kind.code for kind in kinds(Step1XEditError)}))
def test_every_error_has_a_sentence_in_every_language(code: str) -> None:
    sentences = {text(f"error.{code}", language) for language in LANGUAGES}

    assert len(sentences) >= 3  # both scripts of Chinese may agree


def test_a_text_has_the_same_values_in_every_language() -> None:
    def values(words: str) -> set[str | None]:
        return {name for _, name, _, _ in Formatter().parse(words) if name is not None}

    known = translations()
    for key, words in known["en"].items():
        assert len({frozenset(values(known[language][key])) for language in LANGUAGES}) == 1, words


# --- its place in the server ----------------------------------------------------------------------


@needs_browser
def test_a_phone_shows_every_tab_and_does_not_scroll_sideways(
    open_page: OpenPage, photo: Path
) -> None:
    page = open_page(viewport={"width": 360, "height": 900})
    begin(page, photo, "invert")
    page.wait_for_selector("#edit-history img")

    tabs = page.get_by_role("tab")
    expect(tabs).to_have_count(4)
    for width in (360, 412):
        page.set_viewport_size({"width": width, "height": 900})
        for tab in tabs.all():
            tab.click()
            box = tab.bounding_box()
            assert box is not None
            assert box["x"] + box["width"] <= width
            assert page.evaluate("document.documentElement.scrollWidth") <= width


@needs_browser
def test_the_label_of_the_mask_is_not_hidden_by_its_tools_on_a_phone(
    open_page: OpenPage, photo: Path
) -> None:
    page = open_page(viewport={"width": 360, "height": 900})
    page.get_by_role("tab").nth(1).click()
    choose(page, "region", photo)
    label = page.locator("#region-mask").get_by_test_id("block-label")
    expect(label).to_be_visible()

    covered = label.evaluate(
        """label => {
            const box = label.getBoundingClientRect();
            const found = document.elementFromPoint(box.right - 3, box.top + box.height / 2);
            return !!found.closest("button, .icon-button-wrapper");
        }"""
    )
    assert not covered


@needs_browser
def test_the_state_of_the_model_is_shown_as_soon_as_an_edit_has_ended(
    open_page: OpenPage, photo: Path
) -> None:
    page = open_page()
    page.get_by_role("tab", name="System").click()
    page.click("#release")
    expect(page.locator(".chip .pill")).to_have_text("Model not loaded")
    page.get_by_role("tab", name="Edit", exact=True).click()
    begin(page, photo, "invert")
    expect(page.locator(".chip .pill")).to_have_text("Model on the GPU")


@needs_browser
def test_while_a_model_is_read_the_page_says_how_much_of_it_and_then_what_computes(
    make_service: MakeService, browser: Browser, photo: Path
) -> None:
    expect.set_options(timeout=PATIENCE_MS)
    clock = ManualClock()
    disk = HeldDisk(clock)
    with serving(
        make_service(FakeWorker(load=disk), clock=clock, default_num_steps=10), api_key=None
    ) as url:
        page = browser.new_page(locale="en")
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        page.wait_for_selector("#edit-run")
        begin(page, photo, "invert")
        expect(page.locator("#edit-line")).to_contain_text("Reading the model, 20.0 of 40.0 GB")
        expect(page.locator(".chip .pill")).to_have_text("Reading the model, 20.0 of 40.0 GB")
        disk.open()
        page.wait_for_selector("#edit-download")
        page.get_by_role("tab", name="System").click()
        expect(page.locator(".status tr", has_text="Device")).to_contain_text("cpu, fp32 avx2")
        expect(page.locator(".status table")).not_to_contain_text("GPU")
        expect(page.locator("#offload")).not_to_be_visible()
        page.close()


AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text("utf-8")
_GRADIO_S_OWN = [".settings img", ".gallery-item img", ".thumbnail-item img", ".empty"]
"""Parts whose names Gradio chooses."""


def complaints(page: Page, *rules: str) -> list[str]:
    """What axe-core has to say against what is shown, by all rules or by these."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE)
    found = page.evaluate(
        """([parts, rules]) => axe.run(
            { exclude: parts.map(part => [part]) }, rules.length ? { runOnly: rules } : {}
        )""",
        [_GRADIO_S_OWN, rules],
    )
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found["violations"]
        for node in one["nodes"]
    ]


@needs_browser
def test_nothing_on_any_tab_keeps_people_out(open_page: OpenPage, photo: Path) -> None:
    page = open_page(reduced_motion="reduce")
    begin(page, photo, "fail")
    expect(page.locator("#edit-line [role=alert]")).to_be_visible()
    page.fill("#edit-prompt textarea", "invert")
    page.click("#edit-run")
    page.wait_for_selector("#edit-history img")
    for tab in page.get_by_role("tab").all():
        tab.click()
        expect(tab).to_have_attribute("aria-selected", "true")
        for scheme in ("light", "dark"):
            # The dark page differs only in its colours.
            rules = ["color-contrast"] if scheme == "dark" else []
            page.emulate_media(color_scheme=scheme)
            expect(page.locator("body.dark")).to_have_count(int(scheme == "dark"))
            page.evaluate("Promise.all(document.getAnimations().map(one => one.finished))")
            assert complaints(page, *rules) == [], (tab.inner_text(), scheme)


@needs_browser
def test_before_and_after_are_named_and_compared_by_keyboard(
    open_page: OpenPage, photo: Path
) -> None:
    page = open_page()
    begin(page, photo, "invert")
    expect(page.get_by_alt_text("The edited picture")).to_be_visible()
    expect(page.get_by_alt_text("The picture before the edit")).to_be_visible()
    slider = page.get_by_role("slider", name="How much of the picture before the edit is shown")
    after = page.locator("#edit-result img.after")
    expect(after).to_have_css("clip-path", "inset(0px 0px 0px 50%)")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(after).to_have_css("clip-path", "inset(0px 0px 0px 52%)")

    page.evaluate("Object.defineProperty(document, 'hidden', {value: true})")
    page.click("#edit-again")  # what is shown next keeps the place
    expect(page.locator("#edit-history img")).to_have_count(2)
    expect(after).to_have_css("clip-path", "inset(0px 0px 0px 52%)")
    slider.focus()
    expect(slider).to_have_value("52")
    expect(page).to_have_title("✓ step1x-edit")


@contextlib.contextmanager
def toy_server(port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    script = Path(__file__).parents[1] / "serve_toy_http.py"
    path = os.pathsep.join(filter(None, [str(script.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PORT": str(port), "DATA_DIR": str(folder), "PYTHONPATH": path}
    server = subprocess.Popen([sys.executable, str(script)], env=environment, cwd=folder)

    def is_open() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    try:
        until(is_open)
        yield server
    finally:
        server.kill()
        server.wait()


@needs_browser
def test_an_open_page_survives_a_restart_of_the_server(
    browser: Browser, photo: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = browser.new_context(locale="en")
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    with toy_server(port, tmp_path):
        page.goto(f"http://127.0.0.1:{port}")
        begin(page, photo, "wait in denoising")
        expect(page.locator("#edit-line")).to_contain_text("Step 1 of 28")
    gone = page.get_by_test_id("toast-text").filter(has_text=text("page.disconnected", "en"))
    expect(gone.first).to_be_visible()  # and not the sentence of Gradio, which is always English
    expect(page.locator(".chip .pill")).to_have_text(text("page.offline", "en"))
    with toy_server(port, tmp_path):
        expect(page.locator("#notice")).to_have_text(
            "The server was restarted. Your pictures were not kept: choose them again."
        )
        expect(page.locator(".chip .pill")).to_have_text("Model not loaded")
        expect(page.locator("#edit-prompt textarea")).to_have_value("wait in denoising")
        expect(page.locator("#edit-stop")).to_be_disabled()
        begin(page, photo, "invert")
        page.wait_for_selector("#edit-download")
        expect(page.locator("#notice")).to_be_hidden()
    context.close()


@needs_browser
def test_a_proxy_that_replaces_the_host_gets_a_sentence_and_no_white_page(
    browser: Browser, url: str
) -> None:
    context = browser.new_context(locale="en")
    page = context.new_page()
    page.route(
        "**/assets/*.js",
        lambda route: route.fulfill(
            response=route.fetch(
                headers={**route.request.headers, "origin": "https://pictures.example"}
            )
        ),
    )
    page.goto(url, timeout=PATIENCE_MS)

    expect(page.get_by_role("alert")).to_contain_text("must pass on the Host header")
    context.close()


def test_a_link_to_the_page_is_described_by_what_it_does(url: str) -> None:
    headers = {"Accept-Language": "zh-HK"}
    document = httpx2.get(url, headers=headers, timeout=240, trust_env=False).text
    found = re.findall(r'<meta (?:property|name)="((?:og|twitter):\w+)" content="(.*?)"', document)

    assert dict(found) == {
        "og:title": "step1x-edit",
        "og:type": "website",
        "og:description": text("page.about", "zh-TW"),
    }


@needs_browser
def test_a_browser_with_the_key_may_use_the_page(service: EditService, browser: Browser) -> None:
    with serving(service) as url:
        context = browser.new_context(http_credentials={"username": "", "password": TOKEN})
        page = context.new_page()
        page.goto(url, timeout=PATIENCE_MS)
        page.click("#edit-night", timeout=PATIENCE_MS)
        expect(page.locator("#edit-prompt textarea")).to_have_value("make it night")
        context.close()


@needs_browser
def test_the_documentation_is_whole_without_internet(url: str, browser: Browser) -> None:
    paths = httpx2.get(f"{url}/openapi.json", timeout=240, trust_env=False).json()["paths"]
    asked: list[str] = []
    context = browser.new_context()
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))

    page.goto(f"{url}/docs", timeout=PATIENCE_MS)

    operations = sum(len(methods) for methods in paths.values())
    expect(page.locator(".opblock")).to_have_count(operations, timeout=PATIENCE_MS)
    assert [one for one in asked if not one.startswith((url, "data:"))] == []
    context.close()


def test_nothing_of_gradio_answers_but_what_the_page_needs(url: str) -> None:
    with httpx2.Client(base_url=url, timeout=240, trust_env=False) as client:
        page = client.get("/")
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "http" not in policy
        assert (
            client.get("/livez")
            .headers["content-security-policy"]
            .startswith("default-src 'none'; frame")
        )
        for path in (
            "/gradio_api/proxy=http://127.0.0.1/",
            "/gradio_api/file=http://127.0.0.1/",
            "/gradio_api/runs",
            "/gradio_api/startup-events",
            "/gradio_api/openapi.json",
            "/login",
            "/monitoring",
            "/nope",
        ):
            answer = client.get(path)
            assert answer.status_code == 404, path
            assert answer.headers["content-type"] == "application/problem+json"
        assert client.post("/gradio_api/run/predict", json={}).status_code == 404
        assert client.post("/gradio_api/call/edit", json={}).status_code == 404
        assert client.post("/gradio_api/component_server", json={}).status_code == 404
        assert client.get("/gradio_api/file=/etc/passwd").status_code == 403
        config = client.get("/config").json()
        assert not config["analytics_enabled"]
        assert {one["api_visibility"] for one in config["dependencies"]} == {"private"}


def test_no_address_is_fetched_for_a_caller(url: str) -> None:
    """Where Gradio would fetch one that stands in the place of an upload."""
    import gradio as gr

    assert httpx2.get(url, timeout=240, trust_env=False).status_code == 200  # the page is built
    fetching = gr.processing_utils.async_ssrf_protected_get("http://example.invalid/a.png")

    with pytest.raises(gr.Error, match="no URL is fetched"):
        fetching.send(None)  # its first step; a separate loop runs the browser


def test_the_upload_has_the_limit_of_the_other_doors(url: str) -> None:
    with httpx2.Client(base_url=url, timeout=240, trust_env=False) as client:

        def upload(size: int) -> int:
            files = {"files": ("a.png", b"\0" * size)}
            return int(client.post("/gradio_api/upload", files=files).status_code)

        assert upload(1024 * 1024) == 200
        assert upload(1024 * 1024 + 1) == 413
        assert upload(3 * 1024 * 1024) == 413


def test_the_server_starts_without_gradio_and_the_page_can_be_left_out() -> None:
    script = """
import sys, tempfile
from fastapi.testclient import TestClient
from step1x_edit.interfaces.http.guard import Guard
from step1x_edit.interfaces.http.metrics import Metrics
from step1x_edit.interfaces.server import build_routes
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings

def status(path, **chosen):
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(_env_file=None, data_dir=folder, enable_mcp=False, **chosen)
        service = build_service(settings)
        app = Guard(build_routes(service, settings, Metrics(service)), settings)
        with TestClient(app, base_url="http://127.0.0.1") as client:
            answer = client.get(path).status_code
        service.close()
        return answer

print(status("/livez"), status("/", enable_ui=False), "gradio" in sys.modules)
print(status("/"), "gradio" in sys.modules, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240
    )

    assert done.stdout.split() == ["200", "404", "False", "200", "True", "False"], done.stderr


@needs_browser
def test_the_picture_to_come_is_shown_while_it_is_made(open_page: OpenPage, photo: Path) -> None:
    """Last: Gradio has one folder for a process, and this server takes it from the one above."""
    gate = Gate(at_step=10)
    service = build_service(
        Settings(_env_file=None, default_num_steps=10), FakeWorker(before_step=gate)
    )
    with serving(service, api_key=None) as address:
        page = open_page(address=address)
        begin(page, photo, "invert")
        page.wait_for_selector('#edit-result img[src*="preview.webp"]', state="attached")
        gate.open()
        page.wait_for_selector("#edit-download")
        expect(page.locator('#edit-result img[src*="preview.webp"]')).to_have_count(0)
        page.close()
    service.close()


@needs_browser
def test_the_results_of_a_batch_wait_on_disk(open_page: OpenPage, photo: Path, other: Path) -> None:
    """After the one above, for the same reason."""
    gate = Gate()

    def before_step(job: EditJob, step: int) -> None:
        if job.image is not None and job.image.shape[:2] == pixels(other).shape[:2]:
            gate(job, step)

    worker = FakeWorker(before_step=before_step)
    service = build_service(Settings(_env_file=None, default_num_steps=10), worker)
    with serving(service, api_key=None) as address:
        page = open_page(address=address)
        page.get_by_role("tab", name="Batch").click()
        page.locator("#batch-files input[type=file]").set_input_files([photo, other])
        expect(page.locator("#batch-files")).to_contain_text("other one")
        page.fill("#batch-prompt textarea", "invert")
        page.click("#batch-run")
        assert gate.reached.wait(60)
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        (done,) = folder.rglob("photo_edited.png")
        assert np.array_equal(pixels(done), 255 - pixels(photo))
        gate.open()
        page.wait_for_selector("#batch-download")
        assert list(folder.rglob("*_edited.png")) == []  # they are in the zip
        with zipfile.ZipFile(io.BytesIO(downloaded(page, "#batch-download"))) as archive:
            assert archive.namelist() == ["photo_edited.png", "other_one_edited.png"]
        page.close()
    service.close()


@needs_browser
def test_what_the_model_thought_is_shown_with_its_rounds(
    open_page: OpenPage, photo: Path, tmp_path: Path
) -> None:
    """After the one above, for the same reason."""
    able = Settings(_env_file=None, model_path=tmp_path, default_num_steps=10)
    service = build_service(able, FakeWorker(model="Step1X-Edit v1.2", version="v1.2"))
    with serving(service, api_key=None, model_path=tmp_path) as address:
        page = open_page(address=address)
        choose(page, "edit", photo)
        page.fill("#edit-prompt textarea", "add a hat")
        page.get_by_role("button", name="Advanced").first.click()
        page.locator("#edit-thinking input").check()
        rounds = page.locator("#edit-reflection-rounds")
        expect(rounds).to_be_hidden()
        page.locator("#edit-reflection input").check()
        rounds.locator("input[type=number]").fill("2")
        rounds.locator("input[type=number]").press("Enter")
        page.click("#edit-run")
        page.wait_for_selector("#edit-download")
        rewritten = page.locator("#edit-rewritten textarea")
        expect(rewritten).to_have_value("add a hat, and nothing else")
        expect(page.locator("#edit-verdicts textarea")).to_have_value(
            "Round 1 · score 6.5: The hat is too small. → make the hat larger\n"
            "Round 2 · score 9 · best: The hat fits."
        )
        shown = page.locator("#edit-rounds")
        expect(shown.locator("img")).to_have_count(2)
        expect(shown).to_contain_text("Round 1 · score 6.5")
        expect(shown).to_contain_text("Round 2 · score 9 · best")
        record = images.read_edit_record(downloaded(page, "#edit-download"))
        assert record is not None
        assert (record.thinking, record.reflection, record.reflection_rounds) == (True, True, 2)

        page.locator("#edit-thinking input").uncheck()
        page.locator("#edit-reflection input").uncheck()
        page.click("#edit-run")
        expect(page.locator("#edit-history img")).to_have_count(2)
        expect(rewritten).to_have_count(0)

        page.reload()  # now it is known which model runs
        page.get_by_role("button", name="Advanced").first.click()
        expect(page.locator("#edit-thinking input")).to_be_enabled()
        page.close()
    service.close()


@needs_browser
def test_a_page_whose_model_cannot_reason_does_not_offer_it(open_page: OpenPage) -> None:
    """After the ones above, for the same reason."""
    service = build_service(Settings(_env_file=None), FakeWorker())
    with serving(service, api_key=None) as address:
        page = open_page("ja", address)
        page.get_by_role("button", name=text("advanced", "ja")).first.click()
        for choice in ("thinking", "reflection"):
            expect(page.locator(f"#edit-{choice} input")).to_be_disabled()
            expect(page.locator(f"#edit-{choice}")).to_contain_text(text("reasoning.needs", "ja"))
        page.close()
    service.close()


@needs_browser
def test_loras_are_chosen_where_there_are_any(
    open_page: OpenPage, photo: Path, tmp_path: Path
) -> None:
    loras = {tmp_path / "hand.safetensors": 0.0, tmp_path / "look.safetensors": 0.5}
    settings = Settings(_env_file=None, lora_path=loras, default_num_steps=10)
    service = build_service(settings, FakeWorker())
    with serving(service, api_key=None) as address:
        page = open_page(address=address)
        choose(page, "edit", photo)
        page.get_by_role("button", name="Advanced").first.click()
        box = page.get_by_label("LoRAs").locator("visible=true").first
        expect(page.get_by_text("look:0.5").first).to_be_visible()
        box.fill("hand:-2")
        box.press("Enter")
        page.fill("#edit-prompt textarea", "invert")
        page.click("#edit-run")
        page.wait_for_selector("#edit-download")
        record = images.read_edit_record(downloaded(page, "#edit-download"))
        page.close()
    service.close()

    assert record is not None
    assert record.loras == ["hand:-2", "look:0.5"]


# --- models ---------------------------------------------------------------------------------------

MODEL = "v1.2"
BIG = "transformer/model.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 240)
    with running_hub() as hub:
        asked_by_default(hub, monkeypatch)
        weights = np.arange(2**18, dtype=np.uint32).tobytes()
        hub.repos[find_model(MODEL).repos[0]] = {"model_index.json": b"{}", BIG: weights}
        yield hub


@pytest.fixture
def fetching(service: EditService, hub: Hub, tmp_path: Path) -> Iterator[str]:
    """A server that fetches from the hub; to be asked for before the pages that it outlives.

    Gradio has one folder for its files: after this one, those of earlier servers are not shown.
    """
    with serving(service, api_key=None, data_dir=tmp_path) as url:
        yield url


def choose_model(page: Page, name: str = MODEL) -> None:
    page.get_by_role("tab", name="System").click()
    page.locator("#models-choice input").click()
    page.get_by_role("option", name=re.compile(f"{re.escape(name)} ·")).click()
    expect(page.locator("#models-choice input")).to_have_value(re.compile(f"{name} ·"))


@needs_browser
def test_a_model_is_fetched_from_the_page_and_every_tab_shows_how_far_it_is(
    hub: Hub, fetching: str, open_page: OpenPage, tmp_path: Path
) -> None:
    go_on = threading.Event()
    hub.faults[BIG] = iter([Fault(stall_after=500_000, go_on=go_on)])
    page = open_page(address=fetching)
    choose_model(page)
    expect(page.locator("#models-stop")).to_be_disabled()
    page.click("#models-fetch")
    other = open_page(address=fetching)
    other.get_by_role("tab", name="System").click()
    other.set_viewport_size({"width": 412, "height": 900})
    for one in (page, other):
        expect(one.locator("#models-line")).to_contain_text("v1.2 · Fetching · 0.5 of 1.0 MB")
        expect(one.locator("#models-line .bar i")).to_have_attribute("style", "width:48%")
        expect(one.locator("#models-choice input")).to_have_value("v1.2 · being fetched")
        expect(one.locator("#models-fetch")).to_be_disabled()
        expect(one.locator("#models-stop")).to_be_enabled()
    assert other.evaluate("document.documentElement.scrollWidth") <= 412
    go_on.set()

    folder = tmp_path / "models" / MODEL
    for one in (page, other):
        expect(one.locator("#models-line code")).to_have_text(f"MODEL_PATH={folder}")
        expect(one.locator("#models-choice input")).to_have_value("v1.2 · 1.0 MB · fetched")
        expect(one.locator("#models-fetch")).to_be_disabled()
        expect(one.locator("#models-stop")).to_be_disabled()
    assert (folder / BIG).read_bytes() == hub.repos[find_model(MODEL).repos[0]][BIG]
    assert other.evaluate("document.documentElement.scrollWidth") <= 412


@needs_browser
def test_a_pull_of_another_caller_is_shown_and_stopped(
    hub: Hub, fetching: str, open_page: OpenPage
) -> None:
    hub.faults[BIG] = iter([Fault(cut_after=500_000), Fault(503, {"Retry-After": "60"})])
    with httpx2.stream("POST", f"{fetching}/api/models/{MODEL}/pull", timeout=240) as stream:
        page = open_page(address=fetching)
        page.get_by_role("tab", name="System").click()
        expect(page.locator("#models-line")).to_contain_text("v1.2 · Interrupted, retrying")
        page.click("#models-stop")
        expect(page.locator("#models-line")).to_contain_text("Stopped. The downloaded part is kept")
        end = stream.read().decode().rstrip().splitlines()[-2]

    assert end == "event: cancelled"
    expect(page.locator("#models-choice input")).to_have_value("v1.2 · begun")
    expect(page.locator("#models-stop")).to_be_disabled()
    hub.served.clear()
    page.click("#models-fetch")
    expect(page.locator("#models-line")).to_contain_text("MODEL_PATH=")
    assert hub.served[BIG] < 600_000


@needs_browser
def test_a_pull_that_fails_says_why_in_one_sentence(
    hub: Hub, fetching: str, open_page: OpenPage
) -> None:
    hub.faults[BIG] = repeat(Fault(flip=True))
    page = open_page(address=fetching)
    choose_model(page)
    page.click("#models-fetch")

    alert = page.locator("#models-line [role=alert]")
    expect(alert).to_contain_text("Cannot get model: transformer/model.safetensors does not match")
    expect(page.locator("#models-fetch")).to_be_enabled()
    choose_model(page, "v1.1")
    expect(page.locator("#models-line")).to_have_text("")
