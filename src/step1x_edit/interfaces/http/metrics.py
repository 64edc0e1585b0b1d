"""The metrics for Prometheus: ended requests, and the current state of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.routing import Match, Route
from starlette.types import Scope

from step1x_edit import __version__
from step1x_edit.channel import GIGA
from step1x_edit.schemas.answers import ReplicaStatus
from step1x_edit.schemas.plan import PlanStatus
from step1x_edit.service.service import EditService

TEXT_FORMAT: Final = CONTENT_TYPE_LATEST

_PREFIX: Final = "step1x_"
_LOCATIONS: Final = ("Unloaded", "CPU", "GPU")
# An edit takes seconds to minutes; the usual buckets end at ten seconds.
_BUCKETS: Final = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, float("inf"))


class Metrics:
    """Counts the requests of one server and reads the rest from its service."""

    def __init__(self, service: EditService) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(service))
        self._requests = Counter(
            f"{_PREFIX}http_requests",
            "Requests that have ended",
            ("path", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            f"{_PREFIX}http_request_seconds",
            "Seconds from the head of a request to the end of its answer",
            ("path",),
            buckets=_BUCKETS,
            registry=self._registry,
        )

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        path = _pattern(scope)
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


def _pattern(scope: Scope) -> str:
    """The pattern of the route that has answered; paths would be too many, and can be secret."""
    route = scope.get("route")
    if route is None and "endpoint" in scope:  # a plain route, which FastAPI does not report
        for each in scope["app"].routes:
            is_it = isinstance(each, Route) and each.endpoint is scope["endpoint"]
            if is_it and each.matches(scope)[0] is not Match.NONE:
                route = each
                break
    return route.path if isinstance(route, Route) else "other"


class _Engine(Collector):
    """Reads the service's counters at each scrape, so that nothing is counted twice."""

    def __init__(self, service: EditService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        status = self._service.status().gpu_status
        yield GaugeMetricFamily(f"{_PREFIX}queue_length", "Edits in the queue", status.queue_length)

        location = GaugeMetricFamily(
            f"{_PREFIX}model_location",
            "1 for the current location of the model",
            labels=["location"],
        )
        for name in _LOCATIONS:
            location.add_metric([name], float(name == status.model_location))
        yield location

        memory = GaugeMetricFamily(
            f"{_PREFIX}gpu_memory_bytes", "GPU memory of the model as measured", labels=["kind"]
        )
        memory.add_metric(["allocated"], status.gpu_memory_allocated_gb * GIGA)
        memory.add_metric(["reserved"], status.gpu_memory_reserved_gb * GIGA)
        yield memory

        yield from _of_plan(status.plan)
        if status.replicas is not None:
            yield from _of_replicas(status.replicas)

        moves = CounterMetricFamily(
            f"{_PREFIX}model_moves", "Loads and moves of the model", labels=["move"]
        )
        for move, count in status.statistics.to_dict().items():
            moves.add_metric([move], count)
        yield moves

        edits = CounterMetricFamily(
            f"{_PREFIX}edits", "Edits that have ended, in all interfaces", labels=["outcome"]
        )
        for outcome, count in self._service.outcomes.items():
            edits.add_metric([outcome], count)
        yield edits

        build = GaugeMetricFamily(f"{_PREFIX}build_info", "The version", labels=["version"])
        build.add_metric([__version__], 1)
        yield build


def _of_plan(plan: PlanStatus | None) -> Iterator[Metric]:
    """How the model is placed; without a model there are no samples."""
    share = GaugeMetricFamily(
        f"{_PREFIX}plan_resident_share", "Share of the core that stays on the device, 0 to 1"
    )
    slots = GaugeMetricFamily(
        f"{_PREFIX}plan_slots", "Slots on the device for streamed blocks; 0 if all stay there"
    )
    peak = GaugeMetricFamily(
        f"{_PREFIX}peak_memory_bytes",
        "Peak memory of an edit, as planned and as measured at the last one",
        labels=["kind"],
    )
    host = GaugeMetricFamily(f"{_PREFIX}host_memory_bytes", "Host memory that holds the weights")
    if plan is not None:
        share.add_metric([], plan.resident_share)
        slots.add_metric([], plan.slots)
        for kind, gb in (
            ("predicted", plan.predicted_peak_gb),
            ("measured", plan.measured_peak_gb),
        ):
            if gb is not None:
                peak.add_metric([kind], gb * GIGA)
        if plan.host_gb is not None:
            host.add_metric([], plan.host_gb * GIGA)
    yield from (share, slots, peak, host)


def _of_replicas(replicas: Sequence[ReplicaStatus]) -> Iterator[Metric]:
    """The state of each replica of a cluster."""
    state = GaugeMetricFamily(
        f"{_PREFIX}replica_state", "1 for the current state", labels=["replica", "state"]
    )
    location = GaugeMetricFamily(
        f"{_PREFIX}replica_model_location",
        "1 for the current location of the model",
        labels=["replica", "location"],
    )
    memory = GaugeMetricFamily(
        f"{_PREFIX}replica_gpu_memory_bytes",
        "GPU memory of the model as measured",
        labels=["replica", "kind"],
    )
    moves = CounterMetricFamily(
        f"{_PREFIX}replica_model_moves", "Loads and moves of the model", labels=["replica", "move"]
    )
    for one in replicas:
        state.add_metric([one.name, one.state], 1)
        location.add_metric([one.name, one.model_location], 1)
        memory.add_metric([one.name, "allocated"], one.gpu_memory_allocated_gb * GIGA)
        memory.add_metric([one.name, "reserved"], one.gpu_memory_reserved_gb * GIGA)
        for move, count in one.statistics.to_dict().items():
            moves.add_metric([one.name, move], count)
    yield from (state, location, memory, moves)
