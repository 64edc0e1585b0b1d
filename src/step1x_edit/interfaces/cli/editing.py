"""The command that edits pictures: one or several files, or what comes from another program."""

from __future__ import annotations

import asyncio
import glob
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from step1x_edit.errors import ImageFileNotFoundError, InvalidParameterError, Step1XEditError
from step1x_edit.files import FileAccess, FileIdentity, Output
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
    FAILED,
    STREAM,
    check_stdout,
    cli_settings,
    err,
    print_answer,
    print_json,
    print_line,
    print_results,
    shown_progress,
    told_failures,
    write_picture,
)
from step1x_edit.interfaces.cli.usage import PROGRAM, Command
from step1x_edit.schemas import (
    PARAMETERS,
    BatchAnswer,
    BatchItem,
    EditAnswer,
    EditRequest,
    ErrorAnswer,
)

if TYPE_CHECKING:
    from step1x_edit.interfaces.editor import Edited, Editor

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

    A server that runs on this machine does it with its model, and otherwise
    this process. The path of each result is printed on stdout.
    """
    with told_failures(as_json):
        from step1x_edit.interfaces.editor import opened_editor, read_edit

        _check_words(image, prompt)
        paths = expanded(image)
        if output is None and paths == [STREAM] and output_dir is None:
            output = STREAM
        _check_places(paths, output, output_dir, as_json)
        chosen = {"prompt": prompt, **asked}
        mask, overwrite = chosen.pop("mask_path", None), chosen.pop("overwrite", False)
        for path in paths:
            read_edit({"image_path": path, **chosen, "output_path": output, "mask_path": mask})
        settings = cli_settings()
        files = FileAccess(settings.allowed_dirs, settings.max_bytes)
        with opened_editor(settings, url, api_key, standalone) as editor:
            work = _Work(editor, files, chosen, mask, overwrite)
            if output == STREAM:
                write_picture(asyncio.run(work.to_stdout(_source(paths[0], settings.max_bytes))))
            elif len(paths) == 1:
                source = _source(paths[0], settings.max_bytes)
                print_answer(asyncio.run(work.to_file(source, output, output_dir)), as_json)
            else:
                _tell_several(asyncio.run(work.to_files(paths, output_dir)), as_json)


class Edit(Command):
    """The command `edit`, which says which of its words is missing."""

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
    """Say that the prompt is missing, has no quotes or stands in the wrong place."""
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
    """Whether a word names a file and is no part of a prompt, whether the file is there or not."""
    if word == STREAM or os.path.isfile(os.path.expanduser(word)):  # noqa: PTH111, PTH113
        return True
    return " " not in word and (
        bool(_SUFFIX.search(word)) or bool({"/", os.sep, *_MAGIC} & {*word})
    )


def _how_to_call(images: str, prompt: str) -> str:
    return f'the prompt comes last, in quotes: {PROGRAM} edit {images} "{prompt}"'


def expanded(images: Sequence[str]) -> list[str]:
    """The paths, with patterns that no shell has expanded replaced by what they match, sorted."""
    paths: list[str] = []
    for image in images:
        pattern = os.path.expanduser(image)  # noqa: PTH111 - pathlib's raises for `~unknown`
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
    """Say what does not go together, before anything is read."""
    if len(paths) > 1 and STREAM in paths:
        raise InvalidParameterError("- reads one image from stdin, and no other can be named")
    if len(paths) > 1 and output is not None:
        raise InvalidParameterError(
            f"--output names one file, but there are {len(paths)} images; use --output-dir"
        )
    if output is not None and output_dir is not None:
        raise InvalidParameterError("--output and --output-dir exclude each other")
    if paths == [STREAM] and output_dir is not None:
        raise InvalidParameterError("an image from stdin has no name; use --output")
    check_stdout(output, as_json)
    if STREAM in paths and sys.stdin.isatty():
        raise InvalidParameterError("stdin is a terminal; give it a picture, such as < photo.jpg")


class _Work:
    """One picture after the other, edited in the same way."""

    def __init__(
        self,
        editor: Editor,
        files: FileAccess,
        chosen: Mapping[str, object],
        mask: str | None,
        overwrite: bool,
    ) -> None:
        from step1x_edit.interfaces.editor import given

        self._editor = editor
        self._files = files
        self._chosen = given(chosen)
        self._mask = mask
        self._overwrite = overwrite

    async def to_stdout(self, image: str | bytes) -> Edited:
        """Edit a picture that is to be handed on."""
        from step1x_edit.interfaces.editor import read_inputs

        inputs = await asyncio.to_thread(read_inputs, self._files, image, self._mask)
        with shown_progress() as progress_of:
            report = progress_of("edit")
            return await self._editor.edit_picture(
                inputs.image, self._chosen, report, mask=inputs.mask
            )

    async def to_file(
        self, image: str | bytes, output: str | None, output_dir: str | None
    ) -> EditAnswer:
        """Edit one picture into the named file, or into one beside it or in a folder."""
        from step1x_edit.interfaces.editor import edit_file

        def plan(inputs: frozenset[FileIdentity]) -> Output:
            if output is not None:
                return self._files.plan_output(output, inputs, overwrite=self._overwrite)
            assert isinstance(image, str)
            return self._files.plan_default_output(
                image, inputs, output_dir=output_dir, overwrite=self._overwrite
            )

        with shown_progress() as progress_of:
            return await edit_file(
                self._editor,
                self._files,
                image,
                self._mask,
                self._chosen,
                plan,
                progress_of("edit"),
            )

    async def to_files(self, paths: Sequence[str], output_dir: str | None) -> BatchAnswer:
        """Edit several; what goes wrong with one does not stop the others."""
        from step1x_edit.interfaces.editor import edit_file

        known = await asyncio.to_thread(self._files.identify, paths)
        taken: set[str] = set()
        items = []
        with shown_progress() as progress_of:
            for number, path in enumerate(paths, 1):

                def plan(inputs: frozenset[FileIdentity], path: str = path) -> Output:
                    return self._files.plan_default_output(
                        path,
                        inputs | known,
                        output_dir=output_dir,
                        overwrite=self._overwrite,
                        taken=taken,
                    )

                report = progress_of(f"{number}/{len(paths)} {os.path.basename(path)}")  # noqa: PTH119
                result: EditAnswer | ErrorAnswer
                try:
                    result = await edit_file(
                        self._editor, self._files, path, self._mask, self._chosen, plan, report
                    )
                except Step1XEditError as error:
                    result = ErrorAnswer.of(error)
                items.append(BatchItem(input=path, result=result))
        return BatchAnswer.of(items)


def _source(path: str, max_bytes: int) -> str | bytes:
    """A path, or the picture on stdin; of one that is too long, enough to see that it is."""
    return sys.stdin.buffer.read(max_bytes + 1) if path == STREAM else path


def _tell_several(answer: BatchAnswer, as_json: bool) -> None:
    if as_json:
        print_json(answer.to_dict())
    else:
        for item in answer.results:
            if isinstance(item.result, EditAnswer):
                print_line(item.result.output_path)
        print_results([(item.input, item.result) for item in answer.results])
        err.print(answer.message, markup=False)
    if answer.status != "success":
        raise typer.Exit(FAILED)
