"""KServe's protocols on a running server, with KServe's own clients: V1, V2 over REST and gRPC, generate."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from kserve.protocol.infer_type import RequestedOutput
from tokenizers import Tokenizer

BUSY, SLOW, CRASHES = 5, 7, 8  # as in whole_model.py
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected(live_server: Any, toy_folder: Path) -> tuple[str, list[int]]:
    """Text and ids of the greedy answer to "To be", from the OpenAI endpoint (itself held against Transformers)."""
    body = {"model": "toy", "prompt": "To be", "return_token_ids": True, **GREEDY}
    choice = httpx.post(f"{live_server.openai_url}/completions", json=body).json()["choices"][0]
    return choice["text"], choice["token_ids"]


def rest(live_server: Any, protocol: str, request: Any) -> Any:
    async def call() -> Any:
        client = InferenceRESTClient(RESTConfig(protocol=protocol))
        try:
            return await client.infer(live_server.url, request, model_name="toy")
        finally:
            await client.close()

    return asyncio.run(call())


def over_grpc(live_server: Any, request: InferRequest) -> Any:
    async def call() -> Any:
        client = InferenceGRPCClient(live_server.grpc_url)
        try:
            return await client.infer(request)
        finally:
            await client.close()

    return asyncio.run(call())


def text_request(*texts: str, outputs: list[str] | None = None, **parameters: Any) -> InferRequest:
    tensor = InferInput("text_input", [len(texts)], "BYTES", data=list(texts))
    wanted = [RequestedOutput(name) for name in outputs] if outputs else None
    return InferRequest("toy", [tensor], request_id="r-1", parameters=parameters, request_outputs=wanted)


def by_name(reply: Any) -> dict[str, Any]:
    return {output.name: output for output in reply.outputs}


def texts_of(output: Any) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else value for value in output.data]


def test_v1_predict_takes_texts_and_objects(
    live_server: Any, expected: tuple[str, list[int]], toy_folder: Path
) -> None:
    ids = Tokenizer.from_file(str(toy_folder / "tokenizer.json")).encode("To be").ids
    instances = ["To be", {"prompt": "To be", "max_tokens": 2}, {"prompt": ids, "logprobs": 0}]
    reply = rest(live_server, "v1", {"instances": instances, "parameters": GREEDY})
    first, short, from_ids = reply["predictions"]
    assert (first["text"], first["tokens"]) == expected
    assert (first["finish_reason"], first["prompt_tokens"]) == ("length", len(ids))
    assert short["tokens"] == expected[1][:2]
    assert from_ids["tokens"] == expected[1]
    assert len(from_ids["logprobs"]) == 6


def test_v1_predict_takes_a_charset(live_server: Any) -> None:
    reply = httpx.post(
        f"{live_server.url}/v1/models/toy:predict",
        content=json.dumps({"instances": ["To be"]}),
        headers={"content-type": "application/json; charset=utf-8"},
    )
    assert reply.status_code == 200


@pytest.mark.parametrize("way", ["rest", "grpc"])
def test_v2_infer_gives_texts_ids_and_reasons(live_server: Any, expected: tuple[str, list[int]], way: str) -> None:
    parameters = {**GREEDY, "stop": expected[0][3:5]}
    reply = (
        rest(live_server, "v2", text_request("To be", "To be, or not", **parameters))
        if way == "rest"
        else over_grpc(live_server, text_request("To be", "To be, or not", **parameters))
    )
    outputs = by_name(reply)
    assert reply.id == "r-1"
    assert texts_of(outputs["text_output"])[0] == expected[0][: expected[0].index(expected[0][3:5])]
    assert texts_of(outputs["finish_reason"])[0] == "stop"
    assert outputs["output_ids"].as_numpy().shape[0] == 2
    ids = outputs["output_ids"].as_numpy()[0]
    assert [token for token in ids.tolist() if token != -1] == expected[1][: int((ids != -1).sum())]


@pytest.mark.parametrize("way", ["rest", "grpc"])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("binary", [True, False])
def test_v2_infer_takes_ids(
    live_server: Any, expected: tuple[str, list[int]], toy_folder: Path, way: str, dtype: Any, binary: bool
) -> None:
    ids = np.array([Tokenizer.from_file(str(toy_folder / "tokenizer.json")).encode("To be").ids], dtype=dtype)
    tensor = InferInput("input_ids", list(ids.shape), "INT64" if dtype is np.int64 else "INT32")
    tensor.set_data_from_numpy(ids, binary_data=binary)
    request = InferRequest("toy", [tensor], parameters=dict(GREEDY), request_outputs=[RequestedOutput("output_ids")])
    reply = rest(live_server, "v2", request) if way == "rest" else over_grpc(live_server, request)
    assert [output.name for output in reply.outputs] == ["output_ids"]
    assert reply.outputs[0].as_numpy().tolist() == [expected[1]]


def test_fractions_travel_as_texts_over_grpc(live_server: Any) -> None:
    replies = [
        over_grpc(live_server, text_request("To be", temperature="0.7", seed=5, max_tokens=8)),
        rest(live_server, "v2", text_request("To be", temperature=0.7, seed=5, max_tokens=8)),
    ]
    assert texts_of(by_name(replies[0])["text_output"]) == texts_of(by_name(replies[1])["text_output"])


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (text_request("To be", nonsense=1), grpc.StatusCode.INVALID_ARGUMENT, "unknown parameter"),
        (text_request("To be", max_tokens=-1), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (text_request("To be", outputs=["x"]), grpc.StatusCode.INVALID_ARGUMENT, "unknown outputs"),
        (
            InferRequest("toy", [InferInput("input_ids", [1, 1], "INT64", data=[BUSY])]),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "no KV left",
        ),
        (InferRequest("other", [InferInput("text_input", [1], "BYTES", data=["a"])]), grpc.StatusCode.NOT_FOUND, ""),
    ],
)
def test_grpc_errors_have_their_status(live_server: Any, request_: InferRequest, code: Any, words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        over_grpc(live_server, request_)
    assert caught.value.code() is code
    assert words in caught.value.details()


def call_of_bytes(live_server: Any, method: str, message: bytes) -> Any:
    with grpc.insecure_channel(live_server.grpc_url) as channel:
        return channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(message)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("ServerLive", b"\xff"),
        ("ModelReady", b"\x0a\x09toy"),  # longer than there is
        ("ModelMetadata", b"\x0a\x03\xed\xa0\x80"),  # half a character
        ("RepositoryModelLoad", b"\x0a\x01\xff"),
        ("ModelInfer", b"\x0a\x03toy" + b"\x2a\x02\x2a" * 200),
    ],
)
def test_a_message_that_cannot_be_read_is_a_mistake_of_the_client(
    live_server: Any, method: str, message: bytes
) -> None:
    before = len(live_server.log.read_text())
    with pytest.raises(grpc.RpcError) as caught:
        call_of_bytes(live_server, method, message)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"inference.{method}Request" in caught.value.details()
    assert "Traceback" not in live_server.log.read_text()[before:]


def test_the_model_is_loaded_and_cannot_be_unloaded_over_grpc(live_server: Any) -> None:
    with grpc.insecure_channel(live_server.grpc_url) as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="toy")).isLoaded
        with pytest.raises(grpc.RpcError) as unknown:
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="other"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as kept:
            stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="toy"))
        assert kept.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "cannot be unloaded" in kept.value.details()
        assert stub.ModelReady(pb.ModelReadyRequest(name="toy")).ready


@pytest.mark.parametrize("sign", ["a", "é", "🙂"])
def test_what_is_long_is_told_cut_over_grpc(live_server: Any, sign: str) -> None:
    """A client takes details of 8 KiB, in which most characters take three times their bytes."""
    requests = [
        InferRequest(sign * 5000, [InferInput("text_input", [1], "BYTES", data=["a"])]),
        text_request("To be", **{sign * 5000: 1}),
    ]
    codes = []
    for request in requests:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            over_grpc(live_server, request)
        codes.append(caught.value.code())
        assert caught.value.details().endswith(f"{sign}...")
    assert codes == [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT]


def test_metadata_tell_when_to_come_back(live_server: Any) -> None:
    request = InferRequest("toy", [InferInput("input_ids", [1, 1], "INT64", data=[BUSY])])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        over_grpc(live_server, request)
    assert ("retry-after", "7") in list(caught.value.trailing_metadata())


def test_a_fault_of_the_server_is_told_without_its_details_over_grpc(live_server: Any) -> None:
    before = len(live_server.log.read_text())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        over_grpc(live_server, InferRequest("toy", [InferInput("input_ids", [1, 1], "INT64", data=[CRASHES])]))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret detail" not in caught.value.details()
    assert "secret detail" in live_server.log.read_text()[before:]


def v2(name: str = "text_input", shape: Any = (1,), datatype: str = "BYTES", data: Any = ("a",), **more: Any) -> dict:
    return {"inputs": [{"name": name, "shape": list(shape), "datatype": datatype, "data": list(data)}], **more}


BAD: dict[str, tuple[str, Any, int, str]] = {
    "v1 unknown model": ("/v1/models/other:predict", {"instances": ["a"]}, 404, "other"),
    "v1 no instances": ("/v1/models/toy:predict", {}, 400, "instances"),
    "v1 empty instances": ("/v1/models/toy:predict", {"instances": []}, 400, "instances"),
    "v1 number": ("/v1/models/toy:predict", {"instances": [3]}, 400, "instance"),
    "v1 empty text": ("/v1/models/toy:predict", {"instances": [""]}, 400, "empty"),
    "v1 unknown parameter": ("/v1/models/toy:predict", {"instances": [{"prompt": "a", "x": 1}]}, 400, "known are"),
    "v1 n": ("/v1/models/toy:predict", {"instances": ["a"], "parameters": {"n": 2}}, 400, "'n'"),
    "v1 unknown member": ("/v1/models/toy:predict", {"instances": ["a"], "x": 1}, 400, "x"),
    "v1 too many": ("/v1/models/toy:predict", {"instances": ["a"] * 33}, 400, "32"),
    "v1 too long": ("/v1/models/toy:predict", {"instances": [{"prompt": [60] * 130}]}, 400, "128"),
    "v1 busy": ("/v1/models/toy:predict", {"instances": [{"prompt": [BUSY]}]}, 429, "no KV"),
    "v1 crash": ("/v1/models/toy:predict", {"instances": [{"prompt": [CRASHES]}]}, 500, "internal error"),
    "v1 not JSON": ("/v1/models/toy:predict", b"{", 400, ""),
    "v1 too large": ("/v1/models/toy:predict", b" " * 100_001, 413, "100000"),
    "v1 a list": ("/v1/models/toy:predict", [], 400, ""),
    "v2 unknown model": ("/v2/models/other/infer", v2(), 404, "other"),
    "v2 no inputs": ("/v2/models/toy/infer", {"inputs": []}, 400, "exactly one"),
    "v2 inputs missing": ("/v2/models/toy/infer", {}, 400, "inputs"),
    "v2 not JSON": ("/v2/models/toy/infer", b"{", 400, ""),
    "v2 other input": ("/v2/models/toy/infer", v2("x"), 400, "text_input"),
    "v2 text as FP32": ("/v2/models/toy/infer", v2(datatype="FP32", data=[1.0]), 400, "BYTES"),
    "v2 number as text": ("/v2/models/toy/infer", v2(data=[1]), 400, "text"),
    "v2 id": ("/v2/models/toy/infer", v2(id="a\ud800"), 400, "not valid Unicode at character 1"),
    "v2 shape": ("/v2/models/toy/infer", v2(shape=[2]), 400, "shape"),
    "v2 ids of rank 3": ("/v2/models/toy/infer", v2("input_ids", [1, 1, 1], "INT64", [60]), 400, "[1, n]"),
    "v2 fractional ids": ("/v2/models/toy/infer", v2("input_ids", [1, 1], "INT64", [6.5]), 400, "whole"),
    "v2 parameter": ("/v2/models/toy/infer", v2(parameters={"stream": True}), 400, "stream"),
    "v2 output": ("/v2/models/toy/infer", v2(outputs=[{"name": "x"}]), 400, "text_output"),
    "unknown path": ("/v2/models/toy/other", {}, 404, ""),
    "generate unknown model": ("/v2/models/other/generate", {"text_input": "a"}, 404, "other"),
    "generate no text": ("/v2/models/toy/generate", {}, 400, "text_input"),
    "generate parameter": ("/v2/models/toy/generate", {"text_input": "a", "parameters": {"x": 1}}, 400, "known are"),
    "stream": ("/v2/models/toy/generate_stream", {"text_input": "a", "parameters": {"top_p": 0}}, 400, "top_p"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "words"), BAD.values(), ids=BAD.keys())
def test_errors_have_kserves_shape(live_server: Any, path: str, body: Any, status: int, words: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = httpx.post(live_server.url + path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text
    assert list(reply.json()) == ["error"]
    assert words in reply.json()["error"]
    assert "Traceback" not in reply.text


def binary(length: int | None = None, **changed: Any) -> tuple[bytes, str]:
    """A V2 request with a text of two bytes behind its JSON, and the length of that; None leaves a member out."""
    tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}, **changed}
    head = json.dumps({"inputs": [{name: value for name, value in tensor.items() if value is not None}]}).encode()
    return head + b"\x02\x00\x00\x00To", str(len(head) if length is None else length)


BAD_BINARY = {
    "shape": binary(shape=[0]),
    "no shape": binary(shape=None),
    "no datatype": binary(datatype=None),
    "unknown datatype": binary(datatype="X"),
    "cut short": (binary()[0][:-1], binary()[1]),
    "size in words": binary(parameters={"binary_data_size": "x"}),
    "length in words": (binary()[0], "x"),
    "negative length": (binary()[0], "-1"),
    "no inputs": (b"{}", "2"),
    "a list": (b"[]", "2"),
}


@pytest.mark.parametrize(("body", "length"), BAD_BINARY.values(), ids=BAD_BINARY)
def test_binary_tensors_that_do_not_fit_are_a_mistake_of_the_client(live_server: Any, body: bytes, length: str) -> None:
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": length}
    reply = httpx.post(f"{live_server.url}/v2/models/toy/infer", content=body, headers=headers)
    assert (reply.status_code, list(reply.json())) == (400, ["error"]), reply.text
    assert "Traceback" not in reply.text


def test_a_binary_tensor_is_read(live_server: Any) -> None:
    body, length = binary()
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": length}
    reply = httpx.post(f"{live_server.url}/v2/models/toy/infer", content=body, headers=headers)
    assert reply.status_code == 200, reply.text
    assert reply.json()["outputs"][0]["name"] == "text_output"


def test_mistakes_of_clients_leave_no_trace_in_the_log(live_server: Any) -> None:
    before = len(live_server.log.read_text())
    httpx.post(f"{live_server.url}/v1/models/toy:predict", json={"instances": []})
    httpx.post(f"{live_server.url}/v1/models/other:predict", json={"instances": []})
    assert "Traceback" not in live_server.log.read_text()[before:]


def test_metadata_and_readiness(live_server: Any) -> None:
    metadata = httpx.get(f"{live_server.url}/v2/models/toy").json()
    assert {tensor["name"] for tensor in metadata["inputs"]} == {"text_input", "input_ids"}
    assert {tensor["name"] for tensor in metadata["outputs"]} == {"text_output", "output_ids", "finish_reason"}
    assert httpx.get(f"{live_server.url}/v2/models/toy/ready").json() == {"name": "toy", "ready": True}
    assert httpx.get(f"{live_server.url}/v1/models/toy").json() == {"name": "toy", "ready": True}
    assert httpx.get(f"{live_server.url}/v1/models/other").status_code == 404


def test_metadata_over_grpc(live_server: Any) -> None:
    with grpc.insecure_channel(live_server.grpc_url) as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert stub.ModelReady(pb.ModelReadyRequest(name="toy")).ready
        assert {t.name for t in stub.ModelMetadata(pb.ModelMetadataRequest(name="toy")).inputs} == {
            "text_input",
            "input_ids",
        }


def test_before_the_stages_are_up_probes_and_calls_say_503(live_server: Any) -> None:
    assert set(live_server.before_ready.values()) == {503}, live_server.before_ready
    assert live_server.grpc_before_ready.code() is grpc.StatusCode.UNAVAILABLE
    assert ("retry-after", "2") in list(live_server.grpc_before_ready.trailing_metadata())


def test_a_v1_client_that_leaves_frees_its_sequence(live_server: Any) -> None:
    closed = live_server.metric("test_sequences_closed_early_total")
    body = {"instances": [{"prompt": [SLOW, 60], "max_tokens": 120, "ignore_eos": True}]}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live_server.url}/v1/models/toy:predict", json=body, timeout=httpx.Timeout(5, read=0.5))
    for _ in range(200):
        if live_server.metric("test_sequences_closed_early_total") == closed + 1:
            return
        httpx.get(f"{live_server.url}/v2/health/live")
    raise AssertionError("the sequence was never closed")


def test_generate_extension(live_server: Any, expected: tuple[str, list[int]]) -> None:
    body = {"text_input": "To be", "parameters": {**GREEDY, "details": True}}
    reply = httpx.post(f"{live_server.url}/v2/models/toy/generate", json=body).json()
    assert (reply["text_output"], reply["model_name"]) == (expected[0], "toy")
    assert reply["details"]["finish_reason"] == "length"
    assert [token["id"] for token in reply["details"]["logprobs"]] == expected[1]
    text = httpx.post(f"{live_server.url}/v2/models/toy/generate_stream", json=body).text
    events = [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part]
    assert "".join(event["text_output"] for event in events) == expected[0]
    assert [event["details"]["token"]["id"] for event in events] == expected[1]
