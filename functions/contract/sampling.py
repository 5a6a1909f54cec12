"""How the next token of a sequence is chosen. Travels to the last stage with a sequence's first chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 300  # entries; they travel in a step's header
SEED_BOUND = 1 << 53  # seeds travel as JSON numbers, exact up to 2^53


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Checked when built (ValueError says what is allowed). Defaults are greedy decoding without extras.

    temperature 0 is greedy. top_k 0 and top_p 1 and min_p 0 switch those filters off. `logprobs` is the
    number of alternatives to report per token (0: only the chosen one), None for no log-probabilities.
    Two runs with the same `seed` draw the same numbers at the same positions.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_k", self.top_k, 0, 1 << 31)
        _within("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("seed", self.seed, 0, SEED_BOUND - 1)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias may have {MAX_LOGIT_BIAS} entries, got {len(self.logit_bias)}")
        for token, bias in self.logit_bias.items():
            _within("logit_bias token", token, 0, 1 << 31)
            _within(f"logit_bias of token {token}", bias, -100.0, 100.0)

    @property
    def needs_history(self) -> bool:
        """Whether the choice depends on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults; token ids of logit_bias become strings, as JSON demands."""
        values = asdict(self)
        values["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        return {f.name: values[f.name] for f in fields(self) if values[f.name] != _DEFAULTS[f.name]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SamplingParams:
        """Inverse of `to_json`. Raises ValueError for unknown members, wrong types and wrong values."""
        unknown = sorted(set(data) - set(_DEFAULTS))
        if unknown:
            raise ValueError(f"unknown sampling parameters {unknown}; known are {sorted(_DEFAULTS)}")
        values = dict(data)
        bias = values.get("logit_bias", {})
        if not isinstance(bias, Mapping):
            raise ValueError("logit_bias must map token ids to numbers")
        values["logit_bias"] = {int(token): value for token, value in bias.items()}
        return cls(**values)


_INTEGERS = {"top_k", "seed", "logprobs", "logit_bias token"}
_DEFAULTS: dict[str, Any] = {f.name: {} if f.name == "logit_bias" else f.default for f in fields(SamplingParams)}


def _within(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    whole = name in _INTEGERS
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number, got {type(value).__name__}")
    # written so that NaN fails too
    if not ((low < value if low_open else low <= value) and value <= high):
        shown = repr(value) if isinstance(value, float) or abs(value) < SEED_BOUND * 2 else "a larger number"
        raise ValueError(f"{name} must be {'>' if low_open else '>='} {low:g} and <= {high:g}, got {shown}")
