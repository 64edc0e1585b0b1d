"""What stands on the web page, and what its buttons do.

Only this module, `ui_models` and `ui_parts` import Gradio.

Each edit runs in a task of its own that belongs to a visitor's session: *Stop* and closing the tab
cancel the task, and the generator that Gradio reads from only tells what happens to it. Files go to
and come from the page as they are: Gradio's own reading and writing of pictures is not used for
them, because it would encode them anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import io
import re
import shutil
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, NoReturn

import gradio as gr
import numpy as np
from fastapi import FastAPI
from gradio import processing_utils
from PIL import Image
from starlette.types import ASGIApp

from step1x_edit import images
from step1x_edit.channel import Phase, Pixels, Progress
from step1x_edit.errors import EditCancelledError, InvalidParameterError, Step1XEditError
from step1x_edit.images import Limits
from step1x_edit.interfaces.page_files import PageFiles
from step1x_edit.interfaces.rounds import read_verdict
from step1x_edit.interfaces.ui_models import ModelsPanel
from step1x_edit.interfaces.ui_parts import PRIVATE, T, alert, alert_of, bar_line, visitor_language
from step1x_edit.interfaces.ui_texts import DEMO_EXAMPLES, EXAMPLES, text
from step1x_edit.pulls import Pulls
from step1x_edit.schemas import PARAMETERS, GpuStatus, PlanStatus, Suggestion, loras_of
from step1x_edit.service import EditedPicture, EditService, Report
from step1x_edit.settings import Settings

_EXAMPLE_PHOTO: Final = Path(__file__).parent / "assets" / "coffee.jpg"
_PREVIEWS: Final = 8  # of one edit
_PREVIEW_SIDE: Final = 512
_SHOWN_SIDE: Final = 1280
_HISTORY: Final = 12
_REFRESH_S: Final = 3.0
_DAY_S: Final = 24 * 3600
_EVENTS: Final = 256  # that may be about to start; also those that only look at the status
_REASONING: Final = ("thinking", "reflection")

_CSS: Final = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.head { align-items: center; justify-content: space-between; gap: 12px; flex-wrap: nowrap; }
.head > * { flex: 0 1 auto !important; min-width: 0 !important; width: auto !important; }
.head h1 { margin: 0; font-size: 1.4rem; white-space: nowrap; }
.chip { text-align: right; }
.pill { display: inline-block; padding: 3px 12px; border-radius: 999px; font-size: .85rem;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary);
  white-space: nowrap; }
.pill b { display: inline-block; width: 8px; height: 8px; border-radius: 50%; margin-right: 7px;
  background: var(--neutral-400); }
.pill b.CPU { background: #d97706; }
.pill b.GPU { background: #16a34a; }
.demo { border-left: 4px solid #d97706; padding: 8px 12px; font-size: .9rem; line-height: 1.5;
  background: var(--background-fill-secondary); border-radius: 4px; }
.demo b { display: inline-block; margin-right: 8px; padding: 0 9px; border-radius: 999px;
  background: #d97706; color: #fff; font-weight: 600; }
.examples { gap: 6px; flex-wrap: wrap; }
.examples button { flex: 0 0 auto; min-width: 0 !important; border-radius: 999px;
  font-weight: 400; }
.block:has(> .line:empty) { display: none; }
.line .bar { height: 6px; margin-top: 5px; border-radius: 3px; overflow: hidden;
  background: var(--border-color-primary); }
.line .bar i { display: block; height: 100%; background: var(--button-primary-background-fill); }
.line code { overflow-wrap: anywhere; }
.line .problem { border-left: 4px solid #dc2626; padding: 2px 10px; }
.history .grid-container { grid-template-columns: repeat(auto-fill, 88px) !important; }
.status table { width: 100%; max-width: 640px; }
.status td:first-child { color: var(--body-text-color-subdued); width: 45%; }
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  .head { gap: 8px; }
  .head h1 { font-size: 1.1rem; }
  .pill { padding: 3px 9px; font-size: .8rem; }
  button[role="tab"] { padding-inline: 9px !important; }
}
"""


def build(service: EditService, settings: Settings, pulls: Pulls, files: PageFiles) -> FastAPI:
    """The page as an application of Gradio's; it has to be entered with `running`."""
    # Our page uploads pictures; whoever names an address instead would have us fetch it.
    processing_utils.async_ssrf_protected_get = _no_fetching
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
        ),
        css=_CSS,
    )
    # Gradio checks that files in events were uploaded only if it was launched, and does not count
    # being mounted as that (`processing_utils._check_allowed`).
    blocks.has_launched = True
    return outer


async def _no_fetching(url: str) -> NoReturn:
    raise gr.Error("pictures are uploaded and not fetched from addresses", print_exception=False)


@contextlib.asynccontextmanager
async def running(app: ASGIApp) -> AsyncIterator[None]:
    """What the application does beside answering, for as long as it answers."""
    assert isinstance(app, FastAPI)
    async with app.router.lifespan_context(app):
        yield


# --- sessions -------------------------------------------------------------------------------------


class _Session:
    """The running work and the files of one visitor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tasks: set[asyncio.Task[EditedPicture]] = set()

    def save(self, name: str, data: bytes) -> str:
        """Write a file under an address that nobody can guess."""
        folder = self._folder / token_hex(16)
        folder.mkdir(parents=True)
        path = folder / name
        path.write_bytes(data)
        return str(path)

    async def run(
        self, work: Callable[[Report], Awaitable[EditedPicture]]
    ) -> AsyncIterator[Progress | EditedPicture]:
        """Yield how far the work has come, and last what came of it."""
        events: asyncio.Queue[Progress | None] = asyncio.Queue()

        async def report(progress: Progress) -> None:
            events.put_nowait(progress)

        task = asyncio.ensure_future(work(report))
        task.add_done_callback(lambda _: events.put_nowait(None))
        self._tasks.add(task)
        try:
            while (event := await events.get()) is not None:
                yield event
            if task.cancelled():
                raise EditCancelledError
            yield task.result()
        finally:
            task.cancel()  # does nothing to one that has ended
            self._tasks.discard(task)

    def stop(self) -> None:
        """Cancel what runs."""
        for task in self._tasks:
            task.cancel()

    def close(self) -> None:
        """Cancel what runs and forget the files."""
        self.stop()
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
    """What is asked for."""

    prompt: gr.Textbox
    num_steps: gr.Slider
    guidance_scale: gr.Slider
    size_level: gr.Radio
    seed: gr.Number
    negative_prompt: gr.Textbox
    loras: gr.Dropdown
    thinking: gr.Checkbox
    reflection: gr.Checkbox
    reflection_rounds: gr.Slider

    @property
    def inputs(self) -> list[Any]:
        return list(vars(self).values())

    def arguments(self, values: tuple[object, ...]) -> dict[str, object]:
        return dict(zip(vars(self), values, strict=True))


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

    def busy(self, line: str) -> dict[Any, Any]:
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


@dataclass(frozen=True)
class _View:
    """Where a result is shown, and what was made before."""

    slider: gr.ImageSlider
    actions: gr.Row
    download: gr.DownloadButton
    reuse: gr.Button
    again: gr.Button
    thoughts: gr.Accordion
    rewritten: gr.Textbox
    rounds: gr.Gallery
    verdicts: gr.Textbox
    gallery: gr.Gallery
    made: gr.State
    history: gr.State

    @property
    def outputs(self) -> list[Any]:
        return [one for one in vars(self).values() if one not in (self.reuse, self.again)]

    def show(self, made: _Made) -> dict[Any, Any]:
        return {
            self.slider: (made.before, made.after),
            self.actions: gr.Row(visible=True),
            self.download: gr.DownloadButton(value=made.result),
            self.made: made,
            **self._told(made.thoughts),
        }

    def _told(self, thoughts: _Thoughts | None) -> dict[Any, Any]:
        if thoughts is None:
            return {self.thoughts: gr.Accordion(visible=False)}
        return {
            self.thoughts: gr.Accordion(visible=True),
            self.rewritten: gr.Textbox(thoughts.rewritten, visible=bool(thoughts.rewritten)),
            self.rounds: gr.Gallery(list(thoughts.rounds), visible=bool(thoughts.rounds)),
            self.verdicts: gr.Textbox(thoughts.verdicts, visible=bool(thoughts.verdicts)),
        }


@dataclass
class _Teller:
    """Puts progress into words, with the time that is left as the steps so far foretell it."""

    language: str
    prefix: str = ""
    _since: float = field(default=0.0)
    _first: int = field(default=0)

    def line(self, progress: Progress) -> str:
        words = text(
            f"phase.{progress.phase.value}",
            self.language,
            step=progress.step,
            total=progress.total,
        )
        share = 0.0
        if progress.phase is Phase.ENCODING:
            self._first = 0  # steps are timed anew in each round
        elif progress.phase is Phase.DENOISING:
            share = progress.step / progress.total
            if not self._first:
                self._since, self._first = time.monotonic(), progress.step
            elif progress.step > self._first:
                pace = (time.monotonic() - self._since) / (progress.step - self._first)
                left = round(pace * (progress.total - progress.step))
                words += " · " + text("left", self.language, seconds=left)
        elif progress.phase in (Phase.DECODING, Phase.REFLECTING, Phase.SAVING):
            share = 1.0
        return bar_line(self.prefix + words, share)


class _Page:
    def __init__(
        self, service: EditService, settings: Settings, pulls: Pulls, files: PageFiles
    ) -> None:
        self._service = service
        self._pulls = pulls
        self._limits = Limits(settings.max_bytes, settings.max_pixels)
        self._is_demo = settings.model_path is None
        self._checkboxes: list[gr.Checkbox] = []
        self._sessions = _Sessions(files)
        self._hints: list[_Hint] = []  # one for each form

    def blocks(self) -> gr.Blocks:
        blocks = gr.Blocks(
            title="step1x-edit", analytics_enabled=False, delete_cache=(3600, _DAY_S)
        )
        with blocks:
            with gr.Row(elem_classes="head"):
                gr.Markdown("# step1x-edit")
                chip = gr.Markdown(elem_classes="chip", sanitize_html=False)
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
                told = {chip: _chip(status, language), table: _table(status, language)}
                suggestion = self._service.suggestion
                for hint in self._hints:
                    told |= hint.shown(suggestion, language)
                return told | await models.look(request, name, seen)

            async def move_away() -> str:
                return await _answered(self._service.offload())

            async def let_go() -> str:
                return await _answered(self._service.release())

            hints = [part for hint in self._hints for part in (hint.row, hint.line)]
            shown, given = [chip, table, *hints, *models.outputs], models.inputs
            blocks.load(_about, None, about, **PRIVATE)
            blocks.load(self._offered, None, self._checkboxes, **PRIVATE)
            blocks.load(tell, given, shown, **PRIVATE)
            gr.Timer(_REFRESH_S).tick(tell, given, shown, **PRIVATE)
            offload.click(move_away, None, line, **PRIVATE).then(tell, given, shown, **PRIVATE)
            release.click(let_go, None, line, **PRIVATE).then(tell, given, shown, **PRIVATE)
            blocks.unload(self._leave)
        return blocks

    # --- editing ----------------------------------------------------------------------------------

    def _edit_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=300):
                picture = self._picture("edit", 320)
                form, buttons = self._form("edit")
            view = _view("edit")

        async def edit(
            request: gr.Request,
            source: dict[str, Any] | None,
            history: list[_Made],
            *values: object,
        ) -> AsyncIterator[dict[Any, Any]]:
            arguments = form.arguments(values)
            async for update in self._edit(
                request, view, buttons, _path(source), arguments, history
            ):
                yield update

        outputs = [*view.outputs, *buttons.outputs]
        for trigger in (buttons.run.click, form.prompt.submit):
            inputs = [picture, view.history, *form.inputs]
            trigger(edit, inputs, outputs, preprocess=False, **PRIVATE)
        self._repeat(view, buttons)
        view.reuse.click(_source_of, view.made, picture, **PRIVATE)

    def _region_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=300):
                picture = self._picture("region", 200)
                editor = gr.ImageEditor(
                    label=T("mask"),
                    height=420,
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(
                        default_size=48,
                        colors=[("#e11d48", 0.6)],
                        color_mode="fixed",
                    ),
                    format="png",
                    buttons=["fullscreen"],
                    visible=False,
                    elem_id="region-mask",
                )
                form, buttons = self._form("region")
            view = _view("region")
        source = gr.State()

        async def take(request: gr.Request, given: dict[str, Any] | None) -> tuple[Any, Any, str]:
            """Show a picture to be painted over, small; the edit itself gets the file."""
            path = _path(given)
            if path is None:
                return None, gr.ImageEditor(value=None, visible=False), ""
            try:
                shown = await self._shown(self._session(request), path)
            except Step1XEditError as error:
                return None, gr.ImageEditor(value=None, visible=False), alert_of(error)
            value: Any = {"background": shown, "layers": [], "composite": None}
            return path, gr.ImageEditor(value=value, visible=True), ""

        async def edit(
            request: gr.Request,
            path: str | None,
            painted: dict[str, Any] | None,
            history: list[_Made],
            *values: object,
        ) -> AsyncIterator[dict[Any, Any]]:
            arguments = form.arguments(values)
            mask = None
            if path is not None:
                try:
                    mask = await asyncio.to_thread(
                        self._mask, path, painted, visitor_language(request)
                    )
                except Step1XEditError as error:
                    yield buttons.free(alert_of(error))
                    return
            async for update in self._edit(request, view, buttons, path, arguments, history, mask):
                yield update

        picture.change(take, picture, [source, editor, buttons.line], preprocess=False, **PRIVATE)
        inputs = [source, editor, view.history, *form.inputs]
        buttons.run.click(edit, inputs, [*view.outputs, *buttons.outputs], **PRIVATE)
        self._repeat(view, buttons)
        view.reuse.click(_source_of, view.made, picture, **PRIVATE)

    def _mask(self, path: str, painted: dict[str, Any] | None, language: str) -> bytes:
        """What was painted, in the size of the picture: white on black."""
        layers = [] if painted is None else painted["layers"]
        alphas = [np.asarray(layer)[..., 3] for layer in layers]
        if not any(alpha.any() for alpha in alphas):
            raise InvalidParameterError(text("no_mask", language))
        picture = images.decode(Path(path).read_bytes(), self._limits)
        covered = np.maximum.reduce(alphas) > 0
        mask = Image.fromarray(covered.astype(np.uint8) * 255)
        return _encoded(mask.resize((picture.width, picture.height)), "PNG")

    def _repeat(self, view: _View, buttons: _Buttons) -> None:
        """What the buttons below a result, the history and *Stop* do."""

        async def again(
            request: gr.Request, made: _Made, history: list[_Made]
        ) -> AsyncIterator[dict[Any, Any]]:
            arguments = {**made.arguments, "seed": None}
            async for update in self._edit(
                request, view, buttons, made.source, arguments, history, made.mask
            ):
                yield update

        def look(event: gr.SelectData, history: list[_Made]) -> dict[Any, Any]:
            made = history[event.index]
            return {**view.show(made), buttons.line: made.caption}

        view.again.click(
            again,
            [view.made, view.history],
            [*view.outputs, *buttons.outputs],
            **PRIVATE,
        )
        view.gallery.select(look, view.history, [*view.outputs, buttons.line], **PRIVATE)
        buttons.stop.click(self._stop, None, None, **PRIVATE)

    async def _edit(
        self,
        request: gr.Request,
        view: _View,
        buttons: _Buttons,
        path: str | None,
        arguments: Mapping[str, object],
        history: list[_Made],
        mask: bytes | None = None,
    ) -> AsyncIterator[dict[Any, Any]]:
        """Edit one picture, and yield what changes on the page meanwhile."""
        language, session = visitor_language(request), self._session(request)
        if path is None:
            yield buttons.free(alert(text("no_picture", language)))
            return
        try:
            asked = self._service.read_picture(arguments)
            before = await self._shown(session, path)
            yield {
                **buttons.busy(""),
                view.slider: (before, before),
                view.thoughts: gr.Accordion(visible=False),
            }
            data = await asyncio.to_thread(Path(path).read_bytes)

            async def work(report: Report) -> EditedPicture:
                return await self._service.edit_picture(
                    data, asked, report, mask=mask, previews=_PREVIEWS
                )

            teller = _Teller(language)
            async for event in session.run(work):
                if isinstance(event, EditedPicture):
                    made = await asyncio.to_thread(
                        _keep, session, event, path, before, arguments, mask, language
                    )
                    history = [made, *history][:_HISTORY]
                    yield {
                        **view.show(made),
                        **buttons.free(made.caption),
                        view.history: history,
                        view.gallery: gr.Gallery(
                            value=[(one.after, one.label) for one in history], visible=True
                        ),
                    }
                else:
                    update: dict[Any, Any] = {buttons.line: teller.line(event)}
                    if event.preview is not None:
                        small = await asyncio.to_thread(_small, event.preview, _PREVIEW_SIDE)
                        update[view.slider] = (before, session.save("preview.webp", small))
                    yield update
        except EditCancelledError:
            yield buttons.free(html.escape(text("stopped", language)))
        except Step1XEditError as error:
            yield buttons.free(alert_of(error))

    async def _shown(self, session: _Session, path: str) -> str:
        """A picture as browsers can show it; raises what is wrong with it."""

        def show() -> str:
            picture = images.decode(Path(path).read_bytes(), self._limits)
            return session.save("shown.webp", _small(picture.pixels, _SHOWN_SIDE, picture))

        return await asyncio.to_thread(show)

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
                gallery = gr.Gallery(
                    label=T("results"),
                    columns=3,
                    height=420,
                    object_fit="contain",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="batch-results",
                )
                archive = gr.DownloadButton(
                    T("results.file"), visible=False, elem_id="batch-download"
                )

        async def edit(
            request: gr.Request, given: list[dict[str, Any]] | None, *values: object
        ) -> AsyncIterator[dict[Any, Any]]:
            language, session = visitor_language(request), self._session(request)
            if not given:
                yield buttons.free(alert(text("no_picture", language)))
                return
            shown: list[tuple[str, str]] = []
            results: dict[str, bytes] = {}
            problems: list[str] = []
            yield {**buttons.busy(""), gallery: [], archive: gr.DownloadButton(visible=False)}
            try:
                asked = self._service.read_picture(form.arguments(values))
                for number, file in enumerate(given, start=1):
                    path, name = str(file["path"]), str(file.get("orig_name") or "picture")
                    place = text("of_batch", language, number=number, total=len(given))
                    teller = _Teller(language, f"{place} · ")

                    async def work(report: Report, path: str = path) -> EditedPicture:
                        data = await asyncio.to_thread(Path(path).read_bytes)
                        return await self._service.edit_picture(data, asked, report)

                    try:
                        async for event in session.run(work):
                            if isinstance(event, EditedPicture):
                                made = await asyncio.to_thread(
                                    _small, event.picture.pixels, _PREVIEW_SIDE, event.picture
                                )
                                shown = [*shown, (session.save("shown.webp", made), name)]
                                results[_unused(_result_name(name), results)] = event.data
                                yield {gallery: shown}
                            else:
                                yield {buttons.line: teller.line(event)}
                    except EditCancelledError:
                        raise
                    except Step1XEditError as error:
                        problems.append(f"{name}: {error}")
                line = html.escape(
                    text("batch.done", language, successes=len(results), total=len(given))
                )
            except EditCancelledError:
                line = html.escape(text("stopped", language))
            except Step1XEditError as error:
                line = alert_of(error)
            line += "".join(alert(problem) for problem in problems)
            yield buttons.free(line)
            if results:
                packed = await asyncio.to_thread(_packed, results)
                path = session.save("step1x-edit.zip", packed)
                yield {archive: gr.DownloadButton(value=path, visible=True)}

        buttons.run.click(
            edit,
            [files, *form.inputs],
            [gallery, archive, *buttons.outputs],
            preprocess=False,
            **PRIVATE,
        )
        buttons.stop.click(self._stop, None, None, **PRIVATE)

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
            max_length=PARAMETERS["prompt"].max_length or 0,
            submit_btn=False,
            elem_id=f"{name}-prompt",
        )
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
            form = _Form(prompt, *self._advanced(), *self._reasoning(name))
        use.click(self._suggested, None, [form.num_steps, form.guidance_scale], **PRIVATE)
        return form, _Buttons(run, stop, line)

    def _reasoning(self, name: str) -> tuple[gr.Checkbox, gr.Checkbox, gr.Slider]:
        thinking, reflection = (
            gr.Checkbox(
                label=T(choice),
                info=T(f"{choice}.hint" if self._service.can_reason else "reasoning.needs"),
                interactive=self._service.can_reason,
                elem_id=f"{name}-{choice}",
            )
            for choice in _REASONING
        )
        self._checkboxes += thinking, reflection
        rounds = gr.Slider(
            *_range("reflection_rounds"),
            PARAMETERS["reflection_rounds"].default,
            step=1,
            label=T("reflection_rounds"),
            info=T("reflection_rounds.hint"),
            visible=False,
            elem_id=f"{name}-reflection-rounds",
        )
        reflection.change(_shown_if, reflection, rounds, **PRIVATE)
        return thinking, reflection, rounds

    def _offered(self, request: gr.Request) -> list[gr.Checkbox]:
        """The choices that the model does not have are grey, and say why."""
        language, can_reason = visitor_language(request), self._service.can_reason
        hints = [f"{choice}.hint" if can_reason else "reasoning.needs" for choice in _REASONING]
        return [
            gr.Checkbox(info=text(hint, language), interactive=can_reason)
            for hint in hints * (len(self._checkboxes) // len(hints))
        ]

    def _advanced(
        self,
    ) -> tuple[gr.Slider, gr.Slider, gr.Radio, gr.Number, gr.Textbox, gr.Dropdown]:
        defaults, loras = self._service.defaults, self._service.loras
        usual = {name: strength for name, strength in loras.items() if strength}
        return (
            gr.Slider(
                *_range("num_steps"),
                defaults["num_steps"],
                step=1,
                label=T("num_steps"),
            ),
            gr.Slider(
                *_range("guidance_scale"),
                defaults["guidance_scale"],
                step=0.1,
                label=T("guidance_scale"),
            ),
            gr.Radio(
                list(PARAMETERS["size_level"].choices),
                value=defaults["size_level"],
                label=T("size_level"),
            ),
            gr.Number(-1, precision=0, label=T("seed"), info=T("seed.hint")),
            gr.Textbox(label=T("negative_prompt"), lines=1),
            gr.Dropdown(
                [*loras_of(usual), *(name for name in loras if name not in usual)],
                value=loras_of(usual),
                multiselect=True,
                allow_custom_value=True,
                label=T("loras"),
                info=T("loras.hint"),
                visible=bool(loras),
            ),
        )

    def _session(self, request: gr.Request) -> _Session:
        return self._sessions[str(request.session_hash)]

    def _photo(self, request: gr.Request) -> str:
        return self._session(request).save("photo.jpg", _EXAMPLE_PHOTO.read_bytes())

    def _suggested(self) -> tuple[Any, Any]:
        suggestion = self._service.suggestion
        if suggestion is None:  # since the button was shown
            return gr.skip(), gr.skip()
        return suggestion.num_steps, suggestion.guidance_scale

    def _stop(self, request: gr.Request) -> None:
        self._session(request).stop()

    def _leave(self, request: gr.Request) -> None:
        session = self._sessions.pop(str(request.session_hash), None)
        if session is not None:
            session.close()


# --- parts of the page ----------------------------------------------------------------------------


def _view(name: str) -> _View:
    with gr.Column(min_width=300):
        slider = gr.ImageSlider(
            label=T("result"),
            type="filepath",
            interactive=False,
            buttons=["fullscreen"],
            max_height=520,
            elem_id=f"{name}-result",
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
        # Text boxes, because what a model says must not become part of the page.
        with gr.Accordion(
            T("reasoning"), open=True, visible=False, elem_id=f"{name}-thoughts"
        ) as thoughts:
            rewritten = gr.Textbox(
                label=T("rewritten"), interactive=False, elem_id=f"{name}-rewritten"
            )
            rounds = gr.Gallery(
                label=T("rounds"),
                columns=3,
                height=220,
                interactive=False,
                object_fit="contain",
                buttons=["fullscreen"],
                elem_id=f"{name}-rounds",
            )
            verdicts = gr.Textbox(
                label=T("verdicts"), interactive=False, elem_id=f"{name}-verdicts"
            )
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
    made, history = gr.State(), gr.State([])
    return _View(
        slider,
        actions,
        download,
        reuse,
        again,
        thoughts,
        rewritten,
        rounds,
        verdicts,
        gallery,
        made,
        history,
    )


def _range(name: str) -> tuple[float, float]:
    parameter = PARAMETERS[name]
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


def _chip(status: GpuStatus, language: str) -> str:
    where = text(f"at.{status.model_location}", language)
    queue = text("queue", language, length=status.queue_length or 0)
    return (
        f'<span class="pill"><b class="{status.model_location}"></b>'
        f"{html.escape(where)} · {html.escape(queue)}</span>"
    )


def _table(status: GpuStatus, language: str) -> str:
    statistics = status.statistics
    memory = text(
        "memory",
        language,
        allocated=status.gpu_memory_allocated_gb,
        reserved=status.gpu_memory_reserved_gb,
    )
    idle = text(
        "idle.until" if status.idle_timeout else "idle.stays",
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


async def _answered(move: Awaitable[Any]) -> str:
    try:
        return html.escape((await move).message)
    except Step1XEditError as error:
        return alert_of(error)


# --- files ----------------------------------------------------------------------------------------


def _path(given: dict[str, Any] | None) -> str | None:
    return None if given is None else str(given["path"])


def _source_of(made: _Made) -> str:
    return made.result


def _keep(
    session: _Session,
    edited: EditedPicture,
    source: str,
    before: str,
    arguments: Mapping[str, object],
    mask: bytes | None,
    language: str,
) -> _Made:
    """Write the result, as it is and as it is shown."""
    metadata = edited.metadata
    line = text("done", language, seconds=edited.processing_time, seed=metadata.seed)
    if metadata.changed_share is not None:
        share = f"{metadata.changed_share * 100:.1f}"
        line += " · " + text("changed", language, share=share)
    caption = html.escape(line)
    if metadata.warning is not None:
        caption += alert(metadata.warning)
    return _Made(
        source=source,
        before=before,
        after=session.save(
            "shown.webp", _small(edited.picture.pixels, _SHOWN_SIDE, edited.picture)
        ),
        result=session.save(_result_name(Path(source).name), edited.data),
        caption=caption,
        label=metadata.prompt,
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


def _packed(results: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in results.items():
            archive.writestr(name, data)
    return buffer.getvalue()
