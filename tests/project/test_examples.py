"""The examples do what the guide says of them, with a tiny model.

They run as a reader runs them, each in a separate process. Their servers join one that listens
here, so that the model is loaded once for all of them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from http_server import TOKEN, announcing, serving
from step1x_edit.checkpoints.read import write_demo
from step1x_edit.interfaces.cli import DEMO_PHOTO
from step1x_edit.service.service import EditService
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings
from tiny import tiny_pipeline

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.timeout(300)  # imports torch


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("running")


@pytest.fixture(scope="module")
def service(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EditService]:
    """The real service, as it is found on this machine while the module's tests run."""
    model = data_dir / "model"
    write_demo(model, tiny_pipeline())
    settings = Settings(
        _env_file=None,
        model_path=model,
        allowed_dirs=(tmp_path_factory.getbasetemp(),),
        default_num_steps=10,
        default_size_level=512,
    )
    service = build_service(settings)
    with announcing(service, data_dir):
        yield service
    service.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with photographs by the names that the guide uses."""
    photo = Image.open(DEMO_PHOTO).convert("RGB").resize((160, 120))
    for name in ("input", "portrait", "img1", "img2", "img3"):
        photo.save(tmp_path / f"{name}.jpg")
    return tmp_path


def run(folder: Path, data_dir: Path, name: str, *arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env={**os.environ, "DATA_DIR": str(data_dir), "PYTHONUTF8": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def edited(folder: Path) -> set[str]:
    """The results in the folder, each of which has to be a picture of its input's size."""
    found = {path.name for path in folder.rglob("*_edited.jpg")}
    assert all(Image.open(path).size == (160, 120) for path in folder.rglob("*_edited.jpg"))
    return found


@pytest.mark.usefixtures("service")
def test_edit(folder: Path, data_dir: Path) -> None:
    (folder / "mcp_server.py").symlink_to(ROOT / "mcp_server.py")

    output = run(folder, data_dir, "edit.py", "input.jpg")

    assert output.splitlines() == [f"Result: {folder / 'input_edited.jpg'}", "GPU: CPU"]
    assert edited(folder) == {"input_edited.jpg"}


@pytest.mark.usefixtures("service")
def test_batch(folder: Path, data_dir: Path) -> None:
    output = run(folder, data_dir, "batch.py", "img1.jpg", "img2.jpg", "img3.jpg")

    assert output.splitlines() == ["Processed: 3", "Success: 3", "Failed: 0"]
    assert edited(folder) == {"img1_edited.jpg", "img2_edited.jpg", "img3_edited.jpg"}


@pytest.mark.usefixtures("service")
def test_assistant(folder: Path, data_dir: Path) -> None:
    output = run(folder, data_dir, "assistant.py", "portrait.jpg", "change to night scene")

    assert output == f"{folder / 'portrait_edited.jpg'}\n"
    assert edited(folder) == {"portrait_edited.jpg"}


@pytest.mark.usefixtures("service")
def test_errors(folder: Path, data_dir: Path) -> None:
    output = run(folder, data_dir, "errors.py", "missing.jpg", "add a red hat")

    assert output == "Error: Image file not found: missing.jpg\n"


@pytest.mark.usefixtures("service")
def test_workflow(folder: Path, data_dir: Path) -> None:
    photos = folder / "photos"
    photos.mkdir()
    (folder / "input.jpg").rename(photos / "good.jpg")
    (photos / "bad.jpg").write_bytes(b"no picture")

    *lines, last = run(folder, data_dir, "workflow.py", "photos").splitlines()

    assert "✓ good.jpg" in lines
    assert any(re.fullmatch(r"✗ bad\.jpg: Unsupported image format: .+", line) for line in lines)
    assert len(lines) == 2
    assert re.fullmatch(r"GPU offloaded\. Model now on CPU, GPU memory: \d+\.\d\dGB", last)
    assert edited(folder) == {"good_edited.jpg"}


@pytest.mark.usefixtures("service")
def test_monitor(folder: Path, data_dir: Path) -> None:
    output = run(folder, data_dir, "monitor.py", "2", "0")

    assert output.splitlines() == ["GPU: CPU", "Memory: 0.0GB"] * 2


def test_openai_client(folder: Path, data_dir: Path, service: EditService) -> None:
    with serving(service) as url:
        arguments = (str(folder / "portrait.jpg"), "change to night scene", f"{url}/v1")
        output = run(folder, data_dir, "openai_client.py", *arguments, API_KEY=TOKEN)

    assert output.splitlines() == [
        "Preview 1",
        "Preview 2",
        f"Result: {folder / 'portrait_edited.jpg'}",
    ]
    assert edited(folder) == {"portrait_edited.jpg"}


def test_five_tools(folder: Path, data_dir: Path, service: EditService) -> None:
    output = run(folder, data_dir, "five_tools.py", "portrait.jpg", "img1.jpg", "img2.jpg")

    assert output.splitlines() == [
        f"Saved to: {folder / 'portrait_edited.jpg'}",
        "Processed 2 images: 2 succeeded, 0 failed",
        "Model location: CPU",
        "GPU memory: 0.0GB",
        "GPU offloaded. Model now on CPU, GPU memory: 0.00GB",
        "GPU released. Model location: Unloaded, GPU memory: 0.00GB",
    ]
    assert edited(folder / "outputs") == {"img1_edited.jpg", "img2_edited.jpg"}
    # All examples so far were served by one model, loaded once.
    assert service.status().gpu_status.statistics.total_loads == 1


def test_custom_timeout(folder: Path) -> None:
    output = run(folder, folder / "nobody", "custom_timeout.py")

    assert output == "Idle timeout: 300 s\n"


def test_cyanotype_pairs(folder: Path, data_dir: Path) -> None:
    output = run(folder, data_dir, "cyanotype_pairs.py", ".", "pairs")

    lines = [json.loads(line) for line in (folder / output.strip()).read_text().splitlines()]
    targets = [line["target"] for line in lines if "target" in line]
    assert len(targets) == 40
    assert sum("keep" in line for line in lines) == 40
    with Image.open(folder / "pairs" / targets[0]) as target:
        assert np.asarray(target)[..., 2].mean() > np.asarray(target)[..., 0].mean()  # it is blue


def test_every_example_has_a_test() -> None:
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tests
