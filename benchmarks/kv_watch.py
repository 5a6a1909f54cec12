"""How much KV cache stages set aside and how much of it they have filled, looked at again and again while they work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.bench import MeasureError

EVERY_S = 0.5  # each look costs the stages some milliseconds
SET_ASIDE, FILLED = "stagecraft_stage_kv_bytes", "stagecraft_stage_kv_bytes_filled"


@dataclass(frozen=True, slots=True)
class KvSample:
    """Bytes, of all stages together."""

    set_aside: float
    filled: float

    @property
    def ratio(self) -> float:
        return self.set_aside / self.filled


@dataclass(slots=True)
class KvWatch:
    samples: list[KvSample] = field(default_factory=list)

    def median(self) -> KvSample:
        """The sample with the median ratio (of two the lower) among those with something filled. Raises MeasureError
        where there is none."""
        busy = sorted((sample for sample in self.samples if sample.filled), key=lambda sample: sample.ratio)
        if not busy:
            raise MeasureError("the stages were never seen with a KV cache in use")
        return busy[(len(busy) - 1) // 2]


@asynccontextmanager
async def watch_kv(stages: Sequence[str]) -> AsyncIterator[KvWatch]:
    """Looks at the /metrics of stages, given by their URLs, until the context ends. Raises MeasureError."""
    watch = KvWatch()
    async with httpx.AsyncClient(trust_env=False) as client:
        looking = asyncio.create_task(_look(client, stages, watch))
        try:
            yield watch
        finally:
            looking.cancel()
            await asyncio.wait([looking])
    if not looking.cancelled() and (error := looking.exception()) is not None:
        raise error


async def _look(client: httpx.AsyncClient, stages: Sequence[str], watch: KvWatch) -> None:
    while True:
        try:
            found = await asyncio.gather(*(client.get(f"{url}metrics") for url in stages))
        except httpx.HTTPError as error:
            raise MeasureError(f"a stage does not show its metrics: {error}") from None
        watch.samples.append(sample_of([reply.text for reply in found]))
        await asyncio.sleep(EVERY_S)


def sample_of(texts: Sequence[str]) -> KvSample:
    """From what the stages answer to /metrics. Raises MeasureError."""
    values = [
        {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
        for text in texts
    ]
    try:
        return KvSample(sum(found[SET_ASIDE] for found in values), sum(found[FILLED] for found in values))
    except KeyError as error:
        raise MeasureError(f"a stage's /metrics lack {error}") from None
