"""The cost of moving the model: disk → host memory → device and back, and the remaining memory.

    python benchmarks/bench_residency.py [--demo | --gigabytes 1.0 | --full-size] [--device cuda]

The weights are those of the demo checkpoint, or random ones in a temporary file: a transformer of
about n gigabytes, or of the full size of v1.1 (25 GB of disk, of host and of GPU memory). Without a
GPU a copy in host memory replaces it. Reading is bound by the disk, or by memory bandwidth if
the file is in the page cache; copying by the bus. Each is printed beside the result of the simplest
code in the same run. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from step1x_edit.checkpoints.read import DEMO_FOLDER, Wanted, open_checkpoint
from step1x_edit.model.config import V1_1, ConnectorConfig, ModelConfig, TransformerConfig
from step1x_edit.model.latents import image_position_ids
from step1x_edit.model.transformer import Transformer
from step1x_edit.worker.residency import Residency

GB = 1e9


def scaled(gigabytes: float) -> TransformerConfig:
    """Narrower than v1.1, with as many single blocks as the size requires."""
    connector = ConnectorConfig(hidden_size=1024, num_heads=8)
    config = TransformerConfig(
        hidden_size=1536, num_heads=12, depth=1, depth_single=0, connector=connector
    )
    fixed, block = size(config), size(dataclasses.replace(config, depth_single=1)) - size(config)
    number = max(1, round((gigabytes * GB - fixed) / block))
    return dataclasses.replace(config, depth_single=number)


def empty(config: TransformerConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def size(config: TransformerConfig) -> int:
    """Bytes in bfloat16."""
    return 2 * sum(parameter.numel() for parameter in empty(config).parameters())


def write_random(folder: Path, transformer: TransformerConfig) -> None:
    """A checkpoint in the demo's layout: its small parts, and a transformer of random numbers."""
    shutil.copytree(DEMO_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    model = dataclasses.replace(
        ModelConfig.from_json(config["model"]),
        transformer=transformer,
        latent_channels=V1_1.latent_channels,
    )
    config |= {"model": model.to_json(), "recogniser": {"labels": []}}
    (folder / "config.json").write_text(json.dumps(config))
    demo = load_file(DEMO_FOLDER / "model.safetensors")
    tensors = {
        name: tensor for name, tensor in demo.items() if name.startswith(("vae", "conditioner"))
    }
    random = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, parameter in empty(transformer).state_dict().items():
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1000
        count = parameter.numel()
        numbers = random.repeat(-(-count // len(random)))[:count]
        tensors[f"transformer.{name}"] = numbers.view(parameter.shape) / math.sqrt(fan_in)
    save_file(tensors, folder / "model.safetensors")


def seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def drop_from_cache(file: Path) -> bool:
    """Whether the system could be asked to drop the file's pages."""
    if not hasattr(os, "posix_fadvise"):
        return False
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return True


def load_and_copy(file: Path) -> list[Tensor]:
    """A plain loader: the library's tensors, copied out of the file's mapping."""
    return [tensor.clone() for tensor in load_file(file).values()]


def held_gb(device: torch.device) -> float:
    """GPU memory in use as the driver reports it; without a GPU, the process's own memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / GB
    ctypes.CDLL(None).malloc_trim(0)  # do not count the heap of the plain loader
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / GB


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_gb_per_s(device: torch.device, total: float) -> float:
    """The best bandwidth of plain copies of up to 1 GB, from page-locked memory if possible."""
    count = int(min(total, 1.0) * GB)
    source = torch.ones(count, dtype=torch.uint8, pin_memory=device.type == "cuda")
    best = math.inf
    for _ in range(3):
        target = torch.empty(count, dtype=torch.uint8, device=device)  # including its page faults
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
        del target
    return count / GB / best


def step(residency: Residency, device: torch.device) -> float:
    """Seconds of one step of the transformer on a small picture."""
    with residency.on_device() as checkpoint, torch.inference_mode():
        transformer = checkpoint.pipeline.transformer
        config = transformer.config
        dtype = transformer.img_in.weight.dtype
        ids = image_position_ids(16, 16, (1.0, 1.0, 1.0)).to(device)
        img = torch.ones(1, len(ids), config.in_channels, dtype=dtype, device=device)
        embeds = torch.ones(1, 64, config.connector.in_features, dtype=dtype, device=device)
        mask, t = torch.ones(1, 64, device=device), torch.ones(1, device=device)
        synchronize(device)
        started = time.perf_counter()
        velocity = transformer(img, ids, embeds, mask, t)
        synchronize(device)
        taken = time.perf_counter() - started
        assert velocity.isfinite().all()
        return taken


def measure(folder: Path, device: torch.device, repeat: int) -> dict[str, float]:
    file = folder / "model.safetensors"
    file_gb = file.stat().st_size / GB
    figures = {"file_gb": file_gb, "held_before_gb": held_gb(device)}
    wanted = Wanted(dtype=torch.bfloat16)
    opened = open_checkpoint(folder, wanted)
    figures["open_s"] = seconds(partial(open_checkpoint, folder, wanted))
    residency = Residency(lambda: opened, device)

    reads: dict[str, list[float]] = {}
    for _ in range(repeat):  # alternating, because load on a shared machine varies
        for name, load in (("plain", partial(load_and_copy, file)), ("ours", residency.load)):
            if drop_from_cache(file):
                reads.setdefault(f"{name}_cold_gb_per_s", []).append(file_gb / seconds(load))
                residency.release()
            reads.setdefault(f"{name}_warm_gb_per_s", []).append(file_gb / seconds(load))
            residency.release()
    figures |= {name: max(rates) for name, rates in reads.items()}

    residency.load()
    arena_gb = sum(block.size for block in residency.blocks) / GB
    figures["arena_gb"] = arena_gb
    if device.type == "cuda":
        figures["onload_while_locking_s"] = seconds(residency.onload)
        residency.offload()
        locking = [thread for thread in threading.enumerate() if thread.name == "page-lock"]

        def wait() -> None:
            for thread in locking:
                thread.join()

        figures["page_lock_rest_s"] = seconds(wait)
    figures["copy_gb_per_s"] = copy_gb_per_s(device, arena_gb)
    residency.onload()
    step(residency, device)  # one-time costs
    residency.offload()
    onloads, offloads, first, usual = [], [], [], []
    for _ in range(repeat):
        onloads.append(seconds(residency.onload))
        figures["held_on_device_gb"] = held_gb(device)
        first.append(step(residency, device))
        usual += [step(residency, device) for _ in range(3)]
        offloads.append(seconds(residency.offload))
    figures |= {
        "onload_gb_per_s": arena_gb / min(onloads),
        "onload_s": min(onloads),
        "offload_s": statistics.median(offloads),
        "first_step_s": statistics.median(first),
        "usual_step_s": statistics.median(usual),
        "held_after_offload_gb": held_gb(device),
    }
    figures["release_s"] = seconds(residency.release)
    figures["held_after_release_gb"] = held_gb(device)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--demo", action="store_true")
    which.add_argument("--gigabytes", type=float, default=1.0)
    which.add_argument("--full-size", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder for the temporary file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = DEMO_FOLDER
        if not arguments.demo:
            folder = Path(temporary) / "checkpoint"
            full = V1_1.transformer
            write_random(folder, full if arguments.full_size else scaled(arguments.gigabytes))
        figures = measure(folder, device, arguments.repeat)

    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "a stand-in for a GPU"
    print(f"{figures['file_gb']:.2f} GB on {what}, torch {torch.__version__}\n")
    for name, value in figures.items():
        print(f"{name:24} {value:10.4f}")
    print(
        json.dumps(
            {name: round(value, 4) for name, value in figures.items()}
            | {"device": what, "cores": os.cpu_count(), "torch": torch.__version__}
        )
    )


if __name__ == "__main__":
    main()
