"""`stagecraft up` with real stages: from zero and out and back, and the same texts all the way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from knative.client import Client

WAIT_S = 90  # against hangs
NEW_TOKENS = 40
PROMPTS = ["To be", "or not", "that is", "the question:", "Whether", "'tis", "nobler in", "x"]


@dataclass
class Up:
    process: subprocess.Popen[str]
    facts: dict[str, Any]
    client: Client
    folder: Path

    def revisions(self) -> dict[str, dict[str, Any]]:
        return {one["service"]: one for one in self.client.status()["revisions"]}

    def replicas(self) -> list[psutil.Process]:
        """The processes of replicas, as the operating system sees them: what the agents have forked."""
        agents = psutil.Process(self.process.pid).children()
        return [process for agent in agents for process in agent.children(recursive=True)]

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "platform.log").read_text().splitlines()]

    def body(self, prompt: str, **options: Any) -> dict[str, Any]:
        return {"model": "tiny", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, **options}

    def complete(self, prompt: str) -> str:
        answer = httpx.post(f"{self.facts['openai']}/completions", json=self.body(prompt), timeout=WAIT_S)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])


def wait(condition: Callable[[], object]) -> None:
    ends_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends_s
        time.sleep(0.05)


@pytest.fixture(scope="module")
def up(tiny_checkpoint: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """The tiny model in two stages; quickly back at zero, up to three replicas each, lanes of two."""
    logs = tmp_path_factory.mktemp("up")
    argv = [sys.executable, "-P", "-m", "orchestrator.cli", "up", str(tiny_checkpoint), "--name", "tiny"]
    argv += ["--stages", "2", "--threads", "1", "--port", "0", "--grpc-port", "0", "--json", "--log-dir", str(logs)]
    argv += ["--window", "6s", "--grace", "1s", "--target", "2", "--max-scale", "3", "--lane-width", "2"]
    argv += ["--kv-memory", "64MiB"]
    with tempfile.TemporaryDirectory(prefix="sc-") as runtime:
        env = {**os.environ, "PYTHONPATH": str(root), "STAGECRAFT_RUNTIME_DIR": runtime, "OMP_NUM_THREADS": "1"}
        with (logs / "stderr").open("wb") as stderr:
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)
        assert process.stdout is not None
        with process, process.stdout:
            try:
                line = process.stdout.readline()
                assert line, (logs / "stderr").read_text()
                entry = json.loads((Path(runtime) / "tiny.json").read_text())
                with Client(Path(entry["socket"])) as client:
                    yield Up(process, json.loads(line), client, logs)
            finally:
                process.kill()
        told = [line for line in (logs / "stderr").read_text().splitlines() if not line.startswith("stopping: ")]
        assert told == []


@pytest.fixture(scope="module")
def texts(up: Up) -> dict[str, str]:
    """What one client gets for each prompt."""
    return {prompt: up.complete(prompt) for prompt in PROMPTS}


def test_nothing_runs_before_the_first_request_which_wakes_all_at_once(up: Up, texts: dict[str, str]) -> None:
    lines = up.log()
    events = [one["event"] for one in lines]
    first_ready = events.index("process_ready")
    started = [one["pod"] for one in lines[:first_ready] if one["event"] == "process_started"]
    services = {pod.rpartition("-")[0] for pod in started}
    assert services == {"tiny-00001", "tiny-stage-0-00001", "tiny-stage-1-00001"}
    assert all(one["had"] == 0 for one in lines[:first_ready] if one["event"] == "scale_up")


def test_the_text_is_that_of_transformers(texts: dict[str, str], tiny_checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    for prompt, text in texts.items():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        new = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True) == text


async def test_40_generations_at_once_scale_out_and_none_fails(up: Up, texts: dict[str, str]) -> None:
    most: dict[str, int] = {}

    async def watch() -> None:
        while True:
            for name, one in (await asyncio.to_thread(up.revisions)).items():
                most[name] = max(most.get(name, 0), one["ready"])
            await asyncio.sleep(0.1)

    watcher = asyncio.create_task(watch())
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(timeout=WAIT_S, limits=limits) as client:

        async def ask(prompt: str) -> str:
            answer = await client.post(f"{up.facts['openai']}/completions", json=up.body(prompt))
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])

        async def keep_asking(number: int) -> None:
            """Until both stages have scaled out, and once more then: the new replicas have to answer too."""
            prompt = PROMPTS[number % len(PROMPTS)]
            last = False
            while not last:
                last = all(most.get(stage["service"], 0) > 1 for stage in up.facts["stages"])
                assert await ask(prompt) == texts[prompt]

        await asyncio.gather(*(keep_asking(number) for number in range(40)))
    watcher.cancel()
    assert most["tiny"] == 1


def test_tokens_come_one_by_one(up: Up) -> None:
    body = up.body("To be", stream=True)
    with httpx.stream("POST", f"{up.facts['openai']}/completions", json=body, timeout=WAIT_S) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["object"] == "text_completion"
        running = up.revisions()["tiny"]["in_flight"]
        rest = [line for line in lines if line]
    assert running == 1  # the answer was not complete yet
    assert rest[-1] == "data: [DONE]"


async def test_all_go_back_to_zero_and_a_grpc_call_wakes_them(up: Up, texts: dict[str, str]) -> None:
    from kserve import InferenceGRPCClient, InferInput, InferRequest

    await asyncio.to_thread(up.complete, "To be")
    await asyncio.to_thread(wait, lambda: not any(one["pods"] for one in up.revisions().values()))
    assert up.replicas() == []
    prompt = InferInput("text_input", [1], "BYTES", data=["To be"])
    async with InferenceGRPCClient(up.facts["grpc"]) as client:
        request = InferRequest("tiny", [prompt], parameters={"max_tokens": NEW_TOKENS, "temperature": 0})
        answer = await client.infer(request, timeout=WAIT_S)
    (said,) = answer.outputs[0].data
    assert (said.decode() if isinstance(said, bytes) else said) == texts["To be"]
    assert len(up.replicas()) >= 3
    assert await asyncio.to_thread(up.complete, "or not") == texts["or not"]


def test_the_urls_it_prints_answer(up: Up, texts: dict[str, str]) -> None:
    facts = up.facts
    assert facts["model"] == "tiny"
    v1 = httpx.post(facts["v1"], json={"instances": ["To be"]}, timeout=WAIT_S)
    assert v1.status_code == 200, v1.text
    assert "stagecraft_" in httpx.get(facts["metrics"], timeout=WAIT_S).text
    assert 'kn_service_name="tiny-stage-1"' in httpx.get(facts["platform_metrics"]).text
    assert [stage["blocks"] for stage in facts["stages"]] == ["0:3", "3:4"]
    for stage in facts["stages"]:
        assert httpx.get(f"{stage['url']}/readyz", timeout=WAIT_S).status_code == 200


def test_the_manifests_it_wrote_are_those_it_serves(up: Up) -> None:
    files = sorted((up.folder / "manifests").glob("*.yaml"))
    assert [path.name for path in files] == [
        "config-autoscaler.yaml", "orchestrator.yaml", "stage-0.yaml", "stage-1.yaml",
    ]  # fmt: skip
    applied = {one["metadata"]["name"]: one["spec"] for one in up.client.get("service")}
    for path in files[1:]:
        manifest = yaml.safe_load(path.read_text())
        written, served = (
            one["template"]["spec"]["containers"][0]
            for one in (manifest["spec"], applied[manifest["metadata"]["name"]])
        )
        assert (served["image"], served["env"]) == (written["image"], written["env"])


def test_sigterm_lets_an_answer_end_and_then_leaves_nothing(up: Up) -> None:
    body = up.body("To be", stream=True, max_tokens=200)
    up.complete("To be")
    family = psutil.Process(up.process.pid).children(recursive=True)
    with httpx.stream("POST", f"{up.facts['openai']}/completions", json=body, timeout=WAIT_S) as answer:
        lines = answer.iter_lines()
        next(lines)
        up.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert up.process.wait(WAIT_S) == 0
    assert not any(process.is_running() for process in family)
    with pytest.raises(httpx.ConnectError):
        httpx.get(up.facts["url"])
