"""`stagecraft batch` against a broker that behaves, and one that does not; stopped in every way, and gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.batches.journal import Journal, JournalError, State, read_state
from orchestrator.batches.lines import Request, error_output
from orchestrator.batches.patience import retry_after_s

Batch = Callable[..., Any]
Prompts = Callable[[int], Path]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def ids(path: Path) -> list[str]:
    return sorted(line["custom_id"] for line in read(path))


def numbered(count: int) -> list[str]:
    return [f"line-{number:06}" for number in range(1, count + 1)]


def where(broker: Any, service: Any) -> list[str]:
    return ["--broker", broker.url, "--results", service.url]


# --- sending


def test_every_request_has_one_result_whatever_comes_twice(
    batch: Batch, broker: Any, results_service: Any, prompts: Prompts, tmp_path: Path
) -> None:
    broker.results, broker.copies = results_service.url, 3
    out = tmp_path / "out.jsonl"
    done = batch("submit", prompts(600), "-o", out, *where(broker, results_service), "--json")
    assert done.code == 0, done.err
    assert {name: done.json[name] for name in ("state", "sent", "completed", "failed", "bad_lines")} == {
        "state": "completed", "sent": 600, "completed": 600, "failed": 0, "bad_lines": 0
    }  # fmt: skip
    assert ids(out) == numbered(600)
    assert {mode for mode, _ in broker.posts} == {"batched"}
    assert len({event["id"] for event in broker.requests()}) == 600


def test_a_broker_without_batched_mode_gets_single_events(
    batch: Batch, broker: Any, prompts: Prompts, state_home: Path
) -> None:
    broker.takes_batches = False
    done = batch("submit", prompts(600), "--broker", broker.url)
    assert done.code == 0, done.err
    assert Counter(mode for mode, _ in broker.posts)["single"] == 600
    assert Counter(mode for mode, _ in broker.posts)["batched"] <= 3  # the chunks that were on their way
    assert sorted(event["customid"] for event in broker.requests()) == numbered(600)
    assert done.out.strip() == broker.requests()[0]["batch"]


def test_one_event_that_the_broker_refuses_does_not_stop_the_rest(
    batch: Batch, broker: Any, results_service: Any, prompts: Prompts, tmp_path: Path
) -> None:
    broker.results, broker.batch_refused = results_service.url, "line-000300"
    out = tmp_path / "out.jsonl"
    done = batch("submit", prompts(600), "-o", out, *where(broker, results_service))
    assert done.code == 1
    assert ids(out) == [one for one in numbered(600) if one != "line-000300"]
    (error,) = read(tmp_path / "out.jsonl.errors.jsonl")
    assert (error["error"]["code"], error["error"]["line"]) == ("refused_by_broker", 300)
    assert "that one is wrong" in error["error"]["message"]


def answers() -> list[Any]:
    """Of a broker in trouble."""
    from types import SimpleNamespace as Answer

    return [
        Answer(status=429, headers={"retry-after": "0"}, text="slow down", accepts=False),
        Answer(status=0, headers={}, text="", accepts=False),
        Answer(status=0, headers={}, text="", accepts=True),  # taken, and the answer lost
        Answer(status=507, headers={}, text="no room", accepts=False),
        Answer(status=503, headers={"retry-after": "0"}, text="", accepts=True),
        Answer(status=500, headers={}, text="", accepts=False),
    ]


def test_overload_a_full_disk_and_lost_connections_are_waited_for(
    batch: Batch, broker: Any, results_service: Any, prompts: Prompts, tmp_path: Path
) -> None:
    broker.results = results_service.url
    broker.script.extend(answers())
    out = tmp_path / "out.jsonl"
    done = batch("submit", prompts(300), "-o", out, *where(broker, results_service))
    assert done.code == 0, done.err
    assert ids(out) == numbered(300)
    assert len(broker.requests()) > 300  # some came twice, and were answered once
    assert not broker.script
    for told in ("429: slow down", "507: no room", "cannot be reached", "going on"):
        assert told in done.err


@pytest.mark.parametrize("status", [401, 404, 405, 302])
def test_an_address_that_is_no_broker_s_is_told_at_once(
    batch: Batch, broker: Any, prompts: Prompts, status: int, state_home: Path
) -> None:
    broker.script.extend([type(one)(**{**vars(one), "status": status, "accepts": False}) for one in answers()[:1]])
    done = batch("submit", prompts(3), "--broker", broker.url)
    assert done.code == 1
    assert f"it answers {status}" in done.err
    assert "check --broker" in done.err
    assert "stagecraft batch resume batch-" in done.err


def test_a_broker_that_took_something_before_is_waited_for(
    batch: Batch, broker: Any, prompts: Prompts, tmp_path: Path
) -> None:
    """While a platform is started again, its broker is not there for a moment."""
    file, journal = prompts(3), tmp_path / "b1.batch"
    state = State("b1", str(file), file.stat().st_size, None, broker.url, None, "m", 0.0, sent=1)
    Journal.create(journal, state).close()
    broker.script.extend([type(one)(**{**vars(one), "status": 404, "accepts": False}) for one in answers()[:1]])
    done = batch("resume", journal)
    assert (done.code, len(broker.requests())) == (0, 3), done.err
    assert "the broker answers 404" in done.err


@pytest.mark.parametrize(
    ("value", "expected"), [("3", 3.0), ("x", None), (None, None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("-1", None)]
)
def test_retry_after(value: str | None, expected: float | None) -> None:
    assert retry_after_s(value) == expected


# --- bad lines


def test_bad_lines_are_told_with_their_numbers_and_left_out(
    batch: Batch, broker: Any, results_service: Any, tmp_path: Path
) -> None:
    lines = [
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}',
        "{broken",
        "",
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "y"}}',
        '{"method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "y"}}',
        '{"custom_id": "b", "method": "POST", "url": "/v1/embeddings", "body": {"model": "m"}}',
        '{"prompt": "too long"}',
        *("[]" for _ in range(30)),
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    broker.results = results_service.url
    broker.outcome = lambda line: {
        "response": {
            "status_code": 400 if line["body"]["prompt"] == "too long" else 200,
            "body": {"error": {"message": "the prompt has 9 tokens"}},
        },
        "error": None,
    }
    done = batch("submit", source, "-o", out, *where(broker, results_service), "--json")
    assert done.code == 1
    assert {one["custom_id"]: one["response"]["status_code"] for one in read(out)} == {"a": 200, "line-000007": 400}
    errors = read(tmp_path / "out.jsonl.errors.jsonl")
    assert [(one["error"]["line"], one["error"]["code"]) for one in errors[:4]] == [
        (2, "invalid_json_line"),
        (4, "duplicate_custom_id"),
        (5, "missing_required_parameter"),
        (6, "invalid_url"),
    ]
    assert len(errors) == done.json["bad_lines"] == 34
    assert (done.json["sent"], done.json["completed"], done.json["failed"]) == (2, 1, 1)
    assert done.err.count("\nline ") == 20 + 1
    assert "line 7: answered with 400: the prompt has 9 tokens\n" in done.err
    assert "line 4: custom_id 'a' is that of line 1 already" in done.err
    assert "34 lines were left out" in done.err


def test_a_file_of_nothing_is_done_at_once(batch: Batch, broker: Any, results_service: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    done = batch("submit", tmp_path / "empty", "-o", tmp_path / "out", *where(broker, results_service), "--json")
    assert (done.code, done.json["state"], done.json["sent"], broker.posts) == (0, "completed", 0, [])
    assert (tmp_path / "out").read_bytes() == b""


# --- stopped and gone on with


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        threading.Event().wait(0.002)


def test_killed_again_and_again_it_ends_with_one_result_each(
    batch: Batch, start_batch: Any, broker: Any, results_service: Any, prompts: Prompts, tmp_path: Path
) -> None:
    broker.results, broker.copies = results_service.url, 2
    source, out = prompts(2500), tmp_path / "out.jsonl"
    journal, sent = tmp_path / "out.jsonl.batch", 0
    command = ["submit", source, "-o", out, *where(broker, results_service)]
    for kill in range(3):
        broker.room = 3  # so that a fast machine has something left to do
        size_bytes = out.stat().st_size if out.exists() else 0
        process = start_batch(*command)
        wait_for(lambda: broker.room == 0, process)
        # some of it is noted, so that the next round has something new to send and gets new results
        wait_for(partial(lambda before: read_state(journal).sent > before, sent), process)
        sent = read_state(journal).sent
        if kill:
            wait_for(partial(lambda before: out.stat().st_size > before, size_bytes), process)
        process.kill()
        process.wait()
        command = ["resume", out]
    broker.room = None
    state = read_state(journal)
    assert state.phase != "completed"
    with out.open("ab") as file:
        file.write(b"half a li" * 200_000)  # as a kill between file and journal leaves it
    done = batch("resume", out, "--json")
    assert done.code == 0, done.err
    assert ids(out) == numbered(2500)
    assert (done.json["sent"], done.json["completed"]) == (2500, 2500)
    assert {event["batch"] for event in broker.requests()} == {state.batch}
    assert len({event["id"] for event in broker.requests()}) == 2500


def test_ctrl_c_says_how_to_go_on(
    batch: Batch, start_batch: Any, broker: Any, results_service: Any, prompts: Prompts, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    process = start_batch("submit", prompts(700), "-o", out, *where(broker, results_service))
    wait_for(lambda: len(broker.requests()) == 700, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    name = read_state(tmp_path / "out.jsonl.batch").batch
    assert f"`stagecraft batch resume {name}` goes on" in err.splitlines()[-1]


def test_ctrl_c_while_standard_input_is_silent(start_batch: Any, broker: Any, tmp_path: Path) -> None:
    process = start_batch("submit", "-", "--broker", broker.url, stdin=subprocess.PIPE)
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()  # closes its input only after the end
    assert process.returncode == 130, err
    assert "goes on" in err
    assert "Fatal" not in err


def test_standard_input_is_gone_on_with_from_the_start(
    batch: Batch, start_batch: Any, broker: Any, prompts: Prompts, state_home: Path
) -> None:
    data = prompts(600).read_text()
    process = start_batch("submit", "-", "--broker", broker.url, stdin=subprocess.PIPE)
    process.stdin.write(data[: len(data) * 2 // 3])
    process.stdin.flush()
    wait_for(lambda: len(broker.requests()) >= 256, process)
    (path,) = (state_home / "stagecraft" / "batches").glob("*.batch")
    wait_for(lambda: read_state(path).sent >= 256, process)
    process.kill()
    process.wait()
    with prompts(600).open() as again:
        second = start_batch("resume", path.stem, stdin=again)
        out, err = second.communicate()
    assert second.returncode == 0, err
    assert out.strip() == path.stem
    assert sorted({event["customid"] for event in broker.requests()}) == numbered(600)
    with prompts(5).open() as other:
        third = start_batch("resume", path.stem, stdin=other)
        third.communicate()
    assert third.returncode == 0  # all is sent, so the input is not looked at


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text + '{"prompt": "more", "model": "m"}\n', "bytes now; it had"),
        (lambda text: text.replace("p1", "P1", 1), "are others now"),
    ],
)
def test_a_changed_input_is_refused(
    batch: Batch, broker: Any, prompts: Prompts, tmp_path: Path, change: Callable[[str], str], words: str
) -> None:
    source, out = prompts(600), tmp_path / "out.jsonl"
    name = begin(broker, source, out)
    source.write_text(change(source.read_text()))
    done = batch("resume", name, "--no-wait")
    assert done.code == 1
    assert words in done.err
    assert "submit it as a new batch" in done.err
    assert read_state(tmp_path / "out.jsonl.batch").sent == 256


def begin(broker: Any, source: Path, out: Path) -> str:
    """A batch whose first 256 lines are sent, as if it had been stopped then."""
    from orchestrator.batches.known import KnownBatches
    from orchestrator.batches.reader import InputReader

    size_bytes = source.stat().st_size
    state = State("batch-x", str(source), size_bytes, str(out), broker.url, None, None, 0.0)
    path = KnownBatches().journal_path(state.batch, out)
    journal = Journal.create(path, state)
    with source.open("rb") as stream:
        chunk = InputReader(stream, None).chunk()
    assert chunk is not None
    journal.claim(chunk.requests)
    journal.note_sent(chunk, len(chunk.requests), [])
    journal.close()
    KnownBatches().remember(state.batch, path)
    return state.batch


def test_what_was_sent_is_not_sent_again(batch: Batch, broker: Any, prompts: Prompts, tmp_path: Path) -> None:
    name = begin(broker, prompts(600), tmp_path / "out.jsonl")
    assert batch("resume", name, "--no-wait").code == 0
    assert sorted(event["customid"] for event in broker.requests()) == numbered(600)[256:]


def test_an_output_that_lost_lines_is_refused(batch: Batch, broker: Any, results_service: Any, prompts: Prompts,
                                              tmp_path: Path) -> None:  # fmt: skip
    broker.results, out = results_service.url, tmp_path / "out.jsonl"
    assert batch("submit", prompts(3), "-o", out, *where(broker, results_service)).code == 0
    out.write_bytes(out.read_bytes()[:50])
    done = batch("resume", out)
    assert done.code == 1
    assert "it was changed since" in done.err
    out.unlink()
    done = batch("resume", out)
    assert (done.code, out.exists()) == (1, False)
    assert "is gone" in done.err
    done = batch("results", out, "-o", tmp_path / "again.jsonl")
    assert done.code == 0, done.err
    assert ids(tmp_path / "again.jsonl") == numbered(3)


# --- cancelling


def test_a_running_batch_is_cancelled_from_elsewhere(
    batch: Batch, start_batch: Any, broker: Any, results_service: Any, prompts: Prompts, tmp_path: Path
) -> None:
    broker.results, out = results_service.url, tmp_path / "out.jsonl"
    answered = numbered(600)[:100]

    def only_some(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [event for event in events if event["type"].endswith("cancel.v1") or event["customid"] in answered]

    broker.answers = only_some
    process = start_batch("submit", prompts(600), "-o", out, *where(broker, results_service))
    wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") == 100, process)
    wait_for(lambda: read_state(tmp_path / "out.jsonl.batch").all_sent, process)
    done = batch("cancel", out, "--json")
    assert done.code == 0, done.err
    process.communicate()
    assert process.returncode == 0
    assert {name: done.json[name] for name in ("state", "sent", "completed", "cancelled")} == {
        "state": "cancelled", "sent": 600, "completed": 100, "cancelled": 500
    }  # fmt: skip
    assert ids(out) == numbered(600)
    codes = Counter((line["error"] or {}).get("code") for line in read(out))
    assert codes == {None: 100, "batch_cancelled": 500}
    assert [event["data"] for event in broker.events if event["type"].endswith("cancel.v1")] == [
        {"batch": done.json["batch"]}
    ]
    assert batch("resume", out).code == 0  # nothing is left to do
    assert len(read(out)) == 600


def test_a_stopped_batch_is_cancelled_and_sends_nothing_more(
    batch: Batch, broker: Any, prompts: Prompts, tmp_path: Path
) -> None:
    name = begin(broker, prompts(600), tmp_path / "out.jsonl")
    assert batch("cancel", name).code == 0
    assert ids(tmp_path / "out.jsonl") == numbered(600)[:256]
    assert broker.requests() == []


# --- looking


def test_status_list_and_results(
    batch: Batch, broker: Any, results_service: Any, prompts: Prompts, tmp_path: Path
) -> None:
    broker.results, out = results_service.url, tmp_path / "out.jsonl"
    done = batch("submit", prompts(40), "-o", out, *where(broker, results_service), "--json")
    name = done.json["batch"]
    for reference in (name, out, tmp_path / "out.jsonl.batch"):
        status = batch("status", reference, "--json")
        assert (status.json["batch"], status.json["state"]) == (name, "completed")
        assert (status.json["service"]["completed"], status.json["dead_letters"]) == (40, [])
    text = batch("status", name).out
    assert f"{name}, completed" in text
    assert "40 sent, 40 completed" in text
    assert name in [one["batch"] for one in batch("list", "--json").json["batches"]]
    assert name in batch("list").out
    printed = batch("results", name)
    assert sorted(json.loads(line)["custom_id"] for line in printed.out.splitlines()) == numbered(40)
    (tmp_path / "out.jsonl.batch").unlink()
    assert batch("list", "--json").json["batches"] == []
    assert batch("status", name).code == 1
    elsewhere = batch("status", name, "--results", results_service.url, "--json")
    assert elsewhere.json["service"]["completed"] == 40
    assert len(batch("results", name, "--results", results_service.url).out.splitlines()) == 40


def test_two_processes_do_not_work_on_one_batch(
    batch: Batch, start_batch: Any, broker: Any, results_service: Any, prompts: Prompts, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    process = start_batch("submit", prompts(3), "-o", out, *where(broker, results_service))
    wait_for(lambda: len(broker.requests()) == 3, process)
    done = batch("resume", out)
    assert done.code == 1
    assert "another process works on batch" in done.err


# --- the journal


def test_a_newer_journal_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    import sqlite3
    from contextlib import closing

    path = tmp_path / "x.batch"
    Journal.create(path, State("b", "-", None, None, "http://b", None, None, 0.0)).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 2")
        db.commit()
    before = path.read_bytes()
    with pytest.raises(JournalError, match="has version 2, this program knows version 1"):
        Journal(path)
    assert path.read_bytes() == before


def test_a_line_may_be_claimed_again_and_another_may_not(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "x.batch", State("b", "-", None, None, "http://b", None, None, 0.0))
    assert journal.claim([Request(1, "a", "m", b""), Request(2, "b", "m", b"")]) == []
    assert [str(bad) for bad in journal.claim([Request(2, "b", "m", b""), Request(3, "a", "m", b"")])] == [
        "line 3: custom_id 'a' is that of line 1 already; it must be unique in a batch"
    ]
    journal.close()


def test_a_result_that_comes_twice_or_is_of_no_request_is_not_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    journal = Journal.create(tmp_path / "x.batch", State("b", "-", None, str(out), "http://b", None, None, 0.0))
    journal.claim([Request(1, "a", "m", b""), Request(2, "b", "m", b"")])
    first, again, other = (error_output(id, name, "c", "m") for id, name in (("1", "a"), ("2", "a"), ("3", "z")))
    journal.receive([first, again, other], 3)
    journal.receive([again], 4)
    assert out.read_bytes() == first + b"\n"
    assert (journal.state.failed, journal.state.after) == (1, 4)
    journal.cancel_open()
    assert [line["custom_id"] for line in read(out)] == ["a", "b"]
    journal.close()


def test_an_output_is_never_overwritten(batch: Batch, broker: Any, prompts: Prompts, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    done = batch("submit", prompts(3), "-o", out, "--broker", broker.url, "--results", "http://127.0.0.1:9")
    assert done.code == 1
    assert "exists already" in done.err
    assert out.read_text() == "mine"
