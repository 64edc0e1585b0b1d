"""Snippets of HTML for several parts of the page. All words are escaped here."""

from __future__ import annotations

import html
from urllib.parse import quote

from step1x_edit.errors import ModelFetchError, Step1XEditError
from step1x_edit.interfaces.page.texts import text


def alert_of(error: Step1XEditError, language: str, subject: str = "") -> str:
    """A line about an error: a sentence in this language, and the details in English."""
    key = "error.fetch" if isinstance(error, ModelFetchError) else f"error.{error.code}"
    words = text(key, language)
    return alert(f"{subject}: {words}" if subject else words, str(error))


def alert(words: str, detail: str = "") -> str:
    """A line that reports an error, with details in English."""
    small = f'<small lang="en">{html.escape(detail)}</small>' if detail else ""
    return f'<div class="problem" role="alert">{html.escape(words)}{small}</div>'


def caution(words: str) -> str:
    """A line about a result that may differ from the request."""
    return f'<div class="notice" role="alert">{html.escape(words)}</div>'


def done_line(words: str) -> str:
    """A line about an outcome, which screen readers announce."""
    return f'<div role="status">{html.escape(words)}</div>'


def bar_line(words: str, share: float) -> str:
    """A line with a bar, of which this share is filled."""
    bar = f'<div class="bar"><i style="width:{share:.0%}"></i></div>'
    return f'<div role="status">{html.escape(words)}{bar}</div>'


def picture_alone(path: str, language: str) -> str:
    """The picture to be edited."""
    return f'<figure class="compare">{_image(path, text("alt.before", language))}</figure>'


def pictures_compared(before: str, after: str, kind: str, language: str) -> str:
    """Two pictures over each other with a slider; `kind` of the second is after or preview."""
    names = {"left": text("before", language), "right": text(kind, language)}
    return (
        '<figure class="compare">'
        + _image(before, text("alt.before", language))
        + _image(after, text(f"alt.{kind}", language), "after")
        + "".join(f'<span class="{at}">{html.escape(name)}</span>' for at, name in names.items())
        + '<i></i><input type="range" min="0" max="100" '
        + f'aria-label="{html.escape(text("slider", language))}">'
        + f'<button type="button" aria-label="{html.escape(text("fullscreen", language))}">'
        + f"{_CORNERS}</button></figure>"
    )


_CORNERS = (
    '<svg viewBox="0 0 16 16" aria-hidden="true" fill="none" stroke="currentColor" '
    'stroke-width="2"><path d="M1 5V1h4M11 1h4v4M15 11v4h-4M5 15H1v-4"/></svg>'
)


def _image(path: str, words: str, name: str = "before") -> str:
    address = f"gradio_api/file={quote(path)}"
    return f'<img class="{name}" src="{html.escape(address)}" alt="{html.escape(words)}">'
