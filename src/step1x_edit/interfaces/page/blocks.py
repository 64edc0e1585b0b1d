"""What stands on the web page, and what its buttons do.

Only this module, `ui_models` and `ui_parts` import Gradio.

Each edit runs in a separate task that belongs to a tab of a visitor's session: *Stop* and closing
the page cancel the task, and the generator that Gradio reads from only tells what happens to it.
What a tab has made is kept there too, so that it is complete when an edit ends and not only as it
was when the button was pressed. Files go to and come from the page as they are: Gradio's own
reading and writing of pictures is not used for them, because it would encode them again.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import io
import re
import shutil
import zipfile
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, NoReturn, TypeAlias, TypeVar

import gradio as gr
import numpy as np
from fastapi import FastAPI
from gradio import processing_utils, routes
from gradio.events import Dependency
from PIL import Image

from step1x_edit.channel import Progress
from step1x_edit.errors import EditCancelledError, Step1XEditError
from step1x_edit.hub.pulls import Pulls
from step1x_edit.interfaces.page import document
from step1x_edit.interfaces.page.files import PageFiles
from step1x_edit.interfaces.page.lines import (
    alert,
    alert_of,
    caution,
    done_line,
    picture_alone,
    pictures_compared,
)
from step1x_edit.interfaces.page.models import ModelsPanel
from step1x_edit.interfaces.page.parts import PRIVATE, T, visitor_language
from step1x_edit.interfaces.page.progress import ProgressLine
from step1x_edit.interfaces.page.texts import DEMO_EXAMPLES, EXAMPLES, has_text, text
from step1x_edit.interfaces.rounds import read_verdict
from step1x_edit.model.request import Pixels
from step1x_edit.pictures import images
from step1x_edit.schemas.plan import PlanStatus
from step1x_edit.schemas.requests import (
    GpuAnswer,
    GpuStatus,
    HowToEdit,
    Parameter,
    PictureRequest,
    Suggestion,
    loras_of,
    parameters_of,
)
from step1x_edit.service.file_edits import edit_each
from step1x_edit.service.service import EditedPicture, EditService
from step1x_edit.settings import Settings

E = TypeVar("E")
_Tell: TypeAlias = Callable[[E], Awaitable[None]]

_ASSETS: Final = Path(__file__).parents[1] / "assets"
_EXAMPLE_PHOTO: Final = _ASSETS / "coffee.jpg"
_PREVIEWS: Final = 8  # of one edit
_PREVIEW_SIDE: Final = 512
_SHOWN_SIDE: Final = 1280
_HISTORY: Final = 12
_REFRESH_S: Final = 3.0
_DAY_S: Final = 24 * 3600
_EVENTS: Final = 256  # that may be about to start; also those that only look at the status
_REASONING: Final = ("thinking", "reflection")
_COLOURS: Final = {  # of letters and what is behind them: a contrast of 4.5 at least
    "body_text_color_subdued": "*neutral_600",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_dark": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_700",
}
_RESTORE: Final = "() => window.step1xEdit.restored()"
_ENDED: Final = "() => window.step1xEdit.ended()"


def build(service: EditService, settings: Settings, pulls: Pulls, files: PageFiles) -> FastAPI:
    """The page as an application of Gradio's; it has to be entered with `running`.

    Its `state.functions` holds the numbers of the functions that an event may name, and
    `state.sessions` the names of the sessions that have sent an event.
    """
    # Our page uploads pictures; whoever names an address instead would have us fetch it.
    processing_utils.async_ssrf_protected_get = _no_fetching
    document.describe(routes.templates.env, Path(gr.__file__).parent / "templates")
    blocks = _Page(service, settings, pulls, files).blocks()
    # The engine has the only line: here everything starts at once, and is refused there if need be.
    blocks.queue(max_size=_EVENTS, default_concurrency_limit=None)
    outer = FastAPI()
    gr.mount_gradio_app(
        outer,
        blocks,
        path="/",
        allowed_paths=[],
        max_file_size=settings.max_bytes,
        show_error=False,  # what nobody expected is in the log; errors of ours are on the page
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
    # Gradio checks that files in events were uploaded only if it was launched, and does not count
    # being mounted as that (`processing_utils._check_allowed`).
    blocks.has_launched = True
    outer.state.functions = frozenset(blocks.fns)
    outer.state.sessions = blocks._queue.pending_messages_per_session
    return outer


async def _no_fetching(url: str) -> NoReturn:
    raise gr.Error("pictures are uploaded and not fetched from addresses", print_exception=False)


@contextlib.asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[None]:
    """What the application does beside answering, for as long as it answers."""
    async with app.router.lifespan_context(app):
        yield


# --- sessions -------------------------------------------------------------------------------------


class _Tab:
    """The running work of one tab of the page, and what has been made there; newest first."""

    def __init__(self) -> None:
        self.made: _Made | None = None
        self.history: Sequence[_Made] = ()
        self.is_busy = False
        self._is_stopped = False
        self._task: asyncio.Task[None] | None = None

    def add(self, made: _Made) -> None:
        """Keep what has been made."""
        self.made, self.history = made, [made, *self.history][:_HISTORY]

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """One thing at a time is done in a tab: from the button's press until its end."""
        self.is_busy, self._is_stopped = True, False
        try:
            yield
        finally:
            self.is_busy = False

    async def run(self, work: Callable[[_Tell[E]], Awaitable[None]]) -> AsyncIterator[E]:
        """Yield what the work reports, and raise what ends it."""
        events: asyncio.Queue[E | None] = asyncio.Queue()

        async def report(event: E) -> None:
            events.put_nowait(event)

        if self._is_stopped:
            raise EditCancelledError
        self._task = task = asyncio.ensure_future(work(report))
        task.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            if task.cancelled():
                raise EditCancelledError
            task.result()
        finally:
            task.cancel()  # does nothing to one that has ended

    def stop(self) -> None:
        """Cancel what runs, and what would follow it."""
        self._is_stopped = True
        if self._task is not None:
            self._task.cancel()


class _Session:
    """The tabs and the files of one visitor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tabs: dict[str, _Tab] = defaultdict(_Tab)

    def place(self, name: str) -> Path:
        """Where a file of this name may be written, at an address that nobody can guess."""
        folder = self._folder / token_hex(16)
        folder.mkdir(parents=True)
        return folder / name

    def save(self, name: str, data: bytes) -> str:
        """Write a file to such a place."""
        path = self.place(name)
        path.write_bytes(data)
        return str(path)

    def close(self) -> None:
        """Cancel what runs and forget the files."""
        for tab in self.tabs.values():
            tab.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


class _Sessions(dict[str, _Session]):
    """The visitors by what their browsers call themselves; such a name is never part of a path."""

    def __init__(self, files: PageFiles) -> None:
        self._files = files

    def __missing__(self, name: str) -> _Session:
        self[name] = session = _Session(self._files.folder_of(name))
        return session


# --- the page -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """An edit as the history keeps it."""

    source: str
    before: str
    after: str
    result: str
    caption: str
    label: str
    arguments: Mapping[str, object]
    mask: bytes | None = None
    thoughts: _Thoughts | None = None


@dataclass(frozen=True)
class _Thoughts:
    """What is shown of the reasoning behind an edit."""

    rewritten: str
    rounds: Sequence[tuple[str, str]]
    """Each picture's path, and what stands below it."""
    verdicts: str


@dataclass(frozen=True)
class _Form:
    """What is asked for: a widget for the prompt and for each parameter of an edit, by name."""

    widgets: Mapping[str, Any]

    @property
    def inputs(self) -> list[Any]:
        return list(self.widgets.values())

    def arguments(self, values: tuple[object, ...]) -> dict[str, object]:
        given = dict(zip(self.widgets, values, strict=True))
        return {**given, "prompt": str(given["prompt"] or "").strip()}


@dataclass(frozen=True)
class _Hint:
    """What the authors of the model recommend, beside a button that takes it over."""

    row: gr.Row
    line: gr.Markdown

    def shown(self, suggestion: Suggestion | None, language: str) -> dict[Any, Any]:
        """The line if there is something to recommend, and nothing if not."""
        if suggestion is None:
            return {self.row: gr.Row(visible=False), self.line: ""}
        line = text(
            "suggested",
            language,
            num_steps=suggestion.num_steps,
            guidance_scale=f"{suggestion.guidance_scale:g}",
        )
        return {self.row: gr.Row(visible=True), self.line: html.escape(line)}


@dataclass(frozen=True)
class _Buttons:
    run: gr.Button
    stop: gr.Button
    line: gr.Markdown

    @property
    def outputs(self) -> list[Any]:
        return [self.run, self.stop, self.line]

    def busy(self, line: str = "") -> dict[Any, Any]:
        """While work is done; said with each line, because a browser may lose one of two updates
        that come at once."""
        return {
            self.run: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
            self.line: line,
        }

    def free(self, line: str) -> dict[Any, Any]:
        return {
            self.run: gr.Button(interactive=True),
            self.stop: gr.Button(interactive=False),
            self.line: line,
        }

    def unchanged(self) -> dict[Any, Any]:
        """For a press that comes while the tab is busy."""
        return {self.line: gr.skip()}

    def refused(
        self, tab: _Tab, pictures: object, arguments: Mapping[str, object], language: str
    ) -> dict[Any, Any]:
        """For a press that cannot start an edit."""
        if tab.is_busy:
            return self.unchanged()
        return self.free(alert(_missing(pictures, arguments, language)))


@dataclass(frozen=True)
class _ThoughtsView:
    """Where the reasoning behind a result is shown, if there was any.

    It has text boxes, because what a model says must not become part of the page.
    """

    accordion: gr.Accordion
    rewritten: gr.Textbox
    rounds: gr.Gallery
    verdicts: gr.Textbox

    def show(self, thoughts: _Thoughts | None) -> dict[Any, Any]:
        if thoughts is None:
            return {self.accordion: gr.Accordion(visible=False)}
        return {
            self.accordion: gr.Accordion(visible=True),
            self.rewritten: gr.Textbox(thoughts.rewritten, visible=bool(thoughts.rewritten)),
            self.rounds: gr.Gallery(list(thoughts.rounds), visible=bool(thoughts.rounds)),
            self.verdicts: gr.Textbox(thoughts.verdicts, visible=bool(thoughts.verdicts)),
        }


@dataclass(frozen=True)
class _View:
    """Where a result is shown, and what was made before.

    The buttons below mean the picture that is shown: they rest while that is no result.
    """

    tab: str
    pictures: gr.HTML
    actions: gr.Row
    download: gr.DownloadButton
    reuse: gr.Button
    again: gr.Button
    thoughts: _ThoughtsView
    gallery: gr.Gallery

    @property
    def outputs(self) -> list[Any]:
        shown = [self.pictures, self.actions, self.download, self.reuse, self.again, self.gallery]
        return [*shown, *vars(self.thoughts).values()]

    def begin(self, before: str, language: str) -> dict[Any, Any]:
        """Show what is going to be edited."""
        return {
            self.pictures: picture_alone(before, language),
            self.download: gr.DownloadButton(interactive=False),
            self.reuse: gr.Button(interactive=False),
            self.again: gr.Button(interactive=False),
            **self.thoughts.show(None),
        }

    def show(self, made: _Made | None, language: str) -> dict[Any, Any]:
        """Show a result, or that there is none."""
        if made is None:
            return {self.pictures: "", self.actions: gr.Row(visible=False)}
        return {
            self.pictures: pictures_compared(made.before, made.after, "after", language),
            self.actions: gr.Row(visible=True),
            self.download: gr.DownloadButton(value=made.result, interactive=True),
            self.reuse: gr.Button(interactive=True),
            self.again: gr.Button(interactive=True),
            **self.thoughts.show(made.thoughts),
        }

    def show_history(self, history: Sequence[_Made]) -> dict[Any, Any]:
        pictures = [(made.after, made.label) for made in history]
        return {self.gallery: gr.Gallery(value=pictures, visible=True)}


@dataclass(frozen=True)
class _BatchView:
    """Where the results of a batch are shown, and a file with all of them."""

    gallery: gr.Gallery
    archive: gr.DownloadButton

    def begin(self) -> dict[Any, Any]:
        """Show that there is nothing yet."""
        return {self.gallery: [], self.archive: gr.DownloadButton(visible=False)}


class _Results:
    """What has become of the pictures of a batch."""

    def __init__(self, session: _Session, language: str) -> None:
        self.language = language
        self.files: dict[str, str] = {}  # on disk: there may be many, and they may be large
        self.problems: list[str] = []
        self._session = session
        self._shown: list[tuple[str, str]] = []

    async def keep(self, edited: EditedPicture, name: str) -> list[tuple[str, str]]:
        """Write a result to the disk; returns what the gallery has to show now."""
        result = _unused(_result_name(name), self.files)
        small, path = await asyncio.to_thread(_kept, self._session, edited, result)
        self.files[result] = path
        self._shown = [*self._shown, (small, name)]
        return self._shown


class _Page:
    def __init__(
        self, service: EditService, settings: Settings, pulls: Pulls, files: PageFiles
    ) -> None:
        self._service = service
        self._pulls = pulls
        self._limits = settings.limits
        self._is_demo = settings.model_path is None
        self._checkboxes: list[gr.Checkbox] = []
        self._sessions = _Sessions(files)
        self._hints: list[_Hint] = []  # one for each form
        self._prompts: list[gr.Textbox] = []  # the same
        self._ends: list[Dependency] = []  # the events after which an edit has ended

    def blocks(self) -> gr.Blocks:
        blocks = gr.Blocks(
            title="step1x-edit", analytics_enabled=False, delete_cache=(3600, _DAY_S)
        )
        with blocks:
            with gr.Row(elem_classes="head"):
                gr.Markdown("# step1x-edit")
                chip = gr.Markdown(elem_classes="chip", sanitize_html=False)
            notice = gr.Markdown(elem_classes="line", elem_id="notice", sanitize_html=False)
            about = gr.Markdown(visible=self._is_demo, sanitize_html=False, min_height=64)
            with gr.Tab(T("tab.edit")):
                self._edit_tab()
            with gr.Tab(T("tab.region")):
                self._region_tab()
            with gr.Tab(T("tab.batch")):
                self._batch_tab()
            with gr.Tab(T("tab.system")):
                table = gr.Markdown(elem_classes="status", sanitize_html=False)
                with gr.Row():
                    offload = gr.Button(T("offload"), elem_id="offload")
                    release = gr.Button(T("release"), elem_id="release")
                line = gr.Markdown(elem_classes="line", sanitize_html=False)
                models = ModelsPanel(self._pulls)

            async def tell(request: gr.Request, name: str, seen: str | None) -> dict[Any, Any]:
                status, language = self._service.status().gpu_status, visitor_language(request)
                words = _chip(status, self._service.is_editing, language)
                told: dict[Any, Any] = {chip: words, table: _table(status, language)}
                suggestion = self._service.suggestion
                for hint in self._hints:
                    told |= hint.shown(suggestion, language)
                return told | await models.look(request, name, seen)

            async def move_away(request: gr.Request) -> str:
                return await _answered(self._service.offload(), visitor_language(request))

            async def let_go(request: gr.Request) -> str:
                return await _answered(self._service.release(), visitor_language(request))

            hints = [part for hint in self._hints for part in (hint.row, hint.line)]
            shown, given = [chip, table, *hints, *models.outputs], models.inputs
            blocks.load(None, None, [*self._prompts, notice], js=_RESTORE, **PRIVATE)
            blocks.load(_about, None, about, **PRIVATE)
            blocks.load(self._offered, None, self._checkboxes, **PRIVATE)
            blocks.load(tell, given, shown, **PRIVATE)
            gr.Timer(_REFRESH_S).tick(tell, given, shown, **PRIVATE)
            offload.click(move_away, None, line, **PRIVATE).then(tell, given, shown, **PRIVATE)
            release.click(let_go, None, line, **PRIVATE).then(tell, given, shown, **PRIVATE)
            for end in self._ends:
                ended = end.then(None, None, None, js=_ENDED, **PRIVATE)
                ended.then(tell, given, shown, **PRIVATE)
            blocks.unload(self._leave)
        return blocks

    # --- editing ----------------------------------------------------------------------------------

    def _edit_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=300):
                picture = self._picture("edit", 320)
                form, buttons = self._form("edit")
            view = _view("edit")

        async def take(request: gr.Request, given: dict[str, Any] | None) -> tuple[Any, Any]:
            """Say at once if a file is no picture that can be edited, and clear the box."""
            path = _path(given)
            if path is None:
                return gr.skip(), gr.skip()
            try:
                await self._shown(self._session(request), path)
            except Step1XEditError as error:
                return None, alert_of(error, visitor_language(request))
            is_busy = self._session(request).tabs[view.tab].is_busy
            return gr.skip(), gr.skip() if is_busy else ""

        async def edit(
            request: gr.Request, source: dict[str, Any] | None, *values: object
        ) -> AsyncIterator[dict[Any, Any]]:
            arguments = form.arguments(values)
            async for update in self._edit(request, view, buttons, _path(source), arguments):
                yield update

        picture.change(take, picture, [picture, buttons.line], preprocess=False, **PRIVATE)
        inputs, outputs = [picture, *form.inputs], [*view.outputs, *buttons.outputs]
        done = buttons.run.click(edit, inputs, outputs, preprocess=False, **PRIVATE)
        self._ends.append(done)
        self._repeat(view, buttons, picture)

    def _region_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=300):
                picture = self._picture("region", 200)
                editor = _painter()
                form, buttons = self._form("region")
            view = _view("region")
        source = gr.State()

        async def take(
            request: gr.Request, given: dict[str, Any] | None
        ) -> tuple[Any, Any, Any, Any]:
            """Show a picture to be painted over, small; the edit itself gets the file."""
            path, away = _path(given), gr.ImageEditor(value=None, visible=False)
            if path is None:
                return gr.skip(), None, away, gr.skip()
            try:
                shown = await self._shown(self._session(request), path)
            except Step1XEditError as error:
                return None, None, away, alert_of(error, visitor_language(request))
            value: Any = {"background": shown, "layers": [], "composite": None}
            is_busy = self._session(request).tabs[view.tab].is_busy
            line = gr.skip() if is_busy else ""
            return gr.skip(), path, gr.ImageEditor(value=value, visible=True), line

        async def edit(
            request: gr.Request,
            path: str | None,
            painted: dict[str, Any] | None,
            *values: object,
        ) -> AsyncIterator[dict[Any, Any]]:
            arguments, mask = form.arguments(values), None
            language = visitor_language(request)
            if path is not None and not _missing(path, arguments, language):
                try:
                    mask = await asyncio.to_thread(self._mask, path, painted)
                except Step1XEditError as error:
                    yield buttons.free(alert_of(error, language))
                    return
                if mask is None:
                    yield buttons.free(alert(text("no_mask", language)))
                    return
            async for update in self._edit(request, view, buttons, path, arguments, mask):
                yield update

        picture.change(
            take, picture, [picture, source, editor, buttons.line], preprocess=False, **PRIVATE
        )
        inputs, outputs = [source, editor, *form.inputs], [*view.outputs, *buttons.outputs]
        done = buttons.run.click(edit, inputs, outputs, **PRIVATE)
        self._ends.append(done)
        self._repeat(view, buttons, picture)

    def _mask(self, path: str, painted: dict[str, Any] | None) -> bytes | None:
        """What was painted, in the size of the picture: white on black; None if nothing was."""
        layers = [] if painted is None else painted["layers"]
        alphas = [np.asarray(layer)[..., 3] for layer in layers]
        if not any(alpha.any() for alpha in alphas):
            return None
        picture = self._picture_at(path)
        covered = np.maximum.reduce(alphas) > 0
        mask = Image.fromarray(covered.astype(np.uint8) * 255)
        return _encoded(mask.resize((picture.width, picture.height)), "PNG")

    def _repeat(self, view: _View, buttons: _Buttons, picture: gr.Image) -> None:
        """What the buttons below a result, the history and *Stop* do."""

        async def again(request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
            made = self._session(request).tabs[view.tab].made
            if made is None:
                return
            arguments = {**made.arguments, "seed": None}
            async for update in self._edit(
                request, view, buttons, made.source, arguments, made.mask
            ):
                yield update

        def look(request: gr.Request, event: gr.SelectData) -> dict[Any, Any]:
            tab = self._session(request).tabs[view.tab]
            if tab.is_busy:
                return buttons.unchanged()
            tab.made = tab.history[event.index]
            return {
                **view.show(tab.made, visitor_language(request)),
                buttons.line: tab.made.caption,
            }

        def reuse(request: gr.Request) -> Any:
            made = self._session(request).tabs[view.tab].made
            return gr.skip() if made is None else made.result

        def stop(request: gr.Request) -> None:
            self._session(request).tabs[view.tab].stop()

        outputs = [*view.outputs, *buttons.outputs]
        done = view.again.click(again, None, outputs, **PRIVATE)
        self._ends.append(done)
        view.reuse.click(reuse, None, picture, **PRIVATE)
        view.gallery.select(look, None, [*view.outputs, buttons.line], **PRIVATE)
        buttons.stop.click(stop, None, None, **PRIVATE)

    async def _edit(
        self,
        request: gr.Request,
        view: _View,
        buttons: _Buttons,
        path: str | None,
        arguments: Mapping[str, object],
        mask: bytes | None = None,
    ) -> AsyncIterator[dict[Any, Any]]:
        """Edit one picture, and yield what changes on the page meanwhile."""
        language, session = visitor_language(request), self._session(request)
        tab = session.tabs[view.tab]
        if tab.is_busy or path is None or not arguments["prompt"]:
            yield buttons.refused(tab, path, arguments, language)
            return
        with tab.busy():
            try:
                asked = self._service.read_picture(arguments)
                before = await self._shown(session, path)
                yield {**buttons.busy(), **view.begin(before, language)}
                data = await asyncio.to_thread(Path(path).read_bytes)

                async def work(report: _Tell[Progress | EditedPicture]) -> None:
                    edited = await self._service.edit_picture(
                        data, asked, report, mask=mask, previews=_PREVIEWS
                    )
                    await report(edited)

                progress = ProgressLine(language)
                async for event in tab.run(work):
                    if isinstance(event, Progress):
                        update = buttons.busy(progress.show(event))
                        if event.preview is not None:
                            preview = await asyncio.to_thread(_previewed, session, event.preview)
                            update[view.pictures] = pictures_compared(
                                before, preview, "preview", language
                            )
                        yield update
                        continue
                    line = _done(event, progress, language)
                    made = await asyncio.to_thread(
                        _keep, session, event, line, path, before, arguments, mask, language
                    )
                    tab.add(made)
                    end = view.show_history(tab.history)
            except Step1XEditError as error:
                line, end = _ended(error, language), {}
        yield {**view.show(tab.made, language), **buttons.free(line), **end}

    async def _shown(self, session: _Session, path: str) -> str:
        """A picture as browsers can show it; raises what is wrong with it."""

        def show() -> str:
            picture = self._picture_at(path)
            return session.save("shown.webp", _small(picture.pixels, _SHOWN_SIDE, picture))

        return await asyncio.to_thread(show)

    def _picture_at(self, path: str) -> images.Picture:
        return images.decode(Path(path).read_bytes(), self._limits)

    # --- several pictures -------------------------------------------------------------------------

    def _batch_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=300):
                files = gr.File(
                    label=T("pictures"),
                    file_count="multiple",
                    file_types=["image"],
                    height=200,
                    elem_id="batch-files",
                )
                form, buttons = self._form("batch")
            with gr.Column(min_width=300):
                view = _BatchView(
                    gr.Gallery(
                        label=T("results"),
                        columns=3,
                        height=420,
                        object_fit="contain",
                        interactive=False,
                        buttons=["fullscreen"],
                        elem_id="batch-results",
                    ),
                    gr.DownloadButton(T("results.file"), visible=False, elem_id="batch-download"),
                )

        async def edit(
            request: gr.Request, given: list[dict[str, Any]] | None, *values: object
        ) -> AsyncIterator[dict[Any, Any]]:
            arguments = form.arguments(values)
            async for update in self._edit_batch(request, view, buttons, given, arguments):
                yield update

        def stop(request: gr.Request) -> None:
            self._session(request).tabs["batch"].stop()

        files.change(self._check_batch, files, buttons.line, preprocess=False, **PRIVATE)
        inputs, outputs = [files, *form.inputs], [view.gallery, view.archive, *buttons.outputs]
        done = buttons.run.click(edit, inputs, outputs, preprocess=False, **PRIVATE)
        self._ends.append(done)
        buttons.stop.click(stop, None, None, **PRIVATE)

    async def _check_batch(self, request: gr.Request, given: list[dict[str, Any]] | None) -> Any:
        """Say at once which of the files are no pictures that can be edited."""
        language, session = visitor_language(request), self._session(request)
        problems: list[str] = []
        for file in given or ():
            try:
                await asyncio.to_thread(self._picture_at, str(file["path"]))
            except Step1XEditError as error:
                problems.append(alert_of(error, language, _name_of(file)))
        return gr.skip() if session.tabs["batch"].is_busy else "".join(problems)

    async def _edit_batch(
        self,
        request: gr.Request,
        view: _BatchView,
        buttons: _Buttons,
        given: list[dict[str, Any]] | None,
        arguments: Mapping[str, object],
    ) -> AsyncIterator[dict[Any, Any]]:
        """Edit several pictures, and yield what changes on the page meanwhile."""
        language, session = visitor_language(request), self._session(request)
        tab = session.tabs["batch"]
        if tab.is_busy or not given or not arguments["prompt"]:
            yield buttons.refused(tab, given, arguments, language)
            return
        results = _Results(session, language)
        with tab.busy():
            yield {**buttons.busy(), **view.begin()}
            try:
                asked = self._service.read_picture(arguments)
                work = partial(self._edit_each, given, asked, results)
                async for event in tab.run(work):
                    if isinstance(event, str):
                        yield buttons.busy(event)
                    else:
                        yield {view.gallery: event}
                counts = {"successes": len(results.files), "total": len(given)}
                line = done_line(text("batch.done", language, **counts))
            except Step1XEditError as error:
                line = _ended(error, language)
            end = buttons.free(line + "".join(results.problems))
            if results.files:
                packed = await asyncio.to_thread(_packed, session, results.files)
                end[view.archive] = gr.DownloadButton(value=packed, visible=True)
        yield end

    async def _edit_each(
        self,
        given: Sequence[dict[str, Any]],
        asked: PictureRequest,
        results: _Results,
        report: _Tell[str | list[tuple[str, str]]],
    ) -> None:
        """Edit one picture after the other; report lines, and what the gallery has to show."""

        async def edit(index: int) -> None:
            place = text("of_batch", results.language, number=index + 1, total=len(given))
            progress = ProgressLine(results.language, f"{place} · ")

            async def show(event: Progress) -> None:
                await report(progress.show(event))

            data = await asyncio.to_thread(Path(given[index]["path"]).read_bytes)
            edited = await self._service.edit_next(data, asked, show)
            await report(await results.keep(edited, _name_of(given[index])))

        async for index, outcome in edit_each(self._service, len(given), edit):
            if isinstance(outcome, Step1XEditError):
                name = _name_of(given[index])
                results.problems.append(alert_of(outcome, results.language, name))

    # --- what the tabs share ----------------------------------------------------------------------

    def _picture(self, name: str, height: int) -> gr.Image:
        picture = gr.Image(
            label=T("picture"),
            type="filepath",
            format="png",
            image_mode=None,
            height=height,
            sources=["upload", "clipboard", "webcam"],
            buttons=["fullscreen"],
            elem_id=f"{name}-picture",
        )
        photo = gr.Button(T("photo"), size="sm", elem_id=f"{name}-photo")
        photo.click(self._photo, None, picture, **PRIVATE)
        return picture

    def _form(self, name: str) -> tuple[_Form, _Buttons]:
        prompt = gr.Textbox(
            label=T("prompt"),
            placeholder=T("prompt.hint"),
            lines=2,
            max_lines=6,
            submit_btn=False,
            elem_id=f"{name}-prompt",
        )
        self._prompts.append(prompt)
        with gr.Row(elem_classes="examples"):
            for example in DEMO_EXAMPLES if self._is_demo else EXAMPLES:
                key = f"edit.{example}"
                button = gr.Button(T(key), size="sm", elem_id=f"{name}-{example}")
                button.click(_saying(key), None, prompt, **PRIVATE)
        with gr.Row():
            run = gr.Button(
                T("run.batch" if name == "batch" else "run"),
                variant="primary",
                scale=3,
                min_width=120,
                elem_id=f"{name}-run",
            )
            stop = gr.Button(
                T("stop"),
                variant="stop",
                interactive=False,
                min_width=80,
                elem_id=f"{name}-stop",
            )
        line = gr.Markdown(elem_classes="line", elem_id=f"{name}-line", sanitize_html=False)
        with gr.Accordion(T("advanced"), open=False, elem_id=f"{name}-advanced"):
            with gr.Row(visible=False) as row:
                hint = gr.Markdown(elem_id=f"{name}-suggested", sanitize_html=False)
                use = gr.Button(T("suggested.use"), size="sm", elem_id=f"{name}-use-suggested")
            self._hints.append(_Hint(row, hint))
            parameters = parameters_of(HowToEdit).values()
            widgets = {one.name: self._widget(one, name) for one in parameters}
        reflection, rounds = widgets["reflection"], widgets["reflection_rounds"]
        reflection.change(_shown_if, reflection, rounds, **PRIVATE)
        suggested = [widgets["num_steps"], widgets["guidance_scale"]]
        use.click(self._suggested, None, suggested, **PRIVATE)
        self._checkboxes += [widgets[choice] for choice in _REASONING]
        return _Form({"prompt": prompt, **widgets}), _Buttons(run, stop, line)

    def _widget(self, parameter: Parameter, tab: str) -> Any:
        """What a parameter of an edit is set with: by its kind, unless it is a special one."""
        name = parameter.name
        value = self._service.defaults.get(name, parameter.default)
        words = {
            "label": T(name),
            "info": T(f"{name}.hint") if has_text(f"{name}.hint") else None,
            "elem_id": f"{tab}-{name.replace('_', '-')}",
        }
        match name:
            case "seed":
                return gr.Number(-1, precision=0, **words)
            case "loras":
                return self._loras(words)
            case "reflection_rounds":  # appears with the reflection
                return gr.Slider(*_range(parameter), value, step=1, visible=False, **words)
            case "thinking" | "reflection":
                can_reason = self._service.can_reason
                hint = words["info"] if can_reason else T("reasoning.needs")
                return gr.Checkbox(value, interactive=can_reason, **{**words, "info": hint})
        if parameter.choices:
            return gr.Radio(list(parameter.choices), value=value, **words)
        match parameter.kind:
            case "boolean":
                return gr.Checkbox(value, **words)
            case "integer":
                return gr.Slider(*_range(parameter), value, step=1, **words)
            case "number":
                return gr.Slider(*_range(parameter), value, step=0.1, **words)
        return gr.Textbox(value, lines=1, **words)

    def _loras(self, words: Mapping[str, Any]) -> gr.Dropdown:
        loras = self._service.loras
        usual = {name: strength for name, strength in loras.items() if strength}
        return gr.Dropdown(
            [*loras_of(usual), *(name for name in loras if name not in usual)],
            value=loras_of(usual),
            multiselect=True,
            allow_custom_value=True,
            visible=bool(loras),
            **words,
        )

    def _offered(self, request: gr.Request) -> list[gr.Checkbox]:
        """The choices that the model does not have are grey, and say why."""
        language, can_reason = visitor_language(request), self._service.can_reason
        hints = [f"{choice}.hint" if can_reason else "reasoning.needs" for choice in _REASONING]
        return [
            gr.Checkbox(info=text(hint, language), interactive=can_reason)
            for hint in hints * (len(self._checkboxes) // len(hints))
        ]

    def _session(self, request: gr.Request) -> _Session:
        return self._sessions[str(request.session_hash)]

    def _photo(self, request: gr.Request) -> str:
        return self._session(request).save("photo.jpg", _EXAMPLE_PHOTO.read_bytes())

    def _suggested(self) -> tuple[Any, Any]:
        suggestion = self._service.suggestion
        if suggestion is None:  # since the button was shown
            return gr.skip(), gr.skip()
        return suggestion.num_steps, suggestion.guidance_scale

    def _leave(self, request: gr.Request) -> None:
        session = self._sessions.pop(str(request.session_hash), None)
        if session is not None:
            session.close()


# --- parts of the page ----------------------------------------------------------------------------


def _view(name: str) -> _View:
    with gr.Column(min_width=300):
        pictures = gr.HTML(
            label=T("result"),
            show_label=True,
            container=True,
            apply_default_css=False,
            js_on_load=None,
            min_height=240,
            elem_id=f"{name}-result",
            elem_classes="result",
        )
        with gr.Row(visible=False, elem_classes="actions") as actions:
            download = gr.DownloadButton(
                T("download"),
                variant="primary",
                size="md",
                min_width=120,
                elem_id=f"{name}-download",
            )
            reuse = gr.Button(T("reuse"), size="md", min_width=120, elem_id=f"{name}-reuse")
            again = gr.Button(T("again"), size="md", min_width=120, elem_id=f"{name}-again")
        thoughts = _thoughts_view(name)
        gallery = gr.Gallery(
            label=T("history"),
            columns=4,
            fit_columns=False,
            height=150,
            allow_preview=False,
            interactive=False,
            visible=False,
            object_fit="cover",
            buttons=[],
            elem_id=f"{name}-history",
            elem_classes="history",
        )
    return _View(name, pictures, actions, download, reuse, again, thoughts, gallery)


def _painter() -> gr.ImageEditor:
    """Where the region of an edit is painted over the picture."""
    return gr.ImageEditor(
        label=T("mask"),
        height=420,
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=48, colors=[("#e11d48", 0.6)], color_mode="fixed"),
        format="png",
        buttons=["fullscreen"],
        visible=False,
        elem_id="region-mask",
    )


def _thoughts_view(name: str) -> _ThoughtsView:
    with gr.Accordion(
        T("reasoning"), open=True, visible=False, elem_id=f"{name}-thoughts"
    ) as accordion:
        return _ThoughtsView(
            accordion,
            rewritten=gr.Textbox(
                label=T("rewritten"), interactive=False, elem_id=f"{name}-rewritten"
            ),
            rounds=gr.Gallery(
                label=T("rounds"),
                columns=3,
                height=220,
                interactive=False,
                object_fit="contain",
                buttons=["fullscreen"],
                elem_id=f"{name}-rounds",
            ),
            verdicts=gr.Textbox(label=T("verdicts"), interactive=False, elem_id=f"{name}-verdicts"),
        )


def _range(parameter: Parameter) -> tuple[float, float]:
    assert parameter.minimum is not None
    assert parameter.maximum is not None
    return parameter.minimum, parameter.maximum


def _shown_if(is_on: bool) -> gr.Slider:
    return gr.Slider(visible=is_on)


def _saying(key: str) -> Callable[[gr.Request], str]:
    def say(request: gr.Request) -> str:
        return text(key, visitor_language(request))

    return say


def _about(request: gr.Request) -> str:
    language = visitor_language(request)
    badge, about = text("demo.badge", language), text("demo.about", language)
    return f'<div class="demo"><b>{html.escape(badge)}</b> {html.escape(about)}</div>'


def _chip(status: GpuStatus, is_editing: bool, language: str) -> str:
    words = [text("editing" if is_editing else f"at.{status.model_location}", language)]
    if status.queue_length:
        words.append(text("waiting", language, length=status.queue_length))
    return (
        f'<span class="pill"><b class="{status.model_location}"></b>'
        f"{html.escape(' · '.join(words))}</span>"
    )


def _table(status: GpuStatus, language: str) -> str:
    statistics = status.statistics
    memory = text(
        "memory",
        language,
        allocated=status.gpu_memory_allocated_gb,
        reserved=status.gpu_memory_reserved_gb,
    )
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
        "device": status.device or "–",
        "memory": memory,
        "idle": idle,
        "queue": status.queue_length or 0,
        "loads": statistics.total_loads,
        "moves": f"{statistics.cpu_to_gpu} / {statistics.gpu_to_cpu}",
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


def _plan_rows(plan: PlanStatus | None, language: str) -> dict[str, str]:
    """How the model is placed, as far as that is known."""
    if plan is None:
        return {}
    if plan.streaming:
        share = f"{100 * plan.resident_share:.0f}"
        placed = text("plan.streams", language, share=share, slots=plan.slots)
    else:
        key = "plan.host" if plan.predicted_peak_gb is None else "plan.fits"
        placed = text(key, language)
    peaks = {"predicted": plan.predicted_peak_gb, "measured": plan.measured_peak_gb}
    told = [text(f"peak.{key}", language, gb=gb) for key, gb in peaks.items() if gb is not None]
    return {
        "plan": f"{placed} · {plan.precision}",
        "peak": " · ".join(told) or "–",
        "host": "–" if plan.host_gb is None else f"{plan.host_gb} GB",
    }


async def _answered(move: Awaitable[GpuAnswer], language: str) -> str:
    try:
        location = (await move).gpu_status.model_location
    except Step1XEditError as error:
        return alert_of(error, language)
    return done_line(text(f"at.{location}", language))


def _missing(pictures: object, arguments: Mapping[str, object], language: str) -> str:
    """What has to be chosen or said before there is anything to edit."""
    if not pictures:
        return text("no_picture", language)
    return "" if arguments["prompt"] else text("no_prompt", language)


def _ended(error: Step1XEditError, language: str) -> str:
    """The line below what has ended without a result."""
    if isinstance(error, EditCancelledError):
        return done_line(text("stopped", language))
    return alert_of(error, language)


def _done(edited: EditedPicture, progress: ProgressLine, language: str) -> str:
    """The line below a result."""
    metadata, seconds = edited.metadata, f"{progress.seconds:.1f}"
    words = text("done", language, seconds=seconds, seed=metadata.seed)
    if metadata.changed_share is not None:
        share = f"{metadata.changed_share * 100:.1f}"
        words += " · " + text("changed", language, share=share)
    line = done_line(words)
    if not progress.is_known:
        return line + caution(text("unknown_edit", language))
    return line if metadata.warning is None else line + caution(metadata.warning)


# --- files ----------------------------------------------------------------------------------------


def _path(given: dict[str, Any] | None) -> str | None:
    return None if given is None else str(given["path"])


def _name_of(file: dict[str, Any]) -> str:
    return str(file.get("orig_name") or "picture")


def _keep(
    session: _Session,
    edited: EditedPicture,
    caption: str,
    source: str,
    before: str,
    arguments: Mapping[str, object],
    mask: bytes | None,
    language: str,
) -> _Made:
    """Write the result, as it is and as it is shown."""
    return _Made(
        source=source,
        before=before,
        after=session.save(
            "shown.webp", _small(edited.picture.pixels, _SHOWN_SIDE, edited.picture)
        ),
        result=session.save(_result_name(Path(source).name), edited.data),
        caption=caption,
        label=edited.metadata.prompt,
        arguments=arguments,
        mask=mask,
        thoughts=_thoughts(session, edited, language),
    )


def _thoughts(session: _Session, edited: EditedPicture, language: str) -> _Thoughts | None:
    reasoning = edited.metadata.reasoning
    if reasoning is None:
        return None
    pictures, verdicts = [], []
    for number, (each, small) in enumerate(zip(reasoning.rounds, edited.rounds, strict=False), 1):
        words = [text("round", language, number=number)]
        if each.score is not None:
            words.append(text("round.score", language, score=f"{each.score:g}"))
        if number == reasoning.best:
            words.append(text("round.best", language))
        caption = " · ".join(words)
        pictures.append((session.save("round.jpg", small), caption))
        if each.verdict is not None:
            verdicts.append(f"{caption}: {read_verdict(each.verdict).words}")
    return _Thoughts(reasoning.prompt or "", pictures, "\n".join(verdicts))


def _small(pixels: Pixels, side: int, picture: images.Picture | None = None) -> bytes:
    """Pixels as a browser gets them to look at."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    profile = None if picture is None else picture.icc_profile
    return _encoded(image, "WEBP", quality=85, icc_profile=profile)


def _previewed(session: _Session, preview: Pixels) -> str:
    """Where the preview of a running edit is written."""
    return session.save("preview.webp", _small(preview, _PREVIEW_SIDE))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _result_name(name: str) -> str:
    stem = re.sub(r"[^\w-]+", "_", Path(name).stem)[:80].removesuffix("_edited")
    return f"{stem or 'picture'}_edited.png"


def _unused(name: str, taken: Mapping[str, object]) -> str:
    stem, number, free = name.removesuffix(".png"), 1, name
    while free in taken:
        number += 1
        free = f"{stem}_{number}.png"
    return free


def _kept(session: _Session, edited: EditedPicture, name: str) -> tuple[str, str]:
    """Where a result of a batch is written: small, as it is shown, and as it is."""
    small = _small(edited.picture.pixels, _PREVIEW_SIDE, edited.picture)
    return session.save("shown.webp", small), session.save(name, edited.data)


def _packed(session: _Session, results: Mapping[str, str]) -> str:
    """Move the files of these names into one, which is no larger than they are."""
    path = session.place("step1x-edit.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, result in results.items():
            archive.write(result, name)
            Path(result).unlink()
    return str(path)
