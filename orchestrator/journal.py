"""What was sent to every stage but the first, kept so that a stage which has lost it can be sent it again: then only
that stage computes again, and not those before it. No I/O and no clock.

The bodies that go from stage to stage are kept as they are and unopened: keeping one costs no copy. A *page* is what
one step sent, and a sequence's *trail* the pages it is in, in the order of its positions:

    page      sequences 7 9 4, their rows 0 | 1 | 2..65     bodies: to stage 1, to stage 2
    trail 7   from position 0: page, 64: page, 65: page, ...

A page counts until the last of its sequences has left. There is a budget of bytes: what goes beyond it first takes out
of old pages what belongs to nobody any more, and then the trails of whole sequences, the longest first. Whoever has no
trail is replayed through the whole chain; it has one again as soon as it starts at 0 again.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Items

from functions.contract.frames import Buffer, Frame, unpack
from functions.contract.messages import Slice

_SLICE_BYTES = 64  # of the books, for each slice of a page


class Page:
    """What one step sent: the rows of `ids[i]` are offsets[i]..offsets[i + 1] of each body."""

    __slots__ = ("bodies", "bytes", "gone", "ids", "live", "offsets")

    def __init__(self, slices: Items[Slice], stages: int) -> None:
        self.ids = array("q", [piece.sequence for piece in slices])
        self.offsets = array("q", itertools.accumulate((piece.length for piece in slices), initial=0))
        self.bodies: list[Buffer | Frame | None] = [None] * stages  # a Frame where it has been opened
        self.bytes = _SLICE_BYTES * len(slices)
        self.live = self.offsets[-1]  # rows that belong to a trail
        self.gone: set[int] = set()  # sequences whose rows do not

    @property
    def rows(self) -> int:
        return self.offsets[-1]

    def length(self, sequence: int) -> int:
        index = self.ids.index(sequence)
        return self.offsets[index + 1] - self.offsets[index]

    def hidden(self, stage: int) -> Frame | None:
        """[rows, hidden size]; None if nothing was kept, or nothing that could be read."""
        body = self.bodies[stage]
        if body is not None and not isinstance(body, Frame):
            body = self.bodies[stage] = _hidden(body, self.rows)
        return body

    def part(self, stage: int, sequence: int, start: int, end: int) -> Frame | None:
        """Rows start..end of those that the sequence has here."""
        frame = self.hidden(stage)
        if frame is None:
            return None
        first = self.offsets[self.ids.index(sequence)]
        return cut(frame, first + start, first + end)


class _Trail:
    """The pages of a sequence and the position at which its rows begin in each, which grows."""

    __slots__ = ("pages", "starts")

    def __init__(self) -> None:
        self.starts = array("q")
        self.pages: list[Page] = []


class Journal:
    """`bytes` are held now. With one stage, or without a budget, nothing is kept."""

    def __init__(self, stages: int, bytes_max: int) -> None:
        self.bytes = 0
        self._stages = stages
        self._bytes_max = bytes_max if stages > 1 else 0
        self._trails: dict[int, _Trail] = {}
        self._wasteful: dict[Page, None] = {}  # pages that would shrink to half or less, the oldest first

    def open(self, slices: Items[Slice]) -> Page | None:
        """A page for a step that sets out now; None if nothing of it is to be kept. What trails held from the starts of
        its slices on is overwritten by it."""
        if not self._bytes_max:
            return None
        page = Page(slices, self._stages)
        trails, left = self._trails, False
        for piece in slices:
            trail = trails.get(piece.sequence)
            if piece.start == 0:
                if trail is not None:
                    self._erase(piece.sequence, trail, 0)
                trail = trails[piece.sequence] = _Trail()
            elif trail is None:
                page.gone.add(piece.sequence)
                page.live -= piece.length
                continue
            elif trail.starts[-1] >= piece.start:
                self._erase(piece.sequence, trail, piece.start)
            trail.starts.append(piece.start)
            trail.pages.append(page)
            left = True
        if not left:
            return None
        self.bytes += page.bytes
        return page

    def keep(self, page: Page, stage: int, body: Buffer) -> None:
        """Keeps the body that the page's step sends to the stage. The body must not change from now on."""
        if not page.live:
            return  # all its sequences have left
        page.bodies[stage] = body
        page.bytes += len(body)
        self.bytes += len(body)
        self._see_waste(page)
        if self.bytes > self._bytes_max:
            self._make_room()

    def rows(self, stage: int, sequence: int, start: int, end: int) -> Frame | None:
        """What the stage was sent of the sequence from position `start` up to `end` (later than start), as
        [end - start, hidden size]; None if not all of it is here."""
        trail, at = self._trails.get(sequence), end
        if trail is None:
            return None
        pieces: list[Frame] = []
        for first, page in zip(reversed(trail.starts), reversed(trail.pages), strict=True):
            if at <= start:
                break
            if first >= at:
                continue
            begin = max(first, start)
            if first + page.length(sequence) < at:
                return None
            piece = page.part(stage, sequence, begin - first, at - first)
            if piece is None:
                return None
            pieces.append(piece)
            at = begin
        if at > start or not pieces:
            return None
        data = b"".join(piece.data for piece in reversed(pieces))
        return Frame(pieces[0].dtype, (end - start, pieces[0].shape[1]), data)

    def forget(self, sequences: Iterable[int]) -> None:
        """They have left."""
        for sequence in sequences:
            trail = self._trails.pop(sequence, None)
            if trail is not None:
                self._erase(sequence, trail, 0)

    def _erase(self, sequence: int, trail: _Trail, position: int) -> None:
        """Takes the pages that begin at the position or later out of the trail."""
        while trail.starts and trail.starts[-1] >= position:
            trail.starts.pop()
            page = trail.pages.pop()
            page.live -= page.length(sequence)
            page.gone.add(sequence)
            if page.live:
                self._see_waste(page)
            else:
                self._free(page)

    def _free(self, page: Page) -> None:
        self.bytes -= page.bytes
        page.bytes = 0
        page.bodies = [None] * self._stages
        self._wasteful.pop(page, None)

    def _see_waste(self, page: Page) -> None:
        """Not as long as more bodies of its step may come."""
        if 2 * page.live <= page.rows and page.bodies[-1] is not None:
            self._wasteful[page] = None

    def _make_room(self) -> None:
        while self.bytes > self._bytes_max:
            if self._wasteful:
                self._shrink(next(iter(self._wasteful)))
            elif self._trails:
                longest = max(self._trails, key=lambda sequence: self._trails[sequence].starts[-1])
                self.forget([longest])
            else:
                return  # what is on its way just now

    def _shrink(self, page: Page) -> None:
        """Copies what belongs to trails, and lets the rest go. A row is copied about once in its life: what is left of
        a page is at most half of it each time."""
        del self._wasteful[page]
        kept = [index for index, sequence in enumerate(page.ids) if sequence not in page.gone]
        spans = [(page.offsets[index], page.offsets[index + 1]) for index in kept]
        before = page.bytes
        for stage in range(self._stages):
            frame = page.hidden(stage)
            if frame is not None:
                data = b"".join(cut(frame, start, end).data for start, end in spans)
                page.bodies[stage] = Frame(frame.dtype, (page.live, frame.shape[1]), data)
        page.ids = array("q", [page.ids[index] for index in kept])
        page.offsets = array("q", itertools.accumulate((end - start for start, end in spans), initial=0))
        page.gone = set()
        page.bytes = _SLICE_BYTES * len(kept) + sum(len(body.data) for body in page.bodies if isinstance(body, Frame))
        self.bytes += page.bytes - before


def _hidden(body: Buffer, rows: int) -> Frame | None:
    try:
        frame = unpack(body).arrays["hidden"]
    except (ValueError, KeyError):
        return None
    return frame if len(frame.shape) == 2 and frame.shape[0] == rows else None


def cut(frame: Frame, start: int, end: int) -> Frame:
    """Rows start..end of [n, width], without a copy."""
    row_bytes = len(frame.data) // frame.shape[0]
    data = memoryview(frame.data)[start * row_bytes : end * row_bytes]
    return Frame(frame.dtype, (end - start, frame.shape[1]), data)
