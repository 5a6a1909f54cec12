"""A stage as a process, asked over HTTP: bad events, health pages, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from functions.contract import events
from functions.contract.errors import StageError, WrongPosition, from_json
from functions.contract.frames import Frame, Frames, pack
from functions.contract.messages import Step
from functions.handler import replica_address

BODY_BYTES_MAX = 64 << 10  # as conftest.py sets it
PROMPT = tuple(b"To be, or not")
UNKNOWN = 999  # a sequence that no stage has


class Bystander:
    """A sequence on its way, that no bad event may disturb."""

    def __init__(self, chain: Any, step_of: Callable[..., Step], expected: list[int]) -> None:
        self._chain, self._step_of, self._expected = chain, step_of, expected
        self._position = len(PROMPT)
        self._last = self._send(0, PROMPT)
        assert self._last == expected[0]

    def goes_on(self) -> None:
        """One more token, the right one."""
        self._last = self._send(self._position, [self._last])
        self._position += 1
        assert self._last == self._expected[self._position - len(PROMPT)]

    def _send(self, start: int, tokens: Any) -> int:
        return self._chain.step(self._step_of((1, start, tokens))).items[0].token


@pytest.fixture(scope="module")
def bystander(
    stages: list[Any],
    chain_of: Callable[..., Any],
    step_of: Callable[..., Step],
    reference: Callable[..., list[int]],
) -> Bystander:
    return Bystander(chain_of(*stages), step_of, reference(PROMPT, 120))


def refusal(response: httpx.Response) -> StageError:
    """The error of an error event; fails for anything else."""
    event = events.from_http_request(response.headers, response.content)
    assert event.type == events.ERROR
    assert event.content_type == events.JSON
    assert event.extensions["replica"].startswith("127.0.0.1:")
    error = from_json(json.loads(event.data))
    assert error.status == response.status_code
    assert str(error)
    assert "Traceback" not in str(error)
    return error


# -- events that are wrong in their attributes

ATTRIBUTES = {
    "no specversion": ({"ce_specversion": None}, "invalid_event", "specversion"),
    "specversion 0.3": ({"ce_specversion": "0.3"}, "invalid_event", "specversion"),
    "specversion 2.0": ({"ce_specversion": "2.0"}, "invalid_event", "specversion"),
    "no type": ({"ce_type": None}, "invalid_event", "type"),
    "no id": ({"ce_id": None}, "invalid_event", "id"),
    "no source": ({"ce_source": None}, "invalid_event", "source"),
    "unknown type": ({"ce_type": "dev.stagecraft.stage.explode.v1"}, "invalid_event", "explode"),
    "type of a reply": ({"ce_type": events.STEPPED}, "invalid_event", "stepped"),
    "another plan": ({"ce_plan": "feedfeedfeedfeed"}, "plan_mismatch", "feedfeedfeedfeed"),
    "no plan": ({"ce_plan": None}, "plan_mismatch", "plan"),
    "another stage": ({"ce_stage": "7"}, "plan_mismatch", "stage 7"),
    "no stage": ({"ce_stage": None}, "plan_mismatch", "stage"),
    "data of a wrong kind": ({"content_type": "application/json"}, "invalid_event", "safetensors"),
    "structured mode": ({"content_type": "application/cloudevents+json"}, "invalid_event", "binary"),
    "batch mode": ({"content_type": "application/cloudevents-batch+json"}, "invalid_event", "binary"),
}


@pytest.mark.parametrize(("changed", "code", "hint"), ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_wrong_attribute_is_refused(
    stages: list[Any], bystander: Bystander, step_of: Callable[..., Step], changed: Any, code: str, hint: str
) -> None:
    body = b"".join(step_of((2, 0, [1, 2])).to_body())
    headers = stages[0].headers(events.STEP, **{"content_type": events.TENSORS} | changed)
    error = refusal(stages[0].post(headers, body))
    assert error.code == code
    assert hint in str(error)
    bystander.goes_on()


# -- steps that are wrong in their data


def frames(**changed: Frame | None) -> bytes:
    """A good step for the last stage (sequence 2, two tokens) with other arrays."""
    arrays: dict[str, Frame | None] = {
        "slices": Frame.of(np.array([[2, 0, 2, 1]], dtype=np.int64)),
        "tokens": Frame.of(np.array([1, 2], dtype=np.int32)),
        "hidden": Frame.of(np.zeros((2, 16), dtype=np.float32)),
    }
    arrays |= changed
    return with_openings({"2": {"params": {}, "prompt_length": 2}}, arrays)


def with_openings(openings: Any, arrays: dict[str, Frame | None] | None = None) -> bytes:
    if arrays is None:
        arrays = {
            "slices": Frame.of(np.array([[2, 0, 2, 1]], dtype=np.int64)),
            "tokens": Frame.of(np.array([1, 2], dtype=np.int32)),
            "hidden": Frame.of(np.zeros((2, 16), dtype=np.float32)),
        }
    text = openings if isinstance(openings, str) else json.dumps(openings)
    kept = {name: frame for name, frame in arrays.items() if frame is not None}
    return b"".join(pack(Frames(kept, {"openings": text})))


def forged(old: bytes, new: bytes) -> bytes:
    """A good step whose header has been changed in place, its length told rightly."""
    good = frames()
    (size,) = struct.unpack("<Q", good[:8])
    header = good[8 : 8 + size]
    assert old in header
    header = header.replace(old, new, 1)
    return struct.pack("<Q", len(header)) + header + good[8 + size :]


def ints(*values: Any, dtype: Any = np.int64) -> Frame:
    return Frame.of(np.array(values, dtype=dtype))


def opened(**params: Any) -> bytes:
    return with_openings({"2": {"params": params, "prompt_length": 2}})


DATA = {
    "nothing": b"",
    "noise": b"\xff" * 100,
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00",
    "cut in the length": frames()[:5],
    "cut in the header": frames()[:40],
    "cut in the data": frames()[:-1],
    "a byte too many": frames() + b"\0",
    "huge header length": struct.pack("<Q", 1 << 60) + frames()[8:],
    "header of no JSON": struct.pack("<Q", 4) + b"nope",
    "header of a list": struct.pack("<Q", 2) + b"[]",
    "unknown dtype": forged(b'"F32"', b'"F33"'),
    "other dtype of the same size": forged(b'"F32"', b'"I32"'),
    "smaller dtype": forged(b'"F32"', b'"F16"'),
    "other shape": forged(b"[2,16]", b"[2,17]"),
    "transposed shape": forged(b"[2,16]", b"[16,2]"),
    "flat shape": forged(b"[2,16]", b"[32]"),
    "negative shape": forged(b"[2,16]", b"[-2,-16]"),
    "shape of texts": forged(b"[2,16]", b'["2","16"]'),
    "shape of too many dimensions": forged(b'"shape":[2],', b'"shape":[2' + b",1" * 99 + b"],"),
    "float64 slices": frames(slices=Frame("F64", (1, 4), bytes(32))),
    "slices of three columns": frames(slices=ints([2, 0, 2])),
    "no slices": frames(slices=Frame.of(np.zeros((0, 4), dtype=np.int64))),
    "no slices of endless width": frames(slices=Frame("I64", (0, 10**30), b"")),
    "slices left out": frames(slices=None),
    "tokens left out": frames(tokens=None),
    "int64 tokens": frames(tokens=ints(1, 2)),
    "fewer tokens than the slices say": frames(tokens=ints(1, dtype=np.int32)),
    "token out of the vocabulary": frames(tokens=ints(1, 100_000, dtype=np.int32)),
    "negative token": frames(tokens=ints(1, -1, dtype=np.int32)),
    "the same sequence twice": frames(slices=ints([2, 0, 1, 1], [2, 1, 1, 1])),
    "negative start": frames(slices=ints([2, -1, 2, 1])),
    "length of zero": frames(slices=ints([2, 0, 0, 1])),
    "sequence 0": frames(slices=ints([0, 0, 2, 1])),
    "an array that nobody asked for": frames(extra=ints(1)),
    "no hidden states": frames(hidden=None),
    "hidden states of half precision": frames(hidden=Frame.of(np.zeros((2, 16), dtype=np.float16))),
    "hidden states too narrow": frames(hidden=Frame.of(np.zeros((2, 15), dtype=np.float32))),
    "openings of no JSON": with_openings("{"),
    "openings of a list": with_openings([]),
    "openings left empty": with_openings({}),
    "opening of another sequence": with_openings({"3": {"params": {}, "prompt_length": 1}}),
    "opening with a word for an id": with_openings({"two": {"params": {}, "prompt_length": 1}}),
    "opening without prompt_length": with_openings({"2": {"params": {}}}),
    "opening with prompt_length 0": with_openings({"2": {"params": {}, "prompt_length": 0}}),
    "opening nested too deeply": with_openings("[" * 20_000),
    "unknown parameter": opened(beams=3),
    "temperature of a text": opened(temperature="hot"),
    "temperature that is not finite": with_openings('{"2":{"params":{"temperature":1e999},"prompt_length":2}}'),
    "top_p of 0": opened(top_p=0),
    "seed of 400 digits": opened(seed=10**400),
    "logit_bias of 400 digits": opened(logit_bias={"1": 10**400}),
    "logit_bias for a token of 400 digits": opened(logit_bias={str(10**400): 1}),
}


@pytest.mark.parametrize("body", DATA.values(), ids=DATA)
def test_wrong_data_is_refused(stages: list[Any], bystander: Bystander, body: bytes) -> None:
    error = refusal(stages[1].post(stages[1].headers(events.STEP, events.TENSORS), body))
    assert error.code == "invalid_event"
    assert stages[1].wake()["sequences"] == 1  # the bystander's
    bystander.goes_on()


def test_the_step_that_the_wrong_ones_were_made_of_is_accepted(stages: list[Any], bystander: Bystander) -> None:
    stages[1].step(frames())
    assert stages[1].release(2) == [2]
    bystander.goes_on()


RELEASES = {
    "broken JSON": b'{"sequences": [1',
    "a list": b"[1]",
    "no sequences": b"{}",
    "a number for a list": b'{"sequences": 1}',
    "texts": b'{"sequences": ["1"]}',
    "not UTF-8": b"\xff\xfe",
    "nothing": b"",
    "nested too deeply": b"[" * 20_000,
}


@pytest.mark.parametrize("body", RELEASES.values(), ids=RELEASES)
def test_wrong_release_is_refused(stages: list[Any], bystander: Bystander, body: bytes) -> None:
    assert refusal(stages[0].post(stages[0].headers(events.RELEASE), body)).code == "invalid_event"
    bystander.goes_on()


def test_release_frees_what_is_known_and_ignores_the_rest(
    stages: list[Any], bystander: Bystander, step_of: Callable[..., Step]
) -> None:
    stages[0].step(b"".join(step_of((5, 0, [1, 2, 3])).to_body()))
    assert stages[0].wake()["sequences"] == 2
    assert stages[0].release(5, UNKNOWN) == [5]
    assert stages[0].release(5) == []
    assert stages[0].wake()["sequences"] == 1
    bystander.goes_on()


def test_unknown_sequence_is_told_position_0(
    stages: list[Any], bystander: Bystander, step_of: Callable[..., Step]
) -> None:
    body = b"".join(step_of((UNKNOWN, 3, [1])).to_body())
    error = refusal(stages[0].post(stages[0].headers(events.STEP, events.TENSORS), body))
    assert isinstance(error, WrongPosition)
    assert (error.status, error.positions) == (409, {UNKNOWN: 0})
    bystander.goes_on()


def test_gap_is_told_the_position(stages: list[Any], bystander: Bystander, step_of: Callable[..., Step]) -> None:
    stages[0].step(b"".join(step_of((6, 0, [1, 2, 3])).to_body()))
    body = b"".join(step_of((6, 5, [1])).to_body())
    error = refusal(stages[0].post(stages[0].headers(events.STEP, events.TENSORS), body))
    assert isinstance(error, WrongPosition)
    assert error.positions == {6: 3}
    assert stages[0].release(6) == [6]
    bystander.goes_on()


def test_sequence_longer_than_the_model_takes_is_refused(
    stages: list[Any], bystander: Bystander, step_of: Callable[..., Step]
) -> None:
    body = b"".join(step_of((7, 0, [1] * 257)).to_body())
    error = refusal(stages[0].post(stages[0].headers(events.STEP, events.TENSORS), body))
    assert (error.code, error.status) == ("prompt_too_long", 422)
    assert "257" in str(error)
    assert "256" in str(error)
    bystander.goes_on()


def test_oversize_is_refused_by_its_announced_length(stages: list[Any], bystander: Bystander) -> None:
    body = bytes(BODY_BYTES_MAX + 1)
    error = refusal(stages[0].post(stages[0].headers(events.STEP, events.TENSORS), body))
    assert (error.code, error.status) == ("event_too_large", 413)
    assert str(BODY_BYTES_MAX) in str(error)
    bystander.goes_on()


def test_oversize_is_refused_while_it_streams_in(stages: list[Any], bystander: Bystander) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(BODY_BYTES_MAX // 1024 + 1):
            yield bytes(1024)

    error = refusal(stages[0].post(stages[0].headers(events.STEP, events.TENSORS), endless()))
    assert (error.code, error.status) == ("event_too_large", 413)
    bystander.goes_on()


def test_whole_event_in_the_body_is_refused(stages: list[Any], bystander: Bystander) -> None:
    """Structured content mode: attributes and data in one JSON document."""
    event = {"specversion": "1.0", "type": events.WAKE, "source": "/tests", "id": "1", "data": {}}
    response = stages[0].client.post(
        stages[0].url, json=event, headers={"content-type": "application/cloudevents+json; charset=utf-8"}
    )
    assert refusal(response).code == "invalid_event"
    bystander.goes_on()


def test_reply_names_its_request_and_its_replica(stages: list[Any]) -> None:
    response = stages[1].post(stages[1].headers(events.WAKE, ce_id="abc-7"), b"{}")
    reply = events.from_http_request(response.headers, response.content)
    address = stages[1].url.removeprefix("http://")
    assert (reply.type, reply.id) == (events.WOKEN, "abc-7.reply")
    assert reply.source == f"/stagecraft/tiny/stages/1/{address}"
    assert {**reply.extensions, "digest": ""} == {"replica": address, "digest": ""}
    assert "ce-time" not in response.headers


def test_wake_needs_no_data_and_tells_what_the_stage_is(stages: list[Any], tiny_checkpoint: Path) -> None:
    response = stages[0].post(stages[0].headers(events.WAKE))
    info = response.json()
    assert {name: info[name] for name in ("model", "stage", "stages", "blocks", "dtype", "device")} == {
        "model": "tiny", "stage": 0, "stages": 2, "blocks": [0, 2], "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    assert (info["hidden_size"], info["vocab_size"], info["max_positions"]) == (16, 257, 256)
    # 2 blocks, keys and values, 2 heads of size 4, 4 bytes each
    assert info["kv_bytes_per_token"] == 2 * 2 * 2 * 4 * 4


def test_step_tells_how_long_it_computed(stages: list[Any], step_of: Callable[..., Step]) -> None:
    body = b"".join(step_of((8, 0, [1, 2, 3])).to_body())
    response = stages[0].post(stages[0].headers(events.STEP, events.TENSORS), body)
    assert response.headers["ce-type"] == events.STEPPED
    assert int(response.headers["ce-computeus"]) > 0
    assert stages[0].release(8) == [8]


# -- pages


def test_pages_tell_health_and_readiness(stages: list[Any]) -> None:
    assert stages[0].get("/healthz").status_code == 200
    ready = stages[0].get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "blocks": "0:2"})


def test_metrics_count_events_tokens_and_memory(stages: list[Any], bystander: Bystander) -> None:
    def value(name: str) -> float:
        lines = stages[0].get("/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(name)))

    ok = f'stagecraft_stage_events_total{{answer="ok",type="{events.STEP}"}}'
    steps, tokens = value(ok), value("stagecraft_stage_tokens_total")
    bystander.goes_on()
    assert value(ok) == steps + 1
    assert value("stagecraft_stage_tokens_total") == tokens + 1
    assert value("stagecraft_stage_sequences ") == 1
    assert 0 < value("stagecraft_stage_kv_bytes ") <= value("stagecraft_stage_kv_bytes_max ")
    assert value('stagecraft_stage_body_bytes_total{direction="in"}') > 0


def test_labels_do_not_grow_with_what_people_send(stages: list[Any]) -> None:
    for i in range(3):
        refusal(stages[0].post(stages[0].headers(f"dev.example.{i}"), b"{}"))
    page = stages[0].get("/metrics").text
    assert 'type="unknown"' in page
    assert "dev.example" not in page


def test_other_pages_and_methods_are_refused(stages: list[Any]) -> None:
    page = stages[0].get("/admin")
    assert page.status_code == 404
    assert "/healthz" in page.json()["error"]
    assert stages[0].client.delete(stages[0].url).status_code == 405


# -- the address that a replica tells


def test_a_replica_tells_the_address_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K_REVISION", "demo-stage-0-00001")
    assert replica_address("10.0.0.7:8012", ("127.0.0.1", 9000)) == "10.0.0.7:8012"


def test_a_replica_in_a_pod_tells_its_queue_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request came from queue-proxy by 127.0.0.1, where nobody else reaches the pod."""
    monkeypatch.setenv("K_REVISION", "demo-stage-0-00001")
    host, _, port = replica_address("", ("127.0.0.1", 9000)).rpartition(":")
    assert port == "8012"
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    own |= {socket.gethostbyname(socket.gethostname())}
    assert host.strip("[]") in own


def test_a_replica_without_knative_tells_its_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("K_REVISION", raising=False)
    assert replica_address("", ("127.0.0.1", 9000)) == "127.0.0.1:9000"
    assert replica_address("", ("fd00::7", 9000)) == "[fd00::7]:9000"


# -- how a process begins and ends


def without(tensors: dict[str, Any], name: str) -> None:
    del tensors[name]


def reshaped(tensors: dict[str, Any], name: str) -> None:
    tensors[name] = tensors[name][:-1].clone()


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("change", [without, reshaped], ids=["missing tensor", "wrong shape"])
def test_checkpoint_that_cannot_be_loaded_ends_the_process(
    start_stage: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path, change: Callable[..., None]
) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    change(tensors, NORM)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    code, log = start_stage({"model": tmp_path, "blocks": "0:4"}).ended()
    last = log.rstrip().splitlines()[-1]
    assert code == 1
    assert last.startswith("error: ")
    assert NORM in last
    assert "Traceback" not in log


def test_checkpoint_that_is_not_there_ends_the_process(start_stage: Callable[..., Any], tmp_path: Path) -> None:
    code, log = start_stage({"model": tmp_path / "nowhere", "blocks": "0:4"}).ended()
    assert code == 1
    assert log.rstrip().splitlines()[-1].startswith(f"error: {tmp_path / 'nowhere'} holds no config.json")
    assert "Traceback" not in log


def test_unknown_setting_ends_the_process_before_it_loads(
    start_stage: Callable[..., Any], tiny_checkpoint: Path
) -> None:
    code, log = start_stage({"model": tiny_checkpoint, "blocks": "0:4", "modl": "x"}, cold=True).ended()
    assert code == 2
    assert log.startswith("error: unknown settings STAGE_MODL; known are ")
    assert len(log.splitlines()) == 1


def listening(stage: Any) -> Any:
    """The stage, once its port is open."""
    for _ in range(600):
        try:
            stage.get("/healthz")
            return stage
        except httpx.ConnectError:
            assert stage.process.poll() is None, stage.log.read_text()
            time.sleep(0.1)
    raise AssertionError(stage.log.read_text())


@pytest.fixture
def slow_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that loads for as long as nobody writes its config.json, a pipe."""
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "model.safetensors").symlink_to(tiny_checkpoint / "model.safetensors")
    return tmp_path


def test_life_of_a_stage_from_loading_to_sigterm(
    start_stage: Callable[..., Any], slow_checkpoint: Path, tiny_checkpoint: Path, step_of: Callable[..., Step]
) -> None:
    stage = listening(start_stage({"model": slow_checkpoint, "blocks": "0:2", "count": 2}, by_port=True, cold=True))
    assert stage.get("/healthz").status_code == 200
    assert (stage.get("/readyz").status_code, stage.get("/readyz").json()) == (503, {"status": "loading"})
    assert refusal(stage.post(stage.headers(events.WAKE, ce_plan="other"))).code == "plan_mismatch"
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(stage.step, b"".join(step_of((1, 0, [1])).to_body()))
        (slow_checkpoint / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
        assert stage.wake()["blocks"] == [0, 2]
        assert Step.from_body(early.result()).hidden is not None
    assert stage.get("/readyz").status_code == 200
    stage.process.send_signal(signal.SIGTERM)
    code, log = stage.ended()
    assert code == 0, log
    assert "Traceback" not in log


def test_sigterm_ends_a_stage_that_still_loads_though_somebody_waits(
    start_stage: Callable[..., Any], slow_checkpoint: Path
) -> None:
    stage = listening(start_stage({"model": slow_checkpoint, "blocks": "0:2"}, by_port=True))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stage.wake)
        while 'body_bytes_total{direction="in"} 0.0' in stage.get("/metrics").text:
            time.sleep(0.1)
        stage.process.send_signal(signal.SIGTERM)
        try:
            code, log = stage.process.wait(30), stage.log.read_text()
        except subprocess.TimeoutExpired:
            stage.process.kill()
            raise AssertionError("the stage goes on loading after SIGTERM") from None
        finally:
            assert isinstance(waiting.exception(), httpx.HTTPError | AssertionError)
    assert code == 0, log
    assert "Traceback" not in log


def test_functions_framework_serves_the_same_function(start_stage: Callable[..., Any], tiny_checkpoint: Path) -> None:
    program = Path(sysconfig.get_path("scripts")) / "functions-framework"
    options = ["--asgi", "--source", "functions/main.py", "--target", "stage", "--host", "127.0.0.1"]
    stage = start_stage(
        {"model": tiny_checkpoint, "blocks": "0:4"}, [sys.executable, str(program), *options], by_port=True
    )
    assert listening(stage).wake()["blocks"] == [0, 4]
    stage.process.send_signal(signal.SIGTERM)
    try:
        stage.process.wait(30)
    except subprocess.TimeoutExpired:
        raise AssertionError(stage.log.read_text()) from None
