"""The benchmark of fast and turbo measures every part it is asked for, on a small picture."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

import bench_turbo
from turbo import chart

SMALL = ("--size", "384", "--steps", "10", "--turns", "1", "--photos", "coffee", "--edits", "night")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_pictures_that_were_made_are_used_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep, results = tmp_path / "keep", tmp_path / "results.json"
    parts = ("--parts", "pictures", "region", "strip", "--keep", str(keep))
    bench_turbo.main([*SMALL, *parts, "--results", str(results), "--images", str(tmp_path)])

    found = json.loads(results.read_text("utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    pictures = {row["way"]: row for row in found["pictures, 384, fp32"]["rows"]}
    assert pictures["exact"]["evaluations"] == 20
    assert pictures["turbo"]["evaluations"] >= pictures["naive as turbo"]["evaluations"] - 1
    assert pictures["turbo"]["mean_db"] < pictures["exact"]["mean_db"]
    (region,) = found["region, 384, fp32"]["rows"]
    assert region["edited"] == pytest.approx(0.25, abs=0.02)
    with Image.open(io.BytesIO((tmp_path / "turbo.jpg").read_bytes())) as row:
        assert row.width > 4 * row.height / 2
    # The row of pictures needed no other edits.
    assert len(list(keep.iterdir())) == len(pictures)


def test_the_plot_has_a_point_for_each_mode_and_number_of_steps() -> None:
    rows = [
        {"mode": mode, "steps": steps, "of_exact_28": steps / 28, "mean_db": 30.0 + steps}
        for mode in ("exact", "fast", "turbo")
        for steps in (10, 28)
    ]
    plot = ElementTree.fromstring(chart.draw(rows, "PSNR"))

    words = [text.text for text in plot.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("10") == words.count("28") == 3
    assert {"exact", "fast", "turbo"} <= set(words)
