"""Objects of a platform as `kubectl get` prints them: plain columns, YAML, JSON or names.

Columns are those of Knative's and KServe's custom resource definitions and of kubectl's own printers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from io import StringIO
from typing import Any

from orchestrator.cli.platform_client import full_kind

Manifest = Mapping[str, Any]
Column = tuple[str, Callable[[Manifest], object]]


def table(kind: str, items: Sequence[Manifest], *, namespaces: bool = False) -> str:
    """Columns for people, with the namespace first if asked for; ends with a line end."""
    columns = ([("NAMESPACE", lambda item: _meta(item, "namespace"))] if namespaces else []) + _COLUMNS[kind]
    rows = [[title for title, _ in columns]]
    rows += [[str(value(item)) for _, value in columns] for item in items]
    return plain_columns(rows)


def plain_columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def as_names(kind: str, items: Sequence[Manifest]) -> str:
    return "".join(f"{full_kind(kind)}/{_meta(item, 'name')}\n" for item in items)


def as_json(data: object) -> str:
    return json.dumps(data, indent=4, ensure_ascii=False) + "\n"


def as_yaml(data: object) -> str:
    from ruamel.yaml import YAML

    out = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 1000  # long commands stay in one line
    yaml.dump(data, out)
    return out.getvalue()


def ready_condition(item: Manifest) -> Mapping[str, Any]:
    """The condition Ready of a Knative object; empty as long as there is none."""
    conditions = item.get("status", {}).get("conditions") or []
    return next((condition for condition in conditions if condition.get("type") == "Ready"), {})


def age(item: Manifest, now: datetime | None = None) -> str:
    """Since the object was made, as kubectl shortens it: 45s, 12m, 5h, 3d."""
    try:
        created = datetime.fromisoformat(str(item["metadata"]["creationTimestamp"]))
    except (KeyError, ValueError):
        return "<unknown>"
    return duration(((now or datetime.now(UTC)) - created.astimezone(UTC)).total_seconds())


def duration(seconds: float) -> str:
    """119s, 9m59s, 179m, 7h59m, 47h, 7d23h, 365d: two units only while the larger is small, as in kubectl."""
    whole = max(0, int(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 120:
        return f"{whole}s"
    if minutes < 10:
        return _two(minutes, "m", whole % 60, "s")
    if hours < 3:
        return f"{minutes}m"
    if hours < 8:
        return _two(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    return _two(days, "d", hours % 24 if days < 8 else 0, "h")


def _two(large: int, large_unit: str, small: int, small_unit: str) -> str:
    return f"{large}{large_unit}" + (f"{small}{small_unit}" if small else "")


def _meta(item: Manifest, field: str) -> str:
    return str(item.get("metadata", {}).get(field, ""))


def _label(name: str) -> Callable[[Manifest], object]:
    return lambda item: item.get("metadata", {}).get("labels", {}).get(f"serving.knative.dev/{name}", "")


def _status(field: str) -> Callable[[Manifest], object]:
    return lambda item: item.get("status", {}).get(field, "")


def _ready(item: Manifest) -> object:
    return ready_condition(item).get("status", "Unknown")


def _reason(item: Manifest) -> object:
    return ready_condition(item).get("reason", "")


def _pod_ready(item: Manifest) -> str:
    return f"{int(_status('phase')(item) == 'ready')}/1"


def _pod_age(item: Manifest) -> str:
    return duration(item.get("status", {}).get("age_s", 0))


def _latest_traffic(item: Manifest) -> object:
    """Percent of the requests that the latest revision gets."""
    traffic = item.get("status", {}).get("components", {}).get("predictor", {}).get("traffic", ())
    return next((target["percent"] for target in traffic if target.get("latestRevision")), "")


def _latest_ready(item: Manifest) -> object:
    return item.get("status", {}).get("components", {}).get("predictor", {}).get("latestReadyRevision", "")


def _address(item: Manifest) -> object:
    return item.get("status", {}).get("address", {}).get("url", "")


def _spec(item: Manifest, field: str) -> Any:
    return item.get("spec", {}).get(field)


def _listed(items: Sequence[Manifest] | None) -> str:
    return ",".join(dict.fromkeys(str(item.get("name", "")) for item in items or ()))


_NAME: Column = ("NAME", lambda item: _meta(item, "name"))
_AGE: Column = ("AGE", age)
_RUNTIME: list[Column] = [
    _NAME,
    ("DISABLED", lambda item: str(_spec(item, "disabled") or "").lower()),
    ("MODELTYPE", lambda item: _listed(_spec(item, "supportedModelFormats"))),
    ("CONTAINERS", lambda item: _listed(_spec(item, "containers"))),
    _AGE,
]
_COLUMNS: dict[str, list[Column]] = {
    "service": [
        _NAME,
        ("URL", _status("url")),
        ("LATESTCREATED", _status("latestCreatedRevisionName")),
        ("LATESTREADY", _status("latestReadyRevisionName")),
        ("READY", _ready),
        ("REASON", _reason),
    ],
    "revision": [
        _NAME,
        ("CONFIG NAME", _label("service")),
        ("GENERATION", lambda item: _meta(item, "generation")),
        ("READY", _ready),
        ("REASON", _reason),
        ("ACTUAL REPLICAS", _status("actualReplicas")),
        ("DESIRED REPLICAS", _status("desiredReplicas")),
    ],
    "pod": [
        _NAME,
        ("READY", _pod_ready),
        ("STATUS", _status("phase")),
        ("RESTARTS", _status("restarts")),
        ("AGE", _pod_age),
    ],
    "inferenceservice": [
        _NAME,
        ("URL", _status("url")),
        ("READY", _ready),
        ("LATEST", _latest_traffic),
        ("LATESTREADYREVISION", _latest_ready),
        _AGE,
    ],
    "servingruntime": _RUNTIME,
    "clusterservingruntime": _RUNTIME,
    "broker": [_NAME, ("URL", _address), _AGE, ("READY", _ready), ("REASON", _reason)],
    "trigger": [
        _NAME,
        ("BROKER", lambda item: _spec(item, "broker")),
        ("SUBSCRIBER_URI", _status("subscriberUri")),
        ("WAITING", lambda item: item.get("status", {}).get("deliveries", {}).get("waiting", "")),
        _AGE,
        ("READY", _ready),
        ("REASON", _reason),
    ],
    "sequence": [
        _NAME,
        ("URL", _address),
        ("WAITING", lambda item: item.get("status", {}).get("deliveries", {}).get("waiting", "")),
        _AGE,
        ("READY", _ready),
        ("REASON", _reason),
    ],
    "configmap": [_NAME, ("DATA", lambda item: len(item.get("data") or {})), _AGE],
}
