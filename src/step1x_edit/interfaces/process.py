"""What our servers have in common as processes: their log, and the signals that end them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Final

from step1x_edit import logs
from step1x_edit.settings import Settings

_EXIT_CODES: Final = {signal.SIGINT: 130, signal.SIGTERM: 0}


def log_to_stderr(settings: Settings) -> None:
    """Have the log go to stderr, one event per line."""
    logs.log_to_stderr(settings.log_level, settings.log_format, "server")


def tell(told: asyncio.Future[int], exit_code: int) -> None:
    """Say that the process is to end; the first to say so decides about the exit code."""
    if not told.done():
        told.set_result(exit_code)


def hear_signals(told: asyncio.Future[int]) -> None:
    """Tell when a signal comes; a second one ends the process at once."""
    loop = asyncio.get_running_loop()

    def hear(number: signal.Signals) -> None:
        for each in _EXIT_CODES:
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        tell(told, _EXIT_CODES[number])

    for number in _EXIT_CODES:
        with contextlib.suppress(NotImplementedError):  # Windows knows no such handlers
            loop.add_signal_handler(number, hear, number)
