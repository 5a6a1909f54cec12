"""The OpenAI endpoints of a running server, with the `openai` client and, for what it would not send, plain HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from tests import warm

BUSY, BREAKS, SLOW, CRASHES = 5, 6, 7, 8  # as in whole_model.py
ROOT = Path(__file__).parents[2]
SPECS = Path(os.environ.get("STAGECRAFT_SPECS", ROOT.parent / "shared" / "specs"))
ASK = [{"role": "user", "content": "To be?"}]


@pytest.fixture(scope="module")
def client(live_server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live_server.openai_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(toy_folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(toy_folder / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer


def whole_model_greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([ids])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return made[0, ids.shape[1] :].tolist()


def test_models_are_listed_and_described(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").object == "model"
    with pytest.raises(openai.NotFoundError, match="serves 'toy'"):
        client.models.retrieve("other")


def test_greedy_completion_is_what_transformers_generates(
    client: openai.OpenAI, toy_folder: Path, tokenizer: Tokenizer
) -> None:
    reply = client.completions.create(
        model="toy",
        prompt="To be, or not",
        temperature=0,
        max_tokens=12,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    prompt_ids = tokenizer.encode("To be, or not").ids
    expected = whole_model_greedy(toy_folder, prompt_ids, 12)
    (choice,) = reply.choices
    assert choice.token_ids == expected
    assert choice.prompt_token_ids == prompt_ids
    assert choice.text == tokenizer.decode(expected)
    assert choice.finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt_ids), 12)
    assert reply.usage.total_tokens == len(prompt_ids) + 12


def test_chat_uses_the_checkpoints_template(client: openai.OpenAI, toy_folder: Path) -> None:
    from transformers import AutoTokenizer

    reply = client.chat.completions.create(
        model="toy", messages=ASK, max_tokens=4, extra_body={"return_token_ids": True}
    )
    expected = AutoTokenizer.from_pretrained(toy_folder).apply_chat_template(
        ASK, add_generation_prompt=True, return_dict=False
    )
    assert reply.prompt_token_ids == expected
    assert reply.choices[0].message.role == "assistant"


def test_chat_without_a_limit_may_use_the_whole_context(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="toy", messages=ASK, seed=1, extra_body={"ignore_eos": True})
    assert reply.usage.total_tokens == 128
    assert (
        client.completions.create(model="toy", prompt="To be", extra_body={"ignore_eos": True}).usage.completion_tokens
        == 16
    )


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("extra", [{}, {"stop": ["e", " t"]}, {"echo": True}, {"logprobs": 2}], ids=str)
def test_streamed_completion_equals_the_whole_one(client: openai.OpenAI, n: int, extra: dict) -> None:
    asked = {"model": "toy", "prompt": "To be, or", "seed": 11, "n": n, "max_tokens": 20, **extra}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        if choice.logprobs:
            assert [t for c in mine for t in c.logprobs.tokens] == choice.logprobs.tokens
            assert [t for c in mine for t in c.logprobs.text_offset] == choice.logprobs.text_offset


def test_streamed_chat_equals_the_whole_one(client: openai.OpenAI) -> None:
    asked = {"model": "toy", "messages": ASK, "seed": 5, "n": 2, "max_completion_tokens": 15}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    for choice in whole.choices:
        deltas = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert deltas[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in deltas) == choice.message.content
        assert deltas[-1].finish_reason == choice.finish_reason


def test_seeds_fix_the_text_and_n_leaves_choice_0_alone(client: openai.OpenAI) -> None:
    def texts(seed: int, n: int = 1) -> list[str]:
        reply = client.completions.create(model="toy", prompt="To be", seed=seed, n=n, max_tokens=12)
        return [choice.text for choice in reply.choices]

    assert texts(7) == texts(7)
    assert texts(7) != texts(8)
    three = texts(7, 3)
    assert three[0] == texts(7)[0]
    assert len(set(three)) == 3
    # any whole number is a seed, folded into 0..2^53-1
    assert texts(-1) == texts((1 << 53) - 1)
    assert texts((1 << 53) + 7) == texts(7)


def test_the_drawn_seed_is_told(client: openai.OpenAI) -> None:
    asked = {"model": "toy", "prompt": "To be", "max_tokens": 12}
    raw = client.completions.with_raw_response.create(**asked)
    again = client.completions.create(**asked, seed=int(raw.headers["x-stagecraft-seed"]))
    assert raw.parse().choices[0].text == again.choices[0].text


def test_stop_text_ends_the_answer_and_is_left_out(client: openai.OpenAI) -> None:
    asked = {"model": "toy", "prompt": "To be", "temperature": 0, "max_tokens": 30, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(**asked).choices[0].text
    stop = text[4:7]
    choice = client.completions.create(**asked, stop=stop).choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_end_token_stops_and_ignore_eos_goes_on(client: openai.OpenAI) -> None:
    asked = {"model": "toy", "prompt": "To be", "max_tokens": 5, "logit_bias": {"1": 100}}
    stopped = client.completions.create(**asked, extra_body={"return_token_ids": True})
    assert (stopped.choices[0].finish_reason, stopped.choices[0].token_ids) == ("stop", [1])
    assert stopped.choices[0].text == ""
    ignoring = client.completions.create(**asked, extra_body={"ignore_eos": True})
    assert (ignoring.choices[0].finish_reason, ignoring.usage.completion_tokens) == ("length", 5)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("To be", 1), (["To be", "or not"], 2), ([60, 61, 62], 1), ([[60, 61], [62]], 2)],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_every_form_of_prompt(client: openai.OpenAI, prompt: Any, count: int) -> None:
    reply = client.completions.create(model="toy", prompt=prompt, n=2, max_tokens=2, temperature=0)
    assert [choice.index for choice in reply.choices] == list(range(2 * count))


def test_echo_puts_the_prompt_before_the_answer(client: openai.OpenAI) -> None:
    asked = {"model": "toy", "prompt": "To be", "temperature": 0}
    plain = client.completions.create(**asked).choices[0].text
    assert client.completions.create(**asked, echo=True).choices[0].text == "To be" + plain


def test_completion_logprobs_have_the_legacy_shape(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="toy", prompt="To be", temperature=0, max_tokens=6, logprobs=3)
    logprobs = reply.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 6
    assert logprobs.text_offset[0] == 0
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == max(top.values()) == logprob


def test_chat_logprobs_spell_tokens_as_bytes(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="toy", messages=ASK, temperature=0, max_tokens=6, logprobs=True, top_logprobs=2
    )
    content = reply.choices[0].logprobs.content
    assert (
        b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == reply.choices[0].message.content
    )
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob == entry.logprob for entry in content)


COMPLETION, CHAT = {"model": "toy", "prompt": "To be"}, {"model": "toy", "messages": ASK}
BAD: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no model": ({"prompt": "a"}, "model", "model is required"),
    "no prompt": ({"model": "toy"}, "prompt", "prompt is required"),
    "empty prompt": ({**COMPLETION, "prompt": ""}, "prompt", "empty"),
    "empty id list": ({**COMPLETION, "prompt": []}, "prompt", "not empty"),
    "empty list in list": ({**COMPLETION, "prompt": [[1], []]}, "prompt", "empty"),
    "mixed prompt": ({**COMPLETION, "prompt": ["a", 1]}, "prompt", "list of texts"),
    "id out of range": ({**COMPLETION, "prompt": [320]}, "prompt", "0..319"),
    "half a surrogate": ({**COMPLETION, "prompt": "a\ud800"}, "prompt", "Unicode"),
    "max_tokens text": ({**COMPLETION, "max_tokens": "5"}, "max_tokens", "valid integer"),
    "max_tokens zero": ({**COMPLETION, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    "n zero": ({**COMPLETION, "n": 0}, "n", "n: "),
    "n large": ({**COMPLETION, "n": 17}, "n", "16"),
    "n true": ({**COMPLETION, "n": True}, "n", "integer"),
    "too many choices": ({**COMPLETION, "prompt": ["a"] * 3, "n": 16}, "prompt", "32 choices"),
    "best_of": ({**COMPLETION, "best_of": 2}, "best_of", "equals n"),
    "suffix": ({**COMPLETION, "suffix": "x"}, "suffix", "filled in"),
    "echo with logprobs": ({**COMPLETION, "echo": True, "logprobs": 1}, "echo", "logprobs"),
    "logprobs 21": ({**COMPLETION, "logprobs": 21}, "logprobs", "20"),
    "temperature negative": ({**COMPLETION, "temperature": -1}, "temperature", "temperature"),
    "temperature text": ({**COMPLETION, "temperature": "hot"}, "temperature", "number"),
    "top_p zero": ({**COMPLETION, "top_p": 0}, "top_p", "> 0"),
    "top_k negative": ({**COMPLETION, "top_k": -2}, "top_k", ">= 0"),
    "presence_penalty 3": ({**COMPLETION, "presence_penalty": 3}, "presence_penalty", "<= 2"),
    "logit_bias word": ({**COMPLETION, "logit_bias": {"word": 1}}, "logit_bias", "token ids"),
    "logit_bias outside": ({**COMPLETION, "logit_bias": {"320": 1}}, "logit_bias", "0..319"),
    "logit_bias 101": ({**COMPLETION, "logit_bias": {"3": 101}}, "logit_bias", "100"),
    "stop empty": ({**COMPLETION, "stop": [""]}, "stop", "none of them empty"),
    "stop 17": ({**COMPLETION, "stop": ["x"] * 17}, "stop", "at most 16"),
    "seed fraction": ({**COMPLETION, "seed": 1.5}, "seed", "integer"),
    "unknown": ({**COMPLETION, "temprature": 1}, "temprature", "known are"),
    "unknown in options": ({**COMPLETION, "stream_options": {"x": 1}}, "stream_options", "stream_options.x"),
    "no messages": ({"model": "toy", "messages": []}, "messages", "at least 1"),
    "message without role": ({"model": "toy", "messages": [{"content": "a"}]}, "messages", "messages[0].role"),
    "unknown role": ({"model": "toy", "messages": [{"role": "x", "content": ""}]}, "messages", "messages[0].role"),
    "picture": (
        {"model": "toy", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages",
        "messages[0].content",
    ),
    "tools": ({**CHAT, "tools": []}, "tools", "not supported"),
    "response_format": ({**CHAT, "response_format": {"type": "json_object"}}, "response_format", "supported"),
    "top_logprobs alone": ({**CHAT, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    "both limits": ({**CHAT, "max_tokens": 2, "max_completion_tokens": 2}, "max_tokens", "not both"),
}


@pytest.mark.parametrize(("body", "param", "words"), BAD.values(), ids=BAD.keys())
def test_bad_values_are_named(live_server: Any, body: dict[str, Any], param: str, words: str) -> None:
    path = "chat/completions" if "messages" in body else "completions"
    reply = httpx.post(
        f"{live_server.openai_url}/{path}",
        content=json.dumps(body),
        headers={"content-type": "application/json; charset=utf-8"},
    )
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


BUSY_BODY = {**COMPLETION, "prompt": [BUSY]}
BAD_HTTP: dict[str, tuple[str, str, dict[str, Any], int, str]] = {
    "broken JSON": ("POST", "completions", {"content": b'{"model": '}, 400, "invalid_json"),
    "NaN": ("POST", "completions", {"content": b'{"model": "toy", "prompt": "a", "top_p": NaN}'}, 400, "invalid_json"),
    "not UTF-8": ("POST", "completions", {"content": b'{"model": "\xff"}'}, 400, "invalid_json"),
    "deep": ("POST", "completions", {"content": b"[" * 90_000}, 400, "nested_too_deeply"),
    "a list": ("POST", "completions", {"json": []}, 400, "invalid_json"),
    "unknown model": ("POST", "completions", {"json": {**COMPLETION, "model": "x"}}, 404, "model_not_found"),
    "form": ("POST", "completions", {"data": {"model": "toy"}}, 415, "unsupported_media_type"),
    "announced too large": ("POST", "completions", {"content": b" " * 100_001}, 413, "body_too_large"),
    "GET": ("GET", "completions", {}, 405, "method_not_allowed"),
    "unknown path": ("POST", "embeddings", {"json": {}}, 404, "not_found"),
    "busy": ("POST", "completions", {"json": BUSY_BODY}, 429, "kv_exhausted"),
    "busy stream": ("POST", "completions", {"json": {**BUSY_BODY, "stream": True}}, 429, "kv_exhausted"),
    "breaks": ("POST", "completions", {"json": {**COMPLETION, "prompt": [BREAKS]}}, 502, "stage_lost"),
    "crashes": ("POST", "completions", {"json": {**COMPLETION, "prompt": [CRASHES]}}, 500, "internal_error"),
    "n with a break": ("POST", "completions", {"json": {**COMPLETION, "prompt": [BREAKS], "n": 3}}, 502, "stage_lost"),
}  # fmt: skip


@pytest.mark.parametrize(("method", "path", "sent", "status", "code"), BAD_HTTP.values(), ids=BAD_HTTP.keys())
def test_errors_have_the_openai_shape(
    live_server: Any, method: str, path: str, sent: dict[str, Any], status: int, code: str
) -> None:
    headers = {} if "json" in sent or "data" in sent else {"content-type": "application/json"}
    reply = httpx.request(method, f"{live_server.openai_url}/{path}", headers=headers, **sent)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert "secret detail" not in reply.text
    assert "Traceback" not in reply.text
    if status == 429:
        assert reply.headers["retry-after"] == "7"


def test_a_body_of_unknown_length_is_bounded_while_it_is_read(live_server: Any) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(20_000):
            sent += 10_000
            yield b" " * 10_000

    try:
        reply = httpx.post(
            f"{live_server.openai_url}/completions", content=endless(), headers={"content-type": "application/json"}
        )
        assert reply.status_code == 413
    except httpx.TransportError:
        pass  # the server hung up while we were still sending
    assert sent < 100_000_000


def test_too_long_prompts_name_limit_and_length(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"130 tokens.*128") as caught:
        client.completions.create(model="toy", prompt=[60] * 130)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=r"128 tokens.*100.*29") as caught:
        client.completions.create(model="toy", prompt=[60] * 100, max_tokens=29)
    assert caught.value.code == "context_length_exceeded"


def test_an_error_midway_is_an_event_and_the_stream_ends_without_done(live_server: Any) -> None:
    body = {"model": "toy", "prompt": [BREAKS, 60], "stream": True, "return_token_ids": True}
    reply = httpx.post(f"{live_server.openai_url}/completions", json=body)
    events = [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n\n") if line]
    assert reply.status_code == 200
    assert [len(event["choices"]) for event in events[:-1]] == [1, 1]
    assert events[-1]["error"]["code"] == "stage_lost"
    assert "[DONE]" not in reply.text


def test_a_whole_stream_ends_with_done(live_server: Any) -> None:
    reply = httpx.post(f"{live_server.openai_url}/completions", json={**COMPLETION, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.endswith("\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_sequences(live_server: Any, stream: bool, n: int) -> None:
    closed = live_server.metric("test_sequences_closed_early_total")
    body = {"model": "toy", "prompt": [SLOW, 60], "max_tokens": 120, "stream": stream, "n": n, "ignore_eos": True}
    content = json.dumps(body).encode()
    host, port = live_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /openai/v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            + f"content-length: {len(content)}\r\n\r\n".encode()
            + content
        )
        wait_for(lambda: live_server.metric("test_sequences_open") == n)
    wait_for(lambda: live_server.metric("test_sequences_open") == 0)
    assert live_server.metric("test_sequences_closed_early_total") == closed + n


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.02)


def test_before_the_stages_are_up_everything_says_503(live_server: Any) -> None:
    assert set(live_server.before_ready.values()) == {503}, live_server.before_ready


def test_metrics_and_one_log_line_a_request(live_server: Any) -> None:
    before = live_server.metric("stagecraft_requests_total")
    headers = {"x-request-id": "my-request"}
    httpx.post(f"{live_server.openai_url}/completions", json={**COMPLETION, "ignore_eos": True}, headers=headers)
    assert live_server.metric("stagecraft_requests_total") == before + 1
    assert live_server.metric("stagecraft_requests_in_flight") == 0
    assert live_server.metric("stagecraft_time_to_first_token_seconds_count") > 0
    lines = [line for line in live_server.log.read_text().splitlines() if "my-request" in line]
    assert len(lines) == 1
    entry = json.loads(lines[0])
    assert (entry["model"], entry["endpoint"], entry["outcome"]) == ("toy", "completions", "ok")
    assert (entry["completion_tokens"], entry["finish"]) == (16, "length")
    assert entry["total_ms"] >= entry["ttft_ms"] > 0


# --- replies against OpenAI's own description


def allow_null(schema: Any) -> Any:
    """The document says `nullable: true` in the manner of OpenAPI 3.0, which JSON Schema does not know."""
    if isinstance(schema, list):
        return [allow_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: allow_null(value) for key, value in schema.items() if key != "nullable"}
    return {"anyOf": [inner, {"type": "null"}]} if schema.get("nullable") is True else inner


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    path = SPECS / "openai" / "openapi-excerpt.yaml"
    if not path.exists():
        pytest.skip(f"OpenAI's description is not at {path}; set STAGECRAFT_SPECS to the folder with openai/")
    loaded: dict[str, Any] = allow_null(yaml.safe_load(path.read_text()))
    return loaded


def check(document: dict[str, Any], name: str, reply: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    errors = [f"{list(e.absolute_path)}: {e.message}" for e in Draft202012Validator(schema).iter_errors(reply)]
    assert errors == []


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("completions", {**COMPLETION, "n": 2, "logprobs": 2}, "CreateCompletionResponse"),
        ("completions", COMPLETION, "CreateCompletionResponse"),
        ("chat/completions", {**CHAT, "max_tokens": 5}, "CreateChatCompletionResponse"),
        (
            "chat/completions",
            {**CHAT, "max_tokens": 5, "logprobs": True, "top_logprobs": 2},
            "CreateChatCompletionResponse",
        ),
        ("completions", {**COMPLETION, "n": 0}, "ErrorResponse"),
    ],
)
def test_replies_fit_openais_schemas(
    live_server: Any, document: dict[str, Any], path: str, body: dict[str, Any], name: str
) -> None:
    check(document, name, httpx.post(f"{live_server.openai_url}/{path}", json=body).json())


def test_chunks_and_models_fit_openais_schemas(live_server: Any, document: dict[str, Any]) -> None:
    body = {**CHAT, "max_tokens": 5, "stream": True, "logprobs": True, "stream_options": {"include_usage": True}}
    text = httpx.post(f"{live_server.openai_url}/chat/completions", json=body).text
    events = [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part and "[DONE]" not in part]
    assert len(events) > 3
    for event in events:
        check(document, "CreateChatCompletionStreamResponse", event)
    check(document, "ListModelsResponse", httpx.get(f"{live_server.openai_url}/models").json())
    check(document, "Model", httpx.get(f"{live_server.openai_url}/models/toy").json())


# --- the process


def run_server(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("ORCHESTRATOR_")}, **environment}
    return warm.run([sys.executable, "-m", "orchestrator.server", *arguments], cwd=ROOT, env=env)


def run_whole_model(*arguments: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tests.orchestrator.whole_model", *map(str, arguments)]
    return warm.run(argv, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_misspelt_and_missing_settings_are_told_at_start() -> None:
    misspelt = run_server(ORCHESTRATOR_MODLE="x")
    assert misspelt.returncode == 2
    assert "unknown setting ORCHESTRATOR_MODLE; did you mean ORCHESTRATOR_MODEL?" in misspelt.stderr
    missing = run_server("--model", "x", "--http-port", "99999")
    assert missing.returncode == 2
    assert "ORCHESTRATOR_STAGE_URLS: Field required" in missing.stderr
    assert "ORCHESTRATOR_HTTP_PORT: Input should be less than or equal to 65535" in missing.stderr
    assert "Traceback" not in misspelt.stderr + missing.stderr


def test_a_taken_port_is_named(live_server: Any, toy_folder: Path) -> None:
    port = live_server.url.rsplit(":", 1)[1]
    result = run_whole_model(toy_folder, port, 0, "gate")
    assert result.returncode == 3
    assert f"port {port} is taken" in result.stderr
    assert "Traceback" not in result.stderr


def test_stages_that_do_not_start_end_the_process_with_a_reason(sentencepiece_folder: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    # a folder with a tokenizer and no weights
    result = run_whole_model(sentencepiece_folder, free_port(), 0, gate)
    assert result.returncode == 1
    assert "the stages could not be started" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_sigterm_lets_running_requests_end(toy_folder: Path, tmp_path: Path) -> None:
    port = free_port()
    gate = tmp_path / "gate"
    gate.touch()
    process = warm.Popen(
        [sys.executable, "-m", "tests.orchestrator.whole_model", str(toy_folder), str(port), "0", str(gate)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(f"{url}/v2/models/toy/ready"))
        body = {"model": "toy", "prompt": [SLOW, 60], "max_tokens": 20, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/openai/v1/completions", json=body, timeout=30) as reply:
            parts = reply.iter_text()
            next(parts)
            process.send_signal(signal.SIGTERM)
            assert "".join(parts).endswith("data: [DONE]\n\n")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
