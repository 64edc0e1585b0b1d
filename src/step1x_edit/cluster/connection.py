"""A connection to a Ray cluster: the replicas of our application there.

Ray is imported when the connection is opened, never before.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from step1x_edit.channel import Job
from step1x_edit.cluster.ray_engine import Move
from step1x_edit.cluster.replica import Said
from step1x_edit.engine.engine import Replica
from step1x_edit.errors import ModelUnavailableError, SettingsError
from step1x_edit.settings import Settings, keep_ray_quiet

DEPLOYMENT: Final = "EngineReplica"
_NAMESPACE: Final = "serve"
_ANSWER_S: Final = 3.0
"""A replica that has not answered within this time is reported without a state."""

T = TypeVar("T")


def check_installed() -> None:
    """Raise SettingsError if Ray is not installed; it is not imported."""
    if importlib.util.find_spec("ray") is None:
        raise SettingsError(
            "Ray is not installed: ENGINE=ray and `step1x-edit cluster` need the extra `ray` "
            "(pip install 'step1x-edit[ray]')"
        )


def connect(settings: Settings) -> None:
    """Join the Ray cluster of the settings; does nothing if this process has joined it."""
    check_installed()
    keep_ray_quiet()
    import ray

    try:
        ray.init(
            address=settings.ray_address,
            namespace=_NAMESPACE,
            ignore_reinit_error=True,
            log_to_driver=False,
            configure_logging=False,
        )
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelUnavailableError(
            f"there is no Ray cluster at RAY_ADDRESS {settings.ray_address} ({line}); start one "
            "with: ray start --head"
        ) from error


class RayCluster:
    """The replicas of one application of Ray Serve; see `ray_engine.Cluster`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._handle: Any = None
        self._actors: dict[str, Any] = {}
        # Calls that can block for ever if the cluster is gone; each waits for the one before it.
        self._blocking = ThreadPoolExecutor(1, "ray")

    async def run(self, job: Job) -> AsyncGenerator[Said, None]:
        """Edit on a replica as soon as Serve finds a free one."""
        handle = await self._found()
        stream = handle.options(stream=True).run.remote(job)
        try:
            async for said in stream:
                yield said
        finally:
            stream.cancel()  # does nothing to a stream that has ended

    async def look(self) -> Sequence[Replica]:
        """The replicas as they are now; those that start have no state."""
        await self._found()
        actors = await self._in_thread(self._find_actors)
        return await asyncio.gather(*(_state(name, actor) for name, actor in actors.items()))

    async def move(self, move: Move) -> Sequence[Replica]:
        """Move the model of all replicas, each after the edit that it runs."""
        from ray.serve.exceptions import DeploymentUnavailableError

        handle = await self._found()
        try:
            answers = await handle.broadcast(move).results_async(return_exceptions=True)
        except DeploymentUnavailableError:  # there are none
            return []
        return [answer for answer in answers if isinstance(answer, Replica)]

    def close(self) -> None:
        """Leave the cluster, which continues without us."""
        self._blocking.shutdown(wait=False, cancel_futures=True)

    async def _found(self) -> Any:
        if self._handle is None:
            self._handle = await self._in_thread(self._find)
        return self._handle

    def _find(self) -> Any:
        """The handle of the application; raises ModelUnavailableError if it does not exist."""
        connect(self._settings)
        from ray import serve
        from ray.serve.exceptions import RayServeException

        try:
            return serve.get_app_handle(self._settings.ray_app)
        except RayServeException:
            raise ModelUnavailableError(
                f"it has no application {self._settings.ray_app}; create it with: step1x-edit "
                "cluster deploy"
            ) from None

    def _find_actors(self) -> dict[str, Any]:
        """The actors of the replicas, by the ids of these.

        Serve has no call for the state of each replica: its own calls wait for the edit.
        """
        import ray

        beginning = f"SERVE_REPLICA::{self._settings.ray_app}#{DEPLOYMENT}#"
        found = {}
        for name in ray.util.list_named_actors():
            if name.startswith(beginning):
                try:
                    actor = self._actors.get(name) or ray.get_actor(name)
                except ValueError:  # it has ended meanwhile
                    continue
                found[name] = actor
        if not found:  # none is needed now, or the application was removed
            self._handle = self._find()
        self._actors = found
        return {name.removeprefix(beginning): actor for name, actor in found.items()}

    async def _in_thread(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._blocking, work)


async def _state(name: str, actor: Any) -> Replica:
    """The state of a replica, without one if it does not answer: it starts, or it ends."""
    try:
        hook = actor.record_routing_stats.remote()
        answer = await asyncio.wait_for(asyncio.wrap_future(hook.future()), _ANSWER_S)
    except Exception:  # noqa: BLE001 - of any kind of Ray; the next look finds out more
        return Replica(name)
    return Replica(name, answer["replica"].status)
