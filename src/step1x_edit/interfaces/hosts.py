"""Names of hosts: those of this machine, and the name in a Host header."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


def name_of(host: str) -> str:
    """The name in a Host header, without port and brackets; empty if it is malformed."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::\d+)?", host)
    return "" if match is None else (match[1] or match[2]).lower()


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
