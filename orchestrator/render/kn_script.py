"""The same Knative Services as a shell script of `kn service apply` commands.

What kn has a flag for is a flag; what it has none for (probes, time limits beside the first, parts of the security
context, ...) stands in a document that kn reads with --filename and puts the flags on top of.
Flags: knative/client docs/cmd/kn_service_apply.md.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator, Sequence

from orchestrator.render.deployment import Deployment
from orchestrator.render.knative_services import PROGRESS_DEADLINE
from orchestrator.render.noted import Tree, to_yaml

_MARGIN_S = 60  # Knative tells a missed deadline a little later
_DEADLINE = "600s"  # progress-deadline of Knative's config-deployment, for a service that sets none
_VISIBILITY = "networking.knative.dev/visibility"
_SCALE_FLAGS = {
    "autoscaling.knative.dev/min-scale": "--scale-min",
    "autoscaling.knative.dev/max-scale": "--scale-max",
    "autoscaling.knative.dev/initial-scale": "--scale-init",
    "autoscaling.knative.dev/window": "--scale-window",
    "autoscaling.knative.dev/metric": "--scale-metric",
    "autoscaling.knative.dev/target": "--scale-target",  # whole numbers only
}

_HEAD = """#!/bin/sh
{head}
# The services of {name} with kn. Everything else of this folder comes with kubectl, and first:
#
#     kubectl apply -k .
#
# Running it again changes nothing, or brings the services to what stands here. KN=..., KUBECONFIG and options for every
# command can be given: ./deploy.sh --context staging
#
# To remove everything, services first:
#
#     kn service delete --namespace {namespace} {services}
#     kubectl delete -k .
set -eu
KN="${{KN:-kn}}"
"""


def kn_script(what: Deployment, services: Sequence[Tree], head: str) -> str:
    """`services` are plain trees of Knative Services."""
    names = " ".join(one["metadata"]["name"] for one in reversed(services))
    heading = _HEAD.format(head=head, name=what.plan.name, namespace=what.namespace, services=names)
    return heading + "".join(f"\n{_command(one)}" for one in services)


def _command(service: Tree) -> str:
    """`kn service apply` with a here-document."""
    rest = copy.deepcopy(service)
    flags = [" ".join(shlex.quote(part) for part in flag) for flag in _flags(rest)]
    name = service["metadata"]["name"]
    lines = [f'"$KN" service apply {name} --filename /dev/stdin "$@"', *flags]
    return " \\\n  ".join(lines) + f" <<'YAML'\n{to_yaml(rest)}YAML\n"


def _flags(service: Tree) -> Iterator[tuple[str, ...]]:
    """The flags, each with its value; what they say is taken out of `service`."""
    metadata, template = service["metadata"], service["spec"]["template"]
    yield "--namespace", metadata.pop("namespace")
    # kn gives up after 600 s by itself, which would end the script while a large model is still loading
    deadline_s = int(template["metadata"]["annotations"].get(PROGRESS_DEADLINE, _DEADLINE).removesuffix("s"))
    yield "--wait-timeout", str(deadline_s + _MARGIN_S)
    labels = metadata.pop("labels", {})
    if labels.pop(_VISIBILITY, None) == "cluster-local":
        yield ("--cluster-local",)
    yield from _scale_flags(template["metadata"]["annotations"])
    for flag, values in (
        ("--label-service", labels),
        ("--label-revision", template["metadata"].pop("labels", {})),
        ("--annotation-service", metadata.pop("annotations", {})),
        ("--annotation-revision", template["metadata"].pop("annotations", {})),
    ):
        yield from ((flag, f"{name}={value}") for name, value in values.items())
    template.pop("metadata")
    yield from _pod_flags(template["spec"])
    yield from _container_flags(template["spec"]["containers"][0])
    yield from _volume_flags(template["spec"])


def _scale_flags(annotations: Tree) -> Iterator[tuple[str, ...]]:
    for name, flag in _SCALE_FLAGS.items():
        value = annotations.get(name)
        if value is not None and (flag != "--scale-target" or value.isdecimal()):
            yield flag, annotations.pop(name)


def _pod_flags(pod: Tree) -> Iterator[tuple[str, ...]]:
    for field, flag in (
        ("containerConcurrency", "--concurrency-limit"),
        ("timeoutSeconds", "--timeout"),
        ("serviceAccountName", "--service-account"),
    ):
        if field in pod:
            yield flag, str(pod.pop(field))


def _container_flags(container: Tree) -> Iterator[tuple[str, ...]]:
    yield "--image", container.pop("image")
    (port,) = container.pop("ports")
    yield "--port", f"{port['name']}:{port['containerPort']}"
    variables = container.pop("env")
    yield from (("--env", f"{one['name']}={one['value']}") for one in variables)
    for source in container.pop("envFrom", []):
        yield "--env-from", f"secret:{source['secretRef']['name']}"
    for side, flag in (("requests", "--request"), ("limits", "--limit")):
        if quantities := container.get("resources", {}).pop(side, {}):
            yield flag, ",".join(f"{name}={amount}" for name, amount in quantities.items())
    container.pop("resources", None)
    if "runAsUser" in container["securityContext"]:
        yield "--user", str(container["securityContext"].pop("runAsUser"))


def _volume_flags(pod: Tree) -> Iterator[tuple[str, ...]]:
    """kn has flags for volumes in memory and on the node's disk; with any other, all stay in the document."""
    if any(set(volume) != {"name", "emptyDir"} for volume in pod["volumes"]) or "initContainers" in pod:
        return
    for volume in pod.pop("volumes"):
        empty = volume["emptyDir"]
        options = [f"size={empty['sizeLimit']}"] if "sizeLimit" in empty else []
        options += ["type=Memory"] if empty.get("medium") == "Memory" else []
        yield "--volume", ":".join([f"{volume['name']}=ed", volume["name"], ",".join(options)]).rstrip(":")
    for mount in pod["containers"][0].pop("volumeMounts"):
        yield "--mount", f"{mount['mountPath']}={mount['name']}"
