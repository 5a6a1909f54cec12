"""`stagecraft local`: Knative Serving in small on this machine, and what kubectl does with one."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.cli.console import fail, note, write_text
from orchestrator.cli.data_folder import DataDirOption, data_folder
from orchestrator.cli.log_folder import log_folder
from orchestrator.cli.options import duration_s
from orchestrator.cli.platform_client import (
    PlatformOption,
    complete_kind,
    connected,
    full_kind,
    kind_named,
    names_of,
    readable_errors,
)
from orchestrator.cli.running_platform import problems_of, stop_told, tell_problems

if TYPE_CHECKING:
    from knative.client import Client
    from knative.control import Applied
    from knative.images import Command
    from knative.platform import Platform, PlatformSettings
    from knative.registry import Entry
    from knative.resources.documents import Document

Output = Literal["table", "json", "yaml", "name"]

DEFAULT_NAMESPACE = "default"

app = typer.Typer(
    name="local",
    help="Knative Serving in small on this machine: apply the YAML of a cluster, look at it, remove it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


def _complete_name(context: typer.Context, incomplete: str) -> list[str]:
    options = context.params
    namespace = options.get("namespace") or DEFAULT_NAMESPACE
    names = names_of(options.get("kind") or "service", namespace, options.get("platform"))
    return [name for name in names if name.startswith(incomplete)]


FileOption = Annotated[
    list[str] | None,
    typer.Option("--filename", "-f", help="A manifest, a folder of them, or - for standard input; may be repeated."),
]
NamespaceOption = Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the object.")]
KindArgument = Annotated[
    str,
    typer.Argument(
        help="service (ksvc), inferenceservice (isvc), revision (rev), pod (po), configmap (cm), servingruntime, "
        "broker or trigger.",
        autocompletion=complete_kind,
    ),
]


@app.command()
def start(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the ingress; 0 takes any free one.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network.")] = "127.0.0.1",
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the platform's metrics; 0 takes any free one.")
    ] = 0,
    name: Annotated[str, typer.Option(help="Name of this platform, for --platform of the other commands.")] = "local",
    images: Annotated[Path | None, typer.Option(help="YAML table: which command stands for which image.")] = None,
    default_service: Annotated[
        str, typer.Option(help="NAMESPACE/NAME of the service that gets what is addressed to no other.")
    ] = "",
    filename: FileOption = None,
    fork: Annotated[
        bool, typer.Option("--fork/--no-fork", help="Start replicas from a process that has imported torch already.")
    ] = True,
    drain_quiet: Annotated[
        str, typer.Option(help="A replica ends when it had no request for so long; 30s on a cluster.")
    ] = "2s",
    log_dir: Annotated[
        Path | None, typer.Option(help="Keep the logs here; by default in a temporary folder.", show_default=False)
    ] = None,
    data_dir: DataDirOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line when ready, for programs.")] = False,
) -> None:
    """Run a platform on this machine, until Ctrl-C.

    It runs Knative services as processes, from none to many as requests come, and ends them with itself.

    [bold]Examples[/]

    stagecraft local start

    stagecraft local start --name tests --port 0 --images images.yaml -f manifests/

    stagecraft local start --default-service default/orchestrator --drain-quiet 30s
    """
    from knative.platform import PlatformSettings
    from orchestrator.cli.manifests import read_manifests

    with readable_errors():
        documents = read_manifests(filename or [])
    table = _image_table(images)
    quiet_s = duration_s("--drain-quiet", drain_quiet)
    _check_names(name, default_service)
    with log_folder(log_dir) as folder:
        settings = PlatformSettings(
            folder=folder.resolve(),
            name=name,
            host=host,
            port=port,
            metrics_port=metrics_port,
            default_service=default_service,
            images=table,
            fork=fork,
            drain_quiet_s=quiet_s,
            data_folder=data_folder(data_dir, name),
        )
        raise typer.Exit(_run(settings, documents, as_json))


@app.command()
def apply(
    filename: FileOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    wait: Annotated[bool, typer.Option(help="Wait until the services are ready.")] = True,
    timeout: Annotated[str, typer.Option(help="Longest wait, such as 90s or 10m.")] = "10m",
    platform: PlatformOption = None,
) -> None:
    """Create or change objects as manifests say.

    All of the manifests are checked first: if one is refused, nothing is applied.

    [bold]Examples[/]

    stagecraft local apply -f service.yaml

    stagecraft local apply -f manifests/ -f autoscaler.yaml --no-wait

    cat service.yaml | stagecraft local apply -f - --dry-run
    """
    from orchestrator.cli.manifests import read_manifests
    from orchestrator.cli.readiness import wait_ready

    timeout_s = duration_s("--timeout", timeout)
    with readable_errors():
        documents = read_manifests(_needed(filename))
    if not documents:
        fail("there are no objects in what -f names")
    with connected(platform) as client:
        done = client.apply(documents, dry_run=dry_run)
        _print_applied(done, dry_run)
        waited = {kind: _keys(done, kind) for kind in ("service", "inferenceservice")}
        if any(waited.values()) and wait and not dry_run and not _wait(wait_ready, client, waited, timeout_s):
            raise typer.Exit(1)


@app.command()
def get(
    kind: KindArgument,
    name: Annotated[str | None, typer.Argument(help="One object only.", autocompletion=_complete_name)] = None,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of all namespaces.")] = False,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print them.")] = "table",
    platform: PlatformOption = None,
) -> None:
    """List objects, or show one.

    [bold]Examples[/]

    stagecraft local get ksvc

    stagecraft local get pods -A

    stagecraft local get revision demo-00001 -o yaml
    """
    from orchestrator.cli import objects_view as view

    chosen = kind_named(kind)
    if name is not None and all_namespaces:
        fail("one object lies in one namespace: name it with -n instead of -A", 2)
    with connected(platform) as client:
        items = client.get(chosen, None if all_namespaces else namespace)
    if name is not None:
        items = [item for item in items if item["metadata"]["name"] == name]
        if not items:
            fail(f'{full_kind(chosen)} "{name}" not found in namespace {namespace}')
    if output == "name":
        write_text(view.as_names(chosen, items))
    elif output == "table":
        _print_table(view.table(chosen, items, namespaces=all_namespaces) if items else "", namespace, all_namespaces)
    else:
        data: Any = items[0] if name is not None else {"apiVersion": "v1", "kind": "List", "items": items}
        write_text(view.as_json(data) if output == "json" else view.as_yaml(data))


@app.command()
def delete(
    kind: Annotated[str | None, typer.Argument(help="As in `get`.", autocompletion=complete_kind)] = None,
    names: Annotated[list[str] | None, typer.Argument(help="Objects to remove.", autocompletion=_complete_name)] = None,
    filename: FileOption = None,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    platform: PlatformOption = None,
) -> None:
    """Remove objects, and wait until their processes have ended.

    [bold]Examples[/]

    stagecraft local delete ksvc demo

    stagecraft local delete -f manifests/
    """
    if (kind is None) == (not filename) or (kind is not None and not names):
        fail("say what to delete: either KIND NAME, or -f PATH", 2)
    targets = _in_files(filename) if filename else _named(kind or "", namespace, names or [])
    with connected(platform) as client:
        missing = [target for target in targets if not _delete(client, *target)]
    if missing:
        raise typer.Exit(1)


@app.command()
def logs(
    name: Annotated[str, typer.Argument(help="A service, revision or pod.", autocompletion=_complete_name)],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as more is printed, until Ctrl-C.")] = False,
    previous: Annotated[bool, typer.Option("--previous", help="Of the process before the last restart.")] = False,
    tail: Annotated[int | None, typer.Option(min=0, help="So many of the last lines of each replica.")] = None,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    platform: PlatformOption = None,
) -> None:
    """Print what replicas have printed, each line behind the name of its pod.

    [bold]Examples[/]

    stagecraft local logs demo --tail 20

    stagecraft local logs demo-00001 -f
    """
    if follow and previous:
        fail("--previous is of a process that has ended: there is nothing to follow", 2)
    with connected(platform) as client:
        try:
            for text in client.logs(namespace, name, follow=follow, previous=previous, tail=tail):
                write_text(text)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _print_applied(done: Sequence[Applied], dry_run: bool) -> None:
    for one in done:
        if not _took(one):
            note(f"skipped {one.kind.lower()}/{one.name}: {one.note}")
            continue
        print(f"{full_kind(one.kind)}/{one.name} {one.action}{' (dry run)' if dry_run else ''}", flush=True)
        for line in one.note.splitlines():
            note(f"warning: {line}")


def _took(one: Applied) -> bool:
    return one.action != "skipped"


def _keys(done: Sequence[Applied], kind: str) -> list[tuple[str, str]]:
    """Namespace and name of each object of that kind that was taken."""
    return [(one.namespace, one.name) for one in done if _took(one) and full_kind(one.kind) == full_kind(kind)]


def _wait(wait_ready: Any, client: Client, waited: dict[str, list[tuple[str, str]]], timeout_s: float) -> bool:
    try:
        return bool(wait_ready(client, waited["service"], timeout_s, inference_services=waited["inferenceservice"]))
    except KeyboardInterrupt:
        note("not waited to the end; see `stagecraft status`")
        raise typer.Exit(130) from None


def _print_table(text: str, namespace: str, all_namespaces: bool) -> None:
    if text:
        write_text(text)
    else:
        note("no resources found" if all_namespaces else f"no resources found in namespace {namespace}")


def _delete(client: Client, kind: str, namespace: str, name: str) -> bool:
    """Whether there was such an object."""
    from knative.errors import NotFound

    try:
        client.delete(kind, namespace, name)
    except NotFound as error:
        note(f"error: {error}")
        return False
    print(f'{full_kind(kind)} "{name}" deleted', flush=True)
    return True


def _named(kind: str, namespace: str, names: list[str]) -> list[tuple[str, str, str]]:
    chosen = kind_named(kind)
    if chosen in ("revision", "pod"):
        fail(f"a {chosen} goes with its service; delete that, or scale it by its annotations", 2)
    return [(chosen, namespace, name) for name in names]


def _needed(filename: list[str] | None) -> list[str]:
    if not filename:
        fail("name a manifest, a folder of them, or - with -f", 2)
    return filename


def _in_files(filename: list[str]) -> list[tuple[str, str, str]]:
    """Kind, namespace and name of each object in the files, the last first: what came last depends on the others."""
    from orchestrator.cli.manifests import identity, read_manifests

    with readable_errors():
        found = read_manifests(filename)
    return [target for document in reversed(found) if (target := identity(document)) is not None]


def _image_table(images: Path | None) -> dict[str, Command]:
    from knative.images import read_images

    with readable_errors():
        return {} if images is None else read_images(images)


def _check_names(name: str, default_service: str) -> None:
    """Ends the command with 2 when a platform cannot be called `name`, or no service `default_service`."""
    from knative import registry
    from knative.errors import KnativeError

    namespace, _, service = default_service.partition("/")
    if default_service and not (namespace and service and "/" not in service):
        fail(f"--default-service: {default_service!r} is not of the form NAMESPACE/NAME", 2)
    try:
        registry.check_free(name)
    except KnativeError as error:
        fail(str(error), 2)


def _run(settings: PlatformSettings, documents: Sequence[Document], as_json: bool) -> int:
    import uvloop

    from functions.contract.logs import configure_logs

    configure_logs(as_json=not sys.stderr.isatty())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_until_signal(settings, documents, as_json))


async def _until_signal(settings: PlatformSettings, documents: Sequence[Document], as_json: bool) -> int:
    """Runs the platform and returns the exit code. The first signal stops it, a second one without grace."""
    work = asyncio.create_task(_serve(settings, documents, as_json))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    try:
        return await work
    except asyncio.CancelledError:
        return 0


async def _serve(settings: PlatformSettings, documents: Sequence[Document], as_json: bool) -> int:
    from knative.control import control_api
    from knative.errors import KnativeError, Unavailable, ValidationError
    from knative.platform import Platform

    try:
        async with Platform(settings) as platform, control_api(platform, settings.name, settings.folder) as entry:
            applied = await platform.apply(documents) if documents else []
            if as_json:
                print(json.dumps(_facts(entry, platform)), flush=True)
            else:
                _print_applied(applied, dry_run=False)
                print(_banner(entry, platform), flush=True)
            with stop_told(platform):
                await asyncio.Event().wait()
    except KnativeError as error:
        tell_problems(problems_of(error, "--port, --metrics-port or --host"))
        return 2 if isinstance(error, Unavailable | ValidationError) else 1  # another option or manifest heals it
    return 0


def _facts(entry: Entry, platform: Platform) -> dict[str, object]:
    return {
        "name": entry.name,
        "url": entry.url,
        "metrics_url": platform.metrics_url,
        "pid": entry.pid,
        "control": str(entry.socket),
        "log_dir": str(entry.folder),
        "data_dir": str(platform.data_folder),
        "started_at": entry.started_at,
    }


def _banner(entry: Entry, platform: Platform) -> str:
    return f"""
Platform {entry.name} listens at {entry.url}; Ctrl-C stops it and all it runs.

  apply   stagecraft local apply -f service.yaml
  see     stagecraft status, stagecraft top, stagecraft local get ksvc
  metrics {platform.metrics_url}
  logs    {entry.folder}
"""
