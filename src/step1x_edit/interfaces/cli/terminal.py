"""What the commands share towards the person at the terminal: what is shown, and how it ends.

Results go to stdout and everything else to stderr. Bars are drawn on a terminal only; anywhere
else each phase is a plain line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from step1x_edit.errors import InvalidParameterError, SettingsError, Step1XEditError
from step1x_edit.schemas import EditAnswer, EditMetadata, ErrorAnswer, Reasoning

if TYPE_CHECKING:
    from step1x_edit.channel import Progress
    from step1x_edit.interfaces.editor import Edited
    from step1x_edit.settings import Settings

FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130

STREAM: Final = "-"
"""As the name of a file: stdin or stdout."""

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def cli_settings() -> Settings:
    """The settings, and the log that a person at a terminal wants."""
    from step1x_edit.settings import load_settings

    settings = load_settings()
    if logging.getLevelName(settings.log_level) < logging.WARNING:
        # Whoever looks at a bar needs no diary beside it, neither ours nor the worker's.
        settings = settings.model_copy(update={"log_level": "WARNING"})
    logging.basicConfig(
        level=settings.log_level,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_path=False)],
    )
    return settings


@contextlib.contextmanager
def told_failures(as_json: bool, on_interrupt: str = "interrupted") -> Iterator[None]:
    """Turn our errors into one sentence and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        err.print(on_interrupt, markup=False)
        raise typer.Exit(INTERRUPTED) from None
    except Step1XEditError as error:
        if as_json:
            print_json(ErrorAnswer.of(error).to_dict())
        else:
            err.print(str(error), style="red", markup=False)
        is_usage = isinstance(error, InvalidParameterError | SettingsError)
        raise typer.Exit(USAGE if is_usage else FAILED) from None


# --- progress ------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress_bar() -> Iterator[tuple[ProgressBar, TaskID]]:
    """A bar on stderr with a label, what is being done, and how long it has been and will be."""
    with ProgressBar(
        TextColumn("{task.fields[label]}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=err,
        transient=True,
        redirect_stdout=False,  # what is printed there is a result and not for stderr
    ) as bar:
        yield bar, bar.add_task("starting", total=None, label="")


ShowProgress = Callable[[str], Callable[["Progress"], Awaitable[None]]]
"""Given what is being edited, the function that hears how far it has come."""


@contextlib.contextmanager
def shown_progress() -> Iterator[ShowProgress]:
    """Show how far edits have come: as a bar on a terminal, as a line for each phase elsewhere."""
    if not err.is_terminal:
        yield _lines
        return
    with progress_bar() as (bar, task):

        def of(label: str) -> Callable[[Progress], Awaitable[None]]:
            bar.reset(task, total=None, description="starting", label=label)

            async def show(event: Progress) -> None:
                bar.update(task, description=event.text)
                if event.phase == "denoising":
                    if event.step <= 1:  # what came before says nothing about the steps
                        bar.reset(task, total=event.total, description=event.text)
                    bar.update(task, total=event.total, completed=event.step)

            return show

        yield of


def _lines(label: str) -> Callable[[Progress], Awaitable[None]]:
    last: object = None

    async def show(event: Progress) -> None:
        nonlocal last
        if event.phase != last:
            last = event.phase
            err.print(f"{label}: {event.text}", markup=False)

    return show


# --- printing ------------------------------------------------------------------------------------


def print_json(answer: dict[str, Any]) -> None:
    """Print an answer for a program."""
    typer.echo(json.dumps(answer, ensure_ascii=False, indent=2))


def print_made(metadata: EditMetadata, processing_time: float | None = None) -> None:
    """Say on stderr how a picture was made."""
    took = "" if processing_time is None else f"{processing_time:.1f} s, "
    err.print(f"{metadata.model} on {metadata.device}, {took}seed {metadata.seed}", markup=False)
    if metadata.reasoning is not None:
        print_reasoning(metadata.reasoning)
    if metadata.warning is not None:
        err.print(f"Warning: {metadata.warning}", style="yellow", markup=False)


def print_reasoning(reasoning: Reasoning, prefix: str = "") -> None:
    """Say on stderr what the model made of the prompt and of its rounds, one line for each."""
    from step1x_edit.interfaces.rounds import read_verdict

    if reasoning.prompt is not None:
        err.print(f"{prefix}rewritten prompt: {_one_line(reasoning.prompt)}", markup=False)
    for number, each in enumerate(reasoning.rounds, 1):
        if each.verdict is None:
            continue
        verdict = read_verdict(each.verdict)
        best = " (best)" if number == reasoning.best else ""
        score = "none" if each.score is None else f"{each.score:g}"
        err.print(
            f"{prefix}round {number}{best}: score {score}, {verdict.kind}: "
            f"{_one_line(verdict.words)}",
            markup=False,
        )


def _one_line(words: str) -> str:
    """What a model has said, which may have paragraphs."""
    return " ".join(words.split())


def print_answer(answer: EditAnswer, as_json: bool) -> None:
    """Say how one picture was made, and print where it is."""
    if as_json:
        print_json(answer.to_dict())
        return
    print_made(answer.metadata, answer.processing_time)
    typer.echo(answer.output_path)


def check_stdout(output: str | None, as_json: bool) -> None:
    """Raise InvalidParameterError if a picture is to go to a stdout that is no place for it."""
    if output == STREAM and as_json:
        raise InvalidParameterError("stdout takes the picture or the --json answer, not both")
    if output == STREAM and sys.stdout.isatty():
        raise InvalidParameterError(
            "stdout is a terminal and no place for a picture; use --output, or > file.png"
        )


def write_picture(edited: Edited) -> None:
    """Write the file of a picture to stdout."""
    stdout: BinaryIO = sys.stdout.buffer
    stdout.write(edited.data)
    stdout.flush()
    print_made(edited.metadata)


def print_results(
    results: Sequence[tuple[str, EditAnswer | ErrorAnswer]], kept: str | None = None
) -> None:
    """The closing table of several edits, on stderr; what went wrong is told below it.

    Answers whose message is `kept` have cost no time now.
    """
    rows, failures, thoughts = [], [], []
    warnings: dict[str, None] = {}  # each once, in order
    for name, result in results:
        if isinstance(result, ErrorAnswer):
            rows.append((name, "failed", "", ""))
            failures.append(f"{name}: {result.error}")
            continue
        took = "kept" if result.message == kept else f"{result.processing_time:.1f} s"
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
    """Print rows under headings, cut nowhere; long texts go on in the next line."""
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*row)
    to.print(table, soft_wrap=False, markup=False)


def as_typed(name: str) -> Path | str:
    """How to type a command that lies beside our interpreter, maybe not on the PATH."""
    path = Path(sys.executable).parent / name
    return path if path.exists() else name
