"""`step1x-edit history`, and what the other commands keep in it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from fakes import FakeWorker
from step1x_edit.channel import EditJob
from step1x_edit.interfaces.cli import app

QUICK = ["--num-steps", "10"]

pytestmark = pytest.mark.usefixtures("fake_model")


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HISTORY", "on")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def run(*words: object) -> Result:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.stderr
    return result


def steps() -> list[dict[str, Any]]:
    """All steps, the oldest first."""
    listed: list[dict[str, Any]] = json.loads(run("history", "list", "--json").stdout)["steps"]
    return listed


def edited(*words: object) -> str:
    """Make a quick edit and return the id of its step."""
    return edited_by(*words, *QUICK)


def edited_by(*words: object) -> str:
    """Run a command and return the id of the step that it adds."""
    before = {step["id"] for step in steps()}
    run(*words)
    (new,) = {step["id"] for step in steps()} - before
    return str(new)


def picture(name: str | Path) -> np.ndarray:
    return np.asarray(Image.open(name).convert("RGB"))


def test_edits_become_a_tree_because_their_inputs_are_recognised(photo: Path) -> None:
    first = edited("edit", photo.name, "make it winter")
    second = edited("edit", "photo_edited.png", "add a hat")
    beside = edited("history", "edit", first, "add fog")
    again = edited("edit", photo.name, "make it night")

    listed = run("history", "list").stdout
    parents = {step["id"]: step.get("parent") for step in steps()}
    assert parents == {first: None, second: first, beside: first, again: None}
    assert listed.count("photo.png") == 1
    assert re.findall("[0-9a-f]{12}", listed) == [first, second, beside, again]
    indents = [len(re.match(r"[^0-9a-f]*", line)[0]) for line in listed.splitlines()[1:]]  # type: ignore
    assert indents == [4, 8, 8, 4]


def test_a_recipe_applied_to_another_picture_is_a_step_and_a_check_is_none(photo: Path) -> None:
    other = photo.with_name("other.png")
    Image.fromarray(picture(photo)[::-1]).save(other)
    edited("edit", photo.name, "make it winter")

    run("replay", "photo_edited.png", "--check")
    new = edited_by("replay", "photo_edited.png", "--on", other.name)

    (step,) = [step for step in steps() if step["id"] == new]
    assert (step["name"], step["metadata"]["prompt"]) == ("other.png", "make it winter")


def test_nothing_is_kept_unless_history_is_on(
    photo: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HISTORY")

    run("edit", photo.name, "make it winter", *QUICK)

    assert not data_dir.exists()
    assert run("history", "list").stdout == "The history is empty; HISTORY is off\n"


def test_several_pictures_and_pictures_on_stdout_are_kept_but_no_batch(
    photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_VERSION", "v1.1")
    other = photo.with_name("other.png")
    Image.fromarray(255 - picture(photo)).save(other)

    run("edit", photo.name, other.name, "make it winter", *QUICK)
    run("edit", photo.name, "add fog", "--output", "-", *QUICK)
    fox = edited("generate", "a red fox", "--width", "256", "--height", "256")
    run("history", "edit", fox, "--from-original", "add a hat", *QUICK)
    run("batch", ".", "--prompt", "make it night", "--output-dir", "out", *QUICK)

    kept = [(step["name"], step["metadata"]["prompt"]) for step in steps()]
    assert kept == [
        ("photo.png", "make it winter"),
        ("other.png", "make it winter"),
        ("photo.png", "add fog"),
        ("a-red-fox.png", "a red fox"),
        ("a-red-fox.png", "add a hat"),
    ]


def test_from_the_original_all_prompts_are_one_instruction(photo: Path, worker: FakeWorker) -> None:
    jobs: list[EditJob] = []
    worker.before_step = lambda job, step: jobs.append(job)
    first = edited("edit", photo.name, "make it winter", "--guidance-scale", "4")
    second = edited("history", "edit", first, "Add a hat!", "--seed", "7")
    jobs.clear()

    merged = edited("history", "edit", second, "add fog", "--from-original", "-o", "merged.png")

    job = jobs[0]
    assert job.prompt == "Make it winter. Add a hat! Add fog."
    assert job.image is not None
    assert np.array_equal(job.image, picture(photo))
    assert (job.guidance_scale, job.seed, job.num_steps) == (4.0, 7, 10)
    by_id = {step["id"]: step for step in steps()}
    assert "parent" not in by_id[merged]
    assert by_id[merged]["original"] == by_id[second]["original"]
    assert Path("merged.png").exists()


def test_a_step_is_edited_with_its_settings_and_another_seed(
    photo: Path, worker: FakeWorker
) -> None:
    jobs: list[EditJob] = []
    worker.before_step = lambda job, step: jobs.append(job)
    first = edited("edit", photo.name, "make it winter", "--guidance-scale", "4", "--seed", "7")

    edited("history", "edit", first[:6], "add fog", "--mode", "fast")

    assert (jobs[-1].guidance_scale, jobs[-1].mode) == (4.0, "fast")
    assert jobs[-1].seed != 7
    assert jobs[-1].image is not None
    assert np.array_equal(jobs[-1].image, 255 - picture(photo))


def masked(photo: Path, name: str, columns: slice) -> Path:
    mask = np.zeros(picture(photo).shape[:2], np.uint8)
    mask[:, columns] = 255
    Image.fromarray(mask).save(photo.with_name(name))
    return photo.with_name(name)


def test_regions_stay_regions_from_the_original_and_differing_ones_are_refused(
    photo: Path, worker: FakeWorker
) -> None:
    left, right = masked(photo, "left.png", slice(0, 32)), masked(photo, "r.png", slice(32, None))
    first = edited("edit", photo.name, "make it winter", "--mask", left)
    second = edited("edit", "photo_edited.png", "add fog", "--mask", left)
    third = edited("edit", "photo_edited_edited.png", "add fog", "--mask", right)

    merged = edited("history", "edit", second, "--from-original", "-o", "merged.png")
    refused = CliRunner().invoke(app, ["history", "edit", third, "--from-original"])

    assert np.array_equal(picture("merged.png")[:, 32:], picture(photo)[:, 32:])
    assert not np.array_equal(picture("merged.png"), picture(photo))
    drifts = {step["id"]: step.get("drift") for step in steps()}
    assert drifts == {first: 0.0, second: 0.0, third: None, merged: 0.0}, "all of it could change"
    assert refused.exit_code == 2
    assert "changed different regions" in refused.stderr


def test_a_grown_canvas_is_no_setting_of_the_next_edit_and_has_no_drift(
    photo: Path, worker: FakeWorker
) -> None:
    first = edited("edit", photo.name, "more sky", "--outpaint", "50% 0 0 0", "--region", "full")
    second = edited("history", "edit", first, "add fog")

    words = ["history", "edit", first, "--from-original", "--seed", "7", "-o", "again.png"]
    again = edited(*words)
    refused = CliRunner().invoke(app, ["history", "edit", second, "--from-original"])

    sizes = [Image.open(name).size for name in ("photo_edited.png", "again.png")]
    assert sizes == [(64, 72), (64, 72)]
    by_id = {step["id"]: step for step in steps()}
    assert by_id[second]["metadata"]["height"] == 72
    assert "outpaint" not in by_id[second]["metadata"]
    assert by_id[again]["metadata"]["region"] == by_id[first]["metadata"]["region"]
    assert all("drift" not in step for step in by_id.values())
    assert "changed different regions" in refused.stderr


def test_the_drift_says_how_much_the_rest_moved_since_the_original(
    photo: Path, worker: FakeWorker
) -> None:
    def paint(job: EditJob) -> np.ndarray:
        assert job.image is not None
        image: np.ndarray = job.image + np.uint8(3)
        image[:, :24] = len(job.prompt)  # what was asked for
        return image

    worker.paint = paint
    Image.fromarray(np.full((64, 64, 3), 100, np.uint8)).save(photo)
    first = edited("edit", photo.name, "a red hat")
    second = edited("history", "edit", first, "a blue hat, please")

    assert [step["drift"] for step in steps()] == [3.0, 6.0]
    assert "(drift 3.0)" in run("history", "list").stdout
    shown = run("history", "show", second).stdout
    assert "the half of the picture that differs least differs by 6.0 of 255 levels" in shown
    compared = run("history", "compare", first, second).stdout
    assert compared.startswith(f"{first} and {second}: the half")
    assert "differs by 3.0 of 255" in compared


def test_two_steps_are_drawn_side_by_side(photo: Path) -> None:
    first = edited("edit", photo.name, "make it winter")

    told = run("history", "compare", first, "--output", "side.png")
    refused = CliRunner().invoke(app, ["history", "compare", first, "--output", "side.txt"])

    assert told.stdout.splitlines()[-1] == str(Path("side.png").absolute())
    sheet = picture("side.png")
    left, right = sheet[400, 500].astype(int), sheet[400, 500 + 1024 + 12].astype(int)
    assert np.abs(left + right - 255).max() < 8  # the fake inverts
    assert refused.exit_code == 2


def test_a_step_is_shown_with_all_that_made_it_and_its_picture(photo: Path) -> None:
    first = edited("edit", photo.name, "make it winter", "--seed", "7")
    second = edited("history", "edit", first, "add fog")

    told = run("history", "show", second, "--output", "again.png").stdout
    as_json = json.loads(run("history", "show", second, "--json").stdout)

    assert "make it winter → add fog" in told
    assert f"parent           {first}" in told
    assert Path("again.png").read_bytes() == Path("photo_edited_2.png").read_bytes()
    assert as_json["path"] == [first, second]
    assert as_json["metadata"]["num_steps"] == 10


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["second"], ["first", "other"]),
        (["first"], ["other"]),
        (["second", "--tree"], ["other"]),
        (["--all"], []),
    ],
)
def test_a_step_a_tree_or_everything_is_deleted_with_its_pictures(
    photo: Path, data_dir: Path, words: list[str], left: list[str]
) -> None:
    ids = {"first": edited("edit", photo.name, "make it winter")}
    ids["second"] = edited("history", "edit", ids["first"], "add fog")
    Image.fromarray(picture(photo)[::-1]).save("other.png")
    ids["other"] = edited("edit", "other.png", "make it winter")

    asked = CliRunner().invoke(app, ["history", "delete", *(ids.get(w, w) for w in words)])
    assert asked.exit_code == 1
    assert len(steps()) == 3
    run("history", "delete", *(ids.get(word, word) for word in words), "--yes")

    assert [step["id"] for step in steps()] == [ids[name] for name in left]
    named = {
        step[kind]
        for step in steps()
        for kind in ("original", "source", "result", "preview")
        if kind in step
    }
    assert {file.name for file in (data_dir / "history" / "pictures").iterdir()} == named
    assert Path("photo_edited.png").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["show", "abc"], "the history has no step 'abc'; step1x-edit history list shows all"),
        (["edit", "abc", "x"], "the history has no step 'abc'"),
        (["delete"], "give the id of a step, or --all"),
        (["delete", "abc", "--all"], "give the id of a step, or --all"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(words: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["history", *words])

    assert result.exit_code == 2
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
def test_only_the_user_can_read_the_history(photo: Path, data_dir: Path) -> None:
    run("edit", photo.name, "make it winter", *QUICK)

    modes = {path: path.stat().st_mode & 0o777 for path in (data_dir / "history").rglob("*")}
    assert {modes[path] for path in modes if path.is_dir()} == {0o700}
    assert {modes[path] for path in modes if path.is_file()} == {0o600}


def test_a_history_that_cannot_be_changed_is_told_in_one_sentence(data_dir: Path) -> None:
    data_dir.write_text("no folder")
    result = CliRunner().invoke(app, ["history", "delete", "--all", "--yes"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Cannot write output: the history in DATA_DIR cannot be chan")
    assert len(result.stderr.splitlines()) == 1
