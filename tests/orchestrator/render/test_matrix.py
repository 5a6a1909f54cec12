"""Every combination of options gives objects that schemas and rules of a cluster take."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.render.deployment import (
    Batch,
    Deployment,
    DeploymentError,
    Gpu,
    Images,
    Resources,
    Scaling,
    Scheduling,
    Surroundings,
    Toleration,
    WeightSource,
)

RUNTIMES = ("knative", "kserve")
GPUS: dict[str, Gpu | None] = {
    "cpu": None,
    "gpu": Gpu(),
    "gpu with known memory": Gpu(memory_bytes=24 << 30),
    "mig": Gpu("nvidia.com/mig-1g.10gb"),
    "shared": Gpu(shared_by=4),
}
WEIGHTS: dict[str, WeightSource] = {
    name: WeightSource(uri, oci_as=oci_as)
    for name, uri, oci_as in (
        ("of-the-plan", "", "image-volume"),
        ("demo", "demo", "image-volume"),
        ("hub", "owner/name", "image-volume"),
        ("hub-revision", "owner/name@refs/pr/7", "image-volume"),
        ("hf", "hf://owner/name", "image-volume"),
        ("s3", "s3://bucket/models/x/", "image-volume"),
        ("gs", "gs://bucket/x", "image-volume"),
        ("https", "https://example.org:8443/models/x", "image-volume"),
        ("claim", "pvc://weights", "image-volume"),
        ("claim-path", "pvc://weights/llama/13b/", "image-volume"),
        ("image", "oci://ghcr.io/acme/llama:1", "image-volume"),
        ("image-copied", "oci://ghcr.io/acme/llama:1", "init-container"),
        ("folder-of-image", "file:///models/mine", "image-volume"),
    )
}
SCHEDULING = {
    "node-selector": Scheduling(node_selector={"nvidia.com/gpu.product": "NVIDIA-L4", "yes": "no", "zone": ""}),
    "tolerations": Scheduling(tolerations=(Toleration("nvidia.com/gpu", "", "NoSchedule"), Toleration("a", "b"))),
    "runtime-class": Scheduling(runtime_class="nvidia"),
    "priority-class": Scheduling(priority_class="batch"),
    "scheduler": Scheduling(scheduler="volcano"),
    "fs-group": Scheduling(fs_group=2000),
    "everything": Scheduling({"a": "b"}, (Toleration("k"),), "nvidia", "high", "volcano", 0),
}
SCALING = {
    "always-on": Scaling(min_scale=2, max_scale=2),
    "unlimited": Scaling(max_scale=0),
    "starts-at-zero": Scaling(initial_scale=0),
    "starts-wide": Scaling(initial_scale=3, max_scale=4),
    "no-hard-limit": Scaling(target=2.5, container_concurrency=0),
    "fraction": Scaling(target=0.01, container_concurrency=1),
    "greatest": Scaling(target=999.0, container_concurrency=1000, max_scale=2**31 - 1),
    "windows": Scaling(window_s=3600, scale_down_delay_s=3600, target_burst_capacity=0),
}
OTHERS: dict[str, dict[str, Any]] = {
    "pull-secret": {"images": Images("ghcr.io/acme", "0.3.0", "puller")},
    "no-registry": {"images": Images("", "0.3.0")},
    "port-in-registry": {"images": Images("localhost:5000/a_b/c--d", "latest")},
    "deployer": {"around": Surroundings(deployer="system:serviceaccount:ci:builder")},
    "user": {"around": Surroundings(deployer="jo@example.org")},
    "nothing-around": {"around": Surroundings({}, False, (), "monitoring", False, False)},
    "identity": {"around": Surroundings({"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/x"})},
    "namespaces": {"around": Surroundings(ingress_namespaces=("contour-internal",), monitoring_namespace="prom")},
    "long-timeout": {"timeout_s": 3600},
    "short-timeout": {"timeout_s": 1},
    "long-name": {"name": "m" * 44, "namespace": "n" * 63},
    "resources": {"stage": Resources("500m", "40.5Gi"), "orchestrator": Resources("0.25", "")},
    "kv": {"kv_bytes_max": 3 << 30, "shared_memory": "2Gi"},
    "batch": {"batch": Batch()},
    "batch-kept": {
        "batch": Batch("jobs.of-all", "results-claim", max_in_flight=1),
        "scaling": SCALING["starts-at-zero"],
    },
    "env": {"env": {"LOG_LEVEL": "debug", "A": "", "_b.c-d": "x=y, 'z'\n\t\"w\"", "YES": "no"}},
}

Complaints = Callable[..., list[str]]
Make = Callable[..., Deployment]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_source_of_weights_with_every_device(deployment: Make, complaints: Complaints, weights: str) -> None:
    for count, stages_as, orchestrator_as, gpu in product((2, 5), RUNTIMES, RUNTIMES, GPUS.values()):
        what = deployment(count, WEIGHTS[weights], gpu, stages_as=stages_as, orchestrator_as=orchestrator_as)
        assert complaints(what) == [], (count, stages_as, orchestrator_as, gpu)


@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param({"scheduling": value}, id=name) for name, value in SCHEDULING.items()),
        *(pytest.param({"scaling": value}, id=name) for name, value in SCALING.items()),
        *(pytest.param(value, id=name) for name, value in OTHERS.items()),
    ],
)
def test_every_option_with_every_runtime(deployment: Make, complaints: Complaints, changes: dict[str, Any]) -> None:
    for stages_as, orchestrator_as, weights in product(RUNTIMES, RUNTIMES, ("s3", "claim-path", "image-copied")):
        for gpu in (None, Gpu("nvidia.com/mig-1g.10gb")):
            what = deployment(2, WEIGHTS[weights], gpu, stages_as=stages_as, orchestrator_as=orchestrator_as, **changes)
            assert complaints(what) == [], (stages_as, orchestrator_as, weights, gpu)


@pytest.mark.parametrize("secret", ["", "weights-key"])
@pytest.mark.parametrize(
    "uri", ["s3://bucket/x", "gs://bucket/x", "hf://owner/name", "owner/name@v1", "https://e.org/x"]
)
def test_kserve_downloads_the_whole_model_on_request(
    deployment: Make, complaints: Complaints, trees: Callable[[Deployment], list[dict[str, Any]]], uri: str, secret: str
) -> None:
    for orchestrator_as in RUNTIMES:
        source = WeightSource(uri, secret, storage_initializer=True)
        what = deployment(5, source, stages_as="kserve", orchestrator_as=orchestrator_as)
        assert complaints(what) == []
        found = [
            one["spec"]["predictor"]["model"] for one in trees(what) if one["metadata"]["name"].endswith("-stage-1")
        ]
        assert [one["storageUri"] for one in found] == [uri.replace("owner/name@", "hf://owner/name:")]


@pytest.mark.parametrize("uri", ["s3://bucket/x", "pvc://claim/x", "oci://ghcr.io/acme/m:1", "owner/name"])
def test_a_secret_for_the_weights(deployment: Make, complaints: Complaints, uri: str) -> None:
    for stages_as, orchestrator_as in product(RUNTIMES, RUNTIMES):
        what = deployment(2, WeightSource(uri, "weights-key"), stages_as=stages_as, orchestrator_as=orchestrator_as)
        assert complaints(what) == []


@pytest.mark.parametrize("orchestrator_as", RUNTIMES)
def test_all_pods_that_mount_a_claim_are_in_its_group(
    deployment: Make, trees: Callable[[Deployment], list[dict[str, Any]]], orchestrator_as: str
) -> None:
    for stages_as, (weights, mounted) in product(RUNTIMES, (("pvc://claim/x", True), ("s3://bucket/x", False))):
        group = Scheduling(fs_group=2000)
        what = deployment(2, weights, stages_as=stages_as, orchestrator_as=orchestrator_as, scheduling=group)
        kinds = ("Service", "InferenceService")
        by_name = {one["metadata"]["name"]: one["spec"] for one in trees(what) if one["kind"] in kinds}
        spec = by_name[what.service_name]
        pod = spec["predictor"] if orchestrator_as == "kserve" else spec["template"]["spec"]
        assert pod.get("securityContext") == ({"fsGroup": 2000} if mounted else None), (stages_as, weights)


@pytest.mark.parametrize("limit", [0, 150])
def test_the_burst_capacity_is_above_what_all_replicas_take(
    deployment: Make, trees: Callable[[Deployment], list[dict[str, Any]]], limit: int
) -> None:
    """Without a hard limit Knative counts the target for each."""
    what = deployment(scaling=Scaling(target=100, container_concurrency=limit, max_scale=4))
    stages = [one["spec"]["template"]["metadata"] for one in trees(what) if one["metadata"]["name"] in what.stage_names]
    for stage in stages:
        assert int(stage["annotations"]["autoscaling.knative.dev/target-burst-capacity"]) > 4 * 100
    assert len(stages) == 2


names = st.from_regex(r"[a-z]([-a-z0-9]{0,30}[a-z0-9])?", fullmatch=True).filter(
    lambda text: "-predictor" not in text and "-default" not in text
)
label_names = st.from_regex(
    r"([a-z0-9]{1,20}\.[a-z]{2,9}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,40}[A-Za-z0-9])?", fullmatch=True
)
label_values = st.from_regex(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,60}[A-Za-z0-9])?)?", fullmatch=True)
scalings = st.builds(
    lambda target, room, window, least, more, initial, delay: Scaling(
        target,
        None if room is None else -(-int(target * 100) // 100) + room,
        window,
        least,
        least + more,
        initial,
        delay,
    ),
    st.floats(0.01, 900, allow_nan=False),
    st.none() | st.integers(0, 90),
    st.integers(6, 3600),
    st.integers(0, 20),
    st.integers(1, 100),
    st.integers(0, 30),
    st.integers(0, 3600),
)
schedulings = st.builds(
    Scheduling,
    st.dictionaries(label_names, label_values, max_size=3),
    st.lists(
        st.builds(Toleration, label_names, label_values, st.sampled_from(["", "NoSchedule", "NoExecute"])),
        max_size=3,
    ).map(tuple),
    st.sampled_from(["", "nvidia", "a.b"]),
    st.sampled_from(["", "high"]),
    st.sampled_from(["", "volcano"]),
    st.none() | st.integers(0, 2**31 - 1),
)  # fmt: skip
environments = st.dictionaries(
    st.from_regex(r"X[-._A-Za-z0-9]{0,20}", fullmatch=True),
    st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    max_size=4,
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_deployment_that_can_be_built(deployment: Make, complaints: Complaints, data: st.DataObject) -> None:
    draw = data.draw
    try:
        what = deployment(
            draw(st.sampled_from([2, 5])),
            draw(st.sampled_from(list(WEIGHTS.values()))),
            draw(st.sampled_from(list(GPUS.values()))),
            name=draw(names),
            namespace=draw(names),
            stages_as=draw(st.sampled_from(RUNTIMES)),
            orchestrator_as=draw(st.sampled_from(RUNTIMES)),
            scaling=draw(scalings),
            scheduling=draw(schedulings),
            env=draw(environments),
            timeout_s=draw(st.integers(1, 100_000)),
        )
    except DeploymentError as error:
        assert "\n" not in str(error)  # noqa: PT017 - the error is one of many possible outcomes
        return
    assert complaints(what) == []
