"""The memory plan: which blocks of the model stay on the device, which are streamed, and which stay
on disk.

Every step of an edit runs all core blocks; the conditioner and the prologue run once. So device
memory is spent in this order: slots and the activations that any edit needs, core blocks, the
activations of a second branch, the conditioner, the prologue. Streamed core blocks are spread
evenly over the order of execution, so that their copies are too.

Host memory is spent by the same rule: the core, which each step reads, comes first; the
conditioner and the prologue, which an edit reads once, may stay on disk. This holds with and
without a device. For the replies of a model that thinks, the conditioner comes first, because each
token reads it.

A plan changes time and memory but not one bit of the picture, with one exception: if the host has
too little memory for the core, the disk is too slow to read the rest of it in each step, and no
precision is requested, the weights are rounded. Sizes are bytes; nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

from step1x_edit.schemas.plan import PlanStatus

if TYPE_CHECKING:
    from step1x_edit.schemas.requests import Precision

GB: Final = 1_000_000_000

# Estimates: none of them has been measured on a GPU yet.
FIXED: Final = int(1.15 * GB)
"""Context, library workspaces, tables."""
BRANCH: Final = int(1.1 * GB)
"""Activations of one branch at 1024 pixels."""
BRANCH_AT: Final = {512: int(0.4 * GB), 768: int(0.7 * GB), 1024: BRANCH}
"""The same by size level."""
RESERVE: Final = (int(0.4 * GB), 0.03)
"""Device memory reserved for other programs: bytes, or a share of the free memory if larger."""

HOST_RESERVE: Final = 4 * GB
"""Host memory reserved for pictures, libraries, blocks being copied and other programs; half of the
free memory if that is less."""
COMPUTING_RESERVE: Final = 7 * GB
"""The same for a host that also computes. Half of it is what an edit at 1024 pixels takes beside
the weights: in a step 1 GB per prompt, its modulation and two blocks from disk, or 1.6 GB in a
decoder in bfloat16, libraries, what is kept for the next edit, and what the allocator keeps. With a
decoder in float32, an edit at 1024 was measured to take 4.5 GB."""

FALLING: Final[Sequence[Precision]] = ("auto", "int8", "nf4")
"""The precisions to try, in this order, if none is requested."""

ALIGNMENT: Final = 256
MAX_SLOTS: Final = 3
MIN_SLOTS: Final = 2
ROOMY: Final = 10 * GB
"""With less device memory, a resident block is more useful than a third slot."""

STREAMABLE: Final = re.compile(
    r"conditioner\.(visual\.blocks\.\d+|language_model\.(embed_tokens|layers\.\d+)|lm_head)"
    r"|transformer\.connector\.S\.individual_token_refiner\.blocks\.\d+"
    r"|transformer\.double_blocks\.\d+(\.(img|txt)_mod)?"
    r"|transformer\.single_blocks\.\d+(\.modulation)?"
)
"""Blocks that exactly one module uses, so that it is known when they are needed."""


Use: TypeAlias = Literal["edit", "reply"]
"""What the model is used for: an edit, or a reply in words, as for thinking."""

_FIRST: Final[Mapping[Use, Sequence[str]]] = {
    "edit": ("core", "prologue", "conditioner"),
    "reply": ("conditioner", "core", "prologue"),
}
"""The components in the order in which they get host memory."""

LM_HEAD: Final = "conditioner.lm_head"
"""A block that only models have that write replies."""


class Sized(Protocol):
    """A block of the model, in execution order."""

    @property
    def name(self) -> str: ...

    @property
    def component(self) -> str: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class Rates:
    """How fast this machine is, as measured."""

    read: float
    """Bytes of exact weights per second that are read from disk."""
    step_s: float
    """The least seconds that a step computes: at 512 pixels, with one prompt."""


@dataclass(frozen=True)
class HostPlan:
    """The part of the model in host memory; all of it by default."""

    on_disk: frozenset[str] = frozenset()
    """Names of the blocks that an edit reads from disk each time they are needed."""
    on_disk_in_replies: frozenset[str] = frozenset()
    """The same while the model writes a reply."""
    precision: Precision = "auto"
    """Of the weights in host memory."""
    lockable: int | None = None
    """Bytes that may be page-locked; None is all of them."""
    size: int = 0
    """Bytes of the blocks in host memory, as planned for an edit."""
    core_share: float = 1.0
    """Share of the core's bytes that is in host memory."""
    free: int | None = None
    """Bytes that were free; None if unknown."""
    left_out: tuple[str, ...] = ()
    """The parts that stay on disk, in words."""
    reads: tuple[str, ...] = ()
    """What is read from disk when, in words."""
    is_rounded: bool = False
    """Whether the precision was lowered for lack of memory."""
    codes: str = ""
    """The file from which codes are read, and files that are not used, in words."""

    def out(self, use: Use) -> frozenset[str]:
        """Names of the blocks that stay on disk for this use."""
        return self.on_disk if use == "edit" else self.on_disk_in_replies

    def reason(self, is_passing: bool = True) -> str:
        """The plan in words; empty if nothing is unusual.

        `is_passing`: whether the blocks on disk are streamed in each edit.
        """
        return "; ".join(filter(None, (self._memory_reason(is_passing), self.codes)))

    def _memory_reason(self, is_passing: bool) -> str:
        if self.free is None:
            return ""
        found = [f"the weights are rounded to {self.precision}"] if self.is_rounded else []
        if is_passing:
            found += self.reads
        elif self.left_out:
            found.append(f"{_are_read(self.left_out)} whenever the model goes to the device")
        if not found:
            return ""
        return f"{self.free / GB:.0f} GB of memory are free: {'; '.join(found)}"


@dataclass(frozen=True)
class MemoryPlan:
    """The part of the model on the device, and how an edit runs there."""

    resident: frozenset[str]
    """Names of the blocks that stay; the others are streamed through the slots."""
    num_slots: int
    has_joint_branches: bool
    core_share: float
    """Share of the core's bytes that is resident."""
    peak: int
    """The most device memory that this is expected to need."""
    host: HostPlan = HostPlan()
    """The part in host memory."""

    @property
    def is_streaming(self) -> bool:
        """Whether blocks are streamed."""
        return self.num_slots > 0

    @property
    def reason(self) -> str:
        """The plan in words."""
        host = self.host.reason(is_passing=bool(self.host.on_disk - self.resident))
        return f"{self._device_reason}; {host}" if host else self._device_reason

    @property
    def _device_reason(self) -> str:
        if not self.is_streaming:
            return "everything fits"
        kept = f"{100 * self.core_share:.0f} % of the core"
        branches = "" if self.has_joint_branches else ", prompts one after the other"
        return (
            f"{kept} stays on the device, the rest passes through {self.num_slots} slots{branches}"
        )


def everything(blocks: Iterable[Sized]) -> MemoryPlan:
    """The plan for a device with enough memory."""
    blocks = list(blocks)
    names = frozenset(block.name for block in blocks)
    return MemoryPlan(names, 0, True, 1.0, _total(blocks) + FIXED + 2 * BRANCH)


def fitting(blocks: Iterable[Sized], free: int) -> MemoryPlan:
    """The plan for a device with `free` bytes; the smallest plan if they are too few."""
    blocks = list(blocks)
    usable = free - max(RESERVE[0], int(RESERVE[1] * free))
    whole = everything(blocks)
    if whole.peak <= usable:
        return whole
    num_slots = MAX_SLOTS if free >= ROOMY else MIN_SLOTS
    slots = num_slots * slot_size((block.size for block in blocks if _may_pass(block)), num_slots)
    fixed = _total(block for block in blocks if not _may_pass(block))
    room = usable - FIXED - BRANCH - slots - fixed
    resident = _spread(_passing(blocks, "core"), room)
    return _with_more(blocks, resident, num_slots, room - _total(resident))


def with_share(blocks: Iterable[Sized], core_share: float) -> MemoryPlan:
    """The plan that keeps about this share of the core, and nothing else that can be streamed."""
    blocks = list(blocks)
    core = _passing(blocks, "core")
    resident = _spread(core, int(core_share * _total(core)))
    return _with_more(blocks, resident, MIN_SLOTS, room=0)


def spared(size_level: int, has_joint_branches: bool) -> int:
    """Bytes by which an edit at this level stays below the peak of its plan, which is for 1024."""
    return (1 + has_joint_branches) * (BRANCH - BRANCH_AT.get(size_level, BRANCH))


def keepable(free: int, plan: MemoryPlan | None) -> int:
    """The part of `free` bytes that an edit may keep from step to step beside its activations.

    The model is where it computes already; without a plan that is host memory.
    """
    if plan is None:
        return free - min(COMPUTING_RESERVE, free // 2)
    reserve = max(RESERVE[0], int(RESERVE[1] * free))
    return max(0, free - reserve - FIXED - (1 + plan.has_joint_branches) * BRANCH)


def hosted(
    blocks_of: Callable[[Precision], Iterable[Sized]],
    free: int | None,
    *,
    reserve: int,
    lockable_share: float,
    measure: Callable[[], Rates],
    precisions: Sequence[Precision] = FALLING,
    converted: Sequence[Precision] = (),
) -> HostPlan:
    """The plan for a host with `free` bytes; None if unknown: then nothing stays on disk.

    `blocks_of` returns the blocks of the model in a precision. The first precision whose core fits
    is chosen, or the last one if none fits. Exact weights need not fit if the disk reads the rest
    of the core while a step computes: `measure` is called if something has to stay on disk.
    `converted` are those whose codes are in a file. If exact weights would not all fit, the first
    of these whose core fits is chosen.
    """
    room = None if free is None else free - min(reserve, free // 2)

    def core_fits(precision: Precision) -> bool:
        left_out = _left_on_disk(list(blocks_of(precision)), room, _FIRST["edit"])
        return all(block.component != "core" for block in left_out)

    exact = precisions[0]
    if converted and _left_on_disk(list(blocks_of(exact)), room, _FIRST["edit"]):
        precisions = [*filter(core_fits, converted)][:1] or precisions
    rates = None
    for precision in precisions:
        blocks = list(blocks_of(precision))
        out = {use: _left_on_disk(blocks, room, order) for use, order in _FIRST.items()}
        if out["edit"] and rates is None:
            rates = measure()
        core_out = _total(block for block in out["edit"] if block.component == "core")
        is_hidden = precision == "auto" and rates and core_out <= rates.read * rates.step_s
        if core_out == 0 or is_hidden:
            break
    size = _total(blocks)
    core = _total(block for block in blocks if block.component == "core")
    can_reply = any(block.name == LM_HEAD for block in blocks)
    return HostPlan(
        on_disk=_names(out["edit"]),
        on_disk_in_replies=_names(out["reply" if can_reply else "edit"]),
        precision=precision,
        lockable=None if free is None else int(lockable_share * free),
        size=size - _total(out["edit"]),
        core_share=1 - core_out / max(1, core),
        free=free,
        left_out=_parts(blocks, out["edit"]),
        reads=tuple(_in_words(blocks, out, rates if precision == precisions[0] else None)),
        is_rounded=precision != precisions[0],
    )


def slot_size(sizes: Iterable[int], num_slots: int) -> int:
    """Bytes of a slot for blocks of these sizes; the largest block may take all slots."""
    *others, largest = sorted(sizes) or [0]
    return _aligned(max(*others, -(-largest // num_slots), 0))


def plan_status(plan: MemoryPlan | None, precision: str, host: HostPlan) -> PlanStatus:
    """The plan as it is reported; without one the model computes in host memory."""
    if plan is None:
        reasons = ("the model computes in host memory", host.reason())
        return PlanStatus(
            resident_share=host.core_share,
            precision=precision,
            streaming=False,
            slots=0,
            joint_branches=True,
            reason="; ".join(filter(None, reasons)),
        )
    return PlanStatus(
        resident_share=plan.core_share,
        precision=precision,
        streaming=plan.is_streaming,
        slots=plan.num_slots,
        joint_branches=plan.has_joint_branches,
        reason=plan.reason,
        predicted_peak_gb=plan.peak / GB,
    )


def _with_more(
    blocks: Sequence[Sized], resident: Sequence[Sized], num_slots: int, room: int
) -> MemoryPlan:
    """The plan with these core blocks resident, and `room` spent on the rest."""
    core = _passing(blocks, "core")
    kept = list(resident)
    has_joint_branches = False
    if len(resident) == len(core):
        has_joint_branches = room >= BRANCH
        room -= BRANCH if has_joint_branches else 0
        for component in ("conditioner", "prologue"):
            for block in _passing(blocks, component):
                if block.size <= room:
                    kept.append(block)
                    room -= block.size
    fixed = [block for block in blocks if not _may_pass(block)]
    names = frozenset(block.name for block in (*fixed, *kept))
    passing = [block.size for block in blocks if block.name not in names]
    slots = num_slots * slot_size(passing, num_slots)
    branches = (1 + has_joint_branches) * BRANCH
    return MemoryPlan(
        resident=names,
        num_slots=num_slots if passing else 0,
        has_joint_branches=has_joint_branches,
        core_share=_total(resident) / max(1, _total(core)),
        peak=_total(fixed) + _total(kept) + slots + FIXED + branches,
    )


def _left_on_disk(blocks: Sequence[Sized], room: int | None, order: Sequence[str]) -> list[Sized]:
    """The blocks that do not fit into the room, in execution order.

    For an edit the core comes first, because each step reads it; then the prologue, which is read
    twice if the branches run one after the other.
    """
    if room is None:
        return []
    room -= _total(block for block in blocks if not _may_pass(block))
    out: set[str] = set()
    for component in order:
        parts = _passing(blocks, component)
        kept = _names(_spread(parts, room))
        room -= _total(block for block in parts if block.name in kept)
        out.update(block.name for block in parts if block.name not in kept)
        if out:
            room = 0  # some blocks of a less important component do not help
    return [block for block in blocks if block.name in out]


def _in_words(
    blocks: Sequence[Sized], out: Mapping[Use, Sequence[Sized]], rates: Rates | None
) -> Iterator[str]:
    """What stays on disk and, if the rates apply to this precision, how long it takes to read."""
    if not out["edit"]:
        return

    def read(found: Sequence[Sized]) -> str:
        size = f"{_total(found) / GB:.1f} GB"
        return size if rates is None else f"{size}, about {_total(found) / rates.read:.0f} s"

    once = [block for block in out["edit"] if block.component != "core"]
    if once:
        yield f"{_are_read(_parts(blocks, once))} for each edit ({read(once)})"
    if core := [block for block in out["edit"] if block.component == "core"]:
        step = "" if rates is None else f"; a step computes for at least {rates.step_s:.0f} s"
        yield f"{_are_read(_parts(blocks, core))} in each step ({read(core)}{step})"
    if any(block.name == LM_HEAD for block in blocks):
        swapped = [block for block in blocks if block.component == "conditioner"]
        yield f"before a reply the conditioner takes the place of the core ({read(swapped)})"
        if rest := [block for block in out["reply"] if block.component == "conditioner"]:
            yield f"a part of it is read from disk for each token ({read(rest)})"


def _parts(blocks: Sequence[Sized], on_disk: Sequence[Sized]) -> tuple[str, ...]:
    """The parts that stay on disk, in words."""
    parts = []
    for component in ("conditioner", "prologue", "core"):
        out = [block for block in on_disk if block.component == component]
        if out:
            is_whole = len(out) == len(_passing(blocks, component))
            parts.append(f"the {component}" if is_whole else f"a part of the {component}")
    return tuple(parts)


def _are_read(parts: Sequence[str]) -> str:
    return f"{' and '.join(parts)} {'are' if len(parts) > 1 else 'is'} read from disk"


def _spread(blocks: Sequence[Sized], room: int) -> list[Sized]:
    """As many blocks as fit, spread evenly over the order."""
    for count in range(len(blocks), 0, -1):
        chosen = {i * len(blocks) // count for i in range(count)}
        left = room - _total(blocks[i] for i in chosen)
        if left >= 0:
            break
    else:
        chosen, left = set(), room
    for i, block in enumerate(blocks):  # blocks differ in size: a small one may still fit
        if i not in chosen and block.size <= left:
            chosen.add(i)
            left -= block.size
    return [blocks[i] for i in sorted(chosen)]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _passing(blocks: Iterable[Sized], component: str) -> list[Sized]:
    """The blocks of a component that can be streamed."""
    return [block for block in blocks if block.component == component and _may_pass(block)]


def _may_pass(block: Sized) -> bool:
    return STREAMABLE.fullmatch(block.name) is not None


def _names(blocks: Iterable[Sized]) -> frozenset[str]:
    return frozenset(block.name for block in blocks)


def _total(blocks: Iterable[Sized]) -> int:
    return sum(block.size for block in blocks)
