"""Write docs/openapi.json: the REST routes as a server with default settings describes them.

python scripts/write_openapi.py
"""

from __future__ import annotations

import json
from pathlib import Path

from step1x_edit.interfaces.http.metrics import Metrics
from step1x_edit.interfaces.server import build_routes
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings

FILE = Path(__file__).parents[1] / "docs" / "openapi.json"


def openapi() -> str:
    """The description as text of the file."""
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    chosen = {name: value for name, value in defaults.items() if name.startswith("default_")}
    settings = Settings(_env_file=None, enable_api=True, **chosen)
    service = build_service(settings)
    app = build_routes(service, settings, Metrics(service))
    return json.dumps(app.openapi(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(openapi(), encoding="utf-8")
