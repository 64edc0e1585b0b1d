"""The form of a tab that edits: prompt, examples, buttons, and a widget for each parameter."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import gradio as gr

from step1x_edit.errors import InvalidParameterError
from step1x_edit.hub.catalog import Suggestion
from step1x_edit.interfaces.page.lines import alert
from step1x_edit.interfaces.page.parts import PRIVATE, T, visitor_language
from step1x_edit.interfaces.page.texts import has_text, text
from step1x_edit.schemas.parameters import Parameter, parameters_of
from step1x_edit.schemas.requests import PARAMETERS, EditRecord, HowToEdit, given, loras_of
from step1x_edit.service.service import EditService

_REASONING: Final = ("thinking", "reflection")
_PACED: Final = (
    "num_steps",
    "guidance_scale",
    "size_level",
    "thinking",
    "reflection",
    "reflection_rounds",
)
"""The parameters besides the mode on which the time of an edit depends."""
_TAKEN_OVER: Final = (
    "prompt",
    "negative_prompt",
    "num_steps",
    "guidance_scale",
    "size_level",
    "seed",
    "mode",
)
"""The settings that a result brings back: each model and server can do them."""


class Form:
    """The inputs of an edit, the buttons that start and stop it, and the line below them.

    It is placed where the page is being built.
    """

    def __init__(
        self, name: str, service: EditService, examples: Sequence[str], run: str = "run"
    ) -> None:
        """`run` is the text of the button that starts an edit."""
        self._service = service
        self.prompt = gr.Textbox(
            label=T("prompt"),
            placeholder=T("prompt.hint"),
            lines=2,
            max_lines=6,
            submit_btn=False,
            elem_id=f"{name}-prompt",
        )
        with gr.Row(elem_classes="examples"):
            for example in examples:
                key = f"edit.{example}"
                button = gr.Button(T(key), size="sm", elem_id=f"{name}-{example}")
                button.click(_saying(key), None, self.prompt, **PRIVATE)
        parameters = parameters_of(HowToEdit)
        mode = _widget(parameters.pop("mode"), name, service)
        region = _widget(parameters.pop("region"), name, service)
        with gr.Row():
            self.run = gr.Button(
                T(run), variant="primary", scale=3, min_width=120, elem_id=f"{name}-run"
            )
            self.stop = gr.Button(
                T("stop"),
                variant="stop",
                interactive=False,
                min_width=80,
                elem_id=f"{name}-stop",
            )
        self.line = gr.Markdown(elem_classes="line", elem_id=f"{name}-line", sanitize_html=False)
        with gr.Accordion(T("advanced"), open=False, elem_id=f"{name}-advanced"):
            with gr.Row(visible=False) as self._hint:
                self._hint_line = gr.Markdown(elem_id=f"{name}-suggested", sanitize_html=False)
                use = gr.Button(T("suggested.use"), size="sm", elem_id=f"{name}-use-suggested")
            widgets = {
                parameter.name: _widget(parameter, name, service)
                for parameter in parameters.values()
            }
        reflection, rounds = widgets["reflection"], widgets["reflection_rounds"]
        reflection.change(_shown_if, reflection, rounds, **PRIVATE)
        suggested = [widgets["num_steps"], widgets["guidance_scale"]]
        use.click(self._suggested, None, suggested, **PRIVATE)
        self._widgets = {"prompt": self.prompt, "mode": mode, "region": region, **widgets}
        self.inputs: Final[list[Any]] = list(self._widgets.values())
        self.outputs: Final[list[Any]] = [self.run, self.stop, self.line]
        self.hint: Final[list[Any]] = [self._hint, self._hint_line]
        """The recommendation of the model's authors, and a button that applies it."""
        self.reasoning: Final[list[Any]] = [widgets[choice] for choice in _REASONING]
        """The options that only some models support."""
        for paced in _PACED:
            self.foretell_on(widgets[paced].change)

    def foretell_on(self, event: Callable[..., Any]) -> None:
        """Whenever this event occurs, show how long an edit takes in each mode."""
        event(self._foretell, self.inputs, self._widgets["mode"], **PRIVATE)

    def settings_of(self, record: EditRecord) -> dict[Any, Any]:
        """Updates of the inputs: the settings that a picture was made with."""
        values = given({name: getattr(record, name) for name in _TAKEN_OVER})
        return {self._widgets[name]: value for name, value in values.items()}

    def arguments(self, values: Sequence[object]) -> dict[str, object]:
        """The values of the inputs by the names of the parameters."""
        filled = dict(zip(self._widgets, values, strict=True))
        return {**filled, "prompt": str(filled["prompt"] or "").strip()}

    def fill(self, arguments: Mapping[str, object]) -> dict[Any, Any]:
        """Set the inputs to these values; those without one get their default."""
        defaults = {name: parameter.default for name, parameter in parameters_of(HowToEdit).items()}
        values = {**defaults, **self._service.defaults, "seed": -1, **given(arguments)}
        shown = self._widgets
        if not shown["region"].visible:  # without a mask it would be refused
            shown = {name: widget for name, widget in shown.items() if name != "region"}
        return {widget: values[name] for name, widget in shown.items()}

    # --- updates ----------------------------------------------------------------------------------

    def busy(self, line: str = "") -> dict[Any, Any]:
        """While an edit runs. Each line repeats the state of the buttons, because a browser may
        lose one of two updates that arrive together."""
        return {
            self.run: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
            self.line: line,
        }

    def free(self, line: str) -> dict[Any, Any]:
        """After an edit."""
        return {
            self.run: gr.Button(interactive=True),
            self.stop: gr.Button(interactive=False),
            self.line: line,
        }

    def unchanged(self) -> dict[Any, Any]:
        """For a button press while the tab is busy."""
        return {self.line: gr.skip()}

    def missing(self, pictures: object, language: str) -> dict[Any, Any]:
        """For a press that cannot start an edit: ask for a picture, or else for the prompt."""
        return self.free(alert(text("no_prompt" if pictures else "no_picture", language)))

    def suggest(self, suggestion: Suggestion | None, language: str) -> dict[Any, Any]:
        """Show the recommendation, or hide its row if there is none."""
        if suggestion is None:
            return {self._hint: gr.Row(visible=False), self._hint_line: ""}
        line = text(
            "suggested",
            language,
            num_steps=suggestion.num_steps,
            guidance_scale=f"{suggestion.guidance_scale:g}",
        )
        return {self._hint: gr.Row(visible=True), self._hint_line: html.escape(line)}

    def offer_reasoning(self, language: str) -> dict[Any, Any]:
        """Disable the options that the model does not support, and say why."""
        can_reason = self._service.can_reason
        return {
            widget: gr.Checkbox(
                info=text(f"{choice}.hint" if can_reason else "reasoning.needs", language),
                interactive=can_reason,
            )
            for choice, widget in zip(_REASONING, self.reasoning, strict=True)
        }

    def _foretell(self, request: gr.Request, *values: object) -> Any:
        language, arguments = visitor_language(request), self.arguments(values)
        modes = PARAMETERS["mode"].choices
        try:
            seconds = {
                mode: self._service.predicted_s(
                    self._service.read_picture({**arguments, "mode": mode})
                )
                for mode in modes
            }
        except InvalidParameterError:  # said when the edit starts
            seconds = {}
        return gr.Radio([(_mode_label(mode, seconds.get(mode), language), mode) for mode in modes])

    def _suggested(self) -> tuple[Any, Any]:
        suggestion = self._service.suggestion
        if suggestion is None:  # since the button was shown
            return gr.skip(), gr.skip()
        return suggestion.num_steps, suggestion.guidance_scale


def _saying(key: str) -> Callable[[gr.Request], str]:
    def say(request: gr.Request) -> str:
        return text(key, visitor_language(request))

    return say


def _shown_if(is_on: bool) -> gr.Slider:
    return gr.Slider(visible=is_on)


def _mode_label(mode: int | str, seconds: float | None, language: str) -> str:
    name = text(f"mode.{mode}", language)
    if seconds is None:
        return name
    return text("mode.timed", language, mode=name, seconds=max(1, round(seconds)))


# --- widgets --------------------------------------------------------------------------------------


def _widget(parameter: Parameter, tab: str, service: EditService) -> Any:
    """The widget for a parameter of an edit: by its kind, unless the parameter is special."""
    name = parameter.name
    value = service.defaults.get(name, parameter.default)
    words = {
        "label": T(name),
        "info": T(f"{name}.hint") if has_text(f"{name}.hint") else None,
        "elem_id": f"{tab}-{name.replace('_', '-')}",
    }
    match name:
        case "mode":
            choices = [(T(f"mode.{mode}"), mode) for mode in parameter.choices]
            return gr.Radio(choices, value=value, **words)
        case "region":
            choices = [(T(f"region.{region}"), region) for region in parameter.choices]
            return gr.Radio(choices, value=value, visible=tab == "region", **words)
        case "upscale":
            factors = list(parameter.choices)
            return gr.Radio(factors, value=value, visible=service.can_upscale, **words)
        case "seed":
            return gr.Number(-1, precision=0, **words)
        case "loras":
            return _loras(service.loras, words)
        case "reflection_rounds":  # shown with the reflection
            return gr.Slider(*_range(parameter), value, step=1, visible=False, **words)
        case "thinking" | "reflection":
            hint = words["info"] if service.can_reason else T("reasoning.needs")
            return gr.Checkbox(value, interactive=service.can_reason, **{**words, "info": hint})
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


def _loras(loras: Mapping[str, float], words: Mapping[str, Any]) -> gr.Dropdown:
    usual = {name: strength for name, strength in loras.items() if strength}
    return gr.Dropdown(
        [*loras_of(usual), *(name for name in loras if name not in usual)],
        value=loras_of(usual),
        multiselect=True,
        allow_custom_value=True,
        visible=bool(loras),
        **words,
    )


def _range(parameter: Parameter) -> tuple[float, float]:
    assert parameter.minimum is not None
    assert parameter.maximum is not None
    return parameter.minimum, parameter.maximum
