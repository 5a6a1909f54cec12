"""A tiny checkpoint with a tokenizer, and the real server over it as a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tests import warm

ROOT = Path(__file__).parents[2]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CORPUS = [
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "The slings and arrows of outrageous fortune, or to take arms against a sea of troubles",
    "naïve café, 你好, 世界, 🙂🙃, Ελλάδα",
]


@dataclass
class LiveServer:
    process: subprocess.Popen[str]
    url: str
    grpc_url: str
    log: Path
    before_ready: dict[str, int] = field(default_factory=dict)
    grpc_before_ready: Any = None  # the error of a call

    @property
    def openai_url(self) -> str:
        return f"{self.url}/openai/v1"

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels, from /metrics."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer after GPT-2 (byte-level BPE) in the files that Transformers writes."""
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    # left on by whoever trained it; a server must not cut prompts
    tokenizer.enable_truncation(8)
    _save(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer after Llama 2: spaces as U+2581, unknown characters as byte tokens, first space dropped."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *bytes_], limit_alphabet=40)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    data = json.loads(tokenizer.to_str())
    # byte tokens are vocabulary, not special: special ones would be left out of texts
    data["added_tokens"] = [entry for entry in data["added_tokens"] if not entry["content"].startswith("<0x")]
    _save(folder, tokenizers.Tokenizer.from_str(json.dumps(data)))
    return folder


@pytest.fixture(scope="session")
def toy_folder(byte_level_folder: Path) -> Path:
    """The byte-level tokenizer with a random two-block Llama beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(byte_level_folder)
    return byte_level_folder


@pytest.fixture(scope="session")
def live_server(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    http_port, grpc_port = free_port(), free_port()
    folder = tmp_path_factory.mktemp("server")
    gate, log = folder / "gate", folder / "log"
    command = [sys.executable, "-m", "tests.orchestrator.whole_model", str(toy_folder)]
    with log.open("w") as stream:
        process = warm.Popen(
            [*command, str(http_port), str(grpc_port), str(gate)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=stream,
            stdout=stream,
            text=True,
        )
    server = LiveServer(process, f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}", log)
    try:
        _wait_for(server, "/v2/health/live")
        body = {"model": "toy", "prompt": "To be"}
        server.before_ready = {
            "v2 ready": httpx.get(f"{server.url}/v2/models/toy/ready").status_code,
            "v1 ready": httpx.get(f"{server.url}/v1/models/toy").status_code,
            "v1 predict": httpx.post(f"{server.url}/v1/models/toy:predict", json={"instances": ["a"]}).status_code,
            "v2 generate": httpx.post(f"{server.url}/v2/models/toy/generate", json={"text_input": "a"}).status_code,
            "openai": httpx.post(f"{server.openai_url}/completions", json=body).status_code,
        }
        server.grpc_before_ready = _refusal_over_grpc(server)
        gate.touch()
        _wait_for(server, "/v2/models/toy/ready")
        yield server
    finally:
        process.terminate()
        process.wait(30)


def _refusal_over_grpc(server: LiveServer) -> Any:
    import grpc
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
    from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

    with grpc.insecure_channel(server.grpc_url) as channel, pytest.raises(grpc.RpcError) as caught:
        GRPCInferenceServiceStub(channel).ModelInfer(pb.ModelInferRequest(model_name="toy"))
    return caught.value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(server: LiveServer, path: str) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with {server.process.returncode}: {server.log.read_text()[-3000:]}")
        try:
            if httpx.get(server.url + path).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{path} never answered 200: {server.log.read_text()[-3000:]}")


def _save(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "model_max_length": 10000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
