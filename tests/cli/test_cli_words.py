"""The words of a call: what is wrong with them is one sentence, and what looks odd may be right."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fakes import FakeWorker
from step1x_edit import __version__
from step1x_edit.interfaces.cli import app, terminal
from step1x_edit.settings import Settings

run = CliRunner()
QUICK = ["--num-steps", "10"]
EXAMPLE = 'step1x-edit edit photo.jpg "add a red hat"'

pytestmark = pytest.mark.usefixtures("fake_model")


def program(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The program as a process, started by the name of its package."""
    environment = {**os.environ, **options.pop("env", {})}
    ended: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-m", "step1x_edit", *words],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
        env=environment,
        timeout=240,
        check=False,
    )
    return ended


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("edit", f"image and prompt are missing; the prompt comes last, in quotes: {EXAMPLE}"),
        ("edit photo.jpg", f"prompt is missing; the prompt comes last, in quotes: {EXAMPLE}"),
        ("edit photo.png other.jpg", 'step1x-edit edit photo.png other.jpg "add a red hat"'),
        ("edit night", f"image is missing; the prompt comes last, in quotes: {EXAMPLE}"),
        ("edit make it night photo.png", 'step1x-edit edit photo.png "make it night"'),
        ("edit photo.png make it night", 'step1x-edit edit photo.png "make it night"'),
        ("edit make it night", 'step1x-edit edit photo.jpg "make it night"'),
        ("edit 'make it night' photo.png", 'step1x-edit edit photo.png "make it night"'),
        ("edit photo.png ''", "prompt is empty"),
        ("edit photo.png ' '", "prompt is empty"),
        ("generate ''", "prompt is empty"),
        ("generate", "Missing argument 'prompt'; see step1x-edit generate --help"),
        ("batch . --prompt ' '", "prompt is empty"),
        ("batch", "Missing argument 'FOLDER|MANIFEST'"),
        ("edit photo.png x --seed many", "seed must be a whole number"),
        ("edit photo.png x --guidance-scale many", "guidance_scale must be a number"),
        ("generate x --width many", "width must be a whole number"),
        ("demo --size-level many", "size_level must be 512, 768 or 1024"),
        ("edit photo.png x --hat", "No such option: --hat; see step1x-edit edit --help"),
        ("edit photo.png x --seed", "Option '--seed' requires an argument"),
        ("edit photo.png -20%", 'put a prompt that begins with - last, after --: -- "-20%"'),
        ("mcp config --client x", "Invalid value for '--client': 'x' is not one of"),
        ("edt", "No such command 'edt'. Did you mean 'edit'?; see step1x-edit --help"),
        ("--hat", "No such option: --hat; see step1x-edit --help"),
    ],
)
def test_wrong_words_are_told_in_one_sentence_of_ours(
    photo: Path, worker: FakeWorker, words: str, message: str
) -> None:
    result = run.invoke(app, words)

    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Invalid parameter: ")
    assert message in line
    assert not re.search("Input should|Value error|valid integer", line)
    assert worker.started == []


def test_with_json_wrong_words_are_an_answer_too() -> None:
    result = run.invoke(app, ["edit", "photo.png", "--json"])

    assert result.exit_code == 2
    assert json.loads(result.stdout)["code"] == "invalid_parameter"


@pytest.mark.parametrize(
    "words",
    [
        ["photo.png", "-20 % light"],
        ["photo.png", "--add a hat", "--seed", "1"],
        ["photo.png", "--seed", "1", "--", "-20%"],
        ["photo.png", "night", "--negative-prompt", "- no people"],
        ["photo.png", "night.", "--output=a b.png"],
        ["photo.png", "night", "-o", "out.png", "--steps", "11"],
    ],
)
def test_words_that_look_odd_are_understood(
    photo: Path, worker: FakeWorker, words: list[str]
) -> None:
    result = run.invoke(app, ["edit", *QUICK, *words])

    assert result.exit_code == 0, result.stderr
    assert worker.started[0] in words


def test_a_file_that_is_missing_is_no_unquoted_prompt() -> None:
    result = run.invoke(app, ["edit", "photo", "make it night"])

    assert result.exit_code == 1
    assert "Image file not found: photo" in result.stderr


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_program_says_its_version(flag: str) -> None:
    assert run.invoke(app, [flag]).stdout == f"step1x-edit {__version__}\n"


@pytest.mark.parametrize("words", [[], ["edit"], ["models"], ["models", "pull"], ["mcp", "call"]])
def test_help_has_a_short_flag_everywhere(words: list[str]) -> None:
    short, long = (run.invoke(app, [*words, flag]) for flag in ("-h", "--help"))

    assert short.exit_code == 0
    assert short.stdout == long.stdout
    assert "Usage: " in short.stdout


def test_the_help_of_serve_names_every_setting() -> None:
    wide = {"COLUMNS": "250", "TERMINAL_WIDTH": "250", "NO_COLOR": "1"}

    told = run.invoke(app, ["serve", "--help"], env=wide).stdout

    for name, field in Settings.model_fields.items():
        line = next(line for line in told.splitlines() if line.split()[:1] == [name.upper()])
        assert field.description is None or field.description[:40] in line


def test_the_shell_completes_commands_and_names_of_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = run.invoke(app, ["--show-completion", "bash"])
    asked = {"_STEP1X_EDIT_COMPLETE": "complete_bash"}
    completed = [
        run.invoke(app, env={**asked, "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))})
        for words in ("step1x-edit ba", "step1x-edit mcp config --client curs")
    ]

    assert "complete -o default -F _step1x_edit_completion step1x-edit" in script.stdout
    assert [result.stdout.split() for result in completed] == [["batch"], ["cursor"]]


COMPLETIONS = {
    "fish": 'source $argv[1]; complete -C "step1x-edit mcp config --client curs"',
    "zsh": "compdef() {}; source $1; _arguments() { print -r -- $@ }; "
    "words=(step1x-edit mcp config --client curs); CURRENT=5; _step1x_edit_completion",
}


@pytest.mark.parametrize("shell", COMPLETIONS)
def test_other_shells_complete_with_the_script_that_they_are_given(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = shutil.which(shell)
    if installed is None:
        pytest.skip(f"{shell} is not installed")
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script, name = tmp_path / "script", tmp_path / "step1x-edit"
    script.write_text(run.invoke(app, ["--show-completion", shell]).stdout)
    name.write_text(f'#!/bin/sh\nexec {sys.executable} -m step1x_edit.interfaces.cli "$@"\n')
    name.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    words = [shell, str(script)] if shell == "zsh" else [str(script)]
    told = subprocess.check_output([installed, "-c", COMPLETIONS[shell], *words], text=True)

    assert "cursor" in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("words", ["status --json", "edit --help"])
def test_a_full_stdout_gets_a_sentence(words: str) -> None:
    with Path("/dev/full").open("wb") as full:
        result = program(*words.split(), stdout=full)

    assert result.returncode == 1
    assert result.stderr == "Cannot write output: stdout (No space left on device)\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_picture_for_a_full_stdout_gets_a_sentence(
    photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=told, soft_wrap=True))
    monkeypatch.setattr(sys, "argv", ["step1x-edit", "edit", str(photo), "x", "-o", "-", *QUICK])
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            app()

    assert ended.value.code == 1
    assert told.getvalue().endswith("Cannot write output: stdout (No space left on device)\n")


def test_a_locale_without_unicode_is_named_and_what_it_holds_is_printed(tmp_path: Path) -> None:
    narrow = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    named = program("edit", "grün.png", "x", env=narrow, cwd=tmp_path)
    told = program("batch", "--help", env=narrow)

    assert named.returncode == 2
    assert named.stderr.startswith("Invalid settings: the locale has the encoding ascii")
    assert "LC_ALL" in named.stderr
    assert told.returncode == 0
    assert "Traceback" not in told.stderr


def test_an_encoding_without_some_signs_still_shows_the_path_of_a_result(
    photo: Path, tmp_path: Path
) -> None:
    photo.rename(tmp_path / "grün.png")
    (tmp_path / "log").touch()
    here = Path(__file__).parents[1]
    told = subprocess.run(
        [sys.executable, str(here / "cli_fake.py"), "edit", "grün.png", "x", *QUICK],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "FAKE_LOG": str(tmp_path / "log")},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
        check=False,
    )

    assert told.returncode == 0, told.stderr
    assert told.stdout == f"{tmp_path}/gr\\xfcn_edited.png\n"
    assert (tmp_path / "grün_edited.png").is_file()


def test_status_without_a_server_is_one_sentence() -> None:
    result = run.invoke(app, ["status"])

    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    assert line.startswith("No server is running on this machine")


def test_ctrl_c_while_the_program_starts_ends_it_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt  # comes while this is imported\n")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    result = program("status", env={"PYTHONPATH": paths})

    assert result.returncode == 130
    assert result.stderr == "interrupted\n"
