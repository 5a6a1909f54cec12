"""`stagecraft generate` as a process of its own, against real HTTP servers."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
MODELS = json.dumps({"object": "list", "data": [{"id": "tiny", "object": "model"}]})


@dataclass
class Script:
    """What the server answers, and what it was asked."""

    models: str = MODELS
    status: int = 200
    body: str = ""
    hold_open: bool = False
    asked: list[tuple[str, Any]] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)


def sse(*events: dict[str, Any], done: bool = True) -> str:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""])


def text_chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
ANSWER = sse(text_chunk("Good "), text_chunk("morrow", "length"), USAGE)


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """A server that plays the script; gives its base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, script.models)

        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            script.asked.append((self.path, json.loads(self.rfile.read(length))))
            self.answer(script.status, script.body)
            if script.hold_open:
                self.rfile.read(1)  # returns when the client hangs up
                script.hung_up.set()

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("connection", "close")
            self.end_headers()
            self.wfile.write(text.encode())
            self.wfile.flush()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator.cli", "generate", *arguments]


def generate(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, input=stdin, cwd=ROOT, check=False)


def test_text_goes_to_stdout_and_counts_to_stderr() -> None:
    with serving(Script(body=ANSWER)) as url:
        done = generate("Hello", "--url", url)
    assert (done.returncode, done.stdout) == (0, "Good morrow\n")
    assert "2 tokens in" in done.stderr
    assert "ended by length" in done.stderr


def test_options_reach_the_server_under_their_openai_names() -> None:
    script = Script(body=ANSWER)
    options = [
        "--max-tokens",
        "7",
        "--temperature",
        "0.5",
        "--top-p",
        "0.9",
        "--seed",
        "3",
        "--stop",
        "A",
        "--stop",
        "B",
    ]
    with serving(script) as url:
        generate("Hello", "--url", url, *options)
    path, body = script.asked[0]
    assert path == "/openai/v1/completions"
    assert body["stream"] is True
    wanted = {"model": "tiny", "prompt": "Hello", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert body | wanted == body
    assert body["stop"] == ["A", "B"]


def test_options_not_given_are_left_to_the_server() -> None:
    script = Script(body=ANSWER)
    with serving(script) as url:
        generate("Hello", "--url", url)
    assert not {"temperature", "top_p", "seed", "stop"} & set(script.asked[0][1])


def test_system_text_makes_a_chat() -> None:
    script = Script(
        body=sse({"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {"content": "Ay"}}]})
    )
    with serving(script) as url:
        done = generate("Who?", "--system", "Be brief", "--url", url)
    path, body = script.asked[0]
    assert path == "/openai/v1/chat/completions"
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert done.stdout == "Ay\n"


def test_a_dash_reads_the_prompt_from_standard_input() -> None:
    script = Script(body=ANSWER)
    with serving(script) as url:
        generate("-", "--url", url, stdin="from a pipe")
    assert script.asked[0][1]["prompt"] == "from a pipe"


def test_json_is_one_object_with_text_and_counts() -> None:
    with serving(Script(body=ANSWER)) as url:
        data = json.loads(generate("Hello", "--url", url, "--json").stdout)
    assert (data["text"], data["finish_reason"], data["completion_tokens"]) == ("Good morrow", "length", 2)
    assert data["seconds"] >= data["seconds_to_first_token"] >= 0


ERRORS = {
    "openai_shape": (404, json.dumps({"error": {"message": "no model x", "type": "t"}}), "404: no model x"),
    "kserve_shape": (503, json.dumps({"error": "Model is not ready."}), "503: Model is not ready."),
    "fastapi_shape": (422, json.dumps({"detail": [{"msg": "field required", "loc": ["body"]}]}), "422: field required"),
    "plain_text": (502, "bad\ngateway", "502: bad gateway"),
    "nothing": (500, "", "500: Internal Server Error"),
    "error_in_the_stream": (200, sse(text_chunk("a"), {"error": {"message": "stage lost"}}), "stopped: stage lost"),
    "stream_cut_off": (200, sse(text_chunk("a"), done=False), "broke off"),
    "not_json": (200, "data: {oops\n\n", "no OpenAI chunk"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_server_errors_are_one_line_and_exit_1(case: str) -> None:
    status, body, expected = ERRORS[case]
    with serving(Script(status=status, body=body)) as url:
        done = generate("Hello", "--url", url)
    assert done.returncode == 1
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_several_models_need_a_choice() -> None:
    models = json.dumps({"data": [{"id": "one"}, {"id": "two"}]})
    with serving(Script(models=models)) as url:
        done = generate("Hello", "--url", url)
    assert done.returncode == 1
    assert "--model: one, two" in done.stderr


def test_a_refused_connection_says_how_to_start_a_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = generate("Hello", "--url", f"http://127.0.0.1:{port}")
    assert done.returncode == 1
    assert "stagecraft up" in done.stderr


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1", "http://[::1"])
def test_an_unusable_url_is_named(url: str) -> None:
    done = generate("Hello", "--url", url)
    assert done.returncode == 1
    assert "--url" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_hangs_up_and_leaves_no_traceback() -> None:
    script = Script(body=sse(text_chunk("Good "), done=False), hold_open=True)
    with serving(script) as url, running(command("Hello", "--url", url)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == "Good "
        process.send_signal(signal.SIGINT)
        assert script.hung_up.wait(60)
        assert "Traceback" not in process.stderr.read()
        assert process.wait() == 130


@contextmanager
def running(argv: list[str]) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        yield process


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    with (
        serving(Script(body=sse(*[text_chunk("x" * 1000)] * 500))) as url,
        running(command("Hi", "--url", url)) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


def test_generate_against_the_real_system(demo_url: str) -> None:
    options = ("ROMEO:", "--url", demo_url, "--max-tokens", "8", "--temperature", "0")
    done = generate(*options, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert 1 <= data["completion_tokens"] <= 8
    assert data["text"]
    assert generate(*options).stdout == data["text"] + "\n"
