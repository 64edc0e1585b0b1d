"""`step1x-edit replay`: a picture made again from the recipe in its own file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from conftest import MakeService
from fakes import FakeWorker, inverted
from http_server import TOKEN, serving
from step1x_edit.channel import EditJob
from step1x_edit.interfaces.cli import app
from step1x_edit.pictures.images import decode, encode, read_record
from step1x_edit.schemas.requests import Record, without_prompts
from step1x_edit.settings import Settings

pytestmark = pytest.mark.usefixtures("fake_model")

SEEDED = ["--num-steps", "10", "--seed", "3", "--mode", "fast", "--negative-prompt", "blur"]


def called(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def edited(photo: Path, name: str = "made.png", *more: object) -> Path:
    """A picture made of a photograph, next to it."""
    made = photo.with_name(name)
    result = called("edit", photo, "invert", *SEEDED, "--output", made, *more)
    assert result.exit_code == 0, result.stderr
    return made


def with_another_record(made: Path, changed: Callable[[Record], Record]) -> None:
    """Write the file of a picture again, with a record that says something else."""
    record = read_record(made)
    assert record is not None
    picture = decode(made.read_bytes(), Settings(_env_file=None).limits)
    made.write_bytes(encode(picture, ".png", changed(record)))


def saying(**values: object) -> Callable[[Record], Record]:
    return lambda record: record.model_copy(update=values)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "tiff"])
def test_a_picture_is_made_again_from_its_file_alone(photo: Path, suffix: str) -> None:
    made = edited(photo, f"made.{suffix}")

    result = called("replay", made)

    again = photo.with_name(f"photo_edited.{suffix}")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{again}\n"
    assert again.read_bytes() == made.read_bytes()


def test_the_check_says_that_the_bytes_are_equal_and_saves_nothing(photo: Path) -> None:
    made = edited(photo)
    before = sorted(photo.parent.iterdir())

    told, as_json = called("replay", made, "--check"), called("replay", made, "--check", "--json")

    assert (told.exit_code, told.stdout) == (0, "equal to the byte\n")
    answer = json.loads(as_json.stdout)
    assert (as_json.exit_code, answer["equal"], answer["metadata"]["seed"]) == (0, True, 3)
    assert sorted(photo.parent.iterdir()) == before


def test_the_check_says_how_far_pixels_differ_and_what_may_have_done_it(
    photo: Path, worker: FakeWorker
) -> None:
    made = edited(photo)

    def rounded_otherwise(job: EditJob) -> np.ndarray:
        pixels = inverted(job)
        pixels[0, 0, 0] ^= 1
        return pixels

    worker.paint = rounded_otherwise
    unexplained = called("replay", made, "--check")
    worker.numerics = "cpu/avx2/1 threads/torch 2.13.0"
    result = called("replay", made, "--check", "--json")

    assert (unexplained.exit_code, result.exit_code) == (1, 1)
    assert "names no cause" in unexplained.stdout
    answer = json.loads(result.stdout)
    assert answer["message"] == (
        "pixels differ by up to 1 level in 0.0109% of the values: threads 2, now 1"
    )
    assert answer["max_difference"] == 1
    assert answer["differences"] == [{"name": "threads", "then": "2", "now": "1"}]


def test_the_check_says_when_only_metadata_differs(photo: Path, worker: FakeWorker) -> None:
    made = edited(photo)
    worker.numerics = "A GPU/torch 2.11.0"

    result = called("replay", made, "--check")

    assert result.exit_code == 1
    assert result.stdout.startswith("the pixels are equal, the metadata differs: device cpu, now")
    assert "library torch 2.13.0, now torch 2.11.0" in result.stdout


def test_the_input_is_found_by_its_bytes_or_given(photo: Path, tmp_path: Path) -> None:
    made = edited(photo)
    renamed = photo.rename(photo.with_name("of another name.JPG"))
    found = called("replay", made, "--check")
    (away := tmp_path / "away").mkdir()
    moved = Path(shutil.move(renamed, away / "photo.png"))
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "other.png")

    missing = called("replay", made)
    given = called("replay", made, "--input", moved, "--output", tmp_path / "again.png")
    wrong = called("replay", made, "--input", tmp_path / "other.png")

    assert found.stdout == "equal to the byte\n"
    assert missing.exit_code == 1
    assert "the input of made.png is not among the pictures beside it" in missing.stderr
    assert given.exit_code == 0, given.stderr
    assert (tmp_path / "again.png").read_bytes() == made.read_bytes()
    assert wrong.exit_code == 2
    assert "other.png is not the input of made.png" in wrong.stderr


def test_a_recipe_without_the_hash_of_its_input_asks_for_it(photo: Path) -> None:
    made = edited(photo)
    with_another_record(made, saying(input_sha256=None, numerics=None, arithmetic=None))

    refused, checked = called("replay", made), called("replay", made, "--check", "--input", photo)

    assert refused.exit_code == 2
    assert "made.png does not name its input; give it with --input" in refused.stderr
    assert checked.exit_code == 1
    assert "device unknown, now cpu" in checked.stdout


def test_a_recipe_is_applied_to_another_picture(photo: Path, tmp_path: Path) -> None:
    made = edited(photo)
    other = tmp_path / "other.png"
    Image.fromarray(np.full((32, 32, 3), 10, np.uint8)).save(other)

    result = called("replay", made, "--on", other, "--json")

    answer = json.loads(result.stdout)
    assert answer["output_path"] == str(tmp_path / "other_edited.png")
    metadata = answer["metadata"]
    assert {name: metadata[name] for name in ("prompt", "num_steps", "seed", "mode")} == {
        "prompt": "invert",
        "num_steps": 10,
        "seed": 3,
        "mode": "fast",
    }
    assert np.asarray(Image.open(answer["output_path"]))[0, 0].tolist() == [245, 245, 245]


def test_a_mask_is_found_too_and_belongs_to_its_picture(photo: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (64, 48), 0)
    mask.paste(255, (32, 0, 64, 48))
    mask.save(tmp_path / "sky.png")
    made = edited(photo, "made.png", "--mask", tmp_path / "sky.png")

    checked = called("replay", made, "--check")
    elsewhere = called("replay", made, "--on", photo)
    with_mask = called("replay", made, "--on", photo, "--mask", tmp_path / "sky.png")

    assert checked.stdout == "equal to the byte\n"
    assert elsewhere.exit_code == 2
    assert "give one for" in elsewhere.stderr
    assert with_mask.exit_code == 0, with_mask.stderr


def test_another_model_is_refused_as_soon_as_it_is_known(photo: Path, worker: FakeWorker) -> None:
    made = edited(photo)
    worker.model = "Step1X-Edit v1.1 (int8)"
    before = sorted(photo.parent.iterdir())

    result = called("replay", made)

    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "Model not found: the picture was made with fake, the model here is Step1X-Edit v1.1; "
        "set MODEL_PATH (step1x-edit models pull gets published ones)"
    )
    assert sorted(photo.parent.iterdir()) == before
    assert worker.stopped_at.get("invert", 0) < 10


def test_a_recipe_without_its_prompt_is_refused(photo: Path) -> None:
    made = edited(photo)
    with_another_record(made, without_prompts)

    result = called("replay", made)

    assert result.exit_code == 2
    assert "the record of made.png has no prompt (RECORD_PROMPT)" in result.stderr


def test_loras_that_are_not_here_are_named(photo: Path) -> None:
    made = edited(photo)
    with_another_record(made, saying(loras=["snow:0.5"]))

    result = called("replay", made)

    assert result.exit_code == 2
    assert "loras has 'snow', which is not here; LORA_PATH names none" in result.stderr


def test_neither_the_input_nor_the_picture_is_replaced(photo: Path) -> None:
    made = edited(photo, "photo_edited.png")
    data = made.read_bytes()

    numbered = called("replay", made, "--overwrite")
    named = called("replay", made, "--overwrite", "--output", made)
    onto_input = called("replay", made, "--overwrite", "--output", photo)

    assert numbered.stdout == f"{made.with_name('photo_edited_2.png')}\n"
    assert named.exit_code == onto_input.exit_code == 1
    assert "is an input and stays as it is" in onto_input.stderr
    assert made.read_bytes() == data


def test_what_has_no_recipe_is_told_in_one_sentence(photo: Path) -> None:
    result = called("replay", photo)

    assert result.exit_code == 1
    assert result.stderr == (
        "No recipe: this is no picture that step1x-edit made, or its metadata has been removed\n"
    )


@pytest.mark.parametrize(
    "words",
    [["--check", "--on", "x.png"], ["--check", "-o", "x.png"], ["--on", "x.png", "--input", "y"]],
)
def test_flags_that_contradict_each_other_are_refused(photo: Path, words: list[str]) -> None:
    result = called("replay", photo, *words)

    assert result.exit_code == 2
    assert "leave out --on" in result.stderr or "not both" in result.stderr


def test_a_server_makes_it_again_too(
    photo: Path, make_service: MakeService, worker: FakeWorker
) -> None:
    made = edited(photo, "made.webp")
    with serving(make_service(FakeWorker())) as url:
        result = called("replay", made, "--check", "--url", url, "--api-key", TOKEN)
    with serving(make_service(FakeWorker(model="other"))) as url:
        refused = called("replay", made, "--check", "--url", url, "--api-key", TOKEN)

    assert (result.exit_code, result.stdout) == (0, "equal to the byte\n")
    assert refused.exit_code == 1
    assert "the model here is other" in refused.stderr


def test_an_output_path_that_cannot_be_is_refused_in_one_sentence(photo: Path) -> None:
    made = edited(photo)
    result = called("replay", made, "--output", "x" * 5000)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Invalid parameter: output_path must have at most 4096")


def test_what_a_stranger_wrote_into_a_record_controls_no_terminal(photo: Path) -> None:
    made = edited(photo)
    with_another_record(made, saying(numerics="a/b\x1b[2J/1/\nd", precision="q" * 5000))

    result = called("replay", made, "--check")

    assert result.exit_code == 1
    (line,) = result.stdout.splitlines()
    assert line.isprintable()
    assert "instruction set b [2J, now" in line
    assert len(line) < 500
