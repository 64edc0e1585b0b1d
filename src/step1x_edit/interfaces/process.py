"""What our servers have in common as processes: their log, and the signals that end them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Collection
from typing import Final

from step1x_edit import logs
from step1x_edit.settings import Settings

log = logging.getLogger(__name__)

_EXIT_CODES: Final = {signal.SIGINT: 130, signal.SIGTERM: 0}
if os.name == "posix":
    _EXIT_CODES[signal.SIGHUP] = 0  # the terminal is closed: leave as tidily as after SIGTERM
_PATIENCE_S: Final = 10.0  # for the event loop to hear a signal
_UNHEARD: Final = 128  # and the signal's number: the exit code of a process that hears none


def log_to_stderr(settings: Settings) -> None:
    """Have the log go to stderr, one event per line; its first say where the settings are from."""
    logs.log_to_stderr(settings.log_level, settings.log_format, "server")
    settings.report()


def tell(told: asyncio.Future[int], exit_code: int) -> None:
    """Say that the process is to end; the first to say so decides about the exit code."""
    if not told.done():
        told.set_result(exit_code)


def hear_signals(told: asyncio.Future[int], patience_s: float = _PATIENCE_S) -> None:
    """Tell when a signal comes; a second one ends the process at once.

    A thread hears it first: if the loop takes longer than `patience_s` to hear it as well, because
    something blocks it for good, the thread ends the process. Does nothing on Windows.
    """
    if os.name != "posix":
        return
    loop, is_heard = asyncio.get_running_loop(), threading.Event()
    numbers, wakes = socket.socketpair()
    wakes.setblocking(False)
    # What is ignored from the start, as nohup does it, stays ignored.
    signals = [each for each in _EXIT_CODES if signal.getsignal(each) is not signal.SIG_IGN]

    def hear(number: int) -> None:
        is_heard.set()
        signal.set_wakeup_fd(-1)
        wakes.close()
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        tell(told, _EXIT_CODES[signal.Signals(number)])

    def watch() -> None:
        number = _next_of(numbers, signals)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody will hear it
            loop.call_soon_threadsafe(hear, number)
        numbers.settimeout(patience_s)
        with contextlib.suppress(TimeoutError):
            _next_of(numbers, signals)  # also ends when the loop has heard the first
        if not is_heard.is_set():
            log.error("the event loop is blocked and hears no signal; the process ends now")
            os._exit(_UNHEARD + number)

    # Python writes the number of a signal there at once, whatever the main thread does.
    signal.set_wakeup_fd(wakes.fileno())
    for each in signals:
        signal.signal(each, lambda *_: None)
    threading.Thread(target=watch, name="signals", daemon=True).start()


def _next_of(numbers: socket.socket, signals: Collection[int]) -> int:
    """The next of these signals that comes; 0 at the end."""
    while number := numbers.recv(1):
        if number[0] in signals:
            return number[0]
    return 0
