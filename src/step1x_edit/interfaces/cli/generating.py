"""The command that makes a picture from words alone."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final

import typer

from step1x_edit.files import FileAccess, Output
from step1x_edit.interfaces.cli.options import (
    ApiKey,
    AsJson,
    Standalone,
    Url,
    check_prompt,
    with_options_of,
)
from step1x_edit.interfaces.cli.terminal import (
    STREAM,
    check_stdout,
    cli_settings,
    print_answer,
    shown_progress,
    told_failures,
    write_picture,
)
from step1x_edit.schemas import GenerateRequest, parameters_of

_LABEL: Final = "generate"
_PARAMETERS: Final = parameters_of(GenerateRequest)


@with_options_of(GenerateRequest)
def generate(
    prompt: Annotated[
        str, typer.Argument(help=_PARAMETERS["prompt"].description, show_default=False)
    ],
    *,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help=f"{_PARAMETERS['output_path'].description}. - writes a PNG to stdout",
            show_default=False,
        ),
    ] = None,
    asked: dict[str, Any],
    url: Url = None,
    api_key: ApiKey = None,
    standalone: Standalone = False,
    as_json: AsJson = False,
) -> None:
    """Make a picture from words alone, which needs Step1X-Edit v1.1.

    A server that runs on this machine does it with its model, and otherwise
    this process. The path of the picture is printed on stdout.
    """
    with told_failures(as_json):
        from step1x_edit.interfaces.editor import (
            generate_file,
            opened_editor,
            read_generate,
        )

        check_prompt(prompt, "a red fox in the snow")
        check_stdout(output, as_json)
        chosen = {"prompt": prompt, **asked}
        overwrite = chosen.pop("overwrite", False)
        read_generate({**chosen, "output_path": output})
        settings = cli_settings()
        files = FileAccess(settings.allowed_dirs, settings.max_bytes)

        def plan() -> Output:
            if output is None:
                return files.plan_new_output(prompt, overwrite=overwrite)
            return files.plan_output(output, (), overwrite=overwrite)

        with (
            opened_editor(settings, url, api_key, standalone) as editor,
            shown_progress() as progress_of,
        ):
            report = progress_of(_LABEL)
            if output == STREAM:
                write_picture(asyncio.run(editor.generate_picture(chosen, report)))
            else:
                work = generate_file(editor, files, chosen, plan, report)
                print_answer(asyncio.run(work), as_json)
