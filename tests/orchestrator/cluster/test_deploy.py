"""`stagecraft deploy`, `undeploy` and `status --cluster` against a fake API server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from orchestrator.cluster import (
    ClusterError,
    Progress,
    Unreachable,
    connect,
    locate,
    patience_s,
    read_objects,
    remove,
    targets,
    wait_ready,
    write,
)

ROOT = Path(__file__).resolve().parents[3]
PLAN = ROOT / "tests" / "golden" / "demo-2" / "plan.yaml"
WAIT_S = 60  # against hangs
QUICK = ("--poll", "5ms")

STAGE = "service.serving.knative.dev/toy-stage-0"
ORCHESTRATOR = "inferenceservice.serving.kserve.io/toy"
ACCOUNT = "serviceaccount/toy"

Make = Callable[..., dict[str, Any]]
Run = Callable[..., Any]


def service(make: Make, image: str = "stage:1", name: str = "toy-stage-0") -> dict[str, Any]:
    return make("Service", name, spec={"template": {"spec": {"containers": [{"image": image}]}}})


def containers(world: Any) -> Any:
    return world.tree("services", "toy-stage-0")["spec"]["template"]["spec"]["containers"]


def test_everything_is_created_and_waited_for(stagecraft: Run, world: Any, toy: Path) -> None:
    done = stagecraft("deploy", toy, *QUICK)
    assert (done.code, done.out.splitlines()) == (
        0,
        [f"{ACCOUNT} created", f"{STAGE} created", f"{ORCHESTRATOR} created"],
    )
    assert "toy-stage-0 is ready at http://toy-stage-0.models.example.com" in done.err.splitlines()
    assert "toy is ready at http://toy-predictor.models.example.com" in done.err.splitlines()
    assert containers(world) == [{"image": "stage:1"}]
    assert all("fieldManager=stagecraft" in one for one in world.writes())


def test_running_it_again_changes_nothing(stagecraft: Run, world: Any, toy: Path) -> None:
    stagecraft("deploy", toy, *QUICK)
    before = world.tree("services", "toy-stage-0")["metadata"]["generation"]
    done = stagecraft("deploy", toy, *QUICK)
    assert (done.code, done.out.splitlines()) == (
        0,
        [f"{ACCOUNT} unchanged", f"{STAGE} unchanged", f"{ORCHESTRATOR} unchanged"],
    )
    assert world.tree("services", "toy-stage-0")["metadata"]["generation"] == before


def test_a_change_is_told_and_waited_for(stagecraft: Run, world: Any, make: Make, write_files: Run) -> None:
    stagecraft("deploy", write_files(make("ServiceAccount", "toy"), service(make)), *QUICK)
    done = stagecraft("deploy", write_files(make("ServiceAccount", "toy"), service(make, "stage:2")), *QUICK)
    assert done.out.splitlines() == [f"{ACCOUNT} unchanged", f"{STAGE} configured"]
    assert done.code == 0
    status = world.tree("services", "toy-stage-0")["status"]
    assert (status["observedGeneration"], status["conditions"][0]["status"]) == (2, "True")


def test_json_says_it_all(stagecraft: Run, server: Any, toy: Path) -> None:
    done = stagecraft("deploy", toy, "--json", *QUICK)
    facts = json.loads(done.out)
    assert (facts["context"], facts["server"]) == ("fake", server.address)
    assert [(one["kind"], one["name"], one["action"]) for one in facts["objects"]] == [
        ("ServiceAccount", "toy", "created"),
        ("Service", "toy-stage-0", "created"),
        ("InferenceService", "toy", "created"),
    ]
    assert [(one["name"], one["ready"], one["revision"]) for one in facts["services"]] == [
        ("toy-stage-0", True, "toy-stage-0-00001"),
        ("toy", True, "toy-predictor-00001"),
    ]


def test_without_waiting_it_ends_when_all_is_written(stagecraft: Run, world: Any, toy: Path) -> None:
    world.fates["toy-stage-0"] = None  # would break the controller
    done = stagecraft("deploy", toy, "--no-wait")
    assert (done.code, world.names("services")) == (0, ["toy-stage-0"])
    assert "ready" not in done.err


# -- refusals -----------------------------------------------------------------------------------------------------


def test_all_refusals_are_told_and_nothing_is_written(
    stagecraft: Run, world: Any, make: Make, write_files: Run
) -> None:
    def webhook(tree: dict[str, Any]) -> str | None:
        if tree["kind"] != "Service":
            return None
        return (
            'admission webhook "validation.webhook.serving.knative.dev" denied the request: validation failed: '
            "must not set the field(s): spec.template.spec.nodeSelector"
        )

    world.webhook = webhook
    trees = (make("ServiceAccount", "toy"), service(make), service(make, name="toy-stage-1"))
    folder = write_files(*trees)
    done = stagecraft("deploy", folder)
    assert (done.code, done.out, world.writes(), world.records) == (1, "", [], {})
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1:3] for line in errors] == [
        [f"{folder}/service-toy-stage-0.yaml:1", STAGE],
        [f"{folder}/service-toy-stage-1.yaml:1", "service.serving.knative.dev/toy-stage-1"],
    ]
    assert all("must not set the field(s): spec.template.spec.nodeSelector (400 BadRequest)" in one for one in errors)


def test_a_dry_run_on_the_server_writes_nothing(stagecraft: Run, world: Any, make: Make, write_files: Run) -> None:
    world.put("serving.knative.dev/v1", "services", service(make, "stage:0"), "stagecraft")
    folder = write_files(make("ServiceAccount", "toy"), service(make))
    done = stagecraft("deploy", folder, "--dry-run", "server")
    assert (done.code, done.out.splitlines()) == (
        0,
        [f"{ACCOUNT} created (server dry run)", f"{STAGE} configured (server dry run)"],
    )
    assert world.writes() == []
    assert world.names("serviceaccounts") == []
    facts = json.loads(stagecraft("deploy", folder, "--dry-run", "server", "--json").out)
    assert (facts["dry_run"], [one["action"] for one in facts["objects"]]) == (True, ["created", "configured"])


def test_a_conflict_names_fields_and_managers_and_can_be_forced(
    stagecraft: Run, world: Any, make: Make, write_files: Run
) -> None:
    stagecraft("deploy", write_files(service(make)), *QUICK)
    world.put("serving.knative.dev/v1", "services", service(make, "stage:edited"), "kubectl-edit")
    folder = write_files(service(make, "stage:2"))
    done = stagecraft("deploy", folder, *QUICK)
    assert done.code == 1
    assert ".spec.template.spec.containers: set by kubectl-edit" in done.err
    assert "--force-conflicts" in done.err
    assert containers(world) == [{"image": "stage:edited"}]
    done = stagecraft("deploy", folder, "--force-conflicts", *QUICK)
    assert (done.code, done.out) == (0, f"{STAGE} configured\n")
    assert containers(world) == [{"image": "stage:2"}]


def test_a_missing_namespace_is_said_once_with_the_command_that_makes_it(
    stagecraft: Run, world: Any, toy: Path
) -> None:
    world.namespaces.discard("models")
    done = stagecraft("deploy", toy)
    assert (done.code, done.err) == (
        1,
        "error: there is no namespace models; make it first: kubectl create namespace models\n",
    )


def test_missing_rights_name_verb_and_resource(stagecraft: Run, world: Any, fake: ModuleType, toy: Path) -> None:
    words = (
        'services.serving.knative.dev "toy-stage-0" is forbidden: User "me" cannot patch resource "services" in API '
        'group "serving.knative.dev" in the namespace "models"'
    )
    world.denied["PATCH", "services"] = lambda: fake.Answer(403, words)
    done = stagecraft("deploy", toy)
    assert done.code == 1
    assert "you may not patch services.serving.knative.dev (403 Forbidden)" in done.err
    assert world.records == {}


def test_expired_credentials(stagecraft: Run, server: Any, toy: Path, tmp_path: Path) -> None:
    server.kubeconfig(tmp_path / "kubeconfig", token="old")
    for command in (("deploy", toy), ("undeploy", toy), ("status", "--cluster")):
        done = stagecraft(*command)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("error: the cluster does not accept your credentials (401 Unauthorized)")


def test_a_user_without_credentials(stagecraft: Run, world: Any, fake: ModuleType, toy: Path) -> None:
    words = 'services is forbidden: User "system:anonymous" cannot patch resource "services" in API group ""'
    world.denied["PATCH", "services"] = lambda: fake.Answer(403, words)
    assert "the cluster takes you for nobody" in stagecraft("deploy", toy).err


def test_an_unknown_context_lists_the_known_ones(stagecraft: Run, server: Any, toy: Path) -> None:
    done = stagecraft("deploy", toy, "--context", "nowhere")
    assert done.code == 1
    assert "has no context nowhere; there are: fake, other" in done.err


def test_files_are_read_before_the_cluster_is_asked(stagecraft: Run, world: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("kind: [")
    done = stagecraft("deploy", tmp_path / "bad.yaml")
    assert (done.code, world.requests) == (1, [])
    assert done.err.startswith(f"error: {tmp_path}/bad.yaml:1: not YAML")


@pytest.mark.parametrize("command", ["deploy", "undeploy"])
def test_a_folder_for_kn_is_not_taken_without_its_services(
    stagecraft: Run, world: Any, tmp_path: Path, command: str
) -> None:
    """Undeploying it would take accounts and policy from services that go on, with their GPUs."""
    folder = tmp_path / "kn"
    assert stagecraft("render", PLAN, "-o", folder, "--orchestrator-as", "knative", "--format", "kn").code == 0
    done = stagecraft(command, folder)
    assert (done.code, done.out, world.requests) == (1, "", [])
    assert f"error: {folder} is rendered for kn: its services are in {folder}/deploy.sh" in done.err
    assert (
        "kn service delete --namespace default demo demo-stage-1 demo-stage-0\n" in (folder / "deploy.sh").read_text()
    )


def test_an_object_that_is_being_deleted_is_not_changed(
    stagecraft: Run, world: Any, make: Make, write_files: Run
) -> None:
    world.put("serving.knative.dev/v1", "services", service(make), "stagecraft")
    world.tree("services", "toy-stage-0")["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    done = stagecraft("deploy", write_files(service(make, "stage:2")))
    assert (done.code, world.writes()) == (1, [])
    assert "is being deleted since 2026-01-01T00:00:00Z; wait until it is gone" in done.err


# -- what a cluster lacks -------------------------------------------------------------------------------------------


def test_optional_kinds_that_the_cluster_lacks_are_skipped(
    stagecraft: Run, world: Any, make: Make, write_files: Run
) -> None:
    del world.kinds["monitoring.coreos.com/v1"], world.kinds["eventing.knative.dev/v1beta2"]
    done = stagecraft("deploy", write_files(service(make), make("PodMonitor", "toy"), make("EventType", "toy")), *QUICK)
    assert (done.code, done.out) == (0, f"{STAGE} created\n")
    skipped = [line for line in done.err.splitlines() if line.startswith("skipped ")]
    assert skipped == [
        "skipped podmonitor.monitoring.coreos.com/toy: the cluster has no PodMonitor in monitoring.coreos.com/v1 (the "
        "Prometheus operator)",
        "skipped eventtype.eventing.knative.dev/toy: the cluster has no EventType in eventing.knative.dev/v1beta2 "
        "(Knative Eventing)",
    ]


def test_a_cluster_without_knative_is_one_error_and_nothing_is_written(
    stagecraft: Run, world: Any, make: Make, write_files: Run
) -> None:
    del world.kinds["serving.knative.dev/v1"]
    folder = write_files(make("ServiceAccount", "toy"), service(make), service(make, name="toy-stage-1"))
    done = stagecraft("deploy", folder)
    assert (done.code, world.records) == (1, {})
    (line,) = done.err.splitlines()
    assert line.startswith(
        "error: the cluster has no Service in serving.knative.dev/v1, which belongs to Knative Serving"
    )


@pytest.mark.parametrize(
    ("api_version", "kind"), [("eventing.knative.dev/v1", "Broker"), ("flows.knative.dev/v1", "Sequence")]
)
def test_a_batch_on_a_cluster_without_eventing_is_one_error_and_nothing_is_written(
    stagecraft: Run, world: Any, make: Make, write_files: Run, api_version: str, kind: str
) -> None:
    folder = write_files(service(make), {"apiVersion": api_version, "kind": kind, "metadata": {"name": "default"}})
    done = stagecraft("deploy", folder)
    assert (done.code, world.records) == (1, {})
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: the cluster has no {kind} in {api_version}, which belongs to Knative Eventing;")


# -- services that do not become ready ------------------------------------------------------------------------------


def crashing() -> dict[str, Any]:
    before = {"terminated": {"exitCode": 1, "reason": "Error"}}
    loop = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}}
    user = {"name": "user-container", "ready": False, "restartCount": 4, "state": loop, "lastState": before}
    return {"kind": "Pod", "status": {"containerStatuses": [user]}}


def test_a_service_that_fails_is_told_at_once_with_reason_events_and_logs(
    stagecraft: Run, world: Any, fake: ModuleType, make: Make, write_files: Run
) -> None:
    message = 'Revision "toy-stage-0-00001" failed with message: Container failed with: exit code 1.'
    world.fates["toy-stage-0"] = fake.Fate(2, "RevisionFailed", message, [crashing()])
    pod = "toy-stage-0-00001-deployment-x"
    lines = "".join(f"loading {i}\n" for i in range(20)) + "CUDA out of memory\n"
    world.logs[pod, "user-container", True] = lines
    world.put(
        "v1",
        "events",
        {
            "kind": "Event",
            "metadata": {"name": "e", "namespace": "models"},
            "type": "Warning",
            "reason": "BackOff",
            "message": "Back-off restarting failed container",
            "involvedObject": {"name": pod},
        },
    )
    done = stagecraft("deploy", write_files(service(make)), "--timeout", "200ms", *QUICK)
    assert (done.code, done.out) == (1, f"{STAGE} created\n")
    told, ended = done.err.split("toy-stage-0 is not ready after 0.2 s: ")
    assert f"toy-stage-0 is failing, which may heal: RevisionFailed: {message}" in told.splitlines()
    for text in (told, ended):
        assert f"pod {pod}, user-container: CrashLoopBackOff: exit code 1, 4 restarts" in text
        assert f"event of {pod}: BackOff: Back-off restarting failed container" in text
        assert f"the last lines of pod {pod}, user-container (the run before):" in text
        assert "CUDA out of memory" in text
        assert "loading 12\n" not in text  # the last eight lines only
    assert told.count("is failing") == 1


def test_a_failing_service_may_heal(
    stagecraft: Run, world: Any, fake: ModuleType, make: Make, write_files: Run
) -> None:
    world.fates["toy-stage-0"] = fate = fake.Fate(1, "RevisionFailed", "Insufficient nvidia.com/gpu")
    seen = []

    def heal(method: str, path: str) -> None:
        if (method == "GET" and path.endswith("/pods")) or "/pods?" in path:  # it asks why
            seen.append(path)
            fate.reason = ""

    world.faults.append(heal)
    done = stagecraft("deploy", write_files(service(make)), *QUICK)
    assert done.code == 0
    assert seen
    assert "is failing, which may heal: RevisionFailed: Insufficient nvidia.com/gpu" in done.err
    assert "toy-stage-0 is ready at" in done.err


def test_whoever_may_not_read_pods_is_told_so(
    stagecraft: Run, world: Any, fake: ModuleType, make: Make, write_files: Run
) -> None:
    world.fates["toy-stage-0"] = fake.Fate(1, "RevisionFailed", "no GPU")
    words = 'pods is forbidden: User "me" cannot list resource "pods" in API group "" in the namespace "models"'
    world.denied["GET", "pods"] = lambda: fake.Answer(403, words)
    done = stagecraft("deploy", write_files(service(make)), "--timeout", "0s", *QUICK)
    assert done.code == 1
    done = stagecraft("deploy", write_files(service(make)), "--timeout", "50ms", *QUICK, "--json")
    assert "why is not known: you may not list pods (403 Forbidden)" in done.err
    (fact,) = json.loads(done.out)["services"]
    assert (fact["ready"], fact["reason"], fact["message"]) == (False, "RevisionFailed", "no GPU")


def test_an_inference_service_fails_as_the_knative_service_below_it(
    stagecraft: Run, world: Any, fake: ModuleType, make: Make, write_files: Run
) -> None:
    world.fates["toy-predictor"] = fake.Fate(1, "RevisionFailed", "Unable to fetch image", [crashing()])
    folder = write_files(make("InferenceService", "toy", spec={"predictor": {}}))
    done = stagecraft("deploy", folder, "--timeout", "100ms", *QUICK)
    assert done.code == 1
    assert "toy is failing, which may heal: RevisionFailed: Unable to fetch image" in done.err
    assert "pod toy-predictor-00001-deployment-x, user-container: CrashLoopBackOff" in done.err


def test_it_waits_as_long_as_knative_does(world: Any, make: Make, write_files: Run) -> None:
    def patience(**trees: Any) -> float:
        with connect() as cluster:
            located = locate(cluster, read_objects([write_files(*trees.values())]))
            return patience_s(targets(write(cluster, located.placed)))

    deadline = {"annotations": {"serving.knative.dev/progress-deadline": "30m"}}
    slow = make("Service", "slow", spec={"template": {"metadata": deadline}})
    slower = make("InferenceService", "slower", spec={"predictor": {}})
    slower["metadata"]["annotations"] = {"serving.knative.dev/progress-deadline": "3600s"}
    assert patience(a=service(make)) == 600
    assert patience(a=service(make), b=slow) == 30 * 60 + 60
    assert patience(a=service(make), b=slow, c=slower) == 3600 + 60


def test_a_connection_lost_while_waiting_leaves_the_objects(server: Any, world: Any, toy: Path) -> None:
    with connect(retry_waits_s=(0,)) as cluster:
        applied = write(cluster, locate(cluster, read_objects([toy])).placed)
        world.faults.append(lambda _method, _path: "close")
        with pytest.raises(Unreachable, match=f"no answer from the cluster at {server.address}"):
            wait_ready(cluster, targets(applied), 60, Progress(), poll_s=0.005)
    assert world.names("services") == ["toy-stage-0"]


def test_an_inference_service_is_not_ready_before_kserve_saw_the_change(
    world: Any, make: Make, write_files: Run, stagecraft: Run
) -> None:
    stagecraft("deploy", write_files(make("InferenceService", "toy", spec={"predictor": {"minReplicas": 0}})), *QUICK)
    world.kserve_lag = 3
    folder = write_files(make("InferenceService", "toy", spec={"predictor": {"minReplicas": 1}}))
    with connect() as cluster:
        waited_for = targets(write(cluster, locate(cluster, read_objects([folder])).placed))
        assert [one.changed for one in waited_for] == [True]
        before = wait_ready(cluster, waited_for, 0, Progress())
        after = wait_ready(cluster, waited_for, 60, Progress(), poll_s=0.01, settle_s=0.2)
    ((readiness, _why),) = before.values()
    assert (readiness.state, readiness.revision) == ("waiting", "toy-predictor-00001")
    ((readiness, _why),) = after.values()
    assert (readiness.state, readiness.revision) == ("ready", "toy-predictor-00002")


# -- undeploy and status ----------------------------------------------------------------------------------------------


def test_undeploy_deletes_the_last_first_and_waits_for_pods(
    stagecraft: Run, world: Any, fake: ModuleType, toy: Path
) -> None:
    pod = {"kind": "Pod", "status": {"containerStatuses": []}}
    world.fates["toy-stage-0"] = fake.Fate(pods=[pod])
    world.drain_looks = 3
    stagecraft("deploy", toy, *QUICK)
    assert world.names("pods") == ["toy-stage-0-00001-deployment-x"]
    done = stagecraft("undeploy", toy, *QUICK)
    assert (done.code, done.out.splitlines()) == (
        0,
        [f"{ORCHESTRATOR} deleted", f"{STAGE} deleted", f"{ACCOUNT} deleted"],
    )
    assert (world.names("services"), world.names("inferenceservices"), world.names("pods")) == ([], [], [])


def test_undeploy_passes_over_what_is_not_there(stagecraft: Run, world: Any, toy: Path) -> None:
    stagecraft("deploy", toy, *QUICK)
    world.records.pop(("v1", "serviceaccounts", "models", "toy"))
    del world.kinds["serving.kserve.io/v1beta1"]
    done = stagecraft("undeploy", toy, *QUICK)
    assert (done.code, done.out.splitlines()) == (0, [f"{STAGE} deleted", f"{ACCOUNT} not found"])
    assert "skipped inferenceservice.serving.kserve.io/toy: the cluster has no InferenceService" in done.err
    facts = json.loads(stagecraft("undeploy", toy, "--json", *QUICK).out)
    assert [one["action"] for one in facts["objects"]] == ["not found", "not found"]


def test_undeploy_says_what_is_not_gone_in_time(stagecraft: Run, world: Any, fake: ModuleType, toy: Path) -> None:
    world.fates["toy-stage-0"] = fake.Fate(pods=[{"kind": "Pod"}])
    world.drain_looks = 10**6
    stagecraft("deploy", toy, *QUICK)
    done = stagecraft("undeploy", toy, "--timeout", "30ms", *QUICK)
    assert done.code == 1
    assert "not gone in time: pod/toy-stage-0-00001-deployment-x; run the same command again" in done.err


def test_undeploy_says_what_it_could_not_delete(stagecraft: Run, world: Any, fake: ModuleType, toy: Path) -> None:
    stagecraft("deploy", toy, *QUICK)
    words = 'x is forbidden: User "me" cannot delete resource "services" in API group "serving.knative.dev"'
    world.denied["DELETE", "services"] = lambda: fake.Answer(403, words)
    done = stagecraft("undeploy", toy, *QUICK)
    assert (done.code, done.out) == (1, f"{ORCHESTRATOR} deleted\n")
    first, second = done.err.splitlines()
    assert first.startswith(f"error: {STAGE}: you may not delete services.serving.knative.dev (403 Forbidden)")
    assert second == "error: deleted: 1 of 3; run the same command again for what is left"
    assert world.names("serviceaccounts") == ["toy"], "the stage that stays needs its account"


def test_what_may_not_be_deleted_keeps_no_service_running(
    stagecraft: Run, world: Any, fake: ModuleType, make: Make, write_files: Run
) -> None:
    folder = write_files(make("ServiceAccount", "toy"), service(make), make("EventType", "toy-wake", spec={}))
    stagecraft("deploy", folder, *QUICK)
    world.denied["DELETE", "eventtypes"] = lambda: fake.Answer(403, "not yours")
    done = stagecraft("undeploy", folder, *QUICK)
    assert (done.code, done.out.splitlines()) == (1, [f"{STAGE} deleted", f"{ACCOUNT} deleted"])
    first, second = done.err.splitlines()
    assert first.startswith("error: eventtype.eventing.knative.dev/toy-wake: not yours")
    assert second == "error: deleted: 2 of 3; run the same command again for what is left"


def test_undeploy_ends_when_the_cluster_answers_no_more(world: Any, toy: Path) -> None:
    with connect(retry_waits_s=()) as cluster:
        placed = locate(cluster, read_objects([toy])).placed
        write(cluster, placed)
        world.faults.append(lambda method, _path: "close" if method == "DELETE" else None)
        with pytest.raises(ClusterError, match=r"deleted: 0 of 3") as caught:
            remove(cluster, placed, lambda _one, _found: None)
    assert len(caught.value.problems) == 2


def test_status_of_the_cluster(
    stagecraft: Run, world: Any, fake: ModuleType, make: Make, write_files: Run, toy: Path
) -> None:
    stagecraft("deploy", toy, *QUICK)
    foreign = service(make, name="foreign")
    del foreign["metadata"]["labels"]
    world.put("serving.knative.dev/v1", "services", foreign)
    world.fates["bad"] = fake.Fate(0, "RevisionFailed", "Unable to fetch image")
    stagecraft("deploy", write_files(service(make, name="bad")), "--timeout", "30ms", *QUICK)
    done = stagecraft("status", "--cluster")
    assert done.code == 0
    heading, *rows, message = (line.split() for line in done.out.splitlines())
    assert heading == ["service", "kind", "ready", "reason", "revision", "replicas", "url", "age"]
    assert [row[:3] for row in rows] == [
        ["bad", "ksvc", "False"],
        ["toy", "isvc", "True"],
        ["toy-stage-0", "ksvc", "True"],
    ]
    assert rows[0][3:6] == ["RevisionFailed", "bad-00001", "0/1"]
    assert rows[1][3:6] == ["toy-predictor-00001", "1/1", "http://toy-predictor.models.example.com"]
    assert " ".join(message) == "bad: Unable to fetch image"
    facts = json.loads(stagecraft("status", "--cluster", "--json", "-n", "models").out)
    assert [(one["name"], one["ready"], one["replicas"], one["desired"]) for one in facts["services"]] == [
        ("bad", "False", 0, 1),
        ("toy", "True", 1, 1),
        ("toy-stage-0", "True", 1, 1),
    ]
    assert "no services of stagecraft in namespace default" in stagecraft("status", "--cluster", "-n", "default").err


def test_options_of_the_cluster_go_with_cluster_only(stagecraft: Run) -> None:
    for options in (("--context", "fake"), ("-n", "models")):
        done = stagecraft("status", *options)
        assert (done.code, "goes with --cluster" in done.err) == (2, True)
    assert stagecraft("status", "--cluster", "--platform", "local").code == 2


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


def start(server: Any, *arguments: object) -> subprocess.Popen[str]:
    """The program in a process of its own."""
    argv = [sys.executable, "-P", "-m", "orchestrator.cli", *(str(argument) for argument in arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def until(happened: Callable[[], object]) -> None:
    ends_s = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < ends_s, "it never happened"
        time.sleep(0.005)


def test_ctrl_c_while_writing_is_kept_until_all_is_written(server: Any, world: Any, toy: Path) -> None:
    world.delay_s["PATCH"] = 0.15
    with start(server, "deploy", toy) as process:
        until(world.writes)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert out.splitlines() == [f"{ACCOUNT} created", f"{STAGE} created", f"{ORCHESTRATOR} created"]
    assert [line.split(";")[0] for line in err.splitlines()] == [
        "finishing what is being written first",
        "stopped: all 3 objects are written",
    ]


def test_ctrl_c_twice_while_writing_ends_it_at_once(server: Any, world: Any, toy: Path) -> None:
    world.delay_s["PATCH"] = 0.4
    with start(server, "deploy", toy) as process:
        until(world.writes)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("finishing what is being written first")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert world.names("inferenceservices") == []


def test_ctrl_c_while_waiting_ends_the_waiting_only(server: Any, world: Any, fake: ModuleType, toy: Path) -> None:
    world.fates["toy-stage-0"] = fake.Fate(ready_after=10**6)
    with start(server, "deploy", toy, "--poll", "20ms") as process:
        until(lambda: "toy-stage-0" in str(world.requests[-1:]) and len(world.writes()) == 3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert "stopped waiting: the objects stay; stagecraft status --cluster" in err
    assert "Traceback" not in err
    assert (world.names("inferenceservices"), "toy-stage-0" in world.names("services")) == (["toy"], True)


def test_ctrl_c_before_anything_is_written_says_so(server: Any, world: Any, toy: Path) -> None:
    world.delay_s["PATCH"] = 0.3
    with start(server, "deploy", toy) as process:
        until(lambda: any("dryRun=All" in one for one in world.requests))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err, world.writes()) == (130, "stopped: nothing was written\n", [])


def test_a_reader_that_goes_leaves_nothing_half_written(server: Any, world: Any, toy: Path) -> None:
    with start(server, "deploy", toy) as process:
        assert process.stdout is not None
        process.stdout.close()  # as head does
        assert process.stderr is not None
        err = process.stderr.read()
    assert (process.returncode, err) == (1, "")
    assert len(world.writes()) == 3
