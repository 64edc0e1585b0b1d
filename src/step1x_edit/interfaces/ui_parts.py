"""What the parts of the page have in common: texts by the visitor's language, and lines."""

from __future__ import annotations

import html
from typing import Any, Final

import gradio as gr

from step1x_edit.errors import Step1XEditError
from step1x_edit.interfaces.ui_texts import language_of, translations

PRIVATE: Final[dict[str, Any]] = {"api_visibility": "private", "show_progress": "hidden"}
"""How each event of the page is declared."""

T: Final[Any] = gr.I18n(**translations())
"""Gives the texts that stand on the page from the start, which the browser translates."""


def visitor_language(request: gr.Request) -> str:
    """The language to answer a visitor in."""
    return language_of(request.headers.get("accept-language", ""))


def alert_of(error: Step1XEditError) -> str:
    """A line that tells an error."""
    return alert(str(error))


def alert(words: str) -> str:
    """A line that says what went wrong."""
    return f'<div class="problem" role="alert">{html.escape(words)}</div>'


def bar_line(words: str, share: float) -> str:
    """A line with a bar, of which this share is filled."""
    bar = f'<div class="bar"><i style="width:{share:.0%}"></i></div>'
    return f'<div role="status">{html.escape(words)}{bar}</div>'
