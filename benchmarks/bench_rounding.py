"""What it takes to read matrices as codes, against a plain sequential read of the same bytes.

    python benchmarks/bench_rounding.py MODEL [--precisions fp8 int8 nf4] [--turns 3] [--converted]

MODEL is a published model or a folder of `scripts/random_checkpoint.py` (`--blocks 2 4` writes a
few GB). Only the matrices that are kept as codes are read, from a cold page cache, with the code
of a start; a plain read and each precision take turns. `--converted` also writes the codes into a
temporary folder (`--folder`), as `models convert` does, and reads them from there. The last line of
output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_residency import drop_from_cache
from full_size import PIECE, facts
from step1x_edit.checkpoints.arena import Arena, Weight
from step1x_edit.checkpoints.conversion import with_kept_codes, write_codes
from step1x_edit.checkpoints.read import OpenedCheckpoint, Wanted, open_checkpoint
from step1x_edit.checkpoints.stored import Span, Stored
from stopwatch import GB, Cost, now


def codes_of(opened: OpenedCheckpoint) -> list[Weight]:
    """Its codes and scales."""
    return [weight for weight in opened.weights if weight.code or weight.source is None]


def spans_of(opened: OpenedCheckpoint) -> list[Span]:
    """Where its matrices are, in the order of the files."""
    sources = [weight.source for weight in codes_of(opened)]
    spans = [span for source in sources if isinstance(source, Stored) for span in source.spans]
    return sorted(spans, key=lambda span: (span.file.path, span.offset))


def forget(spans: list[Span]) -> None:
    for span in spans:
        span.file.forget(span.offset, span.size)


def plain_read(spans: list[Span]) -> Cost:
    """Read the bytes one after the other, and nothing else."""
    buffer = memoryview(bytearray(PIECE))
    forget(spans)
    before = now()
    for span in spans:
        for start in range(0, span.size, PIECE):
            span.file.read(span.offset + start, buffer[: min(PIECE, span.size - start)])
    return now().since(before)


def fill(opened: OpenedCheckpoint) -> Cost:
    """Read the codes as a start does."""
    forget(spans_of(opened))
    before = now()
    Arena(codes_of(opened)).fill()
    return now().since(before)


def write(opened: OpenedCheckpoint, file: Path) -> Cost:
    """Write the codes as `models convert` does."""
    forget(spans_of(opened))
    before = now()
    for _ in write_codes(opened, file):
        pass
    return now().since(before)


def measured(
    opened: dict[str, OpenedCheckpoint], turns: int, folder: Path | None
) -> Iterator[tuple[str, Cost]]:
    spans = spans_of(next(iter(opened.values())))
    kept = {}
    for precision, each in opened.items():
        if folder is None:
            break
        file = folder / f"{precision}.safetensors"
        yield f"{precision}, written", write(each, file)
        kept[precision] = file, with_kept_codes(each, file)
    for _ in range(turns):
        yield "plain read", plain_read(spans)
        for precision, each in opened.items():
            yield precision, fill(each)
        for precision, (file, each) in kept.items():
            drop_from_cache(file)
            yield f"{precision}, converted", fill(each)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--precisions", nargs="+", default=["fp8", "int8", "nf4"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--converted", action="store_true")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()

    opened = {
        precision: open_checkpoint(arguments.model, Wanted(precision=precision))
        for precision in arguments.precisions
    }
    gb = sum(span.size for span in spans_of(next(iter(opened.values())))) / GB
    found: dict[str, Any] = {**facts(), "gb": round(gb, 2)}
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    costs: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        place = Path(folder) if arguments.converted else None
        for what, cost in measured(opened, arguments.turns, place):
            costs.setdefault(what, []).append(cost)
            print(f"{what}: {cost.seconds:.1f} s, {cost.cpu_seconds:.1f} CPU s", flush=True)
    plain = costs["plain read"]
    print(
        "\n| what | s | CPU s per GB | × the plain read | × its CPU time |\n|---|---|---|---|---|"
    )
    for what, each in costs.items():
        ratios = [
            (cost.seconds / base.seconds, cost.cpu_seconds / base.cpu_seconds)
            for cost, base in zip(each, plain, strict=False)
        ]
        seconds, cpu_seconds, _ = map(statistics.median, zip(*each, strict=True))
        times, cpu_times = map(statistics.median, zip(*ratios, strict=True))
        found[what] = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "times": times,
            "cpu_times": cpu_times,
        }
        print(
            f"| {what} | {seconds:.1f} | {cpu_seconds / gb:.2f} | {times:.2f} | {cpu_times:.2f} |"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
