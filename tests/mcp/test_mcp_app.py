"""The MCP App: what it adds to a result, and its page in a real browser inside a small host."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastmcp import Client
from fastmcp.apps import UI_EXTENSION_ID, UI_MIME_TYPE
from mcp.client.extension import advertise
from mcp_types import CallToolResult
from PIL import Image
from playwright.async_api import Frame, Page, async_playwright

from conftest import MakeService
from fakes import FakeWorker, Gate, canvas
from mcp_answers import text_in
from step1x_edit.channel import EditJob
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.pictures.images import Pixels
from step1x_edit.schemas.requests import HowToEdit

APPS = [advertise(UI_EXTENSION_ID, {"mimeTypes": [UI_MIME_TYPE]})]
"""What a client declares that shows pages of servers."""
PAGE_URI = "ui://step1x-edit/compare.html"
CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


def pixels_of(jpeg: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


# --- what it adds ---------------------------------------------------------------------------------


async def test_edits_name_the_page_and_the_page_needs_nobody(make_service: MakeService) -> None:
    async with Client(build_mcp(make_service()), extensions=APPS) as client:
        tools = {tool.name: tool.meta or {} for tool in await client.list_tools()}
        (resource,) = [one for one in await client.list_resources() if str(one.uri) == PAGE_URI]
        (page,) = await client.read_resource(PAGE_URI)

    shown = {name for name, meta in tools.items() if "ui" in meta}
    assert shown == {"edit_image", "get_job"}
    assert tools["edit_image"]["ui"]["resourceUri"] == PAGE_URI
    assert resource.mime_type == page.mime_type == "text/html;profile=mcp-app"
    assert page.text.startswith("<!doctype html>")
    assert len(page.text) < 12_000
    assert "//" not in page.text.replace("// ", "")  # no address of anything outside


async def test_only_meta_is_added_to_a_result(make_service: MakeService, photo: Path) -> None:
    arguments = {"image_path": str(photo), "prompt": "x", "seed": 1, "output_path": "a.png"}
    arguments["output_path"] = str(photo.with_name("new.png"))
    async with Client(build_mcp(make_service()), extensions=APPS) as client:
        result = await client.call_tool("edit_image", arguments)

    assert [block.type for block in result.content] == ["text", "image", "resource_link"]
    assert json.loads(result.content[0].text) == result.structured_content
    assert set(result.structured_content) == {
        "status",
        "message",
        "output_path",
        "processing_time",
        "metadata",
    }
    kind, data = result.meta["step1x-edit/before"].split(",")
    assert kind == "data:image/jpeg;base64"
    before = pixels_of(base64.b64decode(data)).astype(int)
    assert np.abs(before - pixels_of(photo.read_bytes())).mean() < 8
    defaults = {name: field.default for name, field in HowToEdit.model_fields.items()}
    assert result.meta["step1x-edit/arguments"] == {
        "image_path": str(photo),
        "prompt": "x",
        **{name: value for name, value in defaults.items() if value is not None},
    }


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_client_without_apps_gets_nothing_for_them(
    make_service: MakeService, photo: Path, mode: Any
) -> None:
    arguments = {"image_path": str(photo), "prompt": "x"}
    server = build_mcp(make_service())
    async with (
        Client(server, mode=mode) as plain,
        Client(server, mode=mode, extensions=APPS) as able,
    ):
        job = (await plain.call_tool("submit_edit", arguments)).structured_content["job_id"]
        asked = {"job_id": job, "wait_s": 50}
        by_plain = [
            await plain.call_tool("edit_image", arguments),
            await plain.call_tool("get_job", asked),
        ]
        by_able = await able.call_tool("get_job", asked)

    for result in by_plain:
        assert "step1x-edit/" not in json.dumps(result.meta)
        assert [block.type for block in result.content] == ["text", "image", "resource_link"]
    assert by_able.structured_content == by_plain[1].structured_content
    assert by_able.meta["step1x-edit/before"].startswith("data:image/jpeg;base64,")


async def test_the_whole_result_of_an_edit_stays_within_the_budget(
    make_service: MakeService, tmp_path: Path
) -> None:
    path = tmp_path / f"{'n' * 200}.png"
    Image.effect_noise((1600, 1600), 200).convert("RGB").save(path)
    texts = {"prompt": "\N{PENCIL}" * 4000, "negative_prompt": '"' * 4000}
    reasoning = {"thinking": True, "reflection": True}
    async with Client(build_mcp(make_service(FakeWorker(model="v1.2"))), extensions=APPS) as client:
        result = await client.call_tool(
            "edit_image", {"image_path": str(path), **texts, **reasoning}
        )

    wire = CallToolResult(
        content=result.content, structured_content=result.structured_content, _meta=result.meta
    )
    size = len(wire.model_dump_json(by_alias=True, exclude_none=True).encode())
    assert result.meta["step1x-edit/before"] in wire.model_dump_json(by_alias=True)
    assert 100_000 < size <= 700_000


# --- the page -------------------------------------------------------------------------------------

# A host as the specification describes it: a sandboxed frame, JSON-RPC over postMessage, and the
# policy that it gives to pages that ask for no more.
HOST = """
<body style="margin: 0"><iframe sandbox="allow-scripts" style="border: 0; width: 100%"></iframe>
<script>
const frame = document.querySelector("iframe");
const told = [];  // what the page has said, in order
const say = (message) => frame.contentWindow.postMessage({ jsonrpc: "2.0", ...message }, "*");
addEventListener("message", async ({ source, data }) => {
  if (source !== frame.contentWindow) return;
  told.push(data);
  const { id, method, params } = data;
  if (method === "ui/notifications/initialized") {
    say({ method: "ui/notifications/tool-input", params: { arguments: {} } });
    say({ method: "ui/notifications/tool-result", params: RESULT });
  } else if (method === "ui/notifications/size-changed") {
    frame.style.height = `${params.height}px`;
  } else if (method === "ui/initialize") {
    say({ id, result: {
      protocolVersion: "2026-01-26", hostInfo: { name: "test", version: "1" },
      hostCapabilities: { serverTools: {}, updateModelContext: { text: {} } },
      hostContext: { theme: THEME },
    } });
  } else if (method === "tools/call") {
    say({ id, result: JSON.parse(await callTool(params.name, params.arguments)) });
  } else if (id !== undefined) {
    say({ id, result: {} });
  }
});
frame.srcdoc = PAGE;
</script>
"""
POLICY = (
    "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:\">"
)


def on_the_wire(result: Any) -> str:
    """A result as a host hands it to a page."""
    return CallToolResult(
        content=result.content,
        structured_content=result.structured_content,
        is_error=result.is_error,
        _meta=result.meta,
    ).model_dump_json(by_alias=True, exclude_none=True)


class Host:
    """A browser whose only page shows ours in a frame, as a chat would."""

    def __init__(self, page: Page, client: Client[Any]) -> None:
        self.page = page
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.complaints: list[str] = []
        self._client = client
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    async def show(self, result: Any, theme: str = "light") -> Frame:
        """Show what has come of a call."""

        async def call_tool(name: str, arguments: dict[str, Any]) -> str:
            self.calls.append((name, arguments))
            return on_the_wire(await self._client.call_tool(name, arguments, raise_on_error=False))

        await self.page.expose_function("callTool", call_tool)
        (page,) = await self._client.read_resource(PAGE_URI)
        html = text_in(page).replace("<head>", f"<head>{POLICY}")
        for name, value in {
            "PAGE": json.dumps(html),
            "RESULT": on_the_wire(result),
            "THEME": json.dumps(theme),
        }.items():
            script = value.replace("</", "<\\/")
            await self.page.add_init_script(f"globalThis.{name} = {script};")
        await self.page.goto("data:text/html;base64," + base64.b64encode(HOST.encode()).decode())
        frame = self.page.frames[-1]
        await frame.wait_for_function(
            "!document.getElementById('state').textContent.includes('Wait')"
        )
        return frame

    async def told(self, method: str) -> list[dict[str, Any]]:
        """The parameters of all messages of a kind."""
        script = "(method) => told.filter((one) => one.method === method).map((one) => one.params)"
        return list(await self.page.evaluate(script, method))


@contextlib.asynccontextmanager
async def hosting(client: Client[Any], width: int = 700) -> AsyncIterator[Host]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = await browser.new_page(viewport={"width": width, "height": 700})
            yield Host(page, client)
        finally:
            await browser.close()


def painted(job: EditJob) -> Pixels:
    """The seed as a colour."""
    return np.full_like(canvas(job), np.frombuffer(job.seed.to_bytes(4, "big")[1:], dtype=np.uint8))


@pytest.fixture
def white(tmp_path: Path) -> Path:
    path = tmp_path / "white.png"
    Image.new("RGB", (400, 300), "white").save(path)
    return path


async def colour(frame: Frame, x: float) -> tuple[int, int, int]:
    """What is seen in the pictures, at a share of their width."""
    shot = await frame.locator("#pictures").screenshot()
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    seen = image.getpixel((round(x * (image.width - 1)), image.height // 4))
    assert isinstance(seen, tuple)
    return (seen[0], seen[1], seen[2])


def is_near(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    return all(abs(a - b) < 12 for a, b in zip(one, other, strict=True))


GREEN, WHITE = (32, 160, 64), (255, 255, 255)
GREEN_SEED = int.from_bytes(bytes(GREEN), "big")


@needs_browser
async def test_the_slider_shows_before_and_after_and_works_by_keys(
    make_service: MakeService, white: Path
) -> None:
    arguments = {"image_path": str(white), "prompt": "paint it", "seed": GREEN_SEED}
    async with (
        Client(build_mcp(make_service(FakeWorker(paint=painted))), extensions=APPS) as client,
        hosting(client) as host,
    ):
        frame = await host.show(await client.call_tool("edit_image", arguments))
        middle = [await colour(frame, 0.25), await colour(frame, 0.75)]
        await host.page.keyboard.press("Tab")
        focused = await frame.evaluate("document.activeElement.id")
        await host.page.keyboard.press("End")
        only_before = [await colour(frame, 0.25), await colour(frame, 0.75)]
        await host.page.keyboard.press("Home")
        only_after = [await colour(frame, 0.25), await colour(frame, 0.75)]
        await frame.locator("#slider").click(position={"x": 300, "y": 100})
        clicked = [await colour(frame, 0.6), await colour(frame, 0.9)]
        shown = await frame.locator("#pictures").bounding_box()
        details = await frame.locator("#details").inner_text()
        heights = [size["height"] for size in await host.told("ui/notifications/size-changed")]

    assert focused == "slider"
    for seen, expected in [
        (middle, [WHITE, GREEN]),
        (only_before, [WHITE, WHITE]),
        (only_after, [GREEN, GREEN]),
        (clicked, [WHITE, GREEN]),
    ]:
        assert all(map(is_near, seen, expected)), (seen, expected)
    assert details == f"Seed {GREEN_SEED} · {white.with_name('white_edited.png')}"
    assert shown is not None
    assert (shown["width"], shown["height"]) == (400, 300)  # its own size, whatever the frame's
    assert heights[-1] > 300
    assert host.complaints == []


@needs_browser
async def test_another_seed_edits_again_and_undo_goes_back(
    make_service: MakeService, white: Path
) -> None:
    arguments = {
        "image_path": str(white),
        "prompt": "paint it",
        "seed": GREEN_SEED,
        "num_steps": 12,
        "output_path": str(white.with_name("mine.png")),
    }
    async with (
        Client(build_mcp(make_service(FakeWorker(paint=painted))), extensions=APPS) as client,
        hosting(client) as host,
    ):
        frame = await host.show(await client.call_tool("edit_image", arguments))
        undo_at_first = await frame.locator("#undo").is_visible()
        await frame.locator("#again").click()
        await frame.locator("#undo").wait_for()
        await frame.locator("#undo:enabled").wait_for()
        another = await frame.locator("#details").inner_text()
        seen_then = await colour(frame, 0.75)
        await frame.locator("#undo").click()
        first = await frame.locator("#details").inner_text()
        seen_in_the_end = await colour(frame, 0.75)
        undo_in_the_end = await frame.locator("#undo").is_visible()
        told = await host.told("ui/update-model-context")

    ((name, asked),) = host.calls
    assert name == "edit_image"
    assert (asked["image_path"], asked["prompt"], asked["num_steps"]) == (
        str(white),
        "paint it",
        12,
    )
    assert "seed" not in asked
    assert str(white.with_name("white_edited.png")) in another
    assert not is_near(seen_then, GREEN)
    assert first == f"Seed {GREEN_SEED} · {white.with_name('mine.png')}"
    assert is_near(seen_in_the_end, GREEN)
    assert (undo_at_first, undo_in_the_end) == (False, False)
    texts = [params["content"][0]["text"] for params in told]
    assert [name in text for name, text in zip(["white_edited", "mine"], texts, strict=True)] == [
        True,
        True,
    ]
    assert host.complaints == []


@needs_browser
async def test_an_edit_that_still_runs_is_followed_and_a_failure_is_told(
    make_service: MakeService, white: Path
) -> None:
    gate = Gate()
    server = build_mcp(make_service(FakeWorker(paint=painted, before_step=gate)), max_wait_s=0.05)
    arguments = {"image_path": str(white), "prompt": "paint it", "seed": GREEN_SEED}
    async with Client(server, extensions=APPS) as client, hosting(client) as host:
        frame = await host.show(await client.call_tool("edit_image", arguments))
        said = await frame.locator("#state").inner_text()
        gate.open()
        await frame.locator("#pictures").wait_for()
        seen = await colour(frame, 0.75)
        white.unlink()
        await frame.locator("#again").click()
        await frame.locator("#state.wrong").wait_for()
        wrong = await frame.locator("#state").inner_text()
        still_seen = await colour(frame, 0.75)

    assert said.startswith("The edit continues (")
    assert [name for name, _ in host.calls] == ["get_job", "edit_image"]
    assert is_near(seen, GREEN)
    assert is_near(still_seen, GREEN)
    assert wrong == f"Image file not found: {white}"
    assert host.complaints == []


@needs_browser
@pytest.mark.parametrize(("theme", "ground"), [("light", 255), ("dark", 31)])
async def test_the_page_fits_a_narrow_frame_in_both_themes(
    make_service: MakeService, white: Path, theme: str, ground: int
) -> None:
    arguments = {"image_path": str(white), "prompt": "x" * 300, "seed": GREEN_SEED}
    async with (
        Client(build_mcp(make_service(FakeWorker(paint=painted))), extensions=APPS) as client,
        hosting(client, width=240) as host,
    ):
        frame = await host.show(await client.call_tool("edit_image", arguments), theme)
        wide = await frame.evaluate("document.documentElement.scrollWidth")
        shown = await frame.locator("#pictures").bounding_box()
        background = await frame.evaluate("getComputedStyle(document.body).backgroundColor")
        shot = np.asarray(Image.open(io.BytesIO(await host.page.screenshot())).convert("L"))

    assert wide <= 240
    assert shown is not None
    assert shown["width"] == pytest.approx(216, abs=2)
    assert shown["height"] == pytest.approx(162, abs=3)
    assert background.startswith(f"rgb({ground},")
    assert abs(int(shot[2, 2]) - ground) < 8
