"""What the processes of one edit have in common: how they meet, and the steps as a message.

They meet on the loopback device of one machine, at a port that the system chooses.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from safetensors.torch import load, save

from step1x_edit.channel import Denoise
from step1x_edit.model.denoising import Branch, DenoiseState, Encoded
from step1x_edit.model.pipeline import Plan
from step1x_edit.model.quantised import Code
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.team import Team, parts_of
from step1x_edit.model.transformer import QuotedText
from step1x_edit.settings import stay_on_this_machine
from step1x_edit.worker.arithmetic import threads_of
from step1x_edit.worker.memory import is_out_of_memory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LOST: Final = timedelta(days=1)
"""How long one waits for another: pipes tell of a death, and the engine ends what hangs."""
_CAUSE_S: Final = 5.0
"""If a process has died, the end of its pipe is seen within this time."""

End = Callable[[Exception], None]
"""Ends this process for a reason, which it reports."""


@dataclass
class Seat:
    """This process among those of its group."""

    rank: int
    size: int
    device: str
    port: int
    listener: int | None = None
    """The socket that listens at the port, if it is this process's."""
    _groups: tuple[ProcessGroup, ProcessGroup] | None = None

    def team(self, num_branches: int) -> Team:
        """The team that makes the steps of an edit with so many prompts; waits for the others."""
        parts = parts_of(self.size)
        if num_branches < self.size // parts and parts == 1:
            return Team()  # the others have nothing to do
        if self._groups is None:
            self._groups = self._meet(parts)
        everyone, peers = self._groups
        is_on_cpu = not self.device.startswith("cuda")
        device = None if is_on_cpu else torch.device(self.device)
        threads = threads_of(self.size) if is_on_cpu else None
        if num_branches < self.size // parts:
            return Team(self.rank, 1, parts, peers, peers, device, threads)
        return Team(self.rank, self.size // parts, parts, everyone, peers, device, threads)

    def ranks(self, num_branches: int) -> range:
        """The ranks of that team."""
        parts = parts_of(self.size)
        return range(min(num_branches, self.size // parts) * parts)

    def _meet(self, parts: int) -> tuple[ProcessGroup, ProcessGroup]:
        """The group of all processes, and of those that share a branch with this one."""
        import torch.distributed as dist

        stay_on_this_machine()
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1",
            self.port,
            self.size,
            is_master=self.listener is not None,
            timeout=_LOST,
            wait_for_workers=False,
            master_listen_fd=self.listener,
        )
        backend, device = "gloo", None
        if self.device.startswith("cuda"):
            backend, device = "nccl", torch.device(self.device)
        dist.init_process_group(
            backend,
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=_LOST,
            device_id=device,
        )
        # Every process takes part in making each group.
        branches = [range(first, first + parts) for first in range(0, self.size, parts)]
        groups = [dist.new_group(list(ranks), timeout=_LOST) for ranks in branches]
        assert dist.group.WORLD is not None
        return dist.group.WORLD, groups[self.rank // parts]


def leave_if_broken(team: Team, error: BaseException, end: End) -> None:
    """End this process if others of its team may wait for it for ever.

    If another one has died, that is reported first, and ends this one.
    """
    if team.is_broken and isinstance(error, Exception):
        if not is_out_of_memory(error):
            threading.Event().wait(_CAUSE_S)
        end(error)


def message_of(
    number: int,
    encoded: Encoded,
    state: DenoiseState,
    request: NetworkRequest,
    plan: Plan,
    code: Code | None,
) -> Denoise:
    """The steps that remain of an edit; `code`: of the layers in codes, if it uses them."""
    tensors = {"reference": encoded.reference, "latents": state.latents}
    tensors |= {f"known.{index}": velocity for index, (_, velocity) in enumerate(state.known)}
    for index, branch in enumerate(encoded.branches):
        tensors |= {f"{index}.embeds": branch.embeds, f"{index}.mask": branch.mask}
        if branch.quoted is not None:
            tensors[f"{index}.quoted"] = branch.quoted.embeds
            tensors[f"{index}.quoted_mask"] = branch.quoted.mask
        if branch.txt_ids is not None:
            tensors[f"{index}.txt_ids"] = branch.txt_ids
    stored = save({name: tensor.cpu().clone() for name, tensor in tensors.items()})
    asked = {each.name: getattr(request, each.name) for each in fields(NetworkRequest)}
    return Denoise(
        **{**asked, "image": None},
        number=number,
        tensors=np.frombuffer(stored, np.uint8),
        task={
            "size": (encoded.rows, encoded.columns),
            "origins": [_short(branch.origin) for branch in encoded.branches],
            "step": state.step,
            "times": [t for t, _ in state.known],
            "plan": asdict(plan),
            "code": code,
        },
    )


def task_of(message: Denoise) -> tuple[Encoded, DenoiseState, Plan]:
    """The encoded edit of such a message, its state and its plan."""
    assert message.tensors is not None
    task, tensors = message.task, load(message.tensors.tobytes())
    branches = []
    for index, origin in enumerate(task["origins"]):
        quoted = tensors.get(f"{index}.quoted")
        branches.append(
            Branch(
                tensors[f"{index}.embeds"],
                tensors[f"{index}.mask"],
                None if quoted is None else QuotedText(quoted, tensors[f"{index}.quoted_mask"]),
                tensors.get(f"{index}.txt_ids"),
                origin=origin,
            )
        )
    known = tuple((t, tensors[f"known.{index}"]) for index, t in enumerate(task["times"]))
    rows, columns = task["size"]
    return (
        Encoded(tensors["reference"], tuple(branches), rows, columns),
        DenoiseState(tensors["latents"], task["step"], known=known),
        Plan(**task["plan"]),
    )


def _short(origin: object) -> str:
    return hashlib.sha256(repr(origin).encode()).hexdigest()
