"""Tokens to text while they arrive: never half a character, never a part of a stop text. No I/O.

    ids  ... 41  17 | 88  90        prefix = before 17, read = before 88
              |___|   |____|
             context   pending      pending is shown once the text no longer ends in U+FFFD (half a character)

The context tokens are decoded again with the pending ones, because decoders treat the first token apart (those after
SentencePiece drop its leading space).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]

_HALF = "\ufffd"
_PROMPT_TAIL = 6  # tokens of context; enough for a character of four byte tokens
_EAGER = 8  # pending tokens up to which every push decodes; past it each doubling does


class Detokenizer:
    """Incremental decoding. The pushed deltas and `finish` add up to the decoded whole; O(1) amortised a token.

    With `prompt` the text continues it, so that a leading space is kept; without, the text starts afresh."""

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        tail = list(prompt[-_PROMPT_TAIL:])
        if decode(tail).endswith(_HALF):
            tail = []
        self._ids = tail
        self._read = len(tail)
        self._shown = decode(tail)

    def push(self, token: int) -> str:
        """What became certain with `token`; "" while a character is incomplete."""
        self._ids.append(token)
        pending = len(self._ids) - self._read
        # a long run of tokens without text (garbage, or skipped special ones) must not cost its square
        if pending > _EAGER and pending & (pending - 1):
            return ""
        text = self._decode(self._ids)
        if len(text) <= len(self._shown) or text.endswith(_HALF):
            return ""
        return self._take(text)

    def finish(self) -> str:
        """What is left, incomplete characters as U+FFFD."""
        text = self._decode(self._ids)
        return self._take(text) if len(text) > len(self._shown) else ""

    def _take(self, text: str) -> str:
        delta = text[len(self._shown) :]
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._shown = self._decode(self._ids)
        return delta


class StopScanner:
    """Cuts a text at the stop text that is complete first (of several at once, the one that began first).

    The outcome does not depend on how the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown now. After a stop `stopped` is true, and nothing more comes."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = self._could_become_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held

    def _could_become_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop text begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


@dataclass(slots=True)
class TextStream:
    """Both together: token ids in, text to show out."""

    detokenizer: Detokenizer
    scanner: StopScanner
    length: int = 0  # characters decoded so far, held ones included

    @classmethod
    def of(cls, decode: Decode, stops: Sequence[str] = (), prompt: Sequence[int] = ()) -> TextStream:
        return cls(Detokenizer(decode, prompt), StopScanner(stops))

    @property
    def stopped(self) -> bool:
        return self.scanner.stopped

    def push(self, token: int) -> str:
        return self._scan(self.detokenizer.push(token))

    def finish(self) -> str:
        shown = self._scan(self.detokenizer.finish())
        return shown + self.scanner.finish()

    def _scan(self, text: str) -> str:
        self.length += len(text)
        return self.scanner.push(text)
