"""The least memory of an edit and its cost; and the model's way to the device."""

from __future__ import annotations

import statistics
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import bench_residency
from bench_residency import GB, held_gb
from gpu.bench import Bench, Figures, first_line, peak_gb, relative, start_peak, step_seconds
from gpu.networks import our_states
from step1x_edit.checkpoints.arena import Block, Weight
from step1x_edit.checkpoints.memory_plan import MemoryPlan, everything, fitting, with_share
from step1x_edit.checkpoints.read import Checkpoint, OpenedCheckpoint, Wanted, open_checkpoint
from step1x_edit.model.config import ModelConfig
from step1x_edit.model.pipeline import EditPipeline, Plan
from step1x_edit.model.transformer import Transformer
from step1x_edit.worker.memory import is_out_of_memory
from step1x_edit.worker.residency import Residency


class Cap:
    """Chooses the memory plan as on a GPU with n gigabytes; None is all of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gb: float | None = None
        self.most_of_core: float | None = None
        self.tried = 1.0
        """The share of the core that the last plan kept resident."""
        # Memory that the driver uses for the process itself, not for our blocks.
        self.taken = 0
        if device.type == "cuda":
            free, self.total = torch.cuda.mem_get_info(device)
            self.taken = self.total - free - torch.cuda.memory_reserved(device)

    def plan(self, blocks: Sequence[Block]) -> MemoryPlan:
        if self.most_of_core is not None:
            plan = with_share(blocks, self.most_of_core)
        elif self.gb is None:
            plan = everything(blocks)
        else:
            plan = fitting(blocks, int(self.gb * GB) - self.taken)
        self.tried = plan.core_share
        return plan

    def set(self, gb: float | None) -> None:
        self.gb, self.most_of_core = gb, None
        if self.device.type == "cuda":
            share = 1.0 if gb is None else (gb * GB - self.taken) / self.total
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), self.device)


def opened_from(network: Transformer, model: ModelConfig) -> OpenedCheckpoint:
    """A checkpoint in host memory with these weights; the parts around it are the demo's."""
    demo = open_checkpoint(wanted=Wanted(dtype=network.img_in.weight.dtype))
    empty = bench_residency.empty(network.config)
    weights = [each for each in demo.weights if not each.name.startswith(("transformer", "recog"))]
    for name, tensor in network.state_dict().items():
        path, _, attribute = name.rpartition(".")
        weights.append(
            Weight(
                f"transformer.{name}",
                empty.get_submodule(path),
                attribute,
                tuple(tensor.shape),
                tensor.dtype,
                tensor.cpu(),
            )
        )
    parts = demo.checkpoint.pipeline
    pipeline = EditPipeline(empty.eval(), parts.vae, parts.conditioner, model)
    return OpenedCheckpoint(Checkpoint("random", model.version, pipeline), tuple(weights))


def streaming(bench: Bench) -> Figures:
    """The same edit under caps: its cost, and a check that the numbers stay the same."""
    device = bench.device
    opened = opened_from(bench.ours, bench.scale.model)
    bench.drop("ours", "reference", "peer")
    cap = Cap(device)
    residency = Residency(lambda: opened, device, plan=cap.plan)
    # Memory left there by others would be counted against the caps.
    figures: Figures = {"left_by_others_gb": start_peak(device) / GB}
    figures["load_s"] = bench_residency.seconds(residency.load)
    for thread in threading.enumerate():
        if thread.name == "page-lock":
            figures["page_lock_rest_s"] = bench_residency.seconds(thread.join)
    figures["arena_gb"] = sum(block.size for block in residency.blocks) / GB
    figures["rows"], figures["left_out"] = [], []
    expected: dict[tuple[int, bool], Tensor] = {}
    try:
        for gb in (None, *bench.scale.caps_gb):
            if bench.is_over():
                figures["left_out"].append(gb)
                continue
            cap.set(gb)
            figures["rows"].append(capped(bench, residency, cap, expected))
    finally:
        cap.set(None)
        residency.release()
    figures["is_right"] = all(
        row["is_right"] for row in figures["rows"] if row.get("is_right") is not None
    )
    return figures


def capped(
    bench: Bench, residency: Residency, cap: Cap, expected: dict[tuple[int, bool], Tensor]
) -> Figures:
    """One cap; if memory runs out, a quarter of the core leaves the device, as in the product."""
    row: Figures = {"cap_gb": cap.gb, "out_of_memory": 0}
    while True:
        try:
            return row | _onload_and_run(bench, residency, expected)
        except RuntimeError as error:
            failure = None if is_out_of_memory(error) else first_line(error)
        # Only now, because the error keeps the tensors of the computation alive.
        residency.offload()
        if failure or cap.tried == 0.0:
            return row | {"failed": failure or "out of memory with no block resident"}
        row["out_of_memory"] += 1
        cap.most_of_core = max(0.0, cap.tried - 0.25)


@torch.inference_mode()
def _onload_and_run(
    bench: Bench, residency: Residency, expected: dict[tuple[int, bool], Tensor]
) -> Figures:
    device = bench.device
    before = start_peak(device)
    row: Figures = {"onload_s": bench_residency.seconds(residency.onload)}
    assert residency.plan is not None
    plan = residency.plan
    row |= {
        "core_share": plan.core_share,
        "slots": plan.num_slots,
        "planned_peak_gb": plan.peak / GB,
    }
    is_right = []
    pictures = (min(bench.scale.pictures), max(bench.scale.pictures))
    # Without a cap both ways, so that each capped run can be compared with the same way.
    is_first = not expected
    ways = (False, True) if is_first else (plan.has_joint_branches,)
    with residency.on_device() as checkpoint:
        for pixels in pictures:
            encoded = bench.encoded(pixels)
            for is_joint in ways:
                states = our_states(checkpoint.pipeline, encoded, Plan(has_joint_branches=is_joint))
                taken, last = step_seconds(bench, states, 4)
                states.close()
                way = "joint" if is_joint else "in turn"
                if len(taken) > 1:
                    row[f"step_ms_{pixels}"] = 1000 * statistics.median(taken[1:])
                    row[f"step_ms_{pixels}_{way}"] = row[f"step_ms_{pixels}"]
                if len(taken) < 4 or last is None:
                    continue
                latents = last.latents.cpu()
                if is_first:
                    expected[pixels, is_joint] = latents
                elif (pixels, is_joint) in expected:
                    is_right.append(torch.equal(latents, expected[pixels, is_joint]))
                    row[f"difference_{pixels}"] = relative(latents, expected[pixels, is_joint])
    row |= peak_gb(device, before)
    row["offload_s"] = bench_residency.seconds(residency.offload)
    row["held_after_offload_gb"] = held_gb(device)
    row["is_right"] = all(is_right) if is_right else None  # None: nothing to compare with
    return row


def residency(bench: Bench) -> Figures:
    """A file of random weights from disk to the device and back."""
    bench.drop("ours", "reference", "peer")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        bench_residency.write_random(folder, bench.scale.file_transformer)
        figures: Figures = dict(bench_residency.measure(folder, bench.device, repeat=1))
    figures["onload_share_of_copy"] = figures["onload_gb_per_s"] / figures["copy_gb_per_s"]
    return figures
