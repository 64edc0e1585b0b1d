"""Edit pictures by saying what to change, with the open model Step1X-Edit.

Importing this package imports nothing else: each public name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from step1x_edit.errors import Step1XEditError
    from step1x_edit.interfaces.mcp.client import MCPClient
    from step1x_edit.pictures.images import read_edit_record, read_record
    from step1x_edit.schemas.answers import (
        BatchAnswer,
        EditAnswer,
        ErrorAnswer,
        GpuAnswer,
        StatusAnswer,
    )
    from step1x_edit.schemas.requests import (
        BatchRequest,
        EditRecord,
        EditRequest,
        GenerateRequest,
        GenerationRecord,
    )
    from step1x_edit.service.file_edits import FileEdits
    from step1x_edit.service.service import EditService
    from step1x_edit.service.wiring import build_service
    from step1x_edit.settings import Settings, load_settings

__version__ = "0.1.0"

__all__ = [
    "BatchAnswer",
    "BatchRequest",
    "EditAnswer",
    "EditRecord",
    "EditRequest",
    "EditService",
    "ErrorAnswer",
    "FileEdits",
    "GenerateRequest",
    "GenerationRecord",
    "GpuAnswer",
    "MCPClient",
    "Settings",
    "StatusAnswer",
    "Step1XEditError",
    "__version__",
    "build_service",
    "load_settings",
    "read_edit_record",
    "read_record",
]

_HOMES: Final = {
    "BatchAnswer": "schemas.answers",
    "EditAnswer": "schemas.answers",
    "ErrorAnswer": "schemas.answers",
    "GpuAnswer": "schemas.answers",
    "StatusAnswer": "schemas.answers",
    "EditService": "service.service",
    "FileEdits": "service.file_edits",
    "MCPClient": "interfaces.mcp.client",
    "Settings": "settings",
    "Step1XEditError": "errors",
    "build_service": "service.wiring",
    "load_settings": "settings",
    "read_edit_record": "pictures.images",
    "read_record": "pictures.images",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'schemas.requests')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
