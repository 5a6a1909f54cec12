"""What `stagecraft generate` counts as the time to the first token, where the server wakes for the list of models."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAKE_S = 0.3


class Waking(BaseHTTPRequestHandler):
    """Takes WAKE_S for the list of models, and nothing for an answer."""

    def do_GET(self) -> None:
        time.sleep(WAKE_S)
        self.answer(json.dumps({"data": [{"id": "tiny"}]}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        event = {"choices": [{"index": 0, "text": "Good", "finish_reason": "length"}]}
        self.answer(f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")

    def answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_the_clock_runs_while_the_look_at_the_models_wakes_the_server(stagecraft: Callable[..., Any]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Waking) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            done = stagecraft("generate", "To be", "--json", "--url", f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
    assert done.code == 0, done.err
    assert json.loads(done.out)["seconds_to_first_token"] >= WAKE_S
