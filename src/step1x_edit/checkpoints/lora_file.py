"""Reading a LoRA, or an adapter of another method, from a file.

A key names a module, in one of many spellings, and the role of its tensor:

    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight          kohya
    transformer.transformer_blocks.0.attn.to_q.lora_A.weight         diffusers, with a prefix
    base_model.model.double_blocks.0.img_mlp.0.lokr_w1               peft

A file is read whole or refused: a tensor of a known module that no method explains is an error.
Weights that a file does not mention are unchanged.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from step1x_edit import foreign_json
from step1x_edit.checkpoints.dialects import PREFIX
from step1x_edit.checkpoints.keymap import Link, some_of
from step1x_edit.checkpoints.lora_methods import Base, Change, Found, Scale, changes
from step1x_edit.checkpoints.stored import DTYPES, is_gguf, refuse_pickle, shortened
from step1x_edit.errors import CheckpointError
from step1x_edit.lora_names import PEFT_STEM, lora_name, shown_file

log = logging.getLogger(__name__)

_UNDERSCORED: Final = ("lora_unet_", "lora_transformer_", "lycoris_")
"""What tools put before the name of a module whose dots are underscores."""

_LONGEST_KEY: Final = 1000  # characters; the time to split one grows with the square
_LARGEST_FACTOR: Final = 1e6  # those in use are below 100
_ADAPTER: Final = r"(\.[^.]+)?"  # its name, in the keys of a whole peft model
_FACTORS: Final = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
)
_ROLES: Final = {
    "down": rf"lora_down\.weight|lora_A{_ADAPTER}\.weight|lora\.down\.weight",
    "up": rf"lora_up\.weight|lora_B{_ADAPTER}\.weight|lora\.up\.weight",
    **{f"down_{i}": rf"lora_down\.{i}\.weight" for i in range(4)},
    **{f"up_{i}": rf"lora_up\.{i}\.weight" for i in range(4)},
    "up_bias": rf"lora_up\.bias|lora_B{_ADAPTER}\.bias",
    "alpha": r"alpha",
    "magnitude": rf"dora_scale|magnitude|lora_magnitude_vector{_ADAPTER}(\.weight)?",
    **{factor: rf"{factor}{_ADAPTER}" for factor in _FACTORS},
    "diff": r"((weight|scale)\.)?diff|w_norm",
    "diff_b": r"diff_b|b_norm",
    "whole": rf"(base_layer\.|modules_to_save{_ADAPTER}\.)?(weight|scale)",
    "whole_b": rf"(base_layer\.|modules_to_save{_ADAPTER}\.)?bias",
    "": r"lora_(velora|monteclora)_.*",  # of training only
}
"""The role of a tensor, by what follows the name of its module."""

_OTHER_METHODS: Final = {
    r"(a1|a2|b1|b2|bm)\.weight|glora_": "GLoRA",
    r"lambda_layer|[pq]_layer\.": "T-LoRA",
    r"on_input|ia3_": "(IA)³",
    r"lora_E|ranknum": "AdaLoRA",
    r"lora_diag": "KaSA",
    r"lora_mid|hada_t|lokr_t": "a Tucker decomposition",
    r"oft_blocks|oft_R": "OFT",
    r"processor\.(qkv|proj)_lora": "the scripts of XLabs",
    r"reshape_weight|set_weight": "a patch of ComfyUI",
    **{
        f"{name.replace('-', '').replace(' ', '_').lower()}_": name
        for name in (
            *("AdaMSS", "BEFT", "BOFT", "C3A", "DEFT", "DeLoRA", "FourierFT", "FRoD", "GraLoRA"),
            *("HiRA", "HRA", "Lily", "LN tuning", "MiSS", "OSF", "PEANuT", "PSOFT", "PVeRA"),
            *("RandLoRA", "RoAd", "SHiRA", "Supertuning", "TinyLoRA", "Trainable tokens"),
            *("UniLoRA", "VB-LoRA", "VeRA", "WaveFT"),
        )
    },
}
"""Methods that are not read, by what follows a dot in their keys."""

_OTHER_SETTINGS: Final = {
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "use_bdlora": "BD-LoRA",
    "layer_replication": "layer replication",
}
_CHANGES_THE_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to initialise a LoRA that subtract it from the weights, which are then not the model's."""

_DIFFSYNTH: Final = {
    "img_attn.qkv": "attn.a_to_qkv",
    "txt_attn.qkv": "attn.b_to_qkv",
    "img_attn.proj": "attn.a_to_out",
    "txt_attn.proj": "attn.b_to_out",
    "img_mlp.0": "ff_a.0",
    "img_mlp.2": "ff_a.2",
    "txt_mlp.0": "ff_b.0",
    "txt_mlp.2": "ff_b.2",
    "img_mod.lin": "norm1_a.linear",
    "txt_mod.lin": "norm1_b.linear",
    "linear1": "to_qkv_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}
"""DiffSynth-Studio's names for modules of a block that the official layout has too."""


@dataclass(frozen=True)
class Lora:
    """The changes of one file, by weight names in the layout that the file uses."""

    name: str
    changes: Mapping[str, Change]

    def concerns(self, link: Link) -> bool:
        """Whether an official weight has a delta."""
        return any(name in self.changes for name in (link.official, *link.diffusers))

    def delta(self, link: Link, base: Base) -> Tensor | None:
        """The delta of an official weight, in float32; None if it has none."""
        if link.official in self.changes:
            return self.changes[link.official].delta(base)
        found = [self.changes.get(name) for name in link.diffusers]
        known = next((change for change in found if change is not None), None)
        if known is None:
            return None
        rows = link.rows or (known.shape[0],)
        return link.join(
            [
                torch.zeros(count, *known.shape[1:])
                if change is None
                else change.delta(functools.partial(_part_of, link, base, part))
                for part, (change, count) in enumerate(zip(found, rows, strict=True))
            ]
        )


def _part_of(link: Link, base: Base, part: int) -> Tensor:
    """The unchanged counterpart of an official weight."""
    return link.split(base())[part]


def read_lora(path: Path, shapes: Mapping[str, Sequence[int]], links: Sequence[Link]) -> Lora:
    """Read a file for a transformer with these official shapes. Raises CheckpointError.

    Keys that do not belong to the transformer, such as those for a text encoder, are left out and
    logged; a file with no other keys is refused.
    """
    refuse_pickle(path)
    if is_gguf(path):
        raise CheckpointError(
            f"{shown_file(path)}: a LoRA in GGUF is not supported; use it as safetensors"
        )
    modules = _modules(links)
    try:
        with safe_open(path, framework="pt") as opened:
            keys = _recognised(path, list(opened.keys()), modules)
            settings = _settings(path, opened.metadata() or {}, keys)
            found: dict[str, Found] = {}
            for key, (module, role) in keys.items():
                if role in found.setdefault(module, {}):
                    raise CheckpointError(
                        f"{shown_file(path)} changes {module} twice, also by {shortened(key)}"
                    )
                found[module][role] = opened.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    changed = {}
    for module, tensors in found.items():
        for parameter, change in _changes(path, module, tensors, settings):
            name = modules[module].get(parameter)
            if name is None or name in changed:
                problem = ", which it does not have" if name is None else " twice"
                raise CheckpointError(
                    f"{shown_file(path)} changes the {parameter} of {module}{problem}"
                )
            changed[name] = change
    lora = Lora(lora_name(path), changed)
    _check_shapes(path, lora, shapes, links)
    return lora


def _modules(links: Iterable[Link]) -> dict[str, dict[str, str]]:
    """The modules of both layouts, and the names of their weight and bias."""
    modules: dict[str, dict[str, str]] = {}
    for link in links:
        for name in (link.official, *link.diffusers):
            module, _, parameter = name.rpartition(".")
            kind = "bias" if parameter == "bias" else "weight"  # a norm has "scale"
            modules.setdefault(module, {})[kind] = name
    return modules


def _spellings(modules: Iterable[str]) -> dict[str, str]:
    """The modules, by their names in files; `PREFIX` comes before the names with dots."""
    names = {}
    for module in modules:
        names[module] = module
        underscored = module.replace(".", "_")
        names.update((prefix + underscored, module) for prefix in _UNDERSCORED)
        kind, *rest = module.split(".", 2)
        if kind in ("double_blocks", "single_blocks") and rest[-1] in _DIFFSYNTH:
            start = "blocks" if kind == "double_blocks" else kind
            names[f"{start}.{rest[0]}.{_DIFFSYNTH[rest[-1]]}"] = module
    return names


def _recognised(
    path: Path, keys: Sequence[str], modules: Iterable[str]
) -> dict[str, tuple[str, str]]:
    """The module and the role of each key that is for the transformer."""
    names = _spellings(modules)
    known, others = {}, []
    for key in keys:
        if len(key) > _LONGEST_KEY:
            raise CheckpointError(
                f"{shown_file(path)} has a name that is too long: {shortened(key)}"
            )
        module, rest = _split(key, names)
        if module is None:
            others.append(key)
            continue
        role = _role(rest)
        if role is None:
            _refuse_method(path, [key, *keys])
            raise CheckpointError(
                f"{shown_file(path)} changes {module} in an unknown way: {shortened(key)}"
            )
        if role:
            known[key] = module, role
    if not known:
        _refuse_method(path, keys)
        raise CheckpointError(f"{shown_file(path)} is not a LoRA for Step1X-Edit: {some_of(keys)}")
    if {role for _, role in known.values()} <= {"whole", "whole_b"}:
        raise CheckpointError(
            f"{shown_file(path)} is no LoRA: it holds whole weights: {some_of(known)}"
        )
    if others:
        log.warning(
            "%s: not for the transformer and left out: %s", shown_file(path), some_of(others)
        )
    return known


def _split(key: str, names: Mapping[str, str]) -> tuple[str | None, str]:
    """The module of a key, and what follows its name."""
    match = PREFIX.match(key)
    module = key if match is None else key[match.end() :]
    rest = ""
    while "." in module:
        module, _, last = module.rpartition(".")
        rest = f"{last}.{rest}" if rest else last
        if module in names:
            return names[module], rest
    return None, key


@functools.cache
def _role(rest: str) -> str | None:
    return next((role for role, form in _ROLES.items() if re.fullmatch(form, rest)), None)


def _refuse_method(path: Path, keys: Iterable[str]) -> None:
    """Raise CheckpointError if keys are those of a method that is not read."""
    for key in keys:
        for form, method in _OTHER_METHODS.items():
            if re.search(rf"\.({form})", key):
                raise _made_with(path, method)


def _made_with(path: Path, method: str) -> CheckpointError:
    return CheckpointError(
        f"{shown_file(path)} was made with {method}, which is not supported: "
        "LoRA, DoRA, LoHa, LoKr and full differences are"
    )


@dataclass(frozen=True)
class _Settings:
    """What peft stores beside the tensors."""

    alpha: float | None = None
    rank: float | None = None
    alphas: Mapping[re.Pattern[str], float] = field(default_factory=dict)
    ranks: Mapping[re.Pattern[str], float] = field(default_factory=dict)
    """Of the modules whose names match."""
    is_rank_stabilised: bool = False

    def scale(self, module: str, rank: float | None) -> float:
        """The factor of a product of this rank. Raises ValueError if it makes no sense."""
        alpha = _of(module, self.alphas, self.alpha)
        if rank is None:
            rank = _of(module, self.ranks, self.rank)
        if alpha is None or not rank:
            return 1.0
        factor = alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)
        if abs(factor) > _LARGEST_FACTOR:
            raise ValueError(f"an alpha of {alpha:g} at rank {rank:g}, which is too large")
        return factor


def _of(module: str, some: Mapping[re.Pattern[str], float], usual: float | None) -> float | None:
    return next((value for form, value in some.items() if form.match(module)), usual)


def _by_pattern(values: Mapping[str, Any] | None) -> dict[re.Pattern[str], float]:
    """Values by what peft accepts as the end of a module's name."""
    return {_pattern(form): _finite(value) for form, value in (values or {}).items()}


def _pattern(form: str) -> re.Pattern[str]:
    """Matches a module whose name ends so. Raises ValueError for what could take hours to match."""
    repeats = len(re.findall(r"[*+?{]", form))
    if len(form) > 200 or max(repeats, form.count("(")) > 3 or re.search(r"\)[*+?{]", form):
        raise ValueError(f"the pattern {form} is too complicated")
    return re.compile(rf"(.*\.)?({form})$")


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value} is not a finite number")
    return number


def _settings(path: Path, metadata: Mapping[str, str], keys: Iterable[str]) -> _Settings:
    """The settings in the header, or in the file that peft writes beside its own."""
    is_of_peft = any("base_model.model." in key for key in keys)
    beside = path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in metadata:
            packed = foreign_json.parse(metadata["lora_adapter_metadata"])
            config = {key.removeprefix("transformer."): packed[key] for key in packed}
        elif is_of_peft and path.stem == PEFT_STEM and beside.is_file():
            config = foreign_json.parse(beside.read_text("utf-8"))
        else:
            if is_of_peft:
                log.warning(
                    "%s has no adapter_config.json: alpha is taken as rank", shown_file(path)
                )
            return _Settings()
        _refuse_settings(path, config)
        alpha, rank = config.get("lora_alpha", config.get("alpha")), config.get("r")
        return _Settings(
            None if alpha is None else _finite(alpha),
            None if rank is None else _finite(rank),
            _by_pattern(config.get("alpha_pattern")),
            _by_pattern(config.get("rank_pattern")),
            bool(config.get("use_rslora")),
        )
    except (AttributeError, OverflowError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(
            f"the settings of {shown_file(path)} cannot be read: {error}"
        ) from error


def _refuse_settings(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for what tensors with the names of a LoRA's do not say."""
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_THE_BASE):
        raise CheckpointError(
            f"{shown_file(path)} was initialised by {start} and is for a changed model: save it "
            "with peft's path_initial_model_for_weight_conversion"
        )
    for setting, method in _OTHER_SETTINGS.items():
        if config.get(setting):
            raise _made_with(path, method)


def _changes(
    path: Path, module: str, found: Found, settings: _Settings
) -> list[tuple[str, Change]]:
    """The changes of a module's parameters. Raises CheckpointError."""
    by = f"{shown_file(path)} changes {module} by"
    alpha = found.pop("alpha", None)
    for tensor in found.values():
        if not tensor.is_floating_point() or tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{by} numbers of the type {tensor.dtype}, whose scale is unknown"
            )
        if not tensor.ndim:
            raise CheckpointError(f"{by} a single number")
        if not _is_finite(tensor):
            raise CheckpointError(f"{by} numbers that are not finite")
    if alpha is not None and not (
        alpha.numel() == 1 and alpha.dtype in DTYPES.values() and _is_finite(alpha)
    ):
        raise CheckpointError(f"{shown_file(path)} has no single finite alpha for {module}")
    scale: Scale = functools.partial(settings.scale, module)
    if alpha is not None:
        scale = functools.partial(_Settings(float(alpha)).scale, module)
    try:
        made = list(changes(found, scale))
    except ValueError as error:
        raise CheckpointError(f"{by} {error}") from error
    except KeyError:
        made = []
    if found or not made:
        raise CheckpointError(f"{shown_file(path)} has only a part of the change of {module}")
    return made


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    # Faster than asking each number; torch cannot compare those of 8 bits.
    low, high = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()
    return math.isfinite(low) and math.isfinite(high)


def _check_shapes(
    path: Path, lora: Lora, shapes: Mapping[str, Sequence[int]], links: Iterable[Link]
) -> None:
    for link in links:
        whole = tuple(shapes.get(link.official, ()))
        rows = link.rows or whole[:1] * len(link.diffusers)
        expected = {
            name: (count, *whole[1:]) for name, count in zip(link.diffusers, rows, strict=True)
        }
        if (
            link.official in lora.changes
            and (expected.keys() - {link.official}) & lora.changes.keys()
        ):
            raise CheckpointError(f"{shown_file(path)} changes {link.official} in both layouts")
        expected[link.official] = whole
        for name, shape in expected.items():
            change = lora.changes.get(name)
            if change is not None and change.shape != shape:
                raise CheckpointError(
                    f"{shown_file(path)} changes {name} as {change.shape}, but it is {shape}: "
                    "it was made for another model"
                )
