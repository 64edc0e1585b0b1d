"""The command that reports what this machine can run, and what prevents it."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from step1x_edit import __version__
from step1x_edit.channel import GIGA
from step1x_edit.engine import host_memory
from step1x_edit.errors import SettingsError
from step1x_edit.interfaces.cli.options import AsJson
from step1x_edit.interfaces.cli.terminal import (
    FAILED,
    cli_settings,
    err,
    failures_on_stderr,
    out,
    print_json,
)
from step1x_edit.service.files import nearest_existing

if TYPE_CHECKING:
    from step1x_edit.engine.machine import Survey
    from step1x_edit.interfaces.discovery import RunningServer
    from step1x_edit.settings import Settings

_STYLES: Final = {"ok": "green", "note": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    """The result of one check; `fail` prevents edits, or a server."""

    state: Literal["ok", "note", "fail"]
    name: str
    text: str


def doctor(
    again: Annotated[
        bool, typer.Option("--again", help="Inspect again, even if nothing has changed")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Report what this machine can run, one line for each check.

    The exit code is 1 if a check fails. No model is loaded. Without a GPU, the
    result of inspecting torch and the model is kept in DATA_DIR, and used
    again while nothing changes.
    """
    with failures_on_stderr(as_json):
        checks = []
        for check in _checks(again):
            checks.append(check)
            if not as_json:
                out.print(check.state.ljust(5), style=_STYLES[check.state], end="")
                out.print(f"{check.name:<12}{check.text}", markup=False)
        can_run = all(check.state != "fail" for check in checks)
        if as_json:
            status = "success" if can_run else "error"
            print_json({"status": status, "checks": [asdict(check) for check in checks]})
        if not can_run:
            if not as_json:
                err.print("fix the checks that are marked with fail", markup=False)
            raise typer.Exit(FAILED)


def _checks(again: bool) -> Iterator[Check]:
    yield Check("ok", "version", f"step1x-edit {__version__}, Python {platform.python_version()}")
    try:
        settings = cli_settings()
    except SettingsError as error:
        yield Check("fail", "settings", str(error))
        return
    if settings.engine == "ray":
        yield _cluster()
    yield _memory()
    yield from _data_dir(settings.data_dir)
    from step1x_edit.service.kept_survey import kept_survey, new_survey

    kept = None if again else kept_survey(settings)
    if kept is None:
        seen = new_survey(settings)
    else:
        seen = kept.survey
        taken = f"{kept.taken:%Y-%m-%d %H:%M}"
        text = f"what follows is of {taken}, and nothing has changed; --again inspects again"
        yield Check("ok", "inspection", text)
    yield from _torch_and_device(seen)
    if seen.torch_error is None:
        yield _checkpoint(seen, settings)
        yield from _plan(seen)
        yield from _upscaler(seen, settings)
        yield from _defaults(seen, settings)
    yield from _server(settings)


def _cluster() -> Check:
    from step1x_edit.cluster.connection import check_installed

    try:
        check_installed()
    except SettingsError as error:
        return Check("fail", "cluster", str(error))
    return Check("note", "cluster", "ENGINE is ray: see `step1x-edit cluster status`")


def _memory() -> Check:
    found = host_memory.measure()
    if found is None:
        return Check("note", "memory", "this system does not report its memory")
    free, total = found.available / GIGA, found.total / GIGA
    return Check("ok", "memory", f"{free:.1f} GB of {total:.1f} GB free")


def _data_dir(folder: Path) -> Iterator[Check]:
    existing = nearest_existing(folder.absolute())
    if not existing.is_dir():
        yield Check("fail", "data", f"DATA_DIR {folder}: {existing} is not a folder")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Check("fail", "data", f"DATA_DIR {folder}: no permission to write in {existing}")
    else:
        free = shutil.disk_usage(existing).free / GIGA
        yield Check("ok", "data", f"DATA_DIR {folder}, {free:.1f} GB of disk free")


def _torch_and_device(seen: Survey) -> Iterator[Check]:
    if seen.torch_error is not None:
        yield Check("fail", "torch", f"it cannot be used: {seen.torch_error}")
        return
    yield Check("ok", "torch", f"torch {seen.torch}")
    if seen.device_error is not None:
        yield Check("fail", "device", f"DEVICE {seen.device}: {seen.device_error}")
    elif seen.device_total_gb is None:
        computes = f", computes in {seen.arithmetic}" if seen.arithmetic else ""
        yield Check("ok", "device", f"{seen.device}{computes}")
    else:
        memory = f"{seen.device_free_gb:.1f} GB of {seen.device_total_gb:.1f} GB free"
        yield Check("ok", "device", f"{seen.device}, {memory}")


def _checkpoint(seen: Survey, settings: Settings) -> Check:
    if seen.checkpoint_error is not None:
        return Check("fail", "checkpoint", seen.checkpoint_error)
    place = "inside the package" if settings.model_path is None else f"at {settings.model_path}"
    text = f"{seen.checkpoint} {place}, {seen.weights_gb:.2f} GB of weights"
    if settings.model_path is None:
        text += "; for a published model set MODEL_PATH"
    return Check("ok", "checkpoint", text)


def _plan(seen: Survey) -> Iterator[Check]:
    """How the model is placed and, if there is a device, whether it fits there."""
    plan, free_gb = seen.placement, seen.device_free_gb
    if plan is None:
        return
    if plan.predicted_peak_gb is None or free_gb is None:
        yield Check("ok", "plan", plan.reason)
        return
    needs = f"about {plan.predicted_peak_gb:.1f} GB of the {free_gb:.1f} GB that are free"
    if plan.predicted_peak_gb <= free_gb:
        yield Check("ok", "plan", f"fits: {plan.reason}; an edit needs {needs}")
    else:
        yield Check("note", "plan", f"may not fit: {plan.reason}, and an edit needs {needs}")


def _upscaler(seen: Survey, settings: Settings) -> Iterator[Check]:
    """The file of UPSCALE_MODEL; edits are possible without it."""
    if seen.upscale_error is not None:
        yield Check("note", "upscale", seen.upscale_error)
    elif seen.upscale is not None:
        text = f"{settings.upscale_model} enlarges pictures {seen.upscale} times"
        yield Check("ok", "upscale", text)


def _defaults(seen: Survey, settings: Settings) -> Iterator[Check]:
    from step1x_edit.service.service import suggestion_for

    suggested = suggestion_for(seen.version, settings)
    if suggested is not None:
        yield Check(
            "note",
            "defaults",
            f"suggested: num_steps {suggested.num_steps}, guidance_scale "
            f"{suggested.guidance_scale:.1f} for {seen.version}; set DEFAULT_NUM_STEPS and "
            "DEFAULT_GUIDANCE_SCALE to use them by default",
        )


def _server(settings: Settings) -> Iterator[Check]:
    from step1x_edit.interfaces.discovery import find_server

    found: RunningServer | None = asyncio.run(find_server(settings.data_dir))
    if found is not None:
        yield Check("ok", "server", f"running at {found.url}; commands use it")
        return
    yield Check("ok", "server", "none is running on this machine; commands load the model")
    place = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        yield Check("note", "port", f"step1x-edit serve could not listen at {place} ({reason})")
        return
    yield Check("ok", "port", f"{place} is free")
