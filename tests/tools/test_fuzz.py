"""The fuzzer against a door that crashes, hangs, dies and tells too much."""

from __future__ import annotations

import contextlib
from pathlib import Path
from random import Random

import grpc
import pytest
from google.protobuf.message import DecodeError
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

from tests.tools.bad_door import BadDoor
from tools import fuzz
from tools.fuzzing.campaign import Tally, Task, input_of, run
from tools.fuzzing.catalogue import DOORS, open_door
from tools.fuzzing.door import Violation, judged
from tools.fuzzing.grpc_door import refused
from tools.fuzzing.mutations import INPUT_BYTES_MAX, dumped, hostile
from tools.fuzzing.protobuf import mutated_message

BAD_DOOR = f"{Path(__file__).with_name('bad_door.py')}:open_bad"


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAD_DOOR_COUNT", str(tmp_path / "count"))


@pytest.mark.usefixtures("counted")
def test_all_that_goes_wrong_is_found_and_the_run_goes_on() -> None:
    tally = run(Task(BAD_DOOR, seed=1, start=0, end=14, check_every=100, cpu_s_max=0.5), open_door)
    assert tally.inputs == 14
    assert tally.counts == {"crash": 3, "hang": 1, "5xx": 1}
    found = {finding.index: finding for finding in tally.findings}
    assert sorted(found) == [3, 5, 7, 9, 11]
    assert "KeyError: 'what nobody has thought of'" in found[3].text
    assert "in take" in found[5].text, "it says where the process hung"
    assert "ended with 3" in found[7].text
    assert all(len(finding.data) == 8 for finding in tally.findings), "inputs are kept, whatever became of the process"


@pytest.mark.usefixtures("counted")
def test_a_failure_is_kept_repeated_and_fails_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "kept"
    assert fuzz.main(["--door", BAD_DOOR, "--inputs", "4", "--failures", str(folder)]) == 1
    told = capsys.readouterr()
    assert "| all | 4 |" in told.out
    (kept,) = folder.glob("*.input")
    assert f"--replay {kept}" in told.err
    assert "input 3 of seed 1" in kept.with_suffix(".txt").read_text()


def test_a_good_door_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--door", "batch-lines", "--inputs", "50"]) == 0
    assert "| batch-lines | 50 |" in capsys.readouterr().out


def test_a_kept_input_is_given_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "batch-lines.crash.1-5.input"
    kept.write_bytes(b'{"prompt": "a"}')
    assert fuzz.main(["--replay", str(kept)]) == 0
    assert "accepted" in capsys.readouterr().out


class LongDoor(BadDoor):
    def make(self, random: Random) -> bytes:
        return b"a" * random.choice((10, INPUT_BYTES_MAX + 1))


def test_no_input_is_longer_than_what_is_kept_of_it() -> None:
    inputs = [input_of(LongDoor(), "long", 1, index) for index in range(20)]
    assert {len(data) for data in inputs} == {10}
    large = {"name": "a" * (INPUT_BYTES_MAX // 100)}
    assert all(len(dumped(hostile(Random(seed), large))) < INPUT_BYTES_MAX + 1000 for seed in range(200))


def test_some_messages_made_bad_can_still_be_read() -> None:
    good = pb.ModelMetadataRequest(name="tiny", version="1").SerializeToString()
    readable = 0
    for seed in range(300):
        bad = mutated_message(Random(seed), good, [b"other"])
        with contextlib.suppress(DecodeError):
            readable += pb.ModelMetadataRequest.FromString(bad).SerializeToString() != good
    assert 50 < readable < 250


@pytest.mark.parametrize("inputs", [len(DOORS), 1000, 999_999, 1_000_000])
def test_doors_share_all_inputs(inputs: int) -> None:
    found = fuzz.shares(list(DOORS), inputs)
    assert set(found) == set(DOORS)
    assert min(found.values()) >= 1
    assert sum(found.values()) >= inputs
    assert inputs < 1000 or sum(found.values()) == inputs


def test_memory_that_grows_is_a_failure() -> None:
    mib = 1 << 20
    leaking, steady = Tally("a"), Tally("b")
    leaking.rss_bytes = [(1000 * i, (100 + 10 * i) * mib) for i in range(20)]
    steady.rss_bytes = [(1000 * i, (100 if i else 50) * mib) for i in range(20)]
    assert [line.partition(" in ")[0] for line in fuzz.problems(leaking, 16 * mib)] == ["a: memory grows by 1000.0 MiB"]
    assert fuzz.problems(steady, 16 * mib) == []


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [(500, b"{}", "5xx"), (502, b"{}", "5xx"), (503, b"{}", "5xx"), (200, b'File "/a/b.py", line 3, in c', "crash"),
     (400, b'{"error": "File \\"/a/b.py\\", line 3"}', "crash"), (100, b"", "crash")],
)  # fmt: skip
def test_what_no_reply_may_be(status: int, body: bytes, kind: str) -> None:
    with pytest.raises(Violation) as caught:
        judged(status, {}, body)
    assert caught.value.kind == kind


def call_error(code: grpc.StatusCode, details: str, **trailing: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing.items()), details)


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [(grpc.StatusCode.INTERNAL, "", "5xx"), (grpc.StatusCode.UNKNOWN, "Unexpected <class 'KeyError'>", "5xx"),
     (grpc.StatusCode.UNAVAILABLE, "later", "5xx"), (grpc.StatusCode.NOT_FOUND, 'File "a.py", line 3', "crash")],
)  # fmt: skip
def test_how_no_call_may_end(code: grpc.StatusCode, details: str, kind: str) -> None:
    with pytest.raises(Violation) as caught:
        refused(call_error(code, details))
    assert caught.value.kind == kind


def test_how_a_call_may_end() -> None:
    assert refused(call_error(grpc.StatusCode.INVALID_ARGUMENT, "no")) == "refused"
    assert refused(call_error(grpc.StatusCode.UNAVAILABLE, "later", **{"retry-after": "1"})) == "refused"


def test_what_a_reply_may_be() -> None:
    assert judged(200, {}, b"{}") == "accepted"
    assert judged(404, {}, b"the file a.py, line 3") == "refused"
    assert judged(503, {"retry-after": "1"}, b"") == "refused"
