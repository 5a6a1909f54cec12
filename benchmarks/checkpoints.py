"""Random checkpoints, made in a process of their own: this one stays free of torch, as the orchestrator is.

`python -m benchmarks.checkpoints FOLDER '{"hidden_size": ...}'` is that process.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.bench import CORES, DEMO, Bench, MeasureError, child_environment
from benchmarks.prompts import spell

LLAMA_82M: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
# 516 MB in float32; the vocabulary is that of the demonstration model, whose tokenizer goes with it
LLAMA_129M: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 2048,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
# a row of 10 KiB in float32, and next to nothing to compute with it
WIDE: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


async def large(bench: Bench) -> Path:
    """The 82 M Llama, or the tiny one when only the machinery is tried."""
    return await make(bench, "tiny", TINY) if bench.quick else await make(bench, "llama-82m", LLAMA_82M)


async def make(bench: Bench, name: str, config: dict[str, Any]) -> Path:
    """A checkpoint of a random Llama in float32, made once."""
    folder = bench.folder / name
    if not folder.exists():
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.checkpoints", str(folder), json.dumps(config),
            env=child_environment(CORES), stdin=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        if await process.wait() != 0:
            raise MeasureError(f"the checkpoint {name} could not be made; the reason is above")
    return folder


async def speaking(bench: Bench, name: str, config: dict[str, Any]) -> Path:
    """A random checkpoint that takes and gives text, by the demonstration model's tokenizer."""
    folder = await make(bench, name, config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, folder)
    return folder


async def spelling(bench: Bench) -> Path:
    """The large model with a tokenizer whose every token is a word of its own (`prompts.spell`): texts can be compared
    token by token, and a prompt has as many tokens as it was given."""
    folder = await large(bench)
    vocabulary = {spell([token]): token for token in range(vocab_size(folder))}
    (folder / "tokenizer.json").write_text(json.dumps(_WORDS | {"model": _words_model(vocabulary)}))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


_WORDS: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": None,
    "decoder": None,  # words with spaces between them
}


def _words_model(vocabulary: dict[str, int]) -> dict[str, Any]:
    return {"type": "WordLevel", "vocab": vocabulary, "unk_token": next(iter(vocabulary))}


def vocab_size(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def main(folder: str, config: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(**json.loads(config), **ends)).save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
