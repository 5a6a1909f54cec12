"""Rendered files on a cluster: applied, waited for, looked at, deleted, through its API server.

with connect(context) as cluster:
    placed = locate(cluster, read_objects([Path("deploy/")])).placed
    preflight(cluster, placed)
    write(cluster, placed)
"""

from __future__ import annotations

from orchestrator.cluster.apply import Applied, locate, preflight, write
from orchestrator.cluster.client import Cluster, connect
from orchestrator.cluster.errors import ApiError, ClusterError, Unreachable
from orchestrator.cluster.objects import Object, read_objects
from orchestrator.cluster.overview import overview
from orchestrator.cluster.remove import remove, wait_gone
from orchestrator.cluster.watch import Progress, Target, patience_s, targets, wait_ready

__all__ = [
    "ApiError",
    "Applied",
    "Cluster",
    "ClusterError",
    "Object",
    "Progress",
    "Target",
    "Unreachable",
    "connect",
    "locate",
    "overview",
    "patience_s",
    "preflight",
    "read_objects",
    "remove",
    "targets",
    "wait_gone",
    "wait_ready",
    "write",
]
