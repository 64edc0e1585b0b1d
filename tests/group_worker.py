"""The real worker, and its partners, that run out of memory on request.

`python -m group_worker HANDLE`. A process whose rank is in the name of a file in `data_dir`, such
as `full-1`, runs out of memory in its next step, once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from step1x_edit.channel import Start
from step1x_edit.worker import process


def run_out_of_memory(start: Start) -> None:
    from step1x_edit.model.transformer import Transformer

    core, file = Transformer.core, Path(start.data_dir) / f"full-{start.rank}"

    def core_or_failure(*args: Any) -> Any:
        if file.exists():
            file.unlink()
            raise MemoryError
        return core(*args)

    Transformer.core = core_or_failure  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    load_worker, load_partner = process.load_worker, process.load_partner

    def worker(start: Start, **options: Any) -> Any:
        run_out_of_memory(start)
        return load_worker(start, **options)

    def partner(start: Start, end: Any) -> Any:
        run_out_of_memory(start)
        return load_partner(start, end)

    process.load_worker = worker  # type: ignore[assignment]
    process.load_partner = partner
    process.main("group_worker")
