"""The log of our processes: on stderr, one event per line, for people or for programs.

Messages can contain text chosen by others, such as prompts, paths and file names. So only printable
characters reach a terminal or a collector, and one event can never look like two.
"""

from __future__ import annotations

import codecs
import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Final

# Python imports the module of a codec at its first use; a log line may be due when no file can be
# opened any more.
_ESCAPED: Final = codecs.lookup("unicode_escape")

LIBRARIES: Final = ("fastmcp", "httpx2", "mcp", "uvicorn")  # they log each start and request

current_request: ContextVar[str] = ContextVar("current_request", default="")
"""The id of the current request, added to every line that is logged during it."""


def log_to_stderr(level: str, log_format: str, process: str) -> None:
    """Send all logging to stderr, with the name of this process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if log_format == "json" else _Text(process))
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(True)
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.WARNING)


class _Text(logging.Formatter):
    """One line for people."""

    def __init__(self, process: str) -> None:
        part = "" if process == "server" else f"{process} "
        super().__init__(f"%(asctime)s %(levelname)s {part}%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        line = "".join(map(_printable, super().format(record)))
        request = current_request.get()
        return line if not request or line.endswith(request) else f"{line} id={request}"


class _Json(logging.Formatter):
    """One JSON object for programs; ASCII only, so that no character has a special effect."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        event = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := current_request.get():
            event["request_id"] = request
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event)


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return _ESCAPED.encode(character)[0].decode("ascii")
