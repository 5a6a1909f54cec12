"""The files say what the objects are, to every reader of YAML, and are all that kubectl needs."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from orchestrator.plan import parse_plan
from orchestrator.render.deployment import Deployment, Gpu, Scheduling, Surroundings, WeightSource
from orchestrator.render.files import files, write
from orchestrator.render.noted import Noted, to_yaml

Tree = dict[str, Any]
Make = Callable[..., Deployment]
Trees = Callable[[Deployment], list[Tree]]

# the rights to deploy are given by somebody else, before
FOR_ADMINISTRATORS = ("role.yaml", "role-binding.yaml")
# what readers of YAML 1.1 take for numbers, truth values, dates, nothing, or parts of the syntax
TREACHEROUS = [
    "y", "n", "yes", "no", "on", "Off", "TRUE", "null", "Null", "~", "", "0", "-1", "1_000", "0x1F", "0o17", "017",
    "1e3", "1E400", ".5", ".inf", "-.INF", ".NaN", "12:30", "1:20:30", "2026-11-24", "=", "<<", "- a", "a: b", "a #b",
    "#", "&a", "*a", "!a", "|", ">", "%a", "@a", "`a", "{a}", "[a]", "'a'", '"a"', "a\\nb", " a", "a ", "\ta", "a\nb",
    "a\n", "\na", "\n", " \n a", "a\n\n", "a \nb", "a\rb", "a\r\nb", "\u0085", "\u2028", "\ufeff", "\x7f", "\x07",
    "naïve", "模型", "🙂", "a" * 5000, "word " * 1000, "...", "---", "---\na", "? a", ": a", "YAML", "a\nYAML\nb",
]  # fmt: skip
EVERYTHING = {
    "weights": WeightSource("pvc://claim/x", "key"),
    "gpu": Gpu("nvidia.com/mig-1g.10gb"),
    "scheduling": Scheduling({"yes": "no", "on": "1e3", "1_000": "0x1F", "a.b/c": ""}),
    "around": Surroundings(
        {"y": "12:30", "iam.example.org/role": "a: b\n"}, deployer="system:serviceaccount:ci:default"
    ),
    "env": {f"X{index}": text for index, text in enumerate(TREACHEROUS) if "\0" not in text},
}


def both(text: str) -> list[Any]:
    """What a reader of YAML 1.1 and one of YAML 1.2 take it for."""
    reader = YAML(typ="safe", pure=True)
    reader.version = (1, 2)
    return [yaml.safe_load(text), reader.load(io.StringIO(text))]


@pytest.mark.parametrize("stages_as", ["knative", "kserve"])
def test_readers_of_both_versions_of_yaml_find_the_objects(deployment: Make, trees: Trees, stages_as: str) -> None:
    what = deployment(2, stages_as=stages_as, **EVERYTHING)
    *written, _ = files(what)
    for one, tree in zip(written, trees(what), strict=True):
        assert both(one.text) == [tree, tree], one.name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), st.text(st.characters(codec="utf-8"))
)
@example("a", "\n  a\n b")
@example("a", "\n\n\t")
def test_any_text_survives(key: str, value: str) -> None:
    tree = {"spec": {key: value, "list": [value, {key: value}], "noted": {"a": Noted(value, "why"), "b": 1}}}
    expected = {"spec": {key: value, "list": [value, {key: value}], "noted": {"a": value, "b": 1}}}
    assert both(to_yaml(tree)) == [expected, expected]


@pytest.mark.parametrize("text", TREACHEROUS)
def test_treacherous_texts_survive_as_keys_and_as_values(text: str) -> None:
    tree = {"a": {text: text}, "b": [text, text]}
    assert both(to_yaml(tree)) == [tree, tree]


@pytest.mark.parametrize("stages_as", ["knative", "kserve"])
@pytest.mark.parametrize("format", ["yaml", "kn"])
def test_the_kustomization_lists_every_object_once(deployment: Make, stages_as: str, format: Any) -> None:
    if format == "kn" and stages_as == "kserve":
        pytest.skip("kn does not know InferenceServices")
    what = deployment(5, stages_as=stages_as, orchestrator_as=stages_as, around=Surroundings(deployer="jo"))
    written = files(what, format)
    names = [one.name for one in written]
    assert len(set(names)) == len(names)
    (kustomization,) = [one for one in written if one.name == "kustomization.yaml"]
    apart = {"kustomization.yaml", *FOR_ADMINISTRATORS}
    assert set(FOR_ADMINISTRATORS) <= set(names)
    objects = [name for name in names if name.endswith(".yaml") and name not in apart]
    assert yaml.safe_load(kustomization.text)["resources"] == objects
    assert [one.name for one in written if one.executable] == (["deploy.sh"] if format == "kn" else [])


def test_the_kustomization_is_one(deployment: Make, schemas: Any) -> None:
    text = next(one.text for one in files(deployment()) if one.name == "kustomization.yaml")
    tree = yaml.safe_load(text)
    # its kind has no metadata, and needs none
    assert schemas.complaints(tree) == []


@pytest.mark.parametrize("weights", ["", "s3://b/x", "pvc://c/x", "file:///models/x"])
def test_the_plan_in_the_config_map_is_the_plan(deployment: Make, trees: Trees, weights: str) -> None:
    what = deployment(5, weights)
    (found,) = [one for one in trees(what) if one["kind"] == "ConfigMap"]
    plan = parse_plan(found["data"]["plan.yaml"])
    assert plan.digest == what.plan.digest == found["metadata"]["annotations"]["stagecraft.dev/plan"]
    assert plan.stages == what.plan.stages
    assert plan.model == what.plan.model


def test_a_path_of_this_machine_is_not_told_to_the_cluster(deployment: Make, trees: Trees) -> None:
    what = deployment(2, "s3://b/x")
    what = replace(what, plan=replace(what.plan, model="/home/me/secret-model"))
    (found,) = [one for one in trees(what) if one["kind"] == "ConfigMap"]
    assert parse_plan(found["data"]["plan.yaml"]).model == "s3://b/x"
    assert "secret-model" not in str(trees(what))


@pytest.mark.parametrize(
    ("stages_as", "orchestrator_as"), [("knative", "kserve"), ("kserve", "kserve"), ("knative", "knative")]
)
def test_kubectl_finds_the_objects(
    deployment: Make, trees: Trees, tmp_path: Path, stages_as: str, orchestrator_as: str
) -> None:
    """kubectl reads with Go's YAML, and kustomize may change what it reads."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("NOT CHECKED WITH KUBECTL: it is not installed")
    # kustomize itself stumbles over the first two, and PyYAML over what it writes for the others
    env = {name: text for name, text in EVERYTHING["env"].items() if text not in ("\x7f", "\x85", "=", "<<")}
    changes = {**EVERYTHING, "env": env}
    what = deployment(2, stages_as=stages_as, orchestrator_as=orchestrator_as, **changes)
    write(files(what), tmp_path / "deploy")
    done = subprocess.run([kubectl, "kustomize", str(tmp_path / "deploy")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(done.stdout)}
    expected = {(one["kind"], one["metadata"]["name"]): one for one in trees(what)}
    assert found == {key: one for key, one in expected.items() if key[0] not in ("Role", "RoleBinding")}


@pytest.mark.parametrize("runtime", ["knative", "kserve"])
def test_a_deployer_may_look_at_what_status_shows(deployment: Make, trees: Trees, runtime: str) -> None:
    """`status --cluster` asks for InferenceServices wherever the cluster has KServe, whatever was rendered."""
    what = deployment(stages_as=runtime, orchestrator_as=runtime, around=Surroundings(deployer="jo"))
    (role,) = (one for one in trees(what) if one["kind"] == "Role")
    allowed = {(group, name) for rule in role["rules"] for group in rule["apiGroups"] for name in rule["resources"]}
    shown = {("serving.knative.dev", "services"), ("serving.knative.dev", "revisions")}
    assert {*shown, ("serving.kserve.io", "inferenceservices")} <= allowed


def test_a_deployer_gets_no_rights_for_what_is_left_out(deployment: Make, trees: Trees) -> None:
    around = Surroundings(network_policy=False, pod_monitor=False, event_types=False, deployer="jo")
    (role,) = (one for one in trees(deployment(around=around)) if one["kind"] == "Role")
    granted = {name for rule in role["rules"] for name in rule["resources"]}
    assert "services" in granted
    assert granted & {"networkpolicies", "podmonitors", "eventtypes", "brokers"} == set()
