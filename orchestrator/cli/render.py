"""`stagecraft render`: a plan as files for kubectl, kn or `stagecraft deploy`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orchestrator.cli.console import fail, note
from orchestrator.cli.options import duration_s

if TYPE_CHECKING:
    from orchestrator.render.deployment import Batch, Deployment, Gpu, Scheduling, Scoring, Toleration
    from orchestrator.render.settings import ClusterSetting
    from orchestrator.targets import Workload

Runtime = Literal["knative", "kserve"]
NAMED = "stagecraft/stage"
SIDE_LOADED = "kind.local"  # a registry that Knative does not ask for digests

_WHAT, _SCALE, _POD = "What and where", "Scaling", "Pods"
_BATCH, _SCORING, _AROUND = "Batch jobs", "Scoring", "Around the services"


def render(
    plan: Annotated[Path, typer.Argument(help="A plan file of `stagecraft plan`.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the files.", rich_help_panel=_WHAT, show_default=False)
    ],
    stages_as: Annotated[
        Runtime,
        typer.Option(help="What a stage becomes: a Knative Service or an InferenceService.", rich_help_panel=_WHAT),
    ] = "knative",
    orchestrator_as: Annotated[
        Runtime,
        typer.Option(help="What the orchestrator becomes; knative for clusters without KServe.", rich_help_panel=_WHAT),
    ] = "kserve",
    format: Annotated[
        Literal["yaml", "kn"], typer.Option(help="kn: the services as a script of kn commands.", rich_help_panel=_WHAT)
    ] = "yaml",
    name: Annotated[
        str, typer.Option(help="Name of the services, DNS-safe; by default from the plan's.", rich_help_panel=_WHAT)
    ] = "",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace.", rich_help_panel=_WHAT)] = "default",
    image_registry: Annotated[
        str, typer.Option(help="Where the images are, such as ghcr.io/acme.", rich_help_panel=_WHAT)
    ] = "",
    image_tag: Annotated[
        str,
        typer.Option(
            help="Tag of the images, by default this version; for GPUs -cuda is added to that of the stages.",
            rich_help_panel=_WHAT,
        ),
    ] = "",
    image_pull_secret: Annotated[
        str, typer.Option(help="Secret with credentials for the registry.", rich_help_panel=_WHAT)
    ] = "",
    weights: Annotated[
        str,
        typer.Option(
            help="Where pods find the model, if not where the plan says: owner/name, s3://, gs://, hf://, https://, "
            "pvc://CLAIM/PATH, oci://IMAGE, file:///PATH (in the image).",
            rich_help_panel=_WHAT,
        ),
    ] = "",
    weights_secret: Annotated[
        str,
        typer.Option(
            help="Secret whose keys become variables: HF_TOKEN, AWS_ACCESS_KEY_ID, ...", rich_help_panel=_WHAT
        ),
    ] = "",
    signing_secret: Annotated[
        str,
        typer.Option(
            help="Secret whose key `keys` holds what orchestrator and stages sign their events with.",
            rich_help_panel=_WHAT,
        ),
    ] = "",
    api_keys_secret: Annotated[
        str,
        typer.Option(help="Secret whose key `keys` holds the API keys of clients, one a line.", rich_help_panel=_WHAT),
    ] = "",
    storage_initializer: Annotated[
        bool,
        typer.Option(
            "--storage-initializer", help="Have KServe download the whole model into every pod.", rich_help_panel=_WHAT
        ),
    ] = False,
    oci_as: Annotated[
        Literal["image-volume", "init-container"],
        typer.Option(help="How a Knative Service gets at an oci:// model.", rich_help_panel=_WHAT),
    ] = "image-volume",
    target: Annotated[
        float | None,
        typer.Option(help="Steps that a replica should have at once; by default derived.", rich_help_panel=_SCALE),
    ] = None,
    container_concurrency: Annotated[
        int | None, typer.Option(help="Steps at most, 0 for no limit; by default derived.", rich_help_panel=_SCALE)
    ] = None,
    window: Annotated[
        str, typer.Option(help="Stable window of the autoscaler, 6s to 1h.", rich_help_panel=_SCALE)
    ] = "60s",
    min_scale: Annotated[int, typer.Option(help="Replicas of each stage to keep.", rich_help_panel=_SCALE)] = 0,
    max_scale: Annotated[
        int, typer.Option(help="Replicas of a stage at most, 0 for no limit.", rich_help_panel=_SCALE)
    ] = 4,
    initial_scale: Annotated[
        int, typer.Option(help="Replicas to begin with; 0 needs the cluster's leave.", rich_help_panel=_SCALE)
    ] = 1,
    scale_down_delay: Annotated[
        str, typer.Option(help="Time that a lower load must last before replicas go.", rich_help_panel=_SCALE)
    ] = "0s",
    target_burst_capacity: Annotated[
        int | None, typer.Option(help="By default above what all replicas take.", rich_help_panel=_SCALE)
    ] = None,
    timeout: Annotated[
        str, typer.Option(help="Longest request, wait for a start included.", rich_help_panel=_SCALE)
    ] = "600s",
    lane_width: Annotated[
        int,
        typer.Option(min=1, help="Sequences that travel together; targets are derived for it.", rich_help_panel=_SCALE),
    ] = 64,
    sequence_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens of a usual prompt and answer; targets are derived for it.", rich_help_panel=_SCALE
        ),
    ] = 1024,
    stretch: Annotated[
        float,
        typer.Option(min=1, help="How many times its time alone a token may take under load.", rich_help_panel=_SCALE),
    ] = 2.0,
    gpu_resource: Annotated[
        str,
        typer.Option(help="Device of a stage, such as nvidia.com/gpu or nvidia.com/mig-1g.10gb.", rich_help_panel=_POD),
    ] = "",
    gpu_memory: Annotated[
        str, typer.Option(help="Memory of one, such as 24GiB, to check that weights fit.", rich_help_panel=_POD)
    ] = "",
    gpu_shared_by: Annotated[
        int, typer.Option(help="Stages on one device by time slicing or MPS.", rich_help_panel=_POD)
    ] = 1,
    cpu: Annotated[str, typer.Option(help="Of a stage, request and limit.", rich_help_panel=_POD)] = "2",
    memory: Annotated[
        str, typer.Option(help="Of a stage, such as 16Gi; by default derived.", rich_help_panel=_POD)
    ] = "",
    kv_memory: Annotated[
        str, typer.Option(help="KV cache budget of a replica, such as 2GiB; by default derived.", rich_help_panel=_POD)
    ] = "",
    shared_memory: Annotated[str, typer.Option(help="Size of /dev/shm.", rich_help_panel=_POD)] = "256Mi",
    orchestrator_cpu: Annotated[str, typer.Option(help="Of the orchestrator.", rich_help_panel=_POD)] = "1",
    orchestrator_memory: Annotated[str, typer.Option(help="Of the orchestrator.", rich_help_panel=_POD)] = "1Gi",
    env: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for stages and orchestrator, repeatable.", rich_help_panel=_POD)
    ] = None,
    node_selector: Annotated[
        list[str] | None, typer.Option(help="LABEL=VALUE, repeatable. Needs a feature flag.", rich_help_panel=_POD)
    ] = None,
    toleration: Annotated[
        list[str] | None,
        typer.Option(help="KEY[=VALUE][:EFFECT], repeatable. Needs a feature flag.", rich_help_panel=_POD),
    ] = None,
    runtime_class: Annotated[str, typer.Option(help="Needs a feature flag.", rich_help_panel=_POD)] = "",
    priority_class: Annotated[str, typer.Option(help="Needs a feature flag.", rich_help_panel=_POD)] = "",
    scheduler: Annotated[str, typer.Option(help="Needs a feature flag.", rich_help_panel=_POD)] = "",
    fs_group: Annotated[int | None, typer.Option(help="Needs a feature flag.", rich_help_panel=_POD)] = None,
    service_account_annotation: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE, such as a cloud identity for the weights; repeatable.", rich_help_panel=_AROUND),
    ] = None,
    network_policy: Annotated[
        bool, typer.Option(help="Only the orchestrator reaches stages.", rich_help_panel=_AROUND)
    ] = True,
    ingress_namespace: Annotated[
        list[str] | None,
        typer.Option(
            help="Of Knative's gateway, repeatable. [default: istio-system, kourier-system]", rich_help_panel=_AROUND
        ),
    ] = None,
    monitoring_namespace: Annotated[str, typer.Option(help="Of Prometheus.", rich_help_panel=_AROUND)] = "monitoring",
    pod_monitor: Annotated[bool, typer.Option(help="For the Prometheus operator.", rich_help_panel=_AROUND)] = True,
    event_types: Annotated[bool, typer.Option(help="For Knative Eventing.", rich_help_panel=_AROUND)] = True,
    batch: Annotated[
        bool,
        typer.Option(
            "--batch", help="Batch jobs by events: Broker, Triggers, results service.", rich_help_panel=_BATCH
        ),
    ] = False,
    broker: Annotated[str, typer.Option(help="Name of the Broker.", rich_help_panel=_BATCH)] = "default",
    results_claim: Annotated[
        str,
        typer.Option(help="Volume claim that keeps results; without it they end with the pod.", rich_help_panel=_BATCH),
    ] = "",
    batch_in_flight: Annotated[
        int | None,
        typer.Option(
            help="Requests of batches in the orchestrator at once; by default as many as it takes.",
            rich_help_panel=_BATCH,
            show_default=False,
        ),
    ] = None,
    scoring: Annotated[
        Literal["triggers", "sequence"] | None,
        typer.Option(
            help="Stages chained by the Broker (--broker) for `stagecraft score`: a Trigger each, or a Sequence.",
            rich_help_panel=_SCORING,
            show_default=False,
        ),
    ] = None,
    claims: Annotated[
        str,
        typer.Option(
            help="Where stages leave data too large for events, such as s3://BUCKET/PATH.", rich_help_panel=_SCORING
        ),
    ] = "",
    dead_letters: Annotated[
        str,
        typer.Option(
            help="URL for scoring events that no stage took; with --batch the results service.",
            rich_help_panel=_SCORING,
        ),
    ] = "",
    deployer: Annotated[
        str,
        typer.Option(
            help="A user, or system:serviceaccount:NAMESPACE:NAME, who gets the rights to deploy.",
            rich_help_panel=_AROUND,
        ),
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Write a rendered folder anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Write a plan as Kubernetes files: one for each thing, and a kustomization.yaml.

    Each stage becomes a Knative Service (or an InferenceService) that scales to zero and out by concurrency; the
    orchestrator becomes an InferenceService (or a Knative Service). Targets come from what `stagecraft profile` has
    measured, else from estimates; the sum stands in a comment. What a cluster would refuse is refused here, and nothing
    is written then.

    [bold]Examples[/]

    stagecraft render plan.yaml -o deploy/ --image-registry ghcr.io/acme

    stagecraft render plan.yaml -o deploy/ --gpu-resource nvidia.com/gpu --weights s3://models/llama-2-13b

    stagecraft render plan.yaml -o deploy/ --stages-as kserve --weights pvc://models/llama-2-13b

    stagecraft render plan.yaml -o deploy/ --orchestrator-as knative --format kn

    stagecraft render plan.yaml -o deploy/ --batch --scoring triggers --claims s3://scratch/claims
    """
    from orchestrator.plan import load_plan
    from orchestrator.render.check import check
    from orchestrator.render.deployment import (
        Deployment,
        Images,
        Resources,
        Scaling,
        Secrets,
        Surroundings,
        WeightSource,
    )
    from orchestrator.render.files import files, write
    from orchestrator.render.pods import threads_of
    from orchestrator.render.settings import needed_settings

    with _readable_errors():
        chosen = load_plan(plan)
        gpu = _gpu(gpu_resource, gpu_memory, gpu_shared_by)
        resources = Resources(cpu, memory)
        what = Deployment(
            chosen,
            name=name,
            namespace=namespace,
            stages_as=stages_as,
            orchestrator_as=orchestrator_as,
            images=Images(image_registry, image_tag or _version(), image_pull_secret),
            scaling=Scaling(
                target=target,
                container_concurrency=container_concurrency,
                window_s=_whole_s("--window", window),
                min_scale=min_scale,
                max_scale=max_scale,
                initial_scale=initial_scale,
                scale_down_delay_s=_whole_s("--scale-down-delay", scale_down_delay),
                target_burst_capacity=target_burst_capacity,
            ),
            workload=_workload(lane_width, sequence_tokens, stretch),
            stage=resources,
            orchestrator=Resources(orchestrator_cpu, orchestrator_memory, "orchestrator-"),
            gpu=gpu,
            device="cpu" if gpu is None else "cuda",
            threads_per_stage=threads_of(cpu),
            kv_bytes_max=_size("--kv-memory", kv_memory),
            shared_memory=shared_memory,
            scheduling=_scheduling(node_selector, toleration, runtime_class, priority_class, scheduler, fs_group),
            weights=WeightSource(weights, weights_secret, oci_as, storage_initializer),
            around=Surroundings(
                _pairs("--service-account-annotation", service_account_annotation),
                network_policy,
                tuple(ingress_namespace or ("istio-system", "kourier-system")),
                monitoring_namespace,
                pod_monitor,
                event_types,
                deployer,
            ),
            batch=_batch(batch, broker, results_claim, batch_in_flight),
            scoring=_scoring(scoring, broker, claims, dead_letters),
            secrets=Secrets(signing_secret, api_keys_secret),
            env=_pairs("--env", env),
            lane_width=lane_width,
            timeout_s=_whole_s("--timeout", timeout),
        )
        written = files(what, format)
        check(what)
        write(written, output, force=force)
    settings = needed_settings(what)
    if as_json:
        print(json.dumps(_facts(what, output, [one.name for one in written], settings)))
    else:
        for one in written:
            print(output / one.name)
    _tell(what, output, format, settings)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Ends the command with 2: other options, or another plan, heal all of it."""
    from orchestrator.plan import PlanError
    from orchestrator.render.deployment import DeploymentError

    try:
        yield
    except (PlanError, DeploymentError) as error:
        fail(str(error), 2)


def _gpu(resource: str, memory: str, shared_by: int) -> Gpu | None:
    from orchestrator.render.deployment import Gpu

    if not resource:
        if memory or shared_by != 1:
            fail("--gpu-memory and --gpu-shared-by go with --gpu-resource, such as nvidia.com/gpu", 2)
        return None
    return Gpu(resource, shared_by, _size("--gpu-memory", memory))


def _batch(wanted: bool, broker: str, results_claim: str, in_flight: int | None) -> Batch | None:
    from orchestrator.render.deployment import Batch

    if not wanted and (results_claim or in_flight is not None):
        fail("--results-claim and --batch-in-flight go with --batch", 2)
    return Batch(broker, results_claim, max_in_flight=in_flight) if wanted else None


def _scoring(
    form: Literal["triggers", "sequence"] | None, broker: str, claims: str, dead_letters: str
) -> Scoring | None:
    from orchestrator.render.deployment import Scoring

    if form is None and (claims or dead_letters):
        fail("--claims and --dead-letters go with --scoring triggers or --scoring sequence", 2)
    return None if form is None else Scoring(form, broker, claims, dead_letters)


def _workload(lane_width: int, sequence_tokens: int, stretch: float) -> Workload:
    from orchestrator.targets import Workload

    try:
        return Workload(lane_width=lane_width, tokens_per_sequence=sequence_tokens, stretch=stretch)
    except ValueError as error:
        fail(f"--lane-width, --sequence-tokens, --stretch: {error}", 2)


def _scheduling(
    selector: Sequence[str] | None,
    tolerations: Sequence[str] | None,
    runtime_class: str,
    priority_class: str,
    scheduler: str,
    fs_group: int | None,
) -> Scheduling:
    from orchestrator.render.deployment import Scheduling

    return Scheduling(
        _pairs("--node-selector", selector),
        tuple(_toleration(text) for text in tolerations or ()),
        runtime_class,
        priority_class,
        scheduler,
        fs_group,
    )


def _toleration(text: str) -> Toleration:
    from orchestrator.render.deployment import Toleration

    rest, _, effect = text.partition(":")
    key, _, value = rest.partition("=")
    if not key or effect not in ("", "NoSchedule", "PreferNoSchedule", "NoExecute"):
        fail(
            "--toleration must be KEY[=VALUE][:EFFECT] with EFFECT NoSchedule, PreferNoSchedule or NoExecute, "
            f"got {text!r}",
            2,
        )
    return Toleration(key, value, effect)


def _pairs(option: str, texts: Sequence[str] | None) -> Mapping[str, str]:
    found = {}
    for text in texts or ():
        name, separator, value = text.partition("=")
        if not name or not separator:
            fail(f"{option} must be NAME=VALUE, got {text!r}", 2)
        found[name] = value
    return found


def _size(option: str, text: str) -> int | None:
    from orchestrator.planner import parse_size

    try:
        return parse_size(text) if text else None
    except ValueError as error:
        fail(f"{option}: {error}", 2)


def _whole_s(option: str, text: str) -> int:
    seconds = duration_s(option, text)
    if seconds != int(seconds):
        fail(f"{option}: {text!r} must be whole seconds", 2)
    return int(seconds)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("stagecraft")
    except PackageNotFoundError:
        fail("stagecraft is not installed, so its version is not known; give --image-tag", 2)


def _facts(what: Deployment, folder: Path, names: list[str], settings: tuple[ClusterSetting, ...]) -> dict[str, object]:
    from dataclasses import asdict

    from orchestrator.render.concurrency import concurrency

    return {
        "folder": str(folder),
        "files": names,
        "name": what.service_name,
        "namespace": what.namespace,
        "plan": what.plan.digest,
        "stages": [
            {"name": stage, "target": one.target, "container_concurrency": one.limit}
            for stage, one in zip(what.stage_names, concurrency(what), strict=True)
        ],
        "cluster_settings": [asdict(one) for one in settings],
    }


def _tell(what: Deployment, folder: Path, format: str, settings: tuple[ClusterSetting, ...]) -> None:
    """What to do next, and what the cluster must have for it."""
    from orchestrator.render.concurrency import concurrency
    from orchestrator.render.settings import patch_commands

    narrow = [name for name, one in zip(what.stage_names, concurrency(what), strict=True) if not one.holds_a_lane]
    if narrow:
        note(
            f"The KV memory of {', '.join(narrow)} holds less than one lane: {what.workload.lane_width} sequences with "
            f"{what.workload.tokens_per_sequence} tokens each. Fewer will travel together; give a lower --lane-width, "
            "more --kv-memory, or cut the plan into more stages."
        )
    if settings:
        note("The cluster's administrator has to set first, since Knative's defaults refuse it:")
        for command in patch_commands(settings):
            note(f"  {command}")
    if what.around is not None and what.around.deployer:
        note(f"To let {what.around.deployer} deploy, an administrator applies role.yaml and role-binding.yaml first.")
    if not what.images.registry:
        note(
            f"No --image-registry: nodes look for {what.images.name(NAMED)} on Docker Hub. Push the images of "
            f"`make images` to a registry of yours, or, for kind, load them as {SIDE_LOADED}/{NAMED} and give "
            f"--image-registry {SIDE_LOADED}."
        )
    shown = shlex.quote(str(folder))
    if format == "kn":
        note(f"Next: kubectl apply -k {shown} && {shlex.quote(str(folder / 'deploy.sh'))}")
    else:
        note(f"Next: stagecraft deploy {shown}   (or: kubectl apply -k {shown})")
