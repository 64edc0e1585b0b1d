"""docs/rest.md is true: each of its commands is run, and answers as it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from conftest import MakeService
from fakes import STREAMED, FakeWorker
from http_server import TOKEN, serving
from local_hub import asked_by_default, running_hub
from step1x_edit.engine.machine import Survey
from step1x_edit.errors import Step1XEditError
from step1x_edit.hub.catalog import find_model
from step1x_edit.interfaces.http.problems import STATUS_OF
from step1x_edit.schemas.requests import EditRequest, PictureRequest

GUIDE = (Path(__file__).parents[2] / "docs" / "rest.md").read_text("utf-8")


def commands() -> list[tuple[str, list[str]]]:
    """Each command of the guide with the lines that it is said to answer."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", GUIDE, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_every_command_of_the_guide_answers_as_it_says(
    make_service: MakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "photo.jpg")
    mask = Image.new("1", (64, 48))
    mask.paste(1, (0, 24, 64, 48))
    mask.save(tmp_path / "mask.png")
    environment = {"API_KEY": TOKEN, "PATH": "/usr/bin:/bin"}
    with (
        running_hub() as hub,
        serving(
            make_service(
                FakeWorker(model="v1.2", placement=STREAMED),
                take_survey=Survey,
                model_version="v1.1",
            )
        ) as url,
    ):
        asked_by_default(hub, monkeypatch)
        files = {"model_index.json": b"{}", "transformer/a.safetensors": b"weights"}
        hub.repos[find_model("v1.2").repos[0]] = files
        for command, expected in commands():
            assert command.startswith("curl -sS ")
            local = command.replace("localhost:8000", url.removeprefix("http://"))
            if "Authorization" not in local:
                local = local.replace("curl ", 'curl -H "Authorization: Bearer $API_KEY" ', 1)
            done = subprocess.run(
                local,
                shell=True,
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, ""), command
            for line in expected:
                if line.startswith("{"):
                    told, answer = json.loads(line), json.loads(done.stdout)
                    assert told.keys() == answer.keys(), command
                    assert told.get("status") == answer.get("status"), command
                    assert told.get("detail") == answer.get("detail"), command
                    if "id" in answer:
                        environment["JOB"] = answer["id"]
                else:
                    assert line in done.stdout.splitlines(), command

    assert Image.open(tmp_path / "night.png").format == "PNG"
    assert Image.open(tmp_path / "winter.webp").format == "WEBP"
    assert Image.open(tmp_path / "later.png").format == "PNG"
    assert json.loads((tmp_path / "job.json").read_text())["status"] == "succeeded"
    assert "step1x_edits_total" in (tmp_path / "metrics.txt").read_text()


def test_the_guide_has_the_status_of_every_error_that_rest_can_meet() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| (`.*?`) \|", GUIDE, re.MULTILINE)
    told = {code: status for status, codes in rows for code in re.findall(r"`(.*?)`", codes)}
    of_paths = {"file_not_found", "path_not_allowed", "output_exists", "output_not_writable"}
    expected = STATUS_OF.keys() - of_paths - {"interrupted", "cancelled"}

    assert expected <= told.keys()
    for code in expected:
        assert told[code] == str(STATUS_OF[code])


def test_every_error_has_a_status() -> None:
    codes = {kind.code for kind in _kinds(Step1XEditError)} - {"invalid_settings"}

    assert codes == STATUS_OF.keys()


def _kinds(root: type[Step1XEditError]) -> list[type[Step1XEditError]]:
    return [kind for child in root.__subclasses__() for kind in (child, *_kinds(child))]


def test_the_guide_names_every_field() -> None:
    for name in PictureRequest.model_fields:
        assert f"`{name}`" in GUIDE or name == "prompt"
    assert PictureRequest.model_fields.keys() < EditRequest.model_fields.keys()
