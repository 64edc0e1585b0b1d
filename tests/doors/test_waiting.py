"""Signs of life and the end of waiting, which every door uses."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from step1x_edit.interfaces.pursuits import Notify, Pursuit
from step1x_edit.waiting import heartbeats, unless, until, with_heartbeats


async def test_silence_between_events_is_filled_and_no_event_is_lost_or_repeated() -> None:
    go = asyncio.Event()

    async def events() -> AsyncIterator[int]:
        yield 1
        await go.wait()
        yield 2
        yield 3

    seen = []
    async for event in heartbeats(events(), 0.001):
        seen.append(event)
        if seen.count(None) == 2:
            go.set()

    assert [event for event in seen if event is not None] == [1, 2, 3]
    assert seen[1:3] == [None, None]


async def test_events_end_at_the_end_that_comes_first() -> None:
    closing = asyncio.Event()

    async def endless() -> AsyncIterator[int]:
        yield 1
        yield 2
        await asyncio.Event().wait()

    seen = []
    async for event in until(closing.wait(), endless()):
        seen.append(event)
        if event == 2:
            asyncio.get_running_loop().call_soon(closing.set)

    assert seen == [1, 2]


async def test_work_is_cancelled_by_its_end_and_none_of_its_tasks_is_left() -> None:
    is_cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            is_cancelled.set()

    with pytest.raises(TimeoutError):
        await unless(asyncio.sleep(0.001), work(), TimeoutError())
    await is_cancelled.wait()
    await asyncio.sleep(0)

    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_errors_that_nobody_asks_for_are_not_reported_by_asyncio() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, found: complaints.append(found))

    async def fail(notify: Notify[int]) -> None:
        await notify(1)
        raise ValueError

    async def fail_when_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError

    async def beat() -> None:
        raise KeyError

    pursuit = Pursuit(fail)
    assert [event async for event in pursuit.events()] == [1]
    with pytest.raises(TimeoutError):
        await unless(asyncio.sleep(0.001), fail_when_cancelled(), TimeoutError())
    with pytest.raises(KeyError):
        await with_heartbeats(fail_when_cancelled(), beat, 0.001)
    del pursuit
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()

    assert complaints == []
