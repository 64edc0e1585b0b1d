"""Shared by all parts of the page: how events are declared, and the visitor's language."""

from __future__ import annotations

from typing import Any, Final

import gradio as gr

from step1x_edit.interfaces.page.texts import language_of, translations

PRIVATE: Final[dict[str, Any]] = {"api_visibility": "private", "show_progress": "hidden"}
"""The declaration of each event of the page."""

T: Final[Any] = gr.I18n(**translations())
"""Looks up the initial texts of the page, which the browser translates."""


def visitor_language(request: gr.Request) -> str:
    """The language to answer a visitor in."""
    return language_of(request.headers.get("accept-language", ""))
