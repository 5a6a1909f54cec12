"""How commands reach the platform that runs on this machine, and how they end when it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.console import fail, note

if TYPE_CHECKING:
    from knative.client import Client

KINDS = {
    **dict.fromkeys(("service", "services", "ksvc", "kservice", "svc", "services.serving.knative.dev"), "service"),
    **dict.fromkeys(("revision", "revisions", "rev", "revisions.serving.knative.dev"), "revision"),
    **dict.fromkeys(("pod", "pods", "po"), "pod"),
    **dict.fromkeys(("configmap", "configmaps", "cm"), "configmap"),
    **dict.fromkeys(
        ("inferenceservice", "inferenceservices", "isvc", "inferenceservices.serving.kserve.io"), "inferenceservice"
    ),
    **dict.fromkeys(("servingruntime", "servingruntimes", "servingruntimes.serving.kserve.io"), "servingruntime"),
    **dict.fromkeys(
        ("clusterservingruntime", "clusterservingruntimes", "clusterservingruntimes.serving.kserve.io"),
        "clusterservingruntime",
    ),
    **dict.fromkeys(("broker", "brokers", "brokers.eventing.knative.dev"), "broker"),
    **dict.fromkeys(("trigger", "triggers", "triggers.eventing.knative.dev"), "trigger"),
    **dict.fromkeys(("sequence", "sequences", "sequences.flows.knative.dev"), "sequence"),
}
FULL_KINDS = {
    "service": "service.serving.knative.dev",
    "revision": "revision.serving.knative.dev",
    "inferenceservice": "inferenceservice.serving.kserve.io",
    "servingruntime": "servingruntime.serving.kserve.io",
    "clusterservingruntime": "clusterservingruntime.serving.kserve.io",
    "broker": "broker.eventing.knative.dev",
    "trigger": "trigger.eventing.knative.dev",
    "sequence": "sequence.flows.knative.dev",
}


def platform_names() -> list[str]:
    """For shell completion, so it never fails."""
    from knative import registry
    from knative.errors import KnativeError

    try:
        return [entry.name for entry in registry.entries()]
    except KnativeError:
        return []


PlatformOption = Annotated[
    str | None,
    typer.Option(
        help="Which platform; not needed when one runs.",
        envvar="STAGECRAFT_PLATFORM",
        show_default=False,
        autocompletion=platform_names,
    ),
]


@contextmanager
def connected(platform: str | None) -> Iterator[Client]:
    """A client of the platform called so, or of the only one. A KnativeError in the block ends the command with 1."""
    from knative import registry
    from knative.client import Client

    with readable_errors(), Client(registry.find(platform).socket) as client:
        yield client


@contextmanager
def readable_errors() -> Iterator[None]:
    """Ends the command with 1 and a message; a refused manifest's problems are a line each."""
    from knative.errors import KnativeError, ValidationError

    try:
        yield
    except ValidationError as error:
        for problem in error.problems[:-1]:
            note(f"error: {problem}")
        fail(error.problems[-1])
    except KnativeError as error:
        fail(str(error))


def kind_named(text: str) -> str:
    """A kind of control.KINDS, from any of kubectl's names for it. Else ends the command with 2."""
    kind = KINDS.get(text.lower())
    if kind is None:
        fail(
            f"there is no kind {text!r}; there are services (ksvc), revisions (rev), pods (po), configmaps (cm), "
            "inferenceservices (isvc), servingruntimes, clusterservingruntimes, brokers, triggers, sequences",
            2,
        )
    return kind


def full_kind(kind: str) -> str:
    """As kubectl writes it before a name: service.serving.knative.dev."""
    return FULL_KINDS.get(kind.lower(), kind.lower())


def complete_kind(incomplete: str) -> list[str]:
    return [kind for kind in dict.fromkeys(KINDS.values()) if kind.startswith(incomplete)]


def names_of(kind: str, namespace: str, platform: str | None) -> list[str]:
    """Names of objects, for shell completion, so it never fails."""
    from knative import registry
    from knative.client import Client
    from knative.errors import KnativeError

    try:
        with Client(registry.find(platform).socket) as client:
            return [str(item["metadata"]["name"]) for item in client.get(KINDS.get(kind, kind), namespace)]
    except (KnativeError, KeyError):
        return []
