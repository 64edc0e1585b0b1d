"""Python programs of the tests, in forks of one process that has imported their libraries.

A command needs nine tenths of its processor time for imports, and a worker three seconds. While
`fork_programs` lasts, a program of this repository that is started with `subprocess.Popen` is such
a fork instead, and so are the programs that it starts. It gets the pipes, files, folder, settings
and ignored signals that it would have got, and is a child of the process that starts it.

A program starts by itself if a fork could differ: with an option of the interpreter (`-c`, `-X`),
with another value of a variable that is not one of our settings, because libraries read those when
they are imported, in a test that uses the fixture `real_programs`, and until the libraries are
imported, which the first program begins.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from step1x_edit.settings import Settings

TESTS = Path(__file__).parent
ROOT = TESTS.parent
MODULES = "step1x_edit", "toy_worker", "group_worker"
"""What may stand behind `-m`, with modules below it."""

READ_LATER = {name.upper() for name in Settings.model_fields} | {
    "FAKE_DEAF",
    "FAKE_HANG",
    "FAKE_LOG",
    "GOMP_SPINCOUNT",  # this one and the next change only the speed
    "THP_MEM_ALLOC_ENABLE",
    "PYTEST_CURRENT_TEST",
    "PYTHONPATH",
    "PYTHONSAFEPATH",
}
"""Variables that no library reads when it is imported."""

UTF8 = {"PYTHONUTF8": "1"}
"""What some clients set; elsewhere than on Windows it changes nothing for most users."""

RealPopen = subprocess.Popen

_FOR_PROGRAMS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
"""Signals that end programs, and not what forks them."""

_LONGEST = 2000
"""Bytes of a command that others see in the list of processes."""

_PR_SET_CHILD_SUBREAPER = 36
_one_at_a_time = threading.Lock()
_environment: dict[str, str] = {}
"""The environment of the process that forks."""
_ways: dict[int, socket.socket] = {}
"""By the id of this process, the way to the process that forks for it."""
_ready: set[int] = set()
"""This process, if the one that forks for it has imported the libraries."""


@contextlib.contextmanager
def fork_programs() -> Iterator[None]:
    """Start the programs of this repository in forks."""
    if sys.platform != "linux":  # elsewhere, a process cannot become the parent of a fork
        yield
        return
    _environment.update(UTF8 | os.environ)
    subprocess.Popen = Forked  # type: ignore[misc]
    yield
    subprocess.Popen = RealPopen  # type: ignore[misc]
    for way in _ways.values():
        way.close()


class Forked(RealPopen):  # type: ignore[type-arg]
    """A `subprocess.Popen` that is a fork if it runs a program of this repository."""

    _child_created: bool
    _close_pipe_fds: Callable[..., None]

    def _execute_child(self, args: Any, *options: Any) -> None:
        _, before_it, _, passed, folder, environment, *_ = options
        environment = dict(os.environ if environment is None else environment)
        folder = Path(folder or Path.cwd())
        if before_it or not _may_be_forked(args, folder, environment) or not _is_ready():
            super()._execute_child(args, *options)  # type: ignore[misc]
            return
        pipes, is_session = options[9:15], options[20]
        numbers = [*range(3), *passed]
        sources = [pipes[0], pipes[3], pipes[5], *passed]
        files = [
            number if file == -1 else file for number, file in zip(numbers, sources, strict=True)
        ]
        ignored = [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN]
        words = [os.fspath(word) for word in args[1:]]
        message = json.dumps([numbers, ignored, is_session, str(folder), environment, words])
        prctl = ctypes.CDLL(None).prctl
        with _one_at_a_time:
            way = _ways[os.getpid()]
            # Meanwhile, a process whose parent ends becomes our child.
            prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            socket.send_fds(way, [message.encode()], files)
            self.pid = int(way.recv(100))
            way.recv(100)
            prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        self._child_created = True
        self._close_pipe_fds(*pipes)


def _may_be_forked(args: Any, folder: Path, environment: dict[str, str]) -> bool:
    if isinstance(args, str | bytes) or len(args) < 2 or os.fspath(args[0]) != sys.executable:
        return False
    wanted = UTF8 | environment
    if not {*wanted.get("PYTHONPATH", "").split(os.pathsep)} <= {*sys.path, str(TESTS), ""}:
        return False  # a `sitecustomize` may be there
    names = (wanted.keys() | _environment.keys()) - READ_LATER
    if any(wanted.get(name) != _environment.get(name) for name in names):
        return False
    program = os.fspath(args[1])
    if program == "-m":
        return str(args[2]).partition(".")[0] in MODULES
    return not program.startswith("-") and (folder / program).resolve().is_relative_to(ROOT)


def _is_ready() -> bool:
    """Whether the process that forks can do so; until then, nobody waits for it."""
    with _one_at_a_time:
        here = os.getpid()
        if here not in _ways:
            _start_forking()
        if here not in _ready and select.select([_ways[here]], [], [], 0)[0]:
            _ways[here].recv(100)
            _ready.add(here)
        return here in _ready


def _start_forking() -> None:
    """Start the process that forks, which ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, __file__, " " * _LONGEST]
        RealPopen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=_environment)
    _ways[os.getpid()] = ours


# --- in the process that forks --------------------------------------------------------------------


def _become_next_program(way: socket.socket) -> list[str]:
    """Return its words in a fork, which is a child of the sender of a command and has its files."""
    while True:
        message, files, _, _ = socket.recv_fds(way, 2**20, 20)
        if not message:  # the sender has ended
            os._exit(0)
        between = os.fork()
        if between:
            os.waitpid(between, 0)
            way.send(b"its parent has ended")
        elif pid := os.fork():
            way.send(str(pid).encode())
            os._exit(0)
        else:
            way.close()
            ours, way = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            if os.fork():
                break
            ours.close()  # this process forks the programs that the program starts
        for file in files:
            os.close(file)
    way.close()
    words: list[str]
    numbers, ignored, is_session, folder, environment, words = json.loads(message)
    _ready.add(os.getpid())
    _ways[os.getpid()] = socket.socket(fileno=_move_up(ours.detach()))
    for file, number in zip([_move_up(file) for file in files], numbers, strict=True):
        os.dup2(file, number)
        os.close(file)
    _open_streams()
    for number in _FOR_PROGRAMS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    if is_session:
        os.setsid()
    _rename(words)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return words


def _open_streams() -> None:
    """Open the standard streams again, because their files are others now."""
    for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "w"), ("stderr", "w")]):
        old = getattr(sys, name)
        buffering = 1 if old is sys.stderr else -1
        stream = os.fdopen(number, mode, buffering, old.encoding, old.errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _rename(words: list[str]) -> None:
    """Have the list of processes show a command as that of this process."""
    begin, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    command = b"\0".join(map(os.fsencode, [sys.executable, *words]))[:_LONGEST]
    ctypes.memmove(begin, command.ljust(end - begin, b"\0"), end - begin)


def _move_up(file: int) -> int:
    """The same file with a number that no program expects."""
    moved = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 200)
    os.close(file)
    return moved


def _run(words: list[str]) -> None:
    if words[0] != "-m":
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
        return
    sys.argv = words[1:]
    if "PYTHONSAFEPATH" not in os.environ:
        sys.path.insert(0, str(Path.cwd()))
    warnings.filterwarnings("ignore", "(?s).*found in sys.modules", RuntimeWarning)
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    gc.disable()
    from step1x_edit.worker.libraries import import_libraries

    import_libraries()
    import serve_fake  # noqa: F401
    import step1x_edit.interfaces.cli.serving
    import step1x_edit.interfaces.serving
    import step1x_edit.worker.edits  # noqa: F401
    import toy_worker  # noqa: F401

    gc.freeze()
    for number in _FOR_PROGRAMS:
        signal.signal(number, signal.SIG_IGN)
    _environment.update(os.environ)
    subprocess.Popen = Forked  # type: ignore[misc]
    way = socket.socket(fileno=os.dup(0))
    way.send(b"ready")
    words = _become_next_program(way)
    gc.enable()
    _run(words)
