"""An edit on several GPUs, one process for each: the numbers of one, and the time of a step.

Each process makes the same random network. Without CUDA two processes on the CPU stand in.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.bench import FULL, SMALL, Bench, Figures, relative, rows, step_seconds
from gpu.networks import our_pipeline, our_states
from step1x_edit.model.pipeline import EditPipeline, Plan, alone
from step1x_edit.model.team import parts_of
from step1x_edit.worker.group import Seat

NUMBERS = 2, 4
STEPS = 4
"""Of these the latents are compared."""
LIMIT_S = 240


def several(bench: Bench) -> Figures:
    """Run as many processes as there are GPUs, and then half as many."""
    is_cuda = bench.device.type == "cuda"
    found = torch.cuda.device_count() if is_cuda else NUMBERS[0]
    if found < NUMBERS[0]:
        return {"status": "not run: one GPU"}
    bench.drop("ours", "reference", "peer")
    scale = "tiny" if bench.scale is SMALL else "full"
    each = [group(number, bench.device.type, scale) for number in NUMBERS if number <= found]
    # Parts of a branch run other sizes of products, which round differently.
    is_right = all(row["is_equal"] for row in each if parts_of(row["gpus"]) == 1)
    return {"groups": each, "is_right": is_right}


def group(number: int, kind: str, scale: str) -> Figures:
    """The figures of the first of so many processes."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = str(listener.getsockname()[1])
    processes = []
    for rank in range(number):
        words = [str(rank), str(number), port, str(listener.fileno()), kind, scale]
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, *words],
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                pass_fds=[] if rank else [listener.fileno()],
                text=True,
            )
        )
    listener.close()
    try:
        said, _ = processes[0].communicate(timeout=LIMIT_S)
        figures: Figures = json.loads(said.splitlines()[-1])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {"gpus": number} | figures


@torch.inference_mode()
def last_latents(bench: Bench, pipeline: EditPipeline) -> Tensor:
    encoded = bench.encoded(bench.smallest)
    states = our_states(pipeline, encoded, Plan(has_joint_branches=False))
    _, last = step_seconds(bench, states, STEPS)
    assert last is not None
    return last.latents


def main(rank: int, number: int, port: int, listener: int, kind: str, scale: str) -> None:
    """One process of a group."""
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if scale == "tiny":
        torch.set_num_threads(1)
    bench = Bench(SMALL if scale == "tiny" else FULL, device)
    pipeline = our_pipeline(bench.ours, bench.scale.model)
    seat = Seat(rank, number, str(device), port, None if rank else listener)

    def team_for(*_: Any) -> Any:
        return seat.team(2)

    expected = None if rank else last_latents(bench, pipeline)
    pipeline.team_for = team_for
    found = last_latents(bench, pipeline)
    figures = rows(bench, lambda encoded: our_states(pipeline, encoded))
    pipeline.team_for = alone
    if expected is not None:
        distance = relative(found, expected)
        print(json.dumps({"is_equal": distance == 0, "distance": distance} | figures))


if __name__ == "__main__":
    rank, number, port, listener = map(int, sys.argv[1:5])
    main(rank, number, port, listener, *sys.argv[5:])
