"""The whole model in one process behind HTTP: the least server there can be around Transformers' `generate`.

It loads MODEL and then listens on PORT. `POST /v1/completions` with {"prompt": TEXT, "max_tokens": N} is answered by a
stream of events, `data: {"choices": [{"text": ...}]}` for each token, and `data: [DONE]`. Greedy; one at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from queue import Queue
from threading import Thread
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging


class EveryToken(BaseStreamer):  # type: ignore[misc]  # Transformers has no types
    """Text after each token. Transformers' own streamer holds it back until a word ends, too late for a first token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: Queue[str | None] = Queue()
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_is_next:
            self._texts.put(self._tokenizer.decode(value.tolist()))
        self._prompt_is_next = False

    def end(self) -> None:
        self._texts.put(None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts.get, None)


class Completions(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    tokenizer: Any
    model: Any

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for text in self._texts(request["prompt"], request["max_tokens"]):
            self._send(json.dumps({"choices": [{"text": text}]}))
        self._send("[DONE]")

    def log_message(self, *_: object) -> None:
        """Not a line for each request."""

    def _texts(self, prompt: str, new_tokens: int) -> Iterator[str]:
        inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        streamer = EveryToken(self.tokenizer)
        options = {**inputs, "max_new_tokens": new_tokens, "do_sample": False, "streamer": streamer}
        worker = Thread(target=self.model.generate, kwargs=options, daemon=True)
        worker.start()
        yield from streamer
        worker.join()

    def _send(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    location = os.environ["MODEL"]
    Completions.tokenizer = AutoTokenizer.from_pretrained(location)
    Completions.model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32).eval()
    HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Completions).serve_forever()


if __name__ == "__main__":
    main()
