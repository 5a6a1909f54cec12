"""What keeps pods from running."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.cluster.troubles import logs_to_read, pod_troubles, warnings_about


def pod(*containers: dict[str, Any], init: list[dict[str, Any]] | None = None, **status: Any) -> dict[str, Any]:
    found = {"containerStatuses": list(containers), "initContainerStatuses": init or [], **status}
    return {"metadata": {"name": "p"}, "status": found}


def waiting(reason: str, message: str = "", name: str = "user-container", **more: Any) -> dict[str, Any]:
    return {"name": name, "ready": False, "state": {"waiting": {"reason": reason, "message": message}}, **more}


def ended(code: int, reason: str = "Error") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason}}


RUNNING = {"name": "user-container", "ready": True, "state": {"running": {}}}
STARTING = {"name": "user-container", "ready": False, "state": {"running": {}}}
PROXY = {"name": "queue-proxy", "ready": False, "state": {"running": {}}}
UNSCHEDULED = {
    "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
}  # fmt: skip

CASES = {
    "all_is_well": (pod(RUNNING), [], []),
    "still_starting": (pod(STARTING, PROXY), [], [("user-container", False)]),
    "being_created": (pod(waiting("ContainerCreating")), [], []),
    "no_gpu": (
        pod(conditions=[UNSCHEDULED]),
        ["pod p: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."],
        [],
    ),
    "no_image": (
        pod(waiting("ImagePullBackOff", 'Back-off pulling image\n "stage:1"')),
        ['pod p, user-container: ImagePullBackOff: Back-off pulling image "stage:1"'],
        [],
    ),
    "crash_loop": (
        pod(waiting("CrashLoopBackOff", "back-off 10s", lastState=ended(1), restartCount=3)),
        ["pod p, user-container: CrashLoopBackOff: exit code 1, 3 restarts"],
        [("user-container", True)],
    ),
    "out_of_memory_behind_a_crash_loop": (
        pod(waiting("CrashLoopBackOff", lastState=ended(137, "OOMKilled"), restartCount=1)),
        ["pod p, user-container: CrashLoopBackOff: OOMKilled (exit code 137, 1 restart)"],
        [("user-container", True)],
    ),
    "just_ended": (
        pod({"name": "user-container", "ready": False, "state": ended(2)}),
        ["pod p, user-container: Error: exit code 2"],
        [("user-container", False)],
    ),
    "a_download_fails": (
        pod(
            waiting("PodInitializing", name="kserve-container"),
            init=[waiting("CrashLoopBackOff", name="storage-initializer", lastState=ended(1), restartCount=2)],
        ),
        ["pod p, storage-initializer: CrashLoopBackOff: exit code 1, 2 restarts"],
        [("storage-initializer", True)],
    ),
    "a_finished_download_is_no_trouble": (
        pod(RUNNING, init=[{"name": "storage-initializer", "ready": True, "state": ended(0, "Completed")}]),
        [],
        [],
    ),
    "evicted": (
        pod(phase="Failed", reason="Evicted", message="the node was low on memory"),
        ["pod p: Evicted: the node was low on memory"],
        [],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pod(case: str) -> None:
    tree, troubles, logs = CASES[case]
    assert [str(trouble) for trouble in pod_troubles(tree)] == troubles
    assert logs_to_read(tree) == logs


def event(subject: str, message: str, when: str) -> dict[str, Any]:
    about = {"name": subject}
    return {"metadata": {}, "involvedObject": about, "reason": "R", "message": message, "lastTimestamp": when}


def test_the_newest_warnings_about_a_revision_and_its_service_are_told_once() -> None:
    events = [
        event("toy-00002-deployment-abc-x1", "newest", "2026-01-01T00:00:09Z"),
        event("toy-00002-deployment-abc-x2", "middle", "2026-01-01T00:00:05Z"),
        event("toy-00002-deployment-abc-x2", "middle", "2026-01-01T00:00:06Z"),
        event("toy", "of the service", "2026-01-01T00:00:07Z"),
        event("toy-00002", "oldest", "2026-01-01T00:00:01Z"),
        event("toy-00001-deployment-abc-x1", "of the revision before", "2026-01-01T00:00:08Z"),
        event("toy-two", "of another service", "2026-01-01T00:00:08Z"),
        event("toy-000021", "of another revision", "2026-01-01T00:00:08Z"),
    ]
    assert warnings_about(events, names=("toy",), revision="toy-00002") == [
        "toy-00002-deployment-abc-x2: R: middle",
        "toy: R: of the service",
        "toy-00002-deployment-abc-x1: R: newest",
    ]
    assert warnings_about(events, names=("toy",), revision="") == ["toy: R: of the service"]
