"""The benchmark of fast and turbo runs to its end on a tiny picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_turbo.py"
TINY = ("--size", "512", "--steps", "10", "--turns", "1", "--photos", "coffee", "--edits", "night")
