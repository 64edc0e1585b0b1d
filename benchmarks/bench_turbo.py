"""Fast and turbo against exact edits of the same build: time, pictures, and counted work.

    export THP_MEM_ALLOC_ENABLE=1  # as in the worker's process
    python benchmarks/bench_turbo.py [--parts loop pictures] [--size 1024] [--other OTHER/src]

| part | what it measures |
|---|---|
| loop | the loop of each mode, in turns |
| pictures | PSNR and blind check of each mode, and of exact edits with as few evaluations |
| region | time of the loop, and PSNR inside, with a mask of 25 % |
| counted | the operations of v1.1 at 1024, on the meta device |
| again | how soon the second edit of a picture begins |
| batches, wide | 8 waiting edits of 512 in batches or not: the demo, and blocks of full width |
| same | whether exact files have the bytes of another build (`--other`) |
| curve | quality against time by mode and number of steps, with a plot |
| strip | one row of pictures |

The modes take turns. Times are CPU seconds of one thread, which other work on the machine hardly
affects; ratios are medians over the turns. Bound by matrix products. At most 1.5 GB of memory, at
full width 2.2 GB.

Pictures stay in `--keep`, so that a run that was stopped continues; such a folder belongs to one
build. Results are merged into `--results`; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench_demo import PROMPTS
from build import commit
from demo_data import HELD_OUT_PHOTOS
from markdown_tables import table_of
from step1x_edit.model.blocks import DoubleStreamBlock, SingleStreamBlock
from turbo import batches, chart, counted, quality, same, strip, timing
from turbo.edits import TYPES, Demo

DOCS = Path(__file__).parents[1] / "docs" / "images"
CURVE_STEPS = (10, 14, 20, 28, 40, 50)

Rows = list[dict[str, Any]]


def main(words: Sequence[str] | None = None) -> None:
    torch.set_num_threads(1)
    arguments = parsed(words)
    keep = arguments.keep or Path(tempfile.mkdtemp())
    demo = Demo(arguments.arithmetic, arguments.size, keep)
    results = arguments.results
    found = json.loads(results.read_text("utf-8")) if results and results.exists() else {}
    for part in arguments.parts:
        rows = PARTS[part](demo, arguments)
        key = part if part in WITHOUT_DEMO else f"{part}, {demo.size}, {demo.arithmetic}"
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        load = round(os.getloadavg()[0])
        found[key] = {"commit": commit(), "date": date, "load": load, "rows": rows}
        print(f"\n{key}:\n", *table_of(rows, digits=4), sep="\n", flush=True)
        if results:
            results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(json.dumps(found, ensure_ascii=False))


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--photos", nargs="+", choices=HELD_OUT_PHOTOS, default=[*HELD_OUT_PHOTOS])
    parser.add_argument("--edits", nargs="+", choices=PROMPTS, default=[*PROMPTS], metavar="EDIT")
    parser.add_argument("--ways", nargs="+", choices=quality.WAYS, default=quality.WAYS)
    parser.add_argument("--curve-steps", nargs="+", type=int, default=CURVE_STEPS)
    parser.add_argument("--arithmetic", choices=TYPES, default="fp32")
    parser.add_argument("--other", type=Path, help="the sources of another build, for `same`")
    parser.add_argument("--requests", type=int, default=len(same.REQUESTS), help="of `same`")
    parser.add_argument("--keep", type=Path, help="folder for the pictures; default: temporary")
    parser.add_argument("--results", type=Path, help="JSON file that collects the results")
    parser.add_argument("--images", type=Path, default=DOCS, help="folder for plot and row")
    arguments = parser.parse_args(words)
    if "same" in arguments.parts and not arguments.other:
        if arguments.parts != list(PARTS):
            parser.error("the part same needs --other")
        arguments.parts.remove("same")
    return arguments


# --- the parts ------------------------------------------------------------------------------------


def loop(demo: Demo, arguments: argparse.Namespace) -> Rows:
    return timing.loops(demo, arguments.steps, arguments.turns)


def pictures(demo: Demo, arguments: argparse.Namespace) -> Rows:
    photos, edits, ways = arguments.photos, arguments.edits, arguments.ways
    return quality.pictures(demo, photos, edits, arguments.steps, ways)


def region(demo: Demo, arguments: argparse.Namespace) -> Rows:
    return timing.regions(demo, arguments.steps, arguments.turns)


def count(demo: Demo, arguments: argparse.Namespace) -> Rows:
    return counted.counted()


def again(demo: Demo, arguments: argparse.Namespace) -> Rows:
    return timing.again(demo, arguments.turns)


def batched(demo: Demo, arguments: argparse.Namespace) -> Rows:
    return batches.demo_batches(demo, arguments.turns)


def wide(demo: Demo, arguments: argparse.Namespace) -> Rows:
    return [
        {"block": name, "type": arithmetic} | row
        for name, kind in (("double", DoubleStreamBlock), ("single", SingleStreamBlock))
        for arithmetic, dtype in TYPES.items()
        for row in batches.wide_batches(kind, dtype, arguments.turns)
    ]


def same_bytes(demo: Demo, arguments: argparse.Namespace) -> Rows:
    return same.same(arguments.other, arguments.requests)


def curve(demo: Demo, arguments: argparse.Namespace) -> Rows:
    photo, edits = arguments.photos[0], arguments.edits
    rows = quality.curve(demo, photo, edits, arguments.curve_steps)
    title = f"PSNR in dB against {quality.PATH} exact steps: the demo at {demo.size}"
    arguments.images.joinpath("turbo.svg").write_text(chart.draw(rows, title), "utf-8")
    return rows


def row_of_pictures(demo: Demo, arguments: argparse.Namespace) -> Rows:
    picture, rows = strip.strip(demo, arguments.photos[0], arguments.edits[0], arguments.steps)
    arguments.images.joinpath("turbo.jpg").write_bytes(picture)
    return rows


PARTS: dict[str, Callable[[Demo, argparse.Namespace], Rows]] = {
    "loop": loop,
    "pictures": pictures,
    "region": region,
    "counted": count,
    "again": again,
    "batches": batched,
    "wide": wide,
    "same": same_bytes,
    "curve": curve,
    "strip": row_of_pictures,
}
WITHOUT_DEMO = ("counted", "wide", "same")


if __name__ == "__main__":
    main()
