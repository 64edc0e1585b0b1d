"""The size limit of a tool's answer, and how the answer of a large batch is shortened.

Some clients refuse results of a megabyte, and a result contains its answer twice. So the answer of
a batch of thousands of images is shortened, to one of two forms: without the metadata of successes,
or without the successes (their files exist) and with long paths and errors cut. The summary is
always kept, and so is every error until one line each is too much; then the rest is only counted.
`shortened` says what was left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

MAX_RESULT_BYTES: Final = 700_000
_ENVELOPE_BYTES: Final = 2_000  # bytes of the protocol around the two copies

_INPUT_LENGTH: Final = 60
_ERROR_LENGTH: Final = 160

Answer = dict[str, Any]


def within_budget(answer: Answer, max_bytes: int = MAX_RESULT_BYTES) -> Answer:
    """The answer, or the longest of its short forms that fits; only batches have short forms."""
    if "results" not in answer or result_size(answer) <= max_bytes:
        return answer
    for shorter in _ever_shorter(answer):
        if result_size(shorter) <= max_bytes:
            return shorter
    return answer


def result_size(answer: Answer) -> int:
    """Bytes of a result on the wire: the answer as an object, and as text inside a JSON string."""
    text = json.dumps(answer, ensure_ascii=False)
    return len(text.encode()) + len(json.dumps(text, ensure_ascii=False).encode()) + _ENVELOPE_BYTES


def _ever_shorter(answer: Answer) -> Iterator[Answer]:
    items: list[Answer] = answer["results"]
    failures = [_in_brief(item) for item in items if not _succeeded(item)]
    successes = len(items) - len(failures)
    yield _shortened(
        answer,
        [_without_metadata(item) for item in items],
        f"the metadata of {successes} edited images, which the files contain too",
    )
    left_out = (
        f"{successes} edited images, which are in their output folders; "
        "long paths and errors are cut"
    )
    yield _shortened(answer, failures, left_out)
    kept = failures
    while kept:
        kept = kept[: len(kept) // 2]
        rest = Counter(item["result"].get("code", "error") for item in failures[len(kept) :])
        yield _shortened(
            answer,
            kept,
            f"{left_out}; {rest.total()} further failures are only counted, in further_failures",
        ) | {"further_failures": dict(rest)}


def _shortened(answer: Answer, items: list[Answer], left_out: str) -> Answer:
    return answer | {
        "results": items,
        "shortened": f"Left out to keep the answer small: {left_out}",
    }


def _succeeded(item: Answer) -> bool:
    return bool(item["result"]["status"] == "success")


def _without_metadata(item: Answer) -> Answer:
    if not _succeeded(item):
        return item
    kept = {name: value for name, value in item["result"].items() if name != "metadata"}
    return item | {"result": kept}


def _in_brief(item: Answer) -> Answer:
    """A shortened failure: the end of its path and the beginning of its sentence."""
    name, error = item["input"], item["result"]["error"]
    if len(name) > _INPUT_LENGTH:
        name = "…" + name[1 - _INPUT_LENGTH :]
    if len(error) > _ERROR_LENGTH:
        error = error[: _ERROR_LENGTH - 1] + "…"
    return {"input": name, "result": item["result"] | {"error": error}}
