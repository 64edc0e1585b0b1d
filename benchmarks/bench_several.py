"""One edit in several processes: measured on a CPU, and predicted for GPUs.

    python benchmarks/bench_several.py [--sizes 512] [--steps 10] [--turns 5]
    python benchmarks/bench_several.py --predict

The first compares one process with two threads and two processes with one thread each, on the
demo, in turns in one run. Both are bound by matrix products; two processes read all weights twice.

The second measures nothing. It runs the published transformer without numbers, counts the
operations of a step and the bytes that the processes of an edit exchange, and divides them by rates
that are given. Only the loop of 28 steps is predicted. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from build import commit
from markdown_tables import table_of
from step1x_edit.channel import EditJob, Painted, Phase, Progress, Start
from step1x_edit.engine.worker_process import WorkerProcess
from step1x_edit.model.blocks import Layout
from step1x_edit.model.config import V1_1
from step1x_edit.model.team import Cut, Team, parts_of
from step1x_edit.model.transformer import Transformer

THREADS = 2
PROMPT_ROWS = 353
"""Text and one row of padding, of 640: a picture and a prompt of a dozen words."""

RATES = {"product_tflop_per_s": 650.0, "memory_tb_per_s": 2.5, "exchange_latency_us": 20.0}
"""Of an H100, assumed: what its matrix units sustain, and its memory for copies."""
LINKS = {"NVLink": 300.0, "PCIe 5": 50.0}
"""GB/s in each direction, assumed: two thirds and four fifths of what they are rated at."""
NUMBERS = 1, 2, 4
NUM_STEPS = 28


# --- measured -------------------------------------------------------------------------------------


def a_worker(number: int, folder: str) -> WorkerProcess:
    start = Start(data_dir=folder, device="cpu", gpus_per_edit=number, log_level="ERROR")
    return WorkerProcess(start, lambda: None)


def times_of(worker: WorkerProcess, job: EditJob) -> tuple[float, float]:
    """Seconds of the edit, and of a step after the first."""
    began, marks = time.perf_counter(), []
    worker.send(job)
    while True:
        report = worker.receive(600.0)
        match report and report.event:
            case Progress(phase=Phase.DENOISING):
                marks.append(time.perf_counter())
            case Painted():
                return time.perf_counter() - began, (marks[-1] - marks[0]) / (len(marks) - 1)
            case Progress():
                pass
            case other:
                raise RuntimeError(f"no picture: {other}")


def measured(sizes: Sequence[int], steps: int, turns: int) -> list[dict[str, Any]]:
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        workers = [a_worker(number, folder) for number in (1, 2)]
        for size in sizes:
            words = "change to night scene"
            job = EditJob(image, words, num_steps=steps, size_level=size, number=1)
            found: list[list[tuple[float, float]]] = [[], []]
            for turn in range(turns + 1):
                for worker, its in zip(workers, found, strict=True):
                    taken = times_of(worker, job)
                    if turn:  # the first prepares
                        its.append(taken)
            for what, index in (("the edit", 0), ("a step", 1)):
                one, two = ([taken[index] for taken in its] for its in found)
                ratios = [b / a for a, b in zip(one, two, strict=True)]
                rows.append(
                    {
                        "size": size,
                        "seconds of": what,
                        "1 process": statistics.median(one),
                        "2 processes": statistics.median(two),
                        "ratio, median": statistics.median(ratios),
                        "least": min(ratios),
                        "most": max(ratios),
                    }
                )
        for worker in workers:
            worker.stop(5.0)
    return rows


# --- predicted ------------------------------------------------------------------------------------


class CountingCut(Cut):
    """Exchanges nothing, and counts what it would."""

    sent = 0
    exchanges = 0
    copied = 0

    def _exchange(self, sent: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        mine = self._team.rank % self._team.num_parts
        self.sent += sum(each.nbytes for index, each in enumerate(sent) if index != mine)
        # Each tensor is stacked or ordered, joined, received and ordered: read and written.
        self.copied += 2 * 3 * sum(each.nbytes for each in sent)
        self.exchanges += 1
        return [sent[0].new_empty(*shape) for shape in shapes]


@torch.inference_mode()
def counted(number: int, pixels: int) -> dict[str, float]:
    """What the busiest of so many processes does in a step with two prompts."""
    config, tokens = V1_1.transformer, (pixels // 16) ** 2
    parts = parts_of(number)
    team = Team(num_branches=number // parts, num_parts=parts)
    prompts = 2 // team.num_branches
    with torch.device("meta"):
        network = Transformer(config).bfloat16()
        embeds = torch.empty(prompts, PROMPT_ROWS, config.connector.in_features).bfloat16()
        mask, times = torch.empty(prompts, PROMPT_ROWS), torch.empty(1)
        step = network.prologue(embeds, mask, times)[0]
        latents = torch.empty(prompts, tokens, config.in_channels).bfloat16()
        rope = network.rope(torch.empty(2 * tokens, 3), PROMPT_ROWS)
        streams = [PROMPT_ROWS, tokens, tokens]
        cut = CountingCut(team, streams, torch.device("meta"))
        ropes = [team.rows(each, -3) for each in torch.split(rope, streams, -3)]
        pads = V1_1.conditioner.text_length - PROMPT_ROWS
        mine = team.rows(latents)
        layout = Layout(torch.cat(ropes, -3), PROMPT_ROWS, pads, mine.shape[1])
        if parts > 1:
            layout = layout._replace(cut=cut)
        step = type(step)(team.rows(step.txt), step.double, step.single, step.final)
        with FlopCounterMode(display=False) as counter:
            velocity = network.core(torch.cat([mine, mine], dim=1), step, layout)
    # The velocity in float32, from each process to each other one, and two numbers.
    joined = 0 if number == 1 else 4 * velocity.numel() * (number - 1)
    return {
        "tflop": counter.get_total_flops() / 1e12,
        "sent_mb": (cut.sent + joined) / 1e6,
        "copied_mb": cut.copied / 1e6,
        "exchanges": cut.exchanges + (0 if number == 1 else 3),
    }


def predicted(sizes: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for pixels in sizes:
        for number in NUMBERS:
            work = counted(number, pixels)
            row: dict[str, Any] = {"size": pixels, "GPUs": number} | work
            computing = work["tflop"] / RATES["product_tflop_per_s"]
            copying = work["copied_mb"] / RATES["memory_tb_per_s"] / 1e6
            waiting = work["exchanges"] * RATES["exchange_latency_us"] / 1e6
            for link, rate in LINKS.items():
                step = computing + copying + waiting + work["sent_mb"] / rate / 1e3
                row[f"a step, ms, {link}"] = 1000 * step
                row[f"{NUM_STEPS} steps, s, {link}"] = NUM_STEPS * step
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predict", action="store_true", help="predict for GPUs")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    find: Callable[[], list[dict[str, Any]]]
    if arguments.predict:
        find = partial(predicted, arguments.sizes or [512, 1024])
    else:
        find = partial(measured, arguments.sizes or [512], arguments.steps, arguments.turns)
    rows = find()
    print(*table_of(rows), "", sep="\n")
    facts = {"commit": commit(), "torch": torch.__version__, "cores": os.cpu_count()}
    print(json.dumps(facts | {"rates": RATES | LINKS if arguments.predict else None, "rows": rows}))


if __name__ == "__main__":
    main()
