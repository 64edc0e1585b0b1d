"""The plan of a loaded model, as status answers show it.

The worker sends it as well, so this module does not import pydantic, which would slow the worker's
start. Pydantic reads the fields, and validates and describes answers by them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class PlanStatus:
    """How the loaded model is spread over device and host, and what that needs; memory in GiB."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    resident_share: float = field(
        metadata={"description": "Share of the denoising core that stays on the device, 0 to 1"}
    )
    precision: str = field(metadata={"description": "Number format of the weights"})
    streaming: bool = field(metadata={"description": "Whether blocks are streamed to the device"})
    slots: int = field(metadata={"description": "Number of slots through which they are streamed"})
    joint_branches: bool = field(
        metadata={
            "description": "Whether prompt and negative prompt run together, if memory allows"
        }
    )
    reason: str = field(metadata={"description": "The plan in words"})
    predicted_peak_gb: float | None = field(
        default=None,
        metadata={
            "description": "What an edit at size level 1024 is expected to need on the device"
        },
    )
    measured_peak_gb: float | None = field(
        default=None,
        metadata={
            "description": "Peak memory of the running edit, or of the last one: of the device, or "
            "without a device of the whole worker process on the host"
        },
    )
    host_gb: float | None = field(
        default=None, metadata={"description": "Host memory that holds the weights"}
    )
