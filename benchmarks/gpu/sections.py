"""The limits of the device, the correctness of our path, and its speed beside others.

Each section returns its figures; those it had no time for are named in `left_out`. Figures that the
device cannot provide are omitted, never estimated.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench_savings
from bench_residency import GB, copy_gb_per_s, held_gb
from gpu.bench import (
    Bench,
    Figures,
    attention_kernels,
    best_seconds,
    first_line,
    furthest,
    relative,
    rows,
    smi,
    step_seconds,
)
from gpu.networks import (
    HAS_PEER,
    NUM_STEPS,
    CompiledHelpers,
    PlainNetwork,
    compiled,
    our_network,
    our_pipeline,
    our_states,
    our_velocities,
    peer_steps,
    plain_states,
    plain_velocities,
    quarter,
)
from step1x_edit.model.denoising import Encoded
from step1x_edit.model.pipeline import Plan
from step1x_edit.model.request import Mask, Mode

STRICT = 1e-4
"""The allowed distance of two float32 paths through a shallow network, relative to the norm."""
FLOORS = 2.0
"""The allowed ratio of our error to that of the plain path, both against float32."""


# --- the device -----------------------------------------------------------------------------------


@torch.inference_mode()
def probe(bench: Bench) -> Figures:
    """The limits of the device: nothing below can be faster."""
    device, n = bench.device, bench.scale.matrix
    figures: Figures = {"held_before_gb": held_gb(device)}
    if device.type == "cuda":
        figures |= {
            "driver": smi("driver_version"),
            "memory_gb": torch.cuda.get_device_properties(device).total_memory / GB,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        }
    a, b = (torch.randn(n, n, device=device).to(bench.dtype) for _ in range(2))
    figures["product_tflop_per_s"] = 2 * n**3 / 1e12 / best_seconds(device, lambda: a @ b)
    times: list[float] = []
    until = time.perf_counter() + (5 if device.type == "cuda" else 0)
    while not times or (time.perf_counter() < until and not bench.is_over()):
        times.append(best_seconds(device, lambda: a @ b, repeat=1))
    figures["product_sustained_tflop_per_s"] = 2 * n**3 / 1e12 / statistics.median(times)
    if device.type == "cuda":
        for _ in range(500):  # it keeps computing while the driver is queried
            torch.mm(a, b)
        figures["clock_and_power_under_load"] = smi("clocks.sm,power.draw,temperature.gpu")
    target = torch.empty_like(a)
    copied = best_seconds(device, lambda: target.copy_(a))
    figures["memory_gb_per_s"] = 2 * a.nbytes / GB / copied  # read and written
    figures["host_to_device_gb_per_s"] = copy_gb_per_s(device, 1.0 if n > 64 else 0.001)
    host = torch.empty(a.shape, dtype=a.dtype, pin_memory=device.type == "cuda")
    back = best_seconds(device, lambda: host.copy_(a, non_blocking=True))
    figures["device_to_host_gb_per_s"] = a.nbytes / GB / back
    figures["attention"] = [
        _attention(bench, pixels, kernel)
        for pixels in bench.scale.pictures
        for kernel in (None, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        if device.type == "cuda" or kernel is None
    ]
    return figures


def _attention(bench: Bench, pixels: int, kernel: SDPBackend | None) -> Figures:
    """The joint attention of a block with one kernel; None is torch's own choice."""
    config = bench.scale.model.transformer
    encoded = bench.encoded(pixels)
    length = bench.scale.model.conditioner.text_length + 2 * encoded.reference.shape[1]
    shape = (2, config.num_heads, length, config.head_dim)
    q, k, v = (torch.randn(shape, device=bench.device).to(bench.dtype) for _ in range(3))
    work = 4 * 2 * length**2 * config.hidden_size / 1e12
    told: Figures = {"tokens": length, "kernel": kernel.name if kernel else "torch's choice"}
    try:
        with sdpa_kernel(kernel) if kernel else contextlib.nullcontext():
            taken = best_seconds(bench.device, lambda: F.scaled_dot_product_attention(q, k, v))
    except RuntimeError as error:
        return told | {"failed": first_line(error)}
    return told | {"tflop_per_s": work / taken}


# --- is it the same? ------------------------------------------------------------------------------


@torch.inference_mode()
def correctness(bench: Bench) -> Figures:
    """Whether our path computes the function of the plain one; reported, not raised."""
    model, steps = bench.scale.model, (0, NUM_STEPS // 2, NUM_STEPS - 1)
    encoded = bench.encoded(bench.smallest)
    shallow = replace(model.transformer, depth=1, depth_single=2)
    network = our_network(shallow, bench.device, torch.float32, seed=2)
    strict = furthest(
        our_velocities(network, model, encoded, steps),
        plain_velocities(PlainNetwork(network, torch.float32), model, encoded, steps),
    )
    del network
    plain = plain_velocities(PlainNetwork(bench.reference, bench.dtype), model, encoded, steps)
    bench.exact = plain_velocities(
        PlainNetwork(bench.reference, torch.float32), model, encoded, steps
    )
    bench.floor = furthest(plain, bench.exact)
    found = our_velocities(bench.ours, model, encoded, steps)
    return {
        "pixels": bench.smallest,
        "float32_shallow": strict,
        "float32_shallow_allowed": STRICT,
        "plain_from_float32": bench.floor,
        "between": furthest(found, plain),
        "is_right": strict <= STRICT,
    } | _judged(bench, found, and_also=strict <= STRICT)


def _judged(bench: Bench, found: Sequence[Tensor], and_also: bool = True) -> Figures:
    """The distance of velocities from float32, and whether it is within the tolerance."""
    if bench.floor is None:
        return {"ours_from_float32": "not compared: the section correctness did not run"}
    error = furthest(found, bench.exact)
    return {
        "ours_from_float32": error,
        "allowed": FLOORS * bench.floor,
        "is_right": and_also and error <= FLOORS * bench.floor,
    }


def drift(bench: Bench, name: str) -> Figures:
    """The distance of the latents from the plain path's after all 28 steps."""
    if name not in bench.finals or "baseline" not in bench.finals:
        return {}
    return {"latents_from_baseline": relative(bench.finals[name], bench.finals["baseline"])}


# --- how fast? ------------------------------------------------------------------------------------


def plain_loop(bench: Bench, network: PlainNetwork, encoded: Encoded) -> Iterator[Any]:
    model = bench.scale.model
    start = our_pipeline(bench.reference, model).start(encoded, seed=0)
    return plain_states(network, model, encoded, start)


def our_loop(bench: Bench, encoded: Encoded) -> Iterator[Any]:
    return our_states(our_pipeline(bench.ours, bench.scale.model), encoded)


def peer_loop(bench: Bench, encoded: Encoded) -> Iterator[Any]:
    return peer_steps(bench.peer, bench.scale.model, encoded)


def baseline(bench: Bench) -> Figures:
    """The plain path with the kernel that the reference uses, eager."""
    network = PlainNetwork(bench.reference, bench.dtype)
    with attention_kernels(SDPBackend.FLASH_ATTENTION):
        return rows(bench, partial(plain_loop, bench, network), "baseline")


def baseline_helpers(bench: Bench) -> Figures:
    """The same with the three small functions compiled that the reference compiles."""
    torch.compiler.reset()
    network = PlainNetwork(bench.reference, bench.dtype, CompiledHelpers(bench.scale.backend))
    with attention_kernels(SDPBackend.FLASH_ATTENTION):
        return rows(bench, partial(plain_loop, bench, network), most=8)


def exact(bench: Bench) -> Figures:
    """Our path as it is, with torch's choice of kernels."""
    return rows(bench, partial(our_loop, bench), "exact") | drift(bench, "exact")


@torch.inference_mode()
def savings(bench: Bench) -> Figures:
    """How much longer the loop takes without one of the exact savings, and without all of them.

    Alternating, so that drift affects all equally. The savings in reading the prompts
    are not part of the loop.
    """
    model, encoded = bench.scale.model, bench.encoded(bench.smallest)
    seconds: dict[str, list[float]] = {}
    for _ in range(3):
        for name, spared in bench_savings.WITHOUT.items():
            if name == "shared_prefix":
                continue
            steps = our_states(our_pipeline(bench.ours, model, spared), encoded)
            taken, _ = step_seconds(bench, steps, 5)
            if len(taken) > 1:
                loop = taken[0] + (NUM_STEPS - 1) * statistics.median(taken[1:])
                seconds.setdefault(name, []).append(loop)
    best = {name: min(each) for name, each in seconds.items()}
    figures: Figures = {f"without_{name}_s": value for name, value in best.items()}
    figures |= {f"without_{name}_ratio": best[name] / best["nothing"] for name in best}
    left_out = [name for name, each in seconds.items() if len(each) < 3]
    return {"pixels": bench.smallest} | figures | ({"left_out": left_out} if left_out else {})


@torch.inference_mode()
def turbo(bench: Bench) -> Figures:
    """The whole loop in each mode, and in turbo with a quarter of the picture to edit.

    The steps that run are those that others published for v1.1; the weights here are random, so
    the pictures say nothing.
    """
    pipeline, plan = our_pipeline(bench.ours, bench.scale.model), Plan(keepable=2**40)
    loops: list[Figures] = []
    left_out = []
    for pixels in (bench.smallest, max(bench.scale.pictures)):
        encoded, exact_s = bench.encoded(pixels), 0.0
        ways: list[tuple[str, Mode, Mask | None]] = [(mode, mode, None) for mode in get_args(Mode)]
        ways.append(("turbo, 25 % edited", "turbo", quarter(pixels, pixels)))
        for name, mode, mask in ways:
            states = our_states(pipeline, encoded, plan, mode, mask)
            taken, last = step_seconds(bench, states, NUM_STEPS)
            if last is None or len(taken) < NUM_STEPS:
                left_out.append(f"{name} at {pixels}")
                continue
            exact_s = exact_s or sum(taken)
            loops.append(
                {
                    "pixels": pixels,
                    "mode": name,
                    "evaluations": last.evaluations,
                    "loop_s": sum(taken),
                    "of_exact": sum(taken) / exact_s,
                }
            )
    return {"loops": loops} | ({"left_out": left_out} if left_out else {})


def exact_flash(bench: Bench) -> Figures:
    """Ours with the kernel of the baseline: the remaining gain is not due to the kernel."""
    with attention_kernels(SDPBackend.FLASH_ATTENTION):
        return rows(bench, partial(our_loop, bench), most=8)


def exact_cudnn(bench: Bench) -> Figures:
    """Ours with cuDNN's kernel, if available."""
    with attention_kernels(SDPBackend.CUDNN_ATTENTION):
        return rows(bench, partial(our_loop, bench), most=8)


def exact_compiled(bench: Bench) -> Figures:
    """Our path with its blocks compiled."""
    blocks = [*bench.ours.double_blocks, *bench.ours.single_blocks]
    encoded = bench.encoded(bench.smallest)
    with compiled(blocks, bench.scale.backend), torch.inference_mode():
        counters.clear()
        started = time.perf_counter()
        found = our_velocities(
            bench.ours, bench.scale.model, encoded, (0, NUM_STEPS // 2, NUM_STEPS - 1)
        )
        figures: Figures = {"first_run_s": time.perf_counter() - started}
        figures |= _judged(bench, found)
        figures |= rows(bench, partial(our_loop, bench), "exact_compiled")
        figures["graphs"] = counters["stats"]["unique_graphs"]
    return figures | drift(bench, "exact_compiled")


def peer(bench: Bench) -> Figures:
    """diffusers' FLUX at the same lengths and batch, eager, unmodified."""
    return rows(bench, partial(peer_loop, bench), most=8)


def peer_compiled(bench: Bench) -> Figures:
    blocks = [*bench.peer.transformer_blocks, *bench.peer.single_transformer_blocks]
    with compiled(blocks, bench.scale.backend):
        return rows(bench, partial(peer_loop, bench), most=8)


def again(bench: Bench) -> Figures:
    """Baseline, ours and peer again, to show drift of the machine."""
    network = PlainNetwork(bench.reference, bench.dtype)
    with attention_kernels(SDPBackend.FLASH_ATTENTION):
        figures: Figures = {"baseline": rows(bench, partial(plain_loop, bench, network), most=8)}
    figures["exact"] = rows(bench, partial(our_loop, bench), most=8)
    if HAS_PEER:
        figures["peer"] = rows(bench, partial(peer_loop, bench), most=8)
    return figures
