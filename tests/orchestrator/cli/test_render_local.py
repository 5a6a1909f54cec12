"""From a plan to text without a cluster: the rendered files are applied, unchanged, to the Knative of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

WAIT_S = 120


@pytest.fixture(scope="module")
def platform(root: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A platform that forks replicas, so that a model is up in tenths of a second once torch is imported."""
    argv = [sys.executable, "-P", "-m", "orchestrator.cli", "local", "start", "--name", "rendered", "--json"]
    argv += ["--port", "0", "--drain-quiet", "0s", "--log-dir", str(tmp_path_factory.mktemp("platform"))]
    env = {**os.environ, "PYTHONPATH": str(root), "STAGECRAFT_RUNTIME_DIR": str(runtime)}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as run:
        assert run.stdout is not None
        try:
            yield json.loads(run.stdout.readline())
        finally:
            run.send_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """What each way of deploying made of the same prompt."""
    return {}


@pytest.mark.parametrize(
    ("kind", "service"),
    [("knative", "demo"), ("kserve", "demo-predictor"), ("kserve", "demo")],
    ids=["Knative Services", "InferenceServices", "InferenceServices by KServe's address"],
)
def test_the_files_serve_on_one_machine_as_they_are(
    stagecraft: Any, platform: dict[str, Any], texts: dict[str, str], tmp_path: Path, kind: str, service: str
) -> None:
    plan, folder = tmp_path / "plan.yaml", tmp_path / "deploy"
    assert stagecraft("plan", "demo", "--stages", 2, "-o", plan).code == 0
    done = stagecraft(
        "render", plan, "-o", folder, "--stages-as", kind, "--orchestrator-as", kind, "--cpu", "1",
        "--image-registry", "registry.example/acme", "--kv-memory", "64MiB", "--window", "6s", "--namespace", "models",
    )  # fmt: skip
    assert done.code == 0, done.err
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    applied = stagecraft("local", "apply", "-f", folder, "--platform", "rendered")
    assert applied.code == 0, applied.err
    body = {"model": "demo", "prompt": "ROMEO:", "max_tokens": 24, "temperature": 0}
    url = f"{platform['url']}/models/{service}/openai/v1/completions"
    answer = httpx.post(url, json=body, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    texts[f"{kind} {service}"] = answer.json()["choices"][0]["text"]
    assert len(texts[f"{kind} {service}"]) > 10
    assert len(set(texts.values())) == 1
    deleted = stagecraft("local", "delete", "-f", folder, "--platform", "rendered")
    assert deleted.code == 0, deleted.err
    left = stagecraft("local", "get", "ksvc", "-n", "models", "-o", "name", "--platform", "rendered")
    assert left.out == ""
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_batch_goes_through_the_files_as_they_are(stagecraft: Any, platform: dict[str, Any], tmp_path: Path) -> None:
    plan, folder = tmp_path / "plan.yaml", tmp_path / "deploy"
    assert stagecraft("plan", "demo", "--stages", 2, "-o", plan).code == 0
    done = stagecraft(
        "render", plan, "-o", folder, "--batch", "--broker", "jobs", "--cpu", "1",
        "--image-registry", "registry.example/acme", "--kv-memory", "64MiB", "--window", "6s", "--namespace", "models",
    )  # fmt: skip
    assert done.code == 0, done.err
    applied = stagecraft("local", "apply", "-f", folder, "--platform", "rendered")
    assert applied.code == 0, applied.err
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"ROMEO {number}:", "max_tokens": 4}) + "\n" for number in range(9))
    )
    at = ("--broker", f"{platform['url']}/models/jobs", "--results", f"{platform['url']}/models/demo-results")
    done = stagecraft("batch", "submit", prompts, "-o", output, "--model", "demo", *at, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert (facts["completed"], facts["failed"]) == (9, 0)
    results = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert {one["custom_id"] for one in results} == {f"line-{number + 1:06}" for number in range(9)}
    assert all(one["response"]["body"]["usage"]["completion_tokens"] == 4 for one in results)
    deleted = stagecraft("local", "delete", "-f", folder, "--platform", "rendered")
    assert deleted.code == 0, deleted.err
