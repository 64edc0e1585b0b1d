"""A process that accepts stored jobs until it is killed."""

from __future__ import annotations

import asyncio
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from step1x_edit.service.job_store import JobStore


def accept_one(data_dir: Path, told: Connection) -> None:
    """Open the store, accept a job and print it; then live until it is killed."""
    asyncio.run(_accept(data_dir, told, is_started=False))


def accept_and_start_one(data_dir: Path, told: Connection) -> None:
    """The same, but a job is running when the process ends."""
    asyncio.run(_accept(data_dir, told, is_started=True))


async def _accept(data_dir: Path, told: Connection, is_started: bool) -> None:
    async with JobStore(data_dir) as store:
        job = await store.create(b"picture", {"prompt": "make it night"})
        if is_started:
            await store.start_next()
        told.send(job.id)
        threading.Event().wait()
