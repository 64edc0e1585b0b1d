"""The files in `deploy/` agree with the settings, with each other and with the server."""

from __future__ import annotations

import json
import plistlib
import re
from pathlib import Path
from typing import Any, Final

import pytest
from ruamel.yaml import YAML

from conftest import MakeService
from fakes import STREAMED, FakeWorker
from http_server import calling
from step1x_edit import __version__
from step1x_edit.settings import Settings

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"
SETTINGS: Final = {name.upper() for name in Settings.model_fields}
PORT: Final = str(Settings.model_fields["port"].default)


def test_the_image_is_built_from_files_that_exist_and_reach_the_build() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        name
        for line in _dockerfile().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }

    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


def test_every_way_uses_the_same_port() -> None:
    text = _dockerfile()
    (service,) = (part for part in _kubernetes() if part["kind"] == "Deployment")
    (container,) = service["spec"]["template"]["spec"]["containers"]
    compose = YAML(typ="safe").load(DEPLOY / "compose.yaml")

    assert f"PORT={PORT}" in text
    assert f"EXPOSE {PORT}" in text
    assert [port["containerPort"] for port in container["ports"]] == [int(PORT)]
    assert compose["services"]["cpu"]["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    for name in ("nginx.conf", "Caddyfile"):
        assert f"127.0.0.1:{PORT}" in (DEPLOY / name).read_text("utf-8")


def test_only_settings_that_exist_are_set() -> None:
    (deployment,) = (part for part in _kubernetes() if part["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    compose = YAML(typ="safe").load(DEPLOY / "compose.yaml")
    bundle = json.loads((DEPLOY / "mcpb" / "manifest.json").read_text("utf-8"))
    image = set(re.findall(r"^(?:ENV|   ) (?:\S+ )*?([A-Z_]+)=", _dockerfile(), re.MULTILINE))
    foreign = {"PATH", "HOME", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"}
    foreign |= {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}

    assert {variable["name"] for variable in container["env"]} <= SETTINGS
    assert set(compose["services"]["cpu"]["environment"]) <= SETTINGS
    assert set(bundle["server"]["mcp_config"]["env"]) <= SETTINGS
    assert image - foreign <= SETTINGS


def test_the_entry_for_the_registry_of_mcp_is_that_of_this_version() -> None:
    entry = json.loads((DEPLOY / "mcpb" / "server.json").read_text("utf-8"))
    (package,) = entry["packages"]

    assert entry["version"] == package["version"] == __version__
    assert {each["name"] for each in package["environmentVariables"]} <= SETTINGS


def test_every_way_gives_the_server_time_to_stop() -> None:
    (deployment,) = (part for part in _kubernetes() if part["kind"] == "Deployment")
    compose = YAML(typ="safe").load(DEPLOY / "compose.yaml")
    agent = plistlib.loads((DEPLOY / "step1x-edit.plist").read_bytes())
    unit = (DEPLOY / "step1x-edit.service").read_text("utf-8")

    # A signal that the event loop does not handle ends the process after 10 s.
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 10
    assert compose["services"]["cuda"]["stop_grace_period"] == "20s"
    assert agent["ExitTimeOut"] > 10
    assert "TimeoutStopSec=20" in unit


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes.yaml"])
def test_a_server_for_others_has_a_key_and_a_read_only_root(name: str) -> None:
    text = (DEPLOY / name).read_text("utf-8")

    assert "API_KEY" in text
    assert re.search(r"read_only: true|readOnlyRootFilesystem: true", text)


def test_the_dashboard_asks_for_metrics_that_the_server_has(
    make_service: MakeService, photo: Path
) -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text("utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]

    with calling(make_service(FakeWorker(device="cuda:0", placement=STREAMED))) as client:
        client.post("/api/edit", files={"file": photo.read_bytes()}, data={"prompt": "x"})
        served = client.get("/metrics").text

    series = re.findall(r"^(step1x_\w+)(?:\{(.*)\})? ", served, re.MULTILINE)
    labels = {name: set(re.findall(r'(\w+)="', given)) for name, given in series}
    for query in asked:
        (name, matched), *_ = re.findall(r"(step1x_\w+)\{(.*?)\}", query)
        grouped = re.findall(r"by \((.*?)\)", query)
        used = {*re.findall(r"(\w+)=", matched), *", ".join(grouped).split(", ")} - {""}
        assert name in labels, query
        assert used - {"job"} <= labels[name], query
    assert '"/api/edit"' in " ".join(asked)


def _dockerfile() -> str:
    return (DEPLOY / "Dockerfile").read_text("utf-8")


def _kubernetes() -> list[dict[str, Any]]:
    return list(YAML(typ="safe").load_all(DEPLOY / "kubernetes.yaml"))
