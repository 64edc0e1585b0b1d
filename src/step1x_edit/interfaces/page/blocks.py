"""The page as an application of Gradio: its layout, and how it is mounted.

Only this module and those of its tabs (`form`, `models`, `parts`, `status`, `tabs`, `uploads`,
`views`) import Gradio.
"""

from __future__ import annotations

import contextlib
import html
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, NoReturn

import gradio as gr
from fastapi import FastAPI
from gradio import processing_utils, routes

from step1x_edit.hub.pulls import Pulls
from step1x_edit.interfaces.page import document
from step1x_edit.interfaces.page.files import PageFiles
from step1x_edit.interfaces.page.parts import PRIVATE, T, visitor_language
from step1x_edit.interfaces.page.sessions import Sessions
from step1x_edit.interfaces.page.status import SystemTab
from step1x_edit.interfaces.page.tabs import BatchTab, EditTab, RegionTab
from step1x_edit.interfaces.page.texts import text
from step1x_edit.service.service import EditService
from step1x_edit.settings import Settings

_REFRESH_S: Final = 3.0
_DAY_S: Final = 24 * 3600
_EVENTS: Final = 256  # events that may wait to start, including refreshes of the status
_COLOURS: Final = {  # text and background: a contrast of at least 4.5
    "body_text_color_subdued": "*neutral_600",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_dark": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_700",
}
_RESTORE: Final = "() => window.step1xEdit.restored()"
_ENDED: Final = "() => window.step1xEdit.ended()"


def build(service: EditService, settings: Settings, pulls: Pulls, files: PageFiles) -> FastAPI:
    """The page as an application of Gradio; it must be entered with `running`.

    Its `state.functions` holds the numbers of the functions that an event may name, and
    `state.sessions` the names of the sessions that have sent an event.
    """
    # Our page uploads pictures. Gradio would also download a URL that an event contains.
    processing_utils.async_ssrf_protected_get = _no_fetching
    document.describe(routes.templates.env, Path(gr.__file__).parent / "templates")
    blocks = _Page(service, settings, pulls, files).blocks()
    # The engine has the only queue: events start at once, and the engine refuses if it is full.
    blocks.queue(max_size=_EVENTS, default_concurrency_limit=None)
    outer = FastAPI()
    gr.mount_gradio_app(
        outer,
        blocks,
        path="/",
        allowed_paths=[],
        max_file_size=settings.max_bytes,
        show_error=False,  # unexpected errors are in the log; ours are on the page
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        footer_links=["settings"],
        i18n=T,
        theme=gr.themes.Default(
            primary_hue="blue",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ).set(**_COLOURS),
        css=Path(__file__).with_name("page.css").read_text("utf-8"),
    )
    # Gradio checks that files in events were uploaded only if it was launched, which does not
    # include being mounted (`processing_utils._check_allowed`).
    blocks.has_launched = True
    outer.state.functions = frozenset(blocks.fns)
    outer.state.sessions = blocks._queue.pending_messages_per_session
    return outer


async def _no_fetching(url: str) -> NoReturn:
    raise gr.Error("upload the picture; no URL is fetched", print_exception=False)


@contextlib.asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[None]:
    """Run the background work of the application while the context lasts."""
    async with app.router.lifespan_context(app):
        yield


class _Page:
    """The layout of the page, and the events that concern the whole page."""

    def __init__(
        self, service: EditService, settings: Settings, pulls: Pulls, files: PageFiles
    ) -> None:
        self._service = service
        self._settings = settings
        self._pulls = pulls
        self._sessions = Sessions(files)

    def blocks(self) -> gr.Blocks:
        editing = self._service, self._settings, self._sessions
        blocks = gr.Blocks(
            title="step1x-edit", analytics_enabled=False, delete_cache=(3600, _DAY_S)
        )
        with blocks:
            with gr.Row(elem_classes="head"):
                gr.Markdown("# step1x-edit")
                chip = gr.Markdown(elem_classes="chip", sanitize_html=False)
            notice = gr.Markdown(elem_classes="line", elem_id="notice", sanitize_html=False)
            is_demo = self._settings.model_path is None
            about = gr.Markdown(visible=is_demo, sanitize_html=False, min_height=64)
            with gr.Tab(T("tab.edit")) as edit_place:
                edit = EditTab(*editing)
            with gr.Tab(T("tab.region")) as region_place:
                region = RegionTab(*editing)
            with gr.Tab(T("tab.batch")) as batch_place:
                batch = BatchTab(*editing)
            tabs = {edit: edit_place, region: region_place, batch: batch_place}
            self._forms = [tab.form for tab in tabs]
            with gr.Tab(T("tab.system")):
                system = SystemTab(self._service, self._pulls, chip, self._forms)

            prompts = [form.prompt for form in self._forms]
            reasoning = [choice for form in self._forms for choice in form.reasoning]
            blocks.load(None, None, [*prompts, notice], js=_RESTORE, **PRIVATE)
            blocks.load(_about, None, about, **PRIVATE)
            for one in (edit, region):
                if one.kept is not None:
                    blocks.load(one.remember, None, one.view.gallery, **PRIVATE)
            blocks.load(self._offered, None, reasoning, **PRIVATE)
            system.refresh_on(blocks.load)
            system.refresh_on(gr.Timer(_REFRESH_S).tick)
            system.listen()
            for tab, place in tabs.items():
                tab.form.foretell_on(blocks.load)
                tab.form.foretell_on(place.select)
                for end in tab.ends:
                    tab.form.foretell_on(end.then)
                    system.refresh_on(end.then(None, None, None, js=_ENDED, **PRIVATE).then)
            blocks.unload(self._leave)
        return blocks

    def _offered(self, request: gr.Request) -> dict[Any, Any]:
        language = visitor_language(request)
        update: dict[Any, Any] = {}
        for form in self._forms:
            update |= form.offer_reasoning(language)
        return update

    def _leave(self, request: gr.Request) -> None:
        session = self._sessions.pop(str(request.session_hash), None)
        if session is not None:
            session.close()


def _about(request: gr.Request) -> str:
    language = visitor_language(request)
    badge, about = text("demo.badge", language), text("demo.about", language)
    return f'<div class="demo"><b>{html.escape(badge)}</b> {html.escape(about)}</div>'
