"""What int8 weights and bfloat16 cost in quality: a model beside itself in float32, over a text it has not seen.

    python tools/quantize_quality.py models/demo --text tinyshakespeare.txt --held-out

Windows of the text go through the stages' own code, all of the model in one stage. From the distributions of the next
token come: perplexity, the mean KL divergence from float32 in nats a token, and how often the likeliest token is the
same. Then the beginning of each of some windows is continued greedily: how far both agree, and in how many
continuations to the end.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import structlog
import torch
from tokenizers import Tokenizer

# run as a file, so the repository is not on the path yet
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from functions.contract.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from functions.contract.messages import Opening, Samples, Slice, Step
from functions.contract.sampling import SamplingParams
from functions.contract.spans import BlockSpan
from functions.quantize import Quantization
from functions.runner import Runner, load_runner
from functions.stage import Stage
from tools.demo_data import CorpusError, read_corpus, split_corpus

REFERENCE = "float32"
KINDS: dict[str, tuple[torch.dtype, Quantization]] = {
    REFERENCE: (torch.float32, "none"),
    "float32, int8 weights": (torch.float32, "int8"),
    "bfloat16": (torch.bfloat16, "none"),
    "bfloat16, int8 weights": (torch.bfloat16, "int8"),
}
_KV_BYTES_MAX = 4 << 30
_BATCH = 32  # continuations that travel together


@dataclass(frozen=True, slots=True)
class Quality:
    """`kl` in nats a token; `prefix` is the mean number of tokens before a continuation differs, `identical` the share
    of continuations that never do."""

    kind: str
    perplexity: float
    kl: float
    same_top: float
    prefix: float
    identical: float
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class Options:
    window: int
    windows: int | None
    prompt: int
    new_tokens: int
    continuations: int


def measure(checkpoint: Checkpoint, ids: Sequence[int], options: Options) -> Iterator[Quality]:
    """One for each of KINDS, over `ids`, the tokens of a text. Raises CheckpointError."""
    windows = torch.tensor(ids[: len(ids) // options.window * options.window]).view(-1, options.window)
    windows = windows[: options.windows]
    starts = windows[:: max(1, len(windows) // options.continuations)][: options.continuations, : options.prompt]
    reference = _load(checkpoint, REFERENCE)
    expected = list(continuations(reference, starts.tolist(), options.new_tokens))
    for kind in KINDS:
        runner = reference if kind == REFERENCE else _load(checkpoint, kind)
        loss, kl, same = (
            sum(values) / len(windows) for values in zip(*compared(reference, runner, windows), strict=True)
        )
        found = continuations(runner, starts.tolist(), options.new_tokens)
        prefixes = [common(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
        identical = sum(length == options.new_tokens for length in prefixes) / len(prefixes)
        yield Quality(
            kind, math.exp(loss), kl, same, sum(prefixes) / len(prefixes), identical, runner.model.weight_bytes
        )


def compared(reference: Runner, runner: Runner, windows: torch.Tensor) -> Iterator[tuple[float, float, float]]:
    """Of each window (loss, KL divergence, share of tokens with the same likeliest successor), means of its tokens."""
    for window in windows:
        theirs, ours = log_probabilities(reference, window), log_probabilities(runner, window)
        loss = -ours[:-1].gather(1, window[1:, None]).mean()
        kl = (theirs.exp() * (theirs - ours)).sum(1).mean()
        yield loss.item(), kl.item(), (theirs.argmax(1) == ours.argmax(1)).double().mean().item()


def log_probabilities(runner: Runner, window: torch.Tensor) -> torch.Tensor:
    """float64 [tokens, vocabulary]: what the model expects after each token."""
    logits = runner.model.logits(runner.texts([len(window)], window, None))
    return torch.log_softmax(logits.double(), dim=-1)


def continuations(runner: Runner, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterator[list[int]]:
    """Greedy, some of them together."""
    stage = Stage(runner, _KV_BYTES_MAX)
    for first in range(0, len(prompts), _BATCH):
        batch = {first + index + 1: list(prompt) for index, prompt in enumerate(prompts[first : first + _BATCH])}
        sent, openings = dict.fromkeys(batch, 0), {i: Opening(SamplingParams(), len(text)) for i, text in batch.items()}
        for _ in range(new_tokens):
            slices = tuple(Slice(i, sent[i], len(text) - sent[i]) for i, text in batch.items())
            tokens = np.array([token for i, text in batch.items() for token in text[sent[i] :]], dtype=np.int32)
            sent = {i: len(text) for i, text in batch.items()}
            for item in cast(Samples, stage.step(Step(slices, tokens, None, openings))).items:
                batch[item.sequence].append(item.token)
            openings = {}
        for i, text in batch.items():
            stage.kv.release([i])
            yield text[len(prompts[i - 1]) :]


def common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def _load(checkpoint: Checkpoint, kind: str) -> Runner:
    dtype, quantization = KINDS[kind]
    return load_runner(checkpoint, BlockSpan(0, checkpoint.block_count), dtype, torch.device("cpu"), quantization)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("model", help="folder of a checkpoint, with its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="a text that the model has not seen")
    parser.add_argument("--held-out", action="store_true", help="only what the demonstration model's training left out")
    parser.add_argument("--window", type=int, default=512, help="tokens that are read at once (512)")
    parser.add_argument("--windows", type=int, help="read no more than so many windows")
    parser.add_argument("--continuations", type=int, default=64, help="how many windows are continued (64)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a window that are continued (32)")
    parser.add_argument("--new-tokens", type=int, default=64, help="length of a continuation (64)")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each kind")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = _arguments(argv)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # figures alone go to stdout
    try:
        checkpoint = open_checkpoint(given.model)
        text = read_corpus(given.text)
        tokenizer = Tokenizer.from_file(str(Path(given.model) / "tokenizer.json"))
        ids = tokenizer.encode(split_corpus(text)[1] if given.held_out else text, add_special_tokens=False).ids
        options = Options(given.window, given.windows, given.prompt, given.new_tokens, given.continuations)
        if min(asdict(options)[name] for name in ("window", "prompt", "new_tokens", "continuations")) < 1:
            raise CorpusError("--window, --prompt, --new-tokens and --continuations are at least 1")
        if not options.prompt <= options.window <= len(ids):
            raise CorpusError(
                f"--window {options.window} must be at least --prompt {options.prompt}, and at most the {len(ids)} "
                f"tokens of {given.text}"
            )
        if not given.json:
            print("| | perplexity | KL, nats | same likeliest | same for, tokens | identical | weights, MB |")
            print("| --- | --- | --- | --- | --- | --- | --- |")
        for one in measure(checkpoint, ids, options):
            print(json.dumps(asdict(one)) if given.json else _row(one), flush=True)
    except (CheckpointError, CorpusError) as error:
        print(f"quantize_quality: {error}", file=sys.stderr)
        return 1
    return 0


def _row(one: Quality) -> str:
    return (
        f"| {one.kind} | {one.perplexity:.3f} | {one.kl:.5f} | {one.same_top:.2%} | {one.prefix:.1f} | "
        f"{one.identical:.0%} | {one.weight_bytes / 1e6:.1f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
