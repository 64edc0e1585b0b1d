"""Write what `step1x-edit batch` needs to edit the pictures of a public benchmark.

    python scripts/bench_inputs.py gedit   DATA    RESULTS/MODEL [--language en]
    python scripts/bench_inputs.py imgedit JSON    RESULTS       [--pictures FOLDER]
    python scripts/bench_inputs.py kris    FOLDER  results/MODEL
    python scripts/bench_inputs.py rise    JSON    outputs/MODEL [--pictures FOLDER]
    step1x-edit batch RESULTS/manifest.jsonl --output-dir RESULTS

DATA is the benchmark as it is downloaded: for GEdit-Bench the folder with its Arrow or Parquet
files (needs the extra `bench`), for ImgEdit Basic and RISEBench a JSON file, with the pictures
beside it unless `--pictures` names their folder, for KRIS-Bench the folder with its categories.

The second argument is the folder of the results; its manifest names each output as the official
scripts look for it. For GEdit-Bench the sources are written there too. Run again, the script
changes nothing and prints how many results exist. The last line is one JSON object.
docs/evaluation.md has the steps of each benchmark.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

SEED = 42
"""The default of the official `inference.py`; every row has the same."""

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Row:
    """One question of a benchmark."""

    group: str
    images: Sequence[Path]
    prompt: str
    output: str
    """Relative to the folder of the results."""


def main(words: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(words)
    results: Path = arguments.results
    usable: list[Row] = []
    left_out: Counter[str] = Counter()
    for row in arguments.rows(arguments):
        if reason := unusable(row):
            left_out[f"{row.group}: {reason}"] += 1
        else:
            usable.append(row)
    if not usable:
        sys.exit(f"{arguments.data} has nothing to edit: {next(iter(left_out), 'it has no rows')}")
    manifest = results / MANIFEST
    write_manifest(manifest, usable, arguments.seed)
    made = Counter(row.group for row in usable if (results / row.output).is_file())
    for group, count in sorted(Counter(row.group for row in usable).items()):
        print(f"{group}: {count} pictures, {made[group]} results")
    for reason, count in left_out.items():
        print(f"left out: {count} of {reason}")
    print(f"step1x-edit batch {manifest} --output-dir {results}")
    print(
        json.dumps(
            {
                "bench": arguments.bench,
                "rows": len(usable),
                "results": made.total(),
                "left_out": dict(left_out),
            }
        )
    )


def unusable(row: Row) -> str | None:
    """Why the model cannot answer a question, if it cannot."""
    if len(row.images) > 1:
        return f"needs {len(row.images)} pictures, and the model reads one"
    return None if row.images[0].is_file() else f"{row.images[0]} is missing"


def write_manifest(manifest: Path, rows: Sequence[Row], seed: int) -> None:
    """Write what `batch` reads."""
    lines = (
        {"image": str(row.images[0]), "prompt": row.prompt, "output": row.output, "seed": seed}
        for row in rows
    )
    manifest.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    manifest.write_text(text, encoding="utf-8")


# --- the benchmarks -------------------------------------------------------------------------------


def gedit(arguments: argparse.Namespace) -> Iterator[Row]:
    """GEdit-Bench: `fullset/TASK/LANGUAGE/KEY.png`, and beside it the source `KEY_SRCIMG.png`."""
    for values in table(arguments.data):
        language = values["instruction_language"]
        if arguments.language not in ("all", language):
            continue
        group = f"{values['task_type']}/{language}"
        source = Path("fullset") / group / f"{values['key']}_SRCIMG.png"
        place = arguments.results / source
        if not place.is_file():
            save_png(values["input_image"]["bytes"], place)
        output = source.with_name(f"{values['key']}.png")
        yield Row(group, [place], values["instruction"], output.as_posix())


def imgedit(arguments: argparse.Namespace) -> Iterator[Row]:
    """ImgEdit Basic: `KEY.png`."""
    for key, values in read_json(arguments.data).items():
        image = pictures_of(arguments) / values["id"]
        yield Row(values["edit_type"], [image], values["prompt"], f"{key}.png")


def kris(arguments: argparse.Namespace) -> Iterator[Row]:
    """KRIS-Bench: `CATEGORY/ID.jpg`; the scorers read no other format."""
    for file in sorted(arguments.data.glob("*/annotation.json")):
        for key, values in read_json(file).items():
            names = values["ori_img"]
            images = [file.parent / name for name in ([names] if isinstance(names, str) else names)]
            prompt = values.get("ins_en") or values["instruction"]  # the older data
            yield Row(file.parent.name, images, prompt, f"{file.parent.name}/{key}.jpg")


def rise(arguments: argparse.Namespace) -> Iterator[Row]:
    """RISEBench: `images/CATEGORY/INDEX.png`."""
    for values in read_json(arguments.data):
        image = pictures_of(arguments) / values["image"]
        output = f"images/{values['category']}/{values['index']}.png"
        yield Row(values["category"], [image], values["instruction"], output)


# --- reading their data ---------------------------------------------------------------------------


def read_json(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


def pictures_of(arguments: argparse.Namespace) -> Path:
    folder: Path = arguments.pictures or arguments.data.parent
    return folder


def table(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of the Arrow and Parquet files in a folder, a few in memory at a time."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        sys.exit("GEdit-Bench is read with pyarrow: pip install 'step1x-edit[bench]'")
    for file in sorted(folder.rglob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(batch_size=16):
            yield from batch.to_pylist()
    for file in sorted(folder.rglob("*.arrow")):
        if file.name.startswith("cache-"):  # what `datasets` has computed
            continue
        with pa.memory_map(str(file)) as source:
            for batch in pa.ipc.open_stream(source):
                yield from batch.to_pylist()


def save_png(data: bytes, place: Path) -> None:
    """Save a picture upright, complete or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_suffix(".part")
    with Image.open(io.BytesIO(data)) as image:
        ImageOps.exif_transpose(image).save(partial, format="PNG")
    partial.replace(place)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    benches = parser.add_subparsers(dest="bench", required=True)
    for rows in (gedit, imgedit, kris, rise):
        bench = benches.add_parser(rows.__name__, help=rows.__doc__)
        bench.set_defaults(rows=rows)
        bench.add_argument("data", type=_absolute)
        bench.add_argument("results", type=_absolute)
        bench.add_argument("--seed", type=int, default=SEED)
        if rows is gedit:
            bench.add_argument("--language", choices=("en", "cn", "all"), default="all")
        if rows in (imgedit, rise):
            bench.add_argument("--pictures", type=_absolute)
    return parser


def _absolute(name: str) -> Path:
    return Path(name).absolute()


if __name__ == "__main__":
    main()
