"""What `stagecraft render` writes for two plans, byte for byte, so that a change of it is seen and meant.

The demonstration model's files stand in kserve/ and knative/manifests/ as examples.

To write the expected files anew after such a change, and then to read the difference:

    STAGECRAFT_RENEW_GOLDEN=1 pytest tests/orchestrator/render/test_golden.py; git diff tests/golden kserve knative
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden"
RENEW = "STAGECRAFT_RENEW_GOLDEN"
EXAMPLES = {"kserve": ROOT / "kserve" / "demo", "knative": ROOT / "knative" / "manifests" / "demo"}
COMMANDS = {
    "kserve": ("--image-registry", "kind.local", "--stages-as", "kserve"),
    "knative": ("--image-registry", "kind.local", "--orchestrator-as", "knative"),
    "demo-2": ("--image-registry", "ghcr.io/acme", "--image-tag", "0.3.0"),
    "llama-2-13b-5": (
        *("--image-registry", "ghcr.io/acme", "--image-tag", "0.3.0", "--namespace", "models"),
        *("--stages-as", "kserve", "--weights", "pvc://models/llama-2-13b"),
        *("--gpu-resource", "nvidia.com/mig-2g.20gb", "--toleration", "nvidia.com/gpu:NoSchedule"),
        *("--deployer", "system:serviceaccount:ci:deployer"),
    ),
}


@pytest.fixture(params=COMMANDS, scope="module")
def case(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def rendered(case: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the command writes now, by file name."""
    from orchestrator.cli import app

    folder = tmp_path_factory.mktemp(case) / "deploy"
    plan = GOLDEN / ("demo-2" if case in EXAMPLES else case) / "plan.yaml"
    arguments = ["render", str(plan), "-o", str(folder), *COMMANDS[case]]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_the_files_are_the_expected_ones(case: str, rendered: dict[str, str]) -> None:
    folder = EXAMPLES.get(case, GOLDEN / case / "files")
    if os.environ.get(RENEW):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, text in rendered.items():
            (folder / name).write_text(text, encoding="utf-8")
    expected = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    hint = f"if that is meant, run this test with {RENEW}=1 and read the difference"
    assert sorted(rendered) == sorted(expected), hint
    for name, text in expected.items():
        assert rendered[name] == text, f"{name}: {hint}"


def test_a_cluster_takes_the_expected_files(
    case: str, schemas: Any, rules: Any, cluster: Any, rendered: dict[str, str]
) -> None:
    """So nobody freezes what is wrong."""
    trees = [yaml.safe_load(text) for name, text in rendered.items() if name != "kustomization.yaml"]
    assert [text for tree in trees for text in schemas.complaints(tree)] == []
    told = {"llama-2-13b-5": [("config-features", "kubernetes.podspec-tolerations", "enabled")]}
    assert rules.violations(trees, cluster.with_settings(told.get(case, []))) == []


def test_stages_take_what_was_measured(rendered: dict[str, str], case: str) -> None:
    if case != "llama-2-13b-5":
        assert "an estimate for one CPU thread" in rendered["stage-0.yaml"]
    else:
        assert "measured 2026-11-24 on example figures" in rendered["stage-0.yaml"]
