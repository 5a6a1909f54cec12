"""A server process for tests of mode `later`: the real endpoints over tokens that hang on prompt and seed alone.

Run as `python -m tests.orchestrator.gated_model FOLDER HTTP_PORT GATE`, with ORCHESTRATOR_EVENTS... in the
environment. Requests with a seed of 3 or more wait until the file GATE exists.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import AsyncGenerator
from pathlib import Path

from orchestrator.choices import Service
from orchestrator.generation import GenerationRequest, Token
from orchestrator.server import configure_logs, serve
from orchestrator.settings import OrchestratorSettings
from orchestrator.tokenizer import load_tokenizer


class GatedModel:
    ready, context_length, vocab_size = True, 128, 320

    def __init__(self, gate: Path) -> None:
        self._gate = gate

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Token, None]:
        while request.params.seed >= 3 and not self._gate.exists():  # noqa: ASYNC110 (another process makes it)
            await asyncio.sleep(0.02)
        for made in range(1, request.max_tokens + 1):
            token = zlib.crc32(repr((request.prompt, request.params.seed, made)).encode()) % 90 + 60
            yield Token(token, finish="length" if made == request.max_tokens else None)


def main() -> int:
    folder, http_port, gate = sys.argv[1:]
    configure_logs(as_json=True)
    settings = OrchestratorSettings(
        model=folder,
        model_name="toy",
        stage_urls="http://unused",
        plan="0",
        host="127.0.0.1",
        http_port=int(http_port),
        grpc_port=0,
        grace_s=5,
    )
    return serve(Service(GatedModel(Path(gate)), load_tokenizer(folder), name="toy"), settings)


if __name__ == "__main__":
    sys.exit(main())
