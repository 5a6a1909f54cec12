"""Objects written by server-side apply, all of them checked by the API server before the first is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.cluster.client import Cluster, Kind, Tree
from orchestrator.cluster.errors import ApiError, ClusterError
from orchestrator.cluster.objects import Object

Action = Literal["created", "configured", "unchanged"]

# a cluster without these serves all the same
_OPTIONAL = {"PodMonitor": "the Prometheus operator", "EventType": "Knative Eventing"}
_EVENTING = (
    "Knative Eventing; install it as https://knative.dev/docs/install describes, or render without --batch, --scoring"
)
_REQUIRED = {
    "serving.knative.dev": "Knative Serving; install it as https://knative.dev/docs/install describes",
    "eventing.knative.dev": _EVENTING,
    "flows.knative.dev": _EVENTING,
    "serving.kserve.io": (
        "KServe; install it as https://kserve.github.io/website describes, or render without it: "
        "--stages-as knative --orchestrator-as knative"
    ),
}
_VOLATILE = ("managedFields", "resourceVersion", "generation")


@dataclass(frozen=True, slots=True)
class Placed:
    """An object and where in the cluster it goes."""

    object: Object
    kind: Kind
    namespace: str  # "" for kinds that are in none

    def __str__(self) -> str:
        return str(self.object)


@dataclass(frozen=True, slots=True)
class Skipped:
    """An object that this cluster has no use for."""

    object: Object
    reason: str

    def __str__(self) -> str:
        return f"skipped {self.object}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Located:
    """What can be applied, in the order of the files, and what cannot."""

    placed: tuple[Placed, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of an object."""

    placed: Placed
    action: Action


def locate(cluster: Cluster, objects: Iterable[Object], *, missing_is_fine: bool = False) -> Located:
    """Asks the cluster which of the kinds it serves.

    Raises ClusterError, with what to install, for a kind that it must have (unless `missing_is_fine`)."""
    placed: list[Placed] = []
    skipped: list[Skipped] = []
    problems: dict[str, None] = {}  # as a set that keeps its order
    for one in objects:
        kind = cluster.kind(one.api_version, one.kind)
        if kind is not None:
            placed.append(Placed(one, kind, (one.namespace or cluster.namespace) if kind.namespaced else ""))
        elif one.kind in _OPTIONAL or missing_is_fine:
            owner = _OPTIONAL.get(one.kind) or _REQUIRED.get(one.group, "its API").partition(";")[0]
            skipped.append(Skipped(one, f"the cluster has no {one.kind} in {one.api_version} ({owner})"))
        else:
            problems[_missing(one)] = None
    if problems:
        raise ClusterError(list(problems))
    return Located(tuple(placed), tuple(skipped))


def preflight(cluster: Cluster, placed: Sequence[Placed], *, force: bool = False) -> list[Applied]:
    """What writing would do. Nothing is written.

    Raises ClusterError with the API server's refusals of all objects; Unreachable as soon as it gives no answer."""
    applied: list[Applied] = []
    problems: dict[str, None] = {}
    for one in placed:
        try:
            applied.append(_applied(cluster, one, dry_run=True, force=force))
        except ApiError as error:
            if error.status == 401 or error.heals:  # that is not about this object
                raise
            about_namespace = error.status == 404 and error.kind == "namespaces"
            problems[str(error) if about_namespace else f"{one.object.place}: {one}: {error}"] = None
    if problems:
        raise ClusterError(list(problems))
    return applied


def write(
    cluster: Cluster,
    placed: Sequence[Placed],
    *,
    force: bool = False,
    done: Callable[[Applied], object] = lambda _applied: None,
) -> list[Applied]:
    """Applies one after the other; `done` gets each as soon as it is written.

    Raises ClusterError at the first that fails, which says what is written and what is not."""
    applied: list[Applied] = []
    for one in placed:
        try:
            applied.append(_applied(cluster, one, dry_run=False, force=force))
        except ClusterError as error:
            left = [str(other) for other in placed[len(applied) :]]
            raise ClusterError(
                [
                    *(f"{one}: {problem}" for problem in error.problems),
                    f"{len(applied)} of {len(placed)} objects are written, these are not: {', '.join(left)}; run "
                    "the same command again, which leaves alone what is there already",
                ]
            ) from None
        done(applied[-1])
    return applied


def _applied(cluster: Cluster, one: Placed, *, dry_run: bool, force: bool) -> Applied:
    before = cluster.get(one.kind, one.namespace, one.object.name)
    if before is not None and (since := before["metadata"].get("deletionTimestamp")):
        raise ApiError(409, {"message": f"it is being deleted since {since}; wait until it is gone, then deploy again"})
    after = cluster.apply(one.kind, one.namespace, one.object.name, one.object.tree, dry_run=dry_run, force=force)
    if before is None:
        return Applied(one, "created")
    return Applied(one, "unchanged" if _content(before) == _content(after) else "configured")


def _content(tree: Tree) -> Tree:
    """Without what controllers and the API server write of their own."""
    metadata = {key: value for key, value in tree["metadata"].items() if key not in _VOLATILE}
    return {**{key: value for key, value in tree.items() if key != "status"}, "metadata": metadata}


def _missing(one: Object) -> str:
    what = f"the cluster has no {one.kind} in {one.api_version}"
    if one.group in _REQUIRED:
        return f"{what}, which belongs to {_REQUIRED[one.group]}"
    return f"{what} ({one.place}); install what it belongs to, or take it out of the files"
