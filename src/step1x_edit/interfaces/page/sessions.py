"""The visitors of the page: the running work of each tab, its results, and where files go.

Each edit runs in a separate task that belongs to a tab of a visitor's session. *Stop* and closing
the page cancel the task; the generator that Gradio reads from only passes its events on. The
results of a tab are kept here too, so that they are complete when an edit ends, and not in the
state of the button press. The module does not import Gradio.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, TypeVar

from step1x_edit.errors import EditCancelledError
from step1x_edit.interfaces.page.files import PageFiles
from step1x_edit.interfaces.pursuits import Pursuit, Work
from step1x_edit.service.history import Step

E = TypeVar("E")

_HISTORY: Final = 12


@dataclass(frozen=True)
class Asked:
    """The request of a visitor; "again" repeats it with another seed."""

    source: str
    """The path of the picture; empty if none is chosen."""
    arguments: Mapping[str, object]
    mask: bytes | None = None


@dataclass(frozen=True)
class Thoughts:
    """The reasoning behind an edit, as it is shown."""

    rewritten: str
    rounds: Sequence[tuple[str, str]]
    """Each picture's path and caption."""
    verdicts: str


@dataclass(frozen=True)
class Result:
    """An edit as the history keeps it; `before`, `after` and `file` are paths."""

    asked: Asked
    before: str
    after: str
    file: str
    line: str
    label: str
    thoughts: Thoughts | None
    step: Step | None = None
    """The step of the history that it is, with HISTORY on."""


class TabState:
    """The running work of one tab of the page, and its results, newest first."""

    def __init__(self) -> None:
        self.result: Result | None = None
        """The result that is shown."""
        self.history: Sequence[Result] = ()
        self.steps: Sequence[Step] = ()
        """With HISTORY on: the steps that are shown, newest first."""
        self.is_busy = False
        self._is_stopped = False
        self._pursuit: Pursuit[Any, None] | None = None

    def add(self, result: Result) -> None:
        """Keep a result, and drop the oldest."""
        self.result, self.history = result, [result, *self.history][:_HISTORY]

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Mark the tab as busy, from the press of a button to the end of its work."""
        self.is_busy, self._is_stopped = True, False
        try:
            yield
        finally:
            self.is_busy = False

    async def run(self, work: Work[E, None]) -> AsyncIterator[E]:
        """Yield the events of the work; raises the error that ends it."""
        if self._is_stopped:
            raise EditCancelledError
        self._pursuit = pursuit = Pursuit(work)
        try:
            async for event in pursuit.events():
                yield event
            await pursuit.result()
        finally:
            pursuit.cancel()  # does nothing if it has ended
            if self._pursuit is pursuit:
                self._pursuit = None  # its events hold previews

    def stop(self) -> None:
        """Cancel the running work, and work of this press that has not started yet."""
        self._is_stopped = True
        if self._pursuit is not None:
            self._pursuit.cancel()


class Session:
    """The tabs and the files of one visitor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tabs: dict[str, TabState] = defaultdict(TabState)
        self.previews: dict[str, str] = {}
        """The paths of small pictures of the history, by their SHA-256."""

    def place(self, name: str) -> Path:
        """Make a path for a file of this name, at an address that nobody can guess."""
        folder = self._folder / token_hex(16)
        folder.mkdir(parents=True)
        return folder / name

    def save(self, name: str, data: bytes) -> str:
        """Write a file to such a path."""
        path = self.place(name)
        path.write_bytes(data)
        return str(path)

    def has_made(self, path: Path) -> bool:
        """Whether `save` wrote this file, and the visitor did not upload it."""
        return path.is_relative_to(self._folder)

    def close(self) -> None:
        """Cancel all work and remove the files."""
        for tab in self.tabs.values():
            tab.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


class Sessions(dict[str, Session]):
    """The sessions by the names that browsers choose; such a name is never part of a path."""

    def __init__(self, files: PageFiles) -> None:
        self._files = files

    def __missing__(self, name: str) -> Session:
        self[name] = session = Session(self._files.folder_of(name))
        return session
