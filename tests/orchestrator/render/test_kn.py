"""`--format kn`: the commands of the script give the same services as the YAML files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from orchestrator.cost import Cost
from orchestrator.render.deployment import (
    Batch,
    Deployment,
    DeploymentError,
    Gpu,
    Images,
    Scaling,
    Scheduling,
    Scoring,
    Toleration,
    WeightSource,
)
from orchestrator.render.files import files, write

Tree = dict[str, Any]
Make = Callable[..., Deployment]
Trees = Callable[[Deployment], list[Tree]]

HOSTILE = {
    "COMMAS": "a,b=c,d",
    "EMPTY": "",
    "SPACES": "  a  b ",
    "QUOTES": 'it\'s "so"',
    "SHELL": "$(touch /tmp/x) `id` ${HOME} $HOME ! * ? ~ ; & | > < \\ # \\n",
    "LINES": "one\ntwo\nYAML\nthree\n",
    "DASHES": "--image evil",
    "TEMPLATE": "{{.Name}} {0} {head} %s",
    "UNICODE": "模型 🙂",
    "TAB": "a\tb\r\n",
}
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "five-stages": {"stages": 5, "namespace": "models", "name": "llama"},
    "hostile-environment": {"env": HOSTILE},
    "secret": {"weights": WeightSource("s3://bucket/a b,c='d'".replace(" ", ""), "weights-key")},
    "fraction": {"scaling": Scaling(target=2.5, container_concurrency=4)},
    "whole-target": {"scaling": Scaling(target=3.0, container_concurrency=0, min_scale=1, max_scale=0)},
    "gpu": {"gpu": Gpu(), "timeout_s": 3600},
    "mig": {"gpu": Gpu("nvidia.com/mig-1g.10gb")},
    "claim": {"weights": "pvc://claim/models/x"},
    "image-volume": {"weights": "oci://ghcr.io/acme/m:1"},
    "init-container": {"weights": WeightSource("oci://ghcr.io/acme/m:1", oci_as="init-container")},
    "pull-secret": {"images": Images("ghcr.io/acme", "1", "puller")},
    "scheduling": {
        "scheduling": Scheduling(
            {"a": "b", "yes": "no"}, (Toleration("k", "v", "NoSchedule"),), "nvidia", "high", "s", 0
        )
    },
    "nothing-around": {"around": None},
    "zero": {"scaling": Scaling(initial_scale=0, target_burst_capacity=0)},
    "batch": {"batch": Batch()},
    "batch-kept": {"batch": Batch("jobs", "results-claim"), "scoring": Scoring("sequence", "jobs")},
}
# a stand-in for kn that writes down how it was called
RECORDER = """#!{python} -IS
import json, os, sys
with open(os.environ["RECORD"], "a") as stream:
    stream.write(json.dumps({{"argv": sys.argv[1:], "stdin": sys.stdin.buffer.read().decode()}}) + "\\n")
"""
# kn writes files instead of asking a cluster with `create --target`, which `apply` does not know
WRAPPER = """#!/bin/sh
test "$1 $2" = "service apply" || exit 64
shift 2
exec "$REAL_KN" service create "$@" --target "$TARGET"
"""


def run_script(what: Deployment, folder: Path, kn: str, *arguments: str, **more: str) -> Path:
    """Runs deploy.sh of a rendered folder with KN=kn, in an otherwise empty environment; gives the script's path."""
    write(files(what, "kn"), folder)
    script = folder / "deploy.sh"
    subprocess.run(["sh", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    env = {"PATH": os.environ["PATH"], "KN": kn, "LC_ALL": "C.UTF-8", **more}
    done = subprocess.run([script, *arguments], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return script


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., list[Mapping[str, Any]]]:
    """The calls of kn that the script of a deployment makes: argv and stdin."""
    recorder = tmp_path / "kn recorder"
    recorder.write_text(RECORDER.format(python=sys.executable))
    recorder.chmod(0o755)

    def calls(what: Deployment, *arguments: str) -> list[Mapping[str, Any]]:
        record = tmp_path / "record"
        run_script(what, tmp_path / "deploy", str(recorder), *arguments, RECORD=str(record))
        return [json.loads(line) for line in record.read_text().splitlines()]

    return calls


def services(objects: list[Tree]) -> list[Tree]:
    return [one for one in objects if one["kind"] == "Service"]


@pytest.mark.parametrize("changes", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_the_flags_give_the_same_services(
    deployment: Make,
    trees: Trees,
    kn_flags: ModuleType,
    recorded: Callable[..., list[Mapping[str, Any]]],
    changes: dict[str, Any],
) -> None:
    what = deployment(orchestrator_as="knative", **changes)
    found = [kn_flags.service(call["argv"], call["stdin"]) for call in recorded(what)]
    assert found == services(trees(what))


def test_options_for_every_command_are_passed_on(
    deployment: Make, recorded: Callable[..., list[Mapping[str, Any]]]
) -> None:
    for call in recorded(deployment(orchestrator_as="knative"), "--context", "two words"):
        at = call["argv"].index("--context")
        assert call["argv"][at + 1] == "two words"


@pytest.mark.parametrize(("weights_gb", "expected_s"), [(0, 660), (60, 660 + 40 * 60)])
def test_kn_waits_as_long_as_knative(
    deployment: Make, recorded: Callable[..., list[Mapping[str, Any]]], weights_gb: int, expected_s: int
) -> None:
    """By itself kn gives up after 600 s, and the script would end before the services that are left."""
    what = deployment(orchestrator_as="knative")
    stages = tuple(replace(one, cost=Cost(1, weights_gb * 10**9, 1, 1)) for one in what.plan.stages)
    calls = recorded(replace(what, plan=replace(what.plan, stages=stages)))
    waits = [call["argv"][call["argv"].index("--wait-timeout") + 1] for call in calls]
    assert waits == [str(expected_s)] * 3


def test_a_failing_command_ends_the_script(deployment: Make, tmp_path: Path) -> None:
    write(files(deployment(orchestrator_as="knative"), "kn"), tmp_path / "deploy")
    count = tmp_path / "count"
    kn = tmp_path / "kn"
    kn.write_text(f"#!/bin/sh\necho x >> {count}\nexit 3\n")
    kn.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "KN": str(kn)}
    done = subprocess.run([tmp_path / "deploy" / "deploy.sh"], env=env, capture_output=True, check=False)
    assert done.returncode == 3
    assert count.read_text() == "x\n"


def test_the_folder_holds_the_services_nowhere_else(deployment: Make) -> None:
    written = files(deployment(orchestrator_as="knative"), "kn")
    kinds = {yaml.safe_load(one.text)["kind"] for one in written if one.name.endswith(".yaml")}
    assert "Service" not in kinds
    assert {"ServiceAccount", "NetworkPolicy", "Kustomization"} <= kinds


@pytest.mark.parametrize("part", ["stages_as", "orchestrator_as"])
def test_inference_services_are_not_for_kn(deployment: Make, part: str) -> None:
    what = deployment(**{"stages_as": "knative", "orchestrator_as": "knative", part: "kserve"})
    with pytest.raises(DeploymentError, match="--format kn writes Knative Services"):
        files(what, "kn")


@pytest.mark.parametrize("changes", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_kn_itself_gives_the_same_services(
    deployment: Make, trees: Trees, tmp_path: Path, changes: dict[str, Any]
) -> None:
    kn = shutil.which("kn")
    if kn is None:
        pytest.skip("NOT CHECKED WITH KN: it is not installed")
    wrapper, target = tmp_path / "kn", tmp_path / "target"
    wrapper.write_text(WRAPPER)
    wrapper.chmod(0o755)
    target.mkdir()
    what = deployment(orchestrator_as="knative", **changes)
    run_script(what, tmp_path / "deploy", str(wrapper), REAL_KN=kn, TARGET=str(target), HOME=str(tmp_path))
    found = {one["metadata"]["name"]: without_marks(one) for one in map(read, target.rglob("*.yaml"))}
    assert found == {one["metadata"]["name"]: one for one in services(trees(what))}


def read(path: Path) -> Tree:
    tree: Tree = yaml.safe_load(path.read_text())
    return tree


def without_marks(service: Tree) -> Tree:
    """Without what kn adds for itself (facts, section g)."""
    service.pop("status", None)
    template = service["spec"]["template"]
    for name in ("client.knative.dev/updateTimestamp", "client.knative.dev/user-image"):
        template["metadata"]["annotations"].pop(name, None)
    for metadata in (service["metadata"], template["metadata"]):
        metadata.pop("creationTimestamp", None)
    for container in template["spec"]["containers"]:
        if not container.get("name"):
            container.pop("name", None)
        if not container.get("resources"):
            container.pop("resources", None)
    return service
