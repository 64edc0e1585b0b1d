"""A cluster in this process: replicas around fake workers, which can be lost and added."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Sequence
from typing import Final, Literal

from fakes import FakeWorker
from step1x_edit.channel import Job
from step1x_edit.cluster.ray_engine import Move
from step1x_edit.cluster.replica import EngineReplica, Said
from step1x_edit.engine.engine import Engine, Replica
from step1x_edit.waiting import first_of


class ActorDiedError(Exception):
    """What a stream raises if its replica is lost, as Ray's error of this kind."""


class _Held:
    """A replica, and whether it is lost."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.engine: Final = engine
        self.replica: Final = EngineReplica(name, engine)
        self.loss: Final = asyncio.Event()


class FakeCluster:
    """Gives each edit to the replica that has been idle for longest."""

    def __init__(self, *engines: Engine) -> None:
        self._idle: asyncio.Queue[_Held] = asyncio.Queue()
        self._all: dict[str, _Held] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.answers = asyncio.Event()
        """If cleared, it falls silent."""
        self.answers.set()
        for engine in engines:
            self._add(engine)

    # --- for the engine ---

    async def run(self, job: Job) -> AsyncGenerator[Said, None]:
        while (held := await self._idle.get()).loss.is_set():
            pass
        loss = asyncio.ensure_future(held.loss.wait())
        try:
            async with contextlib.aclosing(held.replica.run(job)) as sayings:
                while (said := await _next_unless(loss, sayings)) is not None:
                    await self.answers.wait()
                    yield said
        finally:
            loss.cancel()
            self._idle.put_nowait(held)

    async def look(self) -> Sequence[Replica]:
        self._loop = asyncio.get_running_loop()
        await self.answers.wait()
        return [await held.replica.look() for held in self._all.values()]

    async def move(self, move: Move) -> Sequence[Replica]:
        return [await getattr(held.replica, move)() for held in self._all.values()]

    def close(self) -> None:
        for held in self._all.values():
            held.engine.close()

    # --- for tests ---

    def lose(self, name: str) -> None:
        """Kill a replica, from another thread."""
        self._do(self._lose, name)

    def add(self, worker: FakeWorker) -> None:
        """Start another replica, from another thread."""
        self._do(self._add, Engine(worker))

    def fall_silent(self) -> None:
        self._do(self.answers.clear)

    def answer_again(self) -> None:
        self._do(self.answers.set)

    def _do(self, work: object, *arguments: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(work, *arguments)  # type: ignore[arg-type]

    def _lose(self, name: str) -> None:
        held = self._all.pop(name)
        held.loss.set()
        threading.Thread(target=held.engine.close).start()  # it may wait for a gate

    def _add(self, engine: Engine) -> None:
        name = f"replica-{len(self._all)}"
        self._all[name] = held = _Held(name, engine)
        self._idle.put_nowait(held)


async def _next_unless(
    loss: asyncio.Task[Literal[True]], sayings: AsyncGenerator[Said, None]
) -> Said | None:
    coming = asyncio.ensure_future(anext(sayings, None))
    try:
        await first_of(coming, loss)
    finally:
        if not coming.done():
            coming.cancel()
            await asyncio.wait([coming])  # else the generator could not be closed
    if loss.done():
        raise ActorDiedError("The actor died unexpectedly before finishing this task.")
    return coming.result()
