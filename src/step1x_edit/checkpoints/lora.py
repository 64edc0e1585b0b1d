"""The LoRAs that can be added to a model, and their combined changes at given strengths."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from step1x_edit.checkpoints.keymap import Link
from step1x_edit.checkpoints.lora_file import Lora, read_lora
from step1x_edit.checkpoints.lora_methods import Base
from step1x_edit.lora_names import lora_name

_PART: Final = "transformer."

KEPT: Final = 2
"""The number of files whose matrices stay in memory while they are not in the model."""

Stamp: TypeAlias = tuple[int, int] | None
"""Modification time and size of a file, to detect a new one; None if there is no file."""

Mark: TypeAlias = tuple[str, Stamp, float]
"""A file by its name and stamp, and its strength."""


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

    def delta_of(self, weight: str, base: Base) -> Tensor | None:
        """The delta of a weight, in float32; None if it has none."""
        link = self._link(weight)
        if link is None:
            return None
        return delta_of(link, [(lora, mark[2]) for lora, mark in self.parts], base)

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


def delta_of(link: Link, loras: Sequence[tuple[Lora, float]], base: Base) -> Tensor | None:
    """The combined delta of several files at their strengths for an official weight.

    Each of them is relative to the unchanged weight, so that their order does not matter.
    """
    base = functools.cache(base)
    found = [(lora.delta(link, base), strength) for lora, strength in loras]
    parts = [strength * delta for delta, strength in found if delta is not None]
    return torch.stack(parts).sum(dim=0) if parts else None
