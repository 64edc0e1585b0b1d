"""docs/cli.md tells of every command, and its lines are calls that the command line understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from step1x_edit.interfaces.cli import app

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
CALLS = re.findall(r"^\$ step1x-edit (.+)$", PAGE, re.MULTILINE)
COMMANDS = get_command(app)


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_on_the_page_are_understood(call: str) -> None:
    words = shlex.split(re.sub(r"\s[<>] \S+", "", call))
    command = COMMANDS
    while isinstance(command, TyperGroup) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]

    assert command is not COMMANDS
    command.make_context(command.name, words)  # raises what is wrong with the words


def test_the_page_shows_every_command() -> None:
    assert isinstance(COMMANDS, TyperGroup)
    assert {call.split()[0] for call in CALLS} == COMMANDS.commands.keys()
