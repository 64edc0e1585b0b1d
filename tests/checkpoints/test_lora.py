"""LoRA files: read in both ways of writing them, added to the weights, refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from command_line import edit
from step1x_edit.checkpoints.keymap import transformer_links
from step1x_edit.checkpoints.lora import delta_of
from step1x_edit.checkpoints.lora_file import Lora, read_lora
from step1x_edit.checkpoints.read import (
    DEMO_FOLDER,
    Wanted,
    open_checkpoint,
    read_checkpoint,
    write_demo,
)
from step1x_edit.errors import CheckpointError
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.quantised import QuantLinear, code
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.transformer import Transformer
from step1x_edit.worker.residency import Residency
from tiny import TINY, a_picture, final_picture, tiny_pipeline

CONFIG = TINY.transformer
LINKS = transformer_links(CONFIG)
NETWORK = Transformer(CONFIG)
SHAPES = {name: tuple(tensor.shape) for name, tensor in NETWORK.state_dict().items()}
RANK = 3


def factors(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The two thin matrices of a change: down (rank, in) and up (out, rank)."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(RANK, columns, generator=generator),
        torch.randn(rows, RANK, generator=generator),
    )


def kohya(module: str, alpha: float = 6.0) -> dict[str, Tensor]:
    down, up = factors(*SHAPES[f"{module}.weight"])
    key = "lora_unet_" + module.replace(".", "_")
    return {
        f"{key}.lora_down.weight": down,
        f"{key}.lora_up.weight": up,
        f"{key}.alpha": torch.tensor(alpha),
    }


def written(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def read(path: Path) -> Lora:
    return read_lora(path, SHAPES, LINKS)


def added(*loras: tuple[Lora, float]) -> dict[str, Tensor]:
    """What is added to each of the official weights that change."""
    weights = NETWORK.state_dict()
    found = {link.official: delta_of(link, loras, weights[link.official].float) for link in LINKS}
    return {name: delta for name, delta in found.items() if delta is not None}


def test_kohyas_way_is_up_times_down_times_alpha_by_rank(tmp_path: Path) -> None:
    module = "double_blocks.0.img_attn.qkv"
    lora = read(written(tmp_path / "hand.safetensors", kohya(module, alpha=6.0)))

    down, up = factors(*SHAPES[f"{module}.weight"])
    assert lora.name == "hand"
    torch.testing.assert_close(added((lora, 1.0)), {f"{module}.weight": 2.0 * up @ down})


def test_several_files_add_up_by_their_strengths(tmp_path: Path) -> None:
    first = read(written(tmp_path / "a.safetensors", kohya("single_blocks.0.linear2")))
    second = read(written(tmp_path / "b.safetensors", kohya("single_blocks.0.linear2", 3.0)))

    once, twice = added((first, 1.0)), added((first, 0.5), (second, -1.0))

    name = "single_blocks.0.linear2.weight"
    torch.testing.assert_close(twice[name], (0.5 - 0.5) * once[name], atol=1e-5, rtol=0)
    assert once[name].abs().max() > 1


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", ""])
def test_pefts_way_names_the_parts_of_fused_weights(tmp_path: Path, prefix: str) -> None:
    down, up = factors(CONFIG.hidden_size, CONFIG.hidden_size)
    key = f"{prefix}single_transformer_blocks.1.attn.to_v"
    file = written(
        tmp_path / "v.safetensors",
        {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up},
        lora_adapter_metadata=json.dumps({"transformer.lora_alpha": 1.5}),
    )

    found = added((read(file), 1.0))

    expected = torch.zeros(SHAPES["single_blocks.1.linear1.weight"])
    d = CONFIG.hidden_size
    expected[2 * d : 3 * d] = 0.5 * up @ down  # q, k, v, MLP
    torch.testing.assert_close(found, {"single_blocks.1.linear1.weight": expected})


def test_the_alpha_of_peft_may_lie_beside_the_file_and_is_the_rank_otherwise(
    tmp_path: Path,
) -> None:
    down, up = factors(*SHAPES["img_in.weight"])
    key = "base_model.model.x_embedder"
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    file = written(tmp_path / "adapter_model.safetensors", tensors)
    alone = added((read(file), 1.0))["img_in.weight"]
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 12}')
    beside = added((read(file), 1.0))["img_in.weight"]

    torch.testing.assert_close(alone, up @ down)
    torch.testing.assert_close(beside, 4 * up @ down)


OF_LINEAR2 = "single_blocks_0_linear2"
SPELLINGS = {
    "OneTrainer": "lora_transformer_single_transformer_blocks_0_proj_out.lora_{}.weight",
    "OneTrainer, dots": "transformer.single_transformer_blocks.0.proj_out.lora_{}.weight",
    "LyCORIS": f"lycoris_{OF_LINEAR2}.lora_{{}}.weight",
    "kohya, diffusers names": "lora_unet_single_transformer_blocks_0_proj_out.lora_{}.weight",
    "diffusers before peft": "transformer.single_transformer_blocks.0.proj_out.lora.{}.weight",
    "ComfyUI": "diffusion_model.single_blocks.0.linear2.lora_{}.weight",
    "a whole ComfyUI model": "model.diffusion_model.single_blocks.0.linear2.lora_{}.weight",
    "DiffSynth-Studio": "single_blocks.0.proj_out.lora_{AB}.default.weight",
    "DiffSynth-Studio, prefix": "pipe.dit.single_blocks.0.proj_out.lora_{AB}.default.weight",
    "peft, compiled": "base_model.model._orig_mod.single_blocks.0.linear2.lora_{AB}.weight",
    "peft, distributed": "module.base_model.model.single_blocks.0.linear2.lora_{AB}.weight",
    "an adapter name": "base_model.model.single_blocks.0.linear2.lora_{AB}.my-hand.weight",
}


@pytest.mark.parametrize("form", SPELLINGS.values(), ids=SPELLINGS)
def test_tools_spell_the_same_module_in_many_ways(tmp_path: Path, form: str) -> None:
    down, up = factors(*SHAPES["single_blocks.0.linear2.weight"])
    keys = [
        form.replace("{AB}", letter).format(way) for letter, way in (("A", "down"), ("B", "up"))
    ]
    lora = read(written(tmp_path / "hand.safetensors", dict(zip(keys, (down, up), strict=True))))

    torch.testing.assert_close(added((lora, 1.0)), {"single_blocks.0.linear2.weight": up @ down})


DIFFSYNTH = {
    "blocks.0.attn.a_to_qkv": "double_blocks.0.img_attn.qkv",
    "blocks.0.attn.b_to_qkv": "double_blocks.0.txt_attn.qkv",
    "blocks.0.attn.a_to_out": "double_blocks.0.img_attn.proj",
    "blocks.0.attn.b_to_out": "double_blocks.0.txt_attn.proj",
    "blocks.0.ff_a.0": "double_blocks.0.img_mlp.0",
    "blocks.0.ff_a.2": "double_blocks.0.img_mlp.2",
    "blocks.0.ff_b.0": "double_blocks.0.txt_mlp.0",
    "blocks.0.ff_b.2": "double_blocks.0.txt_mlp.2",
    "blocks.0.norm1_a.linear": "double_blocks.0.img_mod.lin",
    "blocks.0.norm1_b.linear": "double_blocks.0.txt_mod.lin",
    "single_blocks.1.to_qkv_mlp": "single_blocks.1.linear1",
    "single_blocks.1.proj_out": "single_blocks.1.linear2",
    "single_blocks.1.norm.linear": "single_blocks.1.modulation.lin",
}


def test_diffsynth_studio_has_its_own_names(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for theirs, ours in DIFFSYNTH.items():
        down, up = factors(*SHAPES[f"{ours}.weight"])
        tensors |= {f"{theirs}.lora_A.default.weight": down, f"{theirs}.lora_B.default.weight": up}

    lora = read(written(tmp_path / "hand.safetensors", tensors))

    assert set(lora.changes) == {f"{ours}.weight" for ours in DIFFSYNTH.values()}


def test_parts_of_a_fused_matrix_may_have_separate_products(tmp_path: Path) -> None:
    """Of sd-scripts with `split_qkv`, before it merges them."""
    module, d = "double_blocks.0.img_attn.qkv", CONFIG.hidden_size
    key = "lora_unet_" + module.replace(".", "_")
    products = [factors(d, d, seed) for seed in range(3)]
    tensors = {f"{key}.alpha": torch.tensor(1.5)}
    for i, (down, up) in enumerate(products):
        tensors |= {f"{key}.lora_down.{i}.weight": down, f"{key}.lora_up.{i}.weight": up}

    lora = read(written(tmp_path / "hand.safetensors", tensors))

    expected = torch.cat([0.5 * up @ down for down, up in products])
    torch.testing.assert_close(added((lora, 1.0)), {f"{module}.weight": expected})


def test_what_comfyui_extracts_changes_biases_and_norms_too(tmp_path: Path) -> None:
    key = "diffusion_model.double_blocks.0.img_attn"
    down, up = factors(*SHAPES["double_blocks.0.img_attn.proj.weight"])
    bias, norm, whole = torch.ones(CONFIG.hidden_size), torch.ones(16), torch.ones(32, 64)
    tensors = {
        f"{key}.proj.lora_down.weight": down,
        f"{key}.proj.lora_up.weight": up,
        f"{key}.proj.diff_b": bias,
        f"{key}.norm.query_norm.scale.diff": norm,
        f"{key}.norm.key_norm.diff": norm.clone(),
        "diffusion_model.img_in.diff": whole,
    }

    found = added((read(written(tmp_path / "hand.safetensors", tensors)), 0.5))

    prefix = "double_blocks.0.img_attn"
    expected = {
        f"{prefix}.proj.weight": 0.5 * up @ down,
        f"{prefix}.proj.bias": 0.5 * bias,
        f"{prefix}.norm.query_norm.scale": 0.5 * norm,
        f"{prefix}.norm.key_norm.scale": 0.5 * norm,
        "img_in.weight": 0.5 * whole,
    }
    torch.testing.assert_close(dict(sorted(found.items())), dict(sorted(expected.items())))


def test_numbers_of_eight_bits_are_read(tmp_path: Path) -> None:
    tensors = kohya("single_blocks.0.linear2")
    coarse = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}
    of_fp8 = read(written(tmp_path / "fp8.safetensors", coarse))
    as_float = {key: tensor.float() for key, tensor in coarse.items()}
    of_float = read(written(tmp_path / "float.safetensors", as_float))

    torch.testing.assert_close(added((of_fp8, 1.0)), added((of_float, 1.0)), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dora_scale", "magnitude", "lora_magnitude_vector"])
def test_dora_has_the_strength_of_its_whole_difference(tmp_path: Path, name: str) -> None:
    module, key = "single_blocks.0.linear2", "transformer.single_blocks.0.linear2"
    weight = NETWORK.state_dict()[f"{module}.weight"]
    down, up = factors(*weight.shape)
    magnitude = torch.rand(weight.shape[0])
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.{name}": magnitude}
    dora = read(written(tmp_path / "dora.safetensors", tensors))
    plain = read(written(tmp_path / "plain.safetensors", kohya(module)))

    changed = weight + up @ down
    result = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
    both = added((plain, 1.0), (dora, -0.5))[f"{module}.weight"]
    torch.testing.assert_close(both, 2.0 * up @ down - 0.5 * (result - weight))


def test_a_module_of_rank_0_does_not_change(tmp_path: Path) -> None:
    rows, columns = SHAPES["single_blocks.0.linear2.weight"]
    nothing = {
        f"lora_unet_{OF_LINEAR2}.lora_down.weight": torch.ones(0, columns),
        f"lora_unet_{OF_LINEAR2}.lora_up.weight": torch.ones(rows, 0),
    }
    lora = read(written(tmp_path / "hand.safetensors", nothing))

    assert not added((lora, 1.0))["single_blocks.0.linear2.weight"].any()


# --- the settings of peft -------------------------------------------------------------------------

CONFIG_OF_PEFT = json.dumps({"lora_alpha": 12, "r": RANK, "use_rslora": True})


def of_peft(prefix: str = "base_model.model.") -> dict[str, Tensor]:
    down, up = factors(*SHAPES["img_in.weight"])
    key = f"{prefix}img_in"
    return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("adapter_model", of_peft("transformer.")),
        ("renamed", of_peft()),
        ("kohya", kohya("img_in", alpha=RANK)),
    ],
)
def test_the_settings_of_peft_are_those_of_its_own_file(
    tmp_path: Path, name: str, tensors: dict[str, Tensor]
) -> None:
    (tmp_path / "adapter_config.json").write_text(CONFIG_OF_PEFT)

    lora = read(written(tmp_path / f"{name}.safetensors", tensors))

    down, up = factors(*SHAPES["img_in.weight"])
    torch.testing.assert_close(added((lora, 1.0)), {"img_in.weight": up @ down})


def test_the_settings_may_be_in_the_header(tmp_path: Path) -> None:
    packed = {f"transformer.{name}": value for name, value in json.loads(CONFIG_OF_PEFT).items()}
    file = tmp_path / "hand.safetensors"
    written(file, of_peft("transformer."), lora_adapter_metadata=json.dumps(packed))

    down, up = factors(*SHAPES["img_in.weight"])
    expected = 12 / RANK**0.5 * up @ down
    torch.testing.assert_close(added((read(file), 1.0)), {"img_in.weight": expected})


def test_a_file_of_peft_without_settings_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read(written(tmp_path / "adapter_model.safetensors", of_peft()))
    assert "has no adapter_config.json: alpha is taken as rank" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        '{"lora_alpha": NaN}',
        '{"lora_alpha": "x"}',
        f'{{"lora_alpha": 1{"0" * 400}}}',
        '{"lora_alpha": 1, "alpha_pattern": {"(": 1}}',
        # These would take hours.
        '{"lora_alpha": 1, "alpha_pattern": {"(([a-z0-9_.])+)+!": 1}}',
        f'{{"lora_alpha": 1, "rank_pattern": {{"{"a?" * 40}{"a" * 40}": 1}}}}',
        f'{{"lora_alpha": 1, "rank_pattern": {{"{"(.|.)" * 40}!": 1}}}}',
        f'{{"lora_alpha": 1, "rank_pattern": {{"{"(" * 5000 + ")" * 5000}": 1}}}}',
        "{",
    ],
)
def test_settings_that_cannot_be_read_are_an_error(tmp_path: Path, config: str) -> None:
    (tmp_path / "adapter_config.json").write_text(config)

    with pytest.raises(CheckpointError, match=r"the settings of .*/adapter_model\.safetensors"):
        read(written(tmp_path / "adapter_model.safetensors", of_peft()))


@pytest.mark.parametrize(
    ("role", "values"),
    [
        *((role, torch.tensor(1.0)) for role in ("lora_down.weight", "lora_up.weight")),
        ("lora_up.weight", torch.ones(2, 1).to(torch.float8_e8m0fnu)),
        ("alpha", torch.tensor(1j)),
        ("alpha", torch.tensor(1, dtype=torch.uint64)),
        (f"lora_A{'.' * 100_000}", torch.ones(1)),
    ],
    ids=["scalar down", "scalar up", "powers of two", "complex", "unsigned", "long name"],
)
def test_tensors_that_no_tool_writes_are_refused_at_once(
    tmp_path: Path, role: str, values: torch.Tensor
) -> None:
    module = "double_blocks.0.txt_attn.qkv"
    down, up = factors(*SHAPES[f"{module}.weight"])
    tensors = {"lora_down.weight": down, "lora_up.weight": up, role: values}
    tensors = {f"{module}.{name}": tensor for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError):
        read(written(tmp_path / "odd.safetensors", tensors))


# --- in both layouts ------------------------------------------------------------------------------


def test_both_layouts_of_the_weights_change_alike(tmp_path: Path) -> None:
    """A fused change, written once for the fused weight and once for each of its parts."""
    module = "double_blocks.0.txt_attn.qkv"
    down, up = factors(*SHAPES[f"{module}.weight"])
    fused = written(tmp_path / "fused.safetensors", kohya(module, alpha=float(RANK)))
    parts: dict[str, torch.Tensor] = {}
    ups = up.split(CONFIG.hidden_size)
    for name, part in zip(("add_q_proj", "add_k_proj", "add_v_proj"), ups, strict=True):
        key = f"transformer.transformer_blocks.0.attn.{name}"
        parts |= {f"{key}.lora_A.weight": down.clone(), f"{key}.lora_B.weight": part.clone()}
    split = written(tmp_path / "split.safetensors", parts)

    torch.testing.assert_close(added((read(fused), 1.0)), added((read(split), 1.0)))


def test_every_linear_layer_of_the_blocks_is_reached(tmp_path: Path) -> None:
    """The published LoRA has 10 modules per double and 3 per single block: 304 at full size."""
    modules = [
        name.removesuffix(".weight")
        for name, shape in SHAPES.items()
        if name.startswith(("double_blocks", "single_blocks"))
        and name.endswith(".weight")
        and len(shape) == 2
    ]
    tensors = {key: value for module in modules for key, value in kohya(module).items()}

    lora = read(written(tmp_path / "all.safetensors", tensors))

    assert len(modules) == 10 * CONFIG.depth + 3 * CONFIG.depth_single
    assert set(added((lora, 1.0))) == {f"{module}.weight" for module in modules}


def test_what_is_not_for_the_transformer_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = kohya("single_blocks.0.linear1") | {"lora_te_x.lora_down.weight": torch.ones(1, 1)}

    lora = read(written(tmp_path / "both.safetensors", tensors))

    assert list(lora.changes) == ["single_blocks.0.linear1.weight"]
    assert "lora_te_x.lora_down.weight" in caplog.text


KEY = "lora_unet_single_blocks_0_linear1"
PART = "single_transformer_blocks.0.attn.to_k"
NORM = "lora_unet_double_blocks_0_img_attn_norm_query_norm.diff_b"


def of_xlabs(tensors: dict[str, Tensor]) -> None:
    tensors.clear()
    tensors["double_blocks.0.processor.qkv_lora1.down.weight"] = torch.ones(1, 1)


def without_up(tensors: dict[str, Tensor]) -> None:
    del tensors[next(key for key in tensors if "lora_up" in key)]


def of_another_width(tensors: dict[str, Tensor]) -> None:
    key = next(key for key in tensors if "lora_down" in key)
    tensors[key] = torch.ones(RANK, 5)


def of_another_rank(tensors: dict[str, Tensor]) -> None:
    key = next(key for key in tensors if "lora_down" in key)
    tensors[key] = torch.ones(RANK + 1, tensors[key].shape[1])


def with_nan(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = torch.nan


def of_integers(tensors: dict[str, Tensor]) -> None:
    key = next(key for key in tensors if "lora_up" in key)
    tensors[key] = tensors[key].to(torch.int8)


def of_truths(tensors: dict[str, Tensor]) -> None:
    key = next(key for key in tensors if "lora_up" in key)
    tensors[key] = tensors[key] > 0


def with_alpha(value: float) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[next(key for key in tensors if "alpha" in key)] = torch.tensor(value)

    return damage


def with_two_alphas(tensors: dict[str, Tensor]) -> None:
    tensors[next(key for key in tensors if "alpha" in key)] = torch.ones(2)


def with_a_tensor(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.ones(shape)

    return damage


def of_whole_weights(tensors: dict[str, Tensor]) -> None:
    tensors.clear()
    tensors.update(NETWORK.state_dict())


def of_another_method(tensors: dict[str, Tensor]) -> None:
    tensors["lora_unet_single_blocks_0_linear1.oft_blocks"] = torch.ones(1)


def of_another_model(tensors: dict[str, Tensor]) -> None:
    tensors.clear()
    tensors["lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight"] = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (without_up, "x.safetensors has only a part of the change of single_blocks.0.linear1"),
        (of_another_width, "it was made for another model"),
        (of_another_rank, "by matrices that do not fit"),
        (with_nan, "by numbers that are not finite"),
        (of_integers, "by numbers of the type torch.int8, whose scale is unknown"),
        (of_truths, "by numbers of the type torch.bool"),
        *((with_alpha(value), "no single finite alpha") for value in (math.nan, math.inf)),
        (with_two_alphas, "no single finite alpha"),
        (with_alpha(1e30), r"by an alpha of 1e\+30 at rank \d+, which is too large"),
        (with_a_tensor(f"{KEY}.lora_new", 1), "changes single_blocks.0.linear1 in an unknown way"),
        (with_a_tensor(f"{KEY}.diff", 224, 32), "changes the weight of .*linear1 twice"),
        (with_a_tensor(f"{KEY}.dora_scale", 3), "by a magnitude that does not fit"),
        (with_a_tensor(f"{KEY}.lokr_w1", 3, 3), "has only a part of the change of"),
        (with_a_tensor(f"lycoris_{KEY[10:]}.lora_up.weight", 1), "linear1 twice, also by lycoris_"),
        (with_a_tensor(NORM, 16), "changes the bias of .*query_norm, which it does not have"),
        (with_a_tensor(f"transformer.{PART}.diff", 32, 32), "linear1.weight in both layouts"),
        (of_whole_weights, "x.safetensors is no LoRA: it holds whole weights"),
        (of_xlabs, "x.safetensors was made with the scripts of XLabs, which is not supported"),
        (of_another_method, "x.safetensors was made with OFT, which is not supported"),
        (of_another_model, "x.safetensors is not a LoRA for Step1X-Edit"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], sentence: str
) -> None:
    tensors = kohya("single_blocks.0.linear1")
    damage(tensors)

    with pytest.raises(CheckpointError, match=sentence) as refused:
        read(written(tmp_path / "x.safetensors", tensors))
    assert "\n" not in str(refused.value)


def test_a_missing_file_a_pickle_and_rubbish_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rubbish.safetensors").write_bytes(b"not a header")
    for name in ("missing.safetensors", "rubbish.safetensors"):
        with pytest.raises(CheckpointError, match=f"cannot read .*{name}"):
            read(tmp_path / name)
    with pytest.raises(CheckpointError, match="only safetensors are accepted"):
        read(tmp_path / "lora.pt")


# --- in a model -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint, and beside it a LoRA."""
    write_demo(tmp_path / "model", tiny_pipeline())
    written(tmp_path / "hand.safetensors", kohya("single_blocks.1.linear1"))
    return tmp_path


def picture(pipeline: EditPipeline) -> np.ndarray:
    request = NetworkRequest(a_picture(), "night", num_steps=2, size_level=64)
    return final_picture(pipeline, request)


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_the_model_edits_as_if_it_had_been_stored_with_the_lora_in_it(
    folder: Path, device: torch.device | None
) -> None:
    plain = read_checkpoint(folder / "model").pipeline
    before = picture(plain)
    with torch.no_grad():
        weight = plain.transformer.single_blocks[1].linear1.weight
        down, up = factors(*weight.shape)
        weight += 0.5 * 2.0 * up @ down
    merged_by_hand = picture(plain)

    loras = {folder / "hand.safetensors": 0.5}
    residency = Residency(lambda: open_checkpoint(folder / "model", Wanted(loras=loras)), device)
    for _ in range(2):  # also after it has been away from the device
        residency.onload()
        with residency.on_device() as checkpoint:
            assert (picture(checkpoint.pipeline) == merged_by_hand).all()
        residency.offload()

    assert residency.loras == {"hand": 0.5}
    assert (before != merged_by_hand).any()


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_dora_is_relative_to_the_weights_before_they_are_coded(
    folder: Path, precision: Literal["int8", "nf4"]
) -> None:
    module, file = "single_blocks.1.linear1", folder / "hand.safetensors"
    exact = read_checkpoint(folder / "model").pipeline.transformer
    weight = exact.get_parameter(f"{module}.weight").detach()
    down, up = factors(*weight.shape)
    magnitude = torch.rand(1, weight.shape[1])
    key = f"lora_unet_{module.replace('.', '_')}.dora_scale"
    written(file, load_file(file) | {key: magnitude})

    wanted = Wanted(loras={file: 0.5}, precision=precision)
    network = read_checkpoint(folder / "model", wanted).pipeline.transformer
    layer = network.get_submodule(module)
    assert isinstance(layer, QuantLinear)

    changed = weight + 2.0 * up @ down
    result = magnitude * changed / changed.norm(dim=0, keepdim=True)
    coded = code(weight + 0.5 * (result - weight), precision)
    assert torch.ne(layer.codes, coded.codes).float().mean() < 0.01  # of rounding
    torch.testing.assert_close(layer.scale, coded.scale)


def test_the_files_of_the_model_stay_as_they_are(folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    before = file.read_bytes()

    read_checkpoint(folder / "model", Wanted(loras={folder / "hand.safetensors": 1.0}))

    assert file.read_bytes() == before


def demo_lora(path: Path) -> Path:
    """A LoRA for the embedded checkpoint, strong enough to be seen."""
    weights = load_file(DEMO_FOLDER / "model.safetensors")
    weight = weights["transformer.final_layer.linear.weight"]
    down, up = factors(*weight.shape)
    return written(
        path,
        {
            "lora_unet_final_layer_linear.lora_down.weight": down,
            "lora_unet_final_layer_linear.lora_up.weight": 0.02 * up,
        },
    )


def test_the_setting_changes_the_picture_and_the_answer_says_so(tmp_path: Path) -> None:
    Image.fromarray(a_picture(96, 64)).save(tmp_path / "photo.png")
    lora = demo_lora(tmp_path / "look.safetensors")

    without = edit(tmp_path, "without.png")
    changed = edit(tmp_path, "with.png", LORA_PATH=f"{lora}@0.5")
    missing = edit(tmp_path, "missing.png", LORA_PATH=str(tmp_path / "no.safetensors"))

    assert json.loads(without.stdout)["metadata"]["model"] == "demo"
    assert json.loads(changed.stdout)["metadata"]["model"] == "demo with LoRA look 0.5"
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("without.png", "with.png")]
    assert (pictures[0] != pictures[1]).mean() > 0.2
    assert missing.returncode == 1
    assert json.loads(missing.stdout)["error"].startswith("Manager not initialized: cannot read ")
    assert not (tmp_path / "missing.png").exists()
