"""Models that keep most weights as codes: read, moved and streamed like others, in less memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from command_line import edit
from layouts import tiny_releases, write_diffusers, write_official
from step1x_edit.channel import EditJob, Painted, Start
from step1x_edit.checkpoints import arena as arena_module
from step1x_edit.checkpoints.arena import Arena
from step1x_edit.checkpoints.memory_plan import with_share
from step1x_edit.checkpoints.read import (
    OpenedCheckpoint,
    Wanted,
    open_checkpoint,
    read_checkpoint,
    write_demo,
)
from step1x_edit.errors import CheckpointError
from step1x_edit.model.blocks import Layout
from step1x_edit.model.pipeline import Edited, EditPipeline
from step1x_edit.model.quantised import CODES, Code, QuantLinear, code
from step1x_edit.model.request import NetworkRequest
from step1x_edit.schemas.requests import Precision
from step1x_edit.worker.process import load_worker
from step1x_edit.worker.residency import Residency
from tiny import a_picture, location, tiny_pipeline

STAND_IN = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipeline() -> EditPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline: EditPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, pipeline)
    return folder


def picture(pipeline: EditPipeline) -> bytes:
    request = NetworkRequest(a_picture(), "make it night", num_steps=2, size_level=64)
    *_, last = pipeline.edit(request)
    assert isinstance(last, Edited)
    return last.image.tobytes()


def filled(opened: OpenedCheckpoint) -> Arena:
    arena = Arena(opened.weights)
    arena.fill()
    return arena


def layers(module: nn.Module) -> dict[str, nn.Linear | QuantLinear]:
    return {
        name: each
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear | QuantLinear)
    }


# --- which, and where from ------------------------------------------------------------------------


def test_the_layers_of_all_blocks_are_codes_and_the_ends_are_not(folder: Path) -> None:
    found = read_checkpoint(folder, Wanted(precision="int8")).pipeline.modules

    exact = {
        f"{part}.{name}"
        for part, module in found.items()
        if part != "vae"
        for name, layer in layers(module).items()
        if not isinstance(layer, QuantLinear)
    }
    assert exact == {
        *(f"transformer.{name}" for name in ("img_in", "txt_in", "final_layer.linear")),
        *(f"transformer.{name}_in.{n}_layer" for name in ("time", "vector") for n in ("in", "out")),
        "transformer.final_layer.adaLN_modulation.1",
        "transformer.connector.global_proj_out",
        "transformer.connector.S.input_embedder",
        *(f"transformer.connector.S.t_embedder.mlp.{i}" for i in (0, 2)),
        *(f"transformer.connector.S.c_embedder.linear_{i}" for i in (1, 2)),
        *(f"conditioner.visual.merger.mlp.{i}" for i in (0, 2)),
    }
    codes = {
        f"{part}.{name}": layer.may_round_input
        for part, module in found.items()
        for name, layer in layers(module).items()
        if isinstance(layer, QuantLinear)
    }
    assert len(codes) > 30
    core = ("img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2")
    rounding = {name for name, may_round_input in codes.items() if may_round_input}
    assert rounding == {
        *(f"transformer.double_blocks.0.{name}" for name in core),
        *(f"transformer.double_blocks.0.{name.replace('img', 'txt')}" for name in core),
        *(f"transformer.single_blocks.{i}.linear{j}" for i in (0, 1) for j in (1, 2)),
    }


@pytest.mark.parametrize("layout", ["demo", "official", "diffusers"])
@pytest.mark.parametrize("kind", CODES)
def test_the_codes_are_those_of_the_matrix_whatever_the_layout_and_the_pieces(
    tmp_path: Path,
    pipeline: EditPipeline,
    layout: str,
    kind: Code,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arena_module, "CODED_PIECE", 2048)  # a few rows each
    write = {"demo": write_demo, "official": write_official, "diffusers": write_diffusers}[layout]
    write(tmp_path / layout, pipeline)

    read = read_checkpoint(
        tmp_path / layout,
        Wanted(dtype=torch.float32, releases=tiny_releases(pipeline), precision=kind),
    ).pipeline

    for part, module in read.modules.items():
        before = layers(pipeline.modules[part])
        for name, layer in layers(module).items():
            matrix = before[name].weight
            assert isinstance(matrix, Tensor)
            if isinstance(layer, QuantLinear):
                expected = code(matrix, kind)
                assert torch.equal(layer.codes.view(torch.uint8), expected.codes.view(torch.uint8))
                assert torch.equal(layer.scale, expected.scale)
            else:
                assert torch.equal(layer.weight, matrix)
            bias = before[name].bias
            assert layer.bias is None or (bias is not None and torch.equal(layer.bias, bias))


def test_float8_files_lose_nothing_as_float8(tmp_path: Path, pipeline: EditPipeline) -> None:
    write_official(tmp_path / "model", pipeline)
    file = tmp_path / "model" / "step1x-edit.safetensors"
    stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
    save_file(stored, file)
    wanted = Wanted(dtype=torch.float32, releases=tiny_releases(pipeline))

    exact, coded = (
        layers(read_checkpoint(tmp_path / "model", each).pipeline.transformer)
        for each in (wanted, dataclasses.replace(wanted, precision="fp8"))
    )

    for name, layer in coded.items():
        kept = layer.weight(torch.float32) if isinstance(layer, QuantLinear) else layer.weight
        whole = exact[name].weight
        assert isinstance(whole, Tensor)
        assert torch.equal(kept, whole)


@pytest.mark.parametrize("kind", CODES)
def test_numbers_that_are_not_finite_are_refused(
    tmp_path: Path, pipeline: EditPipeline, kind: Code
) -> None:
    write_demo(tmp_path, pipeline)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.single_blocks.1.linear2.weight"][3, 1] = torch.inf
    save_file(tensors, file)

    with pytest.raises(
        CheckpointError, match=r"numbers in transformer\.single_blocks\.1\.linear2\.weight that are"
    ):
        read_checkpoint(tmp_path, Wanted(precision=kind))


@pytest.mark.parametrize("kind", CODES)
def test_what_a_lora_adds_is_added_before_the_rounding(
    tmp_path: Path, folder: Path, pipeline: EditPipeline, kind: Code
) -> None:
    name = "single_blocks.0.linear1"
    rows, columns = pipeline.transformer.get_parameter(f"{name}.weight").shape
    down, up = torch.randn(3, columns), torch.randn(rows, 3)
    key = f"lora_unet_{name.replace('.', '_')}"
    lora = tmp_path / "hand.safetensors"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, lora)

    read = read_checkpoint(folder, Wanted(loras={lora: 0.5}, precision=kind))

    layer = read.pipeline.transformer.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    matrix = pipeline.transformer.get_parameter(f"{name}.weight")
    expected = code(matrix + 0.5 * up @ down, kind)
    assert torch.equal(layer.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(layer.scale, expected.scale)


@pytest.mark.parametrize(
    ("precision", "demo", "published"),
    [
        ("auto", "demo", "Step1X-Edit v1.1"),
        ("bf16", "demo (bf16)", "Step1X-Edit v1.1"),
        ("int8", "demo (int8)", "Step1X-Edit v1.1 (int8)"),
    ],
)
def test_a_precision_that_is_not_the_checkpoints_own_is_told_in_its_name(
    tmp_path: Path,
    folder: Path,
    pipeline: EditPipeline,
    precision: Precision,
    demo: str,
    published: str,
) -> None:
    write_official(tmp_path / "model", pipeline)

    names = [
        open_checkpoint(place, Wanted(releases=tiny_releases(pipeline), precision=precision))
        for place in (folder, tmp_path / "model")
    ]

    assert [opened.checkpoint.name for opened in names] == [demo, published]


def test_the_demo_in_bf16_computes_in_bf16(folder: Path) -> None:
    read = read_checkpoint(folder, Wanted(precision="bf16")).pipeline

    assert read.transformer.img_in.weight.dtype == torch.bfloat16
    assert read.vae.dtype == torch.float32
    assert picture(read) != picture(read_checkpoint(folder).pipeline)


# --- where they lie -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CODES)
def kind(request: pytest.FixtureRequest) -> Code:
    found: Code = request.param
    return found


@pytest.fixture(scope="module")
def expected(folder: Path, kind: Code) -> bytes:
    """The picture of a model that computes in host memory."""
    return picture(read_checkpoint(folder, Wanted(precision=kind)).pipeline)


def residency_with(folder: Path, kind: Code, share: float | None) -> Residency:
    open_it = partial(open_checkpoint, folder, Wanted(precision=kind))
    if share is None:
        return Residency(open_it, STAND_IN)
    return Residency(open_it, STAND_IN, plan=partial(with_share, core_share=share))


@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
def test_the_picture_is_the_same_whatever_share_is_resident(
    folder: Path, kind: Code, expected: bytes, share: float | None
) -> None:
    residency = residency_with(folder, kind, share)
    for _ in range(2):  # also after it has been away
        residency.onload()
        assert location(residency) == "GPU"
        with residency.on_device() as checkpoint:
            assert picture(checkpoint.pipeline) == expected
        residency.offload()
        assert location(residency) == "CPU"
    residency.release()
    assert location(residency) == "Unloaded"


def test_moving_does_not_make_compiled_blocks_compile_again(folder: Path, kind: Code) -> None:
    compilations = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        nonlocal compilations
        compilations += 1
        return graph.forward

    residency = residency_with(folder, kind, None)
    residency.load()
    assert residency.checkpoint is not None
    block = residency.checkpoint.pipeline.transformer.single_blocks[0]
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    x, mod = torch.randn(1, 5, 32), torch.randn(1, 96)
    layout = Layout(torch.randn(1, 1, 5, 8, 2), text_length=2)
    results = []
    with torch.inference_mode():
        for move in (residency.load, residency.onload, residency.offload, residency.onload):
            move()
            results.append(compiled(x, mod, layout))

        by_line = block(x, mod, layout)

    assert compilations == 1
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], by_line)


# --- how much memory ------------------------------------------------------------------------------


def test_the_arena_holds_the_codes_and_nothing_else() -> None:
    exact = open_checkpoint()
    core = sum(block.size for block in Arena(exact.weights).blocks if block.component == "core")
    limits: list[tuple[Precision, float, float]] = [
        ("fp8", 0.25, 0.28),
        ("int8", 0.25, 0.28),
        ("nf4", 0.14, 0.16),
    ]
    for kind, least, most in limits:
        opened = open_checkpoint(wanted=Wanted(precision=kind))
        arena = Arena(opened.weights)
        blocks = [block.size for block in arena.blocks if block.component == "core"]

        assert least < sum(blocks) / core < most  # of float32
        assert arena.size < Arena(exact.weights).size


# --- at the doors ---------------------------------------------------------------------------------


def test_the_worker_edits_with_codes_and_the_picture_differs_a_little() -> None:
    job = EditJob(
        image=a_picture(96, 64),
        prompt="make it warm",
        negative_prompt="",
        num_steps=2,
        guidance_scale=6.0,
        size_level=512,
        seed=1,
    )
    pictures = {}
    for precision in ("auto", "int8", "nf4"):
        worker = load_worker(Start(device="cpu", precision=precision))
        *_, outcome = worker.edit(job, lambda: None)
        assert isinstance(outcome, Painted)
        pictures[precision] = outcome.image.astype(int)
        residence = worker.residence()
        assert residence.model == ("demo" if precision == "auto" else f"demo ({precision})")
        assert residence.placement is not None
        assert residence.placement.precision == ("fp32" if precision == "auto" else precision)

    exact = pictures.pop("auto")
    errors = {name: float(np.abs(found - exact).mean()) for name, found in pictures.items()}
    assert 0 < errors["int8"] < errors["nf4"] < 8, errors


def test_the_setting_reaches_the_model_and_the_answer_says_so(tmp_path: Path) -> None:
    Image.fromarray(a_picture(96, 64)).save(tmp_path / "photo.png")

    coded = edit(tmp_path, "coded.png", PRECISION="INT8")

    assert json.loads(coded.stdout)["metadata"]["model"] == "demo (int8)"
    assert (tmp_path / "coded.png").exists()
