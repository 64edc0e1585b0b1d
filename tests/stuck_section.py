"""A run of the check for a GPU whose only section never ends: `stuck_section.py FOLDER`."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import torch

from gpu.bench import SMALL, Bench, Figures
from gpu_check import Report, Section, run_sections, stop_if_stuck


def stuck(bench: Bench) -> Figures:
    threading.Event().wait()
    return {}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    facts = dict.fromkeys(("driver", "torch", "commit", "date", "dtype"), "")
    report = Report({"device": "a stand-in"} | facts)
    stop_if_stuck(report, folder, 0.5)
    run_sections(Bench(SMALL, torch.device("cpu")), [Section(stuck, 1)], report, 60, folder)
