"""What the network is asked for: one picture to edit, or to make from words alone.

Plain values, without torch: the process that asks never imports it. The module knows neither ranges
nor what an interface calls a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:  # a server answers its first requests before numpy is imported
    import numpy as np
    import numpy.typing as npt

Pixels: TypeAlias = "npt.NDArray[np.uint8]"  # (H, W, 3), upright RGB
Mask: TypeAlias = "npt.NDArray[np.uint8]"  # (H, W), 0 where the picture stays as it is

Mode: TypeAlias = Literal["exact", "fast", "turbo"]
"""How much of the work an edit may leave out; exact: none."""

STEPS_PER_PREVIEW: Final = 3
"""At most one preview per this number of steps: making and showing one takes part of a step."""


@dataclass(frozen=True)
class NetworkRequest:
    """One edit as the network sees it; at guidance 1.0 the negative prompt has no effect.

    If there is no image, a picture of `width` × `height` is made from the prompt alone, and
    `size_level` is ignored; otherwise width and height are ignored.
    """

    image: Pixels | None
    prompt: str
    negative_prompt: str | None = ""
    """None: the one that the model was published with for such a request."""
    num_steps: int = 28
    guidance_scale: float = 6.0
    size_level: int = 1024
    seed: int = 0
    loras: Mapping[str, float] | None = None
    """The LoRAs by name and their strengths; None: those that the model was opened with."""
    thinking: bool = False
    """Whether the model first rewrites the prompt; only v1.2 can."""
    reflection: bool = False
    """Whether it judges its edit, tries again and takes the best; only v1.2 can."""
    reflection_rounds: int = 3
    """The maximum number of edits of a reflection."""
    width: int = 0
    height: int = 0
    mode: Mode = "exact"
    mask: Mask | None = None
    """Where the edit is used; None: everywhere. Turbo may spare the rest."""
    draw: int = 0
    """Which noise of the seed's sequence the edit starts from."""
    previews: int = 0
    """The number of steps before the last that are shown; the result does not depend on it."""

    @property
    def preview_steps(self) -> frozenset[int]:
        """The steps whose prediction is shown: evenly spaced, never the last one."""
        most = max(1, self.num_steps // STEPS_PER_PREVIEW)
        number = min(self.previews, most, self.num_steps - 1)
        return frozenset(k * self.num_steps // (number + 1) for k in range(1, number + 1))
