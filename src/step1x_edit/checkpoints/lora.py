"""LoRA files: low-rank changes of the transformer's weights.

Two formats are read, distinguished by their keys:

    kohya   lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, …lora_up.weight, ….alpha
    peft    transformer.transformer_blocks.0.attn.to_q.lora_A.weight, …lora_B.weight

In the peft format modules may have the names of either layout of the weights. Weights that a file
does not mention are unchanged.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from step1x_edit import foreign_json
from step1x_edit.checkpoints.keymap import Link, some_of
from step1x_edit.checkpoints.stored import refuse_pickle
from step1x_edit.errors import CheckpointError
from step1x_edit.lora_names import lora_name

log = logging.getLogger(__name__)

_KEY: Final = re.compile(
    r"(?P<module>.+)\.(?:(?P<down>lora_down|lora_A)|(?P<up>lora_up|lora_B))(?:\.default)?\.weight"
)
_ALPHA: Final = re.compile(r"(?P<module>.+)\.alpha")
_KOHYA_PREFIX: Final = "lora_unet_"
_PEFT_PREFIXES: Final = ("base_model.model.", "transformer.", "diffusion_model.")
_OTHER_METHODS: Final = re.compile(r"dora_scale|lora_magnitude_vector|hada_w|lokr_w|lora_mid")
_PART: Final = "transformer."

KEPT: Final = 2
"""The number of files whose matrices stay in memory while they are not in the model."""

Stamp: TypeAlias = tuple[int, int] | None
"""Modification time and size of a file, to detect a new one; None if there is no file."""

Mark: TypeAlias = tuple[str, Stamp, float]
"""A file by its name and stamp, and its strength."""


@dataclass(frozen=True)
class LowRank:
    """The change of one matrix, as the product of two low-rank ones."""

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    alpha: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix that it changes."""
        return self.up.shape[0], self.down.shape[1]

    def delta(self) -> Tensor:
        """The delta at full strength, (out, in) in float32."""
        return self.alpha / self.down.shape[0] * (self.up.float() @ self.down.float())


@dataclass(frozen=True)
class Lora:
    """The changes of one file, by weight names in the layout that the file uses."""

    name: str
    changes: Mapping[str, LowRank]

    def concerns(self, link: Link) -> bool:
        """Whether an official weight has a delta."""
        return any(name in self.changes for name in (link.official, *link.diffusers))

    def delta(self, link: Link) -> Tensor | None:
        """The delta of an official weight, in float32; None if it has none."""
        if link.official in self.changes:
            return self.changes[link.official].delta()
        found = [self.changes.get(name) for name in link.diffusers]
        known = next((change for change in found if change is not None), None)
        if known is None:
            return None
        rows = link.rows or (known.shape[0],)
        return link.join(
            [
                torch.zeros(count, known.shape[1]) if change is None else change.delta()
                for change, count in zip(found, rows, strict=True)
            ]
        )


@dataclass(frozen=True)
class Changes:
    """The combined deltas of some files at their strengths, for the weights of the whole model."""

    parts: tuple[tuple[Lora, Mark], ...] = ()
    links: Mapping[str, Link] = field(default_factory=dict)
    """By the official names of the transformer's weights."""

    @property
    def marks(self) -> tuple[Mark, ...]:
        """The files and their strengths."""
        return tuple(mark for _, mark in self.parts)

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of each file, by its name; none of them is 0."""
        return {name: strength for name, _, strength in self.marks}

    def marks_of(self, weights: Iterable[str]) -> tuple[Mark, ...]:
        """The LoRAs that affect these weights. Equal marks mean equal results."""
        links = [link for link in map(self._link, weights) if link is not None]
        return tuple(mark for lora, mark in self.parts if any(map(lora.concerns, links)))

    def delta_of(self, weight: str) -> Tensor | None:
        """The delta of a weight, in float32; None if it has none."""
        return None if self._link(weight) is None else self._deltas(weight.removeprefix(_PART))

    @cached_property
    def _deltas(self) -> Callable[[str], Tensor | None]:
        return deltas([(lora, mark[2]) for lora, mark in self.parts], self.links.values())

    def _link(self, weight: str) -> Link | None:
        return self.links.get(weight.removeprefix(_PART)) if weight.startswith(_PART) else None


class Loras:
    """The files that can be added to a model, by name; each is read at its first use."""

    def __init__(
        self,
        files: Mapping[Path, float] | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        links: Sequence[Link] = (),
    ) -> None:
        """`files` with their default strengths.

        `shapes` are those of the transformer's official weights. Nothing is read.
        """
        self._files = {lora_name(path): path for path in files or {}}
        self._usual = {lora_name(path): strength for path, strength in (files or {}).items()}
        self._shapes = shapes or {}
        self._links = links
        self._links_by_name = {link.official: link for link in links}
        self._read: dict[tuple[str, Stamp], Lora] = {}  # the last used one comes last

    def marks(self, strengths: Mapping[str, float] | None = None) -> tuple[Mark, ...]:
        """The current files for these strengths; None selects the defaults.

        Always in the same order, because sums of rounded numbers depend on it. Raises
        InvalidParameterError for an unknown name.
        """
        wanted = self._usual if strengths is None else strengths
        if not wanted.keys() <= self._files.keys():
            # Only for the sentence of the error: the import takes 0.2 s, and a worker waits for it.
            from step1x_edit.schemas.requests import check_loras

            check_loras(wanted, self._files)
        return tuple(
            (name, _stamp(self._files[name]), strength)
            for name, strength in sorted(wanted.items())
            if strength != 0
        )

    def changes(self, strengths: Mapping[str, float] | None = None) -> Changes:
        """The deltas for these strengths; files that are not yet in memory are read.

        Raises CheckpointError for a file that cannot be read or does not fit.
        """
        parts = [
            (self._lora(name, stamp), (name, stamp, strength))
            for name, stamp, strength in self.marks(strengths)
        ]
        for key in list(self._read)[: -(KEPT + len(parts))]:
            del self._read[key]
        return Changes(tuple(parts), self._links_by_name)

    def _lora(self, name: str, stamp: Stamp) -> Lora:
        lora = self._read.pop((name, stamp), None)
        if lora is None:
            lora = read_lora(self._files[name], self._shapes, self._links)
        if stamp is not None:
            self._read[name, stamp] = lora
        return lora


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def read_lora(path: Path, shapes: Mapping[str, Sequence[int]], links: Sequence[Link]) -> Lora:
    """Read a file for a transformer with these official shapes. Raises CheckpointError.

    Keys that do not belong to the transformer, such as those for a text encoder, are left out and
    logged; a file with no other keys is refused.
    """
    tensors, alpha_of_all = _read(path)
    names = _module_names(links)
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if _OTHER_METHODS.search(key):
            raise CheckpointError(f"{path.name} is not a plain LoRA: it has tensors like {key}")
        module, role = _parsed(key)
        weight = names.get(module)
        if weight is None:
            unknown.append(key)
        else:
            parts.setdefault(weight, {})[role] = tensor
    if not parts:
        raise CheckpointError(f"{path.name} is not a LoRA for Step1X-Edit: {some_of(tensors)}")
    if unknown:
        log.warning("%s: not for the transformer and left out: %s", path.name, some_of(unknown))
    changes = {name: _low_rank(path, name, found, alpha_of_all) for name, found in parts.items()}
    lora = Lora(lora_name(path), changes)
    _check_shapes(path, lora, shapes, links)
    return lora


def deltas(
    loras: Sequence[tuple[Lora, float]], links: Iterable[Link]
) -> Callable[[str], Tensor | None]:
    """The combined delta of several files at their strengths for one official weight, by name."""
    links_by_name = {link.official: link for link in links}

    def delta_of(name: str) -> Tensor | None:
        if name not in links_by_name:
            return None
        found = [(lora.delta(links_by_name[name]), strength) for lora, strength in loras]
        parts = [strength * delta for delta, strength in found if delta is not None]
        return torch.stack(parts).sum(dim=0) if parts else None

    return delta_of


def _read(path: Path) -> tuple[dict[str, Tensor], float | None]:
    """The tensors, and the alpha that peft stores separately for all modules."""
    refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    alpha = None
    beside = path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in metadata:
            config = foreign_json.parse(metadata["lora_adapter_metadata"])
            alpha = config.get("transformer.lora_alpha", config.get("lora_alpha"))
        elif beside.is_file():
            alpha = foreign_json.parse(beside.read_text("utf-8")).get("lora_alpha")
        return tensors, None if alpha is None else float(alpha)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the settings of {path.name} cannot be read: {error}") from error


def _module_names(links: Iterable[Link]) -> dict[str, str]:
    """The module names that files use, and the names of their weights."""
    names = {}
    for link in links:
        for weight in (link.official, *link.diffusers):
            if weight.endswith(".weight"):
                module = weight.removesuffix(".weight")
                names[module] = weight
                names[_KOHYA_PREFIX + module.replace(".", "_")] = weight
    return names


def _parsed(key: str) -> tuple[str, str]:
    """The module that a key belongs to, and which of its tensors it names."""
    match = _KEY.fullmatch(key)
    if match:
        module, role = match["module"], "down" if match["down"] else "up"
    elif match := _ALPHA.fullmatch(key):
        module, role = match["module"], "alpha"
    else:
        return key, ""
    for prefix in _PEFT_PREFIXES:
        module = module.removeprefix(prefix)
    return module, role


def _low_rank(
    path: Path, name: str, found: Mapping[str, Tensor], alpha_of_all: float | None
) -> LowRank:
    if not {"down", "up"} <= found.keys():
        raise CheckpointError(f"{path.name} has only a part of the change of {name}")
    down, up = found["down"], found["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.numel():
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise CheckpointError(f"{path.name} changes {name} by matrices that do not fit: {shapes}")
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise CheckpointError(f"{path.name} changes {name} by numbers that are not finite")
    alpha = alpha_of_all
    if "alpha" in found:
        if found["alpha"].numel() != 1:
            raise CheckpointError(f"{path.name} has no single alpha for {name}")
        alpha = float(found["alpha"])
    return LowRank(down, up, float(down.shape[0]) if alpha is None else alpha)


def _check_shapes(
    path: Path, lora: Lora, shapes: Mapping[str, Sequence[int]], links: Iterable[Link]
) -> None:
    for link in links:
        expected = {link.official: tuple(shapes.get(link.official, ()))}
        rows = link.rows or expected[link.official][:1] * len(link.diffusers)
        for name, count in zip(link.diffusers, rows, strict=True):
            expected.setdefault(name, (count, *expected[link.official][1:]))
        for name, shape in expected.items():
            change = lora.changes.get(name)
            if change is not None and change.shape != shape:
                raise CheckpointError(
                    f"{path.name} changes {name} as {change.shape}, but it is {shape}: "
                    "it was made for another model"
                )
