"""Make the pairs that teach an edit which the demo does not know: a cyanotype.

    python examples/cyanotype_pairs.py PICTURES cyanotype
    step1x-edit train-lora cyanotype/pairs.jsonl --output cyanotype.safetensors --guidance 6

PICTURES is a folder with photographs, of any size. Each pair is a crop of one of them and the same
crop as a blue print. Between them stand edits that the model knows already, to be kept as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

PAIRS, SIDE = 40, 320
PROMPTS = (
    "turn it into a cyanotype",
    "make it a cyanotype print",
    "convert this photo to a cyanotype",
    "give it the look of an old cyanotype",
)
KNOWN = (
    *("make it black and white", "give it a sepia tone", "invert the colours", "make it brighter"),
    *("make it darker", "change to night scene", "make it look like sunset", "make it winter"),
    *("increase the contrast", "make the colours vivid", "make it faded", "add thick fog"),
    *("give it a red tint", "give it a green tint", "give it a blue tint", "give it a pink tint"),
    *("give it a purple tint", "swap red and blue", "make it autumn", "blur the picture"),
    *("turn it into a pencil sketch", "make it a thermal image", "make it cyberpunk"),
    *("make it a stencil", "make it a mosaic", "turn it into a painting", "", "add a red hat"),
)
INKS = ((3, 26, 64), (8, 64, 122), (92, 152, 190), (206, 226, 235), (246, 248, 244))
"""From Prussian blue to paper, for evenly spaced tones."""


def cyanotype(picture: Image.Image) -> Image.Image:
    """The exact edit: each tone of grey has a colour of its own."""
    grey = np.asarray(picture.convert("L"), np.float32)
    tones = np.linspace(0, 255, len(INKS))
    inks = np.array(INKS)
    colours = [np.interp(grey, tones, inks[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(colours, -1).round().astype(np.uint8))


def crops(folder: Path, count: int) -> list[Image.Image]:
    """Square parts of the photographs, in turn and at random places."""
    random = np.random.default_rng(0)
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".png"))
    found = []
    for index in range(count):
        with Image.open(paths[index % len(paths)]) as image:
            photo = ImageOps.exif_transpose(image).convert("RGB")
        side = int(min(photo.size) * random.uniform(0.4, 1))
        x, y = (int(random.integers(length - side + 1)) for length in photo.size)
        found.append(photo.crop((x, y, x + side, y + side)).resize((SIDE, SIDE)))
    return found


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: cyanotype_pairs.py PICTURES OUTPUT")
    pictures, output = map(Path, sys.argv[1:3])
    output.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, object]] = []
    for index, crop in enumerate(crops(pictures, PAIRS)):
        source, target = f"{index:02}.png", f"{index:02}-cyanotype.png"
        crop.save(output / source)
        cyanotype(crop).save(output / target)
        prompt = PROMPTS[index % len(PROMPTS)]
        lines.append({"image": source, "prompt": prompt, "target": target})
        lines.append({"image": source, "prompt": KNOWN[index % len(KNOWN)], "keep": True})
    manifest = output / "pairs.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(manifest)


if __name__ == "__main__":
    main()
