"""Runs the tests with a real Ray cluster. `make test-cluster` calls it.

The last test kills the cluster, and Ray crashes when a driver that lost its cluster exits: so this
process ends without Ray's clean-up.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

code = pytest.main([str(Path(__file__).parent / "test_real_ray.py")])
sys.stdout.flush()
os._exit(code)
