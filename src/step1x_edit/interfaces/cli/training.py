"""The command that trains a LoRA from pairs of pictures."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from step1x_edit.channel import GIGA
from step1x_edit.errors import InvalidParameterError
from step1x_edit.interfaces.cli.options import AsJson, with_options_of
from step1x_edit.interfaces.cli.progress import display
from step1x_edit.interfaces.cli.terminal import (
    cli_settings,
    err,
    failures_on_stderr,
    out,
    print_json,
    print_line,
)
from step1x_edit.schemas.requests import read_request
from step1x_edit.schemas.training import Pair, TrainRequest
from step1x_edit.service.files import FileAccess, expanded

if TYPE_CHECKING:
    from step1x_edit.settings import Limits

_INTERRUPTED = "interrupted; the state is saved, and the same command continues from there"


@with_options_of(TrainRequest)
def train_lora(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="A folder of targets with an instruction for each in a .txt file, a .json "
            "{target: {ref_image_path, caption}}, or a .jsonl manifest with image, prompt and "
            "target",
            show_default=False,
        ),
    ] = None,
    *,
    output: Annotated[
        Path | None,
        typer.Option(help="The LoRA to write, a .safetensors file", show_default=False),
    ] = None,
    sources: Annotated[
        Path | None,
        typer.Option(
            help="For a folder of targets: the folder of their sources, of the same names",
            show_default=False,
        ),
    ] = None,
    asked: dict[str, Any],
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Only print the memory and the work of a step"),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Begin again, and replace the output if it exists"),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Teach the model an edit from pairs of pictures; a second run continues.

    Encoded pairs, the state and the pictures of validations are kept in a
    folder beside the output. All data is checked before anything is loaded.
    """
    with failures_on_stderr(as_json, _INTERRUPTED):
        request = read_request(TrainRequest, asked)
        if estimate:
            _print_estimate(request, as_json)
            return
        if data is None or output is None:
            raise InvalidParameterError("DATA and --output are missing; see --help")
        _train(_absolute(data), sources, _absolute(output), request, overwrite, as_json)


def _train(
    data: Path,
    sources: Path | None,
    output: Path,
    request: TrainRequest,
    overwrite: bool,
    as_json: bool,
) -> None:
    from step1x_edit.service.training import check_output, train

    settings = cli_settings()
    check_output(output, overwrite)
    files = FileAccess(settings.allowed_dirs, settings.max_bytes)
    pairs = _pairs(data, None if sources is None else _absolute(sources), files, settings.limits)
    count = sum(pair.target is not None for pair in pairs)
    if request.held_out >= max(count, 1):
        raise InvalidParameterError(
            f"held_out must be less than the number of pairs with a target, {count}, "
            f"got {request.held_out}"
        )
    events = train(settings, request, pairs, output, overwrite)
    last: dict[str, Any] = {}
    with contextlib.closing(events), display(err) as shown:
        shown.begin(output.name)
        for event in events:
            match event:
                case {"phase": phase, "text": text}:
                    shown.show(phase, text, event.get("done", 0), event.get("total"))
                case {"note": text}:
                    err.print(text, markup=False)
                case {"trained": dict(last)}:
                    pass
    if as_json:
        print_json({"status": "success", **last})
    else:
        print_line(last["output"])


def _pairs(data: Path, sources: Path | None, files: FileAccess, limits: Limits) -> list[Pair]:
    """The pairs in the data; raises InvalidParameterError once all faults are printed."""
    from step1x_edit.service.pairs import read_pairs

    found = read_pairs(data, sources, files, limits)
    for fault in found.faults:
        err.print(fault, style="red", markup=False)
    if found.faults:
        count = len(found.faults)
        faults = "1 fault" if count == 1 else f"{count} faults"
        raise InvalidParameterError(f"{data.name} has {faults}, named above; nothing was loaded")
    kept = sum(pair.target is None for pair in found.pairs)
    also = f", and {kept} edits to keep" if kept else ""
    err.print(f"{len(found.pairs) - kept} pairs{also}", markup=False)
    return found.pairs


def _print_estimate(request: TrainRequest, as_json: bool) -> None:
    from step1x_edit.service.training import estimate

    needs = [event["needs"] for event in estimate(cli_settings(), request)]
    if as_json:
        print_json({"status": "success", "estimates": needs})
        return
    for each in needs:
        weights, learned, computing, memory = (
            f"{each[name] / GIGA:.2f}" for name in ("weights", "learned", "computing", "memory")
        )
        out.print(
            f"{each['model']} at {each['size']}: {memory} GB (weights {weights}, LoRA of "
            f"{each['parameters'] / 10**6:.1f} M numbers {learned}, a step {computing}) and "
            f"{each['flop'] / 10**12:.2f} TFLOP for each step",
            markup=False,
        )


def _absolute(path: Path) -> Path:
    return Path(expanded(str(path))).absolute()
