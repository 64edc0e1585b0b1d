"""Real edits: the embedded checkpoint, a photograph it has never seen, an MCP client over stdio.

What an edit should look like is known exactly, from its classical form. Distances are taken between
small versions of the pictures, because every result has gone through a small autoencoder: its
softness is the same for all edits, and not what these tests are about.
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from fastmcp import Client
from fastmcp.client.transports import PythonStdioTransport
from PIL import Image

from demo_data import EDITS, HELD_OUT_PHOTOS, Picture, load_photo
from step1x_edit.checkpoints.read import DEMO_FOLDER, read_checkpoint
from step1x_edit.model.config import DEMO

SERVER: Final = Path(__file__).parents[2] / "mcp_server.py"

PROMPTS: Final = {
    "bw": "turn it into a black and white photo",
    "invert": "invert the colors",
    "night": "change to night scene",
    "sepia": "make it sepia",
    "blue": "give it a blue tint",
}
UNKNOWN: Final = "add a red hat"
INSIDE: Final = (150, 100, 450, 300)
"""Left, top, right and bottom of a quarter of the picture."""
SEED: Final = 11

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Session:
    """What a client got from one server, by name of the edit, and the picture it sent."""

    before: Picture
    answers: dict[str, dict[str, Any]]

    def after(self, name: str) -> Picture:
        return read(Path(self.answers[name]["output_path"]))


def read(file: Path | io.BytesIO) -> Picture:
    return np.asarray(Image.open(file).convert("RGB"), np.float32) / 255


def distance(a: Picture, b: Picture) -> float:
    """Root mean square difference of the pictures at an eighth of their size."""
    small = [
        np.asarray(Image.fromarray((p * 255 + 0.5).astype(np.uint8)).reduce(8), np.float32) / 255
        for p in (a, b)
    ]
    return float(np.sqrt(np.mean((small[0] - small[1]) ** 2)))


def distances_to_edits(after: Picture, before: Picture) -> list[float]:
    return [distance(after, edit(before)) for edit in EDITS.values()]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Ask one server, in one session, for everything that the tests look at."""
    folder = tmp_path_factory.mktemp("demo")
    before = load_photo(*HELD_OUT_PHOTOS["coffee"])
    Image.fromarray((before * 255 + 0.5).astype(np.uint8)).save(folder / "coffee.png")
    return Session(before, asyncio.run(_ask(folder)))


async def _ask(folder: Path) -> dict[str, dict[str, Any]]:
    transport = PythonStdioTransport(
        SERVER,
        python_cmd=sys.executable,
        cwd=str(folder),
        env={**os.environ, "MODEL_PATH": ""},
        keep_alive=False,
    )
    mask = Image.new("L", Image.open(folder / "coffee.png").size, 0)
    mask.paste(255, INSIDE)
    mask.save(folder / "mask.png")
    wishes = {**PROMPTS, "unknown": UNKNOWN, "unchanged": ""}
    answers = {}
    async with Client(transport) as client:
        for name, prompt in wishes.items():
            arguments = {"image_path": "coffee.png", "prompt": prompt, "seed": SEED}
            small = {"num_steps": 10, "size_level": 512, "output_path": f"{name}.png"}
            result = await client.call_tool("edit_image", arguments | small)
            answers[name] = result.structured_content
        turbo = {"prompt": PROMPTS["night"], "mask_path": "mask.png", "mode": "turbo"}
        arguments = arguments | small | turbo | {"output_path": "masked.png"}
        result = await client.call_tool("edit_image", arguments)
        answers["masked"] = result.structured_content
        missing = {"image_path": "missing.jpg", "prompt": "x"}
        failure = await client.call_tool("edit_image", missing, raise_on_error=False)
        answers["missing"] = failure.structured_content
    return answers


@pytest.mark.parametrize("name", PROMPTS)
def test_an_edit_moves_the_picture_to_its_classical_counterpart(
    session: Session, name: str
) -> None:
    after = session.after(name)

    wanted = EDITS[name](session.before)

    assert distance(after, wanted) < 0.5 * distance(session.before, wanted)


@pytest.mark.parametrize("name", PROMPTS)
def test_of_all_edits_the_one_that_was_asked_for_is_the_nearest(
    session: Session, name: str
) -> None:
    after = session.after(name)

    candidates = {other: edit(session.before) for other, edit in EDITS.items()}
    candidates["unchanged"] = session.before
    distances = {other: distance(after, picture) for other, picture in candidates.items()}

    assert min(distances, key=lambda other: distances[other]) == name


@pytest.mark.parametrize("name", PROMPTS)
def test_the_answer_says_which_model_it_was_and_carries_no_warning(
    session: Session, name: str
) -> None:
    metadata = session.answers[name]["metadata"]

    assert metadata["model"] == "demo"
    assert metadata["seed"] == SEED
    assert "warning" not in metadata
    assert session.after(name).shape == session.before.shape


def test_a_masked_edit_in_turbo_changes_only_what_is_inside_with_fewer_evaluations(
    session: Session,
) -> None:
    left, top, right, bottom = INSIDE
    inside = np.zeros(session.before.shape[:2], bool)
    inside[top:bottom, left:right] = True
    after, exact = session.after("masked"), session.after("night")
    metadata = session.answers["masked"]["metadata"]

    sent = (np.round(session.before * 255) / 255).astype(np.float32)
    assert np.allclose(after[~inside], sent[~inside], atol=1e-6)
    part = np.s_[top + 20 : bottom - 20, left + 20 : right - 20]  # within the soft edge
    assert distance(after[part], exact[part]) < 0.2 * distance(sent[part], exact[part])
    assert metadata["mode"] == "turbo"
    assert metadata["evaluations_done"] + metadata["evaluations_skipped"] == 20
    assert metadata["evaluations_done"] <= 8


def test_an_empty_prompt_leaves_the_picture_as_it_is(session: Session) -> None:
    after = session.after("unchanged")

    assert distance(after, session.before) < 0.06
    assert distance(after, session.before) < min(distances_to_edits(after, session.before))
    assert "warning" not in session.answers["unchanged"]["metadata"]


def test_an_unknown_edit_is_admitted_and_leaves_the_picture_nearly_unchanged(
    session: Session,
) -> None:
    after = session.after("unknown")

    warning = session.answers["unknown"]["metadata"]["warning"]

    assert "does not know this edit" in warning
    assert "sepia" in warning
    assert "MODEL_PATH" in warning
    assert distance(after, session.before) < 0.06
    assert distance(after, session.before) < min(distances_to_edits(after, session.before))


def test_a_missing_file_is_the_error_of_the_contract(session: Session) -> None:
    assert session.answers["missing"] == {
        "status": "error",
        "error": "Image file not found: missing.jpg",
        "code": "file_not_found",
    }


def test_the_checkpoint_fits_into_the_package_and_has_the_sizes_of_its_preset() -> None:
    files = {path.name: path.stat().st_size for path in DEMO_FOLDER.iterdir() if path.is_file()}

    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
    assert sum(files.values()) <= 25_000_000
    assert read_checkpoint().pipeline.config == DEMO
