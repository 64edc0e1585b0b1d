"""The page that documents and tries the REST routes, from installed files.

It loads nothing from other sites, so it works offline, and its content policy enforces this.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

_POLICY: Final = (
    "default-src 'none'; connect-src 'self'; script-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE: Final = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>step1x-edit</title>
<link rel="icon" href="/docs/favicon.png">
<link rel="stylesheet" href="/docs/swagger-ui.css">
<div id="page"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</html>
"""
_START: Final = """\
SwaggerUIBundle({url: "/openapi.json", dom_id: "#page", deepLinking: true, validatorUrl: null});
"""
_ASSETS: Final = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}


def docs_routes() -> list[Route]:
    """The page at /docs and its files."""

    async def page(request: Request) -> Response:
        return Response(_PAGE, media_type="text/html", headers={"Content-Security-Policy": _POLICY})

    async def start(request: Request) -> Response:
        return Response(_START, media_type="text/javascript")

    return [
        Route("/docs", page),
        Route("/docs/start.js", start),
        *(Route(f"/docs/{name}", _asset(name, kind)) for name, kind in _ASSETS.items()),
    ]


def _asset(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    path = Path(str(files("fastapi_offline") / "static" / name))

    async def send(request: Request) -> Response:
        headers = {"Cache-Control": "private, max-age=3600"}
        return FileResponse(path, media_type=media_type, headers=headers)

    return send
