"""`stagecraft local` as a person uses it, on a platform that runs: what it prints, how it refuses, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
SERVER = (
    "import http.server, os; print('hello from', os.environ['K_REVISION'], flush=True);"
    " http.server.test(http.server.SimpleHTTPRequestHandler, port=int(os.environ['PORT']), bind='127.0.0.1')"
)

Stagecraft = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("platform")


def service(name: str, code: str = SERVER, **metadata: str) -> dict[str, Any]:
    container = {"image": "stagecraft/process", "command": [sys.executable, "-c", code]}
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": name, **metadata},
        "spec": {"template": {"spec": {"containers": [container]}}},
    }


def config_map(name: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write("file.yaml", object, object) -> its path."""

    def write(name: str, *objects: dict[str, Any]) -> Path:
        path = tmp_path / "manifests" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump_all(objects))
        return path

    return write


@pytest.fixture
def hello(stagecraft: Stagecraft, write: Callable[..., Path]) -> Iterator[str]:
    """The name of a service that is ready."""
    done = stagecraft("local", "apply", "-f", write("hello.yaml", service("hello")))
    assert done.code == 0, done.err
    yield "hello"
    stagecraft("local", "delete", "ksvc", "hello")


def test_apply_says_what_became_of_each_object(stagecraft: Stagecraft, write: Callable[..., Path]) -> None:
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "other"}}
    folder = write("a.yaml", service("web"), deployment).parent
    write("b.yml", config_map("config-a", x="1"))
    (folder / "readme.txt").write_text("no manifest")
    done = stagecraft("local", "apply", "-f", folder)
    assert done.code == 0, done.err
    lines = ["configmap/config-a created", "service.serving.knative.dev/web created"]
    assert sorted(done.out.splitlines()) == lines
    assert "skipped deployment/other: only Knative Services run on one machine" in done.err
    assert re.search(r"service web is ready at http://127\.0\.0\.1:\d+/", done.err)

    write("b.yml", config_map("config-a", x="2"))
    again = stagecraft("local", "apply", "-f", folder, "--no-wait")
    lines = ["configmap/config-a configured", "service.serving.knative.dev/web unchanged"]
    assert sorted(again.out.splitlines()) == lines
    assert "is ready" not in again.err

    gone = stagecraft("local", "delete", "-f", folder)
    assert gone.code == 0, gone.err
    assert sorted(gone.out.splitlines()) == [
        'configmap "config-a" deleted',
        'service.serving.knative.dev "web" deleted',
    ]


def test_the_url_it_prints_answers(hello: str, stagecraft: Stagecraft) -> None:
    item = json.loads(stagecraft("local", "get", "ksvc", hello, "-o", "json").out)
    assert httpx.get(f"{item['status']['url']}/", timeout=30).status_code == 200


def test_apply_reads_standard_input_and_can_only_look(stagecraft: Stagecraft) -> None:
    done = stagecraft("local", "apply", "-f", "-", "--dry-run", input=yaml.safe_dump(service("ghost")))
    assert (done.code, done.out) == (0, "service.serving.knative.dev/ghost created (dry run)\n")
    assert stagecraft("local", "get", "ksvc", "ghost").code == 1


def test_one_bad_manifest_and_nothing_is_applied(stagecraft: Stagecraft, write: Callable[..., Path]) -> None:
    bad = [service("bad"), service("worse")]
    for one in bad:
        one["spec"]["template"]["spec"]["containerConcurency"] = 1
    done = stagecraft("local", "apply", "-f", write("all.yaml", config_map("config-b"), *bad))
    assert (done.code, done.out) == (1, "")
    problems = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(problems) == 2
    for line in problems:
        assert re.match(r"error: .*all\.yaml:\d+: .*containerConcurency", line)
    assert stagecraft("local", "get", "cm", "config-b").code == 1


def test_text_that_is_no_yaml_is_told_with_its_line(stagecraft: Stagecraft) -> None:
    done = stagecraft("local", "apply", "-f", "-", input="a: 1\nb: [\n")
    assert done.code == 1
    assert "standard input:" in done.err


def test_text_without_objects_is_an_error(stagecraft: Stagecraft) -> None:
    done = stagecraft("local", "apply", "-f", "-", input="# nothing\n")
    assert (done.code, done.err) == (1, "error: there are no objects in what -f names\n")


def test_bytes_that_are_no_text_are_told(stagecraft: Stagecraft) -> None:
    done = stagecraft("local", "apply", "-f", "-", input=b"\xff\xfe")
    assert (done.code, done.err) == (1, "error: standard input: not UTF-8 text\n")


def test_apply_says_why_a_service_does_not_become_ready(stagecraft: Stagecraft) -> None:
    broken = service("broken", "raise SystemExit('no such model')")
    done = stagecraft("local", "apply", "-f", "-", input=yaml.safe_dump(broken))
    try:
        assert (done.code, done.out) == (1, "service.serving.knative.dev/broken created\n")
        assert re.search(r"service broken failed: RevisionFailed: .*no such model", done.err)
        assert "[broken-00001-" in stagecraft("local", "logs", "broken").out
        seen = stagecraft("status").out
        assert "Failed" in seen
        assert "no such model" in seen
    finally:
        stagecraft("local", "delete", "ksvc", "broken")


def test_apply_waits_no_longer_than_it_may(stagecraft: Stagecraft) -> None:
    slow = service("slow", "import time; time.sleep(600)")
    done = stagecraft("local", "apply", "-f", "-", "--timeout", "500ms", input=yaml.safe_dump(slow))
    stagecraft("local", "delete", "ksvc", "slow")
    assert done.code == 1
    said = "service slow is not ready in time: Deploying: Revision slow-00001 is not ready yet: .*127.0.0.1:"  # its pod
    assert re.search(said, done.err)


def test_each_setting_without_effect_is_a_warning_of_its_own(stagecraft: Stagecraft) -> None:
    network = config_map("config-network", x="1")
    network["metadata"]["namespace"] = "knative-serving"
    web = service("web")
    web["metadata"]["annotations"] = {"serving.knative.dev/crator": "me"}
    done = stagecraft("local", "apply", "-f", "-", "--dry-run", input=yaml.safe_dump_all([network, web]))
    assert done.code == 0, done.err
    assert [line.split(": ")[2] for line in done.err.splitlines() if line.startswith("warning: ")] == [
        "config-network has no effect",
        'Knative knows no annotation "serving.knative.dev/crator"',
    ]


class Story:
    """A client whose services are, look for look, as the story has it."""

    def __init__(self, *looks: dict[str, dict[str, str]]) -> None:
        self._looks = iter(looks)

    def get(self, _kind: str) -> list[dict[str, Any]]:
        return [
            {"metadata": {"namespace": "default", "name": name}, "status": {"conditions": [{"type": "Ready", **ready}]}}
            for name, ready in next(self._looks).items()
        ]


def test_only_what_changed_is_said_while_several_are_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    from orchestrator.cli.readiness import wait_ready

    one, two = ({"status": "Unknown", "reason": "Deploying", "message": text} for text in ("loads", "probe failed"))
    looks = ({"a": one, "b": one}, {"a": one, "b": two}, {"a": two, "b": two}, {"a": two, "b": {"status": "True"}})
    story: Any = Story(*looks, {"a": {"status": "True"}})
    assert wait_ready(story, [("default", "a"), ("default", "b")], timeout_s=60)
    assert [line.rstrip() for line in capsys.readouterr().err.splitlines()] == [
        "service a: Deploying: loads",
        "service b: Deploying: loads",
        "service b: Deploying: probe failed",
        "service a: Deploying: probe failed",
        "service b is ready at",
        "service a is ready at",
    ]


def test_objects_are_listed_as_kubectl_does(hello: str, stagecraft: Stagecraft) -> None:
    services = stagecraft("local", "get", "services").out.splitlines()
    assert services[0].split() == ["NAME", "URL", "LATESTCREATED", "LATESTREADY", "READY", "REASON"]
    assert re.fullmatch(r"hello +http://\S+ +hello-00001 +hello-00001 +True", services[1])
    revisions = stagecraft("local", "get", "rev", "-A").out.splitlines()
    assert revisions[0].startswith("NAMESPACE   NAME ")
    assert revisions[1].startswith("default     hello-00001   hello")
    pods = stagecraft("local", "get", "po").out.splitlines()
    assert re.fullmatch(r"hello-00001-\w+ +1/1 +ready +0 +\d+s", pods[1])
    assert stagecraft("local", "get", "ksvc", "-o", "name").out == f"service.serving.knative.dev/{hello}\n"


def test_yaml_and_json_hold_the_same_object(hello: str, stagecraft: Stagecraft) -> None:
    as_json = json.loads(stagecraft("local", "get", "ksvc", hello, "-o", "json").out)
    as_yaml = yaml.safe_load(stagecraft("local", "get", "ksvc", hello, "-o", "yaml").out)
    assert as_json == as_yaml
    assert as_json["kind"] == "Service"
    everything = json.loads(stagecraft("local", "get", "ksvc", "-o", "json").out)
    assert everything == {"apiVersion": "v1", "kind": "List", "items": [as_json]}


def test_an_empty_list_says_so_beside_the_output(stagecraft: Stagecraft) -> None:
    done = stagecraft("local", "get", "ksvc", "-n", "empty")
    assert (done.code, done.out, done.err) == (0, "", "no resources found in namespace empty\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["get", "ksvc", "nope"], 'service.serving.knative.dev "nope" not found in namespace default'),
        (["delete", "ksvc", "nope"], "not found"),
        (["logs", "nope"], "nope"),
        (["get", "ksvc", "--platform", "other"], "no platform called 'other' runs on this machine; there is: tests"),
    ],
)
def test_what_is_not_there_ends_with_1(stagecraft: Stagecraft, arguments: list[str], message: str) -> None:
    done = stagecraft("local", *arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert message in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["apply"], "with -f"),
        (["apply", "-f", "nowhere.yaml"], "the path nowhere.yaml does not exist"),
        (["apply", "-f", "-", "--timeout", "soon"], "'soon' is no duration such as"),
        (["get", "secrets"], "there is no kind 'secrets'"),
        (["get", "ksvc", "x", "-A"], "-n instead of -A"),
        (["delete"], "either KIND NAME, or -f PATH"),
        (["delete", "ksvc"], "either KIND NAME, or -f PATH"),
        (["delete", "ksvc", "x", "-f", "-"], "either KIND NAME, or -f PATH"),
        (["delete", "pod", "x"], "a pod goes with its service"),
        (["logs", "x", "-f", "--previous"], "nothing to follow"),
        (["start", "--name", "Not A Name"], "cannot name a platform"),
        (["start", "--name", "tests"], "a platform called 'tests' runs already"),
        (["start", "--default-service", "web"], "not of the form NAMESPACE/NAME"),
        (["start", "--drain-quiet", "-1s"], "is no duration"),
    ],
)
def test_wrong_arguments_end_with_2(stagecraft: Stagecraft, arguments: list[str], message: str) -> None:
    done = stagecraft("local", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_logs_are_printed_behind_the_pods_name(hello: str, stagecraft: Stagecraft) -> None:
    for name in (hello, "hello-00001"):
        assert re.match(r"\[hello-00001-\w+\] hello from hello-00001\n", stagecraft("local", "logs", name).out)
    assert stagecraft("local", "logs", hello, "--tail", "0").out == ""
    assert "none has been restarted" in stagecraft("local", "logs", hello, "--previous").err


def test_following_logs_ends_with_ctrl_c(hello: str, runtime: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "STAGECRAFT_RUNTIME_DIR": str(runtime)}
    argv = [sys.executable, "-m", "orchestrator.cli", "local", "logs", hello, "-f"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "hello from" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr.read() == ""


def test_names_are_completed(hello: str, stagecraft: Stagecraft) -> None:
    from orchestrator.cli import platform_client

    assert stagecraft("status").code == 0  # the fixture has set the runtime folder
    assert platform_client.names_of("ksvc", "default", None) == [hello]
    assert platform_client.platform_names() == ["tests"]
    assert platform_client.complete_kind("re") == ["revision"]
    assert platform_client.names_of("ksvc", "default", "other") == []


def test_a_platform_ends_with_ctrl_c_and_takes_its_replicas_along(
    start_platform: Callable[..., Any], write: Callable[..., Path], runtime: Path
) -> None:
    path = write("web.yaml", service("web"))
    with start_platform("short", "-f", str(path)) as running:
        assert httpx.get(running.facts["metrics_url"]).status_code == 200
        url = f"{running.facts['url']}/default/web/"
        assert httpx.get(url, timeout=30).status_code == 200
        children = psutil.Process(running.process.pid).children(recursive=True)
        assert children
        code, errors = running.end()
    assert (code, "Traceback" in errors, "stopping:" in errors) == (0, False, False)
    assert not any(child.is_running() for child in children)
    assert not Path(running.facts["log_dir"]).exists()
    assert "short.json" not in os.listdir(runtime)


def test_a_platform_that_was_killed_is_no_longer_found(
    start_platform: Callable[..., Any], stagecraft: Stagecraft, runtime: Path
) -> None:
    with start_platform("killed") as running:
        assert stagecraft("status", "--platform", "killed").code == 0
        running.process.kill()
        running.process.wait()
        done = stagecraft("status", "--platform", "killed")
    assert done.code == 1
    assert "no platform called 'killed' runs" in done.err
    assert "killed.json" not in os.listdir(runtime)
    assert not Path(running.facts["control"]).exists()


SLOW = (
    "import http.server, os, time\n"
    "class Handler(http.server.BaseHTTPRequestHandler):\n"
    "    def do_GET(self): time.sleep(600)\n"
    "http.server.ThreadingHTTPServer(('127.0.0.1', int(os.environ['PORT'])), Handler).serve_forever()"
)


def test_ctrl_c_says_what_it_waits_for_and_a_second_one_does_not_wait(
    start_platform: Callable[..., Any], stagecraft: Stagecraft, write: Callable[..., Path]
) -> None:
    path = write("slow.yaml", service("slow", SLOW))
    with (
        start_platform("stopped", "-f", str(path)) as running,
        socket.create_connection(("127.0.0.1", httpx.URL(running.facts["url"]).port)) as client,
    ):
        client.sendall(b"GET /default/slow/ HTTP/1.1\r\nHost: x\r\n\r\n")
        while not in_flight(stagecraft, "stopped"):
            pass
        running.process.send_signal(signal.SIGINT)
        said = next(line for line in running.process.stderr if line.startswith("stopping"))
        assert said == "stopping: 1 request is running and has 5 s; Ctrl-C again ends now\n"
        code, errors = running.end()
    assert (code, "Traceback" in errors) == (0, False)


def in_flight(stagecraft: Stagecraft, name: str) -> int:
    revisions = json.loads(stagecraft("status", "--json", "--platform", name).out)["revisions"]
    return sum(revision["in_flight"] for revision in revisions)


@pytest.mark.parametrize("option", ["--port", "--metrics-port"])
def test_an_occupied_port_is_told_once_and_nothing_is_left(runtime: Path, tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), "STAGECRAFT_RUNTIME_DIR": str(runtime), "TMPDIR": str(tmp_path)
        }  # fmt: skip
        argv = [sys.executable, "-m", "orchestrator.cli", "local", "start", "--name", "late", "--port", "0"]
        done = subprocess.run([*argv, option, port], capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1:{port}: Address already in use")
    advice = "; choose another with --port, --metrics-port or --host; port 0 takes any free one\n"
    assert done.stderr.endswith(advice)
    assert done.stderr.count("choose another") == 1
    assert not list(tmp_path.glob("stagecraft-*"))
