"""The node for ComfyUI, with tensors as ComfyUI passes them, against a server of ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from conftest import MakeService
from http_server import TOKEN, serving

FILE: Final = Path(__file__).parents[2] / "plugins" / "comfyui" / "step1x_edit.py"
EDIT: Final = {
    "prompt": "night",
    "seed": 1,
    "num_steps": 10,
    "guidance_scale": 6.0,
    "mode": "exact",
}


@pytest.fixture
def node() -> Any:
    """The class that ComfyUI finds in the file."""
    spec = importlib.util.spec_from_file_location("node", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS["Step1XEdit"]


def test_each_picture_of_a_batch_is_edited(
    node: Any, make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = torch.rand(2, 24, 40, 3)

    with serving(make_service()) as url:
        monkeypatch.setenv("STEP1X_EDIT_URL", url + "/")
        monkeypatch.setenv("STEP1X_EDIT_API_KEY", TOKEN)
        (edited,) = node().edit(batch, **EDIT)

    # The worker of the tests inverts pictures.
    assert (edited.shape, edited.dtype) == (batch.shape, torch.float32)
    assert torch.allclose(edited, 1 - batch, atol=1 / 255)


def test_only_what_the_mask_selects_changes(
    node: Any, make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, mask = torch.rand(1, 32, 32, 3), torch.zeros(1, 32, 32)
    mask[:, :, 16:] = 1

    with serving(make_service(), api_key=None) as url:
        monkeypatch.setenv("STEP1X_EDIT_URL", url)
        (edited,) = node().edit(batch, **EDIT, mask=mask, negative_prompt="blur")

    left, right = slice(0, 16), slice(24, 32)
    assert torch.allclose(edited[:, :, left], batch[:, :, left], atol=1 / 255)
    assert torch.allclose(edited[:, :, right], 1 - batch[:, :, right], atol=1 / 255)


def test_a_refused_edit_raises_the_server_s_sentence(
    node: Any, make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(make_service()) as url:
        monkeypatch.setenv("STEP1X_EDIT_URL", url)
        with pytest.raises(RuntimeError, match="API_KEY"):
            node().edit(torch.rand(1, 24, 24, 3), **EDIT)
        monkeypatch.setenv("STEP1X_EDIT_API_KEY", TOKEN)
        with pytest.raises(RuntimeError, match="num_steps must be between 10 and 50"):
            node().edit(torch.rand(1, 24, 24, 3), **{**EDIT, "num_steps": 9})


def test_a_server_that_is_not_there_is_told(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEP1X_EDIT_URL", "http://127.0.0.1:1")

    with pytest.raises(RuntimeError, match=r"No step1x-edit answers at http://127\.0\.0\.1:1"):
        node().edit(torch.rand(1, 24, 24, 3), **EDIT)


def test_its_inputs_have_the_ranges_of_the_server(node: Any) -> None:
    from step1x_edit.schemas.requests import EditRequest

    inputs = node.INPUT_TYPES()
    known = EditRequest.model_json_schema()["properties"]

    assert set(inputs["required"]) | set(inputs["optional"]) - {"mask"} <= {"image", *known}
    for name in ("num_steps", "guidance_scale"):
        _, options = inputs["required"][name]
        ranges = next(each for each in known[name].get("anyOf", [known[name]]) if "minimum" in each)
        assert (options["min"], options["max"]) == (ranges["minimum"], ranges["maximum"])
