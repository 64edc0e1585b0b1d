"""The MCP face in memory, with a fake worker: answers, progress, cancellation, odd failures."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.exceptions import ToolError
from PIL import Image

from conftest import MakeService
from fakes import FakeWorker, Gate
from step1x_edit.interfaces.mcp import build_mcp


async def test_a_result_has_json_preview_and_link_and_stays_small(
    make_service: MakeService, tmp_path: Path
) -> None:
    path = tmp_path / "noise photo.jpg"
    Image.effect_noise((1600, 1200), 90).convert("RGB").save(path)
    async with Client(build_mcp(make_service())) as client:
        result = await client.call_tool("edit_image", {"image_path": str(path), "prompt": "x"})

    text, image, link = result.content
    assert not result.is_error
    assert json.loads(text.text) == result.structured_content
    assert result.structured_content["status"] == "success"
    assert len(image.data) <= 96 * 1024
    shown = Image.open(io.BytesIO(base64.b64decode(image.data)))
    assert (shown.format, max(shown.size) <= 512) == ("JPEG", True)
    assert str(link.uri) == (tmp_path / "noise photo_edited.jpg").as_uri()
    assert link.mime_type == "image/jpeg"


async def test_progress_rises_strictly_and_names_every_step(
    make_service: MakeService, photo: Path
) -> None:
    heard: list[tuple[float, float | None, str | None]] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append((progress, total, message))

    async with Client(build_mcp(make_service())) as client:
        await client.call_tool(
            "edit_image",
            {"image_path": str(photo), "prompt": "x", "num_steps": 10},
            progress_handler=listen,
        )

    numbers = [progress for progress, _, _ in heard]
    messages = [message for _, _, message in heard]
    assert all(later > earlier for earlier, later in pairwise(numbers))
    assert [f"denoising {k}/10" for k in range(1, 11)] == messages[3:13]
    assert messages[-1] == "saving"
    assert heard[-1][1] is not None
    assert numbers[-1] <= heard[-1][1]


async def test_sloppy_numbers_are_understood(make_service: MakeService, photo: Path) -> None:
    arguments = {"image_path": str(photo), "prompt": "x", "num_steps": "12", "size_level": "512"}
    async with Client(build_mcp(make_service())) as client:
        result = await client.call_tool("edit_image", arguments)

    metadata = result.structured_content["metadata"]
    assert (metadata["num_steps"], metadata["size_level"]) == (12, 512)


async def test_a_call_that_is_cancelled_stops_the_model(
    make_service: MakeService, photo: Path
) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    service = make_service(worker)
    arguments = {"image_path": str(photo), "prompt": "stop me"}
    async with Client(build_mcp(service)) as client:
        call = asyncio.ensure_future(client.call_tool("edit_image", arguments))
        assert await asyncio.to_thread(gate.reached.wait, 60)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await client.call_tool("get_gpu_status", {})  # comes after the cancellation
        gate.open()
        worker.before_step = lambda job, step: None
        await client.call_tool("edit_image", arguments | {"prompt": "next"})

    assert worker.stopped_at == {"stop me": 2}


async def test_status_answers_during_an_edit(make_service: MakeService, photo: Path) -> None:
    gate = Gate()
    service = make_service(FakeWorker(before_step=gate))
    async with Client(build_mcp(service)) as client:
        call = asyncio.ensure_future(
            client.call_tool("edit_image", {"image_path": str(photo), "prompt": "x"})
        )
        assert await asyncio.to_thread(gate.reached.wait, 60)
        status = await client.call_tool("get_gpu_status", {})
        gate.open()
        await call

    assert status.structured_content["gpu_status"]["model_location"] == "CPU"
    assert status.structured_content["gpu_status"]["idle_time"] == 0


async def test_whatever_is_raised_takes_the_shape_of_the_contract(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service()

    def explode() -> None:
        raise RuntimeError("secret at 0x7f00deadbeef\nin /home/me")

    monkeypatch.setattr(service, "status", explode)
    async with Client(build_mcp(service)) as client:
        result = await client.call_tool("get_gpu_status", {}, raise_on_error=False)

    assert result.is_error
    assert json.loads(result.content[0].text) == result.structured_content
    assert result.structured_content["code"] == "internal"
    assert "secret" not in result.structured_content["error"]


async def test_an_unknown_tool_is_a_failure_of_the_call(make_service: MakeService) -> None:
    async with Client(build_mcp(make_service())) as client:
        with pytest.raises(ToolError, match="Unknown tool"):
            await client.call_tool("edit_video", {})


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_both_eras_of_the_protocol_are_served(
    make_service: MakeService, photo: Path, mode: Any
) -> None:
    async with Client(build_mcp(make_service()), mode=mode) as client:
        result = await client.call_tool("edit_image", {"image_path": str(photo), "prompt": "x"})

    assert result.structured_content["status"] == "success"


async def test_null_counts_as_not_given(make_service: MakeService, photo: Path) -> None:
    service = make_service(default_num_steps=12)
    nothing = dict.fromkeys(("num_steps", "overwrite", "output_path", "size_level", "seed"))
    async with Client(build_mcp(service)) as client:
        good = await client.call_tool(
            "edit_image", {"image_path": str(photo), "prompt": "x", **nothing}
        )
        bad = [
            await client.call_tool("edit_image", arguments, raise_on_error=False)
            for arguments in ({"image_path": None, "prompt": "x"}, {"hat": None, "prompt": "x"})
        ]

    assert good.structured_content["metadata"]["num_steps"] == 12
    assert [result.is_error for result in bad] == [True, True]


@pytest.mark.parametrize(
    ("suffix", "media_type"), [(".webp", "image/webp"), (".avif", "image/avif")]
)
async def test_the_link_names_the_type_of_the_file(
    make_service: MakeService,
    photo: Path,
    suffix: str,
    media_type: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mimetypes.guess_type", lambda *_, **__: (None, None))  # some know little
    arguments = {"image_path": str(photo), "prompt": "x", "output_path": str(photo) + suffix}
    async with Client(build_mcp(make_service())) as client:
        result = await client.call_tool("edit_image", arguments)

    assert result.content[-1].mime_type == media_type


async def test_edit_is_announced_as_a_tool_that_can_replace_files(
    make_service: MakeService,
) -> None:
    async with Client(build_mcp(make_service())) as client:
        tools = {tool.name: tool for tool in await client.list_tools()}

    assert tools["edit_image"].annotations.destructive_hint
    assert not tools["get_gpu_status"].annotations.destructive_hint
