"""Parses the arguments of a call before a command gets them.

Errors are reported in one sentence with exit code 2. This module knows nothing about the commands.
"""

from __future__ import annotations

import codecs
import errno
import io
import sys
from collections.abc import Sequence
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from step1x_edit.errors import InvalidParameterError, SettingsError
from step1x_edit.interfaces.cli.terminal import (
    FAILED,
    USAGE,
    give_up_stdout,
    print_failure,
)

PROGRAM: Final = "step1x-edit"
HELP_NAMES: Final = {"help_option_names": ["-h", "--help"]}

_AS_IT_CAME: Final = "step1x_edit.as_it_came"


_IS_UTF_8: Final = sys.getfilesystemencoding() == "utf-8"
_NARROW_LOCALE: Final = (
    f"the locale has the encoding {sys.getfilesystemencoding()}, which cannot represent all "
    "characters of these names and texts; set LC_ALL to a UTF-8 locale, such as C.UTF-8"
)


class WrongUsageError(typer.TyperException):
    """Arguments that are not a valid call of a command."""

    exit_code = USAGE


class Program(TyperGroup):
    """All commands, and the exit codes of the program."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and end the process with its exit code."""
        words = sys.argv[1:] if args is None else args
        try:
            _check_locale(words)
            code = super().main(args, PROGRAM, complete_var, False, windows_expand_args, **extra)
        except typer.TyperException as error:
            if message := _message(error):  # empty if help was shown instead
                if not isinstance(error, WrongUsageError):
                    message += f"; see {PROGRAM} --help"
                print_failure(InvalidParameterError(message), as_json="--json" in words)
            code = error.exit_code
        except typer.Abort:
            code = FAILED
        except OSError as error:  # the library writes the help
            if error.errno != errno.ENOSPC:
                raise
            give_up_stdout(error)
            code = FAILED
        except UnicodeEncodeError:
            if _IS_UTF_8:
                raise
            print_failure(SettingsError(_NARROW_LOCALE), as_json="--json" in words)
            code = USAGE
        sys.exit(code)


class Command(TyperCommand):
    """A command with a name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; raises WrongUsageError."""
        words = self._with_the_prompt_apart(args)
        try:
            return super().parse_args(ctx, list(words))
        except typer.TyperException as error:
            raise WrongUsageError(self.explain(ctx, words, error)) from None

    def explain(self, ctx: Any, words: list[str], error: typer.TyperException) -> str:
        """Say what is wrong with the arguments, and what to do."""
        hint = f"see {ctx.command_path} --help"
        if self._takes_a_prompt and any(_may_be_a_prompt(word) for word in words):
            hint = f'put a prompt that begins with - last, after --: -- "{words[-1]}"; {hint}'
        return f"{_message(error)}; {hint}"

    def _with_the_prompt_apart(self, words: list[str]) -> list[str]:
        """Move a prompt such as "-20 % light" behind --, so that it is not taken for an option."""
        if not self._takes_a_prompt or "--" in words:
            return words
        valued = {
            name
            for param in self.params
            if isinstance(param, TyperOption) and not param.is_flag
            for name in param.opts
        }
        for index, word in enumerate(words):
            is_value = index > 0 and words[index - 1] in valued
            is_option = word.partition("=")[0] in valued
            if word.startswith("-") and " " in word.strip() and not is_value and not is_option:
                return [*words[:index], *words[index + 1 :], "--", word]
        return words

    @property
    def _takes_a_prompt(self) -> bool:
        return any(
            param.name == "prompt" and param.param_type_name == "argument" for param in self.params
        )


def _check_locale(words: Sequence[str]) -> None:
    """Raise UnicodeEncodeError if the locale could not represent an argument."""
    if not _IS_UTF_8:
        "".join(words).encode()


def _message(error: typer.TyperException) -> str:
    """The library's message, without the prefix of pydantic."""
    return error.format_message().replace("Value error, ", "").rstrip(".")


def _may_be_a_prompt(word: str) -> bool:
    """Whether an argument may be a prompt such as "-20%" instead of an option."""
    return len(word) > 2 and word.startswith("-") and not word.startswith("--")


def show_any_text() -> None:
    """Make stdout and stderr accept characters that their encoding (such as ASCII) lacks.

    A file name that is not valid text is written as its bytes; other characters are escaped.
    """
    codecs.register_error(_AS_IT_CAME, _as_it_came)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_AS_IT_CAME)


def _as_it_came(error: UnicodeError) -> tuple[bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    try:
        return character.encode("ascii", "surrogateescape"), error.start + 1
    except UnicodeEncodeError:
        return character.encode("ascii", "backslashreplace"), error.start + 1
