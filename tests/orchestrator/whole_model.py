"""A server process for the tests: the real endpoints over a whole tiny model in one process, with Transformers.

Run as `python -m tests.orchestrator.whole_model FOLDER HTTP_PORT GRPC_PORT GATE`; it becomes ready once the file GATE
exists. Prompts that begin with certain token ids rehearse trouble; /metrics tells how many sequences are open.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import torch
from prometheus_client import Counter, Gauge
from transformers import AutoModelForCausalLM

from orchestrator.choices import Service
from orchestrator.generation import GenerationError, GenerationRequest, Token
from orchestrator.server import configure_logs, serve
from orchestrator.settings import OrchestratorSettings
from orchestrator.tokenizer import load_tokenizer

BUSY, BREAKS, SLOW, CRASHES = 5, 6, 7, 8  # first token ids of prompts

OPEN = Gauge("test_sequences_open", "Sequences that the generator holds")
CLOSED_EARLY = Counter("test_sequences_closed_early", "Sequences closed before their end")


class WholeModel:
    """Generator without a KV cache: greedy at temperature 0, else sampled, keyed by seed and position."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._model: torch.nn.Module | None = None

    async def start(self, gate: Path) -> None:
        while not gate.exists():  # noqa: ASYNC110, ASYNC240 (another process makes the file)
            await asyncio.sleep(0.05)
        self._model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32).eval()

    @property
    def ready(self) -> bool:
        return self._model is not None

    @property
    def context_length(self) -> int:
        """As with the chain, not known before the model is there (then None has no config: an internal error)."""
        return int(self._model.config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.vocab_size)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Token, None]:
        first = request.prompt[0]
        if first == BUSY:
            raise GenerationError("no KV left", status=429, code="kv_exhausted", retry_after_s=7)
        OPEN.inc()
        ended = False
        try:
            ids = list(request.prompt)
            for made in range(1, request.max_tokens + 1):
                await asyncio.sleep(0.05 if first == SLOW else 0)
                if first == BREAKS and made == 3:
                    raise GenerationError("a stage is gone", status=502, code="stage_lost")
                if first == CRASHES:
                    raise ZeroDivisionError("secret detail")
                token = self._next(ids, request)
                ids.append(token.id)
                stop = token.id in request.stop_ids
                ended = stop or made == request.max_tokens
                finish = ("stop" if stop else "length") if ended else None
                yield Token(token.id, token.logprob, token.top, finish)
                if ended:
                    return
        finally:
            OPEN.dec()
            if not ended:
                CLOSED_EARLY.inc()

    @torch.inference_mode()
    def _next(self, ids: list[int], request: GenerationRequest) -> Token:
        params = request.params
        logits = self._model(torch.tensor([ids])).logits[0, -1]
        for token, bias in params.logit_bias.items():
            logits[token] += bias
        logprobs = torch.log_softmax(logits, -1)
        if params.temperature == 0:
            chosen = int(logits.argmax())
        else:
            draw = torch.Generator().manual_seed(params.seed + len(ids))
            weights = torch.softmax(logits / max(params.temperature, 1e-5), -1)
            chosen = int(torch.multinomial(weights, 1, generator=draw))
        if params.logprobs is None:
            return Token(chosen)
        values, tokens = logprobs.topk(params.logprobs)
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        return Token(chosen, float(logprobs[chosen]), top)


def main() -> int:
    folder, http_port, grpc_port, gate = sys.argv[1:]
    torch.set_num_threads(1)
    configure_logs(as_json=True)
    generator = WholeModel(folder)
    settings = OrchestratorSettings(
        model=folder,
        model_name="toy",
        stage_urls="http://unused",
        plan="0",
        host="127.0.0.1",
        http_port=int(http_port),
        grpc_port=int(grpc_port),
        body_bytes_max=100_000,
        grace_s=5,
    )
    service = Service(generator, load_tokenizer(folder), name="toy", choices_max=32)
    return serve(service, settings, start=lambda: generator.start(Path(gate)))


if __name__ == "__main__":
    sys.exit(main())
