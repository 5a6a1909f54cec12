"""`stagecraft up` as a process of its own, with real stages of a small checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[3]
FREE_PORTS = ("--port", "0", "--grpc-port", "0")
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def argv(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "orchestrator.cli", *arguments]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv(*arguments), capture_output=True, text=True, cwd=cwd, env=ENV, check=False)


@dataclass
class Running:
    process: subprocess.Popen[str]
    facts: dict[str, Any]

    def end(self) -> tuple[int, str]:
        """Waits for the end; exit code and what it printed on standard error."""
        assert self.process.stderr is not None
        text = self.process.stderr.read()
        return self.process.wait(), text


@contextmanager
def serving(checkpoint: Path, *options: str, cwd: Path = ROOT) -> Iterator[Running]:
    """The system in 2 stages on free ports, ready; killed at the end if it still runs."""
    line = argv("up", str(checkpoint), "--stages", "2", "--threads", "1", "--json", *FREE_PORTS, *options)
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=ENV) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            ready = process.stdout.readline()
            assert ready, process.stderr.read()
            yield Running(process, json.loads(ready))
        finally:
            process.kill()


@pytest.fixture(scope="module")
def tiny_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of its own: processes are counted by the folder they serve."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("up") / "tiny"))


def children_of(checkpoint: Path) -> list[int]:
    """Processes that serve this checkpoint, found by their environment."""

    def serves(process: psutil.Process) -> bool:
        try:
            env = process.environ()
        except psutil.Error:
            return False
        return str(checkpoint) in (env.get("STAGE_MODEL"), env.get("ORCHESTRATOR_MODEL"))

    return [process.pid for process in psutil.process_iter() if serves(process)]


def wait_until_gone(checkpoint: Path) -> None:
    while children_of(checkpoint):
        time.sleep(0.02)


def complete(facts: dict[str, Any], **options: Any) -> httpx.Response:
    body = {"model": facts["model"], "prompt": "To be", "max_tokens": 5, "temperature": 0, **options}
    return httpx.post(f"{facts['openai']}/completions", json=body, timeout=60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_a_signal_and_then_exits_0(tiny_checkpoint: Path, number: signal.Signals) -> None:
    with serving(tiny_checkpoint) as running:
        answer = complete(running.facts)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 5
        assert len(children_of(tiny_checkpoint)) == 3
        running.process.send_signal(number)
        code, errors = running.end()
    assert (code, "Traceback" in errors) == (0, False)
    assert children_of(tiny_checkpoint) == []
    assert not Path(running.facts["log_dir"]).exists()


def test_the_urls_it_prints_answer(tiny_checkpoint: Path) -> None:
    with serving(tiny_checkpoint, "--name", "bard") as running:
        facts = running.facts
        assert facts["model"] == "bard"
        v1 = httpx.post(facts["v1"], json={"instances": ["To be"]}, timeout=60)
        assert v1.status_code == 200, v1.text
        assert httpx.get(facts["metrics"]).status_code == 200
        host, port = facts["grpc"].rsplit(":", 1)
        socket.create_connection((host, int(port))).close()
        assert facts["stages"][0]["blocks"].startswith("0:")


def test_kill_9_takes_all_children_along(tiny_checkpoint: Path) -> None:
    with serving(tiny_checkpoint) as running:
        assert len(children_of(tiny_checkpoint)) == 3
        running.process.kill()
        running.process.wait()
    wait_until_gone(tiny_checkpoint)


def test_a_stage_that_dies_while_serving_ends_everything_with_1(tiny_checkpoint: Path) -> None:
    with serving(tiny_checkpoint) as running:
        os.kill(running.facts["stages"][1]["pid"], signal.SIGKILL)
        code, errors = running.end()
    assert code == 1
    assert "stage 1 was killed by SIGKILL" in errors
    assert children_of(tiny_checkpoint) == []
    assert (Path(running.facts["log_dir"]) / "stage-1.log").exists()


def test_a_stage_that_cannot_start_is_named_and_nothing_is_left(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = run(
        "up", str(tiny_checkpoint), "--stages", "2", "--device", "cuda:99", *FREE_PORTS, "--log-dir", str(tmp_path)
    )
    assert done.returncode == 1
    assert "error: stage " in done.stderr
    assert str(tmp_path / "stage-") in done.stderr
    assert "Traceback" not in done.stderr
    assert children_of(tiny_checkpoint) == []


def test_a_taken_port_is_named_with_the_option(tiny_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("up", str(tiny_checkpoint), "--stages", "2", "--port", port, "--grpc-port", "0")
    assert done.returncode == 2
    assert f"port {port} " in done.stderr
    assert "--port" in done.stderr
    assert children_of(tiny_checkpoint) == []


def test_ctrl_c_while_starting_leaves_nothing(tiny_checkpoint: Path) -> None:
    line = argv("up", str(tiny_checkpoint), "--stages", "2", *FREE_PORTS)
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENV
    ) as process:
        while not children_of(tiny_checkpoint):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert (process.returncode, "Traceback" in errors) == (0, False)
    assert children_of(tiny_checkpoint) == []


def test_a_prompt_is_answered_on_stdout(tiny_checkpoint: Path) -> None:
    done = run("up", str(tiny_checkpoint), "--stages", "2", "--prompt", "To be", "--exit", *FREE_PORTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("\nTo be")
    assert len(done.stdout) > len("\nTo be\n")
    assert "tokens/s" in done.stderr
    assert "stage 1 (blocks" in done.stderr
    assert children_of(tiny_checkpoint) == []


def test_a_plan_file_decides_the_stages(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    planned = run("plan", str(tiny_checkpoint), "--stages", "3", "-o", str(file))
    assert planned.returncode == 0, planned.stderr
    done = run("up", "--plan", str(file), "--prompt", "To be", "--exit", *FREE_PORTS)
    assert done.returncode == 0, done.stderr
    assert "stage 2 (blocks" in done.stderr


def test_files_in_the_current_folder_do_not_stand_in_for_packages(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for module in ("torch", "kserve", "functions"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('the wrong file was imported')")
    with serving(tiny_checkpoint, cwd=tmp_path) as running:
        assert complete(running.facts).status_code == 200


WRONG = {
    "neither_stages_nor_plan": (["MODEL"], "--stages N or --plan FILE"),
    "no_model": (["--stages", "2"], "name a MODEL"),
    "more_stages_than_blocks": (["MODEL", "--stages", "9"], "4 blocks"),
    "exit_without_prompt": (["MODEL", "--stages", "2", "--exit"], "--prompt"),
    "plan_that_is_not_there": (["--plan", "no-plan.yaml"], "no-plan.yaml"),
    "unreadable_size": (["MODEL", "--stages", "2", "--kv-memory", "lots"], "--kv-memory"),
    "dtype_unknown": (["MODEL", "--stages", "2", "--dtype", "int3"], "float32"),
    "port_out_of_range": (["MODEL", "--stages", "2", "--port", "70000"], "65535"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_exit_2_and_say_what_is_allowed(case: str, tiny_checkpoint: Path) -> None:
    arguments, expected = WRONG[case]
    done = run("up", *(str(tiny_checkpoint) if word == "MODEL" else word for word in arguments))
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_does_not_exist_is_named() -> None:
    done = run("up", "./no/such/folder", "--stages", "2")
    assert done.returncode == 1
    assert "no/such/folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_log_folder_that_cannot_be_made_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = run("up", str(tiny_checkpoint), "--stages", "2", "--log-dir", str(file / "logs"), *FREE_PORTS)
    assert done.returncode == 1
    assert str(file / "logs") in done.stderr
    assert "--log-dir" in done.stderr
    assert children_of(tiny_checkpoint) == []


def test_a_log_folder_without_room_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    line = argv("up", str(tiny_checkpoint), "--stages", "2", "--log-dir", str(tmp_path), *FREE_PORTS)
    limited = ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash", *line]  # no file may grow, as on a full disk
    done = subprocess.run(limited, capture_output=True, text=True, cwd=ROOT, env=ENV, check=False)
    assert done.returncode == 1
    assert f"cannot write logs to {tmp_path}" in done.stderr
    assert children_of(tiny_checkpoint) == []


def test_a_taken_grpc_port_is_named_with_the_option(tiny_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("up", str(tiny_checkpoint), "--stages", "2", "--port", "0", "--grpc-port", port)
    assert done.returncode == 2
    assert f"port {port} " in done.stderr
    assert "--grpc-port" in done.stderr
    assert "Traceback" not in done.stderr
    assert children_of(tiny_checkpoint) == []


def test_the_curl_line_of_the_banner_works(tiny_checkpoint: Path) -> None:
    line = argv("up", str(tiny_checkpoint), "--stages", "2", "--threads", "1", *FREE_PORTS)
    # standard error to no one: a pipe that nobody reads could fill up
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "cwd": ROOT, "env": ENV}
    with subprocess.Popen(line, **options) as process:
        assert process.stdout is not None
        try:
            banner = read_until(process.stdout, "  stagecraft generate ")
            (curl,) = (text for text in banner if text.startswith("  curl "))
            asked = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=False)
            process.send_signal(signal.SIGINT)
            code = process.wait()
        finally:
            process.kill()
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["choices"][0]["text"]
    assert code == 0
    assert children_of(tiny_checkpoint) == []


def read_until(stream: IO[str], start: str) -> list[str]:
    """The lines up to the one that starts so, which comes last."""
    lines: list[str] = []
    for line in stream:
        lines.append(line)
        if line.startswith(start):
            return lines
    pytest.fail(f"no line starts with {start!r}: {lines}")


@pytest.mark.parametrize("tensor", ["model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(
    tiny_checkpoint: Path, tmp_path: Path, tensor: str
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "holed"))
    weights = load_file(checkpoint / "model.safetensors")
    del weights[tensor]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    done = run("up", str(checkpoint), "--stages", "2", "--log-dir", str(tmp_path), *FREE_PORTS)
    assert done.returncode == 1
    assert tensor in done.stderr
    assert "Traceback" not in done.stderr
    assert children_of(checkpoint) == []


def test_a_plan_whose_stages_overlap_is_refused_with_its_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    planned = run("plan", str(tiny_checkpoint), "--stages", "2", "-o", str(file))
    assert planned.returncode == 0, planned.stderr
    lines = file.read_text().splitlines()
    first, second = (number for number, line in enumerate(lines) if line.startswith("  - blocks:"))
    lines[first], lines[second] = '  - blocks: "0:2"', '  - blocks: "1:4"'
    file.write_text("\n".join(lines) + "\n")
    done = run("up", "--plan", str(file), *FREE_PORTS)
    assert done.returncode == 2
    assert f"{file}:{second + 1}: stages 0 and 1 overlap: block 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert children_of(tiny_checkpoint) == []
