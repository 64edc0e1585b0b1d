"""How a cluster shows at the doors: replicas in the status and in the metrics, and a standby."""

from __future__ import annotations

import io
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fake_cluster import FakeCluster
from fakes import FakeWorker
from http_server import TOKEN, calling
from http_server import until as eventually
from server_process import FAKE, started
from step1x_edit.cluster.ray_engine import RayEngine
from step1x_edit.engine.engine import Engine
from step1x_edit.interfaces.cli import app
from step1x_edit.service.estimate import Estimator
from step1x_edit.service.files import FileAccess
from step1x_edit.service.service import EditService
from step1x_edit.settings import Settings


def service_on(cluster: FakeCluster, folder: Path, lanes: int, **options: float) -> EditService:
    settings = Settings(allowed_dirs=(folder,), data_dir=folder, _env_file=None)
    engine = RayEngine(cluster, lanes=lanes, **options)  # type: ignore[arg-type]
    estimator = Estimator(engine, settings, lambda: pytest.fail("a survey"))
    return EditService(engine, FileAccess((folder,), 2**20), settings, estimator)


def edit(client: httpx2.Client, prompt: str = "make it night") -> httpx2.Response:
    file = io.BytesIO()
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(file, "PNG")
    form = {"prompt": prompt, "num_steps": "10"}
    return client.post("/api/edit", data=form, files={"file": ("a.png", file.getvalue())})


def test_status_metrics_and_moves_know_each_replica(tmp_path: Path) -> None:
    cluster = FakeCluster(*(Engine(FakeWorker(device="cuda")) for _ in range(2)))
    service = service_on(cluster, tmp_path, lanes=2)
    with calling(service) as client:
        assert [edit(client).status_code for _ in range(2)] == [200, 200]
        status = client.get("/api/gpu/status").json()["gpu_status"]
        metrics = client.get("/metrics").text
        moved = client.post("/api/gpu/release").json()["gpu_status"]
        shown = CliRunner().invoke(
            app, ["status", "--url", str(client.base_url), "--api-key", TOKEN]
        )
    service.close()

    assert [one["name"] for one in status["replicas"]] == ["replica-0", "replica-1"]
    assert [one["state"] for one in status["replicas"]] == ["idle", "idle"]
    assert [one["statistics"]["total_loads"] for one in status["replicas"]] == [1, 1]
    assert status["statistics"]["total_loads"] == 2
    assert 'step1x_replica_model_location{location="GPU",replica="replica-1"} 1.0' in metrics
    assert [one["model_location"] for one in moved["replicas"]] == ["Unloaded", "Unloaded"]
    assert "replica replica-1        idle, Unloaded" in shown.output


def test_a_server_without_a_cluster_is_alive_but_not_ready(tmp_path: Path) -> None:
    cluster = FakeCluster(Engine(FakeWorker()))
    service = service_on(cluster, tmp_path, lanes=1, look_every_s=0.01, gone_s=0.1)
    with calling(service) as client:
        assert edit(client).status_code == 200
        cluster.fall_silent()

        eventually(lambda: client.get("/readyz").status_code == 503)
        refused = edit(client)
        alive = client.get("/livez").status_code
        cluster.answer_again()
        eventually(lambda: client.get("/readyz").status_code == 200)
    service.close()

    assert alive == 200
    assert refused.status_code == 503
    assert refused.json()["detail"].startswith(
        "Manager not initialized: no edit can run in the Ray cluster: it does not answer"
    )


def test_a_standby_server_takes_the_place_of_one_that_dies(tmp_path: Path) -> None:
    with started(FAKE, tmp_path) as first:
        first.url()
        with started(FAKE, tmp_path, "--standby") as second:
            second.heard("standing by: Invalid settings: ")
            first.popen.kill()
            alive = httpx2.get(f"{second.url()}/livez", trust_env=False)

    assert alive.text == "ok\n"
