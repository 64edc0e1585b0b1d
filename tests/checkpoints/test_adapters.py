"""Adapter files as the libraries write them: read to what the library itself makes of them.

Each variant is saved by peft or LyCORIS, changes a network of a few thousand weights there, and is
read here; the table in docs/models.md has a line for each of them.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from step1x_edit.checkpoints.keymap import to_diffusers, to_official, transformer_links
from step1x_edit.checkpoints.lora import delta_of
from step1x_edit.checkpoints.lora_file import Lora, read_lora
from step1x_edit.errors import CheckpointError
from step1x_edit.model.transformer import Transformer
from tiny import TINY

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

LINKS = transformer_links(TINY.transformer)
TOLERANCE = 1e-5
"""Of the largest difference from the library's weights, relative to the norm of its change."""


def library(name: str) -> Any:
    """Imported only where a test runs: it takes seconds, and every process collects this file."""
    found = pytest.importorskip(name)
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    return found


@functools.cache
def network() -> Transformer:
    torch.manual_seed(7)
    return Transformer(TINY.transformer).requires_grad_(False)


def official() -> nn.Module:
    """The network, with the names of the official layout."""
    return copy.deepcopy(network())


def diffusers() -> nn.Module:
    """Its linear layers, with the names of the diffusers layout."""
    root = nn.Module()
    weights = to_diffusers(dict(network().state_dict()), LINKS)
    for name, weight in weights.items():
        path, _, parameter = name.rpartition(".")
        if parameter != "weight" or weight.ndim != 2:
            continue
        layer = nn.Linear(*reversed(weight.shape))
        layer.load_state_dict({"weight": weight, "bias": weights[f"{path}.bias"]})
        parent = root
        *above, last = path.split(".")
        for part in above:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, layer)
    return root


def as_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of either layout; those that `diffusers` does not have are unchanged."""
    if "img_in.weight" in state:
        return state
    whole = to_diffusers(dict(network().state_dict()), LINKS)
    return to_official(whole | {name: state[name] for name in whole if name in state}, LINKS)


def read(file: Path) -> Lora:
    shapes = {name: tuple(tensor.shape) for name, tensor in network().state_dict().items()}
    return read_lora(file, shapes, LINKS)


def difference(file: Path, merged: dict[str, Tensor]) -> float:
    """How far our weights are from the library's, as a share of the norm of its change."""
    base, lora = network().state_dict(), read(file)
    farthest = 0.0
    for link in LINKS:
        weight = base[link.official]
        delta = delta_of(link, [(lora, 1.0)], weight.float)
        change = merged[link.official] - weight
        ours = torch.zeros_like(weight) if delta is None else delta
        away = (weight + ours - merged[link.official]).abs().max()
        farthest = max(farthest, float(away / change.norm().clamp_min(1e-2)))
    assert lora.changes
    return farthest


def refusal(file: Path) -> str:
    """Why a file is not read, in one line."""
    with pytest.raises(CheckpointError) as refused:
        read(file)
    sentence = str(refused.value).removeprefix("Manager not initialized: ")
    assert "\n" not in sentence
    return sentence


def randomised(module: nn.Module) -> None:
    """Give values to what a library initialises with zeros or ones."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


# --- peft -----------------------------------------------------------------------------------------

OF_OFFICIAL = ["qkv", "linear1", "img_mlp.0", "img_in", "adaLN_modulation.1", "fc1"]
OF_DIFFUSERS = ["to_q", "to_v", "proj_mlp", "net.0.proj", "norm_out.linear", "add_k_proj"]


@dataclass(frozen=True)
class Peft:
    """An adapter of peft: the name of its config and the settings of that."""

    config: str = "LoraConfig"
    settings: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], nn.Module] = official

    def write(self, folder: Path) -> tuple[Path, dict[str, Tensor]]:
        """The file, and the weights with the adapter in them."""
        peft = library("peft")
        targets = OF_OFFICIAL if self.build is official else OF_DIFFUSERS
        settings = {"r": 4, "target_modules": targets, **self.settings}
        torch.manual_seed(5)
        config = getattr(peft, self.config)(**{k: v for k, v in settings.items() if v is not None})
        model = peft.get_peft_model(self.build(), config)
        randomised(model)
        model.save_pretrained(str(folder / "hand"))
        merged = model.merge_and_unload().state_dict()
        return folder / "hand" / "adapter_model.safetensors", as_official(merged)


PEFT = {
    "LoRA": Peft(settings={"lora_alpha": 6}),
    "LoRA, diffusers names": Peft(settings={"lora_alpha": 6}, build=diffusers),
    "rsLoRA": Peft(settings={"lora_alpha": 6, "use_rslora": True}),
    "rank and alpha by module": Peft(
        settings={
            "lora_alpha": 6,
            "rank_pattern": {"qkv": 2, r"single_blocks\.1\.linear1": 3},
            "alpha_pattern": {"^double_blocks.0.img_attn.qkv": 1, "linear1": 9},
        }
    ),
    "DoRA": Peft(settings={"lora_alpha": 6, "use_dora": True}),
    "DoRA, diffusers names": Peft(settings={"use_dora": True}, build=diffusers),
    "LoRA with a bias": Peft(settings={"lora_alpha": 6, "lora_bias": True}),
    "biases": Peft(settings={"bias": "all"}),
    "biases of changed modules": Peft(settings={"bias": "lora_only"}),
    "modules to save": Peft(settings={"modules_to_save": ["final_layer.linear", "txt_in"]}),
    "orthogonal": Peft(settings={"init_lora_weights": "orthogonal"}),
    "MiCA": Peft(settings={"init_lora_weights": "mica"}),
    "QA-LoRA": Peft(settings={"use_qalora": True, "qalora_group_size": 4}),
    "VeLoRA": Peft(settings={"lora_alpha": 6, "velora_config": {}}),
    "MonteCLoRA": Peft(settings={"monteclora_config": {}}),
    "parameters": Peft(
        settings={"target_modules": [], "target_parameters": ["single_blocks.0.linear1.weight"]}
    ),
    "LoHa": Peft("LoHaConfig", {"alpha": 6}),
    "LoKr": Peft("LoKrConfig", {"r": 2, "alpha": 3}),
    "LoKr, both factors decomposed": Peft(
        "LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True}, diffusers
    ),
    "LoKr, both factors whole": Peft("LoKrConfig", {"r": 64, "alpha": 16}),
}


@pytest.mark.parametrize("variant", PEFT)
def test_peft(tmp_path: Path, variant: str) -> None:
    assert difference(*PEFT[variant].write(tmp_path)) <= TOLERANCE


def one_layer() -> nn.Module:
    """A network with a single layer of ours."""
    root = nn.Module()
    root.single_blocks = nn.ModuleList([nn.ModuleDict({"linear1": nn.Linear(32, 224)})])
    return root


PEFT_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "AdaLoRA": ("AdaLoraConfig", {"total_step": 10}),
    "aLoRA": ("LoraConfig", {"alora_invocation_tokens": [1]}),
    "BD-LoRA": ("LoraConfig", {"use_bdlora": {"target_modules_bd_a": ["linear1"], "nblocks": 2}}),
    "BEFT": ("BeftConfig", {}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "C3A": ("C3AConfig", {"block_size": 4}),
    "DEFT": ("DeftConfig", {}),
    "DeLoRA": ("DeloraConfig", {}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 10}),
    "GraLoRA": ("GraloraConfig", {}),
    "HiRA": ("HiraConfig", {}),
    "HRA": ("HRAConfig", {}),
    "(IA)³": ("IA3Config", {"feedforward_modules": []}),
    "KaSA": ("LoraConfig", {"kasa_config": {}}),
    "Lily": ("LilyConfig", {}),
    "MiSS": ("MissConfig", {"r": 8}),
    "OFT": ("OFTConfig", {"oft_block_size": 4}),
    "OSF": ("OSFConfig", {}),
    "PEANuT": ("PeanutConfig", {}),
    "PSOFT": ("PsoftConfig", {}),
    "PVeRA": ("PveraConfig", {}),
    "RandLoRA": ("RandLoraConfig", {}),
    "RoAd": ("RoadConfig", {"group_size": 8}),
    "SHiRA": ("ShiraConfig", {"r": 8}),
    "Supertuning": ("SupertuningConfig", {}),
    "TinyLoRA": ("TinyLoraConfig", {}),
    "Trainable tokens": ("TrainableTokensConfig", {}),
    "UniLoRA": ("UniLoraConfig", {}),
    "VB-LoRA": ("VBLoRAConfig", {"vector_length": 4}),
    "VeRA": ("VeraConfig", {}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 10}),
}


@pytest.mark.parametrize("method", PEFT_REFUSED)
def test_other_methods_of_peft_are_refused_by_name(tmp_path: Path, method: str) -> None:
    peft, (name, settings) = library("peft"), PEFT_REFUSED[method]
    config = getattr(peft, name)(target_modules=["linear1"], **settings)
    peft.get_peft_model(one_layer(), config).save_pretrained(str(tmp_path / "hand"))

    sentence = refusal(tmp_path / "hand" / "adapter_model.safetensors")
    assert sentence.startswith(f"hand/adapter_model.safetensors was made with {method}, which is")


def test_a_converted_pissa_is_read(tmp_path: Path) -> None:
    peft = library("peft")
    settings: dict[str, Any] = {"r": 4, "target_modules": OF_OFFICIAL, "init_lora_weights": "pissa"}
    model = peft.get_peft_model(official(), peft.LoraConfig(**settings))
    initial = str(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = True  # or peft computes it anew from this
    model.save_pretrained(initial)
    model.peft_config["default"].init_lora_weights = "pissa"
    randomised(model)
    model.save_pretrained(str(tmp_path / "hand"), path_initial_model_for_weight_conversion=initial)

    merged = model.merge_and_unload().state_dict()
    file = tmp_path / "hand" / "adapter_model.safetensors"
    assert difference(file, merged) <= TOLERANCE


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "lora_ga"])
def test_a_lora_that_is_relative_to_a_changed_base_must_be_converted(
    tmp_path: Path, start: str
) -> None:
    peft = library("peft")
    settings: dict[str, Any] = {"r": 4, "target_modules": OF_OFFICIAL, "init_lora_weights": start}
    model = peft.get_peft_model(official(), peft.LoraConfig(**settings))
    model.save_pretrained(str(tmp_path / "hand"))

    assert f"was initialised by {start}" in refusal(tmp_path / "hand" / "adapter_model.safetensors")


# --- LyCORIS --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lycoris:
    """An adapter of LyCORIS, by its algorithm and settings."""

    algorithm: str
    settings: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], nn.Module] = official

    def write(self, folder: Path) -> tuple[Path, dict[str, Tensor]]:
        """The file, and the weights that the adapted layers compute with.

        Not its own merge, which scales LoHa and LoKr twice if alpha is not the rank.
        """
        lycoris, model = library("lycoris"), self.build()
        settings = {"linear_dim": 2, "linear_alpha": 3, **self.settings}
        adapter = lycoris.create_lycoris(model, 1.0, algo=self.algorithm, **settings)
        adapter.apply_to()
        randomised(adapter)
        file = folder / "hand.safetensors"
        adapter.save_weights(str(file), torch.float32, {})
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, layer in model.named_modules():
                if isinstance(layer, nn.Linear):
                    bias = layer(torch.zeros(1, layer.in_features))
                    found[f"{name}.bias"] = bias[0]
                    found[f"{name}.weight"] = (layer(torch.eye(layer.in_features)) - bias).T
            for norm in adapter.loras:
                if norm.name == "norm":
                    norm.merge_to(1.0)
        return file, dict(model.state_dict()) | found


LYCORIS = {
    "LoCon": Lycoris("lora"),
    "LoCon, diffusers names": Lycoris("lora", build=diffusers),
    "LoCon with a scalar": Lycoris("lora", {"use_scalar": True}),
    "LoCon with norms": Lycoris("lora", {"train_norm": True}),
    "DoRA by rows": Lycoris("lora", {"dora_wd": True}),
    "DoRA by columns": Lycoris("lora", {"dora_wd": True, "wd_on_output": False}),
    "DoRA by columns, diffusers names": Lycoris(
        "lora", {"dora_wd": True, "wd_on_output": False}, diffusers
    ),
    "LoHa": Lycoris("loha"),
    "LoHa with DoRA": Lycoris("loha", {"dora_wd": True}),
    "LoKr": Lycoris("lokr"),
    "LoKr, diffusers names": Lycoris("lokr", build=diffusers),
    "LoKr, factor 4": Lycoris("lokr", {"factor": 4}),
    "LoKr, unbalanced": Lycoris("lokr", {"unbalanced_factorization": True}),
    "LoKr, both factors decomposed": Lycoris("lokr", {"linear_dim": 1, "decompose_both": True}),
    "LoKr, both factors whole": Lycoris("lokr", {"full_matrix": True}),
    "LoKr with DoRA": Lycoris("lokr", {"dora_wd": True}),
    "full difference": Lycoris("full"),
}


@pytest.mark.parametrize("variant", LYCORIS)
def test_lycoris(tmp_path: Path, variant: str) -> None:
    file, merged = LYCORIS[variant].write(tmp_path)
    assert difference(file, as_official(merged)) <= TOLERANCE


LYCORIS_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "GLoRA": ("glora", {}),
    "OFT": ("diag-oft", {}),
    "(IA)³": ("ia3", {}),
    "T-LoRA": ("tlora", {}),
}


@pytest.mark.parametrize("method", LYCORIS_REFUSED)
def test_other_methods_of_lycoris_are_refused_by_name(tmp_path: Path, method: str) -> None:
    algorithm, settings = LYCORIS_REFUSED[method]
    file, _ = Lycoris(algorithm, settings, one_layer).write(tmp_path)

    assert refusal(file).startswith(f"hand.safetensors was made with {method}, which is")


def test_the_documentation_names_every_variant() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    rows = set(re.findall(r"^\| (.+?) \| (.+?) \|", page, re.MULTILINE))
    (refused,) = (names for names, writer in rows if writer == "peft" and "AdaLoRA" in names)

    assert {(name, "peft") for name in PEFT} <= rows
    assert {(name, "LyCORIS") for name in LYCORIS} <= rows
    assert set(PEFT_REFUSED) <= set(refused.split(", "))
