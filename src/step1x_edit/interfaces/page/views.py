"""The parts of the page that show results, and their updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import gradio as gr

from step1x_edit.interfaces.page.kept import SOURCE, choices
from step1x_edit.interfaces.page.lines import picture_alone, pictures_compared
from step1x_edit.interfaces.page.parts import T
from step1x_edit.interfaces.page.sessions import Result, Thoughts
from step1x_edit.service.history import Step

_DELETIONS: Final[tuple[tuple[str, Literal["stop", "secondary"]], ...]] = (
    ("step", "stop"),
    ("all", "stop"),
    ("nothing", "secondary"),
)
"""What can be deleted of the history."""


class ResultView:
    """A result beside its source, the reasoning behind it, and the earlier results of the tab.

    The buttons below refer to the picture that is shown; they are disabled if it is not a result.
    """

    def __init__(self, name: str, history: str) -> None:
        """`history` is the text of the label of the earlier results."""
        with gr.Column(min_width=300):
            self.pictures = gr.HTML(
                label=T("result"),
                show_label=True,
                container=True,
                apply_default_css=False,
                js_on_load=None,
                min_height=240,
                elem_id=f"{name}-result",
                elem_classes="result",
            )
            with gr.Row(visible=False, elem_classes="actions") as self._actions:
                self._download = gr.DownloadButton(
                    T("download"),
                    variant="primary",
                    size="md",
                    min_width=120,
                    elem_id=f"{name}-download",
                )
                self.reuse = gr.Button(
                    T("reuse"), size="md", min_width=120, elem_id=f"{name}-reuse"
                )
                self.again = gr.Button(
                    T("again"), size="md", min_width=120, elem_id=f"{name}-again"
                )
            self.steps = StepView(name)
            self._thoughts = _ThoughtsView(name)
            self.gallery = gr.Gallery(
                label=T(history),
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
        self.outputs: Final[list[Any]] = [
            self.pictures,
            self._actions,
            self._download,
            self.reuse,
            self.again,
            self.gallery,
            *self.steps.outputs,
            *self._thoughts.outputs,
        ]

    def begin(self, before: str, language: str) -> dict[Any, Any]:
        """Show the picture to be edited."""
        return {
            **self.alone(before, language),
            self._download: gr.DownloadButton(interactive=False),
            self.reuse: gr.Button(interactive=False),
            self.again: gr.Button(interactive=False),
            **self.steps.show(None, (), language),
            **self._thoughts.show(None),
        }

    def preview(self, before: str, preview: str, language: str) -> dict[Any, Any]:
        """Show the progress of a running edit."""
        return {self.pictures: pictures_compared(before, preview, "preview", language)}

    def show(self, result: Result | None, others: Sequence[Step], language: str) -> dict[Any, Any]:
        """Show a result, or an empty view; a step of the history can be compared with others."""
        if result is None:
            return {
                self.pictures: "",
                self._actions: gr.Row(visible=False),
                **self.steps.show(None, (), language),
                **self._thoughts.show(None),
            }
        return {
            self.pictures: pictures_compared(result.before, result.after, "after", language),
            self._actions: gr.Row(visible=True),
            self._download: gr.DownloadButton(value=result.file, interactive=True),
            self.reuse: gr.Button(interactive=True),
            self.again: gr.Button(interactive=True),
            **self.steps.show(result.step, others, language),
            **self._thoughts.show(result.thoughts),
        }

    def compare(self, before: str, after: str, language: str) -> dict[Any, Any]:
        """Show two pictures."""
        return {self.pictures: pictures_compared(before, after, "after", language)}

    def alone(self, picture: str, language: str) -> dict[Any, Any]:
        """Show one picture without another to compare it with."""
        return {self.pictures: picture_alone(picture, language)}

    def unmark(self) -> dict[Any, Any]:
        """Mark none of the earlier results as the one that is shown."""
        return {self.gallery: gr.Gallery(selected_index=None)}

    def show_history(self, pictures: Sequence[tuple[str, str]]) -> dict[Any, Any]:
        """Show the earlier results, each with its label."""
        return {self.gallery: gr.Gallery(value=pictures, visible=bool(pictures))}


class StepView:
    """What can be done with a step of the history, below its picture."""

    def __init__(self, name: str) -> None:
        with gr.Column(visible=False) as self._parts:
            with gr.Row(elem_classes="actions"):
                self.undo = gr.Button(T("undo"), size="md", min_width=120, elem_id=f"{name}-undo")
                self.merge = gr.Button(
                    T("merge"), size="md", min_width=120, elem_id=f"{name}-merge"
                )
                self.delete = gr.Button(
                    T("delete"), size="md", min_width=120, elem_id=f"{name}-delete"
                )
            with gr.Column(visible=False) as self._sure:
                gr.Markdown(T("delete.sure"), elem_id=f"{name}-delete-sure")
                with gr.Row(elem_classes="actions"):
                    self.delete_step, self.delete_all, self.delete_nothing = (
                        gr.Button(
                            T(f"delete.{choice}"),
                            variant=variant,
                            size="md",
                            min_width=120,
                            elem_id=f"{name}-delete-{choice}",
                        )
                        for choice, variant in _DELETIONS
                    )
            self.against = gr.Dropdown(
                label=T("against"), filterable=False, elem_id=f"{name}-against"
            )
        self.outputs: Final[list[Any]] = [self._parts, self.merge, self._sure, self.against]

    def ask(self) -> dict[Any, Any]:
        """Ask what to delete."""
        return {self._sure: gr.Column(visible=True)}

    def delete_none(self) -> dict[Any, Any]:
        """Ask no longer."""
        return {self._sure: gr.Column(visible=False)}

    def show(self, step: Step | None, others: Sequence[Step], language: str) -> dict[Any, Any]:
        """Offer to undo a step, to make it of the original, and to compare it with others."""
        if step is None:
            return {self._parts: gr.Column(visible=False)}
        offered = choices(step, others, language)
        return {
            self._parts: gr.Column(visible=True),
            **self.delete_none(),
            self.merge: gr.Button(interactive=step.source not in (None, step.original)),
            self.against: gr.Dropdown(offered, value=SOURCE),
        }


class _ThoughtsView:
    """The reasoning behind a result, if there was any.

    Text boxes hold it, because the words of a model must not become part of the page.
    """

    def __init__(self, name: str) -> None:
        with gr.Accordion(
            T("reasoning"), open=True, visible=False, elem_id=f"{name}-thoughts"
        ) as self._accordion:
            self._rewritten = gr.Textbox(
                label=T("rewritten"), interactive=False, elem_id=f"{name}-rewritten"
            )
            self._rounds = gr.Gallery(
                label=T("rounds"),
                columns=3,
                height=220,
                interactive=False,
                object_fit="contain",
                buttons=["fullscreen"],
                elem_id=f"{name}-rounds",
            )
            self._verdicts = gr.Textbox(
                label=T("verdicts"), interactive=False, elem_id=f"{name}-verdicts"
            )
        self.outputs: Final[list[Any]] = [
            self._accordion,
            self._rewritten,
            self._rounds,
            self._verdicts,
        ]

    def show(self, thoughts: Thoughts | None) -> dict[Any, Any]:
        if thoughts is None:
            return {self._accordion: gr.Accordion(visible=False)}
        return {
            self._accordion: gr.Accordion(visible=True),
            self._rewritten: gr.Textbox(thoughts.rewritten, visible=bool(thoughts.rewritten)),
            self._rounds: gr.Gallery(list(thoughts.rounds), visible=bool(thoughts.rounds)),
            self._verdicts: gr.Textbox(thoughts.verdicts, visible=bool(thoughts.verdicts)),
        }


class BatchView:
    """The results of a batch, and an archive of all of them."""

    def __init__(self) -> None:
        with gr.Column(min_width=300):
            self._gallery = gr.Gallery(
                label=T("results"),
                columns=3,
                height=420,
                object_fit="contain",
                interactive=False,
                buttons=["fullscreen"],
                elem_id="batch-results",
            )
            self._archive = gr.DownloadButton(
                T("results.file"), visible=False, elem_id="batch-download"
            )
        self.outputs: Final[list[Any]] = [self._gallery, self._archive]

    def begin(self) -> dict[Any, Any]:
        """Show an empty view."""
        return {self._gallery: [], self._archive: gr.DownloadButton(visible=False)}

    def show(self, pictures: Sequence[tuple[str, str]]) -> dict[Any, Any]:
        """Show these pictures with their names."""
        return {self._gallery: pictures}

    def show_archive(self, path: str | None) -> dict[Any, Any]:
        """Offer the archive, if there is one."""
        if path is None:
            return {}
        return {self._archive: gr.DownloadButton(value=path, visible=True)}
