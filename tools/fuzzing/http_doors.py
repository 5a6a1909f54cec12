"""The public endpoints of the orchestrator, over a chain of two real stages, and the results service of batches.

Applications are asked without a socket; the chain asks its stages, which are served in the same event loop, by HTTP.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Sequence
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from random import Random
from typing import Any

from functions.service import StageService
from functions.settings import StageSettings
from orchestrator.batches.events import CANCEL, REQUEST, RESULT
from orchestrator.batches.group_commit import GroupCommit
from orchestrator.batches.results_api import results_app
from orchestrator.batches.results_store import ResultsStore
from orchestrator.chain import Chain
from orchestrator.choices import Service
from orchestrator.events_api import EventsDoor
from orchestrator.server import bare_argv, prepare_app, quieten_kserve
from orchestrator.tokenizer import load_tokenizer
from tools.fuzzing.asgi import App, Reply, ask
from tools.fuzzing.door import Verdict, Violation, judged
from tools.fuzzing.http_text import Request, mutated_request
from tools.fuzzing.mutations import TEXTS, mutated, mutated_json
from tools.fuzzing.served import serve
from tools.fuzzing.stage_doors import PLAN, SPANS, app_of
from tools.fuzzing.tiny_model import NAME

BODY_BYTES_MAX = 256 << 10
_NOT_IMPLEMENTED = frozenset({501})  # what KServe answers where the model has no such method
_HEADERS = ("x-request-id", "content-type", "accept", "inference-header-content-length", "ce-id", "ce-type",
            "ce-source", "ce-specversion", "ce-batch", "ce-time", "ce-customid")  # fmt: skip
_OPENAI = "/openai/v1"
_LONG = {
    "model": NAME, "prompt": ["To be", "or not"], "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 5,
    "n": 2, "stop": ["x", "yz"], "seed": 7, "logprobs": 2, "logit_bias": {"5": 1.5}, "presence_penalty": 0.1,
    "frequency_penalty": -0.1, "repetition_penalty": 1.1, "min_p": 0.01, "stream": False, "user": "u",
    "stream_options": None, "ignore_eos": True, "return_token_ids": True, "metadata": {"a": "b"},
}  # fmt: skip
_BODIES: tuple[tuple[str, Any], ...] = (
    (f"{_OPENAI}/completions", _LONG),
    (f"{_OPENAI}/completions", {"model": NAME, "prompt": [1, 2, 3], "max_tokens": 2, "echo": True}),
    (f"{_OPENAI}/completions", {"model": NAME, "prompt": "a", "max_tokens": 3, "stream": True,
                                "stream_options": {"include_usage": True}}),
    (f"{_OPENAI}/chat/completions", {"model": NAME, "messages": [{"role": "system", "content": "Be short."},
                                     {"role": "user", "content": [{"type": "text", "text": "Who?"}]}],
                                     "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2}),
    (f"{_OPENAI}/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2,
                                     "stream": True, "response_format": {"type": "text"}}),
    (f"/v1/models/{NAME}:predict", {"instances": ["To be", {"prompt": "a", "max_tokens": 2}],
                                    "parameters": {"max_tokens": 3, "logprobs": 1}}),
    (f"/v2/models/{NAME}/infer", {"id": "1", "inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES",
                                  "data": ["To be"]}], "parameters": {"max_tokens": 3},
                                  "outputs": [{"name": "text_output"}, {"name": "output_ids"}]}),
    (f"/v2/models/{NAME}/infer", {"inputs": [{"name": "input_ids", "shape": [1, 3], "datatype": "INT64",
                                  "data": [1, 2, 3], "parameters": {"x": 1}}], "parameters": {"max_tokens": 2}}),
    (f"/v2/models/{NAME}/generate", {"text_input": "To be", "parameters": {"max_tokens": 3, "details": True, 
                                     "stop": ["q"], "temperature": 0.5}}),
    (f"/v2/models/{NAME}/generate_stream", {"text_input": "To be", "parameters": {"max_tokens": 3}}),
    (f"/v2/repository/models/{NAME}/unload", {}),
    (f"/v2/repository/models/{NAME}/load", {}),
    (f"/v1/models/{NAME}:explain", {"instances": ["a"]}),
)  # fmt: skip
_PAGES = ("/", "/metrics", "/v1/models", f"/v1/models/{NAME}", "/v2", "/v2/health/live", "/v2/health/ready",
          f"/v2/models/{NAME}", f"/v2/models/{NAME}/ready", f"/v2/models/{NAME}/versions/1", "/v2/repository/index",
          f"{_OPENAI}/models", f"{_OPENAI}/models/{NAME}")  # fmt: skip
_LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions",
         "body": {"model": NAME, "prompt": "To be", "max_tokens": 2}}  # fmt: skip


class PublicDoor:
    """OpenAI, V1, V2, generate and the events of batches. Once in a process: KServe has one application."""

    name = "public"

    def __init__(self, checkpoint: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._failures: list[str] = []
        self._loop.set_exception_handler(lambda loop, context: self._failures.append(str(context)))
        self._good = _public_requests()
        self.app: App
        self._loop.run_until_complete(self._open(checkpoint))
        self._control = Request.json(
            f"{_OPENAI}/completions",
            json.dumps({"model": NAME, "prompt": "To be", "max_tokens": 12, "temperature": 0}).encode(),
        )
        self._right = self._loop.run_until_complete(self._text())

    def make(self, random: Random) -> bytes:
        request = random.choice(self._good)
        kind = random.randrange(10)
        if request.method == "GET" or kind == 0:
            return mutated_request(random, request, _HEADERS).to_bytes()
        if kind == 1:
            changed = replace(
                request, body=mutated(random, request.body, [word.encode(errors="replace") for word in TEXTS[:40]])
            )
        else:
            changed = replace(request, body=_changed_body(random, request))
        return (mutated_request(random, changed, _HEADERS) if kind == 2 else changed).to_bytes()

    def take(self, data: bytes) -> Verdict:
        reply = self._loop.run_until_complete(ask(self.app, Request.from_bytes(data)))
        self._expect_no_failure()
        return "refused" if reply is None else judged(reply.status, reply.headers, reply.body, allowed=_NOT_IMPLEMENTED)

    def check(self) -> None:
        self._loop.run_until_complete(self._check())
        self._expect_no_failure()

    def close(self) -> None:
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _check(self) -> None:
        text = await self._text()
        if text != self._right:
            raise Violation("harm", f"the control's text is {text!r}, not {self._right!r}")
        for _ in range(200):  # sequences are freed behind the back of their requests
            if not any(len(service._stage.kv) for service in self._services if service._stage):
                return
            await asyncio.sleep(0.02)
        raise Violation("harm", "stages hold sequences that no request has any more")

    async def _text(self) -> str:
        reply = await ask(self.app, self._control)
        if reply is None or reply.status != 200:
            raise Violation("harm", f"the control was answered {reply}")
        return str(json.loads(reply.body)["choices"][0]["text"])

    def _expect_no_failure(self) -> None:
        if self._failures:
            raise Violation("crash", f"left to the event loop: {self._failures.pop()}")

    async def _open(self, checkpoint: Path) -> None:
        self._services = [_stage(checkpoint, index) for index in range(len(SPANS))]
        self._servers, urls = [], []
        for service in self._services:
            listener = socket.create_server(("127.0.0.1", 0))
            urls.append(f"http://127.0.0.1:{listener.getsockname()[1]}")
            self._servers.append(await serve(app_of(service), listener))
        self._chain = Chain(PLAN, urls)
        await self._chain.start()
        service = Service(
            self._chain,
            load_tokenizer(str(checkpoint)),
            name=NAME,
            requests_max=64,
            batch_requests_max=16,
            choices_max=8,
        )
        self._events = EventsDoor(service)
        await self._events.start()
        self.app = _orchestrator_app(service, self._events)

    async def _close(self) -> None:
        await self._events.close()
        await self._chain.close()
        for server in self._servers:
            await server.stop()
        for service in self._services:
            service.stop()
        await self._loop.shutdown_default_executor()


def _stage(checkpoint: Path, index: int) -> StageService:
    return StageService(
        StageSettings(
            model=str(checkpoint), model_name=NAME, blocks=SPANS[index], index=index, count=len(SPANS), plan=PLAN,
            kv_bytes_max=1 << 20, threads=1,
        )
    )  # fmt: skip


def _orchestrator_app(service: Service, events: EventsDoor) -> App:
    """The application as `orchestrator.server.serve` puts it together."""
    with bare_argv():
        import kserve
        from kserve.model_server import app
        from kserve.protocol.rest.server import RESTServer

        from orchestrator.kserve_model import StagedModel
        from orchestrator.kserve_parts import FixedModels, StagedDataPlane

    prepare_app(app, service, events, body_bytes_max=BODY_BYTES_MAX, json_depth_max=64, timeout_s=0.0)
    models = kserve.ModelRepository()
    models.update(StagedModel(service))
    RESTServer(
        "kserve.model_server:app", StagedDataPlane(models, service), FixedModels(models), http_port=0
    ).create_application()
    quieten_kserve()
    return app  # type: ignore[no-any-return]  # kserve has no types


def _public_requests() -> list[Request]:
    found = [Request.json(target, json.dumps(body).encode()) for target, body in _BODIES]
    found += [Request("GET", target, ()) for target in _PAGES]
    found += [_binary_tensor(), *_batch_events(), *_predictions_as_events()]
    return found


def _predictions_as_events() -> list[Request]:
    """V1 and V2 requests as CloudEvents, which KServe answers with CloudEvents."""
    attributes = {"specversion": "1.0", "type": "t", "source": "/b", "id": "1", "time": "2026-11-28T00:00:00Z"}
    binary = tuple((f"ce-{name}", value) for name, value in attributes.items())
    found = []
    for target, body in _BODIES:
        if target.endswith((":predict", "/infer")):
            data = json.dumps(body).encode()
            found.append(Request("POST", target, (("content-type", "application/json"), *binary), data))
            whole = json.dumps({**attributes, "datacontenttype": "application/json", "data": body}).encode()
            found.append(Request("POST", target, (("content-type", "application/cloudevents+json"),), whole))
    return found


def _binary_tensor() -> Request:
    """A V2 request whose data stand behind the JSON (the binary tensor data extension)."""
    data = struct.pack("<I", 5) + b"To be"
    size = {"binary_data_size": len(data)}
    tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "parameters": size}
    head = json.dumps({"inputs": [tensor], "parameters": {"max_tokens": 2}}).encode()
    headers = (("content-type", "application/octet-stream"), ("inference-header-content-length", str(len(head))))
    return Request("POST", f"/v2/models/{NAME}/infer", headers, head + data)


def _batch_events() -> list[Request]:
    """A request and a cancellation, in binary and structured mode."""
    found = []
    for kind, data in ((REQUEST, _LINE), (CANCEL, {"batch": "other"})):
        attributes = {"specversion": "1.0", "type": kind, "source": "/b", "id": "1", "batch": "b"}
        headers = (("content-type", "application/json"), *((f"ce-{name}", value) for name, value in attributes.items()))
        found.append(Request("POST", "/events", headers, json.dumps(data).encode()))
        whole = json.dumps({**attributes, "datacontenttype": "application/json", "data": data}).encode()
        found.append(Request("POST", "/events", (("content-type", "application/cloudevents+json"),), whole))
    return found


def _changed_body(random: Random, request: Request) -> bytes:
    """Half of what is not refused at once should end soon, so most long answers are cut short again."""
    try:
        value = json.loads(request.body)
    except ValueError:
        return mutated(random, request.body)
    return mutated_json(random, value)


# -- the results service


class ResultsDoor:
    """Events with results and dead letters in, pages out, over one SQLite file."""

    name = "results"

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._file = ResultsStore(folder / "results.sqlite")
        self._loop.run_until_complete(self._open())
        self._good = _result_requests()

    async def _open(self) -> None:
        self._store = GroupCommit(self._file)
        self.app: App = results_app(self._store)

    def make(self, random: Random) -> bytes:
        request = random.choice(self._good)
        if not request.body or random.random() < 0.3:
            return mutated_request(random, request, _HEADERS).to_bytes()
        return replace(request, body=mutated_json(random, json.loads(request.body))).to_bytes()

    def take(self, data: bytes) -> Verdict:
        reply = self._loop.run_until_complete(ask(self.app, Request.from_bytes(data)))
        return "refused" if reply is None else judged(reply.status, reply.headers, reply.body)

    def check(self) -> None:
        """A result that is sent in is there, once; afterwards all batches are deleted."""
        self._loop.run_until_complete(self._check())

    def close(self) -> None:
        self._loop.run_until_complete(self._store.close())
        self._loop.close()

    async def _check(self) -> None:
        result = next(request for request in self._good if request.target == "/")
        headers = tuple((name, "control" if name == "ce-batch" else value) for name, value in result.headers)
        for _ in range(2):
            await self._well(replace(result, headers=headers))
        page = (await self._well(Request("GET", "/batches/control/results", ()))).body
        if page.splitlines() != [result.body]:
            raise Violation("harm", f"the control's results are {page[:300]!r}")
        for batch in json.loads((await self._well(Request("GET", "/batches", ()))).body)["batches"]:
            # by the store itself: not every name of a batch can stand in a path
            while await self._store.call(methodcaller("delete_some", batch["batch"])):
                pass

    async def _well(self, request: Request) -> Reply:
        reply = await ask(self.app, request)
        if reply is None or reply.status >= 300:
            raise Violation("harm", f"a good request was answered {reply}")
        return reply


def _result_requests() -> list[Request]:
    line = {
        "id": "x",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "r", "body": {"n": 1}},
        "error": None,
    }
    found = []
    for target, kind, data in (("/", RESULT, line), ("/", CANCEL, {"batch": "b"}), ("/dead-letters", REQUEST, _LINE)):
        more = {"knativeerrorcode": "500", "knativeerrordest": "http://a", "knativeerrordata": "bm8="}
        attributes = {"specversion": "1.0", "type": kind, "source": "/b", "id": "1", "batch": "b", "customid": "a"}
        attributes |= more if target != "/" else {}
        headers = (("content-type", "application/json"), *((f"ce-{name}", value) for name, value in attributes.items()))
        found.append(Request("POST", target, headers, json.dumps(data, separators=(",", ":")).encode()))
    whole = {**attributes, "datacontenttype": "application/json", "data": line, "type": RESULT}
    batch: Sequence[Any] = [whole, {**whole, "id": "2"}]
    found.append(Request("POST", "/", (("content-type", "application/cloudevents+json"),), json.dumps(whole).encode()))
    found.append(
        Request("POST", "/", (("content-type", "application/cloudevents-batch+json"),), json.dumps(batch).encode())
    )
    for target in ("/batches", "/batches/b", "/batches/b/results?after=0&limit=10&wait_s=0", "/batches/b/dead-letters",
                   "/healthz", "/metrics"):  # fmt: skip
        found.append(Request("GET", target, ()))
    found.append(Request("DELETE", "/batches/b", ()))
    return found
