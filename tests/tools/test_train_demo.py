"""The training script of the demonstration model on a toy, and the model that is shipped."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tools import train_demo
from tools.demo_data import (
    IGNORED,
    SPECIAL_TOKENS,
    CorpusError,
    Speech,
    Windows,
    held_out_batches,
    split_corpus,
    split_speeches,
    train_tokenizer,
)
from tools.train_demo import Settings

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"

TOY = Settings(
    seed=7,
    threads=1,
    steps=24,
    tokens_per_step=128,
    learning_rate=1e-2,
    warmup_steps=4,
    evaluate_every=8,
    bfloat16=False,
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    blocks=2,
    heads=4,
    kv_heads=2,
    context=64,
)

MESSAGES = [
    {"role": "system", "content": "You are Romeo."},
    {"role": "user", "content": " Who goes there?\n"},
]


def toy_text() -> str:
    """Return about 15 kB of speeches made of few words, so that a few steps learn something."""
    rng = random.Random(0)
    words = ["the", "king", "is", "dead", "and", "thou", "shalt", "rise", "with", "love", "my", "lord"]
    lines = [" ".join(rng.choices(words, k=7)) + "." for _ in range(400)]
    return "\n\n".join(f"{rng.choice(['ROMEO', 'DUKE'])}:\n{line}" for line in lines) + "\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "plays.txt"
    path.write_text(toy_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def toy(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Train the toy once and return its folder and what ``run`` returned."""
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("toy")
    result = train_demo.run(corpus, out, TOY)
    torch.set_num_threads(threads)
    return out, result


def test_loss_falls(toy: tuple[Path, dict[str, Any]]) -> None:
    curve = toy[1]["curve"]
    assert [point["step"] for point in curve] == [8, 16, 24]
    assert curve[-1]["train"] < curve[0]["train"] - 0.5
    assert curve[-1]["held_out"] < curve[0]["held_out"] - 0.5
    assert toy[1]["held_out_loss"] == pytest.approx(min(p["held_out"] for p in curve), abs=0.02)


def test_same_seed_gives_the_same_loss_curve(
    toy: tuple[Path, dict[str, Any]],
    corpus: Path,
    tmp_path: Path,
) -> None:
    again = train_demo.run(corpus, tmp_path, TOY)
    assert again["curve"] == toy[1]["curve"]
    assert (tmp_path / "tokenizer.json").read_bytes() == (toy[0] / "tokenizer.json").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == (toy[0] / "model.safetensors").read_bytes()


def test_files_load_and_generate(toy: tuple[Path, dict[str, Any]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy[0])
    tokenizer = AutoTokenizer.from_pretrained(toy[0])
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == toy[1]["parameters"]
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    inputs = tokenizer("ROMEO:\n", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 4
    assert json.loads((toy[0] / "training.json").read_text())["curve"] == toy[1]["curve"]
    assert str(toy[1]["held_out_loss"]) in (toy[0] / "README.md").read_text()


def test_special_tokens_round_trip(toy: tuple[Path, dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy[0])
    text = "".join(SPECIAL_TOKENS)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_tokenizer_spells_any_text_and_starts_with_bos(toy: tuple[Path, dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy[0])
    text = "  Zoë's 1st\n\n\tword , 雪 🙂"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template_renders(toy: tuple[Path, dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy[0])
    rendered = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    system_and_user = "<|bos|><|system|>You are Romeo.<|end|><|user|>Who goes there?<|end|>"
    assert rendered == system_and_user + "<|assistant|>"
    answered = [*MESSAGES, {"role": "assistant", "content": "I."}]
    rendered = tokenizer.apply_chat_template(answered, tokenize=False)
    assert rendered == system_and_user + "<|assistant|>I.<|end|>"


def test_chat_template_refuses_an_unknown_role(toy: tuple[Path, dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy[0])
    with pytest.raises(Exception, match="Unknown role: ghost"):
        tokenizer.apply_chat_template([{"role": "ghost", "content": "Boo."}], tokenize=False)


def test_chat_windows_look_like_the_rendered_template() -> None:
    text = "ROMEO:\nThe king.\n\nDUKE:\nMy lord.\n\n" + "ROMEO:\nLove.\n\nDUKE:\nDead.\n\n" * 9
    tokenizer = train_tokenizer(text, 300)
    windows = Windows(text, tokenizer, chat_share=1.0, seed=0)
    inputs, targets = windows.batch(8, 32)
    opening = r"<\|bos\|>(<\|system\|>You are (Romeo|Duke)\.<\|end\|>)?<\|user\|>[^<]+<\|end\|>"
    for row, ahead in zip(inputs.tolist(), targets.tolist(), strict=True):
        window = tokenizer.decode(row, skip_special_tokens=False)
        assert re.match(opening, window)
        assert all(target in (IGNORED, following) for target, following in zip(ahead, row[1:], strict=False))
        assert not {tokenizer.token_to_id(t) for t in ("<|system|>", "<|user|>", "<|assistant|>")} & {*ahead}


def test_held_out_batches_predict_every_token_once() -> None:
    text = toy_text()[:2000]
    tokenizer = train_tokenizer(text, 300)
    batches = held_out_batches(text, tokenizer, length=48, rows=3)
    targets = torch.cat([batch[1] for batch in batches]).flatten()
    assert tokenizer.decode(targets[targets != IGNORED].tolist()) == text
    assert all((inputs[:, 0] == 0).all() for inputs, _ in batches)
    inputs, ahead = batches[0]
    assert torch.equal(inputs[:, 1:], ahead[:, :-1])


def test_corpus_is_cut_between_speeches() -> None:
    text = toy_text()
    train_text, held_out = split_corpus(text)
    assert train_text + held_out == text
    assert held_out.startswith(("ROMEO:\n", "DUKE:\n"))
    assert 0.09 < len(held_out) / len(text) <= 0.1
    assert split_speeches("A:\nOne.\nTwo.\n\nno speaker\n\nB:\n") == [Speech("A", "One.\nTwo.")]


def test_corpus_without_speeches_is_refused() -> None:
    with pytest.raises(CorpusError, match="separated by empty lines"):
        split_corpus("one line\n" * 50)


def test_window_length_and_learning_rate_over_a_run() -> None:
    settings = Settings(steps=100, warmup_steps=10)
    lengths = [train_demo.window_length(settings, step) for step in range(100)]
    assert lengths[:4] == [256, 256, 256, 512]
    assert lengths[-4:] == [512, 512, 512, 1024]
    rates = [train_demo.learning_rate(settings, step) for step in range(100)]
    assert max(rates) == rates[9] == settings.learning_rate
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.03 * settings.learning_rate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "absent.txt"], "Cannot read the corpus absent.txt"),
        (["--corpus", "absent.txt", "--steps", "0"], "--steps"),
        ([], "--corpus"),
    ],
)
def test_wrong_use_is_told_without_traceback(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(train_demo.app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_help_shows_an_example() -> None:
    result = CliRunner().invoke(train_demo.app, ["--help"])
    assert result.exit_code == 0
    assert "Example: python tools/train_demo.py --corpus" in result.output


def test_shipped_model_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 16_000_000
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    assert 4e6 < model.num_parameters() < 6e6
    assert model.config.model_type == "llama"


def test_shipped_model_answers_a_chat_and_stops() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    rendered = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert rendered.startswith(tokenizer.bos_token)
    assert rendered.endswith("<|assistant|>")
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    inputs = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=300, do_sample=False)
    assert output[0, -1] == tokenizer.eos_token_id == model.generation_config.eos_token_id


def test_shipped_card_states_the_measured_loss() -> None:
    training = json.loads((DEMO / "training.json").read_text(encoding="utf-8"))
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    assert f"| Loss | {training['held_out_loss']} nats per token |" in card
    assert f"| Bits per byte | {training['held_out_bits_per_byte']} |" in card
    assert f"{training['parameters']:,} parameters" in card
