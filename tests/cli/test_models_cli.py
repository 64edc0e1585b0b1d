"""`step1x-edit models`: what it prints, what it asks, how it ends."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from http_server import until
from local_hub import LISTING, Fault, Hub, running_hub
from step1x_edit.checkpoints.read import DEMO_FOLDER
from step1x_edit.hub.catalog import CATALOG
from step1x_edit.hub.fetch import pull
from step1x_edit.interfaces.cli.models import models_app

TINY = "acme/tiny"
BIG = "model.safetensors"
CONTENT = bytes(range(256)) * 2000
PROGRAM = "from step1x_edit.interfaces.cli.models import models_app; models_app()"

run = CliRunner()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with running_hub() as hub:
        hub.repos[TINY] = {"config.json": b"{}", BIG: CONTENT}
        yield hub


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *arguments]


def environment(hub: Hub) -> dict[str, str]:
    return {**os.environ, "HF_ENDPOINT": hub.url}


def models(*arguments: str, hub: Hub) -> subprocess.CompletedProcess[str]:
    """Run it as a program, whose hub is that of the environment."""
    return subprocess.run(
        command(*arguments), env=environment(hub), capture_output=True, text=True, timeout=240
    )


def test_pull_prints_the_line_that_uses_the_model(hub: Hub, tmp_path: Path) -> None:
    result = models("pull", TINY, hub=hub)

    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    name, _, folder = line.partition("=")
    assert name == "MODEL_PATH"
    assert Path(*shlex.split(folder)) == tmp_path / "models" / "acme--tiny"
    assert (tmp_path / "models" / "acme--tiny" / BIG).read_bytes() == CONTENT
    assert models("where", TINY, hub=hub).stdout.strip() == folder


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent in another way")
def test_an_interrupted_pull_says_that_it_goes_on_and_does(hub: Hub, tmp_path: Path) -> None:
    hub.faults[BIG] = iter([Fault(stall_after=300_000)])
    partial = tmp_path / "models" / "acme--tiny.partial" / BIG
    with subprocess.Popen(
        command("pull", TINY), env=environment(hub), stderr=subprocess.PIPE, text=True
    ) as process:
        until(lambda: partial.exists() and partial.stat().st_size > 200_000)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=240)

    assert process.returncode == 130
    assert "run the same command again to continue" in told
    kept = partial.stat().st_size
    hub.served.clear()
    assert models("pull", TINY, hub=hub).returncode == 0
    assert hub.served == {BIG: len(CONTENT) - kept}


@pytest.mark.parametrize(
    ("name", "fault", "code", "told"),
    [
        ("v1.3", Fault(), 2, "did you mean v1"),
        (TINY, Fault(401), 1, "Cannot get model: "),
        ("acme/missing", Fault(), 1, "has no acme/missing"),
    ],
)
def test_a_pull_that_fails_tells_why_in_one_line(
    hub: Hub, name: str, fault: Fault, code: int, told: str
) -> None:
    hub.faults[LISTING] = repeat(fault)

    result = models("pull", name, hub=hub)

    assert (result.returncode, result.stdout) == (code, "")
    (line,) = [line for line in result.stderr.splitlines() if "%" not in line and line.strip()]
    assert told in line


def test_list_shows_what_can_be_had_and_what_is_there(hub: Hub, tmp_path: Path) -> None:
    folder = pull(TINY, tmp_path / "models", endpoint=hub.url)
    begun = tmp_path / "models" / "v1.1.partial"
    begun.mkdir()
    (begun / "vae.safetensors").write_bytes(b"x" * 1000)

    rows = json.loads(run.invoke(models_app, ["list", "--json"]).stdout)["models"]

    found = {row["name"]: row for row in rows}
    assert {name: row["state"] for name, row in found.items() if "state" in row} == {
        **dict.fromkeys((model.name for model in CATALOG), "available"),
        "v1.1": "partial",
        TINY: "pulled",
    }
    assert found[TINY]["place"] == str(folder)
    assert found["v1.1"]["place"] == str(begun)
    table = run.invoke(models_app, ["list"]).stdout
    for model in CATALOG:
        assert model.name in table
    assert "available, 41.8 GB on disk" in table


def test_model_path_may_be_the_name_of_a_pulled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown with the embedded checkpoint, put where a pull would put a model."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setenv("MODEL_PATH", "acme/own")
    before = run.invoke(models_app, ["list"]).stdout
    shutil.copytree(DEMO_FOLDER, tmp_path / "models" / "acme--own")
    after = json.loads(run.invoke(models_app, ["list", "--json"]).stdout)["models"]

    assert "MODEL_PATH acme/own is not pulled; run step1x-edit models pull acme/own" in before
    chosen = next(model for model in after if model["runs"])
    assert chosen["place"] == str(tmp_path / "models" / "acme--own")


def test_where_says_how_to_get_what_is_not_there(hub: Hub) -> None:
    result = run.invoke(models_app, ["where", "v1.1"])

    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert "v1.1 is not pulled; run step1x-edit models pull v1.1" in line


def test_rm_asks_first(hub: Hub, tmp_path: Path) -> None:
    folder = pull(TINY, tmp_path / "models", endpoint=hub.url)

    for answer in ("n\n", ""):
        refused = run.invoke(models_app, ["rm", TINY], input=answer)
        assert refused.exit_code == 1
        assert "Remove acme/tiny" in refused.stderr
        assert folder.is_dir()
    assert run.invoke(models_app, ["rm", TINY], input="y\n").exit_code == 0
    assert not folder.exists()


def test_rm_with_yes_does_not_ask(hub: Hub, tmp_path: Path) -> None:
    folder = pull(TINY, tmp_path / "models", endpoint=hub.url)

    result = run.invoke(models_app, ["rm", TINY, "--yes"])

    assert result.exit_code == 0
    assert "Remove" not in result.stderr
    assert not folder.exists()
    again = run.invoke(models_app, ["rm", TINY, "--yes"])
    assert again.exit_code == 2
    assert "nothing to remove" in again.stderr


def test_help_does_not_wait_for_the_library_of_the_hub() -> None:
    code = """
import sys
from typer.testing import CliRunner
from step1x_edit.interfaces.cli.models import models_app
assert CliRunner().invoke(models_app, ["pull", "--help"]).exit_code == 0
assert "huggingface_hub" not in sys.modules
import step1x_edit.hub.fetch
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
