"""What stands around the services: accounts, who may reach the stages, metrics, the plan, the events, and rights."""

from __future__ import annotations

from dataclasses import replace

from functions.contract import events
from functions.contract.scoring import SCORE
from orchestrator.plan import dump_plan
from orchestrator.render.deployment import Deployment, Surroundings
from orchestrator.render.knative_services import PART_OF, pod_labels
from orchestrator.render.noted import Noted, Tree
from orchestrator.render.weights import is_on_this_machine

# pkg/networking/constants.go of knative/serving
_REQUESTS = (8012, 8112)  # of a pod's queue-proxy, without and with TLS
_LOAD = 9090  # what the autoscaler asks for
_USER_PORT = "user-port"  # how Knative names the container's port

_EVENTS = {
    events.WAKE: "to a stage: load, and say who you are",
    events.WOKEN: "a stage's answer to wake: its blocks, replica, types and memory",
    events.STEP: "to a stage: one pass of a lane through its blocks",
    events.STEPPED: "a stage's answer to step: hidden states, or tokens from the last one",
    events.RELEASE: "to a stage: free the caches of these sequences",
    events.RELEASED: "a stage's answer to release",
    events.RENEW: "to a stage: keep the caches of these sequences",
    events.RENEWED: "a stage's answer to renew: the sequences that it does not hold",
    events.ADOPT: "to a stage: fetch these sequences from a replica that ends",
    events.ADOPTED: "a stage's answer to adopt: what it has of them now",
    events.EXPORT: "to a stage, from another replica of it: keys and values of these sequences",
    events.EXPORTED: "a stage's answer to export",
    events.ERROR: "a stage's answer to what it could not do",
}
_SCORE = "to a stage, and its answer: whole texts on their way through all stages, for scores and embeddings"


def service_account(what: Deployment, role: str) -> Tree:
    """No rights and no token: neither stages nor orchestrator ask Kubernetes for anything."""
    around = what.around or Surroundings()
    metadata: Tree = {
        "name": f"{what.service_name}-{role}",
        "namespace": what.namespace,
        "labels": pod_labels(what, role),
    }
    if around.service_account_annotations:
        note = "the cloud's identity for reading weights"
        metadata["annotations"] = Noted(dict(around.service_account_annotations), note)
    note = f"the {role} asks Kubernetes for nothing: without a token there is nothing to steal, and no Role is needed"
    account: Tree = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}
    if role == "stage" and what.weights.storage_initializer and what.weights.secret:
        account["secrets"] = Noted([{"name": what.weights.secret}], "KServe hands it to the download")
    return {**account, "automountServiceAccountToken": Noted(False, note)}


def plan_config_map(what: Deployment) -> Tree:
    """The plan, for people who wonder later what runs here; without a path that only this machine knows."""
    hidden = what.weights.uri and is_on_this_machine(what.plan.model)
    shown = replace(what.plan, model=what.weights.uri) if hidden else what.plan
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            **_named(what, f"{what.service_name}-plan"),
            "annotations": {"stagecraft.dev/plan": what.plan.digest},
        },
        "data": {"plan.yaml": dump_plan(shown)},
    }


def network_policy(what: Deployment) -> Tree:
    """Only the orchestrator, Knative on its behalf, and each other reach the stages' pods."""
    around = what.around or Surroundings()
    knative = [_namespace(name) for name in ("knative-serving", *around.ingress_namespaces)]
    rules: list[Tree] = [
        {
            "from": [{"podSelector": {"matchLabels": pod_labels(what, "orchestrator")}}],
            "ports": Noted(
                _ports(*_REQUESTS), "straight to a replica's queue-proxy, past nothing that counts or limits"
            ),
        },
        {
            "from": [{"podSelector": {"matchLabels": pod_labels(what, "stage")}}],
            "ports": Noted(_ports(*_REQUESTS), "a replica that ends hands over what it holds to another of its stage"),
        },
        {
            "from": knative,
            "ports": Noted(
                _ports(*_REQUESTS, _LOAD),
                "activator and gateway bring the first event of a lane, the autoscaler asks for the load. Whoever may "
                "use cluster-local services reaches a stage this way too; a service mesh's policy can close it",
            ),
        },
    ]
    if around.pod_monitor:
        rules.append(
            {
                "from": [_namespace(around.monitoring_namespace)],
                "ports": Noted(_ports(8080), "/metrics of the stage itself"),
            }
        )
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _named(what, f"{what.service_name}-stages"),
        "spec": {
            "podSelector": {"matchLabels": pod_labels(what, "stage")},
            "policyTypes": ["Ingress"],
            "ingress": rules,
        },
    }


def pod_monitor(what: Deployment) -> Tree:
    """For the Prometheus operator. It asks the pods: to the service, a scrape would be a request that wakes it."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": _named(what, what.service_name),
        "spec": {
            "selector": {"matchLabels": {**PART_OF, "stagecraft.dev/model": what.service_name}},
            "podMetricsEndpoints": [{"port": _USER_PORT, "path": "/metrics"}],
            "podTargetLabels": ["stagecraft.dev/model", "stagecraft.dev/role", "stagecraft.dev/stage"],
        },
    }


def event_types(what: Deployment) -> list[Tree]:
    """What stages and orchestrator say to each other, for those who browse the cluster's events."""
    return [
        {
            "apiVersion": "eventing.knative.dev/v1beta2",
            "kind": "EventType",
            "metadata": _named(what, f"{what.service_name}-{kind.removeprefix(events.PREFIX + '.').replace('.', '-')}"),
            "spec": {
                "type": kind,
                "description": description,
                **({} if kind in (*events.REQUEST_TYPES, SCORE) else {"source": f"/stagecraft/{what.service_name}"}),
            },
        }
        for kind, description in (_EVENTS | ({SCORE: _SCORE} if what.scoring is not None else {})).items()
    ]


def deployer_role(what: Deployment) -> Tree:
    """The least that `stagecraft deploy`, `undeploy` and `status --cluster` need, in this namespace only."""
    around = what.around or Surroundings()
    writing = ["get", "list", "create", "patch", "delete"]
    rules = [
        ("", ["serviceaccounts", "configmaps"], writing),
        ("", ["pods", "pods/log", "events"], ["get", "list"]),
        ("serving.knative.dev", ["services"], writing),
        ("serving.knative.dev", ["revisions"], ["get", "list"]),
    ]
    if around.network_policy:
        rules.append(("networking.k8s.io", ["networkpolicies"], writing))
    if around.pod_monitor:
        rules.append(("monitoring.coreos.com", ["podmonitors"], writing))
    if around.event_types:
        rules.append(("eventing.knative.dev", ["eventtypes"], writing))
    if "kserve" in (what.stages_as, what.orchestrator_as):
        rules.append(("serving.kserve.io", ["inferenceservices", "servingruntimes"], writing))
    else:  # `status` looks for them where the cluster has KServe
        rules.append(("serving.kserve.io", ["inferenceservices"], ["get", "list"]))
    if what.batch is not None or what.scoring is not None:
        rules.append(("eventing.knative.dev", ["brokers", "triggers"], writing))
    if what.scoring is not None and what.scoring.form == "sequence":
        rules.append(("flows.knative.dev", ["sequences"], writing))
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": _named(what, f"{what.service_name}-deployer"),
        "rules": [{"apiGroups": [group], "resources": names, "verbs": verbs} for group, names, verbs in rules],
    }


def deployer_binding(what: Deployment) -> Tree:
    """Gives the role to the user or ServiceAccount that was named."""
    name = f"{what.service_name}-deployer"
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": _named(what, name),
        "subjects": [_subject((what.around or Surroundings()).deployer)],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
    }


def _subject(who: str) -> Tree:
    parts = who.split(":")
    if parts[:2] == ["system", "serviceaccount"] and len(parts) == 4:
        return {"kind": "ServiceAccount", "namespace": parts[2], "name": parts[3]}
    return {"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": who}


def _named(what: Deployment, name: str) -> Tree:
    labels = {**PART_OF, "stagecraft.dev/model": what.service_name}
    return {"name": name, "namespace": what.namespace, "labels": labels}


def _namespace(name: str) -> Tree:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _ports(*numbers: int) -> list[Tree]:
    return [{"protocol": "TCP", "port": number} for number in numbers]
