"""The operations on files: what a batch answers, saves and refuses, and whose turn it is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import MakeService, edits_of
from fakes import FakeWorker, Gate
from step1x_edit.channel import Phase, Progress
from step1x_edit.errors import InvalidParameterError, ServerBusyError
from step1x_edit.service.editor import unreported
from step1x_edit.service.service import EditService


def pictures(folder: Path, *names: str) -> list[str]:
    """Small pictures, each of another grey."""
    paths = [folder / name for name in names]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (24, 16), (40 * number, 40 * number, 40 * number)).save(path)
    return [str(path) for path in paths]


async def batch(service: EditService, **arguments: object) -> dict[str, Any]:
    request = service.read_batch(arguments)
    answer = await edits_of(service).edit_several(
        request.each(), request.output_dir, lambda index: unreported
    )
    return answer.to_dict()


async def test_a_batch_goes_on_past_what_fails_and_keeps_the_order(
    make_service: MakeService, tmp_path: Path
) -> None:
    first, last = pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    paths = [first, str(tmp_path / "broken.png"), "missing.png", last]

    answer = await batch(make_service(), image_paths=paths, prompts=["1", "2", "3", "4"], seed=3)

    assert answer["status"] == "partial"
    assert answer["message"] == "Processed 4 images: 2 succeeded, 2 failed"
    assert answer["summary"] == {"total": 4, "successes": 2, "failures": 2}
    assert [item["input"] for item in answer["results"]] == paths
    results = [item["result"] for item in answer["results"]]
    assert [result["status"] for result in results] == ["success", "error", "error", "success"]
    assert results[2]["error"].startswith("Path not allowed: missing.png")  # tests start elsewhere
    assert [results[index]["metadata"]["prompt"] for index in (0, 3)] == ["1", "4"]
    assert results[3]["output_path"] == str(tmp_path / "b_edited.png")
    grey = np.asarray(Image.open(results[3]["output_path"]))
    assert (grey == 255 - 40).all()


async def test_a_batch_without_a_success_is_an_error_and_still_says_all(
    make_service: MakeService, tmp_path: Path
) -> None:
    paths = [str(tmp_path / name) for name in ("no.png", "nor.png")]

    answer = await batch(make_service(), image_paths=paths, prompts="x")

    assert answer["status"] == "error"
    assert answer["error"] == "Processed 2 images: 0 succeeded, 2 failed"
    assert len(answer["results"]) == 2
    assert answer["summary"] == {"total": 2, "successes": 0, "failures": 2}


async def test_equal_names_in_one_folder_are_numbered_and_inputs_stay(
    make_service: MakeService, tmp_path: Path
) -> None:
    paths = pictures(tmp_path, "x/a.png", "y/a.png", "z/A.png")
    before = [Path(path).read_bytes() for path in paths]

    answer = await batch(
        make_service(), image_paths=paths, prompts="x", output_dir=str(tmp_path / "new" / "out")
    )

    names = [Path(item["result"]["output_path"]).name for item in answer["results"]]
    assert names == ["a_edited.png", "a_edited_2.png", "A_edited_3.png"]
    assert [Path(path).read_bytes() for path in paths] == before


async def test_an_input_of_the_batch_is_never_overwritten(
    make_service: MakeService, tmp_path: Path
) -> None:
    paths = pictures(tmp_path, "a.png", "a_edited.png")
    before = Path(paths[1]).read_bytes()

    answer = await batch(make_service(), image_paths=paths, prompts="x", overwrite=True)

    assert answer["status"] == "success"
    assert Path(paths[1]).read_bytes() == before


async def test_each_image_of_a_batch_gets_a_seed_of_its_own_unless_one_is_given(
    make_service: MakeService, tmp_path: Path
) -> None:
    paths = pictures(tmp_path, "a.png", "b.png", "c.png")
    service = make_service()

    drawn = await batch(service, image_paths=paths, prompts="x")
    given = await batch(service, image_paths=paths, prompts="x", seed=7)

    seeds = [[i["result"]["metadata"]["seed"] for i in a["results"]] for a in (drawn, given)]
    assert len(set(seeds[0])) == 3
    assert seeds[1] == [7, 7, 7]


async def test_between_two_pictures_of_a_batch_others_have_their_turn_and_it_is_let_in_whole(
    make_service: MakeService, photo: Path, tmp_path: Path
) -> None:
    gate, worker = Gate(), FakeWorker()
    worker.before_step = lambda job, step: gate(job, step) if job.prompt == "other" else None
    service = make_service(worker, max_queue=1)
    paths = pictures(tmp_path, "a.png", "b.png")
    others: list[asyncio.Future[object]] = []

    async def fill(event: Progress) -> None:
        """As the first picture is saved, an edit of others begins, and another fills the line."""
        if event.phase is Phase.SAVING and not others:
            others.append(
                asyncio.ensure_future(
                    service.edit_picture(
                        photo.read_bytes(), service.read_picture({"prompt": "other"})
                    )
                )
            )
            assert await asyncio.to_thread(gate.reached.wait, 60)
            queued = asyncio.Event()

            async def report(event: Progress) -> None:
                queued.set()

            request = service.read_picture({"prompt": "later"})
            later = service.edit_picture(photo.read_bytes(), request, report)
            others.append(asyncio.ensure_future(later))
            await queued.wait()
            with pytest.raises(ServerBusyError):
                await service.check_room()

    async def let_go(event: Progress) -> None:
        gate.open()

    request = service.read_batch({"image_paths": paths, "prompts": ["first", "second"]})
    reports = (fill, let_go)
    answer = await edits_of(service).edit_several(request.each(), None, reports.__getitem__)
    gate.open()
    await asyncio.gather(*others)

    assert answer.status == "success"
    assert worker.started == ["first", "other", "later", "second"]


async def test_a_batch_that_is_refused_reads_nothing(
    make_service: MakeService, photo: Path
) -> None:
    service = make_service()

    with pytest.raises(InvalidParameterError, match="prompts must be one text or a list of 2"):
        await batch(service, image_paths=[str(photo)] * 2, prompts=["one"])
    with pytest.raises(InvalidParameterError, match="image_paths"):
        await batch(service, image_paths=[], prompts="x")
