"""The pods of a deployment: one for each stage, one for the orchestrator, whoever starts them.

A pod here is what is the same for a Knative Service and an InferenceService: container, volumes, the fields about
scheduling, and the time limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from knative.resources.quantities import parse_cpus, parse_memory_bytes
from orchestrator.cost import Cost
from orchestrator.render.deployment import Batch, Deployment, DeploymentError, Resources, Toleration
from orchestrator.render.noted import Noted, Tree
from orchestrator.render.weights import Weights, weights
from orchestrator.step_times import step_times_text
from orchestrator.targets import CPU

STAGE_IMAGE = "stagecraft/stage"
ORCHESTRATOR_IMAGE = "stagecraft/orchestrator"
RESULTS_IMAGE = "stagecraft/results"
USER = 65532  # of the images, see functions/Dockerfile
PORT = 8080

_CPU = "2"  # of a stage

_GIB = 1 << 30
_RUNTIME_BYTES = 3 * _GIB // 2  # torch, Transformers and the buffers of a step, on a CPU
_GPU_HOST_BYTES = 4 * _GIB  # the same with CUDA's libraries
_ON_THEIR_WAY = 8  # weights pass through host memory, up to four tensors at once; an embedding is the largest of them
_KV_BYTES_MAX = 4 * _GIB
# of orchestrator/settings.py
_STEP_TIMEOUT_S = 120
_STEP_TOKENS = 512
_STEP_SLACK = 3
_RESULTS_FOLDER = "/var/lib/stagecraft"
_FETCH_BYTES_PER_S = 50_000_000  # of weights over a network, to be on the safe side
_SIGNING_FOLDER, _API_KEYS_FOLDER = "/etc/stagecraft/signing", "/etc/stagecraft/api-keys"
_KEYS = "keys"  # of the Secrets, and the name of the file
_TELLING_S = 1  # that an error may take to its client
_DEADLINE_S = 600  # Knative's own, and the orchestrator's; an image of several GB is pulled in that time


@dataclass(frozen=True, slots=True)
class Pod:
    """`container` has no name. `fields` are those of a pod spec beside containers and volumes; `features` are the keys
    of config-features that any of it needs."""

    container: Tree
    volumes: list[Tree]
    fields: Tree
    weights: Weights
    features: tuple[str, ...]
    progress_deadline_s: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What a replica of a stage takes, in bytes, and how that was found.

    `kv_bytes_max` None: the stage takes its share of the memory that it finds free, which comes to about
    `kv_bytes_expected`, None if nobody knows."""

    memory_bytes: int | None  # of the host; None: not limited
    kv_bytes_max: int | None
    kv_bytes_expected: int | None
    arithmetic: tuple[str, ...]


def stage_pod(what: Deployment, index: int) -> Pod:
    """The pod of stage `index`. Raises DeploymentError if it cannot hold its weights."""
    budget = stage_budget(what, index)
    source = weights(what, what.stages_as)
    container: Tree = {
        "image": what.images.name(STAGE_IMAGE, "-cuda" if what.gpu is not None else ""),
        **_ports_and_env(what, source, stage_environment(what, index, budget), source.why),
        **_resources(what, budget),
        "readinessProbe": Noted(
            {"httpGet": {"path": "/readyz"}},
            "ready once the weights are loaded; without a period Knative asks every 50 ms, so a wake loses no second",
        ),
        **_liveness("/healthz", "answers while weights are loading, so a long start is not killed"),
        **_security(),
        "volumeMounts": [*_mounts(source, shared_memory=True), *(one.mount for one in _stage_secrets(what))],
    }
    volumes = [*_volumes(source, what.shared_memory), *(one.volume for one in _stage_secrets(what))]
    fields, features = _scheduling(what, source)
    return Pod(container, volumes, fields, source, features, _deadline_s(_cost(what, index)))


def orchestrator_pod(what: Deployment) -> Pod:
    """The pod of the orchestrator: no GPU, no weights; it reads tokenizer and configuration."""
    source = weights(what, what.orchestrator_as) if not what.weights.storage_initializer else _streamed(what)
    deadline_s = max(_deadline_s(_cost(what, index)) for index in range(len(what.plan.stages)))
    environment = {**orchestrator_environment(what, deadline_s), "ORCHESTRATOR_MODEL": source.model}
    wanted = what.orchestrator or Resources()
    if what.orchestrator_as == "kserve" and source.storage_uri:
        # KServe's webhook mounts it and changes the value to where
        environment["STORAGE_URI"] = source.storage_uri
    container: Tree = {
        "image": what.images.name(ORCHESTRATOR_IMAGE),
        **_ports_and_env(what, source, environment, "tokenizer and configuration are all that it reads of the model"),
        **({} if what.orchestrator is None else {"resources": _same(wanted.cpu or "1", wanted.memory or "1Gi")}),
        "readinessProbe": Noted(
            {"httpGet": {"path": "/v2/health/ready"}},
            "ready once all stages have answered: until then the activator holds requests",
        ),
        **_liveness("/v2/health/live", "answers while stages are woken, so a long start is not killed"),
        **_security(),
        "volumeMounts": [*_mounts(source, shared_memory=False), *(one.mount for one in _orchestrator_secrets(what))],
    }
    fields, features = _volume_features(what, source)
    if what.scheduling.fs_group is not None and (source.mount is not None or source.storage_uri.startswith("pvc://")):
        # the claim is open to that group only, whoever mounts it
        fields["securityContext"] = {"fsGroup": what.scheduling.fs_group}
        features = (*features, "kubernetes.podspec-securitycontext")
    volumes = [*_volumes(source, None), *(one.volume for one in _orchestrator_secrets(what))]
    return Pod(container, volumes, fields, source, features, deadline_s)


def results_pod(what: Deployment, batch: Batch) -> Pod:
    """The pod of the results service: a file, and a small server in front of it."""
    file = batch.results_file or f"{_RESULTS_FOLDER}/results.sqlite"
    source = Weights("", "")
    container: Tree = {
        "image": what.images.name(RESULTS_IMAGE),
        "ports": [{"name": "http1", "containerPort": PORT}],
        "env": [{"name": "RESULTS_FILE", "value": file}],
        **({} if what.orchestrator is None else {"resources": _same("500m", "512Mi")}),
        "readinessProbe": {"httpGet": {"path": "/readyz"}},
        **_liveness("/healthz", "a service that hangs is started anew"),
        **_security(),
        "volumeMounts": _mounts(source, shared_memory=False),
    }
    fields, _ = _volume_features(what, source)
    volumes = _volumes(source, None)
    features: tuple[str, ...] = ()
    if not batch.results_file:
        container["volumeMounts"].append({"name": "results", "mountPath": _RESULTS_FOLDER})
        volumes.append(_results_volume(batch))
    if batch.results_claim:
        features = ("kubernetes.podspec-persistent-volume-claim", "kubernetes.podspec-persistent-volume-write")
        if what.scheduling.fs_group is not None:
            fields["securityContext"] = {"fsGroup": what.scheduling.fs_group}
            features = (*features, "kubernetes.podspec-securitycontext")
    return Pod(container, volumes, fields, source, features, _DEADLINE_S)


def _results_volume(batch: Batch) -> Tree:
    if batch.results_claim:
        return {"name": "results", "persistentVolumeClaim": {"claimName": batch.results_claim}}
    return {"name": "results", "emptyDir": {}}


def stage_environment(what: Deployment, index: int, budget: Budget) -> dict[str, Any]:
    """The variables that tell a stage which one it is."""
    plan = what.plan
    kv: dict[str, Any] = {}
    if budget.kv_bytes_max is not None:
        kv["STAGE_KV_BYTES_MAX"] = str(budget.kv_bytes_max)
    elif what.gpu is not None and what.gpu.shared_by > 1:
        kv["STAGE_KV_SHARE"] = f"{1 / what.gpu.shared_by:.6f}"
    elif what.kv_share is not None:
        kv["STAGE_KV_SHARE"] = f"{what.kv_share:.6f}"
    return {
        "STAGE_MODEL": weights(what, what.stages_as).model,
        "STAGE_MODEL_NAME": plan.name,
        "STAGE_BLOCKS": str(plan.stages[index].blocks),
        "STAGE_INDEX": str(index),
        "STAGE_COUNT": str(len(plan.stages)),
        "STAGE_PLAN": plan.digest,
        "STAGE_DTYPE": plan.dtype,
        **({} if plan.quantize == "none" else {"STAGE_QUANTIZE": plan.quantize}),
        "STAGE_DEVICE": what.device,
        "STAGE_THREADS": str(what.threads_per_stage),
        **kv,
        **({"STAGE_CORES_LOCK": what.cores_lock} if what.cores_lock else {}),
        **{one.variable: one.file for one in _stage_secrets(what)},
        **({"STAGE_CLAIMS": what.scoring.claims} if what.scoring is not None and what.scoring.claims else {}),
    }


def orchestrator_environment(what: Deployment, deadline_s: int) -> dict[str, str]:
    """The variables that tell the orchestrator what it chains; its stages start within `deadline_s`."""
    names = [what.knative_name(index) for index in range(len(what.plan.stages))]
    urls = [f"http://{name}.{what.namespace}.svc.cluster.local" for name in names]
    more = {} if what.lane_width is None else {"ORCHESTRATOR_LANE_WIDTH": str(what.lane_width)}
    if what.lane_age_s is not None:
        more["ORCHESTRATOR_LANE_AGE_S"] = f"{what.lane_age_s:g}"
    if what.spread:
        more["ORCHESTRATOR_SPREAD"] = str(what.spread)
    if deadline_s > _DEADLINE_S:
        more["ORCHESTRATOR_WAKE_TIMEOUT_S"] = str(deadline_s)
    if (step_s := _longest_step_s(what)) > _STEP_TIMEOUT_S:
        more["ORCHESTRATOR_STEP_TIMEOUT_S"] = str(math.ceil(step_s / 60) * 60)
    if times := step_times_text([stage.profile for stage in what.plan.stages]):
        more["ORCHESTRATOR_STEP_TIMES"] = times
    return {
        "ORCHESTRATOR_MODEL": what.plan.model,
        "ORCHESTRATOR_MODEL_NAME": what.plan.name,
        "ORCHESTRATOR_STAGE_URLS": ",".join(urls),
        "ORCHESTRATOR_PLAN": what.plan.digest,
        # before Knative cuts the connection, so that the client is told why, and no stage works on for nobody
        "ORCHESTRATOR_REQUEST_TIMEOUT_S": str(max(1, what.timeout_s - _TELLING_S)),
        **{one.variable: one.file for one in _orchestrator_secrets(what)},
        **more,
    }


@dataclass(frozen=True, slots=True)
class _MountedSecret:
    """A Secret as a folder, with the variable that names the file in it. The file follows when the Secret changes,
    which a variable would not."""

    secret: str
    namespace: str
    name: str
    folder: str
    variable: str

    @property
    def file(self) -> str:
        return f"{self.folder}/{_KEYS}"

    @property
    def mount(self) -> Tree:
        return {"name": self.name, "mountPath": self.folder, "readOnly": True}

    @property
    def volume(self) -> Tree:
        note = (
            f"one key a line: openssl rand -hex 32 | kubectl create secret generic {self.secret} -n {self.namespace} "
            f"--from-file={_KEYS}=/dev/stdin"
        )
        return {"name": self.name, "secret": Noted({"secretName": self.secret}, note)}


def _stage_secrets(what: Deployment) -> list[_MountedSecret]:
    return _mounted_signing(what, "STAGE_SIGNING_KEY_FILE")


def _orchestrator_secrets(what: Deployment) -> list[_MountedSecret]:
    found = _mounted_signing(what, "ORCHESTRATOR_STAGE_SIGNING_KEY_FILE")
    if name := what.secrets.api_keys:
        found.append(_MountedSecret(name, what.namespace, "api-keys", _API_KEYS_FOLDER, "ORCHESTRATOR_API_KEYS_FILE"))
    return found


def _mounted_signing(what: Deployment, variable: str) -> list[_MountedSecret]:
    name = what.secrets.signing
    return [_MountedSecret(name, what.namespace, "signing", _SIGNING_FOLDER, variable)] if name else []


def _longest_step_s(what: Deployment) -> float:
    """Time that a step of prefill may take on CPUs, with a factor for what is not foreseen; 0 if nobody knows."""
    costs = [stage.cost for stage in what.plan.stages if stage.cost is not None]
    if what.stage is None or what.gpu is not None or not costs:
        return 0.0
    flops = max(cost.flops_per_token for cost in costs) * _STEP_TOKENS
    return _STEP_SLACK * flops / (CPU.flops_per_s * max(1, what.threads_per_stage))


def stage_budget(what: Deployment, index: int) -> Budget:
    """Memory of a stage's replica. Raises DeploymentError for a GPU that cannot hold its weights."""
    if what.stage is None:
        return Budget(None, what.kv_bytes_max, what.kv_bytes_max, ())
    cost = _cost(what, index)
    if what.gpu is not None:
        return _gpu_budget(what, index, cost)
    cost = loaded_cost(what, cost)
    kv_bytes = what.kv_bytes_max or _default_kv_bytes(what, cost)
    as_float32 = " as float32, in which a stage computes on a CPU" if what.plan.dtype == "auto" else ""
    arithmetic = (
        f"{_text(cost.weight_bytes)} of weights{as_float32}, {_text(kv_bytes)} of KV caches, "
        f"{_text(_RUNTIME_BYTES)} for the runtime"
    )
    memory_bytes = _given(what, cost.weight_bytes + kv_bytes + _RUNTIME_BYTES)
    if memory_bytes < cost.weight_bytes + kv_bytes:
        raise DeploymentError(
            f"--memory {what.stage.memory} is less than stage {index} fills: {arithmetic}; leave --memory out, lower "
            "--kv-memory, or cut the plan into more stages"
        )
    return Budget(memory_bytes, kv_bytes, kv_bytes, (arithmetic,))


def loaded_cost(what: Deployment, cost: Cost) -> Cost:
    """A plan counts bytes in the type of the checkpoint; without a GPU, dtype auto loads and caches float32."""
    if what.gpu is not None or what.plan.dtype != "auto" or not cost.weight_bytes:
        return cost
    if what.plan.quantize != "none":
        # int8 stays; the rest, which cannot be more halves than there are bytes beyond one a parameter, becomes float32
        beyond = max(0, cost.weight_bytes - cost.parameters) if cost.parameters else cost.weight_bytes
        return replace(
            cost, weight_bytes=cost.weight_bytes + 2 * beyond, kv_bytes_per_token=2 * cost.kv_bytes_per_token
        )
    # twice where the plan does not say how many parameters there are: most checkpoints hold halves
    weight_bytes = max(cost.weight_bytes, 4 * cost.parameters or 2 * cost.weight_bytes)
    kv_bytes_per_token = cost.kv_bytes_per_token * weight_bytes // cost.weight_bytes
    return replace(cost, weight_bytes=weight_bytes, kv_bytes_per_token=kv_bytes_per_token)


def _gpu_budget(what: Deployment, index: int, cost: Cost) -> Budget:
    gpu = what.gpu
    assert gpu is not None  # checked by the caller
    device_bytes = gpu.device_bytes
    if device_bytes is not None and cost.weight_bytes * gpu.shared_by > 0.9 * device_bytes:
        raise DeploymentError(
            f"stage {index} has {_text(cost.weight_bytes)} of weights; with {gpu.shared_by} stage(s) on a "
            f"{gpu.resource} of {_text(device_bytes)} they do not fit; cut the plan into more stages, "
            "or take a larger device"
        )
    if device_bytes is not None and what.kv_bytes_max is not None:
        taken_bytes = (cost.weight_bytes + what.kv_bytes_max) * gpu.shared_by
        if taken_bytes > device_bytes:
            raise DeploymentError(
                f"--kv-memory is more than stage {index} finds: with {_text(cost.weight_bytes)} of weights it makes "
                f"{_text(taken_bytes)} for {gpu.shared_by} stage(s) on a {gpu.resource} of {_text(device_bytes)}; "
                "leave it out, or lower it"
            )
    passing_bytes = cost.weight_bytes // _ON_THEIR_WAY
    arithmetic = (
        f"host memory: {_text(_GPU_HOST_BYTES)} for CUDA and the runtime, {_text(passing_bytes)} for tensors on their "
        f"way to the device, an eighth of {_text(cost.weight_bytes)} of weights"
    )
    expected = what.kv_bytes_max
    if expected is None and device_bytes is not None:
        # what the stage will take by itself: 85 % of what the weights leave free, and its part of that
        expected = int(0.85 * (device_bytes - cost.weight_bytes * gpu.shared_by) / gpu.shared_by)
    # the first of several on a device finds free what the weights of the others will need, so it is told in bytes
    kv_bytes_max = expected if gpu.shared_by > 1 else what.kv_bytes_max
    return Budget(_given(what, _GPU_HOST_BYTES + passing_bytes), kv_bytes_max, expected, (arithmetic,))


def _default_kv_bytes(what: Deployment, cost: Cost) -> int:
    """Two lanes' worth, if that is not too much."""
    tokens = 2 * what.workload.lane_width * what.workload.tokens_per_sequence
    return max(64 << 20, min(_KV_BYTES_MAX, tokens * cost.kv_bytes_per_token))


def _given(what: Deployment, needed: int) -> int:
    """The memory that was asked for, else what is needed in steps of 256 MiB."""
    assert what.stage is not None  # nothing is limited without it
    if not what.stage.memory:
        return math.ceil(needed / (256 << 20)) * (256 << 20)
    return parse_memory_bytes(what.stage.memory)


def _cost(what: Deployment, index: int) -> Cost:
    cost = what.plan.stages[index].cost
    if cost is None and what.stage is not None:
        raise DeploymentError(
            f"the plan says nothing about the size of stage {index}: it lacks stages[{index}].cost; make it anew with "
            "`stagecraft plan MODEL --stages N -o plan.yaml`, which writes what each stage takes"
        )
    return cost or Cost()


def _deadline_s(cost: Cost) -> int:
    """Seconds until a start counts as failed: image, and twice the time that the weights take, in whole minutes."""
    return _DEADLINE_S + round(2 * cost.weight_bytes / _FETCH_BYTES_PER_S / 60) * 60


def _ports_and_env(what: Deployment, source: Weights, variables: Mapping[str, str], comment: str) -> Tree:
    own = {**variables, **source.variables}
    if taken := sorted(set(own) & set(what.env)):
        raise DeploymentError(f"--env: {', '.join(taken)} follow from the plan and the other options; leave them out")
    every = {**own, **what.env}
    found: Tree = {
        "ports": [{"name": "http1", "containerPort": PORT}],
        "env": Noted([{"name": name, "value": value} for name, value in every.items()], comment),
    }
    if what.weights.secret:
        found["envFrom"] = Noted(
            [{"secretRef": {"name": what.weights.secret}}], "credentials for the weights: each key is a variable"
        )
    return found


def _resources(what: Deployment, budget: Budget) -> Tree:
    if what.stage is None or budget.memory_bytes is None:
        return {}
    resources = _same(what.stage.cpu or _CPU, _quantity(budget.memory_bytes))
    if what.gpu is not None:
        for side in resources.values():
            side[what.gpu.resource] = "1"
    return {"resources": Noted(resources, budget.arithmetic)}


def _same(cpu: str, memory: str) -> dict[str, Tree]:
    """Requests equal limits: nothing that holds KV caches should be the first to be evicted."""
    return {side: {"cpu": cpu, "memory": memory} for side in ("requests", "limits")}


def _liveness(path: str, comment: str) -> Tree:
    probe = {"httpGet": {"path": path}, "initialDelaySeconds": 60, "periodSeconds": 10, "timeoutSeconds": 5}
    return {"livenessProbe": Noted({**probe, "failureThreshold": 6}, comment)}


def _security() -> Tree:
    return {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
    }


def _mounts(source: Weights, *, shared_memory: bool) -> list[Tree]:
    mounts: list[Tree] = [{"name": "tmp", "mountPath": "/tmp"}]
    if shared_memory:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    return [*mounts, *([dict(source.mount)] if source.mount is not None else [])]


def _volumes(source: Weights, shared_memory: str | None) -> list[Tree]:
    volumes: list[Tree] = [
        {"name": "tmp", "emptyDir": Noted({"sizeLimit": "1Gi"}, "the only place to write to; caches of libraries")}
    ]
    if shared_memory is not None:
        memory = {"medium": "Memory", "sizeLimit": shared_memory}
        note = "for torch, where a container has 64 MiB otherwise; counts towards the memory limit when used"
        volumes.append({"name": "shm", "emptyDir": Noted(memory, note)})
    return [*volumes, *([dict(source.volume)] if source.volume is not None else [])]


def _volume_features(what: Deployment, source: Weights) -> tuple[Tree, tuple[str, ...]]:
    fields: Tree = {}
    if source.init_container is not None:
        fields["initContainers"] = [{**source.init_container, **_security()}]
    if what.images.pull_secret:
        fields["imagePullSecrets"] = [{"name": what.images.pull_secret}]
    return fields, source.features


def _scheduling(what: Deployment, source: Weights) -> tuple[Tree, tuple[str, ...]]:
    """Fields of the pod spec, and the flags that these need."""
    wanted = what.scheduling
    fields, features = _volume_features(what, source)
    flagged: Sequence[tuple[str, Any, str]] = (
        ("nodeSelector", dict(wanted.node_selector), "nodeselector"),
        ("tolerations", [_toleration(one) for one in wanted.tolerations], "tolerations"),
        ("runtimeClassName", wanted.runtime_class, "runtimeclassname"),
        ("priorityClassName", wanted.priority_class, "priorityclassname"),
        ("schedulerName", wanted.scheduler, "schedulername"),
        ("securityContext", {} if wanted.fs_group is None else {"fsGroup": wanted.fs_group}, "securitycontext"),
    )
    used = [(name, value, f"kubernetes.podspec-{flag}") for name, value, flag in flagged if value]
    fields.update({name: value for name, value, _ in used})
    return fields, (*features, *(flag for _, _, flag in used))


def _toleration(one: Toleration) -> Tree:
    found: Tree = {"key": one.key, "operator": "Equal" if one.value else "Exists"}
    if one.value:
        found["value"] = one.value
    if one.effect:
        found["effect"] = one.effect
    return found


def _streamed(what: Deployment) -> Weights:
    """The orchestrator reads its few files where they are, also when KServe downloads for the stages."""
    return weights(replace(what, weights=replace(what.weights, storage_initializer=False)), what.orchestrator_as)


def threads_of(cpu: str) -> int:
    """Threads of torch for a CPU quantity: whole cores, at least one."""
    return max(1, math.floor(parse_cpus(cpu or _CPU)))


def _quantity(size_bytes: int) -> str:
    for unit, name in ((_GIB, "Gi"), (1 << 20, "Mi")):
        if size_bytes % unit == 0:
            return f"{size_bytes // unit}{name}"
    return str(size_bytes)


def _text(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.1f} GiB" if size_bytes >= _GIB else f"{size_bytes / (1 << 20):.0f} MiB"
