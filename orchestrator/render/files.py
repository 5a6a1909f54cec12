"""The files of a deployment: one for each thing, in the order in which they are best applied."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.render import batch, surroundings
from orchestrator.render.deployment import Deployment, DeploymentError
from orchestrator.render.inference_services import (
    orchestrator_inference_service,
    serving_runtime,
    stage_inference_service,
)
from orchestrator.render.kn_script import kn_script
from orchestrator.render.knative_services import orchestrator_service, stage_service
from orchestrator.render.noted import Tree, plain, to_yaml
from orchestrator.render.scoring import score_objects

Format = Literal["yaml", "kn"]

KUSTOMIZATION = "kustomization.yaml"
SCRIPT = "deploy.sh"
MARK = "# Rendered by stagecraft"  # how a folder is known to be ours


@dataclass(frozen=True, slots=True)
class Object:
    """A Kubernetes object in a file of its own; `tree` may hold comments.

    One that is not `listed` is no part of the kustomization: somebody else applies it, before."""

    file: str
    tree: Tree
    heading: str = ""
    listed: bool = True

    @property
    def is_service(self) -> bool:
        return self.tree["kind"] in ("Service", "InferenceService", "ServingRuntime")


@dataclass(frozen=True, slots=True)
class File:
    """A file to write, by its name in the folder."""

    name: str
    text: str
    executable: bool = False


def service_objects(what: Deployment) -> list[Object]:
    """Stages and orchestrator. Raises DeploymentError."""
    found = []
    if what.stages_as == "kserve":
        heading = "What all stages of the model have in common."
        found.append(Object("serving-runtime.yaml", serving_runtime(what), heading))
    for index, stage in enumerate(what.plan.stages):
        make = stage_service if what.stages_as == "knative" else stage_inference_service
        heading = f"Stage {index} of {len(what.plan.stages)}: blocks {stage.blocks} of {what.plan.name}."
        found.append(Object(f"stage-{index}.yaml", make(what, index), heading))
    orchestrator = orchestrator_service if what.orchestrator_as == "knative" else orchestrator_inference_service
    heading = "The orchestrator: what clients speak to. It chains the stages and holds no weights."
    found.append(Object("orchestrator.yaml", orchestrator(what), heading))
    if what.batch is not None:
        heading = "Keeps the results of batches until they are fetched, and events that nobody could use."
        found.append(Object("results.yaml", batch.results_service(what, what.batch), heading))
    return found


def event_objects(what: Deployment) -> list[Object]:
    """The broker of a batch, and who gets which of its events; how scoring goes from stage to stage."""
    return [*_batch_objects(what), *_score_objects(what)]


def _score_objects(what: Deployment) -> list[Object]:
    return [] if what.scoring is None else [Object(*one) for one in score_objects(what, what.scoring).items()]


def _batch_objects(what: Deployment) -> list[Object]:
    if what.batch is None:
        return []
    heading = "Takes requests and results of batches; leave this file out where the Broker is somebody else's."
    found = [Object("broker.yaml", batch.broker(what, what.batch), heading)]
    for tree in batch.triggers(what, what.batch):
        name = tree["metadata"]["name"].removeprefix(f"{what.service_name}-")
        found.append(Object(f"trigger-{name}.yaml", tree))
    return found


def objects(what: Deployment) -> list[Object]:
    """Everything, in the order in which it is best applied. Raises DeploymentError."""
    return [*_before(what), *service_objects(what), *event_objects(what), *_after(what)]


def files(what: Deployment, format: Format = "yaml") -> list[File]:
    """The texts of all files. Raises DeploymentError for `kn` with objects that kn does not know."""
    every = objects(what)
    written = every
    if format == "kn":
        if "kserve" in (what.stages_as, what.orchestrator_as):
            raise DeploymentError(
                "--format kn writes Knative Services, which kn knows; InferenceServices are kubectl's: use --format "
                "yaml, or --stages-as knative --orchestrator-as knative"
            )
        written = [one for one in every if not one.is_service]
    head = f"{MARK} for {what.plan.name}, plan {what.plan.digest}."
    found = [File(one.file, f"{head}\n{to_yaml(one.tree, one.heading)}") for one in written]
    found.append(File(KUSTOMIZATION, f"{head}\n{_kustomization(written, format)}"))
    if format == "kn":
        services = [plain(one.tree) for one in every if one.is_service]
        found.append(File(SCRIPT, kn_script(what, services, head), executable=True))
    return found


def write(found: Sequence[File], folder: Path, *, force: bool = False) -> None:
    """Writes all files or none: into a new folder that then takes the place of the old one.

    Raises DeploymentError if `folder` exists (without `force`), or holds files that are not ours."""
    _check_target(folder, force)
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}-") as scratch:
            fresh = Path(scratch) / "new"
            fresh.mkdir()
            for one in found:
                path = fresh / one.name
                path.write_text(one.text, encoding="utf-8")
                path.chmod(0o755 if one.executable else 0o644)
            if folder.exists():
                os.replace(folder, Path(scratch) / "old")
            os.replace(fresh, folder)
    except OSError as error:
        raise DeploymentError(f"cannot write {folder}: {error.strerror or error}") from None


def _check_target(folder: Path, force: bool) -> None:
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise DeploymentError(f"{folder} exists and is no folder; choose another one with -o")
    present = sorted(folder.iterdir())
    foreign = [path.name for path in present if not _is_ours(path)]
    if foreign:
        raise DeploymentError(
            f"{folder} holds what stagecraft did not write: {', '.join(foreign[:5])}; choose another folder with -o, "
            "and keep changes of your own in a kustomize overlay outside of it"
        )
    if present and not force:
        raise DeploymentError(f"{folder} exists already; choose another folder, or write it anew with --force")


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as stream:
        return MARK.encode() in stream.read(4096)


def _before(what: Deployment) -> Iterator[Object]:
    if what.around is None:
        return
    for role in ("stage", "orchestrator"):
        yield Object(f"service-account-{role}.yaml", surroundings.service_account(what, role))
    yield Object(
        "config-map-plan.yaml", surroundings.plan_config_map(what), "The plan that everything here was rendered from."
    )
    if what.around.network_policy:
        heading = "Who may reach the stages' pods; it has effect where the cluster's network enforces policies."
        yield Object("network-policy.yaml", surroundings.network_policy(what), heading)
    if what.around.deployer:
        heading = (
            "The least that deploying these files needs. An administrator applies it, with role-binding.yaml, before."
        )
        yield Object("role.yaml", surroundings.deployer_role(what), heading, listed=False)
        yield Object("role-binding.yaml", surroundings.deployer_binding(what), listed=False)


def _after(what: Deployment) -> Iterator[Object]:
    if what.around is None:
        return
    if what.around.pod_monitor:
        heading = "For the Prometheus operator; leave it out with --no-pod-monitor where there is none."
        yield Object("pod-monitor.yaml", surroundings.pod_monitor(what), heading)
    if what.around.event_types:
        for tree in surroundings.event_types(what):
            kind = tree["metadata"]["name"].removeprefix(f"{what.service_name}-")
            yield Object(f"event-type-{kind}.yaml", tree, "For Knative Eventing; leave it out with --no-event-types.")


def _kustomization(written: Sequence[Object], format: Format) -> str:
    # no `namespace` here: every object has its own, and kustomize would move a RoleBinding's subject `default` too
    tree = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [one.file for one in written if one.listed],
    }
    if format == "kn":
        return to_yaml(
            tree, f"All but the services: kubectl apply -k . && ./{SCRIPT}, which also says how to remove them"
        )
    return to_yaml(tree, "Apply everything with: kubectl apply -k . (or stagecraft deploy .)")
