"""Text, tokenizer and training windows of the demonstration model.

The corpus is one text file of plays: speeches are separated by an empty line, and the first line of a
speech is the speaker's name followed by a colon. It is used in two forms: running text as it stands, and
chats made of consecutive speeches, so that one small model can both continue a play and answer a message.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, END, SYSTEM, USER, ASSISTANT, PAD = SPECIAL_TOKENS = (
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|pad|>",
)
"""Special tokens in the order of their ids, which start at 0."""

CHAT_TEMPLATE = (
    "{{- '<|bos|>' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('Unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

IGNORED = -100
"""Target id that the loss skips (the default ``ignore_index`` of ``cross_entropy``)."""

HELD_OUT_SHARE = 0.1
SYSTEM_SHARE = 0.5
"""Share of the training chats that open with a system message naming the one who answers."""


class CorpusError(ValueError):
    """The corpus cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Speech:
    """One speech of a play: who speaks, and the words without the speaker's line."""

    speaker: str
    text: str


def read_corpus(path: Path) -> str:
    """Read the corpus file as UTF-8 text with plain newlines."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise CorpusError(f"Cannot read the corpus {path}: {error.strerror}.") from error
    return text.replace("\r\n", "\n")


def split_corpus(text: str) -> tuple[str, str]:
    """Split into training and held-out text; the last tenth is held out, from the next speech on."""
    cut = text.find("\n\n", int(len(text) * (1 - HELD_OUT_SHARE)))
    if cut < 0:
        raise CorpusError("The corpus needs speeches separated by empty lines, also in its last tenth.")
    return text[: cut + 2], text[cut + 2 :]


def split_speeches(text: str) -> list[Speech]:
    """Cut running text into speeches, leaving out blocks without a speaker's line or without words."""
    speeches = []
    for block in text.split("\n\n"):
        name, _, words = block.strip().partition("\n")
        if name.endswith(":") and words.strip():
            speeches.append(Speech(name[:-1], words.strip()))
    return speeches


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which can spell any text; encoding puts the bos token first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    bos = (BOS, token_id(tokenizer, BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that the vocabulary is known to hold."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return found


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; ``context`` is the longest input in tokens."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Windows:
    """Random training windows over one text, as running text and as chats.

    Every window starts with bos at position 0, as every request to the finished model does.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, chat_share: float, seed: int) -> None:
        self.chat_share = chat_share
        self._generator = torch.Generator().manual_seed(seed)
        encoded = tokenizer.encode(text, add_special_tokens=False)
        self._tokens = torch.tensor(encoded.ids, dtype=torch.long)
        self._starts = torch.tensor(_speech_starts(text, encoded.offsets), dtype=torch.long)
        speeches = split_speeches(text)
        if len(speeches) < 2:
            raise CorpusError("The corpus needs at least two speeches ('NAME:', then lines of words).")
        self._speeches = [_ids(tokenizer, speech.text) for speech in speeches]
        self._systems = [_ids(tokenizer, f"You are {speech.speaker.title()}.") for speech in speeches]
        self._special = {token: token_id(tokenizer, token) for token in SPECIAL_TOKENS}

    def __len__(self) -> int:
        """Return the number of tokens in the running text."""
        return len(self._tokens)

    def batch(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw inputs and targets, both ``[rows, length]`` token ids; targets are one position ahead."""
        if length >= len(self):
            raise CorpusError(f"The training text has {len(self)} tokens, too few for windows of {length}.")
        pairs = [self._window(length) for _ in range(rows)]
        return torch.stack([inputs for inputs, _ in pairs]), torch.stack([targets for _, targets in pairs])

    def _window(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._chat(length) if self._chance(self.chat_share) else self._play(length)

    def _chance(self, share: float) -> bool:
        return bool(torch.rand((), generator=self._generator) < share)

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self._generator))

    def _play(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return running text from anywhere; half of the windows move back to a speaker's name."""
        start = self._below(len(self) - length)
        if self._chance(0.5):
            start = int(self._starts[torch.searchsorted(self._starts, start, right=True) - 1])
        targets = self._tokens[start : start + length]
        return torch.cat([torch.tensor([self._special[BOS]]), targets[:-1]]), targets

    def _chat(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return consecutive speeches as alternating turns, user first, cut where the window ends."""
        first = self._below(len(self._speeches))
        ids, kept = [self._special[BOS]], [False]
        if self._chance(SYSTEM_SHARE):
            answering = self._systems[(first + 1) % len(self._speeches)]
            ids += [self._special[SYSTEM], *answering, self._special[END]]
            kept += [False] * (len(answering) + 2)
        turn = 0
        while len(ids) <= length:
            speech = self._speeches[(first + turn) % len(self._speeches)]
            # Role tokens come from the template, never from the model, so they are no targets.
            ids += [self._special[ASSISTANT if turn % 2 else USER], *speech, self._special[END]]
            kept += [False] + [True] * (len(speech) + 1)
            turn += 1
        row, mask = torch.tensor(ids[: length + 1]), torch.tensor(kept[: length + 1])
        return row[:-1], row[1:].masked_fill(~mask[1:], IGNORED)


def held_out_batches(
    text: str, tokenizer: Tokenizer, length: int, rows: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut held-out text into ``[<= rows, length]`` inputs and targets in which every token is a target once.

    Each window starts afresh with bos, so the loss is one of at most ``length`` tokens of context.
    """
    tokens = torch.tensor(_ids(tokenizer, text), dtype=torch.long)
    count = -(-len(tokens) // length)
    inputs = torch.full((count * length,), token_id(tokenizer, PAD))
    targets = torch.full((count * length,), IGNORED)
    inputs[1 : len(tokens)] = tokens[:-1]
    inputs[::length] = token_id(tokenizer, BOS)
    targets[: len(tokens)] = tokens
    inputs, targets = inputs.view(count, length), targets.view(count, length)
    return [(inputs[row : row + rows], targets[row : row + rows]) for row in range(0, count, rows)]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _speech_starts(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """Return the index of the first token of every speech; ``offsets`` are character spans of tokens."""
    return [0] + [
        index
        for index, (start, _) in enumerate(offsets)
        if start >= 2 and text[start - 2 : start] == "\n\n" and text[start] != "\n"
    ]
