"""What the commands share for the terminal: progress, output, error messages and exit codes.

Results go to stdout and everything else to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic as now
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from step1x_edit.errors import (
    InvalidParameterError,
    OutputNotWritableError,
    SettingsError,
    Step1XEditError,
)
from step1x_edit.interfaces.cli.progress import display
from step1x_edit.schemas.answers import (
    KEPT,
    BatchAnswer,
    BatchItem,
    EditAnswer,
    EditMetadata,
    ErrorAnswer,
    Reasoning,
)

if TYPE_CHECKING:
    from step1x_edit.channel import Progress
    from step1x_edit.service.editor import EditedFile, Reporter
    from step1x_edit.service.file_edits import ReporterOf
    from step1x_edit.settings import Settings

T = TypeVar("T")

FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130

STREAM: Final = "-"
"""The file name that means stdin or stdout."""


@contextlib.contextmanager
def _writing_to_stdout() -> Iterator[None]:
    """Report in one sentence that stdout cannot be written, for example on a full disk."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has exited, which is not a failure
        raise
    except OSError as error:
        give_up_stdout(error)
        raise typer.Exit(FAILED) from None


def give_up_stdout(error: OSError) -> None:
    """Report that stdout cannot be written, and drop what is left in its buffer."""
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123 - else it fails again at the exit
        os.dup2(nothing.fileno(), sys.stdout.fileno())
    print_failure(OutputNotWritableError(f"stdout ({error.strerror})"), as_json=False)


class _Results(Console):
    """Prints on stdout."""

    def print(self, *objects: Any, **options: Any) -> None:
        with _writing_to_stdout():
            super().print(*objects, **options)


# A path or a prompt may contain text that looks like the name of an emoji.
out = _Results(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def cli_settings(flags: Mapping[str, object] | None = None) -> Settings:
    """The settings, with logging set up for a terminal; flags override those of the same names."""
    from step1x_edit.settings import load_settings

    settings = load_settings(flags)
    if logging.getLevelName(settings.log_level) < logging.WARNING:
        # The progress bar is enough: log only warnings, here and in the worker.
        settings = settings.model_copy(update={"log_level": "WARNING"})
    logging.basicConfig(
        level=settings.log_level,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_path=False)],
    )
    settings.report()
    return settings


@contextlib.contextmanager
def failures_on_stderr(as_json: bool, on_interrupt: str = "interrupted") -> Iterator[None]:
    """Turn errors into one sentence and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        err.print(on_interrupt, markup=False)
        raise typer.Exit(INTERRUPTED) from None
    except Step1XEditError as error:
        print_failure(error, as_json)
        is_usage = isinstance(error, InvalidParameterError | SettingsError)
        raise typer.Exit(USAGE if is_usage else FAILED) from None


def print_failure(error: Step1XEditError, as_json: bool) -> None:
    """Report an error: on stderr, or as a JSON answer."""
    if as_json:
        print_json(ErrorAnswer.of(error).to_dict())
    else:
        err.print(str(error), style="red", markup=False)


# --- progress ------------------------------------------------------------------------------------


ShowProgress = Callable[[str], "Reporter"]
"""Makes the function that receives progress, given the name of what is edited."""


@contextlib.contextmanager
def shown_progress() -> Iterator[ShowProgress]:
    """Show the progress of edits."""
    warnings: set[str] = set()
    with display(err, now=now) as shown:

        def of(label: str) -> Reporter:
            shown.begin(label)

            async def show(event: Progress) -> None:
                if event.warning is not None and event.warning not in warnings:
                    warnings.add(event.warning)
                    err.print(f"Warning: {event.warning}", style="yellow", markup=False)
                text = replace(event, left_s=None).text  # the display says how long it takes
                match event.phase:
                    case "queued":  # each position is a phase
                        shown.show(text, text)
                    case "loading" if event.step < event.total:
                        shown.show("reading", text, event.step, event.total)
                    case "denoising" | "upscaling" if event.total:
                        shown.show(event.phase, text, *event.work)
                    case _:
                        shown.show(event.phase, text)

            return show

        yield of


def watched(label: str, work: Callable[[Reporter], Coroutine[Any, Any, T]]) -> T:
    """Run some work and show its progress."""
    with shown_progress() as progress_of:
        return asyncio.run(work(progress_of(label)))


def of_several(progress_of: ShowProgress, names: Sequence[str]) -> ReporterOf:
    """The same for the pictures of a batch, by their numbers."""
    return lambda index: progress_of(f"{index + 1}/{len(names)} {names[index]}")


# --- printing ------------------------------------------------------------------------------------


def print_line(text: object) -> None:
    """Print a result, such as a path, on stdout."""
    with _writing_to_stdout():
        sys.stdout.write(f"{text}\n")


def print_json(answer: dict[str, Any]) -> None:
    """Print an answer for a program."""
    text = json.dumps(answer, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # the locale lacks characters, or a file name is not valid text
        text = json.dumps(answer, indent=2)
    print_line(text)


def print_made(metadata: EditMetadata, processing_time: float | None = None) -> None:
    """Print on stderr how a picture was made."""
    took = "" if processing_time is None else f"{processing_time:.1f} s, "
    err.print(f"{metadata.model} on {metadata.device}, {took}seed {metadata.seed}", markup=False)
    if metadata.reasoning is not None:
        print_reasoning(metadata.reasoning)
    if metadata.warning is not None:
        err.print(f"Warning: {metadata.warning}", style="yellow", markup=False)


def print_reasoning(reasoning: Reasoning, prefix: str = "") -> None:
    """Print on stderr the rewritten prompt and the verdict of each round, one line each."""
    from step1x_edit.interfaces.rounds import split_verdict

    if reasoning.prompt is not None:
        err.print(f"{prefix}rewritten prompt: {_one_line(reasoning.prompt)}", markup=False)
    for number, each in enumerate(reasoning.rounds, 1):
        if each.verdict is None:
            continue
        verdict = split_verdict(each.verdict)
        best = " (best)" if number == reasoning.best else ""
        score = "none" if each.score is None else f"{each.score:g}"
        err.print(
            f"{prefix}round {number}{best}: score {score}, {verdict.kind}: "
            f"{_one_line(verdict.words)}",
            markup=False,
        )


def _one_line(words: str) -> str:
    """A model's text without line breaks."""
    return " ".join(words.split())


def print_answer(answer: EditAnswer, as_json: bool) -> None:
    """Print how one picture was made, and its path."""
    if as_json:
        print_json(answer.to_dict())
        return
    print_made(answer.metadata, answer.processing_time)
    print_line(answer.output_path)


def check_stdout(output: str | None, as_json: bool) -> None:
    """Raise InvalidParameterError if a picture cannot be written to this stdout."""
    if output == STREAM and as_json:
        raise InvalidParameterError("stdout can have the picture or the --json answer, not both")
    if output == STREAM and sys.stdout.isatty():
        raise InvalidParameterError(
            "stdout is a terminal and cannot show a picture; use --output, or > file.png"
        )


def write_picture(edited: EditedFile) -> None:
    """Write the file of a picture to stdout."""
    stdout: BinaryIO = sys.stdout.buffer
    with _writing_to_stdout():
        stdout.write(edited.data)
        stdout.flush()
    print_made(edited.metadata)


def print_batch(answer: BatchAnswer, as_json: bool) -> None:
    """Print the results of several pictures, and exit with a failure unless all succeeded."""
    if as_json:
        print_json(answer.to_dict())
    else:
        for item in answer.results:
            if isinstance(item.result, EditAnswer):
                print_line(item.result.output_path)
        _print_results(answer.results)
        kept = sum(_is_kept(item.result) for item in answer.results)
        from_before = f"; {kept} of them from an earlier run" if kept else ""
        err.print(answer.message + from_before, markup=False)
    if answer.status != "success":
        raise typer.Exit(FAILED)


def _is_kept(result: EditAnswer | ErrorAnswer) -> bool:
    return isinstance(result, EditAnswer) and result.message == KEPT


def _print_results(items: Sequence[BatchItem]) -> None:
    """Print the table of several edits on stderr, with failures and warnings below it."""
    rows, failures, thoughts = [], [], []
    warnings: dict[str, None] = {}  # each once, in order
    for item in items:
        name, result = item.input, item.result
        if isinstance(result, ErrorAnswer):
            rows.append((name, "failed", "", ""))
            failures.append(f"{name}: {result.error}")
            continue
        took = "kept" if _is_kept(result) else f"{result.processing_time:.1f} s"
        rows.append((name, Path(result.output_path).name, took, str(result.metadata.seed)))
        if result.metadata.warning is not None:
            warnings[result.metadata.warning] = None
        if result.metadata.reasoning is not None:
            thoughts.append((name, result.metadata.reasoning))
    print_table(("image", "result", "time", "seed"), rows, err)
    for name, reasoning in thoughts:
        print_reasoning(reasoning, f"{name}: ")
    for failure in failures:
        err.print(failure, style="red", markup=False)
    for warning in warnings:
        err.print(f"Warning: {warning}", style="yellow", markup=False)


def print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], to: Console) -> None:
    """Print rows under headings; long texts are wrapped, not cut."""
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*row)
    to.print(table, soft_wrap=False, markup=False)


def as_typed(name: str) -> Path | str:
    """How to type a command that is installed next to this interpreter, maybe not on the PATH."""
    path = Path(sys.executable).parent / name
    return path if path.exists() else name
