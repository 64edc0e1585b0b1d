"""Programs in forks of one process, which has imported the libraries of a server.

A server needs nine tenths of its start for imports. The process runs this file: each process with
tests starts it once, and sends it a command for each program.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_one_at_a_time = threading.Lock()


class Forked(subprocess.Popen[str]):
    """`python SCRIPT ARGUMENTS`, which may inherit our standard streams or be given pipes."""

    _child_created: bool
    _close_pipe_fds: Callable[..., None]

    def _execute_child(self, args: list[str], *options: Any) -> None:
        folder, environment, pipes = options[4], options[5], options[9:15]
        theirs = pipes[0], pipes[3], pipes[5]
        files = [number if file == -1 else file for number, file in enumerate(theirs)]
        ignored = [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN]
        message = json.dumps(
            [args[1:], str(folder or Path.cwd()), dict(environment or os.environ), ignored]
        ).encode()
        prctl = ctypes.CDLL(None).prctl
        with _one_at_a_time:
            control, _ = _forking_process()
            # Meanwhile, a process whose parent ends becomes our child.
            prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            socket.send_fds(control, [message], files)
            self.pid = int(control.recv(100))
            control.recv(100)
            prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        self._child_created = True
        self._close_pipe_fds(*pipes)


start_program: type[subprocess.Popen[str]] = Forked if sys.platform == "linux" else subprocess.Popen
"""Starts a Python program; elsewhere than on Linux we cannot become the parent of a fork."""


@cache
def _forking_process() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """The process that forks, which ends with this one, and the way to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    return ours, process


def _next_command(control: socket.socket) -> list[str]:
    """Return in a fork, with the script and arguments of a command, as a child of the sender."""
    while True:
        message, files, _, _ = socket.recv_fds(control, 2**20, 3)
        if not message:  # the sender has ended
            sys.exit()
        between = os.fork()
        if between:
            os.waitpid(between, 0)
            control.send(b"its parent has ended")
            for file in files:
                os.close(file)
        elif pid := os.fork():
            control.send(str(pid).encode())
            os._exit(0)
        else:
            break
    control.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    command: list[str]
    command, folder, environment, ignored = json.loads(message)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return command


if __name__ == "__main__":
    gc.disable()
    import serve_fake  # noqa: F401
    import step1x_edit.interfaces.cli.serving
    import step1x_edit.interfaces.serving  # noqa: F401

    gc.freeze()
    sys.argv = _next_command(socket.socket(fileno=int(sys.argv[1])))
    gc.enable()
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
