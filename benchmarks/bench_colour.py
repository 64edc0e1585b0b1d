"""The colours of edits in several profiles, by the demo checkpoint.

    python benchmarks/bench_colour.py [--parts bw identity] [--size-level 1024] [--photo FILE]

| part | what it measures |
|---|---|
| bw | a photograph in each profile, made black and white: the colour that is left, in sRGB, and the difference from the edit of the sRGB file |
| identity | the numbers of the photograph taken for those of each profile, so that many colours lie outside sRGB: how far an edit without words changes them, and how far a network that changes nothing does |

Levels are of 8 bits. Needs 1.5 GB of memory and about 40 CPU seconds for each edit at 1024. Prints
tables, then one line of JSON.
"""  # noqa: E501 - a table

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from build import commit
from markdown_tables import table_of
from picture_files import (
    ADOBE_RGB,
    D50,
    D65,
    DISPLAY_P3,
    PROPHOTO,
    SRGB,
    Pixels,
    difference,
    encoded,
    levels,
    linear,
    rgb_profile,
    seen,
    to_pcs,
)
from step1x_edit.interfaces.cli.demo import DEMO_PHOTO
from step1x_edit.interfaces.cli.editors import opened_edits
from step1x_edit.pictures import images
from step1x_edit.schemas.requests import EditRequest
from step1x_edit.settings import Settings

SPACES = {
    "sRGB": (SRGB, None, D65),
    "Display P3": (DISPLAY_P3, None, D65),
    "Adobe RGB": (ADOBE_RGB, 563 / 256, D65),
    "ProPhoto": (PROPHOTO, 1.8, D50),
}
BLACK_AND_WHITE = "turn it into a black and white photo"

Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=["bw", "identity"], default=["bw"])
    parser.add_argument("--size-level", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--photo", type=Path, default=DEMO_PHOTO)
    arguments = parser.parse_args()
    photo = np.array(Image.open(arguments.photo).convert("RGB"))
    found = {}
    for part in arguments.parts:
        measure = {"bw": black_and_white, "identity": identity}[part]
        found[part] = measure(photo, arguments.size_level, arguments.seed)
        print("\n".join(table_of(found[part])), flush=True)
    print(json.dumps({"commit": commit(), "size": arguments.size_level, **found}))


def black_and_white(photo: Pixels, size_level: int, seed: int) -> list[Row]:
    """The same scene in each profile."""
    files = [stored(numbers_of(photo, name), name) for name in SPACES]
    edited = [seen(data) for data in edits(files, BLACK_AND_WHITE, size_level, seed)]
    return [
        {
            "profile": name,
            "chroma before": chroma(seen(before)),
            "chroma left": chroma(after),
            "from the edit of sRGB": difference(after, edited[0]),
        }
        for name, before, after in zip(SPACES, files, edited, strict=True)
    ]


def identity(photo: Pixels, size_level: int, seed: int) -> list[Row]:
    """The same numbers in each profile."""
    files = [stored(photo, name) for name in SPACES]
    edited = edits(files, "", size_level, seed)
    return [
        {
            "profile": name,
            "outside sRGB, %": 100 * outside(photo, name),
            "unchanged": difference(unchanged(before), photo),
            "edit without words": difference(numbers_in(after), photo),
        }
        for name, before, after in zip(SPACES, files, edited, strict=True)
    ]


def unchanged(data: bytes) -> Pixels:
    """What a network makes of a file that answers with what it was given."""
    picture = images.decode(data, Settings(_env_file=None).limits)
    return images.restore(picture.in_srgb, picture).pixels


def edits(files: Sequence[bytes], prompt: str, size_level: int, seed: int) -> list[bytes]:
    """The files of the results of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(_env_file=None, allowed_dirs=(Path(folder),))
        with opened_edits(settings, url=None, api_key=None, standalone=True) as editor:

            def result(number: int, data: bytes) -> bytes:
                (Path(folder) / f"{number}.png").write_bytes(data)
                request = EditRequest(
                    image_path=str(Path(folder) / f"{number}.png"),
                    prompt=prompt,
                    size_level=size_level,
                    seed=seed,
                )
                saved = asyncio.run(editor.edit(request))
                return Path(saved.answer.output_path).read_bytes()

            return [result(number, data) for number, data in enumerate(files)]


def numbers_of(srgb: Pixels, name: str) -> Pixels:
    """The numbers of a picture in a space."""
    primaries, gamma, white = SPACES[name]
    matrix = np.linalg.inv(to_pcs(primaries, white)) @ to_pcs(SRGB)
    light = (linear(srgb) @ matrix.T).clip(0, 1)
    return levels(encoded(light) if gamma is None else light ** (1 / gamma))


def outside(numbers: Pixels, name: str) -> float:
    """The share of pixels that sRGB cannot express."""
    primaries, gamma, white = SPACES[name]
    light = linear(numbers) if gamma is None else (numbers / 255) ** gamma
    srgb = light @ (np.linalg.inv(to_pcs(SRGB)) @ to_pcs(primaries, white)).T
    return float(((srgb < -0.001) | (srgb > 1.001)).any(axis=-1).mean())


def chroma(pixels: Pixels) -> float:
    return float(np.ptp(pixels.astype(int), axis=-1).mean())


def stored(numbers: Pixels, name: str) -> bytes:
    """A PNG with the profile of a space; sRGB needs none."""
    profile = None if name == "sRGB" else rgb_profile(*SPACES[name])
    buffer = io.BytesIO()
    Image.fromarray(numbers).save(buffer, "PNG", icc_profile=profile)
    return buffer.getvalue()


def numbers_in(data: bytes) -> Pixels:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


if __name__ == "__main__":
    main()
