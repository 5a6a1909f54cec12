"""`stagecraft deploy` and `undeploy`: rendered files onto a cluster, and off it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.cli.console import err, fail, note
from orchestrator.cli.held_signals import held_signals
from orchestrator.cli.options import duration_s

if TYPE_CHECKING:
    from orchestrator.cluster import Applied, Cluster, Object, Progress, Target
    from orchestrator.cluster.apply import Located, Placed
    from orchestrator.cluster.readiness import Readiness

DryRun = Literal["none", "server"]

FilesArgument = Annotated[
    list[Path],
    typer.Argument(help="What stagecraft render wrote: a folder, or single files.", show_default=False),
]
ContextOption = Annotated[
    str | None, typer.Option(help="Context of the kubeconfig; by default the current one.", show_default=False)
]
PollOption = Annotated[str, typer.Option(help="Time between two looks at the services.", hidden=True)]


def deploy(
    files: FilesArgument,
    context: ContextOption = None,
    wait: Annotated[bool, typer.Option(help="Wait until all services are ready.")] = True,
    timeout: Annotated[
        str | None,
        typer.Option(
            help="Longest wait, such as 90s or 30m; by default the longest progress deadline among the services, "
            "10m at least.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        DryRun, typer.Option(help="server: let the cluster check everything and say what would be done.")
    ] = "none",
    force_conflicts: Annotated[
        bool, typer.Option("--force-conflicts", help="Take over fields that somebody else has set.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead.")] = False,
    poll: PollOption = "1s",
) -> None:
    """Create or change on a cluster what the files say, and wait until it serves.

    The cluster checks all objects first: if it refuses one, nothing is written. Running it again is harmless, and
    goes on waiting. Ctrl-C while it writes is kept until all is written; while it waits, it ends the waiting only.
    A service that is not ready in time is shown with the reason and its last log lines, and the exit code is 1.

    [bold]Examples[/]

    stagecraft deploy deploy/

    stagecraft deploy deploy/ --context production --timeout 30m

    stagecraft deploy deploy/ --dry-run server

    stagecraft deploy deploy/ --no-wait --json
    """
    timeout_s = None if timeout is None else duration_s("--timeout", timeout)
    poll_s = duration_s("--poll", poll)
    with cluster_errors():
        from orchestrator.cluster import connect, read_objects

        objects = read_objects(files)
        with connect(context, tell=note) as cluster:
            located, planned = _checked(cluster, objects, force_conflicts)
            if dry_run == "server":
                _print_planned(cluster, located, planned, as_json)
                return
            applied = _write(cluster, located.placed, force_conflicts, as_json)
            seen = _wait_ready(cluster, applied, timeout_s, poll_s) if wait else {}
            if as_json:
                print(json.dumps(_facts(cluster, located, applied, seen)))
    if any(readiness.state != "ready" for readiness in seen.values()):
        raise typer.Exit(1)


def undeploy(
    files: FilesArgument,
    context: ContextOption = None,
    wait: Annotated[bool, typer.Option(help="Wait until the objects and their pods are gone.")] = True,
    timeout: Annotated[str, typer.Option(help="Longest wait, such as 90s or 30m.")] = "5m",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead.")] = False,
    poll: PollOption = "1s",
) -> None:
    """Delete from a cluster what the files name, the last object first.

    What is not there is passed over. As kubectl delete, it does not ask first.
    Pods are waited for as well: each holds its GPU until it has drained.

    [bold]Examples[/]

    stagecraft undeploy deploy/

    stagecraft undeploy deploy/ --context production --no-wait
    """
    timeout_s, poll_s = duration_s("--timeout", timeout), duration_s("--poll", poll)
    with cluster_errors():
        from orchestrator.cluster import connect, locate, read_objects

        objects = read_objects(files)
        with connect(context, tell=note) as cluster:
            located = locate(cluster, objects, missing_is_fine=True)
            _note_skipped(located)
            deleted, missing = _remove(cluster, located.placed, as_json)
            left = _wait_gone(cluster, deleted, timeout_s, poll_s) if wait else []
            if as_json:
                objects_told = [*_told(deleted, "deleted"), *_told(missing, "not found")]
                print(json.dumps({**_where(cluster), "objects": objects_told, "left": left}))
    if left:
        fail(f"not gone in time: {', '.join(left)}; run the same command again to go on waiting")


@contextmanager
def cluster_errors() -> Iterator[None]:
    """Ends the command with 1 and a line for each problem, of files or of the cluster."""
    from knative.errors import ValidationError
    from orchestrator.cluster.errors import ClusterError

    try:
        yield
    except (ValidationError, ClusterError) as error:
        for problem in error.problems[:-1]:
            note(f"error: {problem}")
        fail(error.problems[-1])


def _checked(cluster: Cluster, objects: Sequence[Object], force: bool) -> tuple[Located, list[Applied]]:
    """What goes where, and what the cluster would do with it. Nothing is written."""
    from orchestrator.cluster import locate, preflight

    try:
        located = locate(cluster, objects)
        _note_skipped(located)
        return located, preflight(cluster, located.placed, force=force)
    except KeyboardInterrupt:
        note("stopped: nothing was written")
        raise typer.Exit(130) from None


def _note_skipped(located: Located) -> None:
    for one in located.skipped:
        note(str(one))


def _print_planned(cluster: Cluster, located: Located, planned: Sequence[Applied], as_json: bool) -> None:
    if as_json:
        print(json.dumps({**_facts(cluster, located, planned, {}), "dry_run": True}))
        return
    for one in planned:
        print(f"{one.placed} {one.action} (server dry run)")


def _write(cluster: Cluster, placed: Sequence[Placed], force: bool, as_json: bool) -> list[Applied]:
    """A signal that comes meanwhile ends the command when all is written, as does a reader of the output that goes."""
    from orchestrator.cluster import write

    broken: list[BrokenPipeError] = []

    def done(one: Applied) -> None:
        if as_json or broken:
            return
        try:
            print(f"{one.placed} {one.action}", flush=True)
        except BrokenPipeError as error:
            broken.append(error)

    with held_signals("finishing what is being written first; once more ends it at once") as held:
        applied = write(cluster, placed, force=force, done=done)
    if held.number:
        note(f"stopped: all {len(applied)} objects are written; {_GO_ON}")
        raise typer.Exit(128 + held.number)
    if broken:
        raise broken[0]
    return applied


_GO_ON = "stagecraft status --cluster shows how they come up, and the same command goes on waiting for them"


def _wait_ready(
    cluster: Cluster, applied: Sequence[Applied], timeout_s: float | None, poll_s: float
) -> dict[Target, Readiness]:
    from orchestrator.cluster import ClusterError, patience_s, targets, wait_ready

    waited_for = targets(applied)
    if not waited_for:
        note("there is nothing to wait for: no service is among the objects")
        return {}
    longest_s = patience_s(waited_for) if timeout_s is None else timeout_s
    try:
        with _progress() as progress:
            seen = wait_ready(cluster, waited_for, longest_s, progress, poll_s=poll_s)
    except KeyboardInterrupt:
        note(f"stopped waiting: the objects stay; {_GO_ON}")
        raise typer.Exit(130) from None
    except ClusterError as error:
        raise ClusterError([*error.problems, f"all objects are written; {_GO_ON}"]) from None
    for target, (readiness, why) in seen.items():
        if readiness.state != "ready":
            _tell_trouble(f"{target} is not ready after {longest_s:g} s: {readiness}", why)
    return {target: readiness for target, (readiness, _why) in seen.items()}


@contextmanager
def _progress() -> Iterator[Progress]:
    """A live line for each service in a terminal; otherwise one for each change."""
    from rich.text import Text

    from orchestrator.cluster import Progress

    def changed(target: Target, now: Readiness) -> None:
        if now.state == "ready":
            note(f"{target} is ready{f' at {now.url}' if now.url else ''}")
        elif not err.is_terminal and now.state == "waiting":
            note(f"{target}: {now}")

    def failing(target: Target, now: Readiness, why: Sequence[str]) -> None:
        _tell_trouble(f"{target} is failing, which may heal: {now}", why)

    if not err.is_terminal:
        yield Progress(changed, failing)
        return
    with err.status("") as status:

        def show(seen: Mapping[Target, Readiness]) -> None:
            lines = [f"{target}: {now}" for target, now in seen.items() if now.state != "ready"]
            status.update(Text("\n".join(lines), overflow="ellipsis", no_wrap=True))

        yield Progress(changed, failing, show)


def _tell_trouble(headline: str, why: Sequence[str]) -> None:
    note("\n".join([headline, *(f"  {line}" for line in why)]))


def _remove(cluster: Cluster, placed: Sequence[Placed], as_json: bool) -> tuple[list[Placed], list[Placed]]:
    """What was there and what was not."""
    from orchestrator.cluster import remove

    missing: list[Placed] = []

    def done(one: Placed, found: bool) -> None:
        if not found:
            missing.append(one)
        if not as_json:
            print(f"{one} {'deleted' if found else 'not found'}", flush=True)

    with held_signals("finishing what is being deleted first; once more ends it at once") as held:
        deleted = remove(cluster, placed, done)
    if held.number:
        note("stopped: all objects are deleted; their pods may still be draining")
        raise typer.Exit(128 + held.number)
    return deleted, missing


def _wait_gone(cluster: Cluster, deleted: Sequence[Placed], timeout_s: float, poll_s: float) -> list[str]:
    """What is still there when the time is over."""
    from rich.text import Text

    from orchestrator.cluster import wait_gone

    try:
        with err.status("") as status:

            def show(left: Sequence[str]) -> None:
                status.update(Text(f"waiting for {', '.join(left)}", overflow="ellipsis", no_wrap=True))

            return wait_gone(cluster, deleted, timeout_s, show, poll_s=poll_s)
    except KeyboardInterrupt:
        note("stopped waiting: the objects are deleted; their pods may still be draining")
        raise typer.Exit(130) from None


def _facts(
    cluster: Cluster, located: Located, applied: Sequence[Applied], seen: Mapping[Target, Readiness]
) -> dict[str, Any]:
    return {
        **_where(cluster),
        "objects": [fact for one in applied for fact in _told([one.placed], one.action)],
        "skipped": [{"object": str(one.object), "reason": one.reason} for one in located.skipped],
        "services": [
            {
                "name": target.name,
                "namespace": target.namespace,
                "kind": target.kind.kind,
                "ready": readiness.state == "ready",
                "reason": readiness.reason,
                "message": readiness.message,
                "url": readiness.url,
                "revision": readiness.revision,
            }
            for target, readiness in seen.items()
        ],
    }


def _where(cluster: Cluster) -> dict[str, str]:
    return {"context": cluster.context, "server": cluster.server}


def _told(placed: Sequence[Placed], action: str) -> list[dict[str, str]]:
    return [
        {
            "apiVersion": one.object.api_version,
            "kind": one.object.kind,
            "namespace": one.namespace,
            "name": one.object.name,
            "action": action,
        }
        for one in placed
    ]
