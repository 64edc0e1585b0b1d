"""Work that an edit does only once. No saving changes the result.

They are always on. Tests and benchmarks turn each off to compare it with the plain path.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Savings:
    """Which work is saved."""

    pad_rows: bool = True
    """One row of padding stands for all of them, which are equal in every layer at every step."""
    all_timesteps: bool = True
    """What depends on timestep and prompt only is computed for all steps in one pass."""
    shared_prefix: bool = True
    """The conditioner reads the picture and the common beginning of both prompts once."""
    last_block: bool = True
    """The last block leaves out the rows that the sampler does not use: text and reference."""
    rope_cache: bool = True
    """Rotary tables are kept for the next picture of the same size."""


ALL: Final = Savings()
NONE: Final = Savings(
    pad_rows=False,
    all_timesteps=False,
    shared_prefix=False,
    last_block=False,
    rope_cache=False,
)
