"""`step1x-edit edit`: several pictures, patterns, masks, pictures from and to other programs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import MakeService
from fakes import FakeWorker
from step1x_edit.channel import EditJob
from step1x_edit.interfaces.cli import app

run = CliRunner()
QUICK = ["--num-steps", "10"]

pytestmark = pytest.mark.usefixtures("fake_model")


@pytest.fixture
def pictures(tmp_path: Path, photo: Path) -> list[Path]:
    """Three pictures that differ, in a separate folder."""
    folder = tmp_path / "in"
    folder.mkdir()
    paths = [folder / name for name in ("c.png", "a.png", "b.png")]
    for shift, path in enumerate(paths):
        Image.fromarray(np.roll(np.asarray(Image.open(photo)), shift, axis=1)).save(path)
    return sorted(paths)


def pixels(source: Path | bytes) -> np.ndarray:
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    return np.asarray(Image.open(file).convert("RGB"))


def test_several_images_are_edited_each_into_its_own_file(pictures: list[Path]) -> None:
    result = run.invoke(app, ["edit", *map(str, pictures), "invert", *QUICK])

    outputs = [path.with_name(f"{path.stem}_edited.png") for path in pictures]
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [str(output) for output in outputs]
    assert "Processed 3 images: 3 succeeded, 0 failed" in result.stderr
    for path, output in zip(pictures, outputs, strict=True):
        assert np.array_equal(pixels(output), 255 - pixels(path))


def test_a_pattern_that_no_shell_has_expanded_stands_for_what_it_matches_sorted(
    pictures: list[Path],
) -> None:
    result = run.invoke(app, ["edit", "in/*.png", "invert", "--output-dir", "out", *QUICK])

    assert result.exit_code == 0, result.stderr
    names = [Path(line).name for line in result.stdout.splitlines()]
    assert names == ["a_edited.png", "b_edited.png", "c_edited.png"]
    assert len(list(Path("out").iterdir())) == len(pictures)


def test_a_name_with_signs_of_a_pattern_is_a_name_where_there_is_such_a_file(photo: Path) -> None:
    odd = photo.rename(photo.with_name("photo[1].png"))

    result = run.invoke(app, ["edit", odd.name, "invert", *QUICK])

    assert result.exit_code == 0, result.stderr
    assert Path("photo[1]_edited.png").exists()


def test_one_bad_image_does_not_stop_the_others_and_the_exit_code_says_so(
    pictures: list[Path],
) -> None:
    paths = [str(pictures[0]), "missing.png", str(pictures[1])]

    told = run.invoke(app, ["edit", *paths, "invert", *QUICK])
    as_json = run.invoke(app, ["edit", *paths, "invert", "--json", "--overwrite", *QUICK])

    assert told.exit_code == as_json.exit_code == 1
    assert len(told.stdout.splitlines()) == 2
    assert "Image file not found: missing.png" in told.stderr
    answer = json.loads(as_json.stdout)
    assert answer["status"] == "partial"
    assert answer["summary"] == {"total": 3, "successes": 2, "failures": 1}
    assert [item["input"] for item in answer["results"]] == paths
    assert answer["results"][1]["result"]["error"] == "Image file not found: missing.png"


def test_images_of_one_name_get_numbers_in_one_folder(pictures: list[Path], tmp_path: Path) -> None:
    twin = tmp_path / pictures[0].name
    twin.write_bytes(pictures[1].read_bytes())
    words = ["edit", str(pictures[0]), str(twin), "invert", "--output-dir", "out", *QUICK]

    result = run.invoke(app, words)

    assert [Path(line).name for line in result.stdout.splitlines()] == [
        "a_edited.png",
        "a_edited_2.png",
    ]


def test_what_the_model_thought_is_told_round_by_round(
    pictures: list[Path], worker: FakeWorker
) -> None:
    worker.model = "v1.2"
    words = ["edit", str(pictures[0]), "add a hat", "--thinking", "--reflection", *QUICK]

    told = run.invoke(app, words)
    several = run.invoke(app, [*words[:2], str(pictures[1]), *words[2:]])
    as_json = run.invoke(app, [*words, "--json"])

    assert told.exit_code == several.exit_code == as_json.exit_code == 0, told.stderr
    lines = [
        "rewritten prompt: add a hat, and nothing else",
        "round 1: score 6.5, reflection: The hat is too small. → make the hat larger",
        "round 2 (best): score 9, success: The hat fits.",
    ]
    assert told.stderr.splitlines()[-3:] == lines
    assert "edit: thinking" in told.stderr
    assert told.stderr.count("edit: reflecting") == 2
    assert len(told.stdout.splitlines()) == 1
    for path in pictures[:2]:
        for line in lines:
            assert f"{path}: {line}" in several.stderr.splitlines()
    reasoning = json.loads(as_json.stdout)["metadata"]["reasoning"]
    assert (reasoning["best"], len(reasoning["rounds"])) == (2, 2)


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (["in/*.gif", "x"], 1, "Image file not found: in/*.gif (nothing matches this pattern)"),
        (["in/a.png", "in/b.png", "x", "--output", "o.png"], 2, "use --output-dir"),
        (
            ["in/a.png", "x", "--output", "o.png", "--output-dir", "o"],
            2,
            "give either --output or --output-dir",
        ),
        (["-", "in/a.png", "x"], 2, "reads one image from stdin"),
        (["-", "x", "--output-dir", "o"], 2, "an image from stdin has no name"),
        (["in/a.png", "x", "--output", "-", "--json"], 2, "not both"),
        (["in/a.png", "in/b.png", "x", "--num-steps", "5"], 2, "num_steps must be"),
        (["in/a.png", "x", "--standalone", "--url", "http://h"], 2, "exclude each other"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_done(
    pictures: list[Path], worker: FakeWorker, words: list[str], exit_code: int, message: str
) -> None:
    result = run.invoke(app, ["edit", *words])

    assert result.exit_code == exit_code
    assert message in (result.stdout if "--json" in words else result.stderr)
    assert worker.started == []
    assert len(list(pictures[0].parent.iterdir())) == len(pictures)


def test_a_picture_from_stdin_goes_to_stdout(photo: Path) -> None:
    result = run.invoke(app, ["edit", "-", "invert", *QUICK], input=photo.read_bytes())

    assert result.exit_code == 0, result.stderr
    assert np.array_equal(pixels(result.stdout_bytes), 255 - pixels(photo))
    assert "fake on cpu" in result.stderr


def test_stdin_and_stdout_go_with_files(photo: Path) -> None:
    to_file = run.invoke(
        app, ["edit", "-", "invert", "--output", "o.webp", *QUICK], input=photo.read_bytes()
    )
    to_stdout = run.invoke(app, ["edit", str(photo), "invert", "--output", "-", *QUICK])

    assert to_file.stdout == f"{Path('o.webp').absolute()}\n"
    assert Image.open("o.webp").format == "WEBP"
    assert np.array_equal(pixels(to_stdout.stdout_bytes), 255 - pixels(photo))


def test_a_damaged_picture_on_stdin_leaves_stdout_empty() -> None:
    result = run.invoke(app, ["edit", "-", "invert", *QUICK], input=b"no picture")

    assert result.exit_code == 1
    assert result.stdout_bytes == b""
    assert result.stderr.splitlines()[-1].startswith("Unsupported image format: ")


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_no_picture_is_written_to_a_terminal(photo: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "step1x_edit.interfaces.cli", "edit", "-", "x"],
        stdin=photo.open("rb"),
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
        check=False,
    )
    os.close(theirs)
    os.close(ours)

    assert done.returncode == 2
    assert "stdout is a terminal" in done.stderr


def test_only_what_the_mask_shows_changes(photo: Path, worker: FakeWorker) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save("mask.png")

    result = run.invoke(app, ["edit", str(photo), "x", "--mask", "mask.png", "--json", *QUICK])

    answer = json.loads(result.stdout)
    edited, before = pixels(Path(answer["output_path"])), pixels(photo)
    assert np.array_equal(edited[:, :30], before[:, :30])
    assert np.array_equal(edited[:, 50:], 255 - before[:, 50:])
    assert 0 < answer["metadata"]["changed_share"] < 1


def test_progress_without_a_terminal_is_a_line_for_each_phase(photo: Path) -> None:
    result = run.invoke(app, ["edit", str(photo), "x", *QUICK])

    lines = result.stderr.splitlines()
    assert "edit: denoising 1/10" in lines
    assert lines.index("edit: loading model") < lines.index("edit: decoding")
    assert "\x1b" not in result.stderr


def test_defaults_of_the_operator_hold_where_nothing_was_chosen(
    photo: Path, make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[EditJob] = []
    watching = FakeWorker(before_step=lambda job, step: seen.append(job))
    monkeypatch.setattr(
        "step1x_edit.service.wiring.build_service",
        lambda settings: make_service(watching, default_num_steps=12, default_size_level=512),
    )

    run.invoke(app, ["edit", str(photo), "x", "--guidance-scale", "2"])

    assert (seen[0].num_steps, seen[0].size_level, seen[0].guidance_scale) == (12, 512, 2.0)
