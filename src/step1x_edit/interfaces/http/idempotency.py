"""Work that runs once, however often it is requested.

A client that receives no answer for a long time repeats its request, which must not start a second
edit: while the first one runs, the repeated request waits for the same result, and for some time
afterwards it receives that result. Requests are matched by their `Idempotency-Key`; OpenAI's
clients send none, so theirs are matched by their content and by the number with which they mark a
retry.

`Runs` keeps the work and a `Shelf` its results, in memory and with limits. The module knows nothing
about the work or the protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from starlette.requests import Request

from step1x_edit.errors import EditCancelledError, IdempotencyKeyError, InvalidParameterError
from step1x_edit.interfaces.http.shelf import Shelf
from step1x_edit.interfaces.pursuits import Pursuit, Work
from step1x_edit.waiting import unless

E = TypeVar("E")
T = TypeVar("T")

KEY: Final = "Idempotency-Key"
REPLAYED: Final = {"Idempotent-Replayed": "true"}
KEPT_S: Final = 600.0  # the read time-out of OpenAI's clients
KEPT_BYTES: Final = 128 * 1024 * 1024
GRACE_S: Final = 30.0  # the clients retry within 8 s

_KEPT_AT_LEAST: Final = 1  # the newest answer, whatever its size
_KEPT_AT_MOST: Final = 256
_RETRIES: Final = "X-Stainless-Retry-Count"


@dataclass(frozen=True)
class Identity:
    """What identifies a request: a name, a digest of its content, and whether it is a retry."""

    name: str
    digest: str
    is_retry: bool


def identity_of(request: Request, digest: str) -> Identity | None:
    """The identity of a request, if it has one; raises InvalidParameterError for an unusable key.

    `digest` covers the content of the request. The same key at two paths is two keys.
    """
    keys, path = request.headers.getlist(KEY), request.url.path
    if keys:
        if len(keys) > 1 or not re.fullmatch("[!-~]{1,255}", keys[0]):
            raise InvalidParameterError(
                f"{KEY} must be 1 to 255 ASCII letters, digits and signs, given once", param=KEY
            )
        return Identity(f"key {path} {keys[0]}", digest, is_retry=True)
    count = request.headers.get(_RETRIES, "")
    if not re.fullmatch("[0-9]{1,9}", count):
        return None
    # The same content is a new request, unless the client marks it as a retry.
    return Identity(f"sdk {path} {digest}", digest, is_retry=int(count) > 0)


def may_be_known(request: Request) -> bool:
    """Whether the head of a request allows that it repeats an earlier one."""
    return KEY in request.headers or request.headers.get(_RETRIES, "0") != "0"


def digest_of(parts: Iterable[tuple[str, bytes]]) -> str:
    """A digest of the content of a request: its fields, in any order and encoding."""
    whole = hashlib.sha256()
    for name, value in sorted(parts):
        for piece in (name.encode(), value):
            whole.update(len(piece).to_bytes(8, "big"))
            whole.update(piece)
    return whole.hexdigest()


class Run(Pursuit[E, T]):
    """Work that is cancelled when nobody has waited for it for `grace_s`."""

    def __init__(self, work: Work[E, T], grace_s: float) -> None:
        super().__init__(work)
        self._grace_s = grace_s
        self._listeners = 0
        self._leaving: asyncio.TimerHandle | None = None
        self.is_ending = False
        """Whether it has been cancelled, because nobody waited for it."""

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Count as a caller that waits for the work."""
        self._listeners += 1
        if self._leaving is not None:
            self._leaving.cancel()
        try:
            yield
        finally:
            self._listeners -= 1
            if self._listeners == 0 and not self.is_done:
                self._leave()

    def _leave(self) -> None:
        if self._grace_s:
            loop = asyncio.get_running_loop()
            self._leaving = loop.call_later(self._grace_s, self._abandon)
        else:
            self._abandon()

    def _abandon(self) -> None:
        self.is_ending = True
        self.cancel()


class Runs:
    """All running work, and the results that are still kept."""

    def __init__(self, kept_s: float = KEPT_S, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s
        self._running: dict[str, tuple[str, Run[Any, Any]]] = {}
        self._ended: Shelf[tuple[str, Run[Any, Any]]] = Shelf(
            kept_s, KEPT_BYTES, _KEPT_AT_LEAST, _KEPT_AT_MOST
        )

    def find(
        self,
        identity: Identity | None,
        work: Work[E, T],
        size_of: Callable[[T], int],
        grace_s: float = 0.0,
    ) -> tuple[Run[E, T], bool]:
        """The run that a request belongs to, started now if there is none, and whether there was.

        A run without an identity is cancelled `grace_s` after its client has disconnected. Only
        successes are kept: repeating a failed request tries it again. Raises IdempotencyKeyError.
        """
        if identity is None:
            return Run(work, grace_s), False
        name, digest = identity.name, identity.digest
        if identity.is_retry:
            found = self._running.get(name) or self._ended.get(name)
            if found is not None and not found[1].is_ending:
                if found[0] != digest:
                    raise IdempotencyKeyError(
                        "it came with another request before; send each request with its own"
                    )
                return found[1], True
        run = Run(work, self._grace_s)
        self._running[name] = digest, run
        run.on_end(lambda task: self._keep(name, digest, run, task, size_of))
        return run, False

    def _keep(
        self,
        name: str,
        digest: str,
        run: Run[E, T],
        task: asyncio.Task[T],
        size_of: Callable[[T], int],
    ) -> None:
        if self._running.get(name) != (digest, run):
            return  # a new request for the same work has replaced it
        del self._running[name]
        if not task.cancelled() and task.exception() is None:
            self._ended.put(name, (digest, run), size_of(task.result()))


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for the work; raises EditCancelledError if the client disconnects first."""
    return await unless(_gone(request), work, EditCancelledError())


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
