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
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLTextModel,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from bench_residency import drop_from_cache
from gpu.networks import HAS_PEER, peer_network
from random_checkpoint import FULL, LAYOUTS, narrow, shallow, write_checkpoint
from step1x_edit.channel import EditJob, Phase, Progress, Start
from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.blocks import Layout
from step1x_edit.model.transformer import QuotedText, Transformer
from step1x_edit.worker.edits import PipelineWorker
from step1x_edit.worker.process import load_worker

GB: Final = 1e9
PIECE: Final = 16 * 2**20
REPLY_TOKENS: Final = 64
ENOUGH_ROWS: Final = 2048
"""Products with more rows are measured with this number of them."""
PROMPT: Final = "add a sign that says “open” above the door"
STAGES: Final = (
    ("conditioner, picture", Qwen2_5_VisionTransformerPretrainedModel, "forward"),
    ("conditioner, words", Qwen2_5_VLTextModel, "forward"),
    ("encoder", Autoencoder, "encode"),
    ("prologue", Transformer, "prologue"),
    ("step", Transformer, "core"),
    ("decoder", Autoencoder, "decode"),
)


class Cost(NamedTuple):
    """What a stage takes."""

    seconds: float
    cpu_seconds: float
    disk_gb: float = 0.0

    @staticmethod
    def until_now() -> Cost:
        return Cost(time.perf_counter(), time.process_time(), of_process("io", "read_bytes") / GB)

    def since(self, before: Cost) -> Cost:
        return Cost(*(after - earlier for after, earlier in zip(self, before, strict=True)))


def of_process(file: str, name: str) -> int:
    """A number that Linux reports about this process; 0 elsewhere."""
    try:
        lines = Path(f"/proc/self/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def total(costs: Sequence[Cost]) -> Cost:
    return Cost(*(math.fsum(cost[column] for cost in costs) for column in range(3)))


@dataclass
class Lap:
    """One run of a stage: the network, the shapes of its inputs, what it took."""

    network: nn.Module
    shapes: list[tuple[int, ...]]
    cost: Cost
    peak_gb: float
    """Memory of the process, the most until its end."""


@dataclass
class Stopwatch:
    """Measures the networks' methods in whatever code calls them."""

    laps: dict[str, list[Lap]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def running(self) -> Iterator[None]:
        with ExitStack() as stack:
            for stage, owner, method in STAGES:
                original = getattr(owner, method)
                setattr(owner, method, self._timed(stage, original))
                stack.callback(setattr, owner, method, original)
            yield

    def _timed(self, stage: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def timed(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
            before = Cost.until_now()
            result = original(network, *args, **kwargs)
            cost = Cost.until_now().since(before)
            inputs = (*args, *kwargs.values())
            shapes = [tuple(each.shape) for each in inputs if isinstance(each, Tensor)]
            peak = of_process("status", "VmHWM") * 1024 / GB
            self.laps[stage].append(Lap(network, shapes, cost, peak))
            return result

        return timed

    @property
    def passes(self) -> int:
        """Passes of the core per step: one for each prologue."""
        return len(self.laps["prologue"])

    def steps(self) -> list[list[Lap]]:
        """The passes of each step."""
        laps = self.laps["step"]
        return [laps[i : i + self.passes] for i in range(0, len(laps), self.passes)]


# --- what this machine can do ---------------------------------------------------------------------

Shape = tuple[int, ...]
"""Of a product: rows, inputs, outputs. Of a convolution: batch, inputs, size of output; kernel."""


def work_of(stage: str, watch: Stopwatch) -> Counter[Shape]:
    """The products and convolutions of a stage, by running the networks without numbers."""
    laps = watch.laps[stage]
    with torch.device("meta"), torch.inference_mode():
        if stage.startswith("conditioner"):
            return sum((tower_work(lap) for lap in laps), Counter())
        if stage == "encoder":
            return counted(coder := of_same_sizes(laps[0]), lambda: coder.encode(like(laps[0], 0)))
        if stage == "decoder":
            return counted(coder := of_same_sizes(laps[0]), lambda: coder.decode(like(laps[0], 0)))
        passes = zip(laps, watch.laps["prologue"], strict=False)  # of the first step
        return sum((transformer_work(stage, *each) for each in passes), Counter())


def transformer_work(stage: str, lap: Lap, first: Lap) -> Counter[Shape]:
    """`first` is the prologue that belongs to the lap."""
    network = of_same_sizes(first)
    prompt, mask, times = (like(first, i) for i in range(3))
    quoted = QuotedText(prompt, mask) if network.config.has_text_token_mapping else None
    if stage == "prologue":
        return counted(network, lambda: network.prologue(prompt, mask, times, quoted))
    step = network.prologue(prompt, mask, times[:1], quoted)[0]
    img, length = like(lap, 0), prompt.shape[1]
    rope = network.rope(torch.zeros(img.shape[1], 3), length)
    layout = Layout(rope, length, num_wanted=img.shape[1] // 2)
    return counted(network, lambda: network.core(img, step, layout))


def tower_work(lap: Lap) -> Counter[Shape]:
    """All layers of the conditioner's towers have one row per token or patch."""
    rows = math.prod(lap.shapes[0][:-1])
    layers = [each for each in of_same_sizes(lap).modules() if isinstance(each, nn.Linear)]
    return Counter((rows, layer.in_features, layer.out_features) for layer in layers)


def of_same_sizes(lap: Lap) -> Any:
    """A network without numbers."""
    return type(lap.network)(lap.network.config)


def like(lap: Lap, index: int) -> Tensor:
    return torch.empty(lap.shapes[index])


def counted(network: nn.Module, run: Callable[[], object]) -> Counter[Shape]:
    found: Counter[Shape] = Counter()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            rows = inputs[0].numel() // layer.in_features
            found[rows, layer.in_features, layer.out_features] += 1
        elif isinstance(layer, nn.Conv2d):
            found[tuple(inputs[0].shape[:2] + output.shape[2:] + layer.weight.shape)] += 1

    for layer in network.modules():
        layer.register_forward_hook(note)
    run()
    return found


@functools.cache
def fastest_type() -> torch.dtype:
    """The type in which this processor multiplies matrices fastest."""
    taken = {
        dtype: product_cost((1024, 2048, 2048), dtype).cpu_seconds
        for dtype in (torch.float32, torch.bfloat16)
    }
    return min(taken, key=lambda dtype: taken[dtype])


@functools.cache
def product_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """The least that one product or convolution takes."""
    if len(shape) == 3:
        rows, inputs, outputs = shape
        few = min(rows, ENOUGH_ROWS)
        x, weight = torch.ones(few, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
        cost = least(lambda: F.linear(x, weight))
        return Cost(*(value * rows / few for value in cost))
    kernel = torch.ones(shape[4:], dtype=dtype).contiguous(memory_format=torch.channels_last)
    x = torch.ones(shape[:4], dtype=dtype).contiguous(memory_format=torch.channels_last)
    return least(lambda: F.conv2d(x, kernel, padding="same"))


@torch.inference_mode()
def least(act: Callable[[], object], repeat: int = 3) -> Cost:
    costs = []
    for _ in range(repeat):
        before = Cost.until_now()
        act()
        costs.append(Cost.until_now().since(before))
    return Cost(*map(min, zip(*costs, strict=True)))


def alone(work: Counter[Shape]) -> Cost:
    """What products and convolutions take without anything else."""
    costs = [(product_cost(shape, fastest_type()), count) for shape, count in work.items()]
    return total([Cost(*(value * count for value in cost)) for cost, count in costs])


def tflop(work: Counter[Shape]) -> float:
    def of(shape: Shape) -> float:
        if len(shape) == 3:
            return 2 * math.prod(shape)
        return 2 * math.prod(shape[2:4]) * shape[0] * math.prod(shape[4:])

    return sum(of(shape) * count for shape, count in work.items()) / 1e12


def copy_gb_per_s() -> float:
    source = torch.ones(2**30, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return source.nbytes / GB / least(lambda: target.copy_(source)).seconds


def plain_read(files: Sequence[Path]) -> Cost:
    """Read files from the disk, one after the other."""
    buffer = bytearray(PIECE)
    before = Cost.until_now()
    for path in files:
        with path.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return Cost.until_now().since(before)


# --- the peer -------------------------------------------------------------------------------------


class Peer:
    """Diffusers' FLUX network with as many blocks of the same sizes."""

    def __init__(self) -> None:
        self.network: Any = None

    def take_turn(self, watch: Stopwatch) -> tuple[float, float]:
        """Run the passes of our last step; our seconds and CPU seconds, as shares of the peer's."""
        ours, prologues = watch.steps()[-1], watch.laps["prologue"]
        if self.network is None:
            transformer = ours[0].network
            assert isinstance(transformer, Transformer)
            config = transformer.config
            self.network = peer_network(config, torch.device("cpu"), torch.bfloat16)
            self._pass(ours[0], prologues[0])  # one-time costs
        theirs = total([self._pass(*each) for each in zip(ours, prologues, strict=True)])
        cost = total([lap.cost for lap in ours])
        return cost.seconds / theirs.seconds, cost.cpu_seconds / theirs.cpu_seconds

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
        before = Cost.until_now()
        self.network(**inputs)
        return Cost.until_now().since(before)


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


def measure_edit(
    worker: PipelineWorker, job: EditJob, plain: Cost, peer: Peer | None
) -> tuple[Figures, list[tuple[float, float]]]:
    """One whole edit: the stages as rows of figures, and the peer's turns."""
    watch, loading = Stopwatch(), None
    turns: list[tuple[float, float]] = []
    pauses: list[Cost] = []
    started = Cost.until_now()
    with watch.running():
        for event in worker.edit(job, never_stop):
            if not isinstance(event, Progress):
                continue
            if event.phase is Phase.ENCODING and loading is None:
                loading = Cost.until_now().since(started)
            if event.phase is Phase.DENOISING and event.step and peer is not None:
                paused = Cost.until_now()
                turns.append(peer.take_turn(watch))
                pauses.append(Cost.until_now().since(paused))
    whole = Cost.until_now().since(started).since(total(pauses))
    figures: Figures = {}
    if loading is not None and loading.disk_gb:
        share = plain.seconds / loading.seconds
        figures["reading"] = row(loading, alone_s=plain.seconds, share=share)
    for stage, *_ in STAGES:
        if stage == "step":
            costs = [total([lap.cost for lap in step]) for step in watch.steps()]
            cost = Cost(*map(statistics.median, zip(*costs, strict=True)))
        else:
            cost = total([lap.cost for lap in watch.laps[stage]])
        work = work_of(stage, watch)
        products = alone(work).cpu_seconds
        figures[stage] = row(
            cost,
            peak_gb=watch.laps[stage][-1].peak_gb,
            tflop=tflop(work),
            alone_s=products,
            share=products / cost.cpu_seconds,
        )
    peak = of_process("status", "VmHWM") * 1024 / GB
    figures["whole edit"] = row(whole, peak_gb=peak)
    return figures, turns


def measure_reply(worker: PipelineWorker, job: EditJob, phase: Phase) -> Figures:
    """The first reply of a phase, at most 64 tokens of it; then the edit is stopped."""
    watch, moments = Stopwatch(), {}
    with watch.running():
        events = worker.edit(job, never_stop)
        for event in events:
            if isinstance(event, Progress) and event.phase is phase:
                if event.step in moments:  # the next reply
                    break
                moments[event.step] = Cost.until_now()
                if event.step >= REPLY_TOKENS:
                    break
        events.close()
    first, *_, last = (number for number in moments if number)
    cost = moments[last].since(moments[first])
    token = Cost(*(value / (last - first) for value in cost))
    laps = watch.laps["conditioner, words"]
    products = alone(tower_work(laps[-1])).cpu_seconds
    start = moments[first].since(moments[0])
    prompt = Cost(*(all_ - first * one for all_, one in zip(start, token, strict=True)))
    peak = of_process("status", "VmHWM") * 1024 / GB
    return {
        f"{phase.value}, prompt": row(prompt),
        f"{phase.value}, token": row(
            token, peak_gb=peak, alone_s=products, share=products / token.cpu_seconds
        ),
    }


Figures = dict[str, dict[str, float]]


def row(cost: Cost, **more: float) -> dict[str, float]:
    return {name: round(value, 3) for name, value in {**cost._asdict(), **more}.items()}


def show(title: str, figures: Figures) -> None:
    print(f"\n{title}\n")
    print("| stage | s | CPU s | from disk, GB | peak so far, GB | TFLOP | alone, s | share |")
    print("|---" * 8 + "|")
    columns = ("seconds", "cpu_seconds", "disk_gb", "peak_gb", "tflop", "alone_s")
    for stage, found in figures.items():
        cells = [f"{found[name]:.2f}" if name in found else "" for name in columns]
        share = f"{found['share']:.0%}" if "share" in found else ""
        print(f"| {stage} | {' | '.join(cells)} | {share} |", flush=True)


def facts() -> dict[str, Any]:
    """Where and when."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    head = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "has": [
            name for name in ("avx2", "avx512_bf16", "avx512_vnni", "amx_bf16") if name in flags
        ],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": subprocess.run(head, capture_output=True, text=True).stdout.strip(),
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "load": round(os.getloadavg()[0], 1),
    }


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {**facts(), "fastest_type": str(fastest_type())}
    found["copy_gb_per_s"] = round(copy_gb_per_s(), 2)
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    peer = None
    if arguments.blocks is not None and HAS_PEER:
        peer = Peer()
    elif arguments.blocks is not None:
        print("diffusers is not installed, so there is no peer")
    else:
        print("the whole network leaves no room for a peer: add --blocks 2 4 for that")

    files = sorted(folder.rglob("*.safetensors"))
    for file in files:
        drop_from_cache(file)
    plain = plain_read(files)
    found["plain_read"] = row(plain, gb=sum(file.stat().st_size for file in files) / GB)
    print(f"plain read: {found['plain_read']}", flush=True)
    for file in files:
        drop_from_cache(file)
    worker = load_worker(Start(model_path=str(folder), device="cpu", precision=arguments.precision))
    for size in arguments.sizes:
        figures, turns = measure_edit(worker, job_of(size, arguments), plain, peer)
        found[str(size)] = figures
        show(f"{size} × {size}, guidance {arguments.guidance}", figures)
        if turns:
            ratios = [round(statistics.median(each), 3) for each in zip(*turns, strict=True)]
            found[f"{size}, of the peer"] = ratios
            print(
                f"\na step of the peer's: {ratios[0]:.2f} of its time, {ratios[1]:.2f} of its CPU "
                f"time, medians of {len(turns)} turns",
                flush=True,
            )
    residence = worker.residence()
    found["model"], found["precision"] = residence.model, arguments.precision
    if residence.placement is not None:
        print(f"\n{residence.model}: {residence.placement.reason}")
    if residence.version == "v1.2":
        for phase, wish in ((Phase.THINKING, "thinking"), (Phase.REFLECTING, "reflection")):
            job = job_of(arguments.sizes[0], arguments, **{wish: True})
            found[wish] = measure_reply(worker, job, phase)
            show(wish, found[wish])
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
