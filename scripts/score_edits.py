"""Score edits with the judge inside Step1X-Edit v1.2, to notice when a change makes them worse.

    python scripts/score_edits.py MANIFEST [--output-dir RESULTS] [--model v1.2] [--device cuda]
                                  [--seed 0] [--json scores.json]

MANIFEST and RESULTS are those of `step1x-edit batch`; each line must name its output. The model
gives two pairs of marks from 0 to 10, as in a reflection: how well the instruction was followed and
how little else has changed; how natural the picture looks and how free of artefacts it is. `edit`
and `quality` are the lower mark of each pair, and the score is the square root of their product.

This is no GEdit score: that one is given by GPT-4.1 or Qwen2.5-VL-72B. A model that judges its own
edits is a lenient judge: compare its scores only with other scores of this script. The same seed,
device and precision give the same scores. Replies that cannot be parsed are counted, not guessed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from step1x_edit.channel import Start
from step1x_edit.checkpoints.read import Checkpoint
from step1x_edit.errors import Step1XEditError
from step1x_edit.model.language_model import ChatModel, Sampling
from step1x_edit.model.reasoning import NO_RATING, Ranking, Rating, Reasoner, prompts
from step1x_edit.service.batches import Chosen, items_of_manifest
from step1x_edit.settings import load_settings
from step1x_edit.worker.opening import chosen_device, open_chosen, place_of, plan_for
from step1x_edit.worker.residency import Residency


@dataclass(frozen=True)
class Edit:
    """One edit to judge."""

    source: Path
    instruction: str
    result: Path


@dataclass(frozen=True)
class Score:
    """What the judge thinks of an edit; None: it has not said."""

    picture: str
    instruction: str
    edit: float | None
    quality: float | None

    @property
    def score(self) -> float | None:
        """From 0 to 10."""
        if self.edit is None or self.quality is None:
            return None
        return round(math.sqrt(self.edit * self.quality), 2)


def main(words: Sequence[str] | None = None, sampling: Sampling = Sampling()) -> None:
    arguments = _parser().parse_args(words)
    try:
        edits = edits_of(arguments.manifest, arguments.output_dir)
        scores = list(judged(edits, arguments, sampling))
    except Step1XEditError as error:
        sys.exit(str(error))
    marks = [each.score for each in scores if each.score is not None]
    found = {
        "model": arguments.model,
        "seed": arguments.seed,
        "mean": round(float(np.mean(marks)), 3) if marks else None,
        "scored": len(marks),
        "unread": len(scores) - len(marks),
        "scores": [{**asdict(each), "score": each.score} for each in scores],
    }
    print(f"mean score {_shown(found['mean'])} of {len(marks)} edits, {found['unread']} unread")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", "utf-8")


def edits_of(manifest: Path, folder: Path | None) -> list[Edit]:
    """The edits of a manifest; all must exist, or scores of two runs would not be comparable."""
    folder = folder or manifest.parent / f"{manifest.stem}_edited"
    edits = []
    for item in items_of_manifest(manifest, Chosen()):
        if item.request.output_path is None:
            sys.exit(f"{item.name}: name its output in the manifest, so that it can be found")
        result = folder / item.request.output_path
        edits.append(Edit(Path(item.request.image_path), item.request.prompt, result))
    if missing := [each for each in edits if not each.result.is_file()]:
        sys.exit(f"{len(missing)} results are missing, such as {missing[0].result}: run the batch")
    return edits


def judged(
    edits: Sequence[Edit], arguments: argparse.Namespace, sampling: Sampling
) -> Iterator[Score]:
    """Judge one edit after the other with the model, and print each line of the table."""
    start = Start(
        model_path=arguments.model,
        data_dir=str(load_settings().data_dir),
        device=arguments.device,
    )
    place = place_of(chosen_device(start))
    residency = Residency(partial(open_chosen, start), place, plan=partial(plan_for, place))
    residency.load(accept=_refuse_without_judge, use="reply")
    residency.onload()
    with residency.on_device() as checkpoint:
        conditioner = checkpoint.pipeline.conditioner
        config = checkpoint.pipeline.config.reasoning
        assert config is not None
        print("picture | instruction | edit | quality | score")
        for each in edits:
            model = ChatModel(
                conditioner.vlm,
                conditioner.vlm.get_submodule("lm_head"),
                conditioner.tokenizer,
                sampling=sampling,
                seed=arguments.seed,  # so that a score does not depend on the edits before it
            )
            score = scored(each, Reasoner(model, prompts(config.prompts)))
            marks = (score.edit, score.quality, score.score)
            print(" | ".join([score.picture, score.instruction, *map(_shown, marks)]), flush=True)
            yield score


def scored(edit: Edit, reasoner: Reasoner[Any]) -> Score:
    """The marks for one edit."""
    source = _read(edit.source)
    result = _read(edit.result)
    if result.size != source.size:
        result = result.resize(source.size, Image.Resampling.BICUBIC)
    pictures = np.asarray(source), np.asarray(result)
    ranking: Ranking = _end(reasoner.rank(*pictures, edit.instruction))
    marks = (_lowest(rating) for rating in (ranking.edit, ranking.quality))
    return Score(str(edit.result), edit.instruction, *marks)


def _lowest(rating: Rating) -> float | None:
    """The lower of two marks; None if there is none from 0 to 10."""
    mark = min(rating.score)
    return None if rating is NO_RATING or not 0 <= mark <= 10 else mark


def _refuse_without_judge(checkpoint: Checkpoint) -> None:
    config = checkpoint.pipeline.config.reasoning
    if config is None or not config.has_ranking:
        sys.exit(f"scores need Step1X-Edit v1.2; the model here is {checkpoint.name}")


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _end(work: Generator[Any, None, Ranking]) -> Ranking:
    """What a generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def _shown(mark: object) -> str:
    return "unread" if mark is None else str(mark)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--model", default="v1.2", help="a folder or the name of a pulled model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
