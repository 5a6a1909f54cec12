"""Model card of the demonstration model: figures from ``training.json`` and samples from the weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer, LlamaForCausalLM

# Run as a file, the interpreter knows only the folder of this file, not the one that holds `tools`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.demo_data import SPECIAL_TOKENS

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Stagecraft demonstration model

A Llama of {parameters:,} parameters that writes lines in the manner of Shakespeare's plays. It is small
enough to ship with the source and to run on one CPU core, and it has what a large chat model has: rotary
positions, grouped-query attention, a chat template and an end-of-sequence token. It is there to show and to
test serving, not to be useful.

- **Running text**: give it the beginning of a scene (`ROMEO:` and a new line) and it writes on, speaker by
  speaker, without an end of its own.
- **Chat**: through the chat template it answers a speech with a speech and ends with `{end}`. A system
  message `You are Romeo.` was in half of the training chats, with the name of the one who answers.

## Architecture

| | |
|---|---|
| Class | `LlamaForCausalLM` |
| Parameters | {parameters:,} (embedding shared with the output) |
| Blocks | {blocks} |
| Hidden size | {hidden_size} |
| MLP size | {intermediate_size} |
| Attention | {heads} heads, {kv_heads} key/value heads, rotary positions |
| Context | {context} tokens |
| Vocabulary | {vocab_size} tokens, byte-level BPE |
| Weights | bfloat16, `safetensors` |

Special tokens and their ids: {special}.

## Training

The corpus is `tinyshakespeare.txt`, 1.1 MB of Shakespeare's plays (public domain) as collected in
[karpathy/char-rnn](https://github.com/karpathy/char-rnn) under `data/tinyshakespeare/input.txt`. It is not
part of this repository. With the file at hand, this trains the model again:

```
python tools/train_demo.py --corpus tinyshakespeare.txt --out models/demo --seed {seed} \\
    --steps {steps} --threads {threads}
```

That took {minutes} minutes on 2 CPU cores: {steps_run} steps of {tokens_per_step} tokens, {chat_percent} % of
the windows as chats made of consecutive speeches, the rest as running text; dropout {dropout}, AdamW.
`training.json` holds all settings and the loss curve. The same seed and threads give the same curve on the
same kind of machine with the same versions of PyTorch and Transformers.

The last tenth of the corpus is held out from the weights and from the tokenizer:

| Held out | |
|---|---|
| Loss | {held_out_loss} nats per token |
| Bits per byte | {held_out_bits_per_byte} |
| Text | {held_out_tokens:,} tokens, {held_out_bytes:,} bytes, in windows of {held_out_window} tokens |
| Weights | of step {best_step}, the best of {evaluations} evaluations |

It is the saved bfloat16 weights that were measured, computed in float32. The same text chose the step, so
the figures flatter the model a little. The held-out tenth is most of *The Taming of the Shrew* and the first
scenes of *The Tempest*, of which the training part has little or nothing: much in it is new to the model.

## Samples

As they come; the seeds are fixed in `tools/demo_card.py`.
{samples}
## Limits

It knows only English like Shakespeare's, from one megabyte of it. It keeps the form of a play and the manner
of its speech, but makes little sense even within a line, misspells words, and repeats itself under greedy
decoding. It knows no facts, follows no instructions, and answers a modern question as if it were a line in a
play. Words of the corpus come back, and so do its century's views.

## Licence

Weights: Apache-2.0. Corpus: public domain.
"""

SAMPLES: tuple[tuple[str, str, str, int], ...] = (
    ("", "ROMEO:\n", "Running text, greedy", 0),
    ("", "First Citizen:\n", "Running text, temperature 0.8, top-p 0.95, seed 1", 1),
    (
        "You are Juliet.",
        "Good morrow, lady. Why do you weep?",
        "Chat, temperature 0.8, top-p 0.95, seed 2",
        2,
    ),
)
"""System message (empty for running text), prompt or user message, title, and seed (0: greedy)."""

SAMPLE_TOKENS = 140


def sample(model: LlamaForCausalLM, tokenizer: Any, system: str, prompt: str, seed: int) -> str:
    """Return the prompt and what the model writes after it, greedily for seed 0, without special tokens."""
    if system:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(seed)
    output: Any = model.generate(
        **inputs,
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=seed > 0,
        temperature=0.8 if seed else None,
        top_p=0.95 if seed else None,
        top_k=0 if seed else None,
    )
    written: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if system:
        return f"system:    {system}\nuser:      {prompt}\nassistant: {written.strip()}"
    return prompt + written.rstrip()


def write_card(folder: Path) -> None:
    """Write ``README.md`` of the model in a folder, from its ``training.json`` and from its weights."""
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    settings = training["settings"]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = "".join(
        f"\n{title}:\n\n```\n{sample(model, tokenizer, system, prompt, seed)}\n```\n"
        for system, prompt, title, seed in SAMPLES
    )
    special = ", ".join(f"`{token}` {tokenizer.convert_tokens_to_ids(token)}" for token in SPECIAL_TOKENS)
    values = {
        **settings,
        **training,
        "end": tokenizer.eos_token,
        "special": special,
        "minutes": max(1, round(training["wall_seconds"] / 60)),
        "steps_run": training["curve"][-1]["step"],
        "chat_percent": round(100 * settings["chat_share"]),
        "held_out_window": settings["context"] // 2,
        "evaluations": len(training["curve"]),
        "samples": samples,
    }
    (folder / "README.md").write_text(CARD.format(**values), encoding="utf-8")


def main(model: Annotated[Path, typer.Option(help="Folder written by train_demo.py.")]) -> None:
    """Write the model card of a trained demonstration model anew.

    Example: python tools/demo_card.py --model models/demo
    """
    write_card(model)


if __name__ == "__main__":
    typer.run(main)
