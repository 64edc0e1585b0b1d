"""What the server processes share: the log, and the signals that end them."""

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
    _EXIT_CODES[signal.SIGHUP] = 0  # the terminal was closed: stop as after SIGTERM
_PATIENCE_S: Final = 10.0  # for the event loop to handle a signal
_UNHANDLED: Final = 128  # plus the signal's number: the exit code if no handler reacts


def log_to_stderr(settings: Settings) -> None:
    """Log to stderr, one event per line; the first lines say where the settings are from."""
    logs.log_to_stderr(settings.log_level, settings.log_format, "server")
    settings.report()


def settle(exit_code: asyncio.Future[int], code: int) -> None:
    """Request the end of the process; the first request decides the exit code."""
    if not exit_code.done():
        exit_code.set_result(code)


def watch_signals(exit_code: asyncio.Future[int], patience_s: float = _PATIENCE_S) -> None:
    """Settle the exit code when a signal arrives; a second one ends the process at once.

    A thread receives it first: if the event loop is blocked and does not handle it within
    `patience_s`, the thread ends the process. Does nothing on Windows.
    """
    if os.name != "posix":
        return
    loop, is_handled = asyncio.get_running_loop(), threading.Event()
    numbers, wakes = socket.socketpair()
    wakes.setblocking(False)
    # Signals that are ignored at the start, as under nohup, stay ignored.
    signals = [each for each in _EXIT_CODES if signal.getsignal(each) is not signal.SIG_IGN]

    def handle(number: int) -> None:
        is_handled.set()
        signal.set_wakeup_fd(-1)
        wakes.close()
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        settle(exit_code, _EXIT_CODES[signal.Signals(number)])

    def watch() -> None:
        number = _next_of(numbers, signals)
        with contextlib.suppress(RuntimeError):  # the loop is closed and cannot handle it
            loop.call_soon_threadsafe(handle, number)
        numbers.settimeout(patience_s)
        with contextlib.suppress(TimeoutError):
            _next_of(numbers, signals)  # also returns once the loop has handled the first
        if not is_handled.is_set():
            log.error("the event loop is blocked and handles no signal; the process ends now")
            os._exit(_UNHANDLED + number)

    # Python writes a signal's number there at once, even if the main thread is busy.
    signal.set_wakeup_fd(wakes.fileno())
    for each in signals:
        signal.signal(each, lambda *_: None)
    threading.Thread(target=watch, name="signals", daemon=True).start()


def _next_of(numbers: socket.socket, signals: Collection[int]) -> int:
    """The next of these signals that arrives; 0 at the end."""
    while number := numbers.recv(1):
        if number[0] in signals:
            return number[0]
    return 0
