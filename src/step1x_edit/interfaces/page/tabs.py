"""The tabs that edit: their parts, and the handlers of their buttons.

The service receives pictures as the visitor sent them: a handler that receives one is declared with
`preprocess=False`, because Gradio would encode it again.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import gradio as gr
import numpy as np
from gradio.events import Dependency
from PIL import Image

from step1x_edit.channel import Progress
from step1x_edit.errors import Step1XEditError
from step1x_edit.interfaces.page.form import Form
from step1x_edit.interfaces.page.kept import SOURCE, Kept
from step1x_edit.interfaces.page.lines import alert, alert_of, caution, done_line
from step1x_edit.interfaces.page.parts import PRIVATE, T, visitor_language
from step1x_edit.interfaces.page.progress import ProgressLine
from step1x_edit.interfaces.page.results import (
    BatchResults,
    line_of_failure,
    line_of_result,
    save_preview,
    save_result,
    save_shown,
)
from step1x_edit.interfaces.page.sessions import Asked, Session, Sessions, TabState
from step1x_edit.interfaces.page.texts import DEMO_EXAMPLES, EXAMPLES, text
from step1x_edit.interfaces.page.views import BatchView, ResultView
from step1x_edit.interfaces.pursuits import Notify
from step1x_edit.pictures.images import Picture, decode, read_edit_record
from step1x_edit.schemas.requests import PictureRequest
from step1x_edit.service.file_edits import edit_each
from step1x_edit.service.history import Step, history_of
from step1x_edit.service.service import EditedPicture, EditService
from step1x_edit.settings import Settings

_ASSETS: Final = Path(__file__).parents[1] / "assets"
_EXAMPLE_PHOTO: Final = _ASSETS / "coffee.jpg"
_PREVIEWS: Final = 8  # shown during one edit


class EditingTab:
    """The common part of all tabs that edit; each builds its `form`.

    A tab is placed where the page is being built.
    """

    form: Form

    def __init__(
        self, name: str, service: EditService, settings: Settings, sessions: Sessions
    ) -> None:
        self.ends: list[Dependency] = []
        """The events after which an edit has ended."""
        self._name = name
        self._service = service
        self._sessions = sessions
        self._limits = settings.limits
        self._examples = DEMO_EXAMPLES if settings.model_path is None else EXAMPLES

    def stop(self, request: gr.Request) -> None:
        """Cancel the running edit."""
        self._state(request).stop()

    def _session(self, request: gr.Request) -> Session:
        return self._sessions[str(request.session_hash)]

    def _state(self, request: gr.Request) -> TabState:
        return self._session(request).tabs[self._name]

    def _decode(self, path: str) -> Picture:
        return decode(Path(path).read_bytes(), self._limits)


# --- one picture ----------------------------------------------------------------------------------


class _PictureTab(EditingTab):
    """A tab for one picture: the form on one side, the result on the other."""

    picture: gr.Image
    view: ResultView

    def __init__(
        self, name: str, service: EditService, settings: Settings, sessions: Sessions
    ) -> None:
        super().__init__(name, service, settings, sessions)
        history = history_of(settings)
        self.kept = None if history is None else Kept(history, settings.limits)
        """The steps of the history, with HISTORY on."""

    def _place_view(self) -> ResultView:
        return ResultView(self._name, "history" if self.kept is None else "history.kept")

    def _place_picture(self, height: int) -> gr.Image:
        picture = gr.Image(
            label=T("picture"),
            type="filepath",
            format="png",
            image_mode=None,
            height=height,
            sources=["upload", "clipboard", "webcam"],
            buttons=["fullscreen"],
            elem_id=f"{self._name}-picture",
        )
        photo = gr.Button(T("photo"), size="sm", elem_id=f"{self._name}-photo")
        photo.click(self._photo, None, picture, **PRIVATE)
        return picture

    def _listen_to_results(self) -> None:
        """Connect the buttons below the result, the history and *Stop*."""
        form, view = self.form, self.view
        outputs = [*view.outputs, *form.outputs]
        self.ends.append(view.again.click(self.again, None, outputs, **PRIVATE))
        view.reuse.click(self.reuse, None, self.picture, **PRIVATE)
        steps, recalled = view.steps, [*view.outputs, form.line, self.picture, *form.inputs]
        view.gallery.select(self.select, None, recalled, api_name="look", **PRIVATE)
        steps.undo.click(self.undo, None, recalled, **PRIVATE)
        self.ends.append(steps.merge.click(self.merge, None, outputs, **PRIVATE))
        steps.delete.click(steps.ask, None, steps.outputs, **PRIVATE)
        steps.delete_nothing.click(steps.delete_none, None, steps.outputs, **PRIVATE)
        steps.delete_step.click(self.delete_step, None, [*view.outputs, form.line], **PRIVATE)
        steps.delete_all.click(self.delete_all, None, [*view.outputs, form.line], **PRIVATE)
        steps.against.input(
            self.compare, steps.against, [view.pictures, form.line], preprocess=False, **PRIVATE
        )
        form.stop.click(self.stop, None, None, **PRIVATE)

    def _photo(self, request: gr.Request) -> str:
        return self._session(request).save("photo.jpg", _EXAMPLE_PHOTO.read_bytes())

    async def again(self, request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        """Repeat the edit that is shown, with another seed."""
        result = self._state(request).result
        if result is None:
            return
        arguments = {**result.asked.arguments, "seed": None}
        async for update in self._edit(request, replace(result.asked, arguments=arguments)):
            yield update

    def reuse(self, request: gr.Request) -> Any:
        """Make the result that is shown the picture to edit."""
        result = self._state(request).result
        return gr.skip() if result is None else result.file

    async def select(self, request: gr.Request, event: gr.SelectData) -> dict[Any, Any]:
        """Show an earlier result; a step of the history also brings back what it was made with."""
        state = self._state(request)
        if state.is_busy:
            return self.form.unchanged()
        if self.kept is not None:
            return await self._recall(request, state.steps[event.index])
        state.result = state.history[event.index]
        return self._shown(request)

    async def undo(self, request: gr.Request) -> dict[Any, Any]:
        """Show the step before the one that is shown, or the original."""
        state, kept = self._state(request), self.kept
        step = None if state.result is None else state.result.step
        if kept is None or step is None or state.is_busy:
            return self.form.unchanged()
        try:
            parent = await asyncio.to_thread(kept.parent, step)
            if parent is not None or step.source is None:
                return await self._recall(request, parent or step) | self.view.unmark()
            session = self._session(request)
            picture = await asyncio.to_thread(kept.save, session, step.source, step.name)
            shown = await asyncio.to_thread(kept.save_shown, session, step.source)
        except Step1XEditError as error:
            return {self.form.line: alert_of(error, visitor_language(request))}
        state.result = None
        original = self.view.alone(shown, visitor_language(request))
        return {**self._shown(request), **original, **self.view.unmark(), self.picture: picture}

    async def delete_step(self, request: gr.Request) -> dict[Any, Any]:
        """Delete the step that is shown, and all that were made from it."""
        result, kept = self._state(request).result, self.kept
        if kept is None or result is None or result.step is None:
            return self.form.unchanged()
        return await self._delete(request, partial(kept.delete, result.step))

    async def delete_all(self, request: gr.Request) -> dict[Any, Any]:
        """Delete the whole history."""
        if self.kept is None:
            return self.form.unchanged()
        return await self._delete(request, self.kept.delete_all)

    async def _delete(self, request: gr.Request, delete: Callable[[], int]) -> dict[Any, Any]:
        state, language = self._state(request), visitor_language(request)
        if state.is_busy:
            return self.form.unchanged()
        try:
            steps = await asyncio.to_thread(delete)
        except Step1XEditError as error:
            return {self.form.line: alert_of(error, language)}
        state.result = None
        line = done_line(text("deleted", language, steps=steps))
        return {**self._shown(request), **await self._strip(request), self.form.line: line}

    async def merge(self, request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        """Make what is shown of the original, with one edit."""
        state, kept = self._state(request), self.kept
        step = None if state.result is None else state.result.step
        if kept is None or step is None:
            return
        try:
            asked = await asyncio.to_thread(kept.from_original, self._session(request), step)
        except Step1XEditError as error:
            yield {self.form.line: alert_of(error, visitor_language(request))}
            return
        async for update in self._edit(request, asked):
            yield update

    async def compare(self, request: gr.Request, choice: str) -> dict[Any, Any]:
        """Compare the step that is shown with another picture."""
        result, kept, language = self._state(request).result, self.kept, visitor_language(request)
        if kept is None or result is None or result.step is None:
            return self.form.unchanged()
        step, session = result.step, self._session(request)

        def look() -> tuple[str, str]:
            if choice == SOURCE:
                return result.before, result.line
            digest = kept.against(step, choice)
            drift = kept.drift(digest, step)
            known = "" if drift is None else text("against.drift", language, levels=f"{drift:.1f}")
            return kept.save_shown(session, digest), done_line(known)

        try:
            before, line = await asyncio.to_thread(look)
        except Step1XEditError as error:
            return {self.form.line: alert_of(error, language)}
        return {**self.view.compare(before, result.after, language), self.form.line: line}

    async def remember(self, request: gr.Request) -> dict[Any, Any]:
        """Show the newest steps of the history."""
        return await self._strip(request)

    async def _recall(self, request: gr.Request, step: Step) -> dict[Any, Any]:
        """Show a step, and bring back the picture and the settings that it was made with."""
        kept, state, language = self.kept, self._state(request), visitor_language(request)
        assert kept is not None
        try:
            result = await asyncio.to_thread(kept.result, self._session(request), step, language)
        except Step1XEditError as error:
            return {self.form.line: alert_of(error, language)}
        state.result = result
        asked = result.asked
        return {
            **self._shown(request),
            **self.form.fill(asked.arguments),
            self.picture: asked.source or result.file,
        }

    def _shown(self, request: gr.Request) -> dict[Any, Any]:
        """The result that is shown, and its line."""
        state = self._state(request)
        shown = self.view.show(state.result, state.steps, visitor_language(request))
        return {**shown, self.form.line: "" if state.result is None else state.result.line}

    async def _strip(self, request: gr.Request) -> dict[Any, Any]:
        """The earlier results, or with HISTORY on all steps."""
        kept, session = self.kept, self._session(request)
        state = session.tabs[self._name]
        if kept is None:
            return self.view.show_history([(each.after, each.label) for each in state.history])
        previews = await asyncio.to_thread(kept.previews, session)
        state.steps = [step for step, _ in previews]
        return self.view.show_history([(path, step.metadata.prompt) for step, path in previews])

    async def _edit(self, request: gr.Request, asked: Asked) -> AsyncIterator[dict[Any, Any]]:
        """Edit one picture, and yield the updates of the page."""
        form, view = self.form, self.view
        language, session = visitor_language(request), self._session(request)
        state = session.tabs[self._name]
        if state.is_busy:
            yield form.unchanged()
            return
        if not asked.source or not asked.arguments["prompt"]:
            yield form.missing(asked.source, language)
            return
        with state.busy():
            try:
                parameters = self._service.read_picture(asked.arguments)
                before = await self._save_shown(session, asked.source)
                yield {**form.busy(), **view.begin(before, language)}
                data = await asyncio.to_thread(Path(asked.source).read_bytes)

                async def work(notify: Notify[Progress | EditedPicture]) -> None:
                    edited = await self._service.edit_picture(
                        data, parameters, notify, mask=asked.mask, previews=_PREVIEWS
                    )
                    await notify(edited)

                progress = ProgressLine(language)
                async for event in state.run(work):
                    if isinstance(event, Progress):
                        update = form.busy(progress.show(event))
                        if event.preview is not None:
                            preview = await asyncio.to_thread(save_preview, session, event.preview)
                            update |= view.preview(before, preview, language)
                        yield update
                        continue
                    if parameters.outpaint and event.source is not None:
                        before = await asyncio.to_thread(save_shown, session, event.source)
                    step = await self._keep(asked, data, event)
                    line = line_of_result(event, progress, language, step)
                    if self.kept is not None and step is None:
                        line += caution(text("not_kept", language))
                    result = await asyncio.to_thread(
                        save_result, session, event, asked, before, line, language, step
                    )
                    state.add(result)
                    end = await self._strip(request)
            except Step1XEditError as error:
                line, end = line_of_failure(error, language), {}
        yield {**view.show(state.result, state.steps, language), **form.free(line), **end}

    async def _keep(self, asked: Asked, data: bytes, edited: EditedPicture) -> Step | None:
        if self.kept is None:
            return None
        return await asyncio.to_thread(self.kept.keep, asked, data, edited)

    async def _save_shown(self, session: Session, path: str) -> str:
        """Write a picture in a format that browsers show; raises an error if it cannot be read."""
        return await asyncio.to_thread(lambda: save_shown(session, self._decode(path)))

    def _cleared(self, request: gr.Request, path: str) -> Any:
        """An empty line, unless it belongs to a running edit, or to one of this picture."""
        state = self._state(request)
        belongs = state.result is not None and state.result.asked.source == path
        return gr.skip() if state.is_busy or belongs else ""


class EditTab(_PictureTab):
    """Edits a whole picture."""

    def __init__(self, service: EditService, settings: Settings, sessions: Sessions) -> None:
        super().__init__("edit", service, settings, sessions)
        with gr.Row():
            with gr.Column(min_width=300):
                self.picture = picture = self._place_picture(320)
                self.form = form = Form(self._name, service, self._examples)
            self.view = self._place_view()
        taken = [picture, form.line, *form.inputs]
        picture.change(self.take, picture, taken, preprocess=False, **PRIVATE)
        inputs, outputs = [picture, *form.inputs], [*self.view.outputs, *form.outputs]
        end = form.run.click(self.edit, inputs, outputs, preprocess=False, **PRIVATE)
        self.ends.append(end)
        self._listen_to_results()

    async def take(self, request: gr.Request, given: dict[str, Any] | None) -> dict[Any, Any]:
        """Refuse at once a file that cannot be edited, and clear the box.

        A result that the visitor brings, and does not choose with *Use as input*, brings back the
        settings that it was made with.
        """
        session, language, line = self._session(request), visitor_language(request), self.form.line
        if given is None:
            return {line: gr.skip()}
        path = Path(given["path"])
        try:
            await self._save_shown(session, str(path))
        except Step1XEditError as error:
            return {self.picture: None, line: alert_of(error, language)}
        record = None if session.has_made(path) else await asyncio.to_thread(read_edit_record, path)
        if record is None or self._state(request).is_busy:
            return {line: self._cleared(request, str(path))}
        words = text("settings.taken", language, name=_name_of(given), seed=record.seed)
        return {line: done_line(words), **self.form.settings_of(record)}

    async def edit(
        self, request: gr.Request, source: dict[str, Any] | None, *values: object
    ) -> AsyncIterator[dict[Any, Any]]:
        """Edit the picture as the form says."""
        path = "" if source is None else source["path"]
        async for update in self._edit(request, Asked(path, self.form.arguments(values))):
            yield update


class RegionTab(_PictureTab):
    """Edits the part of a picture that the visitor paints over."""

    def __init__(self, service: EditService, settings: Settings, sessions: Sessions) -> None:
        super().__init__("region", service, settings, sessions)
        with gr.Row():
            with gr.Column(min_width=300):
                self.picture = picture = self._place_picture(200)
                editor = gr.ImageEditor(
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
                self.form = form = Form(self._name, service, self._examples)
            self.view = self._place_view()
        source = gr.State()
        taken = [picture, source, editor, form.line]
        picture.change(self.take, picture, taken, preprocess=False, **PRIVATE)
        inputs, outputs = [source, editor, *form.inputs], [*self.view.outputs, *form.outputs]
        self.ends.append(form.run.click(self.edit, inputs, outputs, **PRIVATE))
        self._listen_to_results()

    async def take(
        self, request: gr.Request, given: dict[str, Any] | None
    ) -> tuple[Any, Any, Any, Any]:
        """Show a small copy of a picture to paint over; the edit itself gets the file."""
        away = gr.ImageEditor(value=None, visible=False)
        if given is None:
            return gr.skip(), None, away, gr.skip()
        try:
            shown = await self._save_shown(self._session(request), given["path"])
        except Step1XEditError as error:
            return None, None, away, alert_of(error, visitor_language(request))
        value: Any = {"background": shown, "layers": [], "composite": None}
        editor = gr.ImageEditor(value=value, visible=True)
        return gr.skip(), given["path"], editor, self._cleared(request, given["path"])

    async def edit(
        self,
        request: gr.Request,
        path: str | None,
        painted: dict[str, Any] | None,
        *values: object,
    ) -> AsyncIterator[dict[Any, Any]]:
        """Edit the painted part of the picture as the form says."""
        asked, language = Asked(path or "", self.form.arguments(values)), visitor_language(request)
        if asked.source and asked.arguments["prompt"]:
            try:
                mask = await asyncio.to_thread(self._mask, asked.source, painted)
            except Step1XEditError as error:
                yield self.form.free(alert_of(error, language))
                return
            if mask is None:
                yield self.form.free(alert(text("no_mask", language)))
                return
            asked = replace(asked, mask=mask)
        async for update in self._edit(request, asked):
            yield update

    def _mask(self, path: str, painted: dict[str, Any] | None) -> bytes | None:
        """The painted area in the size of the picture, white on black; None if there is none."""
        layers = [] if painted is None else painted["layers"]
        alphas = [np.asarray(layer)[..., 3] for layer in layers]
        if not any(alpha.any() for alpha in alphas):
            return None
        picture = self._decode(path)
        covered = np.maximum.reduce(alphas) > 0
        mask = Image.fromarray(covered.astype(np.uint8) * 255)
        buffer = io.BytesIO()
        mask.resize((picture.width, picture.height)).save(buffer, "PNG")
        return buffer.getvalue()


# --- several pictures -----------------------------------------------------------------------------


class BatchTab(EditingTab):
    """Edits several pictures in the same way."""

    def __init__(self, service: EditService, settings: Settings, sessions: Sessions) -> None:
        super().__init__("batch", service, settings, sessions)
        with gr.Row():
            with gr.Column(min_width=300):
                files = gr.File(
                    label=T("pictures"),
                    file_count="multiple",
                    file_types=["image"],
                    height=200,
                    elem_id="batch-files",
                )
                self.form = form = Form(self._name, service, self._examples, run="run.batch")
            self._view = BatchView()
        files.change(self._check_batch, files, form.line, preprocess=False, **PRIVATE)
        inputs, outputs = [files, *form.inputs], [*self._view.outputs, *form.outputs]
        end = form.run.click(self.edit, inputs, outputs, preprocess=False, **PRIVATE)
        self.ends.append(end)
        form.stop.click(self.stop, None, None, **PRIVATE)

    async def _check_batch(self, request: gr.Request, given: list[dict[str, Any]] | None) -> Any:
        """Name at once the files that cannot be edited."""
        language = visitor_language(request)
        problems: list[str] = []
        for file in given or ():
            try:
                await asyncio.to_thread(self._decode, file["path"])
            except Step1XEditError as error:
                problems.append(alert_of(error, language, _name_of(file)))
        return gr.skip() if self._state(request).is_busy else "".join(problems)

    async def edit(
        self, request: gr.Request, given: list[dict[str, Any]] | None, *values: object
    ) -> AsyncIterator[dict[Any, Any]]:
        """Edit several pictures, and yield the updates of the page."""
        form, view, arguments = self.form, self._view, self.form.arguments(values)
        language, state = visitor_language(request), self._state(request)
        if state.is_busy:
            yield form.unchanged()
            return
        if not given or not arguments["prompt"]:
            yield form.missing(given, language)
            return
        results = BatchResults(self._session(request), language)
        with state.busy():
            yield {**form.busy(), **view.begin()}
            try:
                parameters = self._service.read_picture(arguments)
                work = partial(self._edit_each, given, parameters, results, language)
                async for event in state.run(work):
                    yield form.busy(event) if isinstance(event, str) else view.show(event)
                line = results.line(len(given))
            except Step1XEditError as error:
                line = line_of_failure(error, language)
            archive = view.show_archive(await results.pack())
        yield {**form.free(line + "".join(results.problems)), **archive}

    async def _edit_each(
        self,
        given: Sequence[dict[str, Any]],
        parameters: PictureRequest,
        results: BatchResults,
        language: str,
        notify: Notify[str | list[tuple[str, str]]],
    ) -> None:
        """Edit one picture after the other; report lines and the gallery's pictures."""

        async def edit(index: int) -> None:
            place = text("of_batch", language, number=index + 1, total=len(given))
            progress = ProgressLine(language, f"{place} · ")

            async def show(event: Progress) -> None:
                await notify(progress.show(event))

            data = await asyncio.to_thread(Path(given[index]["path"]).read_bytes)
            edited = await self._service.edit_next(data, parameters, show)
            await notify(await results.add(edited, _name_of(given[index])))

        async for index, outcome in edit_each(self._service, len(given), edit):
            if isinstance(outcome, Step1XEditError):
                results.add_problem(outcome, _name_of(given[index]))


def _name_of(file: dict[str, Any]) -> str:
    return str(file.get("orig_name") or "picture")
