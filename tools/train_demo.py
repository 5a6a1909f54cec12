"""Train the small demonstration model that is shipped in ``models/demo``.

A Llama of about five million parameters learns a file of plays on two CPU cores in half an hour. The
same seed and number of threads on the same machine give the same loss curve.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, dropout
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

# Run as a file, the interpreter knows only the folder of this file, not the one that holds `tools`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.demo_card import write_card
from tools.demo_data import (
    BOS,
    END,
    PAD,
    CorpusError,
    Windows,
    held_out_batches,
    read_corpus,
    save_tokenizer,
    split_corpus,
    token_id,
    train_tokenizer,
)

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs and targets, both ``[rows, length]`` token ids."""

console = Console(stderr=True)


@dataclass(frozen=True)
class Settings:
    """All that decides the outcome of a run, besides the corpus."""

    seed: int = 1
    threads: int = 2
    steps: int = 2200
    tokens_per_step: int = 2048
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    dropout: float = 0.15
    chat_share: float = 0.3
    evaluate_every: int = 110
    patience: int = 6
    bfloat16: bool = True
    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 512
    blocks: int = 8
    heads: int = 8
    kv_heads: int = 4
    context: int = 1024

    @property
    def window(self) -> int:
        """Tokens in most training windows: a quarter of the context, which two CPU cores can afford."""
        return self.context // 4

    @property
    def held_out_window(self) -> int:
        """Tokens in a window over which the held-out loss is taken."""
        return self.context // 2


@dataclass(frozen=True)
class Point:
    """One point of the loss curve: losses in nats per token, the train loss with dropout at work."""

    step: int
    train: float
    held_out: float


def build_model(settings: Settings, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Build the model with random weights and dropout on what every block adds to the residual stream."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=token_id(tokenizer, BOS),
        eos_token_id=token_id(tokenizer, END),
        pad_token_id=token_id(tokenizer, PAD),
    )
    model = LlamaForCausalLM(config)
    add_dropout(model, settings.dropout)
    return model


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Hook dropout behind the embedding and the last projection of attention and of the MLP.

    Dropout inside attention is left out: it forbids the fused kernel and halves the speed on a CPU.
    """

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return dropout(output, rate, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def window_length(settings: Settings, step: int) -> int:
    """Return the tokens per window: every fourth batch is twice as long, and all double near the end.

    Long windows teach the model to read on past the short ones; they are slower, so they come late.
    """
    length = settings.window * (2 if step % 4 == 3 else 1)
    return length * 2 if step >= 0.75 * settings.steps else length


def learning_rate(settings: Settings, step: int) -> float:
    """Return the rate for a step: linear warm-up, then half a cosine down to a fiftieth."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def build_optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only; shrinking norm gains would fight the normalisation."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    gains = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))


def batch_loss(
    model: LlamaForCausalLM,
    batch: Batch,
    *,
    bfloat16: bool,
    reduction: str = "mean",
) -> torch.Tensor:
    """Return the cross-entropy of a batch in nats, a scalar: per target, or the sum over all targets."""
    inputs, targets = batch
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits: torch.Tensor = model(input_ids=inputs, use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def held_out_nats(model: LlamaForCausalLM, batches: list[Batch], *, bfloat16: bool) -> float:
    """Return the sum of the losses of all held-out tokens in nats."""
    model.eval()
    total = sum(float(batch_loss(model, batch, bfloat16=bfloat16, reduction="sum")) for batch in batches)
    model.train()
    return total


def count_targets(batches: list[Batch]) -> int:
    """Return the number of held-out tokens."""
    return sum(int((targets >= 0).sum()) for _, targets in batches)


def train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW,
    windows: Windows,
    settings: Settings,
    step: int,
) -> float:
    """Take one optimizer step and return its train loss in nats per token."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, step)
    length = window_length(settings, step)
    batch = windows.batch(max(1, settings.tokens_per_step // length), length)
    loss = batch_loss(model, batch, bfloat16=settings.bfloat16)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def train(
    model: LlamaForCausalLM, windows: Windows, held_out: list[Batch], settings: Settings
) -> Iterator[Point | float]:
    """Train step by step, yielding the train loss of each step and a point after each evaluation."""
    optimizer = build_optimizer(model, settings)
    targets, losses = count_targets(held_out), list[float]()
    model.train()
    for step in range(settings.steps):
        losses.append(train_step(model, optimizer, windows, settings, step))
        yield losses[-1]
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
            held_out_loss = held_out_nats(model, held_out, bfloat16=settings.bfloat16) / targets
            yield Point(step + 1, sum(losses) / len(losses), held_out_loss)
            losses.clear()


def fit(model: LlamaForCausalLM, windows: Windows, held_out: list[Batch], settings: Settings) -> list[Point]:
    """Train, leave the weights of the best held-out loss in the model, and return the loss curve.

    Stops early after ``patience`` evaluations without a better loss; Ctrl-C keeps the best so far.
    """
    curve: list[Point] = []
    best: dict[str, torch.Tensor] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=settings.steps)
        try:
            for event in train(model, windows, held_out, settings):
                if isinstance(event, float):
                    progress.update(task, advance=1, description=f"loss {event:.3f}")
                    continue
                curve.append(event)
                lowest = min(curve, key=lambda point: point.held_out)
                console.print(f"step {event.step}: train {event.train:.4f}, held out {event.held_out:.4f}")
                if lowest is event:
                    best = {name: weight.clone() for name, weight in model.state_dict().items()}
                elif len(curve) - curve.index(lowest) > settings.patience:
                    console.print(f"stopping early: no better held-out loss since step {lowest.step}")
                    break
        except KeyboardInterrupt:
            console.print("interrupted: keeping the best weights so far")
    if not best:
        raise typer.Exit(130)
    model.load_state_dict(best)
    return curve


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write weights in bfloat16 with ``config.json`` and ``generation_config.json``."""
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    model.to(torch.bfloat16).save_pretrained(folder)


def saved_loss(folder: Path, held_out: list[Batch]) -> float:
    """Return the held-out nats of exactly what is saved, computed in float32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return held_out_nats(model, held_out, bfloat16=False)


def report(folder: Path, curve: list[Point], held_out: list[Batch], held_out_bytes: int) -> dict[str, object]:
    """Measure the saved model and return the part of ``training.json`` that describes the outcome."""
    nats, tokens = saved_loss(folder, held_out), count_targets(held_out)
    model = LlamaForCausalLM.from_pretrained(folder)
    return {
        "parameters": model.num_parameters(),
        "held_out_loss": round(nats / tokens, 4),
        "held_out_bits_per_byte": round(nats / math.log(2) / held_out_bytes, 4),
        "held_out_tokens": tokens,
        "held_out_bytes": held_out_bytes,
        "best_step": min(curve, key=lambda point: point.held_out).step,
        "curve": [asdict(point) for point in curve],
    }


def curve_table(curve: list[Point]) -> Table:
    """Lay out the loss curve as a table, the best point marked."""
    table = Table("step", "train loss", "held-out loss", "", title="Loss in nats per token")
    best = min(point.held_out for point in curve)
    for point in curve:
        mark = "best" if point.held_out == best else ""
        table.add_row(str(point.step), f"{point.train:.4f}", f"{point.held_out:.4f}", mark)
    return table


def run(corpus: Path, out: Path, settings: Settings) -> dict[str, object]:
    """Train on a corpus, write every file of the model to ``out``, and return ``training.json``."""
    started = time.monotonic()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    disable_progress_bar()
    train_text, held_out_text = split_corpus(read_corpus(corpus))
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(train_text, settings.vocab_size)
    windows = Windows(train_text, tokenizer, settings.chat_share, settings.seed)
    held_out = held_out_batches(held_out_text, tokenizer, settings.held_out_window, rows=4)
    model = build_model(settings, tokenizer)
    console.print(f"{model.num_parameters():,} parameters, {len(windows):,} training tokens")
    curve = fit(model, windows, held_out, settings)
    save_model(model, out)
    save_tokenizer(tokenizer, out, settings.context)
    result = {
        "settings": asdict(settings),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "wall_seconds": round(time.monotonic() - started),
        "training_tokens": len(windows),
        **report(out, curve, held_out, len(held_out_text.encode())),
    }
    (out / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_card(out)
    console.print(curve_table(curve))
    return result


app = typer.Typer(add_completion=False)


@app.command()
def main(
    corpus: Annotated[Path, typer.Option(help="Text file of plays to learn, UTF-8.")],
    out: Annotated[Path, typer.Option(help="Folder for the finished model.")] = Path("models/demo"),
    seed: Annotated[int, typer.Option(help="Seed of weights, windows and dropout.")] = Settings.seed,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = Settings.steps,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = Settings.threads,
    bfloat16: Annotated[
        bool, typer.Option(help="Multiply matrices in bfloat16; faster on CPUs with AVX512-BF16 or AMX.")
    ] = Settings.bfloat16,
) -> None:
    """Train the demonstration model and write it, with its loss curve, to a folder.

    Example: python tools/train_demo.py --corpus tinyshakespeare.txt --out models/demo --seed 1
    """
    settings = Settings(seed=seed, steps=steps, threads=threads, bfloat16=bfloat16)
    try:
        result = run(corpus, out, settings)
    except (CorpusError, OSError) as error:
        console.print("[red]error:[/]", escape(str(error)))
        raise typer.Exit(2) from error
    print(
        f"held-out loss {result['held_out_loss']} nats per token, "
        f"{result['held_out_bits_per_byte']} bits per byte; model in {out}"
    )


if __name__ == "__main__":
    app()
