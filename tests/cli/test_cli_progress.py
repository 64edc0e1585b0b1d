"""What a person sees of an edit that runs: times that are true, on a terminal and in a log."""

from __future__ import annotations

import io
import re
import threading

import pytest
from rich.console import Console

from fakes import ManualClock
from step1x_edit.channel import Phase, Progress
from step1x_edit.interfaces.cli import terminal
from step1x_edit.interfaces.cli.progress import display, duration
from step1x_edit.time_left import TimeLeft

TOTAL = 10


def test_the_time_left_follows_from_the_steps_and_counts_down_between_them() -> None:
    clock = ManualClock()
    left = TimeLeft(clock.now)
    seen = []
    for step in (1, 2, 3):
        left.saw("denoising", step, TOTAL)
        for _ in range(3):  # the same is reported again every few seconds
            seen.append(left.seconds)
            clock.advance(4)
            left.saw("denoising", step, TOTAL)

    assert seen[:3] == [None, None, None]  # one step says nothing about the others
    assert seen[3:6] == [96, 92, 88]
    assert seen[6:] == [84, 80, 76]


def test_a_late_step_does_not_let_the_time_left_grow_or_end() -> None:
    clock = ManualClock()
    left = TimeLeft(clock.now)
    left.saw("denoising", 1, TOTAL)
    clock.advance(1)
    left.saw("denoising", 2, TOTAL)
    seen: list[float] = []
    for _ in range(20):
        assert left.seconds is not None
        seen.append(left.seconds)
        clock.advance(1)

    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 1


def test_what_one_phase_took_says_nothing_about_the_next() -> None:
    clock = ManualClock()
    left = TimeLeft(clock.now)
    for step in (1, 2):
        left.saw("denoising", step, TOTAL)
        clock.advance(4)
    left.saw("decoding", 0, None)
    after = left.seconds
    left.saw("denoising", 1, TOTAL)  # of a second round

    assert (after, left.seconds) == (None, None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def lines_of(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The stream for everything that is not a result, from now on."""
    file = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=file, soft_wrap=True))
    return file


async def test_without_a_terminal_there_is_a_line_for_each_phase_and_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = ManualClock()
    file = lines_of(monkeypatch)
    monkeypatch.setattr(terminal, "now", clock.now)
    with terminal.shown_progress() as progress_of:
        show = progress_of("edit")
        await show(Progress(Phase.QUEUED, 2))
        await show(Progress(Phase.QUEUED, 1))
        await show(Progress(Phase.LOADING))
        for step in range(1, 9):
            await show(Progress(Phase.DENOISING, step, TOTAL))
            clock.advance(4)
        await show(Progress(Phase.DECODING))

    assert file.getvalue().splitlines() == [
        "edit: queued, position 2",
        "edit: queued, position 1",
        "edit: loading model",
        "edit: denoising 1/10",
        "edit: denoising 4/10, 12 s, about 24 s left",
        "edit: denoising 7/10, 24 s, about 12 s left",
        "edit: decoding",
    ]


def test_without_news_there_is_a_line_all_the_same() -> None:
    """A server tells of each step once; of a slow one nothing is heard for minutes."""
    clock, printed = ManualClock(), threading.Event()

    class Watched(io.StringIO):
        def write(self, text: str) -> int:
            if "12 s" in text:
                printed.set()
            return super().write(text)

    file = Watched()
    with display(Console(file=file), now=clock.now) as shown:
        shown.begin("edit")
        shown.show("loading", "loading model")
        clock.advance(12)
        heard = printed.wait(60)

    assert heard
    assert file.getvalue().splitlines() == ["edit: loading model", "edit: loading model, 12 s"]


@pytest.mark.parametrize("width", [60, 100])
def test_the_bar_fits_the_terminal_and_left_stands_with_its_time(width: int) -> None:
    clock, file = ManualClock(), io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    with display(console, now=clock.now) as shown:
        shown.begin("12/34 a very long name of a photograph.jpg")
        shown.show("loading", "loading model")
        clock.advance(70)
        for step in (1, 2):
            clock.advance(60)
            shown.show("denoising", f"denoising {step}/28", step, 28)

    frames = [
        line
        for line in re.split(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]+", file.getvalue())
        if line.strip()
    ]
    assert all(len(frame) <= width for frame in frames)
    assert "denoising 2/28, 3:10, about 26:00 left" in frames[-1]
    assert "left" not in frames[0]
