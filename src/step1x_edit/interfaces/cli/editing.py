"""The command that edits pictures: one or several files, or the output of another program."""

from __future__ import annotations

import asyncio
import glob
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from step1x_edit.errors import ImageFileNotFoundError, InvalidParameterError
from step1x_edit.interfaces.cli.options import (
    ApiKey,
    AsJson,
    Standalone,
    Url,
    check_prompt,
    option,
    with_options_of,
)
from step1x_edit.interfaces.cli.terminal import (
    STREAM,
    check_stdout,
    cli_settings,
    failures_on_stderr,
    of_several,
    print_answer,
    print_batch,
    shown_progress,
    watched,
    write_picture,
)
from step1x_edit.interfaces.cli.usage import PROGRAM, Command
from step1x_edit.schemas.requests import PARAMETERS, EditRequest, given, read_request
from step1x_edit.service.files import expanded

if TYPE_CHECKING:
    from step1x_edit.service.editor import EditedFile
    from step1x_edit.service.file_edits import FileEdits

_EXAMPLE: Final = "add a red hat"
_MANY: Final = 4  # paths, too many to repeat them
_MAGIC: Final = frozenset("*?[")
_SUFFIX: Final = re.compile(r"[^.]\.[A-Za-z][A-Za-z0-9]{1,4}$")


@with_options_of(EditRequest)
def edit(
    image: Annotated[
        list[str],
        typer.Argument(
            help="Paths of the images to edit, or patterns such as '*.jpg'; - reads one from stdin",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        str,
        typer.Argument(
            help="What to change, in plain words and in quotes, such as 'add a red hat'",
            show_default=False,
        ),
    ],
    *,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help=f"{PARAMETERS['output_path'].description}. - writes a PNG to stdout, which is the "
            "default for an image from stdin",
            show_default=False,
        ),
    ] = None,
    output_dir: Annotated[str | None, option(PARAMETERS["output_dir"])] = None,
    asked: dict[str, Any],
    url: Url = None,
    api_key: ApiKey = None,
    standalone: Standalone = False,
    as_json: AsJson = False,
) -> None:
    """Edit images as the prompt says and save each result as a new file.

    Uses the model of the server that runs on this machine; without a server,
    this process loads the model. The path of each result is printed on stdout.
    """
    with failures_on_stderr(as_json):
        from step1x_edit.interfaces.cli.editors import opened_edits
        from step1x_edit.service.history import history_of

        _check_words(image, prompt)
        paths = _matched(image)
        if output is None and paths == [STREAM] and output_dir is None:
            output = STREAM
        _check_places(paths, output, output_dir, as_json)
        chosen = given({"prompt": prompt, "output_path": output, **asked})
        requests = [read_request(EditRequest, {"image_path": path, **chosen}) for path in paths]
        settings = cli_settings()
        kept = history_of(settings)
        with opened_edits(settings, url, api_key, standalone, kept) as edits:
            if len(requests) > 1:
                _edit_several(edits, requests, output_dir, as_json)
            else:
                _edit_one(edits, requests[0], output_dir, as_json)


def _edit_one(
    edits: FileEdits[EditedFile], request: EditRequest, output_dir: str | None, as_json: bool
) -> None:
    image = edits.files.read_stream(sys.stdin.buffer) if request.image_path == STREAM else None
    if request.output_path == STREAM:
        write_picture(watched("edit", partial(edits.edit_unsaved, request, image=image)))
        return
    saved = watched("edit", partial(edits.edit, request, image=image, output_dir=output_dir))
    print_answer(saved.answer, as_json)


def _edit_several(
    edits: FileEdits[EditedFile],
    requests: Sequence[EditRequest],
    output_dir: str | None,
    as_json: bool,
) -> None:
    names = [os.path.basename(request.image_path) for request in requests]  # noqa: PTH119
    with shown_progress() as progress_of:
        reports = of_several(progress_of, names)
        answer = asyncio.run(edits.edit_several(requests, output_dir, reports))
    print_batch(answer, as_json)


class EditCommand(Command):
    """The command `edit`, which says which of its arguments is missing."""

    def explain(self, ctx: Any, words: list[str], error: typer.TyperException) -> str:
        """What is wrong with the words, and what to do."""
        param = error.param if isinstance(error, typer.BadParameter) else None
        if param is None or param.name not in ("image", "prompt"):
            return super().explain(ctx, words, error)
        values, *_ = self.make_parser(ctx).parse_args(list(words))
        only_word = values.get("prompt")
        if only_word is None:
            missing = "image and prompt are missing"
        else:
            missing = f"{'prompt' if _is_path(only_word) else 'image'} is missing"
        return f"{missing}; {_how_to_call('photo.jpg', _EXAMPLE)}"


def _check_words(images: Sequence[str], prompt: str) -> None:
    """Say that the prompt is missing, has no quotes or is in the wrong place."""
    check_prompt(prompt)
    paths = [word for word in images if _is_path(word)]
    words = [word for word in images if not _is_path(word)]
    if _is_path(prompt):
        if not words:
            named = " ".join([*images, prompt]) if len(images) < _MANY else f"{images[0]} ..."
            raise InvalidParameterError(f"prompt is missing; {_how_to_call(named, _EXAMPLE)}")
        raise InvalidParameterError(_how_to_call(" ".join([*paths, prompt]), " ".join(words)))
    if words and len(images) > 1 and " " not in prompt:
        named = " ".join(paths) or "photo.jpg"
        raise InvalidParameterError(_how_to_call(named, " ".join([*words, prompt])))


def _is_path(word: str) -> bool:
    """Whether a word is a path, of an existing file or not, and not part of a prompt."""
    if word == STREAM or os.path.isfile(expanded(word)):  # noqa: PTH113
        return True
    return " " not in word and (
        bool(_SUFFIX.search(word)) or bool({"/", os.sep, *_MAGIC} & {*word})
    )


def _how_to_call(images: str, prompt: str) -> str:
    return f'the prompt comes last, in quotes: {PROGRAM} edit {images} "{prompt}"'


def _matched(images: Sequence[str]) -> list[str]:
    """The paths, with patterns that the shell has not expanded replaced by their sorted matches."""
    paths: list[str] = []
    for image in images:
        pattern = expanded(image)
        if not _MAGIC & set(image) or os.path.lexists(pattern):
            paths.append(image)
            continue
        found = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))  # noqa: PTH207
        if not found:
            raise ImageFileNotFoundError(f"{image} (nothing matches this pattern)")
        paths += found
    return paths


def _check_places(
    paths: Sequence[str], output: str | None, output_dir: str | None, as_json: bool
) -> None:
    """Refuse contradicting arguments before anything is read."""
    if len(paths) > 1 and STREAM in paths:
        raise InvalidParameterError("- reads one image from stdin; give no other images")
    if len(paths) > 1 and output is not None:
        raise InvalidParameterError(
            f"--output names one file, but there are {len(paths)} images; use --output-dir"
        )
    if output is not None and output_dir is not None:
        raise InvalidParameterError("give either --output or --output-dir, not both")
    if paths == [STREAM] and output_dir is not None:
        raise InvalidParameterError("an image from stdin has no name; use --output")
    check_stdout(output, as_json)
    if STREAM in paths and sys.stdin.isatty():
        raise InvalidParameterError("stdin is a terminal; give it a picture, such as < photo.jpg")
