"""`stagecraft up` as a process of its own, with real stages of a small checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from knative.resources.documents import read_documents

ROOT = Path(__file__).resolve().parents[3]
FREE_PORTS = ("--port", "0", "--grpc-port", "0")
WAIT_S = 120  # against hangs

Stagecraft = Callable[..., Any]


@dataclass
class Running:
    """An `up` that listens. `family` are the processes it had when `keep_family` was called."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]
    family: list[psutil.Process] = field(default_factory=list)

    def keep_family(self) -> None:
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Exit code and what it printed on standard error, after this signal."""
        self.keep_family()
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, errors

    def is_alone(self) -> bool:
        """Nothing that it started is left; waits for what the system is about to end."""
        return not psutil.wait_procs(self.family, timeout=WAIT_S)[1]


@pytest.fixture(scope="module")
def environment(runtime: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "STAGECRAFT_RUNTIME_DIR": str(runtime),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "150",
    }


def argv(*arguments: object) -> list[str]:
    return [sys.executable, "-P", "-m", "orchestrator.cli", "up", *map(str, arguments), *FREE_PORTS]


@pytest.fixture(scope="module")
def serving(tiny_checkpoint: Path, environment: dict[str, str]) -> Callable[..., Any]:
    """serving("--stages", 2, cwd=...): a context with an `up` that listens; killed at its end if it still runs."""

    @contextmanager
    def serve(*options: object, model: Path = tiny_checkpoint, cwd: Path = ROOT) -> Iterator[Running]:
        stages = () if "--plan" in options or "--stages" in options else ("--stages", 2)
        model_and_name = () if "--plan" in options else (model, "--name", "tiny")
        line = argv(*model_and_name, *stages, "--threads", 1, "--json", *options)
        pipe = subprocess.PIPE
        with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=environment) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                ready = process.stdout.readline()
                assert ready, process.stderr.read()
                yield Running(process, json.loads(ready))
            finally:
                process.kill()

    return serve


@pytest.fixture(scope="module")
def run(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run("MODEL", "--stages", 2): an `up` that ends by itself."""

    def run(
        *arguments: object, before: tuple[str, ...] = (), after: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        line = [*before, *argv(*arguments), *after]
        return subprocess.run(
            line, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=WAIT_S
        )

    return run


@dataclass
class Shown(Running):
    """One whose standard output is for people."""

    text: str = ""
    errors: Path = Path()

    def line(self, start: str) -> str:
        """What follows on the line that starts so."""
        (line,) = (line for line in self.text.splitlines() if line.startswith(start))
        return line.removeprefix(start).strip()


@pytest.fixture(scope="module")
def bard(
    tiny_checkpoint: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shown]:
    """One that has answered a prompt, started in a folder whose files have the names of packages."""
    folder = tmp_path_factory.mktemp("cwd")
    for module in ("torch", "kserve", "functions", "knative"):
        (folder / f"{module}.py").write_text("raise SystemExit('the wrong file was imported')")
    line = argv(tiny_checkpoint, "--name", "bard", "--stages", 2, "--threads", 1, "--prompt", "To be")
    errors = folder / "stderr"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=folder, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        try:
            text = read_until(process.stdout, "  stagecraft generate ")
            assert text, errors.read_text()
            yield Shown(process, {}, [], text, errors)
        finally:
            process.kill()


def read_until(stream: IO[str], start: str) -> str:
    """All up to the end of the line that starts so; "" if there is none."""
    lines: list[str] = []
    for line in stream:
        lines.append(line)
        if line.startswith(start):
            return "".join(lines)
    return ""


def test_a_prompt_is_answered_before_the_banner(bard: Shown) -> None:
    answer, _, banner = bard.text.partition("\nbard is served in 2 stages, from zero with the first request")
    assert answer.startswith("\nTo be")
    assert len(answer) > len("\nTo be\n")
    assert "Ctrl-C" in banner


def test_what_wakes_for_a_prompt_is_shown_with_its_states(bard: Shown) -> None:
    told = bard.errors.read_text()
    for row in ("stage 0 (blocks 0:3)", "stage 1 (blocks 3:4)", "orchestrator (endpoints)"):
        states = [line.removeprefix(row).split()[0] for line in told.splitlines() if line.startswith(row)]
        assert states == ["starting", "ready"]
    assert "tokens/s" in told


def test_the_addresses_and_commands_of_the_banner_work(bard: Shown) -> None:
    asked_for = "curl " + bard.line("  curl")
    asked = subprocess.run(["bash", "-c", asked_for], capture_output=True, text=True, check=False)
    assert json.loads(asked.stdout)["choices"][0]["text"], asked.stderr
    v1 = httpx.post(bard.line("  V1"), json={"instances": ["To be"]}, timeout=WAIT_S)
    assert v1.status_code == 200, v1.text
    assert 'kn_service_name="bard-stage-1"' in httpx.get(bard.line("  metrics")).text
    host, port = bard.line("  gRPC").rsplit(":", 1)
    socket.create_connection((host, int(port))).close()


def test_the_other_commands_find_it(bard: Shown, stagecraft: Stagecraft) -> None:
    assert bard.line("  watch") == "stagecraft top --platform bard"
    shown = json.loads(stagecraft("status", "--json", "--platform", "bard").out)
    assert {one["service"] for one in shown["revisions"]} == {"bard", "bard-stage-0", "bard-stage-1"}
    assert shown["platform"]["pid"] == bard.process.pid


def test_ctrl_c_ends_it_with_0_and_nothing_is_left(bard: Shown) -> None:
    folder = Path(bard.line("  files").split()[0])
    assert (folder / "platform.log").exists()
    code, _ = bard.end(signal.SIGINT)
    assert code == 0
    assert "Traceback" not in bard.errors.read_text()
    assert bard.is_alone()
    assert not folder.exists()


def test_kill_9_takes_all_processes_along(serving: Callable[..., Any]) -> None:
    with serving() as running:
        while len(psutil.Process(running.process.pid).children()) < 2:
            time.sleep(0.01)
        code, _ = running.end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert running.is_alone()
    shutil.rmtree(running.facts["log_dir"])


@pytest.fixture
def holed(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose last stage lacks a tensor."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "holed"))
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


def test_a_stage_that_cannot_start_is_told_with_its_reason_and_its_log(
    run: Callable[..., Any], holed: Path, tmp_path: Path
) -> None:
    options = ("--stages", 2, "--prompt", "To be", "--exit", "--log-dir", tmp_path)
    done = run(holed, *options)
    assert done.returncode == 1
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert re.match(r"error: holed-stage-[01] cannot start: ended with exit code 1, last printed: ", error)
    assert "model.norm.weight" in error
    assert error.endswith(f"(its log is in {tmp_path / 'logs'})")
    assert "Traceback" not in done.stderr
    assert any("model.norm.weight" in log.read_text() for log in (tmp_path / "logs").glob("holed-stage-*/*.log"))


def test_a_stage_that_cannot_start_is_a_warning_while_serving(serving: Callable[..., Any]) -> None:
    with serving("--device", "cuda:99", "--stages", 1) as running:
        # somebody asks: without that nothing starts
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.get(running.facts["metrics"], timeout=0.5)
        warning = running.process.stderr.readline()
        code, errors = running.end(signal.SIGTERM)
    assert warning.startswith("warning: tiny-stage-0 cannot start: ended with exit code ")
    assert "cuda:99" in warning
    assert (code, "Traceback" in errors) == (0, False)
    assert running.is_alone()


def test_two_that_start_at_the_same_moment_get_along(tiny_checkpoint: Path, environment: dict[str, str]) -> None:
    line = [*argv(tiny_checkpoint, "--name", "tiny", "--stages", 1, "--threads", 1), "--json"]
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [subprocess.Popen(line, env=environment, **options) for _ in range(2)]
    try:
        one, two = (Running(process, json.loads(process.stdout.readline())) for process in processes)
        assert {one.facts["platform"], two.facts["platform"]} == {"tiny", "tiny-2"}
        assert one.end(signal.SIGTERM) == (0, "")
        assert httpx.get(two.facts["platform_metrics"]).status_code == 200
        assert two.end(signal.SIGTERM) == (0, "")
    finally:
        for process in processes:
            process.kill()


def test_a_plan_file_decides_the_stages_whatever_the_log_folder_holds(
    serving: Callable[..., Any], stagecraft: Stagecraft, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    planned = stagecraft("plan", tiny_checkpoint, "--stages", 3, "--name", "tiny", "-o", file)
    assert planned.code == 0, planned.err
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "stage-9.yaml").write_text("the orchestrator of a run in two stages")
    with serving("--plan", file, "--log-dir", tmp_path) as running:
        assert [stage["service"] for stage in running.facts["stages"]] == [f"tiny-stage-{index}" for index in range(3)]
        assert running.end(signal.SIGTERM) == (0, "")


def test_stages_that_share_all_cores_take_turns_at_them(serving: Callable[..., Any], tmp_path: Path) -> None:
    """One lane is kept full then, and no other is opened beside it for replicas that cannot come."""
    cores = len(os.sched_getaffinity(0))
    with serving("--device", "cpu", "--threads", cores, "--log-dir", tmp_path) as running:
        assert running.end(signal.SIGTERM) == (0, "")
    stages, front = _environments(tmp_path)
    assert {stage["STAGE_THREADS"] for stage in stages} == {str(cores)}
    assert {stage["STAGE_CORES_LOCK"] for stage in stages} == {str(tmp_path / "cores.lock")}
    assert {name: front[f"ORCHESTRATOR_{name}"] for name in ("SPREAD", "LANE_AGE_S", "LANE_WIDTH")} == {
        "SPREAD": "1", "LANE_AGE_S": "0", "LANE_WIDTH": "256",
    }  # fmt: skip


def test_stages_with_cores_of_their_own_compute_at_once(serving: Callable[..., Any], tmp_path: Path) -> None:
    with serving("--threads", 1, "--spread", 2, "--max-scale", 3, "--log-dir", tmp_path) as running:
        assert running.end(signal.SIGTERM) == (0, "")
    stages, front = _environments(tmp_path)
    if len(os.sched_getaffinity(0)) > 1:
        assert not any("STAGE_CORES_LOCK" in stage for stage in stages)
    # as many as there are stages, which the orchestrator takes by itself
    assert not {"ORCHESTRATOR_SPREAD", "ORCHESTRATOR_LANE_AGE_S", "ORCHESTRATOR_LANE_WIDTH"} & set(front)


def _environments(folder: Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Of the stages and of the orchestrator, as the manifests of an `up` in two stages have them."""
    found = []
    for name in ("stage-0", "stage-1", "orchestrator"):
        (service,) = read_documents(folder / "manifests" / f"{name}.yaml")
        (container,) = dict(service.value)["spec"]["template"]["spec"]["containers"]
        found.append({one["name"]: one["value"] for one in container["env"]})
    return found[:2], found[2]


@pytest.mark.parametrize("option", ["--port", "--grpc-port", "--metrics-port"])
def test_a_taken_port_is_named_with_the_option(run: Callable[..., Any], tiny_checkpoint: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tiny_checkpoint, "--stages", 2, after=(option, str(port)))
    assert done.returncode == 2
    assert f"127.0.0.1:{port}: Address already in use" in done.stderr
    assert option in done.stderr
    assert "Traceback" not in done.stderr


def test_a_log_folder_without_room_is_named(run: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    limited = ("bash", "-c", 'ulimit -f 0; exec "$@"', "bash")  # no file may grow, as on a full disk
    done = run(tiny_checkpoint, "--stages", 2, "--log-dir", tmp_path, before=limited)
    assert done.returncode == 1
    assert f"cannot write logs to {tmp_path}" in done.stderr


WRONG = {
    "neither_stages_nor_plan": (["MODEL"], "--stages N or --plan FILE"),
    "no_model": (["--stages", "2"], "name a MODEL"),
    "more_stages_than_blocks": (["MODEL", "--stages", "9"], "4 blocks"),
    "exit_without_prompt": (["MODEL", "--stages", "2", "--exit"], "--prompt"),
    "plan_that_is_not_there": (["--plan", "no-plan.yaml"], "no-plan.yaml"),
    "unreadable_size": (["MODEL", "--stages", "2", "--kv-memory", "lots"], "--kv-memory"),
    "dtype_unknown": (["MODEL", "--stages", "2", "--dtype", "int3"], "float32"),
    "port_out_of_range": (["MODEL", "--stages", "2", "--port", "70000"], "65535"),
    "window_too_short": (["MODEL", "--stages", "2", "--window", "1s"], "whole seconds from 6s to 1h"),
    "grace_unreadable": (["MODEL", "--stages", "2", "--grace", "soon"], "is no duration such as 500ms"),
    "max_below_min": (["MODEL", "--stages", "2", "--min-scale", "3", "--max-scale", "2"], "is below --min-scale 3"),
    "target_of_nothing": (["MODEL", "--stages", "2", "--target", "0"], "0.01"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_exit_2_and_say_what_is_allowed(
    case: str, stagecraft: Stagecraft, tiny_checkpoint: Path
) -> None:
    arguments, expected = WRONG[case]
    done = stagecraft("up", *(tiny_checkpoint if word == "MODEL" else word for word in arguments))
    assert done.code == 2, done.err
    assert expected in done.err


def test_a_grace_of_nothing_is_refused_before_anything_starts(stagecraft: Stagecraft, tiny_checkpoint: Path) -> None:
    done = stagecraft("up", tiny_checkpoint, "--stages", 2, "--grace", "0s")
    assert done.code == 2, done.err
    assert "--grace" in done.err


def test_a_model_that_does_not_exist_is_named(stagecraft: Stagecraft) -> None:
    done = stagecraft("up", "./no/such/folder", "--stages", 2)
    assert (done.code, "no/such/folder" in done.err) == (1, True)


def test_a_log_folder_that_cannot_be_made_is_named(
    stagecraft: Stagecraft, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = stagecraft("up", tiny_checkpoint, "--stages", 2, "--log-dir", tmp_path / "file" / "logs")
    assert done.code == 1
    assert str(tmp_path / "file" / "logs") in done.err
    assert "--log-dir" in done.err


def test_a_plan_whose_stages_overlap_is_refused_with_its_line(
    stagecraft: Stagecraft, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    planned = stagecraft("plan", tiny_checkpoint, "--stages", 2, "-o", file)
    assert planned.code == 0, planned.err
    lines = file.read_text().splitlines()
    first, second = (number for number, line in enumerate(lines) if line.startswith("  - blocks:"))
    lines[first], lines[second] = '  - blocks: "0:2"', '  - blocks: "1:4"'
    file.write_text("\n".join(lines) + "\n")
    done = stagecraft("up", "--plan", file)
    assert done.code == 2
    assert f"{file}:{second + 1}: stages 0 and 1 overlap: block 1" in done.err
