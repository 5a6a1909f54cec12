"""Transformers as people use it: `from_pretrained`, `generate`. Reads {"prompts": [[id, ...], ...], "new_tokens": N}
lines and answers each with {"tokens": [[id, ...], ...], "stamps_s": [...]}; `python -m benchmarks.peer_generate MODEL`.
A batch's shorter prompts are padded on the left.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging


class Stamps(BaseStreamer):  # type: ignore[misc]  # Transformers has no types
    """When each step's tokens were there."""

    def __init__(self) -> None:
        self.seen_s: list[float] = []

    def put(self, _value: torch.Tensor) -> None:
        self.seen_s.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    length = max(map(len, prompts))
    inputs = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    stamps = Stamps()
    started_s = time.perf_counter()
    output = model.generate(
        inputs,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=stamps,
    )
    # the first call of a streamer brings the prompt
    return {
        "tokens": output[:, length:].tolist(),
        "stamps_s": [seen_s - started_s for seen_s in stamps.seen_s[1:]],
    }


def main(location: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    model.eval()
    model.generation_config.eos_token_id = None  # always as many tokens as were asked for
    model.generation_config.pad_token_id = 0
    for line in sys.stdin:
        print(json.dumps(generate(model, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
