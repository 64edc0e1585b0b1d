"""The recipe of the demo checkpoint still runs: three steps of every stage, to a finished edit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_demo
from extent import slow
from step1x_edit.checkpoints.read import read_checkpoint
from step1x_edit.model.pipeline import Edited
from step1x_edit.model.request import NetworkRequest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_demo.py"
EMBEDDED = ROOT / "src" / "step1x_edit" / "model" / "demo"


def words(work: Path, *flags: str) -> list[str]:
    """The words of the command, which shares the processors with the tests beside this one."""
    threads = str(torch.get_num_threads())
    return [str(SCRIPT), "--smoke", "--work", str(work), "--threads", threads, *flags]


@pytest.fixture
def train_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the recipe in this process, which has imported the libraries already."""

    def run(work: Path, *flags: str) -> str:
        monkeypatch.setattr("sys.argv", words(work, *flags))
        train_demo.main()
        return capsys.readouterr().out

    return run


@pytest.mark.timeout(600)
def test_three_steps_of_each_stage_make_a_checkpoint_that_edits(
    tmp_path: Path, train_here: Callable[..., str]
) -> None:
    out = tmp_path / "checkpoint"
    command = [sys.executable, *words(tmp_path, "--out", str(out))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]

    for stage in ("vae.pt", "text.pt", "latents_000.pt", "transformer.pt", "decoder.pt"):
        assert (tmp_path / stage).exists(), f"{stage} was not written"
    size = sum(path.stat().st_size for path in out.iterdir())
    assert size <= 25_000_000

    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 128), -1).astype(np.uint8)
    request = NetworkRequest(image, "", num_steps=10, size_level=256, seed=0)
    *_, edited = read_checkpoint(out).pipeline.edit(request)
    assert isinstance(edited, Edited)
    # The closed-form start alone leaves a picture nearly unchanged; a broken one shows noise.
    reference = np.kron(image.astype(float), np.ones((4, 4, 1)))
    assert np.abs(edited.image - reference).mean() < 30

    again = train_here(tmp_path, "--out", str(out))
    assert "wrote" in again
    assert "start" not in again, "a finished stage was done once more"


@slow  # the first test runs every stage; this one begins with other weights
@pytest.mark.timeout(600)
def test_three_more_steps_of_a_checkpoint_keep_what_it_knows(
    tmp_path: Path, train_here: Callable[..., str]
) -> None:
    out = tmp_path / "checkpoint"
    train_here(tmp_path, "--start-from", str(EMBEDDED), "--out", str(out))

    before, after = load_file(EMBEDDED / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vae", "transformer"}

    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 128), -1).astype(np.uint8)
    request = NetworkRequest(image, "black and white", num_steps=10, size_level=256, seed=0)
    *_, edited = read_checkpoint(out).pipeline.edit(request)
    assert isinstance(edited, Edited)
    # From nothing, three steps leave the ramp's colours as they are.
    assert np.ptp(edited.image.astype(float), axis=-1).mean() < 25 < np.ptp(image, axis=-1).mean()
