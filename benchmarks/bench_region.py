"""A masked part edited in full against the same part of the whole picture, by the demo.

    python benchmarks/bench_region.py [--size-level 512] [--steps 10] [--pictures 20] [--keep DIR]

The pictures are photographs of installed packages and generated ones of 1536 pixels, with a mask
of an ellipse. Each edit is made twice, with region `whole` and `full`, by a service with its
worker, and compared with its classical form inside the mask, where the soft edge has ended: the
PSNR, and that of the detail alone. Bound by the network. Prints a table; the last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from bench_demo import PROMPTS, psnr
from build import commit
from demo_data import (
    EDITS,
    HELD_OUT_PHOTOS,
    TRAINING_PHOTOS,
    Picture,
    dead_leaves,
    landscape,
    lettering,
    load_photo,
)
from markdown_tables import table_of
from step1x_edit.pictures.images import FEATHER, MIN_FEATHER, Pixels
from step1x_edit.service.service import EditService
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings

ASKED = ("bw", "sepia", "night", "warm", "cool", "vivid", "autumn", "pink", "invert", "fog")
"""Edits of single pixels: their classical form is the same at every size of the network."""
SIDE = 1536
BROAD = 8  # pixels
SHARES = (0.15, 0.25, 0.4)
"""Of the sides of a picture: those of the ellipse."""


def pictures() -> Iterator[tuple[str, Picture]]:
    """Twenty: photographs that the demo has not learned from, seven that it has, generated ones."""
    photos = {
        name: load_photo(*place) for name, place in (HELD_OUT_PHOTOS | TRAINING_PHOTOS).items()
    }
    yield from photos.items()
    rng = np.random.default_rng(20261130)
    for number in range(4):
        yield f"leaves {number + 1}", dead_leaves(rng, SIDE, list(photos.values()))
    for number in range(3):
        yield f"landscape {number + 1}", landscape(rng, SIDE)
        yield f"lettering {number + 1}", lettering(rng, SIDE)


def ellipse(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """A mask somewhere in a picture."""
    share = rng.choice(SHARES)
    across, down = share * width, share * height
    left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse([left, top, left + across, top + down], fill=255)
    return np.asarray(mask)


def fine(wrong: Picture, inside: NDArray[np.bool_]) -> Picture:
    """What is wrong without what is wrong evenly, within about 8 pixels: the colour of the edit."""
    count = ndimage.gaussian_filter(inside.astype(np.float32), BROAD)[..., None] + 1e-6
    even = ndimage.gaussian_filter(wrong * inside[..., None], (BROAD, BROAD, 0)) / count
    return np.asarray(wrong - even, np.float32)


def png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


async def compare(
    service: EditService,
    name: str,
    picture: Picture,
    edit: str,
    mask: Pixels,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The figures of one picture."""
    before = (picture * 255 + 0.5).clip(0, 255).astype(np.uint8)
    wanted = EDITS[edit](before.astype(np.float32) / 255)
    soft = max(round(FEATHER * max(mask.shape)), MIN_FEATHER) + 3
    inside = ndimage.distance_transform_edt(mask) > soft
    row: dict[str, Any] = {
        "picture": name,
        "size": f"{mask.shape[1]}×{mask.shape[0]}",
        "edit": edit,
        "mask %": float(100 * (mask > 0).mean()),
    }
    for region in ("whole", "full"):
        asked = {
            "prompt": PROMPTS[edit],
            "region": region,
            "num_steps": arguments.steps,
            "size_level": arguments.size_level,
            "seed": 1,
        }
        request = service.read_picture(asked)
        edited = await service.edit_picture(png(before), request, mask=png(mask))
        after = edited.picture.pixels
        if arguments.keep:
            arguments.keep.joinpath(f"{name} {edit} {region}.png").write_bytes(edited.data)
        assert np.array_equal(after[mask == 0], before[mask == 0])
        wrong = after.astype(np.float32) / 255 - wanted
        row[f"{region} dB"] = psnr(wrong[inside], np.zeros(1))
        row[f"{region} detail dB"] = psnr(fine(wrong, inside)[inside], np.zeros(1))
    for figure in ("dB", "detail dB"):
        row[f"gain {figure}"] = row[f"full {figure}"] - row[f"whole {figure}"]
    assert edited.metadata.region is not None
    row["scale"] = edited.metadata.region.scale
    row["× whole"] = row["scale"] / (arguments.size_level / float(np.sqrt(mask.size)))
    return row


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-level", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pictures", type=int, default=20, help="how many of them, from the first")
    parser.add_argument("--keep", type=Path, help="folder for the results; default: not kept")
    arguments = parser.parse_args()
    service = build_service(Settings(_env_file=None))
    rng, rows = np.random.default_rng(1), []
    try:
        for number, (name, picture) in enumerate(pictures()):
            mask = ellipse(rng, picture.shape[1], picture.shape[0])
            if number < arguments.pictures:
                edit = ASKED[number % len(ASKED)]
                rows.append(await compare(service, name, picture, edit, mask, arguments))
                print(json.dumps(rows[-1]), flush=True)
    finally:
        service.close()
    mean = {
        name: float(np.mean([row[name] for row in rows])) if name.endswith("dB") else None
        for name in rows[0]
    }
    print(*table_of([*rows, {**mean, "picture": "mean"}]), sep="\n")
    print(json.dumps({"commit": commit(), "rows": rows, "mean": mean}))


if __name__ == "__main__":
    asyncio.run(main())
