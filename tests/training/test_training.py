"""A training learns, can be stopped at any time, and writes what LORA_PATH reads."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors import safe_open

from step1x_edit.channel import Start
from step1x_edit.checkpoints.read import Wanted, open_checkpoint, read_checkpoint, write_demo
from step1x_edit.errors import InvalidParameterError, Step1XEditError
from step1x_edit.model.denoising import Branch, Encoded
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.request import NetworkRequest
from step1x_edit.schemas.training import STATE, Pair, TrainRequest
from step1x_edit.service.training import _work, train
from step1x_edit.settings import Limits, Settings
from step1x_edit.training.estimate import needs_of
from step1x_edit.training.examples import Example, encode
from step1x_edit.training.loop import Drawn, Training, predicted
from step1x_edit.training.process import Event, Work, run
from tiny import a_picture, tiny_pipeline, tiny_pipeline_v1_2

LIMITS = Limits(max_bytes=10**7, max_pixels=10**7)
QUICK: dict[str, Any] = {"rank": 2, "size": "64", "learning_rate": 0.01, "edit_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_demo(folder, tiny_pipeline())
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, ...]:
    """Three pictures to invert, and one whose edit is to be kept."""
    folder = tmp_path_factory.mktemp("pairs")
    return (*(_pair(folder, seed) for seed in range(3)), _kept(folder))


def _pair(folder: Path, seed: int, width: int = 80, height: int = 64) -> Pair:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    source = Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
    source.save(folder / f"{seed}.png")
    Image.fromarray(255 - np.asarray(source)).save(folder / f"{seed}-out.png")
    target = str(folder / f"{seed}-out.png")
    return Pair(f"{seed}.png", str(folder / f"{seed}.png"), "invert it", target)


def _kept(folder: Path) -> Pair:
    return Pair("kept.png", str(folder / "0.png"), "make it winter", None)


@pytest.fixture
def work(model: Path, pairs: tuple[Pair, ...], tmp_path: Path) -> Callable[..., Work]:
    def make(name: str = "my", **values: Any) -> Work:
        overwrite = values.pop("overwrite", False)
        return Work(
            start=Start(model_path=str(model), data_dir=str(tmp_path), device="cpu"),
            request=TrainRequest(**{**QUICK, "steps": 6, **values}),
            pairs=pairs,
            limits=LIMITS,
            output=tmp_path / f"{name}.safetensors",
            folder=tmp_path / f"{name}.train",
            overwrite=overwrite,
            only_estimate=False,
        )

    return make


def to_the_end(work: Work) -> list[Event]:
    return list(run(work, lambda: False))


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_the_merged_model_computes_what_the_trained_one_does(
    work: Callable[..., Work], model: Path, guidance: float
) -> None:
    asked = work(guidance=guidance, alpha=3, learning_rate=0.2)
    to_the_end(asked)

    plain = read_checkpoint(model).pipeline
    merged = read_checkpoint(model, Wanted(loras={asked.output: 1.0})).pipeline
    base = read_checkpoint(model).pipeline
    trained = Training(plain.transformer, plain.config, asked.request)
    trained.load(asked.folder / STATE)
    velocities = [_velocity(each) for each in (base, plain, merged)]
    change = (velocities[1] - velocities[0]).norm()
    assert change > 0.02 * velocities[0].norm()
    assert (velocities[2] - velocities[1]).norm() < 1e-5 * velocities[0].norm()


@torch.no_grad()
def _velocity(pipeline: EditPipeline) -> torch.Tensor:
    asked = NetworkRequest(a_picture(64, 64), "invert it", size_level=64)
    with torch.inference_mode():
        encoded = pipeline.encode(asked)
    x = torch.randn(encoded.reference.shape, generator=torch.Generator().manual_seed(1))
    branch = encoded.branches[0]
    return predicted(pipeline.transformer, pipeline.config, x, 0.7, encoded, branch)


def test_a_stopped_and_a_killed_training_end_with_the_bytes_of_an_unbroken_one(
    work: Callable[..., Work],
) -> None:
    whole, parts = work("whole", batch_size=2), work("parts", batch_size=2, save_every=2)
    to_the_end(whole)
    done: list[int] = []
    for event in run(parts, lambda: bool(done)):
        if event.get("phase") == "training":
            done.append(event["done"])
    assert event == {"stopped": 1}
    killed = run(parts, lambda: False)
    for event in killed:
        if event.get("phase") == "training" and event["done"] == 5:
            break  # after the state of step 4, and before that of step 6
    killed.close()
    events = to_the_end(parts)

    assert {"note": "continued after step 4"} in events
    assert _without_name(parts.output) == _without_name(whole.output)


def _without_name(path: Path) -> bytes:
    return path.read_bytes().replace(path.stem.encode(), b"the name")


def test_the_state_of_another_training_is_not_continued(work: Callable[..., Work]) -> None:
    to_the_end(work(steps=1))

    with pytest.raises(
        InvalidParameterError, match="other rank, seed, data: choose another --output"
    ):
        to_the_end(work(steps=1, rank=3, seed=9))
    assert to_the_end(work(steps=1, rank=3, seed=9, overwrite=True))[-1]["trained"]["steps"] == 1


def test_pairs_are_encoded_once(work: Callable[..., Work]) -> None:
    first = to_the_end(work(steps=1))
    again = to_the_end(work(steps=1, rank=3, overwrite=True))

    assert sum(event.get("phase") == "encoding" for event in first) == 4
    assert sum(event.get("phase") == "editing" for event in first) == 1
    assert not {event.get("phase") for event in again} & {"encoding", "editing"}


def test_the_file_says_what_it_is(work: Callable[..., Work]) -> None:
    asked = work(alpha=5, steps=1)
    to_the_end(asked)

    with safe_open(asked.output, framework="pt") as opened:
        keys, metadata = set(opened.keys()), opened.metadata()
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in keys
    assert "lora_unet_single_blocks_1_linear2.alpha" in keys
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "5")
    assert metadata["ss_base_model_version"] == "step1x-edit tiny"
    assert metadata["modelspec.architecture"] == "step1x-edit/lora"


def test_pairs_held_out_are_edited_and_shown_beside_their_targets(
    work: Callable[..., Work],
) -> None:
    asked = work(held_out=2, validate_every=4)
    events = to_the_end(asked)

    notes = [event["note"] for event in events if "note" in event]
    assert [note.split(",")[0] for note in notes] == [f"after step {step}" for step in (0, 4, 6)]
    pictures = sorted((asked.folder / "validation").iterdir())
    assert [path.name for path in pictures] == [
        f"step-{step:06}-{name}-64.png" for step in (0, 4, 6) for name in ("1", "2")
    ]
    assert Image.open(pictures[0]).size == (3 * 64, 48)


def test_the_demo_learns_an_edit_that_it_does_not_know(tmp_path: Path) -> None:
    """The loss of a picture that was not trained on, before and after some steps."""
    colours = [(3, 26, 64), (92, 152, 190), (246, 248, 244)]
    learned = [_toned(tmp_path, seed, colours) for seed in range(3)]
    asked = Work(
        start=Start(data_dir=str(tmp_path), device="cpu"),
        request=TrainRequest(
            steps=30,
            rank=4,
            size="64",
            learning_rate=0.003,
            guidance=6,
            held_out=1,
            edit_steps=4,
            validate_every=100,
        ),
        pairs=tuple(learned),
        limits=LIMITS,
        output=tmp_path / "blue.safetensors",
        folder=tmp_path / "blue.train",
        overwrite=False,
        only_estimate=False,
    )
    figures = [
        float(event["note"].split("targets: ")[1].split(" dB")[0])
        for event in run(asked, lambda: False)
        if "note" in event
    ]

    assert figures[-1] > figures[0] + 6


def _toned(folder: Path, seed: int, colours: list[tuple[int, int, int]]) -> Pair:
    pair = _pair(folder, seed, 64, 64)
    grey = np.asarray(Image.open(pair.source).convert("L"))
    inks = np.array(colours)
    tones = [np.interp(grey, np.linspace(0, 255, len(colours)), inks[:, c]) for c in range(3)]
    assert pair.target is not None
    Image.fromarray(np.stack(tones, -1).astype(np.uint8)).save(pair.target)
    return dataclasses.replace(pair, prompt="turn it into a cyanotype")


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_pipeline_v1_2])
def test_a_pair_is_the_same_when_it_is_read_again(
    make: Callable[[], EditPipeline], pairs: tuple[Pair, ...], tmp_path: Path
) -> None:
    pipeline = make()
    example = Example("a", "a “b” c", pairs[0], 64, tmp_path / "a", tmp_path / "b")
    pixels = np.asarray(Image.open(pairs[0].source))
    with torch.inference_mode():
        expected = pipeline.encode(NetworkRequest(pixels, "a “b” c", size_level=64))
    list(encode([example], pipeline, lambda path: np.asarray(Image.open(path))))

    training = Training(pipeline.transformer, pipeline.config, TrainRequest(guidance=6, rank=1))
    found = example.encoded()
    assert torch.equal(found.reference, expected.reference)
    for ours, theirs in zip(found.branches, expected.branches, strict=True):
        assert torch.equal(ours.embeds, theirs.embeds)
        assert (ours.quoted is None) == (theirs.quoted is None)
    loss = training.loss(
        training.spared(found), example.target(), training._draw(example.target(), 0)
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(layer.up.grad is not None for layer in training.layers.values())


def test_an_edit_to_keep_costs_nothing_until_it_changes() -> None:
    pipeline = tiny_pipeline()
    branch = Branch(torch.ones(1, 40, 32), torch.ones(1, 40))
    encoded = Encoded(torch.ones(1, 16, 64), (branch, branch), 4, 4)
    training = Training(pipeline.transformer, pipeline.config, TrainRequest(rank=1))
    edit = torch.zeros(1, 16, 64)
    drawn = Drawn(0.5, torch.zeros_like(edit))

    before = training.loss_of_kept(encoded, edit, drawn)
    with torch.no_grad():
        for layer in training.layers.values():
            layer.up.fill_(0.1)
    after = training.loss_of_kept(encoded, edit, drawn)

    assert before == 0
    assert after > 0
    after.backward()  # type: ignore[no-untyped-call]
    assert all(layer.down.grad is not None for layer in training.layers.values())


def test_an_estimate_counts_what_a_step_computes(model: Path) -> None:
    config = open_checkpoint(model).checkpoint.pipeline.config
    plain, wide, coded = (
        needs_of(config, torch.float32, TrainRequest(**asked), 64)
        for asked in ({"rank": 4}, {"rank": 16}, {"rank": 4, "precision": "int8"})
    )

    network = read_checkpoint(model).pipeline.transformer
    assert plain.weights == sum(each.nbytes for each in network.parameters())
    assert coded.weights < 0.5 * plain.weights
    assert wide.parameters == 4 * plain.parameters
    assert wide.learned == 3 * 4 * wide.parameters
    assert plain.flop < wide.flop < 2 * plain.flop
    assert plain.memory == plain.weights + plain.learned + plain.computing


def test_a_training_whose_parent_is_gone_saves_its_state(
    work: Callable[..., Work], tmp_path: Path, model: Path
) -> None:
    settings = Settings(_env_file=None, model_path=model, data_dir=tmp_path, device="cpu")
    asked = work(steps=10**6)
    told = _work(settings, asked.request, asked.pairs, asked.output, overwrite=False)
    with subprocess.Popen(
        [sys.executable, "-m", "step1x_edit.training.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdin.write(json.dumps(told) + "\n")
        child.stdin.flush()
        for event in map(json.loads, child.stdout):
            if event.get("phase") == "training":
                break
        child.stdout.close()
        child.stdin.close()
        said = child.stderr.read()

    assert "Traceback" not in said
    assert child.returncode == 0
    with safe_open(asked.folder / STATE, framework="pt") as opened:
        assert int(opened.metadata()["done"]) > 0


def test_two_trainings_do_not_write_to_one_output(
    work: Callable[..., Work], tmp_path: Path, model: Path
) -> None:
    settings = Settings(_env_file=None, model_path=model, data_dir=tmp_path, device="cpu")
    asked = work(steps=1)
    asked.folder.mkdir(parents=True)
    events = train(settings, asked.request, asked.pairs, asked.output, overwrite=False)

    with FileLock(asked.folder / "lock"), pytest.raises(Step1XEditError, match="another training"):
        list(events)


def test_fewer_steps_than_were_made_are_refused(work: Callable[..., Work]) -> None:
    to_the_end(work(steps=3))

    with pytest.raises(InvalidParameterError, match="has already made 3 steps"):
        to_the_end(work(steps=2))


def test_a_training_whose_parent_stops_saves_its_state(
    work: Callable[..., Work], tmp_path: Path, model: Path
) -> None:
    settings = Settings(_env_file=None, model_path=model, data_dir=tmp_path, device="cpu")
    asked = work(steps=10**6)
    events = train(settings, asked.request, asked.pairs, asked.output, overwrite=False)
    for event in events:
        if event.get("phase") == "training":
            break
    events.close()

    with safe_open(asked.folder / STATE, framework="pt") as opened:
        assert int(opened.metadata()["done"]) >= event["done"]
        assert json.loads(opened.metadata()["rank"]) == 2
    assert not asked.output.exists()
