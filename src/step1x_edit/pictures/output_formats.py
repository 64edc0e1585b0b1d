"""The formats that pictures are written in, by suffix.

A server needs them before the first picture, so this module imports neither numpy nor Pillow. The
encoding itself is in `images`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MAX_PROFILE_BYTES: Final = 16 * 2**20  # the limit of JPEG; press profiles have 3 MB


@dataclass(frozen=True)
class OutputFormat:
    """How a picture is written; every option is fixed so that equal pixels give equal bytes."""

    name: str
    media_type: str
    carries_alpha: bool
    max_side: int = 65_500
    options: Mapping[str, Any] = field(default_factory=dict)
    max_profile_bytes: int = MAX_PROFILE_BYTES
    """A picture with a longer profile is converted to sRGB."""


PNG: Final = OutputFormat(
    "PNG",
    "image/png",
    carries_alpha=True,
    options={"compress_level": 6},
    max_profile_bytes=2**20,  # the limit of PNG decoders
)
JPEG: Final = OutputFormat(
    "JPEG", "image/jpeg", carries_alpha=False, options={"quality": 95, "subsampling": 0}
)
# Lossy WebP halves colour resolution in both directions: the format has no other mode.
WEBP: Final = OutputFormat(
    "WEBP",
    "image/webp",
    carries_alpha=True,
    max_side=16_383,
    options={"quality": 95, "method": 4},
)
AVIF: Final = OutputFormat(
    "AVIF",
    "image/avif",
    carries_alpha=True,
    options={"quality": 90, "speed": 8, "max_threads": 1, "subsampling": "4:4:4"},
)
# Uncompressed: LZW hardly shrinks a photograph, and makes Pillow drop the photographic EXIF.
TIFF: Final = OutputFormat("TIFF", "image/tiff", carries_alpha=True)
BMP: Final = OutputFormat("BMP", "image/bmp", carries_alpha=False, max_profile_bytes=0)

OUTPUT_FORMATS: Final[Mapping[str, OutputFormat]] = {
    ".png": PNG,
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".webp": WEBP,
    ".avif": AVIF,
    ".tiff": TIFF,
    ".tif": TIFF,
    ".bmp": BMP,
}
"""The output formats, by suffix in lower case."""
