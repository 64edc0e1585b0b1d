"""The HTML document of the page: Gradio's own, with our description and our script in its head.

The script is part of the document, because it must also report that the rest of the page cannot be
loaded. This module does not know the layout of the page.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Final

from jinja2 import ChoiceLoader, DictLoader, Environment, FileSystemLoader
from markupsafe import Markup
from starlette.requests import Request

from step1x_edit.interfaces.page.texts import language_of, text

_TEMPLATE: Final = "frontend/index.html"
_GRADIO_S_OWN: Final = re.compile(r"\s*<meta\s+(?:property=\"og:|name=\"twitter:)[^>]*?/>")
_OURS: Final = "{{ head_of_page(request) }}"
_SAID_BY_SCRIPT: Final = {
    "blocked": "page.blocked",
    "restarted": "page.restarted",
    "lost": "page.lost",
    "disconnected": "page.disconnected",
    "offline": "page.offline",
}


def describe(environment: Environment, templates: Path) -> None:
    """Make Gradio's templates in this folder render our document."""
    source = (templates / _TEMPLATE).read_text("utf-8")
    source = _GRADIO_S_OWN.sub("", source).replace("<style>", f"{_OURS}\n\t\t<style>", 1)
    environment.loader = ChoiceLoader(
        [DictLoader({_TEMPLATE: source}), FileSystemLoader(templates)]
    )
    script = Path(__file__).with_name("page.js").read_text("utf-8")

    def head_of_page(request: Request) -> Markup:
        return _head(script, language_of(request.headers.get("accept-language", "")))

    environment.globals["head_of_page"] = head_of_page


def _head(script: str, language: str) -> Markup:
    said = {name: text(key, language) for name, key in _SAID_BY_SCRIPT.items()}
    said["language"] = language
    properties = {
        "title": "step1x-edit",
        "type": "website",
        "description": text("page.about", language),
    }
    tags = [
        f'<meta property="og:{name}" content="{html.escape(content)}">'
        for name, content in properties.items()
    ]
    texts = json.dumps(said, ensure_ascii=False).replace("<", r"\u003c")
    return Markup("\n".join([*tags, f"<script>({script.strip()})({texts});</script>"]))  # noqa: S704
