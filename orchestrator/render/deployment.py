"""What is to be deployed: a plan, and all that it does not say: names, images, resources, scaling, weights.

Values are checked when built (DeploymentError), so that whatever comes later is sure of them. What only a cluster's own
rules forbid is found by `check.py` in the finished objects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from knative.autoscaler.annotations import WINDOW_MAX_S, WINDOW_MIN_S
from knative.resources.names import dns_1035_problem, is_dns_1123_label, is_dns_1123_subdomain, is_qualified_name
from knative.resources.quantities import parse_cpus, parse_memory_bytes, parse_quantity
from orchestrator.plan import Plan
from orchestrator.targets import Workload

Runtime = Literal["knative", "kserve"]
ScoringForm = Literal["triggers", "sequence"]
OciAs = Literal["image-volume", "init-container"]

SERVICE_NAME_MAX = 52  # a revision adds -00001 and a replica five letters more, of at most 63
_PREDICTOR = "-predictor"  # KServe appends it; twice in a name it takes the wrong one out of the URL
_RESOURCE = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_MIG = re.compile(r"/mig-\d+g\.(\d+)gb(\.me|\+me)?$")
# names of images after distribution/reference: a host, and parts of a path
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REGISTRY = re.compile(rf"[a-z0-9]+(?:(?:[._]|-+)[a-z0-9]+)*(?::[0-9]+)?(?:/{_PART})*")
_IMAGE = re.compile(
    rf"(?:[A-Za-z0-9]+(?:(?:[.]|-+)[A-Za-z0-9]+)*(?::[0-9]+)?/)?{_PART}(?:/{_PART})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
_ENV_NAME = re.compile(r"[A-Za-z_.-][A-Za-z0-9_.-]*")
_KSERVE_ENV = ("INFERENCE_SERVICE_NAME", "MULTI_MODEL_SERVER", "STORAGE_URI")
_ID_MAX = (1 << 31) - 1  # of groups
_MEMORY_BYTES_MIN = 1 << 20
_CLAIMS = re.compile(r"(s3|gs|gcs|abfs|az)://[^/\s]\S*|file:///\S+", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class DeploymentError(Exception):
    """The deployment cannot be rendered; the text names the option and what is allowed."""


@dataclass(frozen=True, slots=True)
class Images:
    """Where the images are: REGISTRY/stagecraft/stage:TAG. Both parts may be empty. With a GPU the stage's tag has
    -cuda behind it, as `make images VARIANT=cuda` names it."""

    registry: str = ""
    tag: str = ""
    pull_secret: str = ""

    def __post_init__(self) -> None:
        if self.registry and not _REGISTRY.fullmatch(self.registry):
            raise DeploymentError(f"--image-registry must look like ghcr.io/acme, got {self.registry!r}")
        if self.tag and not _TAG.fullmatch(self.tag):
            raise DeploymentError(f"--image-tag must look like 0.3.0, got {self.tag!r}")
        if self.pull_secret and not is_dns_1123_subdomain(self.pull_secret):
            raise DeploymentError(f"--image-pull-secret must be the name of a Secret, got {self.pull_secret!r}")

    def name(self, of: str, variant: str = "") -> str:
        """The reference of the image `of` (stagecraft/stage, stagecraft/orchestrator)."""
        whole = f"{self.registry}/{of}" if self.registry else of
        return f"{whole}:{self.tag}{variant}" if self.tag else whole


@dataclass(frozen=True, slots=True)
class Gpu:
    """The one device of a stage: any extended resource, whole (nvidia.com/gpu) or a slice (nvidia.com/mig-1g.10gb)."""

    resource: str = "nvidia.com/gpu"
    shared_by: int = 1  # stages that share one device by time slicing or MPS: each takes its part of the KV memory
    memory_bytes: int | None = None  # of one device; of a MIG slice its name says it

    def __post_init__(self) -> None:
        if not _RESOURCE.fullmatch(self.resource) or not is_extended_resource(self.resource):
            raise DeploymentError(
                f"--gpu-resource must be the name of an extended resource, DOMAIN/NAME such as nvidia.com/gpu or "
                f"nvidia.com/mig-1g.10gb, got {self.resource!r}"
            )
        if self.shared_by < 1:
            raise DeploymentError(f"--gpu-shared-by must be at least 1, got {self.shared_by}")

    @property
    def device_bytes(self) -> int | None:
        """The memory of one device, None if nobody said it."""
        if self.memory_bytes is None and (match := _MIG.search(self.resource)):
            return int(match[1]) << 30
        return self.memory_bytes


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one container, as quantities; requests and limits are the same. Empty: derived, or none.

    `of` is what its options begin with: "" for a stage's --cpu, "orchestrator-" for --orchestrator-cpu."""

    cpu: str = ""
    memory: str = ""
    of: str = ""

    def __post_init__(self) -> None:
        try:
            if self.cpu and not parse_cpus(self.cpu):
                raise ValueError("must be more than 0")
        except ValueError as error:
            raise DeploymentError(f"--{self.of}cpu: {self.cpu!r} is no quantity: {error}") from None
        if self.cpu and parse_quantity(self.cpu) * 1000 % 1:
            raise DeploymentError(f"--{self.of}cpu: {self.cpu!r} is finer than 1m, a thousandth of a core")
        if self.memory:
            _check_memory(f"--{self.of}memory", self.memory)


@dataclass(frozen=True, slots=True)
class Scaling:
    """How every stage scales. Durations are seconds; `target` and `container_concurrency` None: derived."""

    target: float | None = None  # steps of lanes in a replica at once, before utilisation (70 %) is applied
    container_concurrency: int | None = None  # 0: no limit
    window_s: int = 60  # stable window
    min_scale: int = 0
    max_scale: int = 1
    initial_scale: int = 1  # 0 starts with the first request; a cluster has to allow that
    scale_down_delay_s: int = 0
    target_burst_capacity: int | None = None
    grace_s: float = 30.0  # scale-to-zero-grace-period; of the whole cluster, so only `up` sets it

    def __post_init__(self) -> None:
        if self.min_scale < 0:
            raise DeploymentError(f"--min-scale must be 0 or more, got {self.min_scale}")
        if self.max_scale < 0:
            raise DeploymentError(f"--max-scale must be 0 (no limit) or more, got {self.max_scale}")
        if 0 < self.max_scale < self.min_scale:
            raise DeploymentError(f"--max-scale {self.max_scale} is below --min-scale {self.min_scale}")
        if self.initial_scale < 0:
            raise DeploymentError(f"--initial-scale must be 0 or more, got {self.initial_scale}")
        if 0 < self.max_scale < self.initial_scale:
            raise DeploymentError(
                f"--initial-scale {self.initial_scale} is above --max-scale {self.max_scale}: Knative would wait for "
                "replicas that it does not start, and the service would never be Ready"
            )
        if not WINDOW_MIN_S <= self.window_s <= WINDOW_MAX_S:
            raise DeploymentError(f"--window must be from 6s to 1h, got {self.window_s}s")
        if not 0 <= self.scale_down_delay_s <= 3600:
            raise DeploymentError(f"--scale-down-delay must be from 0s to 1h, got {self.scale_down_delay_s}s")
        self._check_concurrency()

    def _check_concurrency(self) -> None:
        if self.target is not None and not 0.01 <= self.target < math.inf:  # false for NaN
            raise DeploymentError(f"--target must be at least 0.01, got {self.target:g}")
        if self.container_concurrency is not None and not 0 <= self.container_concurrency <= 1000:
            raise DeploymentError(f"--container-concurrency must be 0 to 1000, got {self.container_concurrency}")
        if self.target is not None and self.container_concurrency and self.target > self.container_concurrency:
            raise DeploymentError(
                f"--target {self.target:g} is above --container-concurrency {self.container_concurrency}: a replica "
                "never has more requests at once than that; lower the target or raise the limit"
            )
        if self.target_burst_capacity == -1:
            raise DeploymentError(
                "--target-burst-capacity -1 would keep the autoscaler from asking the pods, which are addressed "
                "directly: a busy stage would be scaled to zero; give 0 or more"
            )
        if self.target_burst_capacity is not None and self.target_burst_capacity < 0:
            raise DeploymentError(f"--target-burst-capacity must be 0 or more, got {self.target_burst_capacity}")


@dataclass(frozen=True, slots=True)
class Toleration:
    """core/v1 Toleration. KEY[=VALUE][:EFFECT] on the command line."""

    key: str
    value: str = ""
    effect: str = ""

    def __post_init__(self) -> None:
        _check_label("--toleration", self.key, self.value)


@dataclass(frozen=True, slots=True)
class Scheduling:
    """Where the stages' pods may run. Every field needs a flag of Knative's config-features."""

    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    runtime_class: str = ""
    priority_class: str = ""
    scheduler: str = ""
    fs_group: int | None = None

    def __post_init__(self) -> None:
        for option, value in (
            ("--runtime-class", self.runtime_class),
            ("--priority-class", self.priority_class),
            ("--scheduler", self.scheduler),
        ):
            if value and not is_dns_1123_subdomain(value):
                raise DeploymentError(f"{option} must be the name of an object (DNS-1123), got {value!r}")
        for name, value in self.node_selector.items():
            _check_label("--node-selector", name, value)
        if self.fs_group is not None and not 0 <= self.fs_group <= _ID_MAX:
            raise DeploymentError(f"--fs-group must be 0 to {_ID_MAX}, got {self.fs_group}")


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where pods find the model, if the plan's `model` does not say it for them, and with whose rights they read it."""

    uri: str = ""
    secret: str = ""  # its keys become environment variables (HF_TOKEN, AWS_ACCESS_KEY_ID, ...)
    oci_as: OciAs = "image-volume"
    storage_initializer: bool = False  # KServe downloads it whole, instead of each stage its own tensors

    def __post_init__(self) -> None:
        if self.secret and not is_dns_1123_subdomain(self.secret):
            raise DeploymentError(f"--weights-secret must be the name of a Secret, got {self.secret!r}")


@dataclass(frozen=True, slots=True)
class Secrets:
    """Names of Secrets that pods mount. What they hold is in no file that is rendered, and in no variable."""

    signing: str = ""  # key `keys`: what orchestrator and stages sign their events with
    api_keys: str = ""  # key `keys`: what clients send

    def __post_init__(self) -> None:
        for option, name in (("--signing-secret", self.signing), ("--api-keys-secret", self.api_keys)):
            if name and not is_dns_1123_subdomain(name):
                raise DeploymentError(f"{option} must be the name of a Secret, got {name!r}")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is rendered beside the services."""

    service_account_annotations: Mapping[str, str] = field(default_factory=dict)
    network_policy: bool = True
    ingress_namespaces: tuple[str, ...] = ("istio-system", "kourier-system")
    monitoring_namespace: str = "monitoring"
    pod_monitor: bool = True
    event_types: bool = True
    deployer: str = ""  # a user, or system:serviceaccount:NAMESPACE:NAME, who gets the rights to deploy these files

    def __post_init__(self) -> None:
        for option, names in (
            ("--ingress-namespace", self.ingress_namespaces),
            ("--monitoring-namespace", (self.monitoring_namespace,)),
        ):
            for name in names:
                if not is_dns_1123_label(name):
                    raise DeploymentError(f"{option} must be the name of a namespace (DNS-1123 label), got {name!r}")
        for name in self.service_account_annotations:
            if not _is_key(name):
                raise DeploymentError(f"--service-account-annotation: {name!r} is no name of an annotation")
        self._check_deployer()

    def _check_deployer(self) -> None:
        prefix = "system:serviceaccount:"
        if not self.deployer.startswith(prefix):
            return
        namespace, _, name = self.deployer.removeprefix(prefix).partition(":")
        if not is_dns_1123_label(namespace) or not is_dns_1123_subdomain(name):
            raise DeploymentError(f"--deployer must be a user, or {prefix}NAMESPACE:NAME, got {self.deployer!r}")


@dataclass(frozen=True, slots=True)
class Batch:
    """Batch jobs by events: through which broker, and where results are kept."""

    broker: str = "default"
    results_claim: str = ""  # volume claim; without one, results live as long as the pod
    results_file: str = ""  # on one machine, instead of a claim
    max_in_flight: int | None = None  # requests in the orchestrator at once; None: as many as it takes

    def __post_init__(self) -> None:
        if not is_dns_1123_subdomain(self.broker):
            raise DeploymentError(f"--broker must be the name of a Broker (DNS-1123), got {self.broker!r}")
        if self.results_claim and not is_dns_1123_subdomain(self.results_claim):
            raise DeploymentError(f"--results-claim must be the name of a volume claim, got {self.results_claim!r}")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise DeploymentError(f"--batch-in-flight must be at least 1, got {self.max_in_flight}")


@dataclass(frozen=True, slots=True)
class Scoring:
    """Stages chained by a broker alone, for work without decoding; see docs/scoring.md."""

    form: ScoringForm = "triggers"
    broker: str = "default"
    claims: str = ""  # where data too large for events lie; "": events carry all of it
    dead_letters: str = ""  # URL; "": the results service of a batch, if there is one

    def __post_init__(self) -> None:
        if not is_dns_1123_subdomain(self.broker):
            raise DeploymentError(f"--broker must be the name of a Broker (DNS-1123), got {self.broker!r}")
        if self.claims and not _CLAIMS.fullmatch(self.claims):
            raise DeploymentError(
                "--claims must be where all stages can write, s3://, gs:// or abfs://, or file:///PATH on one machine; "
                f"got {self.claims!r}"
            )
        if self.dead_letters and not re.fullmatch(r"https?://[^/\s]\S*", self.dead_letters, re.ASCII):
            raise DeploymentError(f"--dead-letters must be a URL, http://..., got {self.dead_letters!r}")


@dataclass(frozen=True, slots=True)
class Deployment:
    """A plan with everything that its objects need. `up` leaves resources out: processes share one machine."""

    plan: Plan
    name: str = ""  # of the orchestrator's service, and the start of the others'; by default from the plan's
    namespace: str = "default"
    stages_as: Runtime = "knative"
    orchestrator_as: Runtime = "knative"
    images: Images = Images()
    scaling: Scaling = Scaling()
    workload: Workload = field(default_factory=Workload)
    stage: Resources | None = None
    orchestrator: Resources | None = None
    gpu: Gpu | None = None
    device: str = "auto"
    threads_per_stage: int = 0  # 0: torch decides
    kv_bytes_max: int | None = None  # of each replica of a stage
    kv_share: float | None = None  # of the memory that a stage finds free
    shared_memory: str = "256Mi"
    scheduling: Scheduling = Scheduling()
    weights: WeightSource = WeightSource()
    around: Surroundings | None = None  # None: nothing but the services
    batch: Batch | None = None
    scoring: Scoring | None = None
    secrets: Secrets = Secrets()
    env: Mapping[str, str] = field(default_factory=dict)  # for stages and orchestrator
    lane_width: int | None = None  # sequences; None: the orchestrator's default
    lane_age_s: float | None = None  # None: the orchestrator's default
    spread: int = 0  # stages that compute at once; 0: all
    cores_lock: str = ""  # file by which stages on the same cores take turns; on one machine only
    timeout_s: int = 600  # the most that Knative allows by default

    def __post_init__(self) -> None:
        if not is_dns_1123_label(self.namespace):
            raise DeploymentError(
                f"--namespace must be a DNS-1123 label (lower-case letters, digits and '-', at most 63), got "
                f"{self.namespace!r}"
            )
        self._check_names()
        self._check_env()
        if not 1 <= self.timeout_s <= _ID_MAX:
            raise DeploymentError(f"--timeout must be 1s to {_ID_MAX}s, got {self.timeout_s}s")
        if self.kv_bytes_max is not None and self.kv_bytes_max < 1:
            raise DeploymentError(f"--kv-memory must be at least 1 byte, got {self.kv_bytes_max}")
        _check_memory("--shared-memory", self.shared_memory)
        self._check_doors()

    def _check_doors(self) -> None:
        """Brokers neither sign nor send keys; whoever lets them in lets in everybody who reaches that door."""
        for wanted, secret, variable, why in (
            (self.scoring, self.secrets.signing, "STAGE_UNSIGNED_SCORES", "--scoring with --signing-secret"),
            (self.batch, self.secrets.api_keys, "ORCHESTRATOR_EVENTS_WITHOUT_KEY", "--batch with --api-keys-secret"),
        ):
            if wanted is not None and secret and variable not in self.env:
                raise DeploymentError(
                    f"{why}: a broker's events would be refused, as they have neither. Say with --env {variable}=allow "
                    "that they are taken, where only the broker can reach that door (docs/security.md)"
                )

    def _check_names(self) -> None:
        for name in (self.service_name, *(self.stage_name(index) for index in range(len(self.plan.stages)))):
            if problem := dns_1035_problem(name):
                raise DeploymentError(f"--name {self.name!r} makes a service {name!r}: {problem}")
            if len(name) > SERVICE_NAME_MAX:
                raise DeploymentError(
                    f"--name {self.name!r} makes a service {name!r} of {len(name)} characters; with what Knative and "
                    f"KServe append, {SERVICE_NAME_MAX} is the most"
                )
        if "kserve" in (self.stages_as, self.orchestrator_as):
            for option, name in (("--name", self.service_name), ("--namespace", self.namespace)):
                if _PREDICTOR in name or "-default" in name:
                    raise DeploymentError(f"{option} {name!r}: KServe cuts '-predictor' and '-default' out of URLs")

    def _check_env(self) -> None:
        for name, value in self.env.items():
            if not _ENV_NAME.fullmatch(name):
                raise DeploymentError(f"--env: {name!r} is no name of a variable: letters, digits, '_', '.' and '-'")
            if name in _KSERVE_ENV and "kserve" in (self.stages_as, self.orchestrator_as):
                raise DeploymentError(f"--env: KServe gives {name} a meaning of its own; leave it out")
            if not _is_unicode(value):
                raise DeploymentError(f"--env: the value of {name} is no text in UTF-8")

    @property
    def service_name(self) -> str:
        """Of the orchestrator's object, and the start of all other names."""
        return self.name or dns_label(self.plan.name)

    def stage_name(self, index: int) -> str:
        """Of the stage's object: a Knative Service or an InferenceService."""
        return f"{self.service_name}-stage-{index}"

    @property
    def stage_names(self) -> list[str]:
        return [self.stage_name(index) for index in range(len(self.plan.stages))]

    def knative_name(self, index: int) -> str:
        """Of the stage's Knative Service, which for an InferenceService KServe makes."""
        return self.stage_name(index) + (_PREDICTOR if self.stages_as == "kserve" else "")

    @property
    def orchestrator_knative_name(self) -> str:
        return self.service_name + (_PREDICTOR if self.orchestrator_as == "kserve" else "")


def dns_label(name: str) -> str:
    """The model's name as Kubernetes allows it: lower-case letters, digits and '-', a letter first (RFC 1035)."""
    text = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[: SERVICE_NAME_MAX - len("-stage-99")].strip("-")
    return text if text[:1].isalpha() else f"m-{text}".strip("-")


def is_image(reference: str) -> bool:
    return _IMAGE.fullmatch(reference) is not None


def is_extended_resource(name: str) -> bool:
    """Kubernetes counts these itself, and takes their names with `requests.` before them for quotas."""
    return "kubernetes.io/" not in name and not name.startswith("requests.") and _is_key(f"requests.{name}")


def _check_memory(option: str, value: str) -> None:
    """A number alone is bytes, which nobody means."""
    try:
        size_bytes = parse_memory_bytes(value)
    except ValueError as error:
        raise DeploymentError(f"{option}: {value!r} is no quantity: {error}") from None
    if size_bytes < _MEMORY_BYTES_MIN:
        raise DeploymentError(f"{option} {value} is {size_bytes} bytes, too little to start; give a unit, such as 16Gi")


def _check_label(option: str, name: str, value: str) -> None:
    if not _is_key(name):
        raise DeploymentError(f"{option}: {name!r} is no name of a label, [DOMAIN/]NAME of at most 63 characters")
    if value and not is_qualified_name(value):
        raise DeploymentError(
            f"{option}: {value!r} is no value of a label: at most 63 letters, digits, '-', '_' and '.', the first "
            "and the last a letter or digit"
        )


def _is_key(name: str) -> bool:
    """Whether a label, an annotation or a resource may be called so."""
    domain, slash, rest = name.rpartition("/")
    return is_qualified_name(rest) and (not slash or is_dns_1123_subdomain(domain))


def _is_unicode(text: str) -> bool:
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False
