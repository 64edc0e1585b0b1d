"""The MCP face in memory, with a fake worker: answers, progress, cancellation, odd failures."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from fastmcp import Client
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, CallToolResult, ImageContent, PromptReference
from PIL import Image

from conftest import MakeService
from fakes import STREAMED, FakeWorker, Gate
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.schemas.requests import MAX_BATCH


@pytest.fixture(autouse=True)
def _start_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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

    async with Client(build_mcp(make_service(), step_pause_s=0)) as client:
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


@pytest.mark.parametrize(("most", "done"), [(1, 1), (2, 2), (3, 2)])
async def test_progress_rises_over_the_rounds_of_a_reflection(
    make_service: MakeService, photo: Path, most: int, done: int
) -> None:
    heard: list[tuple[float, float | None, str | None]] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append((progress, total, message))

    service = make_service(FakeWorker(model="v1.2"))
    arguments = {"image_path": str(photo), "prompt": "x", "num_steps": 10}
    arguments |= {"thinking": True, "reflection": True, "reflection_rounds": most}
    async with Client(build_mcp(service, step_pause_s=0)) as client:
        await client.call_tool("edit_image", arguments, progress_handler=listen)

    numbers = [progress for progress, _, _ in heard]
    messages = [message for _, _, message in heard]
    steps = [f"denoising {k}/10" for k in range(1, 11)]
    one_round = ["encoding", *steps, "decoding", "reflecting"]
    assert messages[2:] == ["thinking", *one_round * done, "saving"]
    assert all(later > earlier for earlier, later in pairwise(numbers))
    same = [numbers[at] for at, message in enumerate(messages) if message == steps[4]]
    assert [later - same[0] for later in same] == [k * len(one_round) for k in range(done)]
    assert {total for _, total, _ in heard} == {1.0 + most * len(one_round) + 1}
    total = heard[-1][1]
    assert total is not None
    assert numbers[-1] == total - 1


async def test_steps_that_nobody_could_read_are_not_told(
    make_service: MakeService, photo: Path
) -> None:
    heard: list[str | None] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append(message)

    async with Client(build_mcp(make_service(), step_pause_s=3600)) as client:
        await client.call_tool(
            "edit_image",
            {"image_path": str(photo), "prompt": "x", "num_steps": 10},
            progress_handler=listen,
        )

    assert heard[-4:] == ["denoising 1/10", "denoising 10/10", "decoding", "saving"]


async def test_a_reflection_is_told_in_the_answer_and_shown_round_by_round(
    make_service: MakeService, photo: Path
) -> None:
    service = make_service(FakeWorker(model="v1.2"))
    arguments = {"image_path": str(photo), "prompt": "x", "thinking": True, "reflection": True}
    async with Client(build_mcp(service)) as client:
        result = await client.call_tool("edit_image", arguments)
        started = await client.call_tool("submit_edit", arguments)
        job = {"job_id": started.structured_content["job_id"], "wait_s": 50}
        later = await client.call_tool("get_job", job)
        once = await client.call_tool("submit_edit", {**arguments, "reflection_rounds": 1})
        job = {"job_id": once.structured_content["job_id"], "wait_s": 50}
        judged = await client.call_tool("get_job", job)
        batch = await client.call_tool(
            "batch_edit_images",
            {"image_paths": [str(photo)], "prompts": "x", "thinking": True, "reflection": True},
        )

    types = ["text", "image", "resource_link", "image", "image"]
    answers = [result.structured_content, later.structured_content]
    answers.append(batch.structured_content["results"][0]["result"])
    assert len(judged.structured_content["metadata"]["reasoning"]["rounds"]) == 1
    for one, answer in zip((result, later), answers, strict=False):
        assert [block.type for block in one.content] == types
        assert json.loads(one.content[0].text) == answer
        after, first, second = (shown_in(block) for block in one.content if block.type == "image")
        assert np.abs(first - (255 - second)).mean() < 8  # the fake's first round is the input
        assert np.abs(second - after).mean() < 8
    for answer in answers:
        reasoning = answer["metadata"]["reasoning"]
        assert reasoning["prompt"] == "x, and nothing else"
        assert [one["score"] for one in reasoning["rounds"]] == [6.5, 9.0]


def shown_in(block: ImageContent) -> np.ndarray:
    image = Image.open(io.BytesIO(base64.b64decode(block.data)))
    return np.asarray(image.convert("RGB")).astype(int)


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


async def test_status_tells_how_the_model_is_placed(make_service: MakeService, photo: Path) -> None:
    service = make_service(FakeWorker(device="cuda:0", placement=STREAMED))
    async with Client(build_mcp(service)) as client:
        before = await client.call_tool("get_gpu_status", {})
        await client.call_tool("edit_image", {"image_path": str(photo), "prompt": "x"})
        after = await client.call_tool("get_gpu_status", {})

    assert "plan" not in before.structured_content["gpu_status"]
    plan = after.structured_content["gpu_status"]["plan"]
    assert (plan["reason"], plan["measured_peak_gb"]) == (STREAMED.reason, 7.12)


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


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_an_unknown_tool_is_an_error_of_the_protocol(
    make_service: MakeService, mode: Any
) -> None:
    async with Client(build_mcp(make_service()), mode=mode) as client:
        with pytest.raises(MCPError, match="Unknown tool: 'edit_video'") as caught:
            await client.call_tool("edit_video", {})

    assert caught.value.code == INVALID_PARAMS


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_both_eras_of_the_protocol_are_served(
    make_service: MakeService, photo: Path, mode: Any
) -> None:
    heard: list[str | None] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append(message)

    async with Client(build_mcp(make_service()), mode=mode) as client:
        result = await client.call_tool(
            "edit_image", {"image_path": str(photo), "prompt": "x"}, progress_handler=listen
        )
        bad = await client.call_tool("offload_gpu", {"now": True}, raise_on_error=False)
        resource = await client.read_resource("step1x://gpu/status")
        prompt = await client.get_prompt("restyle", {"image_path": "a.png", "style": "a comic"})
        completion = await client.complete(
            PromptReference(type="ref/prompt", name="restyle"), {"name": "style", "value": "pen"}
        )
        name = client.server_info.name

    assert name == "step1x-edit"
    assert result.structured_content["status"] == "success"
    assert "denoising 28/28" in heard
    assert bad.structured_content["error"].startswith("Invalid parameter: 'now' is unknown")
    assert json.loads(resource[0].text)["gpu_status"]["model_location"] == "CPU"
    assert "turn it into a comic" in prompt.messages[0].content.text
    assert completion.values == ["a pencil sketch"]


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


# --- what is announced ----------------------------------------------------------------------------


async def test_annotations_are_honest(make_service: MakeService) -> None:
    async with Client(build_mcp(make_service())) as client:
        told = {tool.name: tool.annotations for tool in await client.list_tools()}

    def names(hint: str) -> set[str]:
        return {name for name, annotations in told.items() if getattr(annotations, hint)}

    # With overwrite they replace files.
    edits = {"edit_image", "batch_edit_images", "submit_edit", "generate_image"}
    assert names("destructive_hint") == edits
    looking = {"get_gpu_status", "get_job", "view_image", "read_recipe"}
    assert names("read_only_hint") == looking
    assert names("idempotent_hint") == told.keys() - edits
    assert names("open_world_hint") == set()
    assert names("title") == told.keys()


async def test_instructions_are_short_and_tools_describe_themselves(
    make_service: MakeService,
) -> None:
    async with Client(build_mcp(make_service())) as client:
        tools = await client.list_tools()
        instructions = client.instructions or ""

    assert 200 < len(instructions.encode()) <= 1024
    assert all(tool.name in instructions for tool in tools if tool.name.startswith("batch"))
    for tool in tools:
        assert len(tool.description or "") > 100
        assert "\n" not in (tool.description or "")
        assert all(part.get("description") for part in tool.input_schema["properties"].values())


async def test_prompts_lead_to_the_tool_and_completions_to_their_arguments(
    make_service: MakeService,
) -> None:
    async with Client(build_mcp(make_service())) as client:
        for prompt in await client.list_prompts():
            arguments = {argument.name: "one.jpg" for argument in prompt.arguments or ()}
            shown = await client.get_prompt(prompt.name, arguments)
            text = shown.messages[0].content.text
            assert prompt.description
            assert "edit_image" in text
            assert "one.jpg" in text
            for argument in prompt.arguments or ():
                assert 10 < len(argument.description or "") < 60
                completion = await client.complete(
                    PromptReference(type="ref/prompt", name=prompt.name),
                    {"name": argument.name, "value": ""},
                )
                assert bool(completion.values) == (argument.name != "image_path")


async def test_the_status_resource_is_never_stale(make_service: MakeService, photo: Path) -> None:
    async def location() -> str:
        (content,) = await client.read_resource("step1x://gpu/status")
        return str(json.loads(content.text)["gpu_status"]["model_location"])

    async with Client(build_mcp(make_service())) as client:
        before = await location()
        await client.call_tool("edit_image", {"image_path": str(photo), "prompt": "x"})
        after = await location()

    assert (before, after) == ("Unloaded", "CPU")


# --- the other tools ------------------------------------------------------------------------------


async def test_every_answer_conforms_to_the_schema_of_its_tool(
    make_service: MakeService, photo: Path
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("edit_image", {"image_path": str(photo), "prompt": "x"}),
        ("edit_image", {"image_path": "missing.png", "prompt": "x"}),
        ("batch_edit_images", {"image_paths": [str(photo)], "prompts": "x"}),
        ("batch_edit_images", {"image_paths": [str(photo), "missing.png"], "prompts": "x"}),
        ("batch_edit_images", {"image_paths": ["missing.png"], "prompts": "x"}),
        ("batch_edit_images", {"image_paths": [], "prompts": "x"}),
        ("get_gpu_status", {}),
        ("offload_gpu", {}),
        ("release_gpu", {}),
        ("release_gpu", {"now": 1}),
        ("submit_edit", {"image_path": str(photo), "prompt": "x"}),
        ("submit_edit", {"image_path": "missing.png", "prompt": "x"}),
        ("get_job", {"wait_s": 50}),
        ("cancel_job", {}),
        ("get_job", {"job_id": "none"}),
        ("generate_image", {"prompt": "x", "width": 256}),
        ("generate_image", {"prompt": "x", "width": 250}),
    ]
    server = build_mcp(make_service(FakeWorker(device="cuda"), model_version="v1.1"))
    async with Client(server) as client:
        schemas = {tool.name: tool.output_schema for tool in await client.list_tools()}
        results, given = [], dict[str, Any]()
        for name, arguments in calls:
            if name in ("get_job", "cancel_job"):
                arguments = given | arguments
            result = await client.call_tool(name, arguments, raise_on_error=False)
            results.append((name, result))
            if (answer := result.structured_content)["status"] == "running":
                given = {"job_id": answer["job_id"]}

    for name, result in results:
        answer = result.structured_content
        assert json.loads(result.content[0].text) == answer
        jsonschema.validate(answer, schemas[name], cls=jsonschema.Draft202012Validator)
        jsonschema.validate(answer | {"later": {"field": 1}}, schemas[name])
        assert schemas[name]["required"] == ["status"]
        assert schemas[name]["type"] == "object"
    stati = [result.structured_content["status"] for _, result in results]
    assert stati == [
        *(["success", "error", "success", "partial", "error", "error"]),
        *["success"] * 3,
        *["error", "running", "error", "success", "success", "error"],
        *["success", "error"],
    ]
    assert [result.is_error for _, result in results] == [status == "error" for status in stati]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"status": "done"}, schemas["get_gpu_status"])


async def test_a_batch_tells_of_each_image_in_order_and_on_one_scale(
    make_service: MakeService, photo: Path
) -> None:
    heard: list[tuple[float, float | None, str | None]] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append((progress, total, message))

    paths = [str(photo), "missing.png", str(photo)]
    async with Client(build_mcp(make_service(), step_pause_s=0)) as client:
        result = await client.call_tool(
            "batch_edit_images",
            {
                "image_paths": json.dumps(paths),  # as language models like to send lists
                "prompts": ["a", "b", "c"],
                "num_steps": 10,
                "output_dir": str(photo.with_name("new")),
            },
            progress_handler=listen,
        )

    answer = result.structured_content
    assert answer["status"] == "partial"
    assert answer["message"] == "Processed 3 images: 2 succeeded, 1 failed"
    assert answer["summary"] == {"total": 3, "successes": 2, "failures": 1}
    assert [item["input"] for item in answer["results"]] == paths
    assert [item["result"]["status"] for item in answer["results"]] == [
        "success",
        "error",
        "success",
    ]
    assert answer["results"][1]["result"]["error"] == "Image file not found: missing.png"
    assert answer["results"][2]["result"]["metadata"]["prompt"] == "c"
    numbers = [progress for progress, _, _ in heard]
    assert all(later > earlier for earlier, later in pairwise(numbers))
    assert {total for _, total, _ in heard} == {3 * 13}
    assert numbers[-1] < 3 * 13
    messages = [message for _, _, message in heard]
    assert "image 1/3, denoising 7/10" in messages
    assert messages[-1] == "image 3/3, saving"


async def test_a_single_edit_waits_for_one_image_of_a_batch_and_not_for_all(
    make_service: MakeService, photo: Path
) -> None:
    gate, worker = Gate(), FakeWorker()
    worker.before_step = lambda job, step: gate(job, step) if job.prompt == "first" else None
    async with Client(build_mcp(make_service(worker))) as client:
        batch = asyncio.ensure_future(
            client.call_tool(
                "batch_edit_images",
                {"image_paths": [str(photo)] * 4, "prompts": ["first", "b", "c", "d"]},
            )
        )
        assert await asyncio.to_thread(gate.reached.wait, 60)
        waiting = asyncio.Event()

        async def listen(progress: float, total: float | None, message: str | None) -> None:
            waiting.set()

        single = asyncio.ensure_future(
            client.call_tool(
                "edit_image", {"image_path": str(photo), "prompt": "me"}, progress_handler=listen
            )
        )
        await asyncio.wait_for(waiting.wait(), 60)  # queued
        gate.open()
        await asyncio.gather(batch, single)

    assert worker.started.index("me") <= 2


async def test_a_batch_that_is_cancelled_stops_and_keeps_what_is_done(
    make_service: MakeService, photo: Path
) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = lambda job, step: gate(job, step) if job.prompt == "b" else None
    async with Client(build_mcp(make_service(worker))) as client:
        call = asyncio.ensure_future(
            client.call_tool(
                "batch_edit_images",
                {
                    "image_paths": [str(photo)] * 3,
                    "prompts": ["a", "b", "c"],
                    "output_dir": str(photo.with_name("new")),
                },
            )
        )
        assert await asyncio.to_thread(gate.reached.wait, 60)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await client.call_tool("get_gpu_status", {})  # comes after the cancellation
        gate.open()
        await client.call_tool("release_gpu", {})  # runs once the worker is free

    assert worker.started == ["a", "b"]
    assert [path.name for path in photo.with_name("new").iterdir()] == ["photo_edited.png"]


async def test_offload_waits_for_the_running_edit_and_says_so(
    make_service: MakeService, photo: Path
) -> None:
    gate = Gate()
    service = make_service(FakeWorker(before_step=gate, device="cuda"))
    beats: list[float] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        beats.append(progress)
        assert message == "waiting for the running edit"
        if len(beats) == 2:
            gate.open()

    async with Client(build_mcp(service, heartbeat_s=0.02)) as client:
        edit = asyncio.ensure_future(
            client.call_tool("edit_image", {"image_path": str(photo), "prompt": "x"})
        )
        assert await asyncio.to_thread(gate.reached.wait, 60)
        offloaded = await client.call_tool("offload_gpu", {}, progress_handler=listen)
        released = await client.call_tool("release_gpu", {})
        await edit

    assert beats[:2] == [1, 2]
    assert offloaded.structured_content["message"].startswith("GPU offloaded. Model now on CPU")
    assert offloaded.structured_content["gpu_status"]["statistics"]["gpu_to_cpu"] == 1
    assert released.structured_content["message"].startswith(
        "GPU released. Model location: Unloaded"
    )


async def test_view_shows_a_picture_and_says_in_a_line_what_it_is(
    make_service: MakeService, photo: Path
) -> None:
    async with Client(build_mcp(make_service())) as client:
        seen = await client.call_tool("view_image", {"path": str(photo), "max_size": "64"})
        bad = [
            await client.call_tool("view_image", arguments, raise_on_error=False)
            for arguments in (
                {"path": "missing.png"},
                {"path": str(photo), "max_size": 5000},
            )
        ]

    image, line = seen.content
    assert line.text == "photo.png, at most 64 pixels on the longer side"
    assert seen.structured_content is None
    shown = Image.open(io.BytesIO(base64.b64decode(image.data)))
    assert (shown.format, max(shown.size)) == ("JPEG", 64)
    assert [result.structured_content["error"] for result in bad] == [
        "Image file not found: missing.png",
        "Invalid parameter: max_size must be between 64 and 1024, got 5000",
    ]


async def test_a_full_server_says_when_to_come_back(make_service: MakeService, photo: Path) -> None:
    gate = Gate()
    arguments = {"image_path": str(photo), "prompt": "x"}
    async with Client(build_mcp(make_service(FakeWorker(before_step=gate), max_queue=1))) as client:
        running = asyncio.ensure_future(client.call_tool("edit_image", arguments))
        assert await asyncio.to_thread(gate.reached.wait, 60)
        queued = asyncio.Event()

        async def listen(progress: float, total: float | None, message: str | None) -> None:
            queued.set()

        waiting = asyncio.ensure_future(
            client.call_tool("edit_image", arguments, progress_handler=listen)
        )
        await asyncio.wait_for(queued.wait(), 60)
        refused = await client.call_tool("edit_image", arguments, raise_on_error=False)
        gate.open()
        await asyncio.gather(running, waiting)

    answer = refused.structured_content
    assert answer["error"].startswith("Server busy: ")
    assert answer["code"] == "queue_full"
    assert answer["retry_after_s"] >= 1


# --- how large an answer becomes ------------------------------------------------------------------


def _wire_size(result: Any) -> int:
    return len(
        CallToolResult(
            content=result.content,
            structured_content=result.structured_content,
            is_error=result.is_error,
        )
        .model_dump_json(by_alias=True, exclude_none=True)
        .encode()
    )


async def test_a_batch_too_large_for_its_clients_leaves_metadata_out_and_says_so(
    make_service: MakeService, photo: Path
) -> None:
    count = 110
    arguments = {
        "image_paths": [str(photo)] * count + ["missing.png"],
        "prompts": "x" * 4000,
        "num_steps": 10,
        "output_dir": str(photo.with_name("new")),
    }
    async with Client(build_mcp(make_service())) as client:
        result = await client.call_tool("batch_edit_images", arguments)

    answer = result.structured_content
    assert _wire_size(result) <= 700_000
    assert "metadata of 110 edited images" in answer["shortened"]
    assert answer["summary"] == {"total": count + 1, "successes": count, "failures": 1}
    assert len(answer["results"]) == count + 1
    assert set(answer["results"][0]["result"]) == {
        "status",
        "message",
        "output_path",
        "processing_time",
    }
    assert answer["results"][-1]["result"]["error"] == "Image file not found: missing.png"


async def test_failures_keep_their_errors_when_paths_are_long(make_service: MakeService) -> None:
    paths = [f"{'f' * 2000}{number}.png" for number in range(300)]
    async with Client(build_mcp(make_service())) as client:
        result = await client.call_tool(
            "batch_edit_images", {"image_paths": paths, "prompts": "x"}, raise_on_error=False
        )

    answer = result.structured_content
    assert _wire_size(result) <= 700_000
    assert "long paths and errors are cut" in answer["shortened"]
    assert answer["summary"]["failures"] == 300
    assert len(answer["results"]) == 300
    assert [item["input"][-8:] for item in answer["results"]] == [path[-8:] for path in paths]
    assert all(item["result"]["error"] for item in answer["results"])


async def test_errors_too_many_even_for_one_line_each_are_counted(
    make_service: MakeService,
) -> None:
    # Each letter takes four bytes, so that what is cut to its length in letters is still too long.
    long = "\N{ARTIST PALETTE}" * 200
    paths = [f"{long}{number}.png" for number in range(1000)]
    async with Client(build_mcp(make_service())) as client:
        result = await client.call_tool(
            "batch_edit_images", {"image_paths": paths, "prompts": "x"}, raise_on_error=False
        )

    answer = result.structured_content
    told, counted = answer["results"], answer["further_failures"]
    assert _wire_size(result) <= 700_000
    assert answer["summary"] == {"total": 1000, "successes": 0, "failures": 1000}
    assert 100 < len(told) < 1000
    assert [item["input"][-8:] for item in told] == [path[-8:] for path in paths[: len(told)]]
    assert sum(counted.values()) == 1000 - len(told)
    assert set(counted) == {told[0]["result"]["code"]}
    assert f"{1000 - len(told)} further failures are only counted" in answer["shortened"]


async def test_a_batch_of_the_largest_size_names_every_file(
    make_service: MakeService, photo: Path
) -> None:
    folder = photo.with_name("holiday-pictures-of-the-year")
    arguments = {"prompts": "add a red hat", "num_steps": 10, "output_dir": str(folder)}
    paths = [str(photo)] * MAX_BATCH
    async with Client(build_mcp(make_service())) as client:
        result = await client.call_tool(
            "batch_edit_images", {"image_paths": paths, **arguments}, raise_on_error=False
        )
        refused = await client.call_tool(
            "batch_edit_images", {"image_paths": [*paths, "x"], **arguments}, raise_on_error=False
        )

    answer = result.structured_content
    assert answer["summary"]["successes"] == MAX_BATCH
    assert _wire_size(result) <= 700_000
    assert len({item["result"]["output_path"] for item in answer["results"]}) == MAX_BATCH
    assert refused.structured_content["error"] == (
        "Invalid parameter: image_paths must have at most 1000 items, got 1001"
    )


# --- the link of an answer ------------------------------------------------------------------------


async def test_the_link_of_an_answer_opens_wherever_a_picture_is_read(
    make_service: MakeService, photo: Path, tmp_path: Path
) -> None:
    odd = photo.rename(tmp_path / "Screenshot 3.14\u202fPM #1.png")
    async with Client(build_mcp(make_service())) as client:
        edited = await client.call_tool(
            "edit_image", {"image_path": str(tmp_path / "Screenshot 3.14 PM #1.png"), "prompt": "x"}
        )
        (link,) = (block.uri for block in edited.content if block.type == "resource_link")
        viewed = await client.call_tool("view_image", {"path": link})
        again = await client.call_tool("edit_image", {"image_path": link, "prompt": "x"})
        (read,) = await client.read_resource(link)
        templates = await client.list_resource_templates()
        (tmp_path / "notes.txt").write_text("nobody's business")
        for path, message in (
            (tmp_path / "no.png", "Image file not found"),
            (tmp_path / "notes.txt", "Unsupported image"),
            (tmp_path.parent / "x.png", "Path not allowed"),
        ):
            with pytest.raises(MCPError, match=message) as refused:
                await client.read_resource(path.as_uri())
            assert refused.value.error.code == INVALID_PARAMS

    output = Path(edited.structured_content["output_path"])
    assert output.as_uri() == link
    assert "%20" in link
    assert viewed.content[0].type == "image"
    assert again.structured_content["output_path"].endswith("_edited_edited.png")
    assert base64.b64decode(read.blob) == output.read_bytes()
    assert read.mime_type == "image/png"
    assert [template.uri_template for template in templates] == ["file:///{path*}"]
    assert odd.exists()
