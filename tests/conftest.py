"""Shared fixtures: a photograph, and the service with a fake worker."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from fakes import FakeWorker
from forked import RealPopen, fork_programs
from step1x_edit.engine.engine import Clock
from step1x_edit.engine.machine import Survey
from step1x_edit.service.file_edits import FileEdits
from step1x_edit.service.service import EditedPicture, EditService
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings

SLOWEST = (
    "test_ui",
    "test_gpu_check",
    "test_discovery",
    "test_mcp_stdio",
    "test_startup",
    "test_examples",
    "test_layouts",
    "test_demo_edits",
    "test_train_demo",
    "test_prompts",
    "test_server",
    "test_load",
    "test_training",
    "test_handles",
    "test_mcp_app",
    "test_mcp",
    "test_one_model",
    "test_client",
    "test_client_config",
    "test_cli_doctor",
    "test_second_device",
    "test_precision",
    "test_kills",
    "test_lora",
    "test_every_interface",
)
"""The files that take longest, the longest first."""

MakeService = Callable[..., EditService]


def edits_of(service: EditService) -> FileEdits[EditedPicture]:
    """The operations on files, with this service as the editor."""
    return FileEdits(service, service.files)


def pytest_configure() -> None:
    """Share the processors between tests in parallel, before torch counts them; receive signals.

    Threads in excess of processors wait for each other, and the tests take twice as long.
    """
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, (os.cpu_count() or 1) // beside)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # `nohup` and shells in the background ignore these, and the servers of tests would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than processors: tests often wait, for a process that starts or for a browser."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Import the tests and their libraries, in one process after the other.

    So only the first compiles them. The million objects of the libraries live as long as the
    process: without garbage collection, importing them takes a third less time.
    """
    gc.disable()
    try:
        with FileLock(session.config.rootpath / ".pytest_cache" / "collection.lock"):
            return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, so that none of them runs alone at the end."""
    rank = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOWEST)))


@pytest.fixture(scope="session", autouse=True)
def _nobody_to_join(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, and no process that it starts, joins a server that already runs on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", str(tmp_path_factory.mktemp("data")))
        patch.setenv("ARITHMETIC", "fp32")  # the same numbers on every machine
        with fork_programs():
            yield


@pytest.fixture
def real_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs start by themselves, as they do without tests."""
    monkeypatch.setattr(subprocess, "Popen", RealPopen)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A small picture whose colours differ everywhere."""
    path = tmp_path / "photo.png"
    y, x = np.mgrid[0:48, 0:64]
    pixels = np.stack([x * 4, y * 5, 255 - x * 2], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def make_service(tmp_path: Path) -> Iterator[MakeService]:
    """Build services that read and write in the test's folder."""
    services: list[EditService] = []

    def make(
        worker: FakeWorker | None = None,
        clock: Clock | None = None,
        take_survey: Callable[[], Survey] | None = None,
        **settings: object,
    ) -> EditService:
        chosen = worker or FakeWorker()
        checked = Settings(allowed_dirs=(tmp_path,), _env_file=None, **settings)  # type: ignore
        services.append(build_service(checked, chosen, clock, take_survey))
        return services[-1]

    yield make
    for service in services:
        service.close()


@pytest.fixture
def worker() -> FakeWorker:
    """The worker of edits in a test that checks the requests."""
    return FakeWorker()


@pytest.fixture
def fake_model(
    make_service: MakeService,
    worker: FakeWorker,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Commands edit with `worker`, in the test's folder."""

    def build_service(settings: Settings) -> EditService:
        return make_service(worker)

    monkeypatch.setattr("step1x_edit.service.wiring.build_service", build_service)
    monkeypatch.chdir(tmp_path)
