"""`step1x-edit doctor` and `models`: what this machine has, and what prevents it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fakes import STREAMED
from server_process import FAKE, started
from step1x_edit.channel import Start
from step1x_edit.checkpoints.read import write_demo
from step1x_edit.engine.host_memory import HostMemory
from step1x_edit.engine.machine import Survey, inspect_machine
from step1x_edit.hub.catalog import SUGGESTED
from step1x_edit.interfaces.cli import app
from step1x_edit.worker.opening import STAND_IN
from step1x_edit.worker.survey import survey
from tiny import tiny_pipeline

run = CliRunner()


def doctor(folder: Path, **settings: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and what was found by name; in a process, because torch must not be in it."""
    code = (
        "import sys\n"
        "from step1x_edit.interfaces.cli import app\n"
        "try: app(['doctor', '--json'])\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "DATA_DIR": str(folder / "data"), **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    answer = json.loads(done.stdout)
    assert (answer["status"] == "success") == (done.returncode == 0)
    return done.returncode, {check["name"]: check for check in answer["checks"]}


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


LISTS_SURVEYS = """
import os, sys
if "step1x_edit.worker.survey" in sys.orig_argv:
    with open(os.environ["SURVEYS"], "a") as surveys:
        surveys.write("one\\n")
"""


def test_a_machine_that_can_run_the_demo_is_told_so_and_inspected_once(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LISTS_SURVEYS)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    settings = {"PORT": free_port(), "DEVICE": "cpu", "PYTHONPATH": path}
    settings["SURVEYS"] = str(tmp_path / "surveys")

    exit_code, found = doctor(tmp_path, **settings)
    _, found_again = doctor(tmp_path, **settings)

    assert exit_code == 0
    assert {check["state"] for check in found.values()} <= {"ok", "note"}
    assert found["torch"]["text"].startswith("torch 2.")
    assert found["device"]["text"].startswith("cpu, computes in fp32 ")
    assert found["checkpoint"]["text"].startswith("demo inside the package, 0.05 GB of weights")
    assert found["plan"]["text"] == "the model computes in host memory"
    assert found["port"]["text"].endswith("is free")
    assert (tmp_path / "surveys").read_text() == "one\n"
    inspected = found_again.pop("inspection")["text"]
    assert "nothing has changed; --again inspects again" in inspected
    del found["memory"], found_again["memory"], found["data"], found_again["data"]
    assert found_again == found
    assert [file.name for file in (tmp_path / "data").rglob("*")] == ["cache", "survey.json"]


def test_what_stands_in_the_way_is_marked_and_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "step1x-edit.safetensors").write_bytes(b"cut short")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = {
            "MODEL_PATH": str(tmp_path / "step1x-edit.safetensors"),
            "DATA_DIR": str(tmp_path / "file" / "data"),
            "DEVICE": "cuda:99",
            "PORT": str(taken.getsockname()[1]),
        }
        exit_code, found = doctor(tmp_path, **settings)

    assert exit_code == 1
    failed = {name: check["text"] for name, check in found.items() if check["state"] == "fail"}
    assert failed.keys() == {"data", "device", "checkpoint"}
    assert failed["data"].endswith("file is not a folder")
    assert failed["device"].startswith("DEVICE cuda:99: ")
    assert "step1x-edit.safetensors" in failed["checkpoint"]
    assert found["port"]["state"] == "note"
    assert "could not listen" in found["port"]["text"]


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere"
)
def test_a_data_folder_without_permission_is_told(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)

    exit_code, found = doctor(tmp_path, DATA_DIR=str(tmp_path / "closed" / "data"))

    assert exit_code == 1
    assert "no permission" in found["data"]["text"]


def test_wrong_settings_are_the_first_thing_to_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "many")

    result = run.invoke(app, ["doctor"])

    assert result.exit_code == 1
    assert "fail settings    Invalid settings: PORT must be a whole number" in result.stdout
    assert "marked with fail" in result.stderr


def test_libraries_that_cannot_be_imported_are_told(tmp_path: Path) -> None:
    broken = tmp_path / "transformers"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('half installed')")

    exit_code, found = doctor(tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))

    assert exit_code == 1
    assert found["torch"]["state"] == "fail"
    assert "half installed" in found["torch"]["text"]


def surveyed(monkeypatch: pytest.MonkeyPatch, seen: Survey) -> dict[str, str]:
    """What doctor says of a machine like this, by name; only the looking is left out."""
    monkeypatch.setattr("step1x_edit.engine.machine.inspect_machine", lambda *_: seen)
    result = run.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    return {check["name"]: check["text"] for check in json.loads(result.stdout)["checks"]}


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_a_cluster_without_ray_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE", "ray")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setattr("step1x_edit.engine.machine.inspect_machine", lambda *_: DEMO_ON_CPU)

    result = run.invoke(app, ["doctor"])

    assert result.exit_code == 1
    assert "Ray is not installed" in result.stdout


DEMO_ON_CPU = Survey(torch="2.13", device="cpu", checkpoint="demo", version="demo", weights_gb=0.05)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 100_000,
        lambda text: text.replace("0.05", '"much"'),
        lambda text: text.replace('"placement": null', '"placement": {"reason": "none"}'),
    ],
    ids=["cut", "deep", "words", "another plan"],
)
def test_a_kept_inspection_that_is_damaged_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: Callable[[str], str]
) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    surveyed(monkeypatch, DEMO_ON_CPU)
    file = tmp_path / "cache" / "survey.json"
    assert "inspection" in surveyed(monkeypatch, DEMO_ON_CPU)
    file.write_text(damage(file.read_text()))

    found = surveyed(monkeypatch, DEMO_ON_CPU)

    assert "inspection" not in found
    assert found["checkpoint"].startswith("demo inside the package, 0.05 GB")


def test_a_library_that_has_been_removed_is_reported_in_spite_of_a_kept_inspection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    surveyed(monkeypatch, DEMO_ON_CPU)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(importlib.metadata.Distribution, "discover", lambda **_: iter(()))

    assert "inspection" not in surveyed(monkeypatch, DEMO_ON_CPU)


def test_a_file_that_changes_in_a_linked_folder_is_inspected_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "text_encoder").mkdir()
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text("{}")
    (tmp_path / "model" / "text_encoder").symlink_to(config.parent)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("MODEL_PATH", str(tmp_path / "model"))
    surveyed(monkeypatch, DEMO_ON_CPU)
    assert "inspection" in surveyed(monkeypatch, DEMO_ON_CPU)

    config.write_text('{"model_type": "qwen2_5_vl"}')

    assert "inspection" not in surveyed(monkeypatch, DEMO_ON_CPU)


CARD = Survey(
    torch="2.13",
    device="cuda, a card",
    device_free_gb=7.6,
    device_total_gb=8.0,
    checkpoint="Step1X-Edit v1.1",
    version="v1.1",
    weights_gb=39.0,
    placement=STREAMED,
)


def test_how_the_model_fits_on_the_card_is_what_the_plan_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fits = surveyed(monkeypatch, CARD)
    too_large = surveyed(monkeypatch, replace(CARD, device_free_gb=2.0))

    assert fits["plan"] == (
        f"fits: {STREAMED.reason}; an edit needs about 7.4 GB of the 7.6 GB that are free"
    )
    assert "more than" not in fits["checkpoint"]
    assert too_large["plan"].startswith("may not fit: 31 % of the core")
    assert "defaults" not in fits  # they are what the authors suggest for v1.1


@pytest.mark.parametrize(
    ("version", "suggested"),
    [
        ("v1.2", "suggested: num_steps 50, guidance_scale 6.0 for v1.2"),
        ("v1.2-preview", "suggested: num_steps 28, guidance_scale 4.0 for v1.2-preview"),
    ],
)
def test_other_defaults_are_suggested_for_versions_that_want_them(
    monkeypatch: pytest.MonkeyPatch, version: str, suggested: str
) -> None:
    found = surveyed(monkeypatch, replace(CARD, version=version))
    for name in ("num_steps", "guidance_scale"):
        value = getattr(SUGGESTED[version], name)
        monkeypatch.setenv(f"DEFAULT_{name.upper()}", str(value))
    followed = surveyed(monkeypatch, replace(CARD, version=version))

    assert found["defaults"].startswith(suggested)
    assert "DEFAULT_NUM_STEPS" in found["defaults"]
    assert "defaults" not in followed


PLAIN = Survey(torch="2.13", device="cpu", checkpoint="mine", version="v1.1", weights_gb=1.0)


@pytest.mark.parametrize(
    ("changed", "is_inspected_again"),
    [
        ({}, False),
        ({"words": ("--again",)}, True),
        ({"MODEL_PATH": "another"}, True),
        ({"OMP_NUM_THREADS": "7"}, True),
        ({"file": "checkpoint/model.safetensors"}, True),
        ({"first": replace(PLAIN, checkpoint_error="it is damaged")}, True),
        ({"first": replace(PLAIN, device="cuda, a card")}, True),
        ({"free": (20, 21)}, False),
        ({"free": (20, 12)}, True),
        ({"free": (200, 120)}, False),
    ],
    ids=str,
)
def test_a_machine_is_inspected_again_if_the_result_may_differ(
    changed: dict[str, Any],
    is_inspected_again: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("checkpoint", "another"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("MODEL_PATH", "checkpoint")
    results = iter([changed.get("first", PLAIN), replace(PLAIN, checkpoint="new")])
    monkeypatch.setattr("step1x_edit.engine.machine.inspect_machine", lambda *_: next(results))
    before, after = changed.get("free", (20, 20))  # the weights have 7 bytes
    free = [before]
    monkeypatch.setattr(
        "step1x_edit.engine.host_memory.measure", lambda: HostMemory(free[-1], total=64)
    )
    run.invoke(app, ["doctor"])
    free.append(after)
    for name in ("MODEL_PATH", "OMP_NUM_THREADS"):
        if name in changed:
            monkeypatch.setenv(name, changed[name])
    if "file" in changed:
        Path(changed["file"]).write_bytes(b"other weights")

    found = run.invoke(app, ["doctor", *changed.get("words", ())])

    assert ("inspection" not in found.stdout) == is_inspected_again
    assert ("checkpoint  new" in found.stdout) == is_inspected_again


def test_a_survey_foresees_the_plan_without_loading_anything(tmp_path: Path) -> None:
    write_demo(tmp_path / "checkpoint", tiny_pipeline())

    seen = survey(Start(model_path=str(tmp_path / "checkpoint"), device=STAND_IN))

    assert seen.size_multiple == 16
    assert seen.placement is not None
    assert seen.placement.reason == "everything fits"
    assert seen.placement.precision == "fp32"
    assert seen.placement.predicted_peak_gb > seen.weights_gb  # type: ignore[operator]


def test_a_running_server_is_told_of(tmp_path: Path) -> None:
    with started(FAKE, tmp_path) as server:
        url = server.url()
        _, found = doctor(tmp_path, DATA_DIR=str(server.data_dir))

    assert url in found["server"]["text"]
    assert "port" not in found


def test_a_survey_looks_with_the_eyes_of_a_worker() -> None:
    seen = inspect_machine(Start(device="cpu", model_version="v1.1"))

    assert seen.checkpoint_error is not None
    assert "MODEL_VERSION is v1.1, but the checkpoint is demo" in seen.checkpoint_error


def test_models_lists_what_there_is_and_marks_what_would_run() -> None:
    result = run.invoke(app, ["models", "list", "--json"])

    found: list[dict[str, Any]] = json.loads(result.stdout)["models"]
    assert [model["name"] for model in found if model["runs"]] == ["demo"]
    assert Path(found[0]["place"], "model.safetensors").stat().st_size / 1e9 < found[0]["disk_gb"]
    assert {"v1.0", "v1.1", "v1.1-diffusers"} <= {model["name"] for model in found}


def test_models_tells_why_the_chosen_one_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(3_000_000))
    monkeypatch.setenv("MODEL_PATH", str(tmp_path))

    result = run.invoke(app, ["models", "list"])

    assert result.exit_code == 0
    assert f"\n{'':20}{tmp_path}\n{'':20}does not run: Manager not initialized" in result.stdout
    assert "3 MB on disk" in result.stdout
    assert "\n* " not in f"\n{result.stdout}"


@pytest.mark.parametrize(
    ("device", "total_gb", "recommended"),
    [
        ("cuda:0, NVIDIA H200", 128, "v1.1 (it needs 10 GB of memory with a GPU"),
        ("cuda:0, a small card", 8, "demo (v1.1 needs 10 GB of memory with a GPU"),
        ("cpu", 64, "v1.1 (it needs 16 GB of memory without a GPU"),
        ("cpu", 12, "demo (v1.1 needs 16 GB of memory without a GPU"),
    ],
)
def test_the_list_of_models_recommends_what_suits_the_machine(
    monkeypatch: pytest.MonkeyPatch, device: str, total_gb: int, recommended: str
) -> None:
    memory = HostMemory(total_gb * 10**9, total_gb * 10**9)
    monkeypatch.setattr("step1x_edit.engine.host_memory.measure", lambda: memory)
    monkeypatch.setattr(
        "step1x_edit.engine.machine.inspect_machine",
        lambda *_: Survey(torch="2.13.0", device=device),
    )

    told = run.invoke(app, ["models", "list"]).stdout.splitlines()[-1]
    answer = json.loads(run.invoke(app, ["models", "list", "--json"]).stdout)

    assert told.startswith(f"Recommended for this machine: {recommended}")
    assert answer["recommended"] == recommended.split()[0]
