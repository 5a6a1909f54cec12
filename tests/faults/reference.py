"""What the answers must be: by Transformers' own `generate`, in one process and without any stage."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

from tests.faults.workload import Ask


def greedy_answers(folder: Path, asks: Sequence[Ask]) -> dict[int, tuple[int, ...]]:
    """Token ids of the greedy ones among the asks, by their index; in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # every answer has its full length, as with ignore_eos
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only be in each other's way
    answers = {}
    for index, ask in enumerate(asks):
        if ask.sampling:
            continue
        ids = torch.tensor([ask.prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=ask.max_tokens, do_sample=False, pad_token_id=0
        )
        answers[index] = tuple(out[0, len(ask.prompt) :].tolist())
    torch.set_num_threads(threads)
    return answers
