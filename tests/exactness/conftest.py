"""Real stage processes for the tests that compare with Transformers.

The processes come from a fork server that has imported torch once: each is a process of its own with its own port and
weights, and ready in a tenth of the time.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.reduction
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from functions.contract.sampling import SamplingParams
from orchestrator.chain import Chain, ChainSettings
from orchestrator.generation import GenerationRequest

VOCABULARY = 211
PLAN = "test-plan"
_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_GEMMA = {**_SMALL, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
_OLD = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "qwen3": {**_SMALL, "head_dim": 8},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mixtral": {**_SMALL, **_EXPERTS},
    "phi3": _SMALL,
    "gpt_oss": {**_SMALL, **_EXPERTS, "head_dim": 8, "sliding_window": 8},
    "gpt2": _OLD,
    "opt": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 24},
    # beyond the required nine
    "mistral": {**_SMALL, "sliding_window": 8},
    "qwen2": _SMALL,
    "qwen3_moe": {**_SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "granite": {**_SMALL, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "cohere2": {**_SMALL, "sliding_window": 8, "logit_scale": 0.3},
    "gpt_neox": {**_SMALL},
    "olmo2": _SMALL,
    "lfm2": _SMALL,
    "starcoder2": {**_SMALL, "sliding_window": 8},
    "exaone4": {**_SMALL, "sliding_window": 8},
    # not packable: attention or caches of their own
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 4, "n_head": 4},
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
    "gptj": {**_OLD, "rotary_dim": 4},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 128},
    "diffllama": _SMALL,
    "llama4_text": {**_SMALL, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "falcon_h1": {
        **_SMALL, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
    },
    "deepseek_v3": {
        **_SMALL, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small random checkpoint of an architecture, made once. Weights are large enough that texts differ."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            # without end and padding tokens every generation runs to its full length
            config = CONFIG_MAPPING[name](**{**ARCHITECTURES[name], "eos_token_id": None, "pad_token_id": None})
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.3)
                else:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            for path, buffer in model.named_buffers():
                if path.endswith("correction_bias"):  # deepseek leaves it unset
                    buffer.zero_()
            made[name] = tmp_path_factory.mktemp(name)
            with contextlib.redirect_stderr(io.StringIO()):
                model.save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def whole_model(checkpoint_of: Callable[[str], Path]) -> Callable[[str, Sequence[int], int], list[int]]:
    """What Transformers' own generate answers: (architecture, prompt, new tokens) -> token ids, greedy, fp32."""
    from transformers import AutoModelForCausalLM

    loaded: dict[str, Any] = {}

    def generate(name: str, prompt: Sequence[int], count: int) -> list[int]:
        if name not in loaded:
            loaded.clear()
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint_of(name), attn_implementation="eager", dtype=torch.float32
            )
            loaded[name] = model.eval()
        ids = torch.tensor([list(prompt)])
        out = loaded[name].generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    return generate


def run_stage(listener: Any, environment: dict[str, str]) -> None:
    """The stage's process: what `python -m functions --fd N` does, after the fork server's imports."""
    from functions.server import serve

    os.environ.update(environment)
    os._exit(serve(listener.detach()))


@pytest.fixture(scope="session")
def fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["functions.runner", "functions.server", "functions.service"])
    return context


class Stages:
    """The processes of one chain. `urls` in order; `kill` and `start` end and replace one at its old port."""

    def __init__(self, context: Any, model: Path, spans: Sequence[str], environment: dict[str, str]) -> None:
        self._context = context
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in spans]
        self._environments = [
            {
                "STAGE_MODEL": str(model),
                "STAGE_BLOCKS": span,
                "STAGE_INDEX": str(index),
                "STAGE_COUNT": str(len(spans)),
                "STAGE_PLAN": PLAN,
                "STAGE_THREADS": "1",
                **environment,
            }
            for index, span in enumerate(spans)
        ]
        self.processes: list[Any] = [None] * len(spans)
        for index in range(len(spans)):
            self.start(index)

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in self._listeners]

    def start(self, index: int) -> None:
        handle = multiprocessing.reduction.DupFd(self._listeners[index].fileno())
        process = self._context.Process(target=run_stage, args=(handle, self._environments[index]), daemon=True)
        process.start()
        self.processes[index] = process

    def kill(self, index: int) -> None:
        self.processes[index].kill()
        self.processes[index].join()

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(10)
            process.kill()
        for listener in self._listeners:
            listener.close()


@pytest.fixture
def start_stages(fork_server: Any, checkpoint_of: Callable[[str], Path]) -> Iterator[Callable[..., Stages]]:
    """(architecture, ["0:2", "2:4"], NAME=value...) -> running stage processes, ended with the test."""
    started: list[Stages] = []

    def start(name: str, spans: Sequence[str], **environment: str) -> Stages:
        started.append(Stages(fork_server, checkpoint_of(name), spans, environment))
        return started[-1]

    yield start
    for stages in started:
        stages.close()


@pytest.fixture
async def open_chain() -> AsyncIterator[Callable[..., Any]]:
    """(stages, settings) -> a chain over them that has woken every stage."""
    opened: list[Chain] = []

    async def start(stages: Stages, settings: ChainSettings | None = None) -> Chain:
        chain = Chain(PLAN, stages.urls, settings)
        opened.append(chain)
        await chain.start()
        return chain

    yield start
    for chain in opened:
        await chain.close()


@pytest.fixture(scope="session")
def answer() -> Callable[..., Any]:
    """(chain, prompt, new tokens, params) -> the token ids that the chain answers."""

    async def collect(
        chain: Chain, prompt: Sequence[int], count: int, params: SamplingParams | None = None
    ) -> list[int]:
        request = GenerationRequest(tuple(prompt), count, params or SamplingParams())
        return [token.id async for token in chain.generate(request)]

    return collect


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Eight prompts of different lengths, some past the sliding windows of the small models."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 13, 40, 1, 7, 22, 3, 60)]
