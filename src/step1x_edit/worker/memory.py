"""How much memory a worker may use beside the model, and what it does when memory runs out."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

from step1x_edit.checkpoints.memory_plan import MemoryPlan, keepable
from step1x_edit.engine import host_memory

if TYPE_CHECKING:
    import torch


def keepable_bytes(device: torch.device, plan: MemoryPlan | None) -> int:
    """Bytes that an edit may keep from step to step where it computes; 0 if that is unknown."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        memory = host_memory.measure()
        free = 0 if memory is None else memory.available
    return keepable(free, plan)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on the device."""
    return (
        isinstance(error, MemoryError)
        or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
        or "DefaultCPUAllocator" in str(error)  # torch raises a plain RuntimeError for host memory
    )


def free_memory() -> None:
    """Give back what nothing refers to."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()  # does nothing without CUDA
