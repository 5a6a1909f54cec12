"""Where a batch goes and where its results are: named in options, or found from the platform of this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from orchestrator.cli.console import fail
from orchestrator.cli.platform_client import connected

NAMESPACE = BROKER = "default"
RESULTS_SUFFIX = "-results"


@dataclass(frozen=True, slots=True)
class Addresses:
    """`model` is the one that the platform sends requests of batches to, if that was asked."""

    broker: str
    results: str | None
    model: str | None = None


def addresses(broker: str | None, results: str | None, platform: str | None, *, need_results: bool) -> Addresses:
    """What is not given is asked of the platform. Ends the command: 2 for what is no URL, 1 when none can be found."""
    for option, url in (("--broker", broker), ("--results", results)):
        if url is not None:
            _check_url(option, url)
    if broker is not None and (results is not None or not need_results):
        return Addresses(broker, results)
    found = _of_platform(platform)
    return Addresses(broker or found.broker, results or found.results, found.model if broker is None else None)


def results_address(results: str | None, platform: str | None) -> str:
    """As `addresses`, of the results service alone."""
    if results is not None:
        _check_url("--results", results)
        return results
    found = _of_platform(platform).results
    assert found is not None
    return found


def _of_platform(platform: str | None) -> Addresses:
    """The default broker of the platform, and its one service that ends in -results."""
    with connected(platform) as client:
        url = str(client.status()["platform"]["url"])
        names = [str(service["metadata"]["name"]) for service in client.get("service", NAMESPACE)]
        triggers = client.get("trigger", NAMESPACE)
    found = [name for name in names if name.endswith(RESULTS_SUFFIX)]
    if len(found) != 1:
        which = f"several results services ({', '.join(found)})" if found else "no results service"
        fail(f"the platform at {url} has {which}; name broker and results service with --broker URL and --results URL")
    base = f"{url}/{NAMESPACE}"
    return Addresses(f"{base}/{BROKER}", f"{base}/{found[0]}", _model(triggers))


def _model(triggers: Sequence[Mapping[str, Any]]) -> str | None:
    """The one model that gets requests of batches; None if there is not exactly one."""
    from orchestrator.batches.events import REQUEST

    filters = [(trigger["spec"].get("filter") or {}).get("attributes") or {} for trigger in triggers]
    models = {str(one["model"]) for one in filters if one.get("type") == REQUEST and one.get("model")}
    return models.pop() if len(models) == 1 else None


def _check_url(option: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_url = False
    if not is_url:
        fail(f"{option} must be a URL such as http://127.0.0.1:8080/default/default, got {url!r}", 2)
