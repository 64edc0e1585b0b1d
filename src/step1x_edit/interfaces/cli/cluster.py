"""The commands that create, show and remove the replicas of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from step1x_edit.interfaces.cli.options import AsJson
from step1x_edit.interfaces.cli.terminal import (
    cli_settings,
    failures_on_stderr,
    out,
    print_json,
    print_line,
)
from step1x_edit.interfaces.cli.usage import HELP_NAMES, Command

if TYPE_CHECKING:
    from step1x_edit.cluster.deploying import ClusterState
    from step1x_edit.settings import Settings

cluster_app = typer.Typer(
    help="Create, show and remove the replicas that edit in a Ray cluster (ENGINE=ray).",
    context_settings=HELP_NAMES,
    no_args_is_help=True,
)


@cluster_app.command(cls=Command)
def deploy(
    min_replicas: Annotated[
        int | None,
        typer.Option(help="Overrides RAY_MIN_REPLICAS", min=0, show_default=False),
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(help="Overrides RAY_MAX_REPLICAS", min=1, show_default=False),
    ] = None,
    gpus: Annotated[float, typer.Option(help="GPUs of each replica", min=0)] = 1,
    threads: Annotated[
        int, typer.Option(help="CPU threads of each replica; bytes depend on it", min=1)
    ] = 4,
    timeout: Annotated[
        float, typer.Option(help="Seconds within which the replicas must run", min=1)
    ] = 300,
    as_json: AsJson = False,
) -> None:
    """Create the replicas, or replace them by new ones with these settings.

    Edits that run meanwhile end on the old replicas. A server with ENGINE=ray
    runs its edits on them.
    """
    with failures_on_stderr(as_json):
        settings = cli_settings(
            {"ray_min_replicas": min_replicas, "ray_max_replicas": max_replicas}
        )
        from step1x_edit.cluster.deploying import ReplicaNeeds
        from step1x_edit.cluster.deploying import deploy as create

        state = create(settings, ReplicaNeeds(gpus, threads), timeout)
        _print(settings, state, as_json)


@cluster_app.command(cls=Command)
def status(as_json: AsJson = False) -> None:
    """Show how many replicas there are, and in which state."""
    with failures_on_stderr(as_json):
        settings = cli_settings()
        from step1x_edit.cluster.deploying import state_of

        _print(settings, state_of(settings), as_json)


@cluster_app.command(cls=Command)
def remove(as_json: AsJson = False) -> None:
    """Remove the replicas, after the edits that they run."""
    with failures_on_stderr(as_json):
        settings = cli_settings()
        from step1x_edit.cluster.deploying import remove as delete

        was_there = delete(settings)
        if as_json:
            print_json({"status": "success", "app": settings.ray_app, "removed": was_there})
        else:
            what = "Removed" if was_there else "Nothing to remove:"
            print_line(f"{what} application {settings.ray_app}")


def _print(settings: Settings, state: ClusterState | None, as_json: bool) -> None:
    if as_json:
        found = None if state is None else {"state": state.status, "replicas": state.replicas}
        print_json({"status": "success", "app": settings.ray_app, "cluster": found})
        return
    if state is None:
        print_line(f"There is no application {settings.ray_app}: step1x-edit cluster deploy")
        return
    for name, value in _rows(settings, state):
        out.print(f"{name:<12} {value}", markup=False)


def _rows(settings: Settings, state: ClusterState) -> Iterator[tuple[str, str]]:
    yield "application", settings.ray_app
    yield "state", state.status.lower()
    numbers = (f"{number} {name.lower()}" for name, number in state.replicas.items() if number)
    yield "replicas", ", ".join(numbers) or "none"
    if state.message:
        yield "message", state.message
