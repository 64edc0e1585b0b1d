"""The commands that report and move the model of a running server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from step1x_edit.interfaces.cli.options import ApiKey, AsJson, Standalone, Url
from step1x_edit.interfaces.cli.terminal import (
    cli_settings,
    failures_on_stderr,
    out,
    print_json,
    print_line,
)
from step1x_edit.schemas.answers import GpuAnswer, StatusAnswer

if TYPE_CHECKING:
    from step1x_edit.settings import Settings

_NO_SERVER: Final = (
    "No server is running on this machine, so no model is loaded: start one with step1x-edit "
    "serve, or each command loads the model while it runs"
)
_ALONE: Final = "With --standalone no server is used, and this command loads no model"


def status(
    url: Url = None, api_key: ApiKey = None, standalone: Standalone = False, as_json: AsJson = False
) -> None:
    """Report where the model of the running server is and how much memory it uses.

    Without a server no model is loaded, because each command loads one only
    while it edits. This is not a failure; the exit code is 0.
    """
    from step1x_edit.interfaces.cli.editors import found_server

    with failures_on_stderr(as_json):
        settings = cli_settings()
        server = found_server(settings, url, api_key, standalone)
        answer = _own_status(settings) if server is None else asyncio.run(server.status())
        if as_json:
            print_json({**answer.to_dict(), "server": None if server is None else server.url})
            return
        if server is None:
            print_line(_ALONE if standalone else _NO_SERVER)
            return
        for name, value in _rows({"server": server.url, **answer.gpu_status.to_dict()}):
            out.print(f"{name:<24} {value}", markup=False)


def _rows(status: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The lines of the status: lists and counts on one line; a line for each part of the plan
    and for each replica."""
    for name, value in status.items():
        match name, value:
            case "plan", dict():
                yield from ((f"plan {part}", known) for part, known in value.items())
            case "replicas", list():
                yield from ((f"replica {one['name']}", _in_words(one)) for one in value)
            case _, dict():
                yield name, ", ".join(f"{key} {count}" for key, count in value.items())
            case _, list():
                yield name, ", ".join(value)
            case _:
                yield name, value


def _in_words(replica: Mapping[str, object]) -> str:
    model = f", {replica['model']}" if "model" in replica else ""
    return f"{replica['state']}, {replica['model_location']}{model}"


def offload(
    url: Url = None, api_key: ApiKey = None, standalone: Standalone = False, as_json: AsJson = False
) -> None:
    """Move the model of the running server from the GPU to host memory.

    This waits for the running edit; the next edit moves the model back.
    """
    _move("offload", url, api_key, standalone, as_json)


def release(
    url: Url = None, api_key: ApiKey = None, standalone: Standalone = False, as_json: AsJson = False
) -> None:
    """Unload the model of the running server and free all of its memory.

    This waits for the running edit; the next edit loads the model from disk.
    """
    _move("release", url, api_key, standalone, as_json)


def _move(move: str, url: str | None, api_key: str | None, standalone: bool, as_json: bool) -> None:
    from step1x_edit.interfaces.cli.editors import found_server

    with failures_on_stderr(as_json):
        settings = cli_settings()
        server = found_server(settings, url, api_key, standalone)
        if server is None:
            answer = GpuAnswer(
                message=f"Nothing to {move}: no server is running on this machine",
                gpu_status=_own_status(settings).gpu_status,
            )
        else:
            answer = asyncio.run(server.offload() if move == "offload" else server.release())
        if as_json:
            print_json({**answer.to_dict(), "server": None if server is None else server.url})
        else:
            print_line(answer.message)


def _own_status(settings: Settings) -> StatusAnswer:
    """The status of this process, which has not loaded a model."""
    from step1x_edit.service.wiring import build_service

    with contextlib.closing(build_service(settings)) as service:
        return service.status()
