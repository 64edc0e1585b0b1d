"""The commands about the history: list, show, compare and delete steps, and edit from one."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.text import Text
from rich.tree import Tree

from step1x_edit.errors import InvalidParameterError
from step1x_edit.interfaces.cli.options import (
    ApiKey,
    AsJson,
    Standalone,
    Url,
    check_prompt,
    with_options_of,
)
from step1x_edit.interfaces.cli.terminal import (
    cli_settings,
    err,
    failures_on_stderr,
    out,
    print_answer,
    print_json,
    print_line,
    watched,
)
from step1x_edit.interfaces.cli.usage import HELP_NAMES, Command
from step1x_edit.schemas.requests import EditRequest, given, read_request
from step1x_edit.service.files import FileAccess

if TYPE_CHECKING:
    from step1x_edit.service.history import History, Step
    from step1x_edit.settings import Settings

_SHOWN_SIDE: Final = 1024  # of each picture that is compared
_OF_ONE_EDIT: Final[dict[str, None]] = dict.fromkeys(("seed", "region", "outpaint", "upscale"))
"""The parameters of a step that the next edit of its picture does not repeat."""
_LEAST: Final = "the half of the picture that differs least"
_PROTECTED: Final = "what the masks protect"
_ANY_SIZE: Final = 2**40  # a preview that is not for a chat

history_app = typer.Typer(
    help="The history of edits, with HISTORY=on: list, show, compare, continue and delete steps.",
    context_settings=HELP_NAMES,
    no_args_is_help=True,
)

Id = Annotated[
    str,
    typer.Argument(metavar="ID", help="The id of a step, or how it begins", show_default=False),
]
OutputFile = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Write the picture to this file", show_default=False
    ),
]


@history_app.command("list", cls=Command)
def list_steps(as_json: AsJson = False) -> None:
    """List all steps as trees, each below the step or the original that was edited.

    The number is the drift: how many levels, of 255, the rest of the picture
    has moved since the original.
    """
    with failures_on_stderr(as_json):
        settings, history = _opened()
        steps = history.steps()
        if as_json:
            print_json({"status": "success", "steps": [_as_json(step) for step in steps]})
            return
        if not steps:
            print_line("The history is empty" + ("" if settings.history else "; HISTORY is off"))
        for tree in _trees(steps):
            out.print(tree)


@history_app.command(cls=Command)
def show(step_id: Id, output: OutputFile = None, as_json: AsJson = False) -> None:
    """Show how a step was made and how far it has drifted; write its picture with --output.

    To undo a step, continue with its parent.
    """
    with failures_on_stderr(as_json):
        settings, history = _opened()
        step = history.find(step_id)
        path = history.path_to(step)
        written = None
        if output is not None:
            files = _files(settings)
            planned = files.plan_output(output, ())
            if planned.suffix.lower() != step.suffix.lower():
                raise InvalidParameterError(f"the picture is a {step.suffix} file; name it so")
            written = str(files.publish(planned, history.read(step.result)))
        if as_json:
            ids = [each.id for each in path]
            shown = {**_as_json(step), "path": ids, **given({"output_path": written})}
            print_json({"status": "success", **shown})
            return
        for name, value in _rows(step, path):
            out.print(f"{name:<16} {value}", markup=False)
        if written is not None:
            print_line(written)


@history_app.command(cls=Command)
@with_options_of(EditRequest)
def edit(
    step_id: Id,
    prompt: Annotated[
        str,
        typer.Argument(
            help="What to change, in plain words and in quotes; optional with --from-original",
            show_default=False,
        ),
    ] = "",
    *,
    from_original: Annotated[
        bool,
        typer.Option(
            "--from-original",
            help="Edit the original instead, with all prompts up to this step and the new one as "
            "one instruction, so that nothing is lost by editing an edited picture",
        ),
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to save the result (default: named after the original, in this folder)",
            show_default=False,
        ),
    ] = None,
    asked: dict[str, Any],
    url: Url = None,
    api_key: ApiKey = None,
    standalone: Standalone = False,
    as_json: AsJson = False,
) -> None:
    """Edit the picture of a step, any number of times in different ways.

    Parameters that are not given are those of the step; the seed is drawn
    again, except with --from-original. The result becomes a new step.
    """
    with failures_on_stderr(as_json):
        from step1x_edit.interfaces.cli.editors import opened_edits

        settings, history = _opened()
        step = history.find(step_id)
        if from_original:
            again = history.from_original(step, prompt)
            image, mask, usual = again.image, again.mask, again.arguments
        else:
            check_prompt(prompt)
            image, mask = history.read(step.result), None
            usual = {**step.arguments, "prompt": prompt, **_OF_ONE_EDIT}
        if "mask_path" in asked:
            mask = None
        arguments = {**given(usual), **asked, **given({"output_path": output})}
        request = read_request(EditRequest, {"image_path": step.name, **arguments})
        kept = history if settings.history else None
        if kept is None:
            err.print("HISTORY is off: the result is not kept as a step", markup=False)
        with opened_edits(settings, url, api_key, standalone, kept) as edits:
            work = partial(edits.edit, request, image=image, mask=mask)
            print_answer(watched("edit", work).answer, as_json)


@history_app.command(cls=Command)
def compare(
    step_id: Id,
    other_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[OTHER]",
            help="Another step (default: the original of the first)",
            show_default=False,
        ),
    ] = None,
    output: OutputFile = None,
    as_json: AsJson = False,
) -> None:
    """Compare two steps, or a step with its original; draw them side by side with --output."""
    with failures_on_stderr(as_json):
        settings, history = _opened()
        step = history.find(step_id)
        pictures = {step.id: step.result}
        if other_id is None:
            pictures = {"original": step.original, **pictures}
        else:
            other = history.find(other_id)
            pictures[other.id] = other.result
        if len(pictures) == 1:
            raise InvalidParameterError(f"both are step {step.id}; name two steps")
        before, after = pictures
        drift = history.drift(pictures[before], pictures[after])
        written = None
        if output is not None:
            files = _files(settings)
            planned = files.plan_output(output, ())
            written = str(
                files.publish(planned, _drawn(settings, history, pictures, planned.suffix))
            )
        if as_json:
            answer = {"before": before, "after": after, "drift": drift, "output_path": written}
            print_json({"status": "success", **given(answer)})
            return
        out.print(f"{before} and {after}: {_in_words(drift, _LEAST)}", markup=False)
        if written is not None:
            print_line(written)


@history_app.command(cls=Command)
def delete(
    step_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="The id of a step", show_default=False)
    ] = None,
    *,
    tree: Annotated[
        bool, typer.Option("--tree", help="Delete all steps of the same original, and it")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Delete the whole history")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")] = False,
) -> None:
    """Delete a step with all that were made from it, or a tree, or everything.

    Files that edits have written elsewhere stay.
    """
    with failures_on_stderr(as_json=False):
        _, history = _opened()
        if everything == (step_id is not None) or (everything and tree):
            raise InvalidParameterError("give the id of a step, or --all")
        if everything:
            what, work = "the whole history", history.delete_all
        else:
            step = history.find(step_id or "")
            what = f"step {step.id} and all that were made from it"
            work = partial(history.delete, step)
            if tree:
                what, work = f"all steps of {step.name}", partial(history.delete_tree, step)
        if not yes and not typer.confirm(f"Delete {what}?", err=True):
            err.print("nothing was deleted")
            return
        err.print(f"deleted {what}: {_steps(work())}", markup=False)


def _opened() -> tuple[Settings, History]:
    from step1x_edit.service.history import History

    settings = cli_settings()
    return settings, History(settings)


# --- printing -------------------------------------------------------------------------------------


def _trees(steps: Sequence[Step]) -> Iterator[Tree]:
    """A tree for each original, that of the oldest step first."""
    ids = {step.id for step in steps}
    below: dict[str, list[Step]] = {}
    for step in steps:
        below.setdefault(step.parent if step.parent in ids else step.original, []).append(step)

    def grow(tree: Tree, above: str) -> Tree:
        for step in below.get(above, ()):
            drift = "" if step.drift is None else f"  (drift {step.drift:.1f})"
            grow(tree.add(Text(f"{step.id}  {step.metadata.prompt}{drift}")), step.id)
        return tree

    for original in dict.fromkeys(step.original for step in steps):
        first = below[original][0]
        yield grow(Tree(Text(f"{first.name}  {first.made_at.astimezone():%Y-%m-%d}")), original)


def _rows(step: Step, path: Sequence[Step]) -> Iterator[tuple[str, object]]:
    """The lines about a step."""
    yield "step", step.id
    yield "parent", step.parent or ("none: it was generated" if step.source is None else "original")
    yield "original", step.name
    yield "made", f"{step.made_at.astimezone():%Y-%m-%d %H:%M:%S}"
    for name, value in step.metadata.to_dict().items():
        if name != "reasoning":
            yield name, ", ".join(value) if isinstance(value, list) else value
    yield "path", " → ".join(each.metadata.prompt for each in path)
    if step.source is not None:
        yield "drift", _in_words(step.drift, _PROTECTED if all(s.mask for s in path) else _LEAST)
    yield "sha256", step.result


def _in_words(drift: float | None, rest: str) -> str:
    if drift is None:
        return "not comparable"
    return f"{rest} differs by {drift:.1f} of 255 levels on average"


def _as_json(step: Step) -> dict[str, Any]:
    return step.model_dump(mode="json", exclude_none=True)


def _steps(number: int) -> str:
    return f"{number} step" if number == 1 else f"{number} steps"


# --- pictures -------------------------------------------------------------------------------------


def _files(settings: Settings) -> FileAccess:
    return FileAccess(settings.allowed_dirs, settings.max_bytes)


def _drawn(settings: Settings, history: History, pictures: dict[str, str], suffix: str) -> bytes:
    from step1x_edit.interfaces.cli.comparison import draw_comparison
    from step1x_edit.pictures import images

    shown = {
        label: io.BytesIO(
            images.preview(
                images.decode(history.read(digest), settings.limits), _SHOWN_SIDE, _ANY_SIZE
            )
        )
        for label, digest in pictures.items()
    }
    return images.encode(draw_comparison(shown, _SHOWN_SIDE), suffix)
