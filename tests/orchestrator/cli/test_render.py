"""`stagecraft render` on the command line: files and settings, and for every wrong option one error and no file."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
import typer.testing
import yaml

from orchestrator.render.files import MARK

Command = Callable[..., Any]

PLAN = """version: 1
name: small
model: acme/small
dtype: float16
blocks: 8
fingerprint: "8c1150aa4e3a6637"
stages:
  - blocks: "0:4"
    cost: {parameters: 4000000000, weight_bytes: 8000000000, kv_bytes_per_token: 2048, flops_per_token: 8000000000}
  - blocks: "4:8"
    cost: {parameters: 4000000000, weight_bytes: 8000000000, kv_bytes_per_token: 2048, flops_per_token: 8000000000}
"""
LONG = "x" * 64


_read_once = functools.cache(typer.main.get_command)


@pytest.fixture(autouse=True)
def _commands_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Typer reads the signatures of all commands for each call in a test: 27 ms, some 200 times here."""
    monkeypatch.setattr(typer.testing, "_get_command", _read_once, raising=False)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


@pytest.fixture
def render(stagecraft: Command, plan: Path, tmp_path: Path) -> Command:
    """render("--option", ...): `stagecraft render plan.yaml -o deploy --image-registry ghcr.io/acme --option ...`"""
    first = ("render", plan, "-o", tmp_path / "deploy", "--image-registry", "ghcr.io/acme", "--image-tag", "1")
    return lambda *options: stagecraft(*first, *options)


def refused(outcome: Any, expected: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    # Typer draws a frame around its own errors; ours are one line, or a line for each complaint of a cluster
    text = " ".join(outcome.err.replace("│", " ").split())
    assert expected in text, outcome.err
    assert len(re.findall(r"error:|─ Error ─", outcome.err)) == 1, outcome.err


WRONG: list[tuple[tuple[str, ...], str]] = [
    # names
    (("--name", "Llama"), "DNS"),
    (("--name", "7b"), "DNS"),
    (("--name", "a.b"), "DNS"),
    (("--name", "a-"), "DNS"),
    (("--name", "a\nb"), "DNS"),
    (("--name", "-predictor"), "DNS"),
    (("--name", "x" * 45), "52"),
    (("--name", LONG), "63"),
    (("--name", "my-predictor-x"), "-predictor"),
    (("--name", "a-default"), "-default"),
    (("--namespace", "x-predictor"), "-predictor"),
    (("--namespace", "Models"), "--namespace"),
    (("--namespace", "a.b"), "--namespace"),
    (("--namespace", LONG), "--namespace"),
    (("--namespace", ""), "--namespace"),
    # images
    (("--image-registry", "https://ghcr.io"), "--image-registry"),
    (("--image-registry", "ghcr.io/Acme"), "--image-registry"),
    (("--image-registry", "ghcr.io/acme/"), "--image-registry"),
    (("--image-registry", "ghcr.io/a b"), "--image-registry"),
    (("--image-registry", "ghcr.io/a/../b"), "--image-registry"),
    (("--image-registry", "ghcr.io/-a"), "--image-registry"),
    (("--image-registry", "ghcr..io/a"), "--image-registry"),
    (("--image-registry", "ghcr.io:٨٠/a"), "--image-registry"),
    (("--image-tag", ":latest"), "--image-tag"),
    (("--image-tag", "a b"), "--image-tag"),
    (("--image-tag", "x" * 129), "--image-tag"),
    (("--image-pull-secret", "My Secret"), "--image-pull-secret"),
    # scaling
    (("--min-scale", "-1"), "--min-scale"),
    (("--max-scale", "-1"), "--max-scale"),
    (("--initial-scale", "-1"), "--initial-scale"),
    (("--min-scale", "5"), "below --min-scale"),
    (("--min-scale", "3", "--max-scale", "2"), "below --min-scale"),
    (("--initial-scale", "5", "--max-scale", "4"), "above --max-scale"),
    (("--max-scale", "2147483648"), "2147483647"),
    (("--min-scale", "many"), "integer"),
    (("--target", "0"), "--target"),
    (("--target", "-1"), "--target"),
    (("--target", "nan"), "--target"),
    (("--target", "inf"), "--target"),
    (("--target", "3", "--container-concurrency", "2"), "above --container-concurrency"),
    (("--container-concurrency", "1"), "below the target of stage"),
    (("--container-concurrency", "-1"), "--container-concurrency"),
    (("--container-concurrency", "1001"), "1000"),
    (("--target", "1000"), "1000"),
    (("--target-burst-capacity", "-1"), "scaled to zero"),
    (("--target-burst-capacity", "-2"), "--target-burst-capacity"),
    (("--window", "5s"), "6s to 1h"),
    (("--window", "3601s"), "6s to 1h"),
    (("--window", "6500ms"), "whole seconds"),
    (("--window", "60"), "--window"),
    (("--scale-down-delay", "2h"), "0s to 1h"),
    (("--scale-down-delay", "-1s"), "--scale-down-delay"),
    (("--timeout", "0s"), "--timeout"),
    (("--timeout", "soon"), "--timeout"),
    (("--timeout", "100000000h"), "--timeout"),
    (("--lane-width", "0"), "lane-width"),
    (("--sequence-tokens", "0"), "sequence-tokens"),
    (("--stretch", "0.5"), "stretch"),
    (("--stretch", "nan"), "stretch"),
    (("--stretch", "inf"), "stretch"),
    # resources
    (("--gpu-resource", "gpu"), "DOMAIN/NAME"),
    (("--gpu-resource", "nvidia.com/"), "DOMAIN/NAME"),
    (("--gpu-resource", "nvidia.com/gpu=1"), "DOMAIN/NAME"),
    (("--gpu-resource", "NVIDIA.com/gpu"), "DOMAIN/NAME"),
    (("--gpu-resource", "nvidia..com/gpu"), "DOMAIN/NAME"),
    (("--gpu-resource", f"nvidia.com/{LONG}"), "DOMAIN/NAME"),
    (("--gpu-resource", "requests.nvidia.com/gpu"), "DOMAIN/NAME"),
    (("--gpu-resource", "kubernetes.io/gpu"), "DOMAIN/NAME"),
    (("--gpu-shared-by", "2"), "go with --gpu-resource"),
    (("--memory", "1Mi"), "less than stage 0 fills"),
    (("--gpu-memory", "24GiB"), "go with --gpu-resource"),
    (("--gpu-resource", "nvidia.com/gpu", "--gpu-shared-by", "0"), "--gpu-shared-by"),
    (("--gpu-resource", "nvidia.com/gpu", "--gpu-memory", "big"), "--gpu-memory"),
    (("--gpu-resource", "nvidia.com/mig-1g.5gb"), "do not fit"),
    (("--gpu-resource", "nvidia.com/gpu", "--gpu-memory", "16GiB", "--gpu-shared-by", "2"), "do not fit"),
    (("--cpu", "two"), "--cpu"),
    (("--cpu", "0"), "--cpu"),
    (("--cpu", "-1"), "--cpu"),
    (("--cpu", "100n"), "--cpu"),
    (("--memory", "16GB"), "--memory"),
    (("--memory", "0"), "--memory"),
    (("--memory", "1e30"), "--memory"),
    (("--orchestrator-memory", "lots"), "--orchestrator-memory"),
    (("--orchestrator-memory", "2"), "--orchestrator-memory 2 is 2 bytes"),
    (("--orchestrator-cpu", "two"), "--orchestrator-cpu"),
    (("--gpu-resource", "nvidia.com/gpu", "--memory", "16"), "--memory 16 is 16 bytes"),
    (("--kv-memory", "lots"), "--kv-memory"),
    (("--kv-memory", "0"), "--kv-memory"),
    (("--shared-memory", "256 MB"), "--shared-memory"),
    (("--shared-memory", ""), "--shared-memory"),
    (("--shared-memory", "256"), "256 bytes"),
    (("--gpu-resource", "nvidia.com/gpu", "--gpu-memory", "24GiB", "--kv-memory", "20GiB"), "--kv-memory is more"),
    (("--gpu-resource", "nvidia.com/mig-1g.20gb", "--kv-memory", "3GiB", "--gpu-shared-by", "2"), "for 2 stage(s)"),
    # weights
    (("--weights", "ftp://x/y"), "ftp://"),
    (("--weights", "/models/x"), "folder of this machine"),
    (("--weights", "./x"), "folder of this machine"),
    (("--weights", "a/b/c"), "names no model"),
    (("--weights", "a b"), "names no model"),
    (("--weights", "s3://"), "--weights"),
    (("--weights", "s3:///x"), "--weights"),
    (("--weights", "https://"), "--weights"),
    (("--weights", "s3://bucket/a b"), "--weights"),
    (("--weights", "s3://bucket/a\nb"), "s3://bucket/a"),
    (("--weights", "file://models"), "file:///"),
    (("--weights", "file:///"), "file:///"),
    (("--weights", "pvc://"), "pvc://CLAIM"),
    (("--weights", "pvc://A/b"), "pvc://CLAIM"),
    (("--weights", "pvc://a..b/x"), "pvc://CLAIM"),
    (("--weights", "pvc://claim/../x"), "pvc://CLAIM"),
    (("--weights", "oci://"), "oci://"),
    (("--weights", "oci://ghcr.io/Acme/x"), "oci://"),
    (("--weights", "oci://ghcr.io/a b"), "oci://"),
    (("--weights-secret", "A_B"), "--weights-secret"),
    (("--storage-initializer",), "--stages-as kserve"),
    (("--storage-initializer", "--stages-as", "kserve", "--weights", "pvc://a/b"), "mounted"),
    (("--storage-initializer", "--stages-as", "kserve", "--weights", "demo"), "--storage-initializer"),
    (("--storage-initializer", "--stages-as", "kserve", "--weights", "gcs://b/x"), "gcs://"),
    (("--storage-initializer", "--stages-as", "kserve", "--weights", "a/b@refs/pr/1"), "refs/pr/1"),
    # pods
    (("--env", "A"), "NAME=VALUE"),
    (("--env", "=b"), "NAME=VALUE"),
    (("--env", "A B=c"), "--env"),
    (("--env", "1A=c"), "--env"),
    (("--env", "PORT=1"), "PORT"),
    (("--env", "K_SERVICE=x"), "K_SERVICE"),
    (("--env", "K_REVISION=x"), "K_REVISION"),
    (("--env", "PYTHONPATH=x"), "PYTHONPATH"),
    (("--env", "PROTOCOL=v3"), "invalid protocol v3"),
    (("--env", "A=\udcff"), "UTF-8"),
    (("--env", "STAGE_INDEX=7"), "STAGE_INDEX"),
    (("--env", "ORCHESTRATOR_STAGE_URLS=http://x"), "ORCHESTRATOR_STAGE_URLS"),
    (("--env", "MULTI_MODEL_SERVER=true"), "MULTI_MODEL_SERVER"),
    (("--env", "STORAGE_URI=s3://b/x"), "STORAGE_URI"),
    (("--node-selector", "zone"), "NAME=VALUE"),
    (("--node-selector", "a b=c"), "--node-selector"),
    (("--node-selector", "A_B.example.org/x=c"), "--node-selector"),
    (("--node-selector", f"{LONG}=c"), "--node-selector"),
    (("--node-selector", f"a={LONG}"), "--node-selector"),
    (("--node-selector", "a=b c"), "--node-selector"),
    (("--toleration", ""), "--toleration"),
    (("--toleration", "=b"), "--toleration"),
    (("--toleration", "a:Never"), "--toleration"),
    (("--toleration", "a b:NoSchedule"), "--toleration"),
    (("--toleration", f"a={LONG}"), "--toleration"),
    (("--runtime-class", "Nvidia"), "--runtime-class"),
    (("--priority-class", "very high"), "--priority-class"),
    (("--scheduler", "_"), "--scheduler"),
    (("--fs-group", "-1"), "--fs-group"),
    (("--fs-group", "2147483648"), "--fs-group"),
    # around
    (("--service-account-annotation", "role"), "NAME=VALUE"),
    (("--service-account-annotation", "bad key=x"), "--service-account-annotation"),
    (("--ingress-namespace", "Istio"), "--ingress-namespace"),
    (("--monitoring-namespace", "a.b"), "--monitoring-namespace"),
    (("--deployer", "system:serviceaccount:ci"), "--deployer"),
    (("--deployer", "system:serviceaccount:CI:x"), "--deployer"),
    (("--deployer", "system:serviceaccount:a:b:c"), "system:serviceaccount:a:b:c"),
    # the rest
    (("--format", "kn"), "--format kn"),
    (("--format", "kn", "--stages-as", "kserve", "--orchestrator-as", "knative"), "--format kn"),
    (("--format", "helm"), "helm"),
    (("--stages-as", "docker"), "docker"),
    (("--oci-as", "modelcar"), "modelcar"),
    (("--oci-as", "init-container", "--weights", "s3://bucket/x"), "goes with oci://"),
    (("--results-claim", "results"), "go with --batch"),
    (("--batch-in-flight", "8"), "go with --batch"),
]


@pytest.mark.parametrize(("options", "expected"), WRONG, ids=[" ".join(options)[:60] for options, _ in WRONG])
def test_a_wrong_option_gives_one_error_and_writes_nothing(
    render: Command, tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    refused(render(*options), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (re.compile(r"    cost: .*\n"), "", "cost"),
        (re.compile(r"(?s)    cost: [^\n]*\n(?=.*4:8)"), "", "stage 0"),
        ("version: 1\n", "", "version"),
        ("model: acme/small\n", "", "model"),
        ('"4:8"', '"5:8"', "plan.yaml"),
        ("acme/small", "./models", "folder of this machine"),
        ("acme/small", "/nowhere/models", "folder of this machine"),
        ("name: small", "name: [", "plan.yaml"),
    ],
)
def test_a_plan_that_lacks_something_gives_one_error(
    render: Command, plan: Path, tmp_path: Path, old: str | re.Pattern[str], new: str, expected: str
) -> None:
    text = plan.read_text()
    changed = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
    assert changed != text
    plan.write_text(changed)
    refused(render(), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_model_of_this_machine_can_be_elsewhere_for_the_cluster(render: Command, plan: Path) -> None:
    plan.write_text(plan.read_text().replace("acme/small", "/nowhere/models"))
    assert render("--weights", "s3://bucket/x").code == 0


def test_a_plan_that_is_not_there(stagecraft: Command, tmp_path: Path) -> None:
    refused(stagecraft("render", tmp_path / "none.yaml", "-o", tmp_path / "deploy"), "no such file")
    assert list(tmp_path.iterdir()) == []


def everything(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "" for path in sorted(folder.rglob("*"))
    }


def test_a_rendered_folder_is_written_anew_only_with_force(render: Command, tmp_path: Path) -> None:
    assert render().code == 0
    before = everything(tmp_path)
    refused(render("--namespace", "other"), "--force")
    assert everything(tmp_path) == before
    assert render("--namespace", "other", "--no-pod-monitor", "--force").code == 0
    after = everything(tmp_path)
    assert set(before) - set(after) == {"deploy/pod-monitor.yaml"}
    assert "namespace: other" in after["deploy/stage-0.yaml"]


def test_a_wrong_option_leaves_a_rendered_folder_as_it_was(render: Command, tmp_path: Path) -> None:
    assert render().code == 0
    before = everything(tmp_path)
    refused(render("--min-scale", "-1", "--force"), "--min-scale")
    refused(render("--env", "PORT=1", "--force"), "PORT")
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: (folder / "mine.yaml").write_text("a: b\n"),
        lambda folder: (folder / "stage-0.yaml").write_text("a: b\n"),
        lambda folder: (folder / "below").mkdir(),
        lambda folder: (folder / "link").symlink_to(folder.parent / "plan.yaml"),
        lambda folder: (folder / "bytes").write_bytes(b"\xff\xfe\0"),
    ],
    ids=["file", "same-name", "folder", "link", "bytes"],
)
def test_a_folder_with_files_of_others_is_left_alone(
    render: Command, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    folder = tmp_path / "deploy"
    folder.mkdir()
    make(folder)
    present = sorted(path.name for path in folder.iterdir())
    for options in ((), ("--force",)):
        refused(render(*options), "did not write")
    assert sorted(path.name for path in folder.iterdir()) == present
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deploy", "plan.yaml"]


@pytest.mark.parametrize("kind", ["file", "link-to-folder", "broken-link"])
def test_a_target_that_is_no_folder_is_left_alone(render: Command, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "deploy"
    if kind == "file":
        target.write_text("mine")
    else:
        elsewhere = tmp_path / "elsewhere"
        if kind == "link-to-folder":
            elsewhere.mkdir()
        target.symlink_to(elsewhere)
    names = sorted(path.name for path in tmp_path.iterdir())
    refused(render("--force"), "is no folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("target", ["/proc/deploy", "plan.yaml/deploy", "x" * 300])
def test_a_place_that_cannot_be_written_to(stagecraft: Command, plan: Path, tmp_path: Path, target: str) -> None:
    refused(stagecraft("render", plan, "-o", tmp_path / target, "--image-registry", "x"), "cannot write")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_an_empty_folder_is_taken(render: Command, tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    assert render().code == 0
    assert (tmp_path / "deploy" / "kustomization.yaml").is_file()


def test_files_go_to_stdout_and_everything_else_to_stderr(render: Command, tmp_path: Path) -> None:
    done = render()
    assert done.code == 0
    written = [Path(line) for line in done.out.splitlines()]
    assert sorted(written) == sorted((tmp_path / "deploy").iterdir())
    assert all(path.read_text().startswith(MARK) for path in written)
    assert "kubectl apply -k" in done.err
    assert "administrator" not in done.err


def test_json_for_programs(render: Command, tmp_path: Path) -> None:
    done = render("--json", "--node-selector", "a=b", "--initial-scale", "0", "--timeout", "20m", "-n", "models")
    facts = json.loads(done.out)
    assert facts["namespace"] == "models"
    assert sorted(facts["files"]) == sorted(path.name for path in (tmp_path / "deploy").iterdir())
    assert [one["name"] for one in facts["stages"]] == ["small-stage-0", "small-stage-1"]
    assert {(one["config_map"], one["key"], one["value"]) for one in facts["cluster_settings"]} == {
        ("config-features", "kubernetes.podspec-nodeselector", "enabled"),
        ("config-autoscaler", "allow-zero-initial-scale", "true"),
        ("config-defaults", "max-revision-timeout-seconds", "1200"),
    }


def test_the_needed_settings_are_told_as_commands(render: Command) -> None:
    done = render("--node-selector", "a=b", "--weights", "pvc://claim/x")
    line = next(line for line in done.err.splitlines() if "kubectl patch" in line)
    assert "configmap/config-features -n knative-serving" in line
    patch = json.loads(re.search(r"'(.*)'", line)[1])  # type: ignore[index] - it is there, or the test fails
    assert patch == {
        "data": {
            "kubernetes.podspec-nodeselector": "enabled",
            "kubernetes.podspec-persistent-volume-claim": "enabled",
        }
    }


def test_a_script_for_kn_can_be_run(render: Command, tmp_path: Path) -> None:
    done = render("--format", "kn", "--orchestrator-as", "knative")
    assert done.code == 0
    script = tmp_path / "deploy" / "deploy.sh"
    assert script.stat().st_mode & 0o111 == 0o111
    kinds = {yaml.safe_load(path.read_text())["kind"] for path in (tmp_path / "deploy").glob("*.yaml")}
    assert "Service" not in kinds


def test_help_has_examples(stagecraft: Command) -> None:
    done = stagecraft("render", "--help")
    assert done.code == 0
    assert done.out.count("stagecraft render plan.yaml -o deploy/") >= 3


def test_a_memory_that_holds_no_lane_is_told(stagecraft: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    assert stagecraft("plan", "demo", "--stages", 2, "-o", plan).code == 0
    narrow = stagecraft("render", plan, "-o", tmp_path / "a", "--kv-memory", "1MiB")
    assert "demo-stage-0, demo-stage-1 holds less than one lane: 64 sequences with 1024 tokens each" in narrow.err
    assert "lane" not in stagecraft("render", plan, "-o", tmp_path / "b").err


def test_a_slow_model_gets_more_time_for_a_step(root: Path, stagecraft: Any, tmp_path: Path) -> None:
    plan = root / "tests" / "golden" / "llama-2-13b-5" / "plan.yaml"
    assert stagecraft("render", plan, "-o", tmp_path / "cpu", "--cpu", "1").code == 0
    name, value = "ORCHESTRATOR_STEP_TIMEOUT_S", 'value: "420"'
    text = (tmp_path / "cpu" / "orchestrator.yaml").read_text()
    assert text.split(name)[1].split("\n")[1].strip() == value
    assert stagecraft("render", plan, "-o", tmp_path / "gpu", "--gpu-resource", "nvidia.com/gpu").code == 0
    assert name not in (tmp_path / "gpu" / "orchestrator.yaml").read_text()
