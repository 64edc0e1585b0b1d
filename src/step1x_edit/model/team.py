"""Processes that make one edit together, each on its own device: what each of them computes.

Prompt and negative prompt are *branches*, which may run in different processes (CFG-parallel).
Several processes may also share a branch: each has a *part* of its rows, and only attention needs
all of them. For it they exchange rows for heads and back ("DeepSpeed Ulysses", arXiv 2309.14509).
Everything between two steps each process does for itself, with the same numbers.

Before and after the network runs, the processes agree that all continue. One that fails or stops
takes part in the next agreement, so that none waits for it. If it fails inside the network while
others wait for its rows, the team is broken, and its processes must end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

B = TypeVar("B")


class PartedError(Exception):
    """Another process of the team has stopped."""


@dataclass
class Team:
    """The processes of an edit as one of them sees them; by default it is alone."""

    rank: int = 0
    """The processes are numbered, those of a branch in a row."""
    num_branches: int = 1
    """1: each process runs all branches."""
    num_parts: int = 1
    everyone: ProcessGroup | None = None
    peers: ProcessGroup | None = None
    """The processes with the parts of this one's branch."""
    device: torch.device | None = None
    """Where they exchange; None: in host memory."""
    num_threads: int | None = None
    """The threads of a CPU that this process may use in the steps; None: as many as outside."""
    is_broken: bool = False
    """Whether the others may wait for this process for ever."""
    _is_together: bool = False

    def branches(self, branches: Sequence[B]) -> Sequence[B]:
        """Those that this process runs."""
        if self.num_branches == 1:
            return branches
        return [branches[self.rank // self.num_parts]]

    def rows(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's part of the rows of x, which are counted along `dim`."""
        return x.tensor_split(self.num_parts, dim)[self.rank % self.num_parts]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make the steps of an edit in here; if it ends early, the others are told."""
        self._is_together = self.everyone is not None
        try:
            with self._threads():
                yield
        finally:
            if self._is_together:
                self._agree(goes_on=False)

    def go_on(self) -> None:
        """Continue if all do. Raises PartedError."""
        if self._is_together and not self._agree(goes_on=True):
            raise PartedError

    def join(self, work: Callable[[], Tensor], num_rows: int) -> Tensor:
        """The velocities (branches, N, C) of N rows, of which `work` computes this process's part.

        Raises what `work` raises, and PartedError if that of another process has failed.
        """
        if self.everyone is None:
            return work()
        try:
            mine = work()  # (branches, N/parts, C)
        except BaseException:
            if self.num_parts > 1:
                self.is_broken, self._is_together = True, False
            raise
        self.go_on()
        sizes = _sizes(num_rows, self.num_parts)
        padded = F.pad(mine, (0, 0, 0, sizes[0] - mine.shape[1])).contiguous()
        found = [torch.empty_like(padded) for _ in range(self.everyone.size())]
        with self.exchanging() as dist:
            dist.all_gather(found, padded, self.everyone)
        parts = [x[:, :size] for x, size in zip(found, sizes * self.num_branches, strict=True)]
        whole = [parts[i : i + self.num_parts] for i in range(0, len(parts), self.num_parts)]
        return torch.cat([torch.cat(each, dim=1) for each in whole])

    def _agree(self, *, goes_on: bool) -> bool:
        """Whether every process goes on; each must say whether it does."""
        leaving = torch.tensor([not goes_on], dtype=torch.int32, device=self.device)
        with self.exchanging() as dist:
            dist.all_reduce(leaving, dist.ReduceOp.MAX, self.everyone)
            self._is_together = not leaving.item()
        return self._is_together

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        if self.num_threads is None:
            yield
            return
        torch.set_num_threads(self.num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[Any]:
        """Lend torch's collectives; if one fails, a process has died."""
        import torch.distributed as dist

        try:
            yield dist
        except RuntimeError:
            self.is_broken, self._is_together = True, False
            raise


class Cut:
    """A sequence whose rows are cut among the processes of a branch."""

    def __init__(self, team: Team, streams: Sequence[int], device: torch.device) -> None:
        """`streams` are the rows of its pieces, the text first; each process has a part of each."""
        self._team = team
        rows = torch.arange(sum(streams), device=device)
        parts = [piece.tensor_split(team.num_parts) for piece in torch.split(rows, list(streams))]
        of_each = [torch.cat(own) for own in zip(*parts, strict=True)]
        mine = team.rank % team.num_parts
        self.text_rows = len(parts[0][mine])
        """How many of this process's rows are text."""
        self._sizes = [len(own) for own in of_each]
        self._by_process = torch.cat(of_each)
        self._in_order = self._by_process.argsort()
        self._mine = self._sizes[mine]

    def to_heads(self, x: Tensor) -> Tensor:
        """Give all heads of some rows for some heads of all: (K, B, H, n, d) to (…, L, d)."""
        parts = self._team.num_parts
        k, b, h, n, d = x.shape
        sent = x.view(k, b, parts, h // parts, n, d).movedim(2, 0)
        shapes = [[k, b, h // parts, size, d] for size in self._sizes]
        received = self._exchange(list(sent), shapes)
        return torch.cat(received, dim=3).index_select(3, self._in_order)

    def to_rows(self, x: Tensor) -> Tensor:
        """The reverse, (B, H/parts, L, d) to (B, H, n, d)."""
        sent = torch.split(x.index_select(2, self._by_process), self._sizes, dim=2)
        shape = [*x.shape[:2], self._mine, x.shape[3]]
        return torch.cat(self._exchange(sent, [shape] * self._team.num_parts), dim=1)

    def _exchange(self, sent: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send one tensor to each process, and receive one of these shapes from each."""
        sizes = [math.prod(shape) for shape in shapes]
        flat = torch.cat([each.reshape(-1) for each in sent])
        received = flat.new_empty(sum(sizes))
        with self._team.exchanging() as dist:
            dist.all_to_all_single(
                received, flat, sizes, [each.numel() for each in sent], group=self._team.peers
            )
        parts = torch.split(received, sizes)
        return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def parts_of(num_processes: int) -> int:
    """Among how many of these a branch is divided: each branch has a half, if that is possible."""
    return num_processes if num_processes % 2 else num_processes // 2


def _sizes(number: int, parts: int) -> list[int]:
    """How many of `number` rows each part has, as `tensor_split` cuts them."""
    return [number // parts + (part < number % parts) for part in range(parts)]
