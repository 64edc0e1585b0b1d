"""JSON that another program or a person has written."""

from __future__ import annotations

import json
from typing import Any


def parse(text: str | bytes | bytearray) -> Any:
    """The value in a JSON text; raises ValueError, also if the text is nested too deeply.

    `json.loads` raises RecursionError then, which is no ValueError.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
