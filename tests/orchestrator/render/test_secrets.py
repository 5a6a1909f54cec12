"""Secrets of a deployment: mounted where they are read, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.render.deployment import Batch, Deployment, DeploymentError, Scoring, Secrets
from orchestrator.render.files import files

Make = Callable[..., Deployment]
Trees = Callable[[Deployment], list[dict[str, Any]]]


def pods(trees: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What holds containers and volumes, by the name of its object."""
    found = {}

    def look(name: str, value: Any) -> None:
        if isinstance(value, dict):
            if "volumes" in value:
                found[name] = value
            for inner in value.values():
                look(name, inner)
        elif isinstance(value, list):
            for inner in value:
                look(name, inner)

    for tree in trees:
        look(tree["metadata"]["name"], tree)
    return found


def mounted(pod: dict[str, Any]) -> dict[str, str]:
    """Secret -> folder, and every one of them read-only."""
    (container,) = pod.get("containers") or [pod["model"]]
    names = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    mounts = [mount for mount in container["volumeMounts"] if mount["name"] in names]
    assert all(mount["readOnly"] for mount in mounts)
    return {names[mount["name"]]: mount["mountPath"] for mount in mounts}


def variables(tree: Any) -> dict[str, str]:
    """Every variable that is set to a path of a mounted key, wherever it stands."""
    if isinstance(tree, list):
        return {name: value for inner in tree for name, value in variables(inner).items()}
    if not isinstance(tree, dict):
        return {}
    own = {tree["name"]: tree["value"]} if str(tree.get("value", "")).startswith("/etc/stagecraft/") else {}
    return own | {name: value for inner in tree.values() for name, value in variables(inner).items()}


@pytest.mark.parametrize("stages_as", ["knative", "kserve"])
@pytest.mark.parametrize("orchestrator_as", ["knative", "kserve"])
def test_each_pod_mounts_the_keys_that_it_reads(
    deployment: Make, trees: Trees, stages_as: str, orchestrator_as: str
) -> None:
    what = deployment(2, stages_as=stages_as, orchestrator_as=orchestrator_as, secrets=Secrets("signing-1", "clients"))
    found = trees(what)
    by_name = pods(found)
    orchestrator = by_name.pop(what.service_name)
    assert mounted(orchestrator) == {
        "signing-1": "/etc/stagecraft/signing", "clients": "/etc/stagecraft/api-keys",
    }  # fmt: skip
    assert by_name
    for pod in by_name.values():
        assert mounted(pod) == {"signing-1": "/etc/stagecraft/signing"}
    assert variables(found) == {
        "STAGE_SIGNING_KEY_FILE": "/etc/stagecraft/signing/keys",
        "ORCHESTRATOR_STAGE_SIGNING_KEY_FILE": "/etc/stagecraft/signing/keys",
        "ORCHESTRATOR_API_KEYS_FILE": "/etc/stagecraft/api-keys/keys",
    }


def test_the_files_say_how_to_make_the_secret_and_hold_none(deployment: Make) -> None:
    texts = "".join(one.text for one in files(deployment(2, namespace="team", secrets=Secrets("signing-1"))))
    folded = " ".join(texts.replace("#", " ").split())
    assert "kubectl create secret generic signing-1 -n team --from-file=keys=/dev/stdin" in folded
    assert "kind: Secret" not in texts


def test_without_secrets_nothing_is_mounted(deployment: Make, trees: Trees) -> None:
    assert not any(mounted(pod) for pod in pods(trees(deployment(2))).values())


@pytest.mark.parametrize("secrets", [{"signing": "A_B"}, {"api_keys": "-x"}])
def test_a_secret_has_the_name_of_an_object(secrets: dict[str, str]) -> None:
    with pytest.raises(DeploymentError, match="must be the name of a Secret"):
        Secrets(**secrets)


@pytest.mark.parametrize(
    ("wanted", "variable"),
    [
        ({"secrets": Secrets("s"), "scoring": Scoring()}, "STAGE_UNSIGNED_SCORES"),
        ({"secrets": Secrets("", "s"), "batch": Batch()}, "ORCHESTRATOR_EVENTS_WITHOUT_KEY"),
    ],
)
def test_a_broker_is_let_in_only_when_asked_for(deployment: Make, wanted: dict[str, Any], variable: str) -> None:
    with pytest.raises(DeploymentError, match=f"--env {variable}=allow"):
        deployment(2, **wanted)
    deployment(2, env={variable: "allow"}, **wanted)


@pytest.mark.parametrize("runtime", ["knative", "kserve"])
def test_cluster_takes_the_objects(deployment: Make, complaints: Callable[..., list[str]], runtime: str) -> None:
    what = deployment(2, stages_as=runtime, orchestrator_as=runtime, secrets=Secrets("signing-1", "clients"))
    assert complaints(what) == []
