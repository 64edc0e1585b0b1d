"""The local score of edits: what the judge is shown, and what becomes of its replies."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import score_edits
from score_edits import Edit
from step1x_edit.checkpoints.read import write_demo
from step1x_edit.model import reasoning
from step1x_edit.model.language_model import Sampling
from step1x_edit.model.reasoning import Prompt, Reasoner
from step1x_edit.model.request import Pixels
from tiny import tiny_pipeline, tiny_pipeline_v1_2

FEW = Sampling(max_new_tokens=2)


@pytest.fixture
def manifest(tmp_path: Path, photo: Path) -> Path:
    """Two edits that a batch has made; one result has another size than its source."""
    lines = []
    for name, size in (("a", (64, 48)), ("b", (32, 24))):
        (tmp_path / "out").mkdir(exist_ok=True)
        Image.new("RGB", size, "red").save(tmp_path / "out" / f"{name}.png")
        lines.append({"image": photo.name, "prompt": "make it red", "output": f"{name}.png"})
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


class Judge:
    """Answers with written replies, and remembers what it was shown."""

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)
        self.shown: list[Sequence[Pixels]] = []
        self.asked: list[str] = []

    def reply(self, images: Sequence[Pixels], prompt: Prompt) -> Generator[None, None, str]:
        yield
        self.shown.append(images)
        self.asked.append(prompt.text)
        return self.replies.pop(0)


def marks(first: int, second: int) -> str:
    return json.dumps({"score": [first, second], "reasoning": "red enough"})


def test_the_score_is_made_of_the_lower_mark_of_each_pair(manifest: Path, photo: Path) -> None:
    judge = Judge("nonsense", marks(9, 4), marks(9, 10))
    edit = Edit(photo, "make it red", manifest.parent / "out" / "b.png")

    score = score_edits.scored(edit, Reasoner(judge))

    assert (score.edit, score.quality, score.score) == (4, 9, 6)
    source, red = judge.shown[1]
    assert np.array_equal(source, np.asarray(Image.open(photo)))
    assert red.shape == source.shape
    assert np.array_equal(judge.shown[2][0], red)
    assert [("make it red" in text) for text in judge.asked] == [True, True, False]


def test_a_reply_that_is_never_understood_is_no_score(
    manifest: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reasoning, "MAX_TRIES", 1)
    edit = Edit(photo, "make it red", manifest.parent / "out" / "a.png")

    score = score_edits.scored(edit, Reasoner(Judge("nonsense", marks(0, 10))))

    assert (score.edit, score.quality, score.score) == (None, 0, None)


def test_every_edit_of_a_manifest_is_judged_by_the_model(
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(reasoning, "MAX_TRIES", 1)  # random weights never write JSON
    write_demo(tmp_path / "v1_2", tiny_pipeline_v1_2())
    words = [str(manifest), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]

    score_edits.main(
        [*words, "--model", str(tmp_path / "v1_2"), "--json", str(tmp_path / "scores.json")], FEW
    )

    found = json.loads((tmp_path / "scores.json").read_text("utf-8"))
    assert (found["mean"], found["scored"], found["unread"]) == (None, 0, 2)
    assert [each["picture"] for each in found["scores"]] == [
        str(tmp_path / "out" / name) for name in ("a.png", "b.png")
    ]
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "picture | instruction | edit | quality | score"
    assert table[1].endswith("a.png | make it red | unread | unread | unread")
    assert table[3] == "mean score unread of 0 edits, 2 unread"


def test_a_model_that_cannot_judge_says_so(manifest: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", tiny_pipeline())
    words = [str(manifest), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]

    with pytest.raises(SystemExit, match=r"scores need Step1X-Edit v1\.2; the model here is demo"):
        score_edits.main([*words, "--model", str(tmp_path / "demo")], FEW)


def test_a_result_that_is_missing_is_named(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "b.png").unlink()

    with pytest.raises(SystemExit, match=r"1 results are missing, such as .*b\.png: run the batch"):
        score_edits.main([str(manifest), "--output-dir", str(tmp_path / "out")])
