"""Creating, updating and removing the application that holds the replicas."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from step1x_edit.cluster.connection import DEPLOYMENT, connect
from step1x_edit.cluster.replica import ServedReplica
from step1x_edit.engine.engine import StartWorker
from step1x_edit.errors import ModelUnavailableError
from step1x_edit.settings import Settings

_POLL_S: Final = 0.5
_REMOVE_S: Final = 30.0


@dataclass(frozen=True)
class ReplicaNeeds:
    """What each replica takes of its machine."""

    gpus: float
    threads: int


@dataclass(frozen=True)
class ClusterState:
    """The application as Ray Serve sees it."""

    status: str
    replicas: dict[str, int]
    """The number of replicas in each state."""
    message: str


def deploy(
    settings: Settings, needs: ReplicaNeeds, timeout_s: float, start: StartWorker | None = None
) -> ClusterState:
    """Create the application or update it, and wait until it runs.

    Edits that run meanwhile end on the old replicas. Raises ModelUnavailableError if it does not
    run within the time.
    """
    connect(settings)
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    deployment = serve.deployment(
        ServedReplica,
        name=DEPLOYMENT,
        max_ongoing_requests=1,  # a replica edits one picture at a time
        max_queued_requests=-1,  # the line is ours; Serve would refuse edits beside idle replicas
        graceful_shutdown_timeout_s=settings.edit_timeout,
        graceful_shutdown_wait_loop_s=1,
        health_check_period_s=5,
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.ray_min_replicas,
            max_replicas=settings.ray_max_replicas,
            target_ongoing_requests=1,
            upscale_delay_s=1,
        ),
        request_router_config=RequestRouterConfig(request_routing_stats_period_s=3600),
        ray_actor_options={
            "num_gpus": needs.gpus,
            "num_cpus": needs.threads,
            # Ray sets it to 1 for most values of num_cpus; bytes depend on it.
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(needs.threads)}},
        },
    )
    serve.start(proxy_location="Disabled")  # the port of Serve's own HTTP is that of our server
    inside = settings.model_copy(update={"api_key": None, "engine": "local"})
    serve._run(
        deployment.bind(inside, start), name=settings.ray_app, route_prefix=None, _blocking=False
    )
    limit = time.monotonic() + timeout_s
    for state in _states(settings.ray_app):
        if state.status == "RUNNING":
            return state
        if state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ModelUnavailableError(f"the deployment failed: {_last_line(state.message)}")
        if time.monotonic() > limit:
            break
    raise ModelUnavailableError(
        f"the replicas did not start within {timeout_s:g} s; each needs {needs.gpus:g} GPUs and "
        f"{needs.threads} CPUs, and the cluster has {_resources()}; use fewer replicas, --gpus, "
        "--threads, or a higher --timeout"
    )


def state_of(settings: Settings) -> ClusterState | None:
    """The state of the application; None if there is none."""
    connect(settings)
    return next(_states(settings.ray_app), None)


def remove(settings: Settings) -> bool:
    """Remove the application, with the edits that run there; False if there was none."""
    if state_of(settings) is None:
        return False
    from ray import serve

    serve.delete(settings.ray_app, _blocking=False)
    limit = time.monotonic() + _REMOVE_S
    for _ in _states(settings.ray_app):
        if time.monotonic() > limit:
            break
    return True


def _states(app: str) -> Iterator[ClusterState]:
    """The states of an application, until it has gone."""
    from ray import serve

    while (found := serve.status().applications.get(app)) is not None:
        replicas: dict[str, int] = {}
        message = found.message
        for deployment in found.deployments.values():
            message = deployment.message or message
            for name, number in deployment.replica_states.items():
                replicas[str(getattr(name, "value", name))] = number
        yield ClusterState(found.status.value, replicas, message)
        time.sleep(_POLL_S)


def _resources() -> str:
    """The GPUs and CPUs of the cluster, in words."""
    import ray

    found: dict[str, Any] = ray.cluster_resources()
    return f"{found.get('GPU', 0):g} GPUs and {found.get('CPU', 0):g} CPUs"


def _last_line(message: str) -> str:
    return (message.strip().splitlines() or ["Ray's log says more"])[-1]
