"""What a preview costs: steps with one against steps without, within the same edit.

    python benchmarks/bench_previews.py [--sizes 512,1024] [--steps 10] [--save FOLDER]

Every other step shows its prediction, so that both kinds see the same machine. Bound by the
autoencoder's decoder. The previews may be saved, to see what they look like. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from PIL import Image
from skimage import data

from step1x_edit.checkpoints.read import read_checkpoint
from step1x_edit.model.pipeline import EditPipeline, EditRequest, Progress


def timed(pipeline: EditPipeline, request: EditRequest, folder: Path | None) -> dict[str, float]:
    plain, shown = [], []
    last = time.perf_counter()
    for event in pipeline.edit(request):
        now = time.perf_counter()
        if isinstance(event, Progress) and event.phase == "denoising":
            if event.step > 1:  # the first one's time holds the prologue
                (plain if event.preview is None else shown).append(now - last)
            if event.preview is not None and folder is not None:
                path = folder / f"{request.size_level}-{event.step:02}.png"
                Image.fromarray(event.preview).save(path)
        last = time.perf_counter()
    step, with_preview = statistics.median(plain), statistics.median(shown)
    return {
        "step_ms": round(step * 1000),
        "step_with_preview_ms": round(with_preview * 1000),
        "preview_ms": round((with_preview - step) * 1000),
        "preview_in_steps": round((with_preview - step) / step, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="512,1024")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    pipeline = read_checkpoint().pipeline
    found = {}
    for size in map(int, arguments.sizes.split(",")):
        request = EditRequest(
            data.coffee(),
            "change to night scene",
            num_steps=arguments.steps,
            size_level=size,
            preview_steps=frozenset(range(2, arguments.steps, 2)),
        )
        found[str(size)] = timed(pipeline, request, arguments.save)
        print(f"{size}: {found[str(size)]}")
    print(json.dumps({"previews": found}))


if __name__ == "__main__":
    main()
