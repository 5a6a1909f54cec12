"""`stagecraft status`: what runs on this machine's platform or on a cluster, once."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.console import fail
from orchestrator.cli.platform_client import PlatformOption, connected

if TYPE_CHECKING:
    from rich.console import Console


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as one JSON object instead.")] = False,
    platform: PlatformOption = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Show what stagecraft deploy put onto a cluster instead.")
    ] = False,
    context: Annotated[
        str | None,
        typer.Option(help="With --cluster: context of the kubeconfig; by default the current one.", show_default=False),
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", "-n", help="With --cluster: by default the context's.", show_default=False),
    ] = None,
) -> None:
    """Show the revisions of the platform: replicas, load, and what the autoscaler makes of it.

    ready is ready/desired replicas; stable and panic are the averages over the two windows (concurrency, or requests
    per second), ! marks panic mode; target is what one replica should have; waiting are requests held at the
    activator, in flight those inside the replicas; mode is proxy while requests pass the activator, serve when they do
    not. A narrow terminal shows starting, draining and failed replicas as one column, such as +1 -2 !1.

    On a cluster, replicas are actual/desired of the latest revision.

    [bold]Examples[/]

    stagecraft status

    stagecraft status --json --platform local

    stagecraft status --cluster -n models
    """
    if cluster:
        _show_cluster(platform, context, namespace, as_json)
        return
    for option, value in (("--context", context), ("--namespace", namespace)):
        if value is not None:
            fail(f"{option} goes with --cluster; without it, status is that of this machine's platform", 2)
    with connected(platform) as client:
        seen = client.status()
    if as_json:
        print(json.dumps(seen))
        return
    from orchestrator.cli.status_view import status_view

    result_console().print(status_view(seen))


def _show_cluster(platform: str | None, context: str | None, namespace: str | None, as_json: bool) -> None:
    if platform is not None and "STAGECRAFT_PLATFORM" not in os.environ:
        fail("--platform is of this machine, --cluster of another: give one of them", 2)
    from orchestrator.cli.cluster_view import show_cluster

    show_cluster(context, namespace, as_json, result_console())


def result_console() -> Console:
    """For tables on standard output; in a pipe wide enough that nothing is cut off."""
    from rich.console import Console

    from orchestrator.cli.status_view import WIDTH_WITHOUT_TERMINAL

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=WIDTH_WITHOUT_TERMINAL if wide else None)
