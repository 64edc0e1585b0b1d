"""Progress on stderr: a bar on a terminal, plain lines otherwise.

The remaining time is computed from the steps so far. It counts down between two steps, and is not
shown while it is unknown. This module knows nothing about what the work is.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from step1x_edit.time_left import Now, TimeLeft

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_EVERY_S: Final = 10.0
STARTING: Final = "starting"
_LOOK_EVERY_S: Final = 1.0
_WIDE: Final = 90  # columns of a terminal with room for a long bar
_BESIDE_THE_LABEL: Final = 46  # columns for the text and the times, which must not be cut


class Display(Protocol):
    """Shows one piece of work after the other."""

    def begin(self, label: str, text: str = STARTING) -> None:
        """Show another piece of work from now on."""

    def show(self, phase: object, text: str, done: float = 0, total: float | None = None) -> None:
        """Show progress: `done` of `total` in this phase, if known."""


class _Work:
    """One piece of work and its displayed progress."""

    def __init__(self, label: str, text: str, now: Now) -> None:
        self.label = label
        self.text = text
        self.left = TimeLeft(now)
        self._now = now
        self._begun = now()

    @property
    def state(self) -> str:
        """The phase, the time so far and, if known, the remaining time."""
        line = f"{self.text}, {duration(self._now() - self._begun)}"
        seconds = self.left.seconds
        return line if seconds is None else f"{line}, about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """A readable duration: 40 s, 2:05, 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


@contextlib.contextmanager
def display(to: Console, *extra: ProgressColumn, now: Now = time.monotonic) -> Iterator[Display]:
    """Show work on a console; `extra` columns follow the bar."""
    if to.is_terminal and not to.is_dumb_terminal:
        with _Bar.drawn(to, extra, now) as bar:
            yield bar
        return
    lines = _Lines(to, now)
    with lines.going_on():
        yield lines


# --- on a terminal -------------------------------------------------------------------------------


class _State(ProgressColumn):
    """The progress of the work."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))
        self.max_refresh = 0.5

    def render(self, task: Task) -> Text:
        work: _Work = task.fields["work"]
        return Text(work.state)


class _Bar:
    """A bar with a label, the phase and the times."""

    def __init__(self, bar: RichProgress, now: Now) -> None:
        self._bar = bar
        self._now = now
        self._work = _Work("", STARTING, now)
        self._task = self._added()

    @classmethod
    @contextlib.contextmanager
    def drawn(cls, to: Console, extra: tuple[ProgressColumn, ...], now: Now) -> Iterator[_Bar]:
        """A bar that disappears when the context ends."""
        bar_width = 20 if to.width >= _WIDE else 6
        room = max(8, to.width - bar_width - _BESIDE_THE_LABEL)
        label = Column(no_wrap=True, overflow="ellipsis", max_width=room)
        with RichProgress(
            TextColumn("{task.fields[work].label}", markup=False, table_column=label),
            BarColumn(bar_width),
            *extra,
            _State(),
            console=to,
            transient=True,
            redirect_stdout=False,  # results must not be redirected to stderr
            get_time=now,
        ) as bar:
            yield cls(bar, now)

    def _added(self) -> TaskID:
        return self._bar.add_task(self._work.text, total=None, work=self._work)

    def begin(self, label: str, text: str = STARTING) -> None:
        self._bar.remove_task(self._task)
        self._work = _Work(label, text, self._now)
        self._task = self._added()

    def show(self, phase: object, text: str, done: float = 0, total: float | None = None) -> None:
        self._work.left.saw(phase, done, total)
        self._work.text = text
        if total is not None:
            self._bar.update(self._task, total=total, completed=done)


# --- anywhere else -------------------------------------------------------------------------------


class _Lines:
    """A line for each phase, and one every 10 s during it, even without events."""

    def __init__(self, to: Console, now: Now) -> None:
        self._to = to
        self._now = now
        self._lock = threading.Lock()
        self._work: _Work | None = None
        self._phase: object = None
        self._printed = 0.0

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Print lines for as long as the context lasts."""
        end = threading.Event()

        def watch() -> None:
            while not end.wait(_LOOK_EVERY_S):
                with self._lock:
                    self._print_if_due()

        watcher = threading.Thread(target=watch, name="progress lines", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            end.set()
            watcher.join()

    def begin(self, label: str, text: str = STARTING) -> None:
        with self._lock:
            self._work, self._phase = _Work(label, text, self._now), None
            self._printed = self._now()

    def show(self, phase: object, text: str, done: float = 0, total: float | None = None) -> None:
        with self._lock:
            assert self._work is not None
            self._work.text = text
            self._work.left.saw(phase, done, total)
            if phase != self._phase:
                self._phase, self._printed = phase, self._now()
                self._to.print(f"{self._work.label}: {text}", markup=False)
            else:
                self._print_if_due()

    def _print_if_due(self) -> None:
        work = self._work
        if work is None or self._now() - self._printed < LINE_EVERY_S:
            return
        self._printed = self._now()
        self._to.print(f"{work.label}: {work.state}", markup=False)
