"""A chain of two real stages, which it asks by HTTP, for the doors that serve it to the public."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from functions.service import StageService
from functions.settings import StageSettings
from orchestrator.chain import Chain
from orchestrator.choices import Service
from orchestrator.tokenizer import load_tokenizer
from tools.fuzzing.door import Violation
from tools.fuzzing.served import listening, serve
from tools.fuzzing.stage_doors import PLAN, SPANS, app_of
from tools.fuzzing.tiny_model import NAME

T = TypeVar("T")


class ServedChain:
    """Stages, chain and door run in one event loop, which moves only within `run`."""

    service: Service

    def __init__(self, checkpoint: Path) -> None:
        self._runner = asyncio.Runner()
        self._failures: list[str] = []
        self._runner.get_loop().set_exception_handler(lambda loop, context: self._failures.append(str(context)))
        self.run(self._open(checkpoint))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns. Raises Violation where exceptions were left to the event loop."""
        result = self._runner.run(work)
        if self._failures:
            raise Violation("crash", f"left to the event loop: {self._failures.pop()}")
        return result

    def check(self, text: Coroutine[Any, Any, str], right: str) -> None:
        """A good request still has the right text, and no stage holds a sequence afterwards. Raises Violation."""
        self.run(self._check(text, right))

    def close(self) -> None:
        self._runner.run(self._close())
        self._runner.close()  # and what waits for leases to run out

    async def _check(self, text: Coroutine[Any, Any, str], right: str) -> None:
        if (found := await text) != right:
            raise Violation("harm", f"the control's text is {found!r}, not {right!r}")
        for _ in range(200):  # sequences are freed behind the back of their requests
            if not any(len(stage._stage.kv) for stage in self._stages if stage._stage):
                return
            await asyncio.sleep(0.02)
        raise Violation("harm", "stages hold sequences that no request has any more")

    async def _open(self, checkpoint: Path) -> None:
        self._stages = [_stage(checkpoint, index) for index in range(len(SPANS))]
        self._servers, urls = [], []
        for stage in self._stages:
            listener = listening()
            urls.append(f"http://127.0.0.1:{listener.getsockname()[1]}")
            self._servers.append(await serve(app_of(stage), listener))
        self._chain = Chain(PLAN, urls)
        await self._chain.start()
        self.service = Service(
            self._chain,
            load_tokenizer(str(checkpoint)),
            name=NAME,
            requests_max=64,
            batch_requests_max=16,
            choices_max=8,
        )

    async def _close(self) -> None:
        await self._chain.close()
        for server in self._servers:
            await server.stop()
        for stage in self._stages:
            stage.stop()


def _stage(checkpoint: Path, index: int) -> StageService:
    return StageService(
        StageSettings(
            model=str(checkpoint), model_name=NAME, blocks=SPANS[index], index=index, count=len(SPANS), plan=PLAN,
            kv_bytes_max=1 << 20, threads=1,
        )
    )  # fmt: skip
