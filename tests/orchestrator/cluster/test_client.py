"""Requests that fail on the way, are refused, or are tried again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from orchestrator.cluster import ApiError, ClusterError, Unreachable, connect, locate, preflight, read_objects, write
from orchestrator.cluster.client import SERVICE


@contextmanager
def connected(told: list[str] | None = None, retry_waits_s: Sequence[float] = (0, 0)) -> Any:
    with connect(tell=(told if told is not None else []).append, retry_waits_s=retry_waits_s) as cluster:
        yield cluster


def times(count: int, what: Any, method: str = "GET", among: str = "") -> Any:
    """A fault that happens so often to requests of the method whose path holds `among`."""
    left = [count]

    def fault(asked: str, path: str) -> Any:
        if asked != method or among not in path or not left[0]:
            return None
        left[0] -= 1
        return what

    return fault


@pytest.mark.parametrize("status", ["close", 429, 500, 503])
def test_what_can_heal_is_tried_again(server: Any, world: Any, fake: ModuleType, status: Any) -> None:
    what = status if status == "close" else fake.Answer(status, "busy", headers={"Retry-After": "0"})
    world.faults.append(times(2, what))
    told: list[str] = []
    with connected(told) as cluster:
        assert cluster.get(SERVICE, "models", "toy") is None
    assert len(world.requests) == 3
    assert len(told) == 2
    assert told[0].startswith("trying again: ")


def test_a_lost_connection_is_an_error_that_names_the_server(server: Any, world: Any) -> None:
    world.faults.append(times(9, "close"))
    with connected() as cluster, pytest.raises(Unreachable) as caught:
        cluster.get(SERVICE, "models", "toy")
    assert str(caught.value) == f"no answer from the cluster at {server.address}: the connection was closed"
    assert len(world.requests) == 3


def test_a_server_that_does_not_answer_in_time(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.cluster.client.REQUEST_TIMEOUT_S", 0.2)
    world.delay_s["GET"] = 0.6
    with connect(retry_waits_s=()) as cluster, pytest.raises(Unreachable, match=r"none within 0\.2 s"):
        cluster.kind("v1", "ConfigMap")


def test_a_server_that_is_not_there(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake.Server() as gone:
        monkeypatch.setenv("KUBECONFIG", str(gone.kubeconfig(tmp_path / "kubeconfig")))
    with connected() as cluster, pytest.raises(Unreachable, match=f"{gone.address}: connection refused"):
        cluster.get(SERVICE, "models", "toy")


def test_a_server_that_wants_an_hour_of_patience_is_not_waited_for(world: Any, fake: ModuleType) -> None:
    world.faults.append(times(9, fake.Answer(429, "later", headers={"Retry-After": "3600"})))
    with connected() as cluster, pytest.raises(ApiError, match="later"):
        cluster.get(SERVICE, "models", "toy")
    assert len(world.requests) == 1


def test_a_refusal_is_not_tried_again(world: Any, fake: ModuleType) -> None:
    world.faults.append(times(9, fake.Answer(422, "no")))
    with connected() as cluster, pytest.raises(ApiError, match=r"no \(422 Invalid\)"):
        cluster.get(SERVICE, "models", "toy")
    assert len(world.requests) == 1


def test_a_connection_lost_while_writing_says_what_is_written(world: Any, toy: Path) -> None:
    with connected() as cluster:
        placed = locate(cluster, read_objects([toy])).placed
        preflight(cluster, placed)
        world.faults.append(times(9, "close", "PATCH", "toy-stage-0"))
        with pytest.raises(ClusterError) as caught:
            write(cluster, placed)
    assert world.names("serviceaccounts") == ["toy"]
    assert world.names("services") == []
    first, second = caught.value.problems
    assert first.startswith("service.serving.knative.dev/toy-stage-0: no answer from the cluster at http://127.0.0.1:")
    assert second.startswith(
        "1 of 3 objects are written, these are not: service.serving.knative.dev/toy-stage-0, "
        "inferenceservice.serving.kserve.io/toy; run the same command again"
    )


@pytest.mark.parametrize("page", [b"<html>log in</html>", b"[]"])
def test_something_else_than_an_api_server(world: Any, page: bytes) -> None:
    world.faults.append(times(1, page))
    with connected() as cluster, pytest.raises(ClusterError, match="does not answer like a Kubernetes API server"):
        cluster.get(SERVICE, "models", "toy")


def test_warnings_of_the_api_server_are_passed_on_once(world: Any, toy: Path) -> None:
    world.warning = 'unknown annotation \\"x\\"'
    told: list[str] = []
    with connected(told) as cluster:
        preflight(cluster, locate(cluster, read_objects([toy])).placed)
    assert told == ['warning: unknown annotation "x"']


def test_no_file_is_left_behind(world: Any, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)  # which remembers the first answer
    with connected() as cluster:
        preflight(cluster, locate(cluster, read_objects([toy])).placed)
    assert list(folder.iterdir()) == []


def test_there_is_no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(ClusterError, match=f"there is no kubeconfig at {tmp_path}/absent.*set KUBECONFIG"), connected():
        pass


@pytest.mark.parametrize("text", ["a: [", "[]", "clusters: 7\ncontexts: []\n", "contexts: [{}]\n", "\n"])
def test_a_kubeconfig_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(file))
    with pytest.raises(ClusterError, match="kubeconfig"), connected():
        pass


def test_no_current_context(server: Any, tmp_path: Path) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(file.read_text().replace("current-context: fake\n", ""))
    with pytest.raises(ClusterError, match="no current context; choose one with --context: fake, other"), connected():
        pass
    with connect("other") as cluster:
        assert cluster.context == "other"
