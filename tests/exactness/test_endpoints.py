"""The whole path, client → orchestrator process → stage processes: answers equal generate, whatever the protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.exactness.orchestrators import NAME, Orchestrator

PLAN = "endpoints-plan"
VOCABULARY, CONTEXT, BODY_BYTES_MAX = 257, 4096, 100_000
CUTS = {1: ["0:4"], 2: ["0:2", "2:4"], 3: ["0:1", "1:3", "3:4"], 4: ["0:1", "1:2", "2:3", "3:4"]}
NEW_TOKENS = 20
BESIDE_TOKENS = 150  # that are looked at of a stream with some requests beside it
ENDLESS = 4000  # more tokens than any test waits for
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
POLLS, POLL_S = 600, 0.05

every_cut = pytest.mark.parametrize("system", CUTS, indirect=True)
two_stages = pytest.mark.parametrize("system", [2], indirect=True)


@pytest.fixture(scope="module")
def expected(talkative: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What Transformers' generate answers to each of the prompts, greedy."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(talkative, attn_implementation="eager", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def generate(prompt: Sequence[int]) -> list[int]:
        ids = torch.tensor([list(prompt)])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    return [generate(prompt) for prompt in prompts]


@pytest.fixture(scope="module")
def system(
    request: pytest.FixtureRequest, talkative: Path, running_stages: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Orchestrator]:
    log = tmp_path_factory.mktemp("orchestrator") / "log"
    with running_stages(talkative, CUTS[request.param], STAGE_PLAN=PLAN) as stages:
        found = Orchestrator(talkative, PLAN, stages.urls, log, {"BODY_BYTES_MAX": str(BODY_BYTES_MAX)})
        try:
            found.start()
            yield found
        finally:
            found.close()


@pytest.fixture
async def openai_client(system: Orchestrator) -> AsyncIterator[Any]:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{system.url}/openai/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


EXTRA = {"ignore_eos": True, "return_token_ids": True}


async def whole(client: Any, prompt: list[int], **options: Any) -> tuple[str, list[int]]:
    """Text and token ids of an answer in one piece."""
    options = {"temperature": 0, "max_tokens": NEW_TOKENS, **options}
    reply = await client.completions.create(model=NAME, prompt=prompt, extra_body=EXTRA, **options)
    (choice,) = reply.choices
    assert choice.finish_reason == "length"
    assert reply.usage.prompt_tokens == len(prompt)
    return choice.text, choice.model_extra["token_ids"]


async def streamed(client: Any, prompt: list[int], **options: Any) -> tuple[str, list[int]]:
    """The same from a stream."""
    options = {"temperature": 0, "max_tokens": NEW_TOKENS, **options}
    stream = await client.completions.create(model=NAME, prompt=prompt, stream=True, extra_body=EXTRA, **options)
    text, ids = "", []
    async with stream:
        async for chunk in stream:
            for choice in chunk.choices:
                text += choice.text
                ids += choice.model_extra["token_ids"]
    return text, ids


@every_cut
async def test_eight_completions_at_once_equal_generate(
    system: Orchestrator, openai_client: Any, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    answers = await asyncio.gather(*(whole(openai_client, prompt) for prompt in prompts))
    assert [ids for _, ids in answers] == expected
    assert len({tuple(ids) for ids in expected}) == len(prompts)  # else an answer to another prompt would pass


@every_cut
async def test_streamed_answers_are_those_in_one_piece(
    system: Orchestrator, openai_client: Any, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    both = [call(openai_client, prompt) for call in (whole, streamed) for prompt in prompts]
    answers = await asyncio.gather(*both)
    assert answers[len(prompts) :] == answers[: len(prompts)]
    assert [ids for _, ids in answers[len(prompts) :]] == expected


@pytest.fixture(scope="module")
def first_drawn() -> dict[int, list[int]]:
    """By seed, what the first number of stages drew."""
    return {}


@every_cut
async def test_a_seed_draws_the_same_tokens_for_every_number_of_stages(
    system: Orchestrator,
    openai_client: Any,
    prompts: list[list[int]],
    expected: list[list[int]],
    first_drawn: dict[int, list[int]],
) -> None:
    seeds = (7, 2**53 - 1)
    calls = [call(openai_client, prompts[2], temperature=1, seed=seed) for seed in seeds for call in (whole, streamed)]
    drawn = [ids for _, ids in await asyncio.gather(*calls)]
    assert drawn[0] == drawn[1] == first_drawn.setdefault(seeds[0], drawn[0])
    assert drawn[2] == drawn[3] == first_drawn.setdefault(seeds[1], drawn[2])
    assert drawn[0] != drawn[2]
    assert expected[2] not in drawn


def ids_request(prompt: list[int], **parameters: Any) -> Any:
    from kserve import InferInput, InferRequest

    tensor = InferInput("input_ids", [1, len(prompt)], "INT64", data=prompt)
    return InferRequest(NAME, [tensor], parameters={**GREEDY, **parameters})


def output_ids(reply: Any) -> list[int]:
    (ids,) = (output for output in reply.outputs if output.name == "output_ids")
    return ids.as_numpy()[0].tolist()  # type: ignore[no-any-return]


@two_stages
async def test_v1_predict_equals_generate(
    system: Orchestrator, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    from kserve import InferenceRESTClient
    from kserve.inference_client import RESTConfig

    instances = [{"prompt": prompt} for prompt in prompts]
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
        assert await client.is_model_ready(system.url, NAME)
        reply = await client.infer(system.url, {"instances": instances, "parameters": GREEDY}, model_name=NAME)
    assert [prediction["tokens"] for prediction in reply["predictions"]] == expected


@two_stages
async def test_v2_infer_over_rest_equals_generate(
    system: Orchestrator, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    from kserve import InferenceRESTClient
    from kserve.inference_client import RESTConfig

    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        assert await client.is_server_live(system.url)
        assert await client.is_model_ready(system.url, NAME)
        calls = [client.infer(system.url, ids_request(prompt), model_name=NAME) for prompt in prompts]
        assert [output_ids(reply) for reply in await asyncio.gather(*calls)] == expected


@two_stages
async def test_v2_infer_over_grpc_equals_generate(
    system: Orchestrator, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    from kserve import InferenceGRPCClient

    async with InferenceGRPCClient(system.grpc) as client:
        assert await client.is_server_live()
        assert await client.is_model_ready(NAME)
        replies = await asyncio.gather(*(client.infer(ids_request(prompt)) for prompt in prompts))
    assert [output_ids(reply) for reply in replies] == expected


async def until(met: Callable[[], bool], what: str) -> None:
    for _ in range(POLLS):
        if await asyncio.to_thread(met):
            return
        await asyncio.sleep(POLL_S)
    pytest.fail(f"never happened: {what}")


async def drop_stream(system: Orchestrator, path: str, body: dict[str, Any]) -> None:
    """Hangs up after some events."""
    async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", system.url + path, json=body) as reply:
        assert reply.status_code == 200
        events = 0
        async for line in reply.aiter_lines():
            events += line.startswith("data: ")
            if events == 5:
                return
    pytest.fail("the stream ended by itself")


async def drop_call(system: Orchestrator, call: Any) -> None:
    """Cancels a call without a stream once every stage works for it."""
    task = asyncio.ensure_future(call)
    await until(lambda: task.done() or system.sequences() == [1.0, 1.0], "all stages hold the sequence")
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def drop_openai_stream(system: Orchestrator) -> None:
    body = {"model": NAME, "prompt": "To be", **GREEDY, "max_tokens": ENDLESS, "stream": True}
    await drop_stream(system, "/openai/v1/completions", body)


async def drop_generate_stream(system: Orchestrator) -> None:
    body = {"text_input": "To be", "parameters": {**GREEDY, "max_tokens": ENDLESS}}
    await drop_stream(system, f"/v2/models/{NAME}/generate_stream", body)


async def drop_openai(system: Orchestrator) -> None:
    body = {"model": NAME, "prompt": "To be", **GREEDY, "max_tokens": ENDLESS}
    async with httpx.AsyncClient(timeout=60) as client:
        await drop_call(system, client.post(f"{system.url}/openai/v1/completions", json=body))


async def drop_predict(system: Orchestrator) -> None:
    body = {"instances": ["To be"], "parameters": {**GREEDY, "max_tokens": ENDLESS}}
    async with httpx.AsyncClient(timeout=60) as client:
        await drop_call(system, client.post(f"{system.url}/v1/models/{NAME}:predict", json=body))


async def drop_grpc(system: Orchestrator) -> None:
    from kserve import InferenceGRPCClient

    async with InferenceGRPCClient(system.grpc) as client:
        await drop_call(system, client.infer(ids_request([1, 2, 3], max_tokens=ENDLESS)))


DROPS = {
    "openai stream": drop_openai_stream,
    "generate_stream": drop_generate_stream,
    "openai": drop_openai,
    "v1": drop_predict,
    "grpc": drop_grpc,
}


@two_stages
@pytest.mark.parametrize("way", DROPS)
async def test_a_client_that_leaves_frees_every_stage(system: Orchestrator, way: str) -> None:
    await until(lambda: system.sequences() == [0.0, 0.0], "stages are idle")
    before = system.tokens()
    await DROPS[way](system)
    await until(lambda: system.sequences() == [0.0, 0.0], "stagecraft_stage_sequences is 0.0 in every stage")
    assert system.tokens() - before < ENDLESS  # it did not just run to its end


def completion(**options: Any) -> tuple[str, dict[str, Any]]:
    return "/openai/v1/completions", {"model": NAME, "prompt": "To be", "max_tokens": 4, **options}


def predict(**body: Any) -> tuple[str, dict[str, Any]]:
    return f"/v1/models/{NAME}:predict", body


def infer(name: str, shape: list[int], datatype: str, data: list[Any]) -> tuple[str, dict[str, Any]]:
    tensor = {"name": name, "shape": shape, "datatype": datatype, "data": data}
    return f"/v2/models/{NAME}/infer", {"inputs": [tensor]}


BAD: dict[str, tuple[tuple[str, Any], int]] = {
    "broken JSON": (("/openai/v1/completions", b'{"model": '), 400),
    "unknown model": (completion(model="other"), 404),
    "unknown path": (("/openai/v1/poems", {}), 404),
    "prompt too long": (completion(prompt=[1] * CONTEXT), 400),
    "answer too long": (completion(max_tokens=CONTEXT), 400),
    "wrong type": (completion(temperature="hot"), 400),
    "wrong prompt": (completion(prompt={"text": "To be"}), 400),
    "unknown parameter": (completion(beam_width=3), 400),
    "n too large": (completion(n=1000), 400),
    "no such token": (completion(prompt=[1, VOCABULARY]), 400),
    "negative token": (completion(prompt=[-1]), 400),
    "bias of no such token": (completion(logit_bias={str(VOCABULARY): 1}), 400),
    "top_p out of range": (completion(top_p=2), 400),
    "huge body": (("/openai/v1/completions", b" " * (BODY_BYTES_MAX + 1)), 413),
    "bad chat": (("/openai/v1/chat/completions", {"model": NAME, "messages": [{"role": "ghost"}]}), 400),
    "V1 without instances": (predict(instances=[]), 400),
    "V1 unknown parameter": (predict(instances=["a"], parameters={"beam_width": 3}), 400),
    "V1 broken JSON": ((f"/v1/models/{NAME}:predict", b"{"), 400),
    "V2 shape": (infer("input_ids", [1, 3], "INT64", [1, 2]), 400),
    "V2 type": (infer("input_ids", [1, 1], "FP32", [1.5]), 400),
    "V2 unknown model": (("/v2/models/other/infer", {"inputs": []}), 404),
    "generate": ((f"/v2/models/{NAME}/generate", {"text_input": 3}), 400),
}


@two_stages
async def test_bad_requests_do_not_touch_a_stream_beside_them(
    system: Orchestrator, openai_client: Any, prompts: list[list[int]]
) -> None:
    """The stream would go on for long after them, and is left once it has said enough."""
    _, undisturbed = await streamed(openai_client, prompts[1], max_tokens=BESIDE_TOKENS)
    stream = await openai_client.completions.create(
        model=NAME, prompt=prompts[1], stream=True, temperature=0, max_tokens=ENDLESS, extra_body=EXTRA
    )
    async with stream:
        disturbed = list((await anext(stream)).choices[0].model_extra["token_ids"])
        async with httpx.AsyncClient(base_url=system.url, timeout=60) as client:
            statuses = await asyncio.gather(*(status_of(client, *request) for request, _ in BAD.values()))
        async for chunk in stream:
            disturbed += chunk.choices[0].model_extra["token_ids"]
            if len(disturbed) >= BESIDE_TOKENS:
                break
    assert dict(zip(BAD, statuses, strict=True)) == {name: status for name, (_, status) in BAD.items()}
    assert disturbed[:BESIDE_TOKENS] == undisturbed


async def status_of(client: httpx.AsyncClient, path: str, body: Any) -> int:
    content = body if isinstance(body, bytes) else json.dumps(body)
    reply = await client.post(path, content=content, headers={"content-type": "application/json"})
    return reply.status_code
