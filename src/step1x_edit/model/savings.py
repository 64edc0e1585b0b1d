"""Work that an edit does not do twice. No saving changes what is computed.

They are always on. That each can be turned off is for tests and benchmarks, which hold it against
the plain path beside it.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Savings:
    """Which work is spared."""

    pad_rows: bool = True
    """One row of padding stands for all: they are equal in every layer, at every step."""
    all_timesteps: bool = True
    """What depends on timestep and prompt only is computed for all steps in one pass."""
    shared_prefix: bool = True
    """The conditioner looks once at the picture and at what both prompts begin with."""
    last_block: bool = True
    """The last block leaves out what the sampler does not use: text and reference."""
    rope_cache: bool = True
    """Tables of rotations stay for the next picture of the same size."""


ALL: Final = Savings()
NONE: Final = Savings(
    pad_rows=False,
    all_timesteps=False,
    shared_prefix=False,
    last_block=False,
    rope_cache=False,
)
