"""The command that makes a picture again from the recipe in its file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from step1x_edit.errors import ImageFileNotFoundError, InvalidParameterError
from step1x_edit.interfaces.cli.options import ApiKey, AsJson, Standalone, Url
from step1x_edit.interfaces.cli.terminal import (
    FAILED,
    STREAM,
    check_stdout,
    cli_settings,
    failures_on_stderr,
    print_answer,
    print_json,
    print_line,
    print_made,
    watched,
    write_picture,
)
from step1x_edit.schemas.requests import (
    PARAMETERS,
    EditRecord,
    EditRequest,
    GenerateRequest,
    given,
    read_request,
)

if TYPE_CHECKING:
    from step1x_edit.schemas.answers import CheckAnswer
    from step1x_edit.service.editor import EditedFile, Editor, Reporter
    from step1x_edit.service.file_edits import FileEdits, Saved
    from step1x_edit.service.files import FileAccess, InputFile
    from step1x_edit.service.recipes import Made


Result = Annotated[
    str, typer.Argument(help="Path of a picture that step1x-edit has made", show_default=False)
]
Check = Annotated[
    bool, typer.Option("--check", help="Say whether the same bytes come out, and save nothing")
]
On = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Apply the recipe to this other picture", show_default=False),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="FILE",
        help="The picture that was edited (default: the one beside the result with the SHA-256 of "
        "the recipe)",
        show_default=False,
    ),
]
Mask = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="The mask of the edit (default: found likewise)", show_default=False
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        help="Where to save the result; the suffix chooses the format. - writes it to stdout "
        "(default: as edit and generate name results)",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help=PARAMETERS["overwrite"].description)]


def replay(
    picture: Result,
    *,
    check: Check = False,
    on: On = None,
    input_path: Input = None,
    mask: Mask = None,
    output: Output = None,
    overwrite: Overwrite = False,
    url: Url = None,
    api_key: ApiKey = None,
    standalone: Standalone = False,
    as_json: AsJson = False,
) -> None:
    """Make a picture again with the model, seed and parameters in its file.

    On one machine with the same settings this gives the same bytes; --check
    makes sure, or says what differs and why.
    """
    with failures_on_stderr(as_json):
        from step1x_edit.interfaces.cli.editors import opened_edits
        from step1x_edit.service.files import FileAccess
        from step1x_edit.service.history import history_of
        from step1x_edit.service.recipes import compare, read_made

        if check and (on is not None or output is not None):
            raise InvalidParameterError("--check saves nothing; leave out --on and --output")
        if on is not None and input_path is not None:
            raise InvalidParameterError("give either --input or --on, not both")
        check_stdout(output, as_json)
        settings = cli_settings()
        files = FileAccess(settings.allowed_dirs, settings.max_bytes)
        made = read_made(files, picture)
        places = given({"output_path": output, "overwrite": overwrite})
        again = _again(files, made, on, input_path, mask, places)
        kept = history_of(settings)
        with opened_edits(settings, url, api_key, standalone, kept) as edits:
            if check:
                remade = watched("replay", partial(again.make, edits.editor))
                answer = compare(made.file.data, remade.data, remade.metadata, settings.limits)
                _print_check(answer, as_json)
            elif output == STREAM:
                write_picture(watched("replay", partial(again.make, edits.editor)))
            else:
                print_answer(watched("replay", partial(again.save, edits)).answer, as_json)


@dataclass(frozen=True)
class _Again:
    """A picture to be made again: the request for it, and the files that it needs."""

    made: Made
    request: EditRequest | GenerateRequest
    image: InputFile | None
    mask: InputFile | None

    async def make(self, editor: Editor[EditedFile], report: Reporter) -> EditedFile:
        """Make it, in the format of the first one."""
        await editor.check_room()
        report = self._checked(editor, report)
        if isinstance(self.request, GenerateRequest):
            return await editor.generate_picture(self.request, report, self.made.suffix)
        assert self.image is not None
        mask = None if self.mask is None else self.mask.data
        return await editor.edit_picture(
            self.image.data, self.request, report, self.made.suffix, mask
        )

    async def save(self, edits: FileEdits[EditedFile], report: Reporter) -> Saved[EditedFile]:
        """Make it and save it; neither its input nor the first one is replaced."""
        report = self._checked(edits.editor, report)
        if isinstance(self.request, GenerateRequest):
            return await edits.generate(self.request, report)
        assert self.image is not None
        others = {each.identity for each in (self.made.file, self.image, self.mask) if each}
        return await edits.edit(
            self.request,
            report,
            image=self.image.data,
            mask=None if self.mask is None else self.mask.data,
            others=frozenset(others),
        )

    def _checked(self, editor: Editor[EditedFile], report: Reporter) -> Reporter:
        from step1x_edit.service.recipes import only_with_model

        return only_with_model(self.made.record, editor.loaded_model, report)


def _again(
    files: FileAccess,
    made: Made,
    on: str | None,
    input_path: str | None,
    mask_path: str | None,
    places: dict[str, Any],
) -> _Again:
    from step1x_edit.service.recipes import how_again

    record, name = made.record, made.file.path.name
    if record.prompt is None:
        raise InvalidParameterError(
            f"the record of {name} has no prompt (RECORD_PROMPT), so it cannot be made again"
        )
    asked = {**how_again(record).model_dump(), "prompt": record.prompt, **places}
    if not isinstance(record, EditRecord):
        if on or input_path or mask_path:
            raise InvalidParameterError(
                f"{name} was generated from text; it has neither input nor mask"
            )
        return _Again(made, read_request(GenerateRequest, asked), None, None)
    masked = record.mask_sha256 is not None
    if mask_path is not None and not masked:
        raise InvalidParameterError(f"the recipe of {name} has no mask")
    mask = None
    if on is not None:
        image, shown = files.read(on), on
        if masked and mask_path is None:
            raise InvalidParameterError(
                f"the mask of {name} belongs to its input; give one for {on} with --mask"
            )
        if mask_path is not None:
            mask = files.read(mask_path)
    else:
        image = _found(files, made, record.input_sha256, input_path, "input")
        shown = str(image.path.with_suffix(made.suffix))  # to be named like a result of the input
        if masked:
            mask = _found(files, made, record.mask_sha256, mask_path, "mask")
    request = read_request(EditRequest, {**asked, "image_path": shown})
    return _Again(made, request, image, mask)


def _found(
    files: FileAccess, made: Made, sha256: str | None, path: str | None, what: str
) -> InputFile:
    """The input or the mask of a picture: the named file, or else the one beside the result."""
    from step1x_edit.service.recipes import find_beside, hash_of

    name = made.file.path.name
    if path is not None:
        file = files.read(path)
        if sha256 is not None and hash_of(file) != sha256:
            raise InvalidParameterError(
                f"{path} is not the {what} of {name}: the recipe has another SHA-256"
            )
        return file
    if sha256 is None:
        raise InvalidParameterError(f"{name} does not name its {what}; give it with --{what}")
    found = find_beside(files, made, sha256)
    if found is None:
        raise ImageFileNotFoundError(
            f"the {what} of {name} is not among the pictures beside it; give it with --{what}"
        )
    return found


def _print_check(answer: CheckAnswer, as_json: bool) -> None:
    """Print the outcome of a check, and exit with a failure unless the bytes are equal."""
    if as_json:
        print_json(answer.to_dict())
    else:
        print_made(answer.metadata)
        print_line(answer.message)
    if not answer.equal:
        raise typer.Exit(FAILED)
