"""An edit at full size on the CPU, stage by stage, against what this machine can do and a peer.

    python benchmarks/full_size.py [MODEL] [--sizes 512 1024] [--steps 10] [--version v1.2]
    python benchmarks/full_size.py --blocks 2 4 --sizes 512 --steps 3

MODEL is a folder that `scripts/random_checkpoint.py` has written, or a published one; without it a
random checkpoint is written to `--folder` and removed at the end (42 GB; with `--blocks` less). The
edit is made by the product's worker in this process. For each stage the last columns say how long
its matrix products and convolutions take alone, measured in the same run with the same shapes, and
which share of the stage that is: the rest is attention, element-wise work and waiting for the disk.
Reading is compared with a plain sequential read of the same files. Shares of computation are those
of CPU seconds, which other work on the machine hardly affects.

With `--blocks` each step takes turns with diffusers' FLUX network of the same sizes, on the same
tokens in the same batch. A v1.2 also begins to think and to judge its edit: one reply of 64 tokens
each. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from alone import alone, fastest_type, least, tflop, tower_work, work_of
from bench_residency import drop_from_cache
from build import commit
from gpu.networks import HAS_PEER, peer_network
from random_checkpoint import FULL, LAYOUTS, narrow, shallow, write_checkpoint
from step1x_edit.channel import EditJob, Phase, Progress
from step1x_edit.engine.worker_process import start_of
from step1x_edit.model.transformer import Transformer
from step1x_edit.settings import load_settings
from step1x_edit.worker.edits import PipelineWorker
from step1x_edit.worker.process import load_worker
from stopwatch import GB, STAGES, Cost, Lap, Stopwatch, now, peak_gb, total

PIECE: Final = 16 * 2**20
REPLY_TOKENS: Final = 64
PROMPT: Final = "add a sign that says “open” above the door"

Figures = dict[str, dict[str, float]]
"""What each stage takes."""

# --- what this machine can do ---------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """Where and when, and how fast."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    has = [name for name in ("avx2", "avx512_bf16", "avx512_vnni", "amx_bf16") if name in flags]
    return {
        "processor": names[0] if names else platform.processor(),
        "has": has,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB),
        "torch": torch.__version__,
        "commit": commit(),
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "load": round(os.getloadavg()[0], 1),
        "fastest_type": str(fastest_type()),
        "copy_gb_per_s": round(copy_gb_per_s(), 2),
    }


def copy_gb_per_s() -> float:
    source = torch.ones(2**30, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return source.nbytes / GB / least(lambda: target.copy_(source)).seconds


def plain_read(files: Sequence[Path]) -> Cost:
    """Read files from the disk, one after the other."""
    buffer = bytearray(PIECE)
    before = now()
    for path in files:
        drop_from_cache(path)
        with path.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
        drop_from_cache(path)
    return now().since(before)


# --- the peer -------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What our step takes, as shares of the peer's."""

    seconds: float
    cpu_seconds: float


class Peer:
    """Diffusers' FLUX network with as many blocks of the same sizes."""

    def __init__(self) -> None:
        self.network: Any = None

    def take_turn(self, watch: Stopwatch) -> Turn:
        """Run the passes of our last step."""
        ours, prologues = watch.steps()[-1], watch.laps["prologue"]
        if self.network is None:
            transformer = ours[0].network
            assert isinstance(transformer, Transformer)
            config = transformer.config
            self.network = peer_network(config, torch.device("cpu"), torch.bfloat16)
            self._pass(ours[0], prologues[0])  # one-time costs
        theirs = total([self._pass(*each) for each in zip(ours, prologues, strict=True)])
        cost = total([lap.cost for lap in ours])
        return Turn(cost.seconds / theirs.seconds, cost.cpu_seconds / theirs.cpu_seconds)

    @torch.inference_mode()
    def _pass(self, lap: Lap, prologue: Lap) -> Cost:
        (batch, image, channels), (_, length, _) = lap.shapes[0], prologue.shapes[0]
        config, some = self.network.config, functools.partial(torch.randn, dtype=torch.bfloat16)
        inputs = {
            "hidden_states": some(batch, image, channels),
            "encoder_hidden_states": some(batch, length, config.joint_attention_dim),
            "pooled_projections": some(batch, config.pooled_projection_dim),
            "timestep": torch.full((batch,), 0.5, dtype=torch.bfloat16),
            "img_ids": torch.arange(3.0 * image).view(image, 3),
            "txt_ids": torch.zeros(length, 3),
        }
        before = now()
        self.network(**inputs)
        return now().since(before)


def chosen_peer(*, has_few_blocks: bool) -> Peer | None:
    """The peer, if there is one and memory for it."""
    if not has_few_blocks:
        print("the whole network leaves no room for a peer: add --blocks 2 4 for that")
    elif not HAS_PEER:
        print("diffusers is not installed, so there is no peer")
    else:
        return Peer()
    return None


# --- edits ----------------------------------------------------------------------------------------


def job_of(size: int, arguments: argparse.Namespace, **changes: Any) -> EditJob:
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return EditJob(
        image,
        PROMPT,
        num_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        size_level=size,
        **changes,
    )


def never_stop() -> None:
    """The check of an edit that nobody cancels."""


class MeasuredEdit(NamedTuple):
    """The figures of an edit."""

    stages: Figures
    operations: dict[str, float]
    """Shares of a step."""
    turns: list[Turn]


def measure_edit(
    worker: PipelineWorker, job: EditJob, plain: Cost, peer: Peer | None
) -> MeasuredEdit:
    """One whole edit."""
    watch, figures = Stopwatch(), Figures()
    turns: list[Turn] = []
    pauses: list[Cost] = []
    started = now()
    with watch.running():
        for event in worker.edit(job, never_stop):
            if not isinstance(event, Progress):
                continue
            if event.phase is Phase.ENCODING and not figures:
                read = now().since(started)
                figures["reading"] = row(read, plain.seconds, plain.seconds / read.seconds)
            if event.phase is Phase.DENOISING and event.step > 1 and peer is not None:
                paused = now()
                turns.append(peer.take_turn(watch))
                pauses.append(now().since(paused))
    whole = now().since(started).since(total(pauses))
    for stage, *_ in STAGES:
        laps = watch.laps[stage]
        cost = usual_step(watch) if stage == "step" else total([lap.cost for lap in laps])
        work = work_of(stage, watch)
        products = alone(work).cpu_seconds
        share = products / cost.cpu_seconds
        figures[stage] = row(cost, products, share, peak_gb=laps[-1].peak_gb, tflop=tflop(work))
    figures["whole edit"] = row(whole, peak_gb=peak_gb())
    return MeasuredEdit(figures, watch.shares(), turns)


def usual_step(watch: Stopwatch) -> Cost:
    """The median of all steps but the first, which is profiled."""
    steps = watch.steps()
    costs = [total([lap.cost for lap in step]) for step in steps[1:] or steps]
    return Cost(*map(statistics.median, zip(*costs, strict=True)))


def measure_reply(worker: PipelineWorker, job: EditJob, phase: Phase) -> Figures:
    """The first reply of a phase, at most 64 tokens of it; then the edit is stopped."""
    watch = Stopwatch()
    moments: dict[int, Cost] = {}
    """By number of tokens."""
    with watch.running(), contextlib.closing(worker.edit(job, never_stop)) as events:
        for event in events:
            if isinstance(event, Progress) and event.phase is phase:
                if event.step in moments:  # the next reply
                    break
                moments[event.step] = now()
                if event.step >= REPLY_TOKENS:
                    break
    start, first, *_, last = sorted(moments)
    token = moments[last].since(moments[first]).times(1 / (last - first))
    prompt = moments[first].since(moments[start]).since(token.times(first - start))
    products = alone(tower_work(watch.laps["conditioner, words"][-1])).cpu_seconds
    share = products / token.cpu_seconds
    return {
        f"{phase.value}: prompt": row(prompt),
        f"{phase.value}: token": row(token, products, share, peak_gb=peak_gb()),
    }


def row(
    cost: Cost, alone_s: float | None = None, share: float | None = None, **more: float
) -> dict[str, float]:
    found = {**cost._asdict(), "alone_s": alone_s, "share": share, **more}
    return {name: round(value, 4) for name, value in found.items() if value is not None}


def show(title: str, figures: Figures) -> None:
    print(f"\n{title}\n")
    print("| stage | s | CPU s | from disk, GB | peak so far, GB | TFLOP | alone, s | share |")
    print("|---" * 8 + "|")
    columns = ("seconds", "cpu_seconds", "disk_gb", "peak_gb", "tflop", "alone_s")
    for stage, found in figures.items():
        cells = [f"{found[name]:.2f}" if name in found else "" for name in columns]
        share = f"{found['share']:.0%}" if "share" in found else ""
        print(f"| {stage} | {' | '.join(cells)} | {share} |", flush=True)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    found = facts()
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    peer = chosen_peer(has_few_blocks=arguments.blocks is not None)
    files = sorted(folder.rglob("*.safetensors"))
    plain = plain_read(files)
    found["plain_read"] = row(plain, gb=sum(file.stat().st_size for file in files) / GB)
    print(f"a plain read: {found['plain_read']}", flush=True)
    asked = {"model_path": folder, "device": "cpu", "precision": arguments.precision}
    worker = load_worker(start_of(load_settings(asked)))
    for size in arguments.sizes:
        edit = measure_edit(worker, job_of(size, arguments), plain, peer)
        found[str(size)] = edit._asdict()
        show(f"{size} × {size}, guidance {arguments.guidance}", edit.stages)
        largest = sorted(edit.operations.items(), key=lambda each: -each[1])
        print("\nof a step: " + ", ".join(f"{name} {share:.0%}" for name, share in largest))
        if edit.turns:
            seconds, cpu_seconds = map(statistics.median, zip(*edit.turns, strict=True))
            print(
                f"of the peer's step: {seconds:.2f} of its time, {cpu_seconds:.2f} of its CPU time "
                f"(medians of {len(edit.turns)} turns)",
                flush=True,
            )
    residence = worker.residence()
    found["model"], found["arithmetic"] = residence.model, residence.arithmetic
    if residence.placement is not None:
        print(f"\n{residence.model}, {residence.arithmetic}: {residence.placement.reason}")
    if residence.version == "v1.2":
        for phase, wish in ((Phase.THINKING, "thinking"), (Phase.REFLECTING, "reflection")):
            job = job_of(arguments.sizes[0], arguments, **{wish: True})
            found[wish] = measure_reply(worker, job, phase)
            show(f"{wish}, the first reply", found[wish])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--version", choices=FULL, default="v1.1")
    parser.add_argument("--width", choices=("full", "narrow"), default="full")
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--folder", type=Path, help="where the random checkpoint is written")
    arguments = parser.parse_args()

    if arguments.model is not None:
        print(json.dumps(measure(arguments.model, arguments)))
        return
    sizes = FULL[arguments.version]
    if arguments.width == "narrow":
        sizes = narrow(sizes)
    if arguments.blocks is not None:
        sizes = shallow(sizes, *arguments.blocks)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary) / "model"
        write_checkpoint(folder, sizes, LAYOUTS[arguments.version][0])
        print(json.dumps(measure(folder, arguments)))


if __name__ == "__main__":
    main()
