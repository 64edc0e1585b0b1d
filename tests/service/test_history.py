"""The history on disk: whole steps or none, within its limit, whoever else uses it."""

from __future__ import annotations

import io
import multiprocessing
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from step1x_edit.errors import CorruptImageError
from step1x_edit.schemas.answers import EditMetadata
from step1x_edit.service import durable
from step1x_edit.service.history import History, NewStep, Step, merged
from step1x_edit.settings import MEBI, Settings

SIDE = 64


def png(value: int, side: int = SIDE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def noise(seed: int, side: int) -> bytes:
    """A picture of 3 · side² bytes."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def made(
    image: bytes | None, result: bytes, prompt: str = "x", mask: bytes | None = None
) -> NewStep:
    metadata = EditMetadata(
        prompt=prompt,
        num_steps=10,
        guidance_scale=6.0,
        size_level=512,
        seed=1,
        gpu_location="CPU",
        gpu_memory_gb=0,
    )
    return NewStep("photo.png", image, mask, result, ".png", metadata)


@pytest.fixture
def history(tmp_path: Path) -> History:
    return opened(tmp_path)


def opened(data_dir: Path, history_mb: int = 64) -> History:
    return History(Settings(_env_file=None, data_dir=data_dir, history_mb=history_mb))


def kept(history: History, *arguments: object, **more: object) -> Step:
    step = history.keep(made(*arguments, **more))  # type: ignore[arg-type]
    assert step is not None
    return step


def pictures(data_dir: Path) -> set[str]:
    return {file.name for file in (data_dir / "history" / "pictures").iterdir()}


def test_the_same_bytes_and_the_same_edit_are_kept_once(history: History, tmp_path: Path) -> None:
    first = kept(history, png(1), png(2))
    kept(history, png(1), png(3))
    again = kept(history, png(1), png(2))

    assert again.id == first.id
    assert len(history.steps()) == 2
    assert pictures(tmp_path) == set().union(*(step.pictures for step in history.steps()))
    assert len(pictures(tmp_path)) == 3 + 2, "pictures, and previews of the results"


def test_a_step_that_is_made_again_is_the_newest_and_keeps_its_children(history: History) -> None:
    first, other = kept(history, png(1), png(2)), kept(history, png(1), png(9))
    second = kept(history, png(2), png(3))
    third = kept(history, png(3), png(4))
    kept(history, png(2), png(3))

    assert [step.id for step in history.steps()] == [first.id, other.id, third.id, second.id]
    assert history.delete(second) == 2
    assert [step.id for step in history.steps()] == [first.id, other.id]


def test_an_edit_that_gives_the_original_again_makes_no_circle(history: History) -> None:
    first = kept(history, png(1), png(2))
    second = kept(history, png(2), png(1))
    third = kept(history, png(1), png(2))

    assert [step.parent for step in (first, second, third)] == [None, first.id, second.id]
    assert [step.id for step in history.path_to(third)] == [first.id, second.id, third.id]


def test_a_generated_picture_is_the_original_of_its_edits(history: History) -> None:
    root = kept(history, None, png(1), "a fox")
    step = kept(history, png(1), png(2), "add a hat")

    assert (step.parent, step.original) == (root.id, root.result)
    assert [each.metadata.prompt for each in history.path_to(step)] == ["add a hat"]
    assert history.from_original(step).image == png(1)


def test_whole_trees_that_were_left_alone_longest_make_room(tmp_path: Path) -> None:
    history = opened(tmp_path, history_mb=1)
    side = 280  # a quarter of the room
    old = kept(history, png(1), noise(1, side))
    worked_on = kept(history, png(2), noise(2, side))
    kept(history, noise(1, side), png(11))  # the tree of `old` is the newer one now
    assert {step.original for step in history.steps()} == {old.original, worked_on.original}

    kept(history, png(3), noise(3, side))
    kept(history, png(3), noise(4, side))

    assert {step.name for step in history.steps()} == {"photo.png"}
    assert worked_on.original not in {step.original for step in history.steps()}
    assert [step.original for step in history.steps()].count(old.original) == 2
    sizes = [file.stat().st_size for file in (tmp_path / "history" / "pictures").iterdir()]
    assert sum(sizes) <= MEBI


def test_a_tree_that_needs_too_much_alone_gets_no_further_step_and_loses_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history = opened(tmp_path, history_mb=1)
    step = kept(history, png(1), noise(1, 400))
    other = kept(history, png(2), png(3))

    assert history.keep(made(png(1), noise(2, 500))) is None

    assert [each.id for each in history.steps()] == [step.id, other.id]
    assert "delete some, or raise HISTORY_MB" in caplog.text


def test_an_edit_that_cannot_be_kept_is_a_warning(
    history: History, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "history").write_text("in the way")

    assert history.keep(made(png(1), png(2))) is None
    assert "not kept in the history" in caplog.text


def test_a_damaged_picture_is_said_and_a_damaged_step_is_left_out(
    history: History, tmp_path: Path
) -> None:
    first, second = kept(history, png(1), png(2)), kept(history, png(1), png(3))
    (tmp_path / "history" / "steps" / f"{first.id}.json").write_text("{")
    (tmp_path / "history" / "pictures" / second.result).write_bytes(b"x")

    assert [step.id for step in history.steps()] == [second.id]
    with pytest.raises(CorruptImageError, match="missing or damaged"):
        history.read(second.result)


def test_folders_of_other_programs_do_not_matter(history: History, tmp_path: Path) -> None:
    for folder in ("steps", "pictures"):
        (tmp_path / "history" / folder / ".sync").mkdir(parents=True)

    step = kept(history, png(1), png(2))

    assert [each.id for each in history.steps()] == [step.id]


def test_what_a_newer_version_has_written_is_kept_with_its_pictures(
    history: History, tmp_path: Path
) -> None:
    step = kept(history, png(1), png(2))
    file = tmp_path / "history" / "steps" / f"{step.id}.json"
    text = file.read_text().replace('"prompt":', '"novelty":7,"prompt":')
    file.write_text(text)
    assert [each.id for each in history.steps()] == [step.id]
    file.write_text(text.replace('"made_at"', '"made_when"'))

    kept(history, png(5), png(6))

    assert step.pictures <= pictures(tmp_path)
    assert history.delete_all() == 2
    assert pictures(tmp_path) == set()


def test_whenever_it_is_killed_there_are_only_whole_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the folder in the middle of each write is what a kill at that moment leaves."""
    history = opened(tmp_path / "data")
    first = kept(history, png(1), png(2))
    images: list[Path] = []

    def copied(path: Path, data: bytes) -> None:
        write(path, data[: len(data) // 2])
        images.append(tmp_path / f"killed-{len(images)}")
        shutil.copytree(tmp_path / "data", images[-1])
        write(path, data)

    write = durable.write
    with monkeypatch.context() as patch:
        patch.setattr(durable, "write", copied)
        kept(history, png(2), png(3), mask=png(255))

    assert len(images) == 4, "the mask, the result, its preview, the step"
    for image in images:
        left = opened(image)
        assert [step.id for step in left.steps()] == [first.id]
        assert kept(left, png(2), png(4)).parent == first.id
        named = set().union(*(step.pictures for step in left.steps()))
        assert pictures(image) == named, "nothing is left behind"
        assert not [*(image / "history" / "steps").glob(".*")]


def keep_many(data_dir: Path, start: int) -> None:
    history = opened(data_dir)
    for value in range(start, start + 4):
        history.keep(made(png(0), png(value)))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_several_processes_can_keep_steps_at_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=keep_many, args=(tmp_path, start)) for start in (10, 20, 30)]
    for other in others:
        other.start()
    for other in others:
        other.join()

    assert len(opened(tmp_path).steps()) == 12


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        (["make it winter"], "make it winter"),
        (["make it winter", "", "Add a hat!"], "Make it winter. Add a hat!"),
        ([" make it\nwinter ", "no people?"], "Make it winter. No people?"),
        (["变成铅笔素描", "加一顶红帽子。"], "变成铅笔素描。 加一顶红帽子。"),
    ],
)
def test_prompts_are_merged_sentence_by_sentence(prompts: list[str], sentence: str) -> None:
    assert merged(prompts) == sentence
