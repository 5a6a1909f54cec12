"""A fake API server with a kubeconfig that points to it, files to deploy, and the commands run in this process."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module of the fake API server."""
    file = Path(__file__).parent / "fake_api_server.py"
    spec = importlib.util.spec_from_file_location("fake_api_server", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A running one; KUBECONFIG names it, and it knows the namespaces default and models."""
    with fake.Server() as running:
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig(tmp_path / "kubeconfig")))
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def world(server: Any) -> Any:
    """What the server stores and does."""
    return server.cluster


Write = Callable[..., Path]


@pytest.fixture
def write_files(tmp_path: Path) -> Write:
    """write_files(tree, ...) -> a folder with a file for each and a kustomization that lists them."""

    def write(*trees: dict[str, Any], namespace: str = "models") -> Path:
        folder = tmp_path / "deploy"
        folder.mkdir(exist_ok=True)
        names = []
        for tree in trees:
            names.append(f"{tree['kind'].lower()}-{tree['metadata']['name']}.yaml")
            (folder / names[-1]).write_text(yaml.safe_dump(tree))
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": namespace,
            "resources": names,
        }  # fmt: skip
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return folder

    return write


@pytest.fixture
def make() -> Callable[..., dict[str, Any]]:
    """make("Service", "toy", spec={...}) -> an object of stagecraft in namespace models."""
    versions = {
        "ServiceAccount": "v1",
        "ConfigMap": "v1",
        "Service": "serving.knative.dev/v1",
        "InferenceService": "serving.kserve.io/v1beta1",
        "PodMonitor": "monitoring.coreos.com/v1",
        "EventType": "eventing.knative.dev/v1beta2",
    }

    def tree(kind: str, name: str, **fields: Any) -> dict[str, Any]:
        metadata = {"name": name, "namespace": "models", "labels": {"app.kubernetes.io/part-of": "stagecraft"}}
        return {"apiVersion": versions[kind], "kind": kind, "metadata": metadata, **fields}

    return tree


@pytest.fixture
def toy(make: Callable[..., dict[str, Any]], write_files: Write) -> Path:
    """A folder with a ServiceAccount, a stage and an orchestrator."""
    return write_files(
        make("ServiceAccount", "toy"),
        make("Service", "toy-stage-0", spec={"template": {"spec": {"containers": [{"image": "stage:1"}]}}}),
        make("InferenceService", "toy", spec={"predictor": {"minReplicas": 0}}),
    )


@pytest.fixture
def stagecraft(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """stagecraft("deploy", folder) -> its outcome; 200 columns."""
    from orchestrator.cli import app

    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Outcome:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Outcome(done.exit_code, done.stdout, done.stderr)

    return run
