"""How near the edits of the demo are to the exact ones, without and with a LoRA.

    python benchmarks/bench_lora.py cyanotype.safetensors --size 256 --sheet docs/images/lora.jpg

On the three photographs that the demo was never trained on: the edit that
`examples/cyanotype_pairs.py` teaches, in words that are not in its pairs, and those that the demo
knew before. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from bench_demo import PROMPTS, fitted, psnr
from cyanotype_pairs import cyanotype
from demo_data import CORE_EDITS, EDITS, HELD_OUT_PHOTOS, Picture, load_photo
from step1x_edit.checkpoints.read import Wanted, read_checkpoint
from step1x_edit.model.pipeline import Edited, EditPipeline
from step1x_edit.model.request import NetworkRequest, Pixels

NEW = "cyanotype"
ASKED = {NEW: "make this picture look like a cyanotype", **PROMPTS}


def exact(name: str, pixels: Pixels) -> Picture:
    if name == NEW:
        return np.asarray(cyanotype(Image.fromarray(pixels)), np.float32) / 255
    return EDITS[name](pixels.astype(np.float32) / 255)


def edited(pipeline: EditPipeline, name: str, pixels: Pixels, size: int, steps: int) -> Pixels:
    asked = NetworkRequest(pixels, ASKED[name], num_steps=steps, size_level=size)
    *_, last = pipeline.edit(asked)
    assert isinstance(last, Edited)
    return last.image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--edits", nargs="+", default=[NEW, *PROMPTS], choices=[NEW, *PROMPTS])
    parser.add_argument("--sheet", type=Path, help="before and after, of the new edit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain = read_checkpoint().pipeline
    merged = read_checkpoint(None, Wanted(loras={arguments.lora: 1.0})).pipeline
    photos = {
        name: fitted(load_photo(*place), plain, arguments.size)
        for name, place in HELD_OUT_PHOTOS.items()
    }
    print("| edit | without, dB | with, dB | change |", "|---|---|---|---|", sep="\n")
    changes: dict[str, float] = {}
    sheet: list[Pixels] = []
    for name in arguments.edits:
        found = []
        for pixels in photos.values():
            wanted = exact(name, pixels)
            made = [
                edited(each, name, pixels, arguments.size, arguments.steps)
                for each in (plain, merged)
            ]
            found.append([psnr(each.astype(np.float32) / 255, wanted) for each in made])
            if name == NEW:
                target = (wanted * 255).round().astype(np.uint8)
                sheet.append(np.concatenate([pixels, *made, target], axis=1))
        before, after = np.mean(found, axis=0)
        changes[name] = float(after - before)
        print(f"| {name} | {before:.1f} | {after:.1f} | {after - before:+.2f} |", flush=True)
    if arguments.sheet is not None:
        width = min(each.shape[1] for each in sheet)
        rows = [Image.fromarray(each) for each in sheet]
        rows = [each.resize((width, each.height * width // each.width)) for each in rows]
        Image.fromarray(np.concatenate([np.asarray(each) for each in rows])).save(arguments.sheet)
    others = [changes[name] for name in changes if name != NEW]
    core = [abs(changes[name]) for name in changes if name in CORE_EDITS]
    print(
        json.dumps(
            {
                "new_db": changes.get(NEW),
                "others_mean_db": float(np.mean(np.abs(others))) if others else None,
                "others_worst_db": min(others, default=None),
                "core_worst_db": max(core, default=None),
            }
        )
    )


if __name__ == "__main__":
    main()
