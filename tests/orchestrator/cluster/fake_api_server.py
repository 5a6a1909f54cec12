"""An API server in small, over HTTP: what server-side apply, refusals and a controller's status look like to clients.

Reduced to what matters here: leaf fields have owners, lists are leaves (as in custom resources without list types);
what changes counts `resourceVersion`, what changes outside of metadata and status counts `generation`; looking at a
service makes the controller take a step. `python fake_api_server.py KUBECONFIG` runs one to try kubectl against.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Tree = dict[str, Any]
Path_ = tuple[str, ...]

KINDS = {
    "v1": {"ServiceAccount": "serviceaccounts", "ConfigMap": "configmaps", "Pod": "pods", "Event": "events"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies"},
    "rbac.authorization.k8s.io/v1": {"Role": "roles", "RoleBinding": "rolebindings"},
    "serving.knative.dev/v1": {"Service": "services", "Revision": "revisions"},
    "serving.kserve.io/v1beta1": {"InferenceService": "inferenceservices"},
    "serving.kserve.io/v1alpha1": {"ServingRuntime": "servingruntimes"},
    "monitoring.coreos.com/v1": {"PodMonitor": "podmonitors"},
    "eventing.knative.dev/v1beta2": {"EventType": "eventtypes"},
}
SERVICES = ("serving.knative.dev/v1", "services")
INFERENCE_SERVICES = ("serving.kserve.io/v1beta1", "inferenceservices")
TOKEN = "s3cret"
REASONS = {400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 422: "Invalid"}


class Answer(Exception):
    """An answer other than the object that was asked for."""

    def __init__(self, status: int, message: str, *, headers: dict[str, str] | None = None, **details: Any) -> None:
        self.status = status
        self.headers = headers or {}
        self.body = {
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "message": message,
            "reason": REASONS.get(status, "InternalError"), "details": details,
        }  # fmt: skip


@dataclass
class Record:
    """An object and who set which of its fields."""

    tree: Tree
    owners: dict[str, set[Path_]] = field(default_factory=dict)
    looks: int = 0  # how often the controller saw this generation


@dataclass
class Fate:
    """What becomes of a service: Ready after so many looks, or never, with these conditions and pods."""

    ready_after: int = 1
    reason: str = ""  # of Ready=False
    message: str = ""
    pods: list[Tree] = field(default_factory=list)


class Cluster:
    """What is stored, and what the tests make of it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.kinds = copy.deepcopy(KINDS)
        self.namespaces = {"default", "models"}
        self.records: dict[tuple[str, str, str, str], Record] = {}
        self.version = 100
        self.fates: dict[str, Fate] = {}
        self.logs: dict[tuple[str, str, bool], str] = {}  # pod, container, of the run before
        self.kserve_lag = 0  # looks at an InferenceService until KServe has seen a change
        self.drain_looks = 0  # how often a deleted service's pods are still there
        self.denied: dict[tuple[str, str], Callable[[], Answer]] = {}  # method, plural
        self.webhook: Callable[[Tree], str | None] = lambda _tree: None
        self.warning = ""
        # by method and path: an error, bytes instead of an answer, or "close" to drop the connection
        self.faults: list[Callable[[str, str], Answer | bytes | str | None]] = []
        self.delay_s: dict[str, float] = {}  # by method
        self.requests: list[str] = []  # method and path with query

    def writes(self) -> list[str]:
        """What was asked for that changes something."""
        return [one for one in self.requests if not one.startswith("GET ") and "dryRun=All" not in one]

    def put(self, api_version: str, plural: str, tree: Tree, manager: str = "test") -> None:
        """As if somebody else had applied it."""
        metadata = tree["metadata"]
        self.apply(
            api_version, plural, metadata.get("namespace", "default"), metadata["name"], tree, manager, True, False
        )

    def names(self, plural: str) -> list[str]:
        return sorted(key[3] for key in self.records if key[1] == plural)

    def tree(self, plural: str, name: str) -> Tree:
        return next(one.tree for key, one in self.records.items() if (key[1], key[3]) == (plural, name))

    # -- what requests do ----------------------------------------------------------------------------------------

    def get(self, api_version: str, plural: str, namespace: str, name: str) -> Tree:
        record = self.records.get((api_version, plural, namespace, name))
        if record is None:
            raise _not_found(api_version, plural, name)
        self._reconcile(api_version, plural, record)
        return record.tree

    def list(self, api_version: str, plural: str, namespace: str, labels: str, fields: str) -> Tree:
        if plural == "pods":
            self._drain()
        items = []
        for key, record in list(self.records.items()):
            if key[:3] == (api_version, plural, namespace):
                self._reconcile(api_version, plural, record)
                if _selected(record.tree, labels, fields):
                    items.append(record.tree)
        kind = next(kind for kind, name in self.kinds[api_version].items() if name == plural)
        return {"apiVersion": api_version, "kind": f"{kind}List", "metadata": {}, "items": items}

    def delete(self, api_version: str, plural: str, namespace: str, name: str) -> Tree:
        record = self.records.pop((api_version, plural, namespace, name), None)
        if record is None:
            raise _not_found(api_version, plural, name)
        if plural == "inferenceservices":
            self.records.pop(("serving.knative.dev/v1", "services", namespace, f"{name}-predictor"), None)
        return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def apply(
        self, api_version: str, plural: str, namespace: str, name: str, tree: Tree, manager: str, force: bool, dry: bool
    ) -> Tree:
        if namespace not in self.namespaces:
            raise Answer(404, f'namespaces "{namespace}" not found', name=namespace, kind="namespaces")
        if refusal := self.webhook(tree):
            raise Answer(400, refusal)
        key = (api_version, plural, namespace, name)
        before = self.records.get(key)
        record = copy.deepcopy(before) if before else self._created(api_version, namespace, name, tree)
        record.tree["kind"] = tree["kind"]
        old = copy.deepcopy(record.tree)
        _merge(record, dict(_leaves(tree)), manager, force, api_version)
        if _spec(record.tree) != _spec(old) or before is None:
            record.tree["metadata"]["generation"] = old["metadata"].get("generation", 0) + 1
            record.looks = 0
        if record.tree != old or before is None:
            if dry:
                return record.tree
            self.version += 1
            record.tree["metadata"]["resourceVersion"] = str(self.version)
        if not dry:
            self.records[key] = record
        return record.tree

    def _created(self, api_version: str, namespace: str, name: str, tree: Tree) -> Record:
        metadata = {"name": name, "namespace": namespace, "uid": f"uid-{self.version}", "creationTimestamp": _now()}
        return Record({"apiVersion": api_version, "kind": tree["kind"], "metadata": metadata})

    # -- the controllers -------------------------------------------------------------------------------------------

    def _reconcile(self, api_version: str, plural: str, record: Record) -> None:
        if (api_version, plural) == SERVICES:
            self._service(record)
        elif (api_version, plural) == INFERENCE_SERVICES:
            self._inference_service(record)

    def _service(self, record: Record) -> None:
        metadata = record.tree["metadata"]
        name, namespace = metadata["name"], metadata["namespace"]
        fate = self.fates.get(name, Fate())
        record.looks += 1
        if record.looks == 1:
            return  # the controller has not seen it yet
        revision = f"{name}-{metadata['generation']:05}"
        ready = record.looks > fate.ready_after and not fate.reason
        state = "True" if ready else "False" if fate.reason and record.looks > fate.ready_after else "Unknown"
        said = {"reason": fate.reason, "message": fate.message} if state == "False" else {}
        said = said or ({} if ready else {"reason": "Deploying", "message": f'Waiting for revision "{revision}"'})
        record.tree["status"] = {
            "observedGeneration": metadata["generation"],
            "latestCreatedRevisionName": revision,
            "url": f"http://{name}.{namespace}.example.com",
            "conditions": [{"type": "Ready", "status": state, **said}],
        }
        self.version += 1
        metadata["resourceVersion"] = str(self.version)
        self._store("serving.knative.dev/v1", "revisions", _revision(name, revision, namespace, int(ready)))
        for pod in fate.pods:
            labels = {"serving.knative.dev/revision": revision, "serving.knative.dev/service": name}
            pod = {**pod, "metadata": {"name": f"{revision}-deployment-x", "namespace": namespace, "labels": labels}}
            self._store("v1", "pods", pod)

    def _inference_service(self, record: Record) -> None:
        metadata = record.tree["metadata"]
        name, namespace = metadata["name"], metadata["namespace"]
        below = f"{name}-predictor"
        record.looks += 1
        if record.looks <= self.kserve_lag and metadata["generation"] > 1:
            return
        template = {"metadata": {"annotations": {"of-generation": str(metadata["generation"])}}}
        labels = {**metadata.get("labels", {}), "serving.kserve.io/inferenceservice": name}
        tree = {"kind": "Service", "metadata": {"labels": labels}, "spec": {"template": template}}
        self.apply(*SERVICES, namespace, below, tree, "manager", True, False)
        status = self.get(*SERVICES, namespace, below).get("status", {})
        if not status:
            return
        ready = status["conditions"][0]
        url = {"url": f"http://{below}.{namespace}.example.com"} if ready["status"] == "True" else {}
        record.tree["status"] = {
            **url,
            "observedGeneration": status["observedGeneration"] + 7,  # that of a child: it tells nothing
            "conditions": [
                {**ready, "type": "PredictorReady"},
                {"type": "Ready", "status": ready["status"]},
            ],
            "components": {"predictor": {"latestCreatedRevision": status["latestCreatedRevisionName"]}},
        }

    def _store(self, api_version: str, plural: str, tree: Tree) -> None:
        metadata = tree["metadata"]
        self.records[(api_version, plural, metadata["namespace"], metadata["name"])] = Record(tree)

    def _drain(self) -> None:
        """The pods of deleted services go, after `drain_looks` looks."""
        services = {key[3] for key in self.records if key[1] == "services"}
        for key, record in list(self.records.items()):
            owner = record.tree["metadata"].get("labels", {}).get("serving.knative.dev/service")
            if key[1] == "pods" and owner not in services:
                record.looks += 1
                if record.looks > self.drain_looks:
                    del self.records[key]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        self._handle()

    def do_PATCH(self) -> None:
        self._handle()

    def do_DELETE(self) -> None:
        self._handle()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        cluster = self.server.cluster
        time.sleep(cluster.delay_s.get(self.command, 0))
        try:
            with cluster.lock:
                cluster.requests.append(f"{self.command} {self.path}")
                for fault in list(cluster.faults):
                    happens = fault(self.command, self.path)
                    if isinstance(happens, Answer):
                        raise happens
                    if isinstance(happens, bytes):
                        self._send(200, happens, {})
                        return
                    if happens == "close":
                        self.close_connection = True
                        return
                # kubectl sends no token over a connection that is not encrypted
                if self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
                    raise Answer(401, "Unauthorized")
                status, found = self._found(body)
                data = found.encode() if isinstance(found, str) else json.dumps(found).encode()
            headers = {"Warning": f'299 - "{cluster.warning}"'} if cluster.warning and self.command == "PATCH" else {}
            self._send(status, data, headers)
        except Answer as answer:
            self._send(answer.status, json.dumps(answer.body).encode(), answer.headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _found(self, body: bytes) -> tuple[int, Tree | str]:
        cluster = self.server.cluster
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] == "api":
            api_version, rest = "v1", parts[2:]
        else:
            api_version, rest = "/".join(parts[1:3]), parts[3:]
        if len(parts) == 1 or not rest:
            return 200, self._discovery(parts, api_version)
        if rest[0] == "namespaces" and len(rest) == 2:
            return 200, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": rest[1]}}
        _, namespace, plural, *name = rest
        if plural not in cluster.kinds.get(api_version, {}).values():
            raise Answer(404, "the server could not find the requested resource")
        if make := cluster.denied.get((self.command, plural)):
            raise make()
        where = (api_version, plural, namespace)
        if name[1:] == ["log"]:
            return 200, self._log(name[0], query)
        if self.command == "DELETE":
            return 200, cluster.delete(*where, name[0])
        if self.command == "PATCH":
            existed = (*where, name[0]) in cluster.records
            dry = query.get("dryRun") == "All"
            force = query.get("force") == "true"
            assert self.headers["Content-Type"] == "application/apply-patch+yaml"
            tree = cluster.apply(*where, name[0], yaml.safe_load(body), query["fieldManager"], force, dry)
            return 200 if existed else 201, tree
        if name:
            return 200, cluster.get(*where, name[0])
        return 200, cluster.list(*where, query.get("labelSelector", ""), query.get("fieldSelector", ""))

    def _log(self, pod: str, query: dict[str, str]) -> str:
        text = self.server.cluster.logs.get((pod, query["container"], query.get("previous") == "true"))
        if text is None:
            raise Answer(400, f'previous terminated container "{query["container"]}" in pod "{pod}" not found')
        return "".join(text.splitlines(keepends=True)[-int(query["tailLines"]) :])

    def _discovery(self, parts: list[str], api_version: str) -> Tree:
        kinds = self.server.cluster.kinds
        if parts == ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        if parts == ["apis"]:
            groups = [_group(one) for one in kinds if "/" in one]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        if api_version not in kinds:
            raise Answer(404, "the server could not find the requested resource")
        verbs = ["get", "list", "create", "patch", "delete"]
        resources = [
            {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
            for kind, plural in kinds[api_version].items()
        ]
        resources += [{**one, "name": f"{one['name']}/status"} for one in resources]
        return {"kind": "APIResourceList", "groupVersion": api_version, "resources": resources}


class Server(ThreadingHTTPServer):
    """Listens on a free port of the loopback as soon as it is made; `address` is what a kubeconfig says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cluster = Cluster()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def kubeconfig(self, file: Path, *, token: str = TOKEN, namespace: str = "models") -> Path:
        """Writes one with two contexts, "fake" (the current one) and "other"."""
        contexts = [
            {"name": name, "context": {"cluster": "fake", "user": "me", "namespace": namespace}}
            for name in ("fake", "other")
        ]
        tree = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.address}}],
            "users": [{"name": "me", "user": {"token": token}}],
            "contexts": contexts,
        }
        file.write_text(yaml.safe_dump(tree))
        return file


def _merge(record: Record, applied: dict[Path_, Any], manager: str, force: bool, api_version: str) -> None:
    others = {name: paths for name, paths in record.owners.items() if name != manager}
    conflicts = []
    for path, value in applied.items():
        for other, paths in others.items():
            if path in paths and _at(record.tree, path) != value:
                conflicts.append((other, path))
    if conflicts and not force:
        raise _conflict(conflicts, api_version)
    for other, path in conflicts:
        others[other].discard(path)
    still = set().union(*others.values()) if others else set()
    for path in record.owners.get(manager, set()) - set(applied) - still:
        _remove(record.tree, path)
    for path, value in applied.items():
        _set(record.tree, path, value)
    record.owners[manager] = set(applied)


def _conflict(conflicts: list[tuple[str, Path_]], api_version: str) -> Answer:
    causes = [
        {
            "reason": "FieldManagerConflict",
            "message": f'conflict with "{other}" using {api_version}',
            "field": "." + ".".join(path),
        }
        for other, path in conflicts
    ]
    words = ", ".join(f"{one['message']}: {one['field']}" for one in causes)
    return Answer(409, f"Apply failed with {len(causes)} conflict(s): {words}", causes=causes)


def _leaves(tree: Tree, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    for key, value in tree.items():
        here = (*path, key)
        if here in (("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace"), ("status",)):
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, here)
        else:
            yield here, value


def _at(tree: Any, path: Path_) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _set(tree: Tree, path: Path_, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = copy.deepcopy(value)


def _remove(tree: Tree, path: Path_) -> None:
    parent = _at(tree, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def _spec(tree: Tree) -> Tree:
    return {key: value for key, value in tree.items() if key not in ("metadata", "status")}


def _selected(tree: Tree, labels: str, fields: str) -> bool:
    has = tree["metadata"].get("labels", {})
    if fields == "type=Warning" and tree.get("type") != "Warning":
        return False
    if found := re.fullmatch(r"(\S+) in \((.*)\)", labels):
        return has.get(found[1]) in found[2].split(",")
    return all(has.get(key) == value for key, _, value in (one.partition("=") for one in labels.split(",") if one))


def _not_found(api_version: str, plural: str, name: str) -> Answer:
    group = api_version.rpartition("/")[0]
    resource = f"{plural}.{group}" if group else plural
    return Answer(404, f'{resource} "{name}" not found', name=name, group=group, kind=plural)


def _group(api_version: str) -> Tree:
    group, _, version = api_version.partition("/")
    one = {"groupVersion": api_version, "version": version}
    return {"name": group, "versions": [one], "preferredVersion": one}


def _revision(service: str, name: str, namespace: str, replicas: int) -> Tree:
    labels = {"serving.knative.dev/service": service}
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Revision",
        "metadata": metadata,
        "status": {"actualReplicas": replicas, "desiredReplicas": 1},
    }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


if __name__ == "__main__":
    with Server() as running:
        print(running.address, running.kubeconfig(Path(sys.argv[1])), flush=True)
        running.serve_forever()
