#!/usr/bin/env bash
# Pillow reads an uncompressed TIFF of 16-bit colour planes as noise, without an error; the same planes with
# deflate are right. It takes 12-bit grey as 16-bit grey, which is nearly black.
#
# Guess: the compression of a TIFF has no effect on its pixels, and a depth that is not supported is refused.
# Exits with 1 if a newer version behaves differently.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==12.3.0 numpy==2.2.6 tifffile==2025.5.10

"$folder/venv/bin/python" - <<'PYTHON'
import io

import numpy
import PIL
import tifffile
from PIL import Image

y, x = numpy.mgrid[0:64, 0:96]
colours = numpy.stack([x * 680, y * 1000, (x + y) * 400]).astype(numpy.uint16)


def error(compression):
    """Mean difference in 8-bit levels between what was written and what Pillow reads."""
    file = io.BytesIO()
    tifffile.imwrite(
        file, colours, photometric="rgb", planarconfig="separate", compression=compression
    )
    read = numpy.asarray(Image.open(file)).astype(float)
    return float(abs(read - (colours >> 8).transpose(1, 2, 0)).mean())


def grey_of_12_bits():
    """The highest value that Pillow reads of a white picture of 12 bits, and the mode it gives."""
    packed = b"\xff" * (64 * 64 * 12 // 8)
    tags = [(256, 64), (257, 64), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 64)]
    tags.append((279, len(packed)))
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little")
        for tag, value in tags
    )
    head = b"II*\0\x08\0\0\0" + len(tags).to_bytes(2, "little")
    image = Image.open(io.BytesIO(head + entries + bytes(4) + packed))
    return int(numpy.asarray(image).max()), image.mode


plain, deflated = error(None), error("zlib")
highest, mode = grey_of_12_bits()
print("Pillow", PIL.__version__)
print(f"planes of 16 bits, deflate: off by {deflated:.1f} levels")
print(f"planes of 16 bits, plain:   off by {plain:.1f} levels")
print(f"white of 12 bits: {highest} in mode {mode}, whose white is 65535")
raise SystemExit(not (deflated < 1 and plain > 20 and (highest, mode) == (4095, "I;16")))
PYTHON
