"""Fixtures for all tests: where the project lies, a small random checkpoint, and the demonstration running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# no test has a limit on its time, also where Hypothesis would set one: a busy machine is no mistake
settings.register_profile("busy", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


# of processes that are started, and of time that passes: first, so that at the end no worker waits for another's last
LONG = ("exactness", "benchmarks", "faults", "orchestrator/batches", "orchestrator/cli", "fuzz")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(tests).as_posix() if item.path.is_relative_to(tests) else ""
        return next((index for index, folder in enumerate(LONG) if path.startswith(f"{folder}/")), len(LONG))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where platforms and batches of the tests keep what outlives them, so that the user's own are left alone."""
    folder = tmp_path_factory.mktemp("state")
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = before


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 blocks and width 16, with a tokenizer of one token a byte and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_runtime() -> Iterator[str]:
    """Where commands find the platform of `demo_url`: no test that looks for others does. Short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="sc-") as folder:
        yield folder


@pytest.fixture(scope="session")
def demo_url(demo_runtime: str, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of the demonstration model, served in 2 stages by `stagecraft up` on free ports."""
    logs = tmp_path_factory.mktemp("demo-logs")
    argv = [sys.executable, "-m", "orchestrator.cli", "up", "demo", "--stages", "2", "--threads", "1", "--json"]
    argv += ["--port", "0", "--grpc-port", "0", "--log-dir", str(logs)]
    errors = logs / "up.log"
    env = {**os.environ, "STAGECRAFT_RUNTIME_DIR": demo_runtime}
    with errors.open("wb") as stderr:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, cwd=root, env=env)
    assert process.stdout is not None
    with process.stdout as stdout:
        line = stdout.readline()
        assert line, f"`up demo` did not start:\n{errors.read_text()}"
        yield json.loads(line)["url"]
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, errors.read_text()
