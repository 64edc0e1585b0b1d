"""The extent of the slow tests: a part with `make test`, everything with `make test-all`."""

from __future__ import annotations

import os
from typing import TypeVar

import pytest

IS_WHOLE = os.environ.get("TEST_EXTENT") == "all"

T = TypeVar("T")

slow = pytest.mark.skipif(not IS_WHOLE, reason="a part of `make test-all`")
"""Marks what a faster test checks less thoroughly."""


def by_extent(part: T, everything: T) -> T:
    """The first with `make test`, the second with `make test-all`."""
    return everything if IS_WHOLE else part
