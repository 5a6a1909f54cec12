"""What one stage computes of whole texts: hidden states for the next stage, or the answer of the last one.

Texts go through the blocks in passes of bounded size. Nothing is kept of them: keys and values live for one pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from functions.contract.errors import InvalidEvent, PromptTooLong
from functions.contract.scoring import Ask, Texts
from functions.runner import Runner
from functions.stage import check_input, hidden_tensor, token_tensor

PASS_TOKENS = 2048  # of several texts; a longer one has a pass of its own
_LOGITS_BYTES = 64 << 20  # of float32 rows held at once


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the texts: those of one pass. `start` and `end` are their place among the tokens."""

    lengths: tuple[int, ...]
    start: int
    end: int


def check_texts(runner: Runner, texts: Texts, tokens_max: int) -> None:
    """Raises InvalidEvent, and PromptTooLong for a text that the model has no positions for."""
    model = runner.model
    if len(texts.tokens) > tokens_max:
        raise InvalidEvent(
            f"the event has {len(texts.tokens)} tokens, this stage takes {tokens_max} (STAGE_SCORE_TOKENS_MAX); send "
            "fewer texts in an event"
        )
    check_input(model, texts.tokens, texts.hidden)
    if (longest := max(texts.lengths)) > model.max_positions:
        raise PromptTooLong(f"a text has {longest} tokens; the model takes at most {model.max_positions}")


def parts(texts: Texts, pass_tokens: int = PASS_TOKENS) -> Iterator[Part]:
    """Neighbouring texts that together have at most `pass_tokens`."""
    lengths: list[int] = []
    start = at = 0
    for length in texts.lengths:
        if lengths and at + length - start > pass_tokens:
            yield Part(tuple(lengths), start, at)
            lengths, start = [], at
        lengths.append(length)
        at += length
    yield Part(tuple(lengths), start, at)


def states_of(runner: Runner, texts: Texts, part: Part) -> torch.Tensor:
    """Hidden states [n, hidden size] of a part, at the last stage after the final norm."""
    device, rows = runner.model.device, slice(part.start, part.end)
    hidden = None if texts.hidden is None else hidden_tensor(texts.hidden, device)[rows]
    return runner.texts(part.lengths, token_tensor(texts.tokens[rows], device), hidden)


def answers_of(runner: Runner, texts: Texts, part: Part, first: int) -> list[dict[str, Any]]:
    """One object a text, at the last stage; `first` is the number of the part's first text in its event."""
    states = states_of(runner, texts, part)
    pieces = torch.split(states, list(part.lengths))
    if texts.ask.want == "embedding":
        return [_embedding(piece, texts.ask, first + index) for index, piece in enumerate(pieces)]
    ids = torch.split(token_tensor(texts.tokens[part.start : part.end], states.device), list(part.lengths))
    return [
        _score(_logprobs(runner, piece, text), text.tolist(), first + index)
        for index, (piece, text) in enumerate(zip(pieces, ids, strict=True))
    ]


@torch.inference_mode()
def _logprobs(runner: Runner, states: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """Of each token but the first, given those before it."""
    rows = max(1, _LOGITS_BYTES // (4 * runner.model.vocab_size))
    found: list[float] = []
    for some, following in zip(torch.split(states[:-1], rows), torch.split(tokens[1:], rows), strict=True):
        if len(some):
            table = F.log_softmax(runner.model.logits(some).float(), dim=-1)
            found += table.gather(1, following[:, None])[:, 0].tolist()
    return found


def _score(logprobs: list[float], tokens: list[int], index: int) -> dict[str, Any]:
    """The first token has no log-probability: nothing stands before it."""
    total = math.fsum(logprobs)
    return {
        "object": "score",
        "index": index,
        "tokens": tokens,
        "logprobs": [None, *(_number(value) for value in logprobs)],
        "sum": _number(total),
        "perplexity": _perplexity(total, len(logprobs)),
    }


def _perplexity(total: float, count: int) -> float | None:
    """exp of the mean negative log-probability; None for a text of one token, and beyond what floats can say."""
    try:
        return _number(math.exp(-total / count)) if count else None
    except OverflowError:
        return None


@torch.inference_mode()
def _embedding(states: torch.Tensor, ask: Ask, index: int) -> dict[str, Any]:
    vector = states.float().mean(dim=0) if ask.pooling == "mean" else states[-1].float()
    return {"object": "embedding", "index": index, "embedding": [_number(value) for value in vector.tolist()]}


def _number(value: float) -> float | None:
    """With the digits that a float32 has; JSON knows no infinity."""
    return float(f"{value:.9g}") if math.isfinite(value) else None
