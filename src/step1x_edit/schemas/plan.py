"""The plan of a loaded model, as status answers show it.

The worker sends it as well, so this module does not import pydantic, which would slow the worker's
start. Pydantic reads the fields, and validates and describes answers by them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class PlanStatus:
    """How the loaded model is placed on device and host, and its memory in GB."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    resident_share: float = field(
        metadata={"description": "Share of the denoising core that stays on the device, 0 to 1"}
    )
    precision: str = field(metadata={"description": "The number format of the weights"})
    streaming: bool = field(
        metadata={"description": "Whether blocks are streamed through the device"}
    )
    slots: int = field(metadata={"description": "The number of slots for streamed blocks"})
    joint_branches: bool = field(
        metadata={
            "description": "Whether prompt and negative prompt run together, if memory allows"
        }
    )
    reason: str = field(metadata={"description": "The plan in words"})
    predicted_peak_gb: float | None = field(
        default=None,
        metadata={"description": "Estimated device memory of an edit at size level 1024"},
    )
    measured_peak_gb: float | None = field(
        default=None,
        metadata={
            "description": "Peak of the last or the running edit: device memory, or without "
            "a device the host memory of the whole worker process"
        },
    )
    host_gb: float | None = field(
        default=None, metadata={"description": "Host memory that holds the weights"}
    )
