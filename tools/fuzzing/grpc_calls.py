"""Calls of KServe's gRPC service as requests: the target is the method, headers are metadata, the body is the message.

Importing this module imports kserve, which parses sys.argv while it is imported: see `server.bare_argv`.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from random import Random
from typing import Any

from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

from tools.fuzzing.http_text import Request, mutated_request
from tools.fuzzing.mutations import NUMBERS, TEXTS, number
from tools.fuzzing.protobuf import mutated_message
from tools.fuzzing.tiny_model import NAME

KEY = "a-key-of-the-fuzzer"
TIMEOUT = "grpc-timeout"  # the header that gRPC itself makes of a call's deadline
_TIMEOUTS = ("0n", "1n", "500u", "5m", "30m", "100m", "99999999H")  # most are over before the answer is there
_SERVICE = "/inference.GRPCInferenceService/"
_INFER = f"{_SERVICE}ModelInfer"
_AUTHORIZATION = ("authorization", f"Bearer {KEY}")
_METADATA = (TIMEOUT, "idempotency-key", "x-request-timeout-ms", "x-request-id", "authorization", "traceparent",
             "trace-bin", "idempotency-key-bin", "x-api-key", "grpc-encoding", "user-agent")  # fmt: skip
_DATATYPES = ("BYTES", "INT64", "INT32", "INT8", "UINT8", "UINT64", "BOOL", "FP16", "FP32", "FP64", "bytes", "BF16", "")
_INPUTS = ("text_input", "input_ids", "", "prompt", "text_output")
_OUTPUTS = ("text_output", "output_ids", "finish_reason", "text_input", "")
_PARAMETERS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "seed", "logprobs", "logit_bias", "ignore_eos",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "n", "prompt", "model", "stream", "user", "",
    "stream_options", "echo", "binary_data_size", "binary_data_output",
)  # fmt: skip
_NUMBER_TEXTS = ("0.7", "nan", "-inf", "1e999", "-0", "1_0", "٣", "0x1", "true", "1" * 5000)
_TEXTS = tuple(text.encode(errors="replace").decode() for text in (*TEXTS, *_NUMBER_TEXTS))
_WORDS = tuple(text.encode() for text in (*_TEXTS, *_DATATYPES, *_INPUTS, *_OUTPUTS, *_PARAMETERS, NAME))
_SHAPES = ((), (0,), (1,), (2,), (1, 3), (3, 1), (-1,), (1, -1), (-1, -1), (2**62, 4), (2**32, 2**32), (2**63 - 1,),
           (1,) * 70, (0, 2**40))  # fmt: skip


def good_calls() -> list[Request]:
    """At least one of each method."""
    found = [
        _call("ServerLive", pb.ServerLiveRequest()),
        _call("ServerReady", pb.ServerReadyRequest()),
        _call("ServerMetadata", pb.ServerMetadataRequest()),
        _call("ModelReady", pb.ModelReadyRequest(name=NAME, version="1")),
        _call("ModelMetadata", pb.ModelMetadataRequest(name=NAME, version="1")),
        _call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=NAME)),
        _call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=NAME)),
    ]
    texts = [_call("ModelInfer", message) for message in _infer_messages()]
    terms = (
        ("x-request-timeout-ms", "5000"), (TIMEOUT, "5S"), ("x-request-id", "r"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), ("trace-bin", "\x01\xff"),
    )  # fmt: skip
    return [*found, *texts, replace(texts[0], headers=(*texts[0].headers, *terms))]


def control_call() -> Request:
    """Its answer is the same each time."""
    message = _infer(_texts("To be"), max_tokens=12, temperature="0")
    return _call("ModelInfer", message)


def text_of(reply: bytes) -> str:
    """The first text of a reply to ModelInfer."""
    outputs = {output.name: output for output in pb.ModelInferResponse.FromString(reply).outputs}
    return str(outputs["text_output"].contents.bytes_contents[0].decode())


def hostile_call(random: Random, good: list[Request]) -> Request:
    """A good call with another message or other metadata, the message of another method, or no method at all. Most are
    for ModelInfer, behind which there is most."""
    call = random.choice([call for call in good if call.target == _INFER] if random.random() < 0.6 else good)
    kind = random.randrange(10)
    if random.random() < 0.1:
        more = random.choice((("idempotency-key", str(random.randrange(1000))), (TIMEOUT, random.choice(_TIMEOUTS))))
        call = replace(call, headers=(*call.headers, more))
    if kind == 0:
        return mutated_request(random, call, _METADATA)
    if kind == 1:
        return replace(call, body=random.choice(good).body)
    if kind < 6 and call.target == _INFER:
        call = replace(call, body=_changed_infer(random, call.body))
    else:
        call = replace(call, body=mutated_message(random, call.body, _WORDS))
    return mutated_request(random, call, _METADATA) if kind == 9 else call


def _call(method: str, message: Any) -> Request:
    return Request("POST", _SERVICE + method, (_AUTHORIZATION,), message.SerializeToString(deterministic=True))


def _infer_messages() -> list[Any]:
    named = _infer(
        _texts("To be", "or not"), max_tokens=3, temperature="0.7", top_p="0.9", top_k=5, stop="q", seed=7,
        ignore_eos=True, presence_penalty="0.5",
    )  # fmt: skip
    named.id, named.model_version = "r-1", "1"
    named.outputs.extend([pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in _OUTPUTS[:2]])
    raw_text = _infer(_tensor("text_input", "BYTES", [1]), max_tokens=2)
    raw_text.raw_input_contents.append(struct.pack("<I", 5) + b"To be")
    ids = _tensor("input_ids", "INT64", [1, 3])
    ids.contents.int64_contents.extend([1, 2, 3])
    raw_ids = _infer(_tensor("input_ids", "INT32", [1, 3]), max_tokens=2)
    raw_ids.raw_input_contents.append(struct.pack("<3i", 1, 2, 3))
    return [named, raw_text, _infer(ids, max_tokens=2), raw_ids, _infer(_texts("a"), max_tokens=2, logprobs=1)]


def _infer(tensor: Any, **parameters: str | int | bool) -> Any:
    message = pb.ModelInferRequest(model_name=NAME, inputs=[tensor])
    for name, value in parameters.items():
        _set_parameter(message.parameters[name], value)
    return message


def _texts(*texts: str) -> Any:
    tensor = _tensor("text_input", "BYTES", [len(texts)])
    tensor.contents.bytes_contents.extend([text.encode() for text in texts])
    return tensor


def _tensor(name: str, datatype: str, shape: list[int]) -> Any:
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)


def _set_parameter(parameter: Any, value: str | int | bool) -> None:
    kind = "bool_param" if isinstance(value, bool) else "int64_param" if isinstance(value, int) else "string_param"
    setattr(parameter, kind, value)


# -- messages of ModelInfer that contradict themselves


def _changed_infer(random: Random, body: bytes) -> bytes:
    message = pb.ModelInferRequest.FromString(body)
    for _ in range(random.choice((1, 1, 2, 3))):
        random.choice(_CHANGES)(random, message)
    data: bytes = message.SerializeToString(deterministic=True)
    return data


def _change_parameter(random: Random, message: Any) -> None:
    value = random.choice((_int64(random), random.choice(_TEXTS), random.choice(_NUMBER_TEXTS), random.random() < 0.5))
    _set_parameter(message.parameters[random.choice(_PARAMETERS)], value)


def _change_tensor(random: Random, message: Any) -> None:
    """Its name, type or shape, which then fits neither the rest nor its content."""
    tensor = random.choice(message.inputs) if message.inputs else message.inputs.add()
    kind = random.randrange(4)
    if kind == 0:
        tensor.name = random.choice((*_INPUTS, random.choice(_TEXTS)))
    elif kind == 1:
        tensor.datatype = random.choice(_DATATYPES)
    elif kind == 2:
        tensor.shape[:] = random.choice(_SHAPES)
    else:
        _set_parameter(tensor.parameters[random.choice(_PARAMETERS)], _int64(random))


def _change_contents(random: Random, message: Any) -> None:
    tensor = random.choice(message.inputs) if message.inputs else message.inputs.add()
    contents, kind = tensor.contents, random.randrange(6)
    if kind == 0:
        tensor.ClearField("contents")
    elif kind == 1:
        contents.int64_contents.extend([_int64(random) for _ in range(random.choice((1, 3, 2000)))])
    elif kind == 2:
        contents.bytes_contents.append(random.choice((*_WORDS, b"\xff", b"\xed\xa0\x80")))
    elif kind == 3:
        contents.fp32_contents.extend([float("nan"), float("inf"), -0.0])
    elif kind == 4:
        contents.bool_contents.append(True)
    else:
        contents.int_contents.extend([random.randint(-(2**31), 2**31 - 1) for _ in range(3)])


def _change_raw(random: Random, message: Any) -> None:
    """Raw contents that are too many, of another length than they say, or beside others."""
    raw = struct.pack("<I", number(random) % (1 << 32)) + b"To be"
    content = random.choice((b"", b"\x00", raw, struct.pack("<3q", 1, -1, 2**62), bytes(1000)))
    if message.raw_input_contents and random.random() < 0.7:
        message.raw_input_contents[0] = content
    else:
        message.raw_input_contents.append(content)


def _change_names(random: Random, message: Any) -> None:
    setattr(message, random.choice(("model_name", "model_version", "id")), random.choice((*_TEXTS, "a" * 9000)))


def _change_outputs(random: Random, message: Any) -> None:
    for _ in range(random.choice((1, 2, 100))):
        message.outputs.add().name = random.choice((*_OUTPUTS, random.choice(_TEXTS)))


def _change_inputs(random: Random, message: Any) -> None:
    """None, or the same more than once."""
    if message.inputs and random.random() < 0.5:
        message.inputs.extend([message.inputs[0]] * random.choice((1, 100)))
    else:
        del message.inputs[:]


_CHANGES = (_change_parameter, _change_parameter, _change_tensor, _change_tensor, _change_contents, _change_raw,
            _change_names, _change_outputs, _change_inputs)  # fmt: skip


def _int64(random: Random) -> int:
    return (random.choice(NUMBERS) + 2**63) % 2**64 - 2**63
