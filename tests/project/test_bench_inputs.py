"""Small copies of public benchmarks become the folders that their official scripts read.

Each reader here looks for files as the official script of its benchmark does.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import bench_inputs
from fakes import FakeWorker
from step1x_edit.interfaces.cli import app

run = CliRunner()

Pairs: TypeAlias = dict[str, tuple[Image.Image, Image.Image]]
"""The source and the edit of each question, by its place."""

pytestmark = pytest.mark.usefixtures("fake_model")


@dataclass(frozen=True)
class Bench:
    """A small copy of a benchmark, and what its scorer finds in a folder of results."""

    words: Sequence[str]
    """Of the script, without the folder of the results."""
    read: Callable[[Path], Pairs]
    expected: Sequence[str]
    left_out: int = 0


def picture(shade: int) -> Image.Image:
    """A picture that differs from those of other shades."""
    pixels = np.full((24, 32, 3), shade, np.uint8)
    pixels[:, :16, 0] = np.arange(24)[:, None] * 8
    return Image.fromarray(pixels)


def saved(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(shade).save(path)


def encoded(shade: int, kind: str) -> dict[str, object]:
    """A picture as `datasets` stores it."""
    data = io.BytesIO()
    picture(shade).save(data, kind, quality=100)
    return {"bytes": data.getvalue(), "path": f"{shade}.{kind}"}


# --- the benchmarks -------------------------------------------------------------------------------


def gedit_rows() -> list[dict[str, object]]:
    asked = [
        ("subject-add", "ab12", "add a hat", "en", True),
        ("subject-add", "ab12", "加一顶帽子", "cn", True),
        ("tone_transfer", "cd34", "make it dusk", "en", False),
    ]
    return [
        {
            "task_type": task,
            "key": key,
            "instruction": instruction,
            "instruction_language": language,
            "input_image": encoded(90 + number, "PNG" if number else "JPEG"),
            "input_image_raw": encoded(200, "JPEG"),
            "Intersection_exist": both,
        }
        for number, (task, key, instruction, language, both) in enumerate(asked)
    ]


def gedit(folder: Path, kind: str) -> Bench:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    picture_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = ("task_type", "key", "instruction", "instruction_language")
    schema = pa.schema(
        [(name, pa.string()) for name in names]
        + [(name, picture_type) for name in ("input_image", "input_image_raw")]
        + [("Intersection_exist", pa.bool_())]
    )
    rows = gedit_rows()
    table = pa.Table.from_pylist(rows, schema)
    if kind == "parquet":
        parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    else:
        file = folder / "data-00000-of-00001.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(table)

    def read(results: Path) -> Pairs:
        found: Pairs = {}
        for row in rows:
            place = f"fullset/{row['task_type']}/{row['instruction_language']}/{row['key']}"
            source = Image.open(results / f"{place}_SRCIMG.png")
            found[place] = source, Image.open(results / f"{place}.png").convert("RGB")
        return found

    places = ("subject-add/en/ab12", "subject-add/cn/ab12", "tone_transfer/en/cd34")
    return Bench(["gedit", str(folder)], read, [f"fullset/{place}" for place in places])


def gedit_arrow(folder: Path) -> Bench:
    return gedit(folder, "arrow")


def gedit_parquet(folder: Path) -> Bench:
    return gedit(folder, "parquet")


def imgedit(folder: Path) -> Bench:
    questions = {
        "1082": {"id": "animal/000342021.jpg", "prompt": "Smooth it.", "edit_type": "adjust"},
        "673": {"id": "daily object/000278574.jpg", "prompt": "Ukiyo-e.", "edit_type": "style"},
    }
    for shade, question in enumerate(questions.values()):
        saved(folder / "singleturn" / question["id"], 60 + shade)
    (folder / "basic_edit.json").write_text(json.dumps(questions))

    def read(results: Path) -> Pairs:
        return {
            key: (
                Image.open(folder / "singleturn" / question["id"]),
                Image.open(results / f"{key}.png"),
            )
            for key, question in questions.items()
        }

    words = ["imgedit", str(folder / "basic_edit.json")]
    return Bench([*words, "--pictures", str(folder / "singleturn")], read, list(questions))


def kris(folder: Path) -> Bench:
    categories: dict[str, dict[str, str | list[str]]] = {
        "viewpoint_change": {"ori_img": "1.jpg", "gt_img": "1_gt.jpg"},
        "rule-based_reasoning": {"ori_img": "1.jpeg", "gt_img": ""},
        "temporal_prediction": {"ori_img": ["1-2.jpg", "1-3.jpg", "1-4.jpg"], "gt_img": "1-1.jpg"},
        "multi-element_composition": {"ori_img": ["1-1.png", "1-2.png", "1-3.png"], "gt_img": ""},
        "physics": {"ori_img": "lost.png", "gt_img": ""},
    }
    for shade, (category, question) in enumerate(categories.items()):
        names = question["ori_img"]
        for name in [names] if isinstance(names, str) else names:
            if name != "lost.png":
                saved(folder / category / name, 60 + shade)
        asked = {"1": {**question, "ins_en": f"Draw {category}.", "explain_en": ""}}
        (folder / category).mkdir(exist_ok=True)
        (folder / category / "annotation.json").write_text(json.dumps(asked))
    usable = ["viewpoint_change", "rule-based_reasoning"]

    def read(results: Path) -> Pairs:
        found: Pairs = {}
        for category in usable:
            source = folder / category / str(categories[category]["ori_img"])
            edit = Image.open(results / category / "1.jpg")
            assert edit.format == "JPEG"
            found[f"{category}/1"] = Image.open(source), edit
        return found

    return Bench(["kris", str(folder)], read, [f"{name}/1" for name in usable], left_out=3)


def rise(folder: Path) -> Bench:
    questions = [
        {
            "index": f"{category}_{number}",
            "category": category,
            "instruction": "Draw what it will look like in a year.",
            "image": f"{category}_images/{number}.png",
            "reference": "Rotten.",
        }
        for category, number in (("temporal_reasoning", 1), ("logical_reasoning", 12))
    ]
    for shade, question in enumerate(questions):
        saved(folder / "data" / question["image"], 60 + shade)
    (folder / "data" / "data_total.json").write_text(json.dumps(questions))

    def read(results: Path) -> Pairs:
        found: Pairs = {}
        for question in questions:
            source = Image.open(folder / "data" / question["image"])
            place = results / "images" / question["category"]
            found[question["index"]] = source, Image.open(place / f"{question['index']}.png")
        return found

    words = ["rise", str(folder / "data" / "data_total.json")]
    return Bench(words, read, [question["index"] for question in questions])


# --- what the script and the batch do -------------------------------------------------------------


def ask(bench: Bench, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, object]:
    """Run the script; what its last line says."""
    name, data, *options = bench.words
    bench_inputs.main([name, data, "results/model", *options, *more])
    found: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def edit() -> set[int]:
    """Run the batch; the seeds of its results."""
    words = ["batch", "results/model/manifest.jsonl", "--output-dir", "results/model"]
    result = run.invoke(app, [*words, "--num-steps", "10", "--json"])
    assert result.exit_code == 0, result.stderr
    made = [each["result"] for each in json.loads(result.stdout)["results"]]
    return {each["metadata"]["seed"] for each in made}


@pytest.mark.parametrize("make", [gedit_arrow, gedit_parquet, imgedit, kris, rise])
def test_a_batch_fills_the_folders_that_the_scorer_reads(
    tmp_path: Path,
    worker: FakeWorker,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], Bench],
) -> None:
    (tmp_path / "bench").mkdir()
    bench = make(tmp_path / "bench")
    before = ask(bench, capsys)

    seeds = edit()

    found = bench.read(Path("results/model"))
    assert list(found) == bench.expected
    for source, result in found.values():
        assert result.size == source.size
        expected = 255 - np.asarray(source.convert("RGB")).astype(int)  # the fake model inverts
        assert np.abs(np.asarray(result) - expected).mean() < 2
    total = len(bench.expected)
    assert (before["rows"], before["results"]) == (total, 0)
    assert sum(dict(before["left_out"]).values()) == bench.left_out  # type: ignore[call-overload]
    assert len(worker.started) == total
    assert seeds == {bench_inputs.SEED}

    made = sorted(Path("results/model").rglob(f"{Path(bench.expected[0]).name}.*"))[0]
    made.unlink()
    assert ask(bench, capsys)["results"] == total - 1
    edit()
    assert ask(bench, capsys)["results"] == total
    assert len(worker.started) == total + 1


def test_one_language_of_gedit_can_be_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench").mkdir()

    told = ask(gedit_arrow(tmp_path / "bench"), capsys, "--language", "cn")

    assert told["rows"] == 1
    lines = Path("results/model/manifest.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["加一顶帽子"]


def test_pictures_that_are_elsewhere_end_with_a_sentence(tmp_path: Path) -> None:
    bench = imgedit(tmp_path)

    with pytest.raises(SystemExit, match=r"nothing to edit: adjust: .*000342021\.jpg is missing"):
        bench_inputs.main([*bench.words[:2], "results/model"])

    assert not Path("results").exists()
