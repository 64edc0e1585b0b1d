"""The state of the server on the page: the chip beside the title, and the tab System."""

from __future__ import annotations

import html
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import gradio as gr

from step1x_edit.errors import Step1XEditError
from step1x_edit.hub.pulls import Pulls
from step1x_edit.interfaces.page.form import Form
from step1x_edit.interfaces.page.lines import alert_of, done_line
from step1x_edit.interfaces.page.models import ModelsPanel
from step1x_edit.interfaces.page.parts import PRIVATE, T, visitor_language
from step1x_edit.interfaces.page.progress import words_of
from step1x_edit.interfaces.page.texts import text
from step1x_edit.schemas.answers import GpuAnswer, GpuStatus
from step1x_edit.schemas.plan import PlanStatus
from step1x_edit.service.service import EditService


class SystemTab:
    """A table of the state, buttons that free memory, and the published models.

    It is placed where the page is being built. A refresh also updates the chip and what the forms
    recommend.
    """

    def __init__(
        self, service: EditService, pulls: Pulls, chip: gr.Markdown, forms: Sequence[Form]
    ) -> None:
        self._service = service
        self._chip = chip
        self._forms = forms
        self._table = gr.Markdown(elem_classes="status", sanitize_html=False)
        with gr.Row():
            self._offload = gr.Button(T("offload"), visible=False, elem_id="offload")
            self._release = gr.Button(T("release"), elem_id="release")
        self._line = gr.Markdown(elem_classes="line", sanitize_html=False)
        self._models = ModelsPanel(pulls)
        hints = [part for form in forms for part in form.hint]
        state = [chip, self._table, self._offload]
        self._outputs: Final[list[Any]] = [*state, *hints, *self._models.outputs]

    def refresh_on(self, event: Callable[..., Any]) -> None:
        """Refresh whenever this event occurs."""
        event(self.refresh, self._models.inputs, self._outputs, api_name="refresh", **PRIVATE)

    def listen(self) -> None:
        """Connect the buttons."""
        line = self._line
        self.refresh_on(self._offload.click(self.move_away, None, line, **PRIVATE).then)
        self.refresh_on(self._release.click(self.let_go, None, line, **PRIVATE).then)

    async def refresh(self, request: gr.Request, name: str, shown: str | None) -> dict[Any, Any]:
        """Show the current state; `name` and `shown` belong to the models."""
        status, language = self._service.status().gpu_status, visitor_language(request)
        update: dict[Any, Any] = {
            self._chip: _chip(status, self._doing(language), language),
            self._table: _table(status, language),
            self._offload: gr.Button(visible=_has_gpu(status)),
        }
        suggestion = self._service.suggestion
        for form in self._forms:
            update |= form.suggest(suggestion, language)
        return update | await self._models.refresh(request, name, shown)

    def _doing(self, language: str) -> str | None:
        """What the model is being used for, in words; None if nothing."""
        if loading := self._service.loading:
            return words_of(loading, language)
        return text("editing", language) if self._service.is_editing else None

    async def move_away(self, request: gr.Request) -> str:
        return await _line_after(self._service.offload(), visitor_language(request))

    async def let_go(self, request: gr.Request) -> str:
        return await _line_after(self._service.release(), visitor_language(request))


async def _line_after(move: Awaitable[GpuAnswer], language: str) -> str:
    try:
        location = (await move).gpu_status.model_location
    except Step1XEditError as error:
        return alert_of(error, language)
    return done_line(text(f"at.{location}", language))


def _chip(status: GpuStatus, doing: str | None, language: str) -> str:
    words = [doing or text(f"at.{status.model_location}", language)]
    if status.queue_length:
        words.append(text("waiting", language, length=status.queue_length))
    return (
        f'<span class="pill"><b class="{status.model_location}"></b>'
        f"{html.escape(' · '.join(words))}</span>"
    )


def _has_gpu(status: GpuStatus) -> bool:
    """Whether the model computes on a GPU; that is not known while no model is loaded."""
    return status.device not in (None, "cpu")


def _table(status: GpuStatus, language: str) -> str:
    stays = "idle.until" if status.idle_timeout else "idle.stays"
    idle = text(
        stays if status.model_location == "GPU" else "idle.host",
        language,
        seconds=round(status.idle_time),
        timeout=status.idle_timeout,
    )
    rows = {
        "location": text(f"at.{status.model_location}", language),
        "model": status.model or "–",
        "device": ", ".join(filter(None, (status.device, status.arithmetic))) or "–",
        **_gpu_rows(status, language),
        "idle": idle,
        "queue": status.queue_length or 0,
        "loads": status.statistics.total_loads,
        **_plan_rows(status.plan, language),
    }
    if status.loras is not None:
        rows["loras"] = ", ".join(status.loras_in_model or ["–"])
    cells = "".join(
        f"<tr><td>{html.escape(text(f'status.{key}', language))}</td>"
        f"<td>{html.escape(str(value))}</td></tr>"
        for key, value in rows.items()
    )
    return f"<table><tbody>{cells}</tbody></table>"


def _gpu_rows(status: GpuStatus, language: str) -> dict[str, str]:
    """The memory of the GPU and the moves to and from it, if the model computes there."""
    if not _has_gpu(status):
        return {}
    memory = text(
        "memory",
        language,
        allocated=status.gpu_memory_allocated_gb,
        reserved=status.gpu_memory_reserved_gb,
    )
    statistics = status.statistics
    return {"memory": memory, "moves": f"{statistics.cpu_to_gpu} / {statistics.gpu_to_cpu}"}


def _plan_rows(plan: PlanStatus | None, language: str) -> dict[str, str]:
    """The placement of the model, if it is known."""
    if plan is None:
        return {}
    if plan.streaming:
        share = f"{100 * plan.resident_share:.0f}"
        placed = text("plan.streams", language, share=share, slots=plan.slots)
    else:
        key = "plan.host" if plan.predicted_peak_gb is None else "plan.fits"
        placed = text(key, language)
    peaks = {"predicted": plan.predicted_peak_gb, "measured": plan.measured_peak_gb}
    peak = [text(f"peak.{key}", language, gb=gb) for key, gb in peaks.items() if gb is not None]
    return {
        "plan": f"{placed} · {plan.precision}",
        "peak": " · ".join(peak) or "–",
        "host": "–" if plan.host_gb is None else f"{plan.host_gb} GB",
    }
