"""Serving as KServe's huggingface predictor does it without batching: a KServe `Model` in a `ModelServer`, which calls
Transformers' `generate` for one request after the other, however many wait.

It loads MODEL and listens on PORT. V1: `POST /v1/models/model:predict` with {"instances": [[id, ...]], "max_tokens": N}
is answered by {"predictions": [[id, ...]]}. Greedy; always as many tokens as were asked for.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from kserve import Model, ModelServer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

NAME = "model"


class OneAtATime(Model):  # type: ignore[misc]  # kserve has no types
    def __init__(self, model: Any) -> None:
        super().__init__(NAME)
        self._model = model
        self.ready = True

    def predict(self, payload: dict[str, Any], *_: object) -> dict[str, Any]:
        """Not a coroutine: KServe calls it on its event loop, and so one at a time."""
        return {"predictions": [self._answer(prompt, payload["max_tokens"]) for prompt in payload["instances"]]}

    def _answer(self, prompt: list[int], new_tokens: int) -> list[int]:
        inputs = torch.tensor([prompt])
        output = self._model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new_tokens, do_sample=False
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(os.environ["MODEL"], dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    server = ModelServer(http_port=int(os.environ["PORT"]), enable_grpc=False, workers=1)
    server.start([OneAtATime(model)])


if __name__ == "__main__":
    main()
