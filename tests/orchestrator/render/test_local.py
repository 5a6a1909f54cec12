"""What `up` applies: what Knative makes of it, and what names become."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.autoscaler.config import AutoscalerConfig, scaler_spec
from knative.resources.config_maps import DefaultsConfig
from knative.resources.documents import parse, parse_documents, read_documents
from knative.resources.objects import ConfigMap, Service
from orchestrator.plan import Plan
from orchestrator.planner import plan_by_stages
from orchestrator.render.deployment import Deployment, Scaling, WeightSource, dns_label
from orchestrator.render.local import local_manifests, write_local


@pytest.fixture(scope="module")
def deployment(tiny_checkpoint: Path) -> Deployment:
    from functions.contract.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(tiny_checkpoint))
    plan = plan_by_stages(checkpoint, 2, dtype="float32", name="Org/My Model_v1.5", model=str(tiny_checkpoint))
    scaling = Scaling(target=2.0, initial_scale=0)
    return Deployment(plan, scaling=scaling, weights=WeightSource(f"file://{tiny_checkpoint}"))


@pytest.fixture(scope="module")
def plan(deployment: Deployment) -> Plan:
    return deployment.plan


def parsed(objects: list[dict[str, Any]]) -> Any:
    documents = parse_documents("\n---\n".join(map(json.dumps, objects)), "m.yaml")
    return parse(documents, autoscaler=AutoscalerConfig(), defaults=DefaultsConfig())


@pytest.mark.parametrize(
    "scaling",
    [
        Scaling(target=2.0, initial_scale=0),
        Scaling(target=0.5, window_s=6, min_scale=1, max_scale=4, grace_s=0.5, initial_scale=0),
        Scaling(target=3, window_s=3600, min_scale=0, max_scale=8, initial_scale=2, grace_s=90),
    ],
)
def test_knative_takes_them_without_a_complaint(deployment: Deployment, scaling: Scaling) -> None:
    found = parsed(local_manifests(replace(deployment, scaling=scaling, kv_bytes_max=1 << 20, lane_width=4)))
    assert found.skipped == ()
    # what only a cluster can do is all that it warns of
    assert len(found.warnings) == 6, found.warnings  # volumes and securityContext of three services
    assert all("no effect: a process" in text for text in found.warnings), found.warnings
    settings = next(one for one in found.resources if isinstance(one, ConfigMap))
    config = AutoscalerConfig.from_data(settings.data)
    assert config.scale_to_zero_grace_period_s == scaling.grace_s
    services = [one for one in found.resources if isinstance(one, Service)]
    assert [one.name for one in services] == [
        "org-my-model-v1-5-stage-0", "org-my-model-v1-5-stage-1", "org-my-model-v1-5",
    ]  # fmt: skip
    for one in services[:2]:
        spec = scaler_spec(config, one.template.annotations, one.template.container_concurrency)
        assert scaling.target is not None
        assert spec.target_value == pytest.approx(0.7 * scaling.target)
        assert (spec.stable_window_s, spec.min_scale, spec.max_scale, spec.initial_scale) == (
            scaling.window_s, scaling.min_scale, scaling.max_scale, max(scaling.initial_scale, scaling.min_scale),
        )  # fmt: skip


def test_there_is_one_orchestrator_which_finds_and_wakes_its_stages(deployment: Deployment) -> None:
    scaling = Scaling(target=2.0, min_scale=2, max_scale=5)
    *_, front = parsed(local_manifests(replace(deployment, namespace="models", scaling=scaling))).resources
    env = dict(front.template.container.env)
    names = [f"org-my-model-v1-5-stage-{index}" for index in range(2)]
    assert env["ORCHESTRATOR_STAGE_URLS"] == ",".join(f"http://{name}.models.svc.cluster.local" for name in names)
    assert env["ORCHESTRATOR_MODEL_NAME"] == "Org/My Model_v1.5"
    assert front.annotations["stagecraft.dev/wakes"] == ",".join(names)
    spec = scaler_spec(AutoscalerConfig(), front.template.annotations, 0)
    assert (spec.min_scale, spec.max_scale) == (1, 1)


def test_each_stage_is_told_its_blocks_and_its_share(deployment: Deployment, tiny_checkpoint: Path) -> None:
    plan = deployment.plan
    shared = replace(deployment, threads_per_stage=3, kv_share=0.25)
    _, first, second, _ = parsed(local_manifests(shared)).resources
    one, two = (dict(service.template.container.env) for service in (first, second))
    assert (one["STAGE_BLOCKS"], two["STAGE_BLOCKS"]) == tuple(str(stage.blocks) for stage in plan.stages)
    assert (one["STAGE_INDEX"], two["STAGE_INDEX"], one["STAGE_COUNT"]) == ("0", "1", "2")
    assert one["STAGE_PLAN"] == two["STAGE_PLAN"] == plan.digest
    assert one["STAGE_MODEL"] == str(tiny_checkpoint)
    assert one["STAGE_THREADS"] == "3"
    assert float(one["STAGE_KV_SHARE"]) == pytest.approx(1 / 4)
    env = dict(parsed(local_manifests(replace(shared, kv_bytes_max=1 << 20))).resources[1].template.container.env)
    assert env["STAGE_KV_BYTES_MAX"] == str(1 << 20)
    assert "STAGE_KV_SHARE" not in env


def test_stages_on_the_same_cores_are_told_to_take_turns(deployment: Deployment) -> None:
    in_turn = replace(deployment, spread=1, lane_age_s=0, cores_lock="/tmp/cores.lock")
    envs = [dict(one.template.container.env) for one in parsed(local_manifests(in_turn)).resources[1:]]
    assert [env.get("STAGE_CORES_LOCK") for env in envs] == ["/tmp/cores.lock", "/tmp/cores.lock", None]
    assert (envs[2]["ORCHESTRATOR_SPREAD"], envs[2]["ORCHESTRATOR_LANE_AGE_S"]) == ("1", "0")
    plain = [dict(one.template.container.env) for one in parsed(local_manifests(deployment)).resources[1:]]
    names = {name for env in plain for name in env}
    assert not {"STAGE_CORES_LOCK", "ORCHESTRATOR_SPREAD", "ORCHESTRATOR_LANE_AGE_S"} & names


def test_the_files_hold_the_objects_in_order(deployment: Deployment, tmp_path: Path) -> None:
    written = write_local(deployment, tmp_path / "new" / "folder")
    assert [path.name for path in written] == [
        "config-autoscaler.yaml", "stage-0.yaml", "stage-1.yaml", "orchestrator.yaml",
    ]  # fmt: skip
    read = [dict(document.value) for path in written for document in read_documents(path)]
    assert json.dumps(read) == json.dumps(local_manifests(deployment))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("demo", "demo"),
        ("meta-llama/Llama-3.1-8B", "meta-llama-llama-3-1-8b"),
        ("7B", "m-7b"),
        ("Über_Modell!", "ber-modell"),
        ("...", "m"),
        ("模型", "m"),
    ],
)
def test_names_of_models_become_dns_labels(name: str, label: str) -> None:
    assert dns_label(name) == label


@given(st.text(min_size=1, max_size=100))
def test_any_name_gives_names_that_knative_takes(name: str) -> None:
    label = dns_label(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", label)
    # a revision adds -00001, a replica -abcde: 63 at most
    assert len(f"{label}-stage-99-00001-abcde") <= 63
