"""The command that generates a picture from text."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Final

import typer

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
    failures_on_stderr,
    print_answer,
    watched,
    write_picture,
)
from step1x_edit.schemas.parameters import parameters_of
from step1x_edit.schemas.requests import GenerateRequest, given, read_request

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
    """Generate a picture from text, which needs Step1X-Edit v1.1.

    Uses the model of the server that runs on this machine; without a server,
    this process loads the model. The path of the picture is printed on stdout.
    """
    with failures_on_stderr(as_json):
        from step1x_edit.interfaces.cli.editors import opened_edits
        from step1x_edit.service.history import history_of

        check_prompt(prompt, "a red fox in the snow")
        check_stdout(output, as_json)
        chosen = given({"prompt": prompt, "output_path": output, **asked})
        request = read_request(GenerateRequest, chosen)
        settings = cli_settings()
        kept = history_of(settings)
        with opened_edits(settings, url, api_key, standalone, kept) as edits:
            if output == STREAM:
                write_picture(watched("generate", partial(edits.generate_unsaved, request)))
            else:
                saved = watched("generate", partial(edits.generate, request))
                print_answer(saved.answer, as_json)
