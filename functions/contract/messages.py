"""What a lane sends through the stages and what comes back: frozen values, checked when built.

One step of a lane carries, for each of its sequences, the next chunk of tokens (many in prefill, one in decode),
packed one after another without padding:

    slices        (seq 7, start 0, length 3)   (seq 9, start 41, length 1)
    tokens        [ t0     t1     t2            t41 ]                        int32 [4]
    hidden        [ h0     h1     h2            h41 ]                        [4, hidden], absent at the first stage

`docs/events.md` describes the same for readers of other languages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from functions.contract.errors import InvalidEvent
from functions.contract.frames import Buffer, Frame, Frames, pack, unpack
from functions.contract.sampling import SamplingParams

SEQUENCE_ID_BOUND = 1 << 53  # ids travel as JSON numbers too
POSITION_BOUND = 1 << 31
KV_PAGE_TOKENS = 8  # stages set memory for keys and values aside in pages of so many tokens of a sequence

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Slice:
    """The next `length` tokens of a sequence, from position `start` on; `sample` asks for the token after them."""

    sequence: int
    start: int
    length: int
    sample: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.sequence < SEQUENCE_ID_BOUND:
            raise InvalidEvent(f"a sequence id is in 1..2^53-1, got {self.sequence}")
        if self.start < 0 or self.length < 1 or self.start + self.length > POSITION_BOUND:
            raise InvalidEvent(
                f"sequence {self.sequence}: a slice needs start >= 0 and length >= 1, "
                f"got start {self.start}, length {self.length}"
            )

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Opening:
    """What the last stage must know of a sequence once; sent with every slice that starts at 0 (so also in replay).

    `prompt_length` tells prompt from answer when a replay brings both (presence and frequency penalties count
    the answer only)."""

    params: SamplingParams
    prompt_length: int

    def to_json(self) -> dict[str, Any]:
        return {"params": self.params.to_json(), "prompt_length": self.prompt_length}

    @classmethod
    def from_json(cls, data: Any) -> Opening:
        """Raises ValueError."""
        if not isinstance(data, dict) or set(data) != {"params", "prompt_length"}:
            raise ValueError("an opening has params and prompt_length")
        length = data["prompt_length"]
        if type(length) is not int or not 0 < length < POSITION_BOUND:
            raise ValueError(f"prompt_length must be a whole number > 0, got {length!r}")
        if not isinstance(data["params"], dict):
            raise ValueError("params must be an object")
        return cls(SamplingParams.from_json(data["params"]), length)


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of a lane. `tokens` int32 [sum of lengths]; `hidden` [sum of lengths, hidden size] or None."""

    slices: tuple[Slice, ...]
    tokens: Int32Array
    hidden: Frame | None = None
    openings: Mapping[int, Opening] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = sum(s.length for s in self.slices)
        ids = {s.sequence for s in self.slices}
        if not self.slices or len(ids) != len(self.slices):
            raise InvalidEvent("a step carries at least one slice, and each sequence at most once")
        if self.tokens.shape != (total,):
            raise InvalidEvent(f"the slices hold {total} tokens, tokens has shape {list(self.tokens.shape)}")
        if self.hidden is not None and (len(self.hidden.shape) != 2 or self.hidden.shape[0] != total):
            raise InvalidEvent(f"hidden must be [{total}, hidden size] like the tokens, got {list(self.hidden.shape)}")
        if set(self.openings) != {s.sequence for s in self.slices if s.start == 0}:
            raise InvalidEvent("openings must be given for exactly the sequences whose slice starts at 0")

    def to_body(self) -> list[Buffer]:
        """Safetensors bytes, in parts."""
        rows = np.array([(s.sequence, s.start, s.length, s.sample) for s in self.slices], dtype=np.int64)
        arrays = {"slices": Frame.of(rows), "tokens": Frame.of(self.tokens)}
        if self.hidden is not None:
            arrays["hidden"] = self.hidden
        metadata = {}
        if self.openings:
            opened = {str(sequence): opening.to_json() for sequence, opening in self.openings.items()}
            metadata["openings"] = json.dumps(opened, separators=(",", ":"))
        return pack(Frames(arrays, metadata))

    @classmethod
    def from_body(cls, body: Buffer) -> Step:
        """Views into `body`. Raises InvalidEvent."""
        frames = read_frames(body, required={"slices": "I64", "tokens": "I32"}, optional={"hidden"})
        rows = frames.arrays["slices"].numpy()
        if rows.ndim != 2 or rows.shape[1] != 4:
            raise InvalidEvent(f"slices must be int64 [n, 4], got {list(rows.shape)}")
        slices = tuple(Slice(s, start, length, bool(sample)) for s, start, length, sample in rows.tolist())
        return cls(
            slices,
            frames.arrays["tokens"].numpy(),
            frames.arrays.get("hidden"),
            _openings(frames.metadata.get("openings")),
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token chosen for one sequence. `position` is where it will stand when it is sent back."""

    sequence: int
    position: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), likeliest first


@dataclass(frozen=True, slots=True)
class Samples:
    """The last stage's answer to a step: one entry for each slice that asked for a sample."""

    items: tuple[Sampled, ...]

    def to_body(self) -> list[Buffer]:
        rows = [(s.sequence, s.position, s.token, len(s.top), s.logprob is not None) for s in self.items]
        logprobs = [s.logprob if s.logprob is not None else 0.0 for s in self.items]
        top = [pair for s in self.items for pair in s.top]
        arrays = {
            "samples": Frame.of(np.array(rows, dtype=np.int64).reshape(-1, 5)),
            "logprobs": Frame.of(np.array(logprobs, dtype=np.float32)),
            "top_tokens": Frame.of(np.array([token for token, _ in top], dtype=np.int32)),
            "top_logprobs": Frame.of(np.array([value for _, value in top], dtype=np.float32)),
        }
        return pack(Frames(arrays))

    @classmethod
    def from_body(cls, body: Buffer) -> Samples:
        """Raises InvalidEvent."""
        kinds = {"samples": "I64", "logprobs": "F32", "top_tokens": "I32", "top_logprobs": "F32"}
        frames = read_frames(body, required=kinds, optional=set())
        rows = frames.arrays["samples"].numpy()
        logprobs, tokens, values = (
            frames.arrays[name].numpy().tolist() for name in ("logprobs", "top_tokens", "top_logprobs")
        )
        flat = all(len(frames.arrays[name].shape) == 1 for name in ("logprobs", "top_tokens", "top_logprobs"))
        if rows.ndim != 2 or rows.shape[1] != 5 or not flat or len(logprobs) != len(rows):
            raise InvalidEvent(f"samples must be int64 [n, 5] with n logprobs, got {list(rows.shape)}")
        counts = rows[:, 3].tolist()
        if sum(counts) != len(tokens) or len(tokens) != len(values) or min(counts, default=0) < 0:
            raise InvalidEvent("top_tokens and top_logprobs do not match the counts in samples")
        items, at = [], 0
        for (sequence, position, token, count, has_logprob), logprob in zip(rows.tolist(), logprobs, strict=True):
            top = tuple(zip(tokens[at : at + count], values[at : at + count], strict=True))
            items.append(Sampled(sequence, position, token, logprob if has_logprob else None, top))
            at += count
        return cls(tuple(items))


@dataclass(frozen=True, slots=True)
class StageInfo:
    """A replica's answer to a wake: who it is and what it can hold."""

    model: str
    plan: str  # digest of the plan, see Plan.digest
    stage: int
    stages: int
    blocks: tuple[int, int]
    replica: str  # HOST:PORT that reaches this very replica
    dtype: str
    device: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    kv_bytes_per_token: int
    kv_bytes_max: int
    kv_bytes_used: int
    weight_bytes: int
    sequences: int

    @classmethod
    def from_json(cls, data: Any) -> StageInfo:
        """Members that this release does not know are left out. Raises ValueError for one that is missing or of another
        type, since admission computes with them."""
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
        values = {member.name: data[member.name] for member in fields(cls) if member.name in data}
        blocks = values.get("blocks")
        if not isinstance(blocks, list) or len(blocks) != 2 or not all(_is_count(block) for block in blocks):
            raise ValueError("blocks must be two whole numbers")
        values["blocks"] = (blocks[0], blocks[1])
        for member in fields(cls):
            if member.type == "str" and not isinstance(values.get(member.name, ""), str):
                raise ValueError(f"{member.name} must be a text")
            if member.type == "int" and not _is_count(values.get(member.name, 0)):
                raise ValueError(f"{member.name} must be a whole number of at least 0")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from None

    @property
    def kv_tokens_free(self) -> int:
        return (self.kv_bytes_max - self.kv_bytes_used) // max(1, self.kv_bytes_per_token)


def encode_release(sequences: Sequence[int]) -> bytes:
    """Data of a release event: the caches of these sequences may go. Unknown ones are no error."""
    return json.dumps({"sequences": list(sequences)}).encode()


def decode_release(body: Buffer) -> tuple[int, ...]:
    """Raises InvalidEvent."""
    try:
        data = json.loads(bytes(body))
        sequences = data["sequences"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InvalidEvent('the data of a release is {"sequences": [id, ...]}') from None
    if not isinstance(sequences, list) or not all(type(item) is int for item in sequences):
        raise InvalidEvent("sequences must be a list of sequence ids (whole numbers)")
    return tuple(sequences)


def read_frames(body: Buffer, required: Mapping[str, str], optional: set[str]) -> Frames:
    """Named arrays with just these names; `required` says the dtype of each. Raises InvalidEvent."""
    try:
        frames = unpack(body)
    except ValueError as error:
        raise InvalidEvent(f"the data is not a safetensors body: {error}") from None
    names = set(frames.arrays)
    if not set(required) <= names <= set(required) | optional:
        raise InvalidEvent(f"the data must hold {sorted(required)}, may hold {sorted(optional)}, got {sorted(names)}")
    for name, dtype in required.items():
        if frames.arrays[name].dtype != dtype:
            raise InvalidEvent(f"{name} must be {dtype}, got {frames.arrays[name].dtype}")
    return frames


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _openings(text: str | None) -> dict[int, Opening]:
    if text is None:
        return {}
    try:
        data = json.loads(text)
        return {int(sequence): Opening.from_json(entry) for sequence, entry in data.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidEvent(f"openings cannot be read: {error}") from None
