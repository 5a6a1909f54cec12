"""Sequences move from one replica of a stage to another with the very bits that were computed."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from functions.contract import events
from functions.contract.checkpoint import Checkpoint
from functions.contract.errors import InvalidEvent, KvExhausted, StageError, WrongPosition
from functions.contract.events import Event
from functions.contract.frames import Frame
from functions.contract.handover import Adopt, Adopted, Export, Piece, Pieces
from functions.contract.messages import Opening, Samples, Slice, Step
from functions.contract.sampling import SamplingParams
from functions.contract.seals import Seals
from functions.contract.spans import BlockSpan
from functions.handover import FetchFailed, fetch
from functions.runner import Runner, load_runner
from functions.stage import Stage

KEY, OTHER_KEY = "0" * 31 + "a", "f" * 32
MUCH = 1 << 30
PARAMS = SamplingParams(temperature=1.0, seed=3, frequency_penalty=1.5, repetition_penalty=1.3, logprobs=2)
TEXTS = {11: [7, 8, 9] * 9, 12: [200], 13: list(range(40, 60))}


@pytest.fixture(scope="module")
def two_runners(checkpoint: Checkpoint) -> tuple[Runner, Runner]:
    """The whole tiny model twice, as two processes have it."""
    first, second = (load_runner(checkpoint, BlockSpan(0, 4), torch.float32, torch.device("cpu")) for _ in range(2))
    return first, second


@pytest.fixture
def stages_of_two(two_runners: tuple[Runner, Runner]) -> tuple[Stage, Stage]:
    first, second = two_runners
    return Stage(first, 1 << 20), Stage(second, 1 << 20)


def opened(texts: dict[int, Sequence[int]], key: str = KEY) -> Step:
    slices = tuple(Slice(sequence, 0, len(text)) for sequence, text in texts.items())
    tokens = np.array([token for text in texts.values() for token in text], dtype=np.int32)
    return Step(slices, tokens, None, {sequence: Opening(PARAMS, 2, key) for sequence in texts})


def next_step(positions: dict[int, int], token: int = 5) -> Step:
    slices = tuple(Slice(sequence, position, 1) for sequence, position in positions.items())
    return Step(slices, np.full(len(slices), token, dtype=np.int32))


def bytes_of(answer: Step | Samples) -> bytes:
    return b"".join(answer.to_body())


def move(old: Stage, new: Stage, sequences: Sequence[int], bytes_max: int = MUCH, key: str = KEY) -> int:
    """As `functions.handover.adopt` does it, without HTTP; returns the number of exports."""
    for count in range(1, 1000):
        asked = {s: new.kv.position(s) for s in sequences if new.kv.position(s) < old.kv.position(s)}
        pieces = old.export(Export(key, asked, bytes_max)) if asked else None
        if pieces is None or not pieces.pieces:
            return count
        new.install(Pieces.from_body(bytearray(b"".join(pieces.to_body()))))
    raise AssertionError("it does not end")


@pytest.mark.parametrize("bytes_max", [MUCH, 5000, 300])
def test_the_next_steps_are_the_same_to_the_last_bit(stages_of_two: tuple[Stage, Stage], bytes_max: int) -> None:
    """In pieces of any size: 300 bytes hold a token or two, 5000 more than the shortest sequence."""
    old, new = stages_of_two
    old.step(opened(TEXTS))
    exports = move(old, new, list(TEXTS), bytes_max)
    assert (exports > 3) == (bytes_max < MUCH)
    positions = {sequence: len(text) for sequence, text in TEXTS.items()}
    for _ in range(12):  # past the end of pages, and further than the penalties' memory of one token
        assert bytes_of(old.step(next_step(positions))) == bytes_of(new.step(next_step(positions)))
        positions = {sequence: position + 1 for sequence, position in positions.items()}
    assert new.kv.bytes_used == old.kv.bytes_used


def test_what_is_not_asked_for_stays_and_what_is_unknown_is_left_out(stages_of_two: tuple[Stage, Stage]) -> None:
    old, new = stages_of_two
    old.step(opened(TEXTS))
    move(old, new, [99, 13])
    assert [new.kv.position(sequence) for sequence in (11, 12, 13, 99)] == [0, 0, 20, 0]


@pytest.mark.parametrize(("given", "shown"), [(KEY, OTHER_KEY), ("", KEY), ("", "0" * 32)])
def test_nobody_gets_a_sequence_without_its_key(stages_of_two: tuple[Stage, Stage], given: str, shown: str) -> None:
    old, _ = stages_of_two
    old.step(opened(TEXTS, given))
    pieces = old.export(Export(shown, dict.fromkeys(TEXTS, 0), MUCH))
    assert (pieces.pieces, pieces.arrays, pieces.openings, len(pieces.tokens)) == ((), {}, {}, 0)


def test_a_key_is_not_shown_where_objects_are_logged() -> None:
    opening = Opening(PARAMS, 2, KEY)
    for shown in (opening, Export(KEY, {1: 0}, 1), Adopt("http://10.0.0.1:80/", KEY, (1,))):
        assert KEY not in repr(shown)


def test_a_sequence_that_has_got_as_far_by_itself_is_left_alone(stages_of_two: tuple[Stage, Stage]) -> None:
    """An adoption that comes late, after the chain has given up on it."""
    old, new = stages_of_two
    old.step(opened(TEXTS))
    pieces = old.export(Export(KEY, dict.fromkeys(TEXTS, 0), MUCH))
    new.step(opened({11: TEXTS[11]}))
    new.step(next_step({11: len(TEXTS[11])}))
    for _ in range(2):
        new.install(pieces)
        assert [new.kv.position(s) for s in TEXTS] == [len(TEXTS[11]) + 1, 1, 20]
    new.release([11])
    new.install(pieces)
    positions = {sequence: len(text) for sequence, text in TEXTS.items()}
    assert bytes_of(old.step(next_step(positions))) == bytes_of(new.step(next_step(positions)))


def test_a_piece_that_would_leave_a_gap_is_refused(stages_of_two: tuple[Stage, Stage]) -> None:
    old, new = stages_of_two
    old.step(opened(TEXTS))
    pieces = old.export(Export(KEY, {13: 5}, MUCH))
    with pytest.raises(WrongPosition):
        new.install(pieces)
    assert len(new.kv) == 0


def test_a_stage_without_room_keeps_what_it_had(two_runners: tuple[Runner, Runner]) -> None:
    first, second = two_runners
    old, new = Stage(first, 1 << 20), Stage(second, 24 * first.kv_bytes_per_token)
    old.step(opened(TEXTS))
    with pytest.raises(KvExhausted):
        new.install(old.export(Export(KEY, {12: 0, 13: 0, 11: 0}, MUCH)))
    assert [new.kv.position(sequence) for sequence in TEXTS] == [0, 1, 0]


SPOILED: dict[str, Callable[[Pieces], Pieces]] = {
    "a block missing": lambda p: replace(p, arrays={n: f for n, f in p.arrays.items() if n != "keys.3"}),
    "a block more": lambda p: replace(p, arrays={**p.arrays, "keys.4": p.arrays["keys.3"]}),
    "another dtype": lambda p: replace(
        p, arrays={n: Frame("BF16", (f.shape[0], f.shape[1], f.shape[2] * 2), f.data) for n, f in p.arrays.items()}
    ),
    "fewer heads": lambda p: replace(
        p, arrays={n: Frame(f.dtype, (f.shape[0], 1, f.shape[2] * 2), f.data) for n, f in p.arrays.items()}
    ),
    "tokens that the model lacks": lambda p: replace(p, tokens=np.full_like(p.tokens, 1 << 20)),
    "negative tokens": lambda p: replace(p, tokens=np.full_like(p.tokens, -1)),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_does_not_fit_the_stage_changes_nothing(
    stages_of_two: tuple[Stage, Stage], spoil: Callable[[Pieces], Pieces]
) -> None:
    old, new = stages_of_two
    old.step(opened(TEXTS))
    pieces = old.export(Export(KEY, dict.fromkeys(TEXTS, 0), MUCH))
    with pytest.raises(InvalidEvent):
        new.install(spoil(pieces))
    assert (len(new.kv), new.kv.bytes_used) == (0, 0)


# -- events


def test_messages_come_back_as_they_went() -> None:
    adopt = Adopt("http://10.1.2.3:8012/", KEY, (1, 2))
    assert Adopt.from_body(adopt.to_body()) == adopt
    export = Export(KEY, {1: 0, 2: 7}, 1 << 20)
    assert Export.from_body(export.to_body()) == export
    adopted = Adopted({1: 5, 2: 0}, 123)
    assert Adopted.from_body(adopted.to_body()) == adopted


WRONG_URLS = [
    "https://10.0.0.1:80/", "http://10.0.0.1/", "http://10.0.0.1:80", "http://10.0.0.1:80/x", "http://10.0.0.1:80/?a=b",
    "http://u:p@10.0.0.1:80/", "http://10.0.0.1:99999/", "http://169.254.169.254:80/", "http://[fe80::1]:80/",
    "http://[::ffff:169.254.169.254]:80/", "http://0.0.0.0:80/", "http://224.0.0.1:80/", "http://a b:80/",
    "http://[::1:80/", "file:///etc/passwd", "", "http://10.0.0.1:80/#x", "http://10.0.0.1:080/",
]  # fmt: skip


@pytest.mark.parametrize("url", WRONG_URLS)
def test_only_addresses_of_replicas_may_be_named(url: str) -> None:
    with pytest.raises(InvalidEvent):
        Adopt(url, KEY, (1,))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "http://[::1]:9/", "http://stage-0.default:8012/"])
def test_these_may(url: str) -> None:
    assert Adopt(url, KEY, (1,)).source == url


WRONG_BODIES = [
    b"", b"[]", b"{}", b"\xff", b"[" * 10_000, b'{"from": 5, "key": "a", "sequences": []}',
    json.dumps({"from": "http://1.2.3.4:5/", "key": KEY, "sequences": []}).encode(),
    json.dumps({"from": "http://1.2.3.4:5/", "key": KEY, "sequences": [True]}).encode(),
    json.dumps({"from": "http://1.2.3.4:5/", "key": KEY, "sequences": [0]}).encode(),
    json.dumps({"from": "http://1.2.3.4:5/", "key": KEY.upper(), "sequences": [1]}).encode(),
    json.dumps({"from": "http://1.2.3.4:5/", "key": KEY, "sequences": list(range(1, 6000))}).encode(),
    json.dumps({"key": KEY, "sequences": {"x": 1}, "bytes_max": 5}).encode(),
    json.dumps({"key": KEY, "sequences": {"1": -1}, "bytes_max": 5}).encode(),
    json.dumps({"key": KEY, "sequences": {"1": 1.0}, "bytes_max": 5}).encode(),
    json.dumps({"key": KEY, "sequences": {"1": 1}, "bytes_max": 0}).encode(),
    json.dumps({"key": KEY, "sequences": {"\u0661": 1}, "bytes_max": 5}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("body", WRONG_BODIES)
def test_other_data_is_refused(body: bytes) -> None:
    for kind in (Adopt, Export):
        with pytest.raises(InvalidEvent):
            kind.from_body(body)


@pytest.mark.parametrize("row", [(0, 0, 1, 1), (1, -1, 1, 1), (1, 0, 0, 1), (1, 0, 2, 1), (1 << 53, 0, 1, 1)])
def test_pieces_that_cannot_be_are_refused(row: tuple[int, int, int, int]) -> None:
    with pytest.raises(InvalidEvent):
        Piece(*row)


# -- over HTTP


@pytest.fixture(scope="module")
def replicas(start_stage: Callable[..., Any], tiny_checkpoint: Any) -> tuple[Any, Any]:
    """Two processes of the whole tiny model; events may be so small that a sequence takes several."""
    common = {"model": tiny_checkpoint, "blocks": "0:4", "body_bytes_max": 10_000}
    first, second = start_stage(common), start_stage(common)
    for stage in (first, second):
        stage.wake()
    return first, second


def adopt(new: Any, old_url: str, sequences: Sequence[int], key: str = KEY) -> dict[str, Any]:
    body = json.dumps({"from": f"{old_url}/", "key": key, "sequences": list(sequences)}).encode()
    response = new.post(new.headers(events.ADOPT), body)
    assert (response.status_code, response.headers["ce-type"]) == (200, events.ADOPTED), response.text
    return dict(response.json())


def test_a_replica_adopts_sequences_from_another(replicas: tuple[Any, Any]) -> None:
    old, new = replicas
    old.step(bytes_of(opened(TEXTS)))
    adopted = adopt(new, old.url, [*TEXTS, 99])
    assert adopted["positions"] == {**{str(s): len(text) for s, text in TEXTS.items()}, "99": 0}
    assert adopted["bytes"] == sum(map(len, TEXTS.values())) * new.wake()["kv_bytes_per_token"] > 10_000
    step = bytes_of(next_step({sequence: len(text) for sequence, text in TEXTS.items()}))
    assert old.step(step) == new.step(step)
    assert adopt(new, old.url, list(TEXTS))["bytes"] == 0, "it has them"
    page = new.get("/metrics").text
    assert 'stagecraft_stage_handed_over_total{direction="in"} 3.0' in page
    assert f'stagecraft_stage_handed_over_bytes_total{{direction="in"}} {float(adopted["bytes"])}' in page
    assert 'stagecraft_stage_handed_over_total{direction="out"} 3.0' in old.get("/metrics").text
    for stage in replicas:
        stage.release(*TEXTS)


def test_what_cannot_be_fetched_is_told_by_the_positions(replicas: tuple[Any, Any]) -> None:
    old, new = replicas
    old.step(bytes_of(opened({11: TEXTS[11]})))
    assert adopt(new, old.url, [11], OTHER_KEY)["positions"] == {"11": 0}
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        gone = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert adopt(new, gone, [11])["positions"] == {"11": 0}
    old.release(11)


def test_an_adoption_with_a_wrong_source_is_an_error_event(replicas: tuple[Any, Any]) -> None:
    _, new = replicas
    body = json.dumps({"from": "http://169.254.169.254:80/", "key": KEY, "sequences": [1]}).encode()
    response = new.post(new.headers(events.ADOPT), body)
    assert (response.status_code, response.json()["code"]) == (400, "invalid_event")


EVENT = Event(events.EXPORT, "/tests", "1", events.JSON, b"{}", {"plan": "p", "stage": "0"})
ANSWERS: dict[str, bytes] = {
    "nothing": b"",
    "no HTTP": b"hello\r\n\r\n",
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\n\r\nabc",
    "too much": b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n",
    "too little": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
    "another event": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nce-specversion: 1.0\r\nce-type: x\r\n"
    b"ce-source: /x\r\nce-id: 1\r\n\r\n{}",
    "no tensors": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nce-specversion: 1.0\r\nce-type: %s\r\n"
    b"ce-source: /x\r\nce-id: 1\r\n\r\nabcdefghi" % events.EXPORTED.encode(),
    "an error of no kind": b"HTTP/1.1 500 No\r\nContent-Length: 2\r\nce-specversion: 1.0\r\nce-type: %s\r\n"
    b"ce-source: /x\r\nce-id: 1\r\n\r\n[]" % events.ERROR.encode(),
}


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """A server that answers one request with given bytes and closes the connection: its URL."""
    listeners, threads = [], []

    def serve(listener: socket.socket, answer: bytes) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    def start(answer: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=serve, args=(listener, answer))
        thread.start()
        listeners.append(listener)
        threads.append(thread)
        return f"http://127.0.0.1:{listener.getsockname()[1]}/"

    yield start
    for thread in threads:
        thread.join()
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_any_other_answer_is_one_kind_of_failure(answering: Callable[[bytes], str], answer: bytes) -> None:
    with pytest.raises((FetchFailed, StageError)):
        await fetch(answering(answer), EVENT, 1000, Seals())


# -- after SIGTERM


def test_a_stage_that_was_told_to_end_serves_until_its_sequences_have_left(
    start_stage: Callable[..., Any], tiny_checkpoint: Any, replicas: tuple[Any, Any]
) -> None:
    _, new = replicas
    old = start_stage({"model": tiny_checkpoint, "blocks": "0:4"})
    old.wake()
    old.step(bytes_of(opened(TEXTS)))
    old.process.send_signal(signal.SIGTERM)
    while old.get("/healthz").status_code != 503:  # by a connection that was open before
        pass
    assert old.get("/healthz").text == "shutting down\n"
    assert old.get("/readyz").status_code == 503
    step = bytes_of(next_step({sequence: len(text) for sequence, text in TEXTS.items()}))
    answer = old.step(step)
    assert adopt(new, old.url, list(TEXTS))["positions"]["11"] == len(TEXTS[11]) + 1  # by a new connection
    assert old.release(*TEXTS) == list(TEXTS)
    assert old.ended()[0] == 0
    assert new.step(step) == answer
    new.release(*TEXTS)


def test_a_second_signal_ends_it_with_sequences(start_stage: Callable[..., Any], tiny_checkpoint: Any) -> None:
    stage = start_stage({"model": tiny_checkpoint, "blocks": "0:4", "grace_s": 200})
    stage.wake()
    stage.step(bytes_of(opened(TEXTS)))
    stage.process.send_signal(signal.SIGTERM)
    while stage.get("/healthz").status_code != 503:
        pass
    stage.client.close()
    stage.process.send_signal(signal.SIGTERM)
    assert stage.ended()[0] == 0
