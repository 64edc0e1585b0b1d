"""Every measurement that needs a GPU, in one command of at most eight minutes.

    python benchmarks/gpu_check.py                       # one large GPU, full size, random weights
    python benchmarks/gpu_check.py --tiny --device cpu   # the same code on a stand-in

It compares our path with the same network written plainly (`gpu/networks.py`) and with diffusers'
FLUX of the same sizes: first the numbers, then the speed. Both are bound by what the device reaches
in the same run (the section `probe`). Baseline, ours and peer run twice, at the beginning and
`again`, to show drift. Then the memory: edits under caps, and moving the model from disk to the
device and back. Sections have budgets; sections that did not run are named, and the only estimated
figure is the `extrapolated` time of 28 steps. Full size takes 60 GB of GPU and 60 GB of host memory
and 6 GB of disk. Results go to `benchmarks/results/`; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from build import commit
from gpu import coded, memory, sections, training
from gpu.bench import FULL, SMALL, Bench, Figures, first_line, smi
from gpu.networks import HAS_PEER
from gpu.several import several
from markdown_tables import cell, table_of

RESULTS = Path(__file__).parent / "results"
LIMIT_S = 440  # importing the libraries comes on top
GRACE_S = 15
"""A section checks the clock between steps. If it is stuck, it is stopped after this much more."""


@dataclass(frozen=True)
class Section:
    run: Callable[[Bench], Figures]
    budget_s: float
    needs_peer: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


SECTIONS = (
    Section(sections.probe, 25),
    Section(sections.correctness, 40),
    Section(sections.baseline, 40),
    Section(sections.exact, 40),
    Section(sections.peer, 30, needs_peer=True),
    Section(sections.exact_compiled, 80),
    Section(sections.again, 45),
    Section(sections.turbo, 60),
    Section(memory.streaming, 80),
    Section(memory.residency, 60),
    Section(coded.coded_blocks, 60),
    Section(training.training, 60),
    # explains the figures above, with the remaining time
    Section(sections.savings, 30),
    Section(sections.exact_flash, 25),
    Section(sections.exact_cudnn, 25),
    Section(sections.baseline_helpers, 30),
    Section(sections.peer_compiled, 60, needs_peer=True),
    Section(several, 90),
)


@dataclass
class Report:
    """The figures so far; it can be written at any moment."""

    facts: Figures
    found: dict[str, Figures] = field(default_factory=dict)

    def as_json(self) -> Figures:
        return self.facts | {"sections": self.found}

    @property
    def is_good(self) -> bool:
        """Whether nothing failed and nothing was wrong; sections that did not run are neither."""
        return not any(
            section["status"].startswith(("failed", "wrong")) for section in self.found.values()
        )

    def write(self, folder: Path) -> Path:
        name = re.sub(r"\W+", "-", str(self.facts["device"])).strip("-").lower()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.facts['date']}_gpu_check_{name}.json"
        file.write_text(json.dumps(_rounded(self.as_json()), indent=1) + "\n", "utf-8")
        return file


def run_sections(
    bench: Bench, todo: Sequence[Section], report: Report, limit_s: float, folder: Path
) -> None:
    """Run one after the other until the time is up; the report is written after each."""
    end = time.monotonic() + limit_s
    for section in todo:
        report.found[section.name] = {"status": "not run: the time was up"}
    for section in todo:
        started = time.monotonic()
        if started >= end:
            continue
        deadline = min(end, started + section.budget_s)
        bench.is_over = partial(_is_past, deadline)
        report.found[section.name] = {"status": "stopped: it was stuck when the time was up"}
        report.found[section.name] = _attempt(section, bench)
        report.found[section.name]["seconds"] = time.monotonic() - started
        report.write(folder)
        said = report.found[section.name]
        print(f"{section.name}: {said['status']}, {said['seconds']:.1f} s", file=sys.stderr)


def _is_past(deadline: float) -> bool:
    return time.monotonic() >= deadline


def _attempt(section: Section, bench: Bench) -> Figures:
    if section.needs_peer and not HAS_PEER:
        return {"status": "not run: diffusers is not installed"}
    try:
        figures = section.run(bench)
    except Exception as error:  # noqa: BLE001  one section must not cost the figures of the others
        traceback.print_exc()
        traceback.clear_frames(error.__traceback__)  # they hold memory of the device
        bench.drop()
        return {"status": f"failed: {first_line(error)}"}
    if figures.get("is_right") is False:
        return {"status": "wrong: the numbers differ by more than is allowed"} | figures
    return {"status": "in part" if figures.get("left_out") else "ran"} | figures


def _rounded(value: object) -> object:
    match value:
        case dict():
            return {key: _rounded(each) for key, each in value.items()}
        case list() | tuple():
            return [_rounded(each) for each in value]
        case float():
            return float(f"{value:.5g}")
        case _:
            return value


def stop_if_stuck(report: Report, folder: Path, seconds: float) -> threading.Timer:
    """After this time, write the report so far and end the process, whatever it is doing."""

    def stop() -> None:
        say(report, folder)
        sys.stdout.flush()
        os._exit(3)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    return timer


# --- the table ------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """Rows for docs/benchmarks.md."""
    facts, found = report.facts, report.found
    what = f"`python benchmarks/gpu_check.py`, {facts['device']}, driver {facts['driver']}"
    lines = [
        f"{what}, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}, "
        f"{facts['dtype']}, random weights.",
        "",
        *_speed_rows(found),
        *_correctness_rows(found),
        *_turbo_rows(found.get("turbo", {})),
        *_streaming_rows(found.get("streaming", {})),
        *_coded_rows(found.get("coded_blocks", {})),
        *_several_rows(found.get("several", {})),
        *_training_rows(found.get("training", {})),
        *_figure_rows("probe", found.get("probe", {})),
        *_figure_rows("residency", found.get("residency", {})),
        *_figure_rows("savings", found.get("savings", {})),
        "| section | |",
        "|---|---|",
        *(f"| {name} | {section['status']} |" for name, section in found.items()),
    ]
    return "\n".join(lines)


def _speed_rows(found: dict[str, Figures]) -> list[str]:
    again = {
        f"{name}, again": {"rows": section["rows"]}
        for name, section in found.get("again", {}).items()
        if isinstance(section, dict)
    }
    base, rival = (
        {row["pixels"]: row["step_ms"] for row in found.get(name, {}).get("rows", [])}
        for name in ("baseline", "peer")
    )
    lines = [
        "| path | size | first step, ms | a step, ms (least–most) | 28 steps, s | baseline ÷ this "
        "| peer ÷ this | TFLOP/s | activations, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, section in (found | again).items():
        if name == "streaming":
            continue
        for row in section.get("rows", []):
            size, step = row["pixels"], row["step_ms"]
            least_most = f"{row['step_min_ms']:.1f}–{row['step_max_ms']:.1f}"
            cells = (
                name,
                size,
                f"{row['first_step_ms']:.1f}",
                f"{step:.1f} ({least_most})",
                f"{row['loop_s']:.2f} {row['loop_is']}",
                f"{base[size] / step:.2f}" if size in base else "–",
                f"{rival[size] / step:.2f}" if size in rival else "–",
                f"{row['tflop_per_s']:.3g}",
                cell(row.get("activations_gb")),
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _correctness_rows(found: dict[str, Figures]) -> list[str]:
    names = (
        "float32_shallow",
        "float32_shallow_allowed",
        "plain_from_float32",
        "ours_from_float32",
        "allowed",
        "between",
        "latents_from_baseline",
    )
    lines = ["| relative difference | correctness | exact | exact_compiled |", "|---|---|---|---|"]
    for name in names:
        cells = [
            cell(found.get(section, {}).get(name), digits=2)
            for section in ("correctness", "exact", "exact_compiled")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _turbo_rows(section: Figures) -> list[str]:
    if not section.get("loops"):
        return []
    return [*table_of(section["loops"]), ""]


def _streaming_rows(section: Figures) -> list[str]:
    if not section.get("rows"):
        return []
    steps = [key for key in section["rows"][0] if key.startswith("step_ms") and key.count("_") == 2]
    names = [
        "core_share",
        "slots",
        *steps,
        "peak_reserved_gb",
        "onload_s",
        "offload_s",
        "held_after_offload_gb",
        "out_of_memory",
        "is_right",
    ]
    lines = [f"| cap, GB | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in section["rows"]:
        cap = "none" if row["cap_gb"] is None else row["cap_gb"]
        cells = [row["failed"]] if "failed" in row else [cell(row.get(name)) for name in names]
        lines.append(f"| {cap} | {' | '.join(cells)} |")
    return [*lines, ""]


def _coded_rows(section: Figures) -> list[str]:
    if not section.get("blocks"):
        return []
    names = ["weights_gb", "ms", "compiled_ms", "activations_gb", "from_float32", "allowed"]
    lines = [f"| one block | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in section["blocks"]:
        cells = [cell(row.get(name)) for name in names]
        lines.append(f"| {row['precision']} | {' | '.join(cells)} |")
    return [*lines, ""]


def _several_rows(section: Figures) -> list[str]:
    lines = ["| GPUs | size | a step, ms | 28 steps, s | distance from one |", "|---" * 5 + "|"]
    for group in section.get("groups", []):
        for row in group["rows"]:
            loop = f"{row['loop_s']:.2f} {row['loop_is']}"
            cells = (group["gpus"], row["pixels"], f"{row['step_ms']:.1f}", loop)
            lines.append(f"| {' | '.join(map(str, cells))} | {cell(group['distance'])} |")
    return [*lines, ""] if section.get("groups") else []


def _training_rows(section: Figures) -> list[str]:
    if not section.get("steps"):
        return []
    return [*table_of(section["steps"]), ""]


def _figure_rows(name: str, section: Figures) -> list[str]:
    plain = {
        key: value
        for key, value in section.items()
        if isinstance(value, float | int | str) and key not in ("status", "seconds")
    }
    lines = [f"| {key} | {cell(value)} |" for key, value in plain.items()]
    lines += [
        f"| attention, {row['tokens']} tokens, {row['kernel']}: TFLOP/s "
        f"| {row.get('failed') or cell(row['tflop_per_s'])} |"
        for row in section.get("attention", [])
    ]
    return [f"| {name} | |", "|---|---|", *lines, ""] if lines else []


def say(report: Report, folder: Path) -> None:
    file = report.write(folder)
    print(table(report), f"\n{file}\n", sep="\n")
    print(json.dumps(_rounded(report.as_json())))


# --- the command ----------------------------------------------------------------------------------


def facts_of(device: torch.device, is_tiny: bool, commit_name: str) -> Figures:
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else "a stand-in for a GPU"
    return {
        "device": name + (", tiny sizes" if is_tiny else ""),
        "driver": (smi("driver_version") or "unknown") if is_cuda else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit_name,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "dtype": "bfloat16",
        "cores": os.cpu_count(),
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to test the code itself")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for all sections")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SECTION")
    parser.add_argument("--commit", help="the commit that is measured, if git cannot report it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; to test the code itself: --tiny --device cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # some calls need the index

    if arguments.tiny:
        torch.set_num_threads(1)  # toy sizes gain nothing from threads, which spin on cores

    report = Report(facts_of(device, arguments.tiny, arguments.commit or commit()))
    bench = Bench(SMALL if arguments.tiny else FULL, device)
    todo = [section for section in SECTIONS if section.name in arguments.only]
    timer = stop_if_stuck(report, arguments.out, arguments.limit + GRACE_S)
    run_sections(bench, todo, report, arguments.limit, arguments.out)
    timer.cancel()
    say(report, arguments.out)
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
