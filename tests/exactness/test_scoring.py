"""Scoring: log-likelihoods and embeddings of a chain equal those of the whole model in Transformers, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from functions.contract.checkpoint import open_checkpoint
from functions.contract.scoring import Ask, Texts
from functions.contract.spans import BlockSpan
from functions.runner import load_runner
from functions.scoring import answers_of, parts, states_of
from functions.stage import frame_of

CUTS = (["0:4"], ["0:1", "1:4"], ["0:1", "1:2", "2:4"], ["0:1", "1:2", "2:3", "3:4"])
OTHERS = ("qwen3", "gemma2", "gpt_oss", "mixtral", "gpt2", "opt", "granite", "cohere2", "bloom", "falcon_h1", "mpt")
PASS_TOKENS = 50  # so that the texts take several passes, and most passes have several texts
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


@pytest.fixture
def score(checkpoint_of: Callable[[str], Path]) -> Callable[..., list[dict[str, Any]]]:
    """(architecture, spans, texts, ask) -> the answers of a chain of these spans, one a text."""

    def run(name: str, spans: Sequence[str], texts: Sequence[Sequence[int]], ask: Ask) -> list[dict[str, Any]]:
        checkpoint = open_checkpoint(str(checkpoint_of(name)))
        tokens = np.array([token for text in texts for token in text], dtype=np.int32)
        packed = Texts(tuple(map(len, texts)), tokens, None, ask)
        *firsts, last = (
            load_runner(checkpoint, BlockSpan.parse(span), torch.float32, torch.device("cpu")) for span in spans
        )
        for runner in firsts:
            hidden = torch.cat([states_of(runner, packed, part) for part in parts(packed, PASS_TOKENS)])
            sent = Texts(packed.lengths, packed.tokens, frame_of(hidden), ask).to_body()
            packed = Texts.from_body(bytearray(b"".join(sent)))
        answers: list[dict[str, Any]] = []
        for part in parts(packed, PASS_TOKENS):
            answers += answers_of(last, packed, part, len(answers))
        return answers

    return run


@pytest.fixture(scope="module")
def whole(checkpoint_of: Callable[[str], Path]) -> Callable[[str, Sequence[int]], tuple[torch.Tensor, torch.Tensor]]:
    """(architecture, text) -> log-probabilities of all tokens but the first, hidden states after the final norm."""
    from transformers import AutoModelForCausalLM

    loaded: dict[str, Any] = {}

    @torch.inference_mode()
    def forward(name: str, text: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in loaded:
            loaded.clear()
            loaded[name] = AutoModelForCausalLM.from_pretrained(
                checkpoint_of(name), attn_implementation="eager", dtype=torch.float32
            ).eval()
        ids = torch.tensor([list(text)])
        logprobs = torch.log_softmax(loaded[name](ids).logits[0, :-1], dim=-1)
        return logprobs.gather(1, ids[0, 1:, None])[:, 0], loaded[name].base_model(ids).last_hidden_state[0]

    return forward


def check(score: Any, whole: Any, name: str, spans: Sequence[str], texts: Sequence[Sequence[int]]) -> None:
    scores, means, lasts = (
        score(name, spans, texts, ask) for ask in (Ask(), Ask("embedding"), Ask("embedding", "last"))
    )
    for index, text in enumerate(texts):
        logprobs, states = whole(name, text)
        assert scores[index]["index"] == means[index]["index"] == index
        assert scores[index]["tokens"] == list(text)
        assert scores[index]["logprobs"][0] is None
        torch.testing.assert_close(torch.tensor(scores[index]["logprobs"][1:]), logprobs, **TOLERANCE)
        torch.testing.assert_close(torch.tensor(scores[index]["sum"]), logprobs.sum(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(torch.tensor(means[index]["embedding"]), states.mean(dim=0), **TOLERANCE)
        torch.testing.assert_close(torch.tensor(lasts[index]["embedding"]), states[-1], **TOLERANCE)
        if len(text) == 1:
            assert scores[index]["perplexity"] is None
        else:
            perplexity = torch.tensor(scores[index]["perplexity"], dtype=torch.float64)
            torch.testing.assert_close(perplexity, (-logprobs.double().mean()).exp(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("spans", CUTS, ids=[f"{len(spans)} stages" for spans in CUTS])
def test_any_number_of_stages_scores_as_the_whole_model(
    spans: list[str], score: Any, whole: Any, prompts: list[list[int]]
) -> None:
    check(score, whole, "llama", spans, prompts)


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures_score_as_the_whole_model(
    architecture: str, score: Any, whole: Any, prompts: list[list[int]]
) -> None:
    check(score, whole, architecture, ["0:1", "1:4"], prompts[:4])
