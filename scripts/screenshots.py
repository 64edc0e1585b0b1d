"""Take the screenshots of the web page in docs/, after real edits with the demo model.

python scripts/screenshots.py [FOLDER]
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

DOCS = Path(__file__).parents[1] / "docs"
SHOTS = {
    "page-desktop-light": (1280, "light"),
    "page-desktop-dark": (1280, "dark"),
    "page-phone-light": (412, "light"),
    "page-phone-dark": (412, "dark"),
}
HISTORY_SHOTS = {
    "page-history-desktop": (1280, "light"),
    "page-history-phone": (412, "light"),
}
PATIENCE_MS = 300_000
COLOURS = 256  # of the files: enough for a page, and keeps them small


@contextlib.contextmanager
def running_server(**settings: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PORT": str(port), "DATA_DIR": folder, "MODEL_PATH": ""}
        environment |= settings
        command = [sys.executable, "-m", "step1x_edit.interfaces.cli", "serve"]
        server = subprocess.Popen(command, env=environment)
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                server.poll()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def edited_page(browser: Browser, url: str) -> Page:
    page = browser.new_context(locale="en").new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(url)
    page.click("#edit-photo")
    page.click("#edit-night")
    page.wait_for_selector("#edit-picture img")
    page.get_by_role("button", name="Advanced").first.click()
    page.get_by_role("radio", name="512").first.check()
    page.get_by_label("Steps").locator("visible=true").first.fill("10")
    page.get_by_role("button", name="Advanced").first.click()
    page.click("#edit-run")
    wait_for_results(page, 1)
    page.mouse.move(0, 0)
    return page


def wait_for_results(page: Page, number: int) -> None:
    expect(page.locator("#edit-history img")).to_have_count(number, timeout=PATIENCE_MS)
    expect(page.locator("#edit-line")).to_contain_text("Done", timeout=PATIENCE_MS)


def page_with_history(browser: Browser, url: str) -> Page:
    """Three edits, each of the last result, compared with one of the original instead."""
    page = edited_page(browser, url)
    for number, prompt in enumerate(("add fog", "make it pink"), 2):
        picture = page.locator("#edit-picture img").first
        before = str(picture.get_attribute("src"))
        page.click("#edit-reuse")
        expect(picture).not_to_have_attribute("src", before)
        page.fill("#edit-prompt textarea", prompt)
        page.click("#edit-run")
        wait_for_results(page, number)
    page.click("#edit-merge")
    wait_for_results(page, 4)
    page.reload()
    page.locator("#edit-history img").nth(1).click()
    expect(page.locator("#edit-prompt textarea")).to_have_value("make it pink")
    page.get_by_label("Compare with").click()
    page.get_by_role("option", name="Make it night. Add fog").click()
    expect(page.locator("#edit-line")).to_contain_text("the rest differs")
    page.mouse.move(0, 0)
    return page


def take(page: Page, name: str, width: int, scheme: str, folder: Path) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.wait_for_timeout(1500)  # for elements that fade in
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    small = image.quantize(COLOURS, dither=Image.Dither.FLOYDSTEINBERG)
    small.save(folder / f"{name}.png", optimize=True)


def main(folder: Path) -> None:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu"]
        )
        with running_server() as url:
            page = edited_page(browser, url)
            for name, (width, scheme) in SHOTS.items():
                take(page, name, width, scheme, folder)
        with running_server(HISTORY="on") as url:
            page = page_with_history(browser, url)
            for name, (width, scheme) in HISTORY_SHOTS.items():
                take(page, name, width, scheme, folder)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
