"""The part of the page that fetches published models.

It shows the state of `pulls`, which this tab, another one or a REST client may have started. So it
keeps only what it has shown.
"""

from __future__ import annotations

import asyncio
import html
import shlex
from pathlib import Path
from typing import Any, Final

import gradio as gr

from step1x_edit.channel import GIGA
from step1x_edit.errors import EditCancelledError, Step1XEditError
from step1x_edit.hub.catalog import CATALOG
from step1x_edit.hub.pulls import Pull, Pulls
from step1x_edit.interfaces.page.lines import alert_of, bar_line
from step1x_edit.interfaces.page.parts import PRIVATE, T, visitor_language
from step1x_edit.interfaces.page.texts import text
from step1x_edit.schemas.answers import PulledModel

_FIRST: Final = "v1.1"  # the model that the guide starts with
_REFRESH_S: Final = 0.5  # while a pull runs
_MEGA: Final = 10**6


class ModelsPanel:
    """A list of the models, buttons to fetch and stop, and the progress.

    It is placed where the page is being built, and shown again by `refresh`. While a pull runs, it
    refreshes itself more often.
    """

    def __init__(self, pulls: Pulls) -> None:
        self._pulls = pulls
        self._choice = gr.Dropdown(
            [model.name for model in CATALOG],
            value=_FIRST,
            filterable=False,
            label=T("models"),
            elem_id="models-choice",
        )
        with gr.Row():
            self._fetch = gr.Button(
                T("models.fetch"), variant="primary", interactive=False, elem_id="models-fetch"
            )
            self._stop = gr.Button(
                T("stop"), variant="stop", interactive=False, elem_id="models-stop"
            )
        self._line = gr.Markdown(elem_classes="line", elem_id="models-line", sanitize_html=False)
        self._shown = gr.State()
        self._timer = gr.Timer(_REFRESH_S, active=False)
        self.inputs: Final[list[Any]] = [self._choice, self._shown]
        self.outputs: Final[list[Any]] = [
            *self.inputs,
            self._fetch,
            self._stop,
            self._line,
            self._timer,
        ]
        for trigger in (self._timer.tick, self._choice.input):
            trigger(self.refresh, self.inputs, self.outputs, api_name="look", **PRIVATE)
        self._fetch.click(self._begin, self.inputs, self.outputs, **PRIVATE)
        self._stop.click(self._end, self.inputs, self.outputs, **PRIVATE)

    async def refresh(self, request: gr.Request, name: str, shown: str | None) -> dict[Any, Any]:
        """Show the current state; the list only if it may have changed since it was shown."""
        language = visitor_language(request)
        latest, running = self._pulls.latest, self._pulls.running
        state = "" if latest is None else f"{latest.name} {latest.state.value}"
        update: dict[Any, Any] = {}
        if state != shown:
            name = running.name if running is not None else name
            models = await asyncio.to_thread(self._pulls.models)
            choices = [(_label(model, running, language), model.name) for model in models]
            update = {
                self._choice: gr.Dropdown(choices, value=name),
                self._timer: gr.Timer(active=running is not None),
                self._shown: state,
            }
        is_here = self._pulls.folder_of(name) is not None
        return update | {
            self._fetch: gr.Button(interactive=running is None and not is_here),
            self._stop: gr.Button(interactive=running is not None and not running.is_stopping),
            self._line: self._line_about(name, language),
        }

    async def _begin(self, request: gr.Request, name: str, shown: str | None) -> dict[Any, Any]:
        try:
            self._pulls.begin(name)
        except Step1XEditError as error:
            return {self._line: alert_of(error, visitor_language(request))}
        return await self.refresh(request, name, shown)

    async def _end(self, request: gr.Request, name: str, shown: str | None) -> dict[Any, Any]:
        if self._pulls.running is not None:
            self._pulls.running.stop()
        return await self.refresh(request, name, shown)

    def _line_about(self, name: str, language: str) -> str:
        """The line about the running pull, or else about the chosen model."""
        latest, running = self._pulls.latest, self._pulls.running
        if running is not None:
            return _progress(running, language)
        if latest is not None and latest.name == name:
            match latest.outcome:
                case EditCancelledError():
                    return html.escape(f"{name} · {text('pull.stopped', language)}")
                case Step1XEditError() as error:
                    return alert_of(error, language)
        folder = self._pulls.folder_of(name)
        if folder is None or self._pulls.runs(name):
            return ""
        return _how_to_use(name, folder, language)


def _label(model: PulledModel, running: Pull | None, language: str) -> str:
    """A model in the list: its name, its size if that is known, and its state."""
    size = model.disk_bytes if model.state == "pulled" else model.size_bytes
    state = "runs" if model.runs else str(model.state)
    if running is not None and running.name == model.name:
        state = "running"
    parts = [model.name, text(f"model.{state}", language)]
    if size is not None:
        number, unit = _in_unit(size, size)
        parts.insert(1, f"{number} {unit}")
    return " · ".join(parts)


def _progress(pull: Pull, language: str) -> str:
    progress, speed = pull.progress, pull.bytes_per_s
    phase = "asking" if progress is None else progress.phase
    words = [pull.name, text("pull.stopping" if pull.is_stopping else f"pull.{phase}", language)]
    share = 0.0
    if progress is not None and progress.total:
        share = progress.done / progress.total
        done, unit = _in_unit(progress.done, progress.total)
        total, _ = _in_unit(progress.total, progress.total)
        words.append(text("amount", language, done=done, total=total, unit=unit))
        if phase == "downloading" and speed is not None and not pull.is_stopping:
            words.append(f"{speed / _MEGA:.1f} MB/s")
    return bar_line(" · ".join(words), share)


def _in_unit(count: int, of: int) -> tuple[str, str]:
    """Bytes in the unit that suits `of`, and that unit."""
    size, unit = (GIGA, "GB") if of >= GIGA else (_MEGA, "MB")
    return f"{count / size:.1f}", unit


def _how_to_use(name: str, folder: Path, language: str) -> str:
    words = html.escape(text("model.here", language, name=name))
    return f"{words} <code>MODEL_PATH={html.escape(shlex.quote(str(folder)))}</code>"
