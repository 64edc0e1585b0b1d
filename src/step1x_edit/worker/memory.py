"""What a worker does when memory runs out, on the host or on the device."""

from __future__ import annotations

import gc
import sys


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
