"""`stagecraft status --cluster`: the services on a cluster as a table, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from orchestrator.cli.console import note

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.cluster.overview import Row

_STYLES = {"True": "green", "False": "bold red", "Unknown": "yellow"}


def show_cluster(context: str | None, namespace: str | None, as_json: bool, console: Console) -> None:
    """Ends the command with 1 when the cluster cannot be asked."""
    from orchestrator.cli.deploy import cluster_errors
    from orchestrator.cluster import connect, overview

    with cluster_errors(), connect(context, tell=note) as cluster:
        where = namespace or cluster.namespace
        rows = overview(cluster, where)
        if as_json:
            facts = {"context": cluster.context, "server": cluster.server, "namespace": where}
            print(json.dumps({**facts, "services": [asdict(row) for row in rows]}))
        elif rows:
            _print(rows, console)
        else:
            note(f"no services of stagecraft in namespace {where} at {cluster.server}; others are shown with -n")


def _print(rows: Sequence[Row], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from orchestrator.cli.objects_view import age
    from orchestrator.cluster.overview import unready

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("service", "kind", "ready", "reason", "revision", "replicas", "url", "age"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "replicas" else "left")
    for row in rows:
        kind = "isvc" if row.kind == "InferenceService" else "ksvc"
        created = age({"metadata": {"creationTimestamp": row.created}})
        replicas = f"{_number(row.replicas)}/{_number(row.desired)}"
        ready = Text(row.ready, _STYLES.get(row.ready, ""))
        table.add_row(
            Text(row.name), kind, ready, Text(row.reason), Text(row.revision), replicas, Text(row.url), created
        )
    console.print(table)
    for row in unready(rows):
        console.print(Text(f"{row.name}: {row.message}", "yellow"))


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
