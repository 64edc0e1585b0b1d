"""Several processes make the steps of an edit together. Threads stand in for them here.

Only the way in which they exchange is that of processes: gloo, over sockets.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from step1x_edit.model.config import V1_1
from step1x_edit.model.pipeline import EditPipeline, Plan
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.team import PartedError, Team
from tiny import EVEN, a_picture, assemble, tiny_pipeline, tiny_pipeline_v1_2

T = TypeVar("T")

REQUEST = NetworkRequest(
    image=a_picture(),
    prompt="make it night",
    negative_prompt="a scene",
    num_steps=5,
    guidance_scale=6.0,
    size_level=64,
    seed=3,
)


def in_team(num_branches: int, num_parts: int, work: Callable[[Team], T]) -> list[T]:
    """What each process of a team returns."""
    store = dist.HashStore()  # type: ignore[attr-defined]

    def group(name: str, rank: int, size: int) -> dist.ProcessGroup:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=60)
        ours = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
        made = dist.ProcessGroup(ours, rank, size)
        gloo, kind = dist.ProcessGroupGloo(ours, rank, size, options), made.BackendType.GLOO
        made._set_default_backend(kind)
        made._register_backend(torch.device("cpu"), kind, gloo)
        return made

    def run(rank: int) -> T:
        branch, part = divmod(rank, num_parts)
        everyone = group("everyone", rank, num_branches * num_parts)
        peers = group(f"branch {branch}", part, num_parts)
        torch.set_num_threads(1)  # of this thread
        return work(Team(rank, num_branches, num_parts, everyone, peers))

    with ThreadPoolExecutor(num_branches * num_parts) as pool:
        return list(pool.map(run, range(num_branches * num_parts)))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums of several threads differ from those of one by more than the parts of a team do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def a_pipeline(**changes: Any) -> EditPipeline:
    """A pipeline with a transformer of other sizes, and steps that may be skipped."""
    tiny = tiny_pipeline()
    config = replace(tiny.config, transformer=replace(tiny.config.transformer, **changes))
    pipeline = assemble(tiny.conditioner, config)
    pipeline.profile = replace(EVEN, has_regions=True)
    return pipeline


@torch.inference_mode()
def latents(
    pipeline: EditPipeline, request: NetworkRequest, team: Team, steps: int = 0
) -> Tensor | None:
    """The latents at the end of the steps, or after fewer; None if another process has stopped."""
    mine = copy.copy(pipeline)
    mine.team_for = lambda *_: team
    encoded = mine.encode(request)
    start = mine.start(encoded, request.seed)
    states = mine.denoise(encoded, start, request, Plan(has_joint_branches=False, keepable=10**9))
    try:
        with contextlib.closing(states):
            for state in states:
                if state.step == steps:
                    break
    except PartedError:
        return None
    return state.latents


MASK = np.zeros((40, 60), np.uint8)
MASK[10:20, 10:50] = 255

KINDS = {
    "exact": {},
    "turbo with a region": {"mode": "turbo", "num_steps": 12, "mask": MASK},
    "words": {"image": None, "width": 48, "height": 80},
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_branches_in_two_processes_give_the_same_bits(kind: str) -> None:
    pipeline, request = a_pipeline(), replace(REQUEST, **KINDS[kind])  # type: ignore[arg-type]
    alone = latents(pipeline, request, Team())
    assert alone is not None

    for found in in_team(2, 1, lambda team: latents(pipeline, request, team)):
        assert found is not None
        assert torch.equal(found, alone)


def test_prompts_of_different_lengths_run_in_two_processes() -> None:
    pipeline = tiny_pipeline_v1_2()
    alone = latents(pipeline, REQUEST, Team())
    assert alone is not None

    for found in in_team(2, 1, lambda team: latents(pipeline, REQUEST, team)):
        assert found is not None
        assert torch.equal(found, alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_branches", "num_parts"), [(1, 2), (1, 3), (2, 2)])
def test_parts_of_a_branch_give_what_the_whole_gives(
    kind: str, num_branches: int, num_parts: int
) -> None:
    pipeline = a_pipeline(hidden_size=96, num_heads=6)
    request = replace(REQUEST, **KINDS[kind])  # type: ignore[arg-type]
    alone = latents(pipeline, request, Team())
    assert alone is not None

    for found in in_team(num_branches, num_parts, lambda team: latents(pipeline, request, team)):
        assert found is not None
        assert torch.allclose(found, alone, rtol=0, atol=1e-6)


def test_parts_give_the_same_through_as_many_blocks_as_published() -> None:
    published = V1_1.transformer
    pipeline = a_pipeline(
        hidden_size=24 * 16,
        num_heads=24,
        mlp_ratio=1.0,
        depth=published.depth,
        depth_single=published.depth_single,
    )
    request = replace(REQUEST, num_steps=1)
    alone = latents(pipeline, request, Team())
    assert alone is not None

    for found in in_team(1, 3, lambda team: latents(pipeline, request, team)):
        assert found is not None
        assert torch.allclose(found, alone, rtol=0, atol=1e-6)


def test_a_process_that_stops_ends_the_steps_of_the_others() -> None:
    pipeline = a_pipeline()

    def stop_the_first(team: Team) -> Tensor | None:
        return latents(pipeline, REQUEST, team, steps=2 if team.rank == 0 else 0)

    first, *others = in_team(2, 2, stop_the_first)
    assert first is not None
    assert others == [None] * 3


def test_a_process_that_fails_in_a_step_ends_the_steps_of_the_others() -> None:
    pipeline = a_pipeline()
    failing = copy.copy(pipeline)
    failing.transformer = copy.copy(pipeline.transformer)

    def fail(*_: object) -> Tensor:
        raise MemoryError

    failing.transformer.core = fail  # type: ignore[method-assign,assignment]

    def work(team: Team) -> Tensor | None:
        if team.rank == 0:
            return latents(pipeline, REQUEST, team)
        with pytest.raises(MemoryError):
            latents(failing, REQUEST, team)
        return None

    assert in_team(2, 1, work) == [None, None]
