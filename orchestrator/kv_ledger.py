"""How much KV memory has been promised to sequences, replica by replica. No I/O and no clock.

A stage has one or more replicas, each with a budget of its own. A lane is tied to one replica of each stage, but which
one is known only once its first step has been answered; until then what it was promised counts against every replica of
the stage, because the service may choose any. So no replica is promised more than it has, and a sequence that does not
fit now waits. All figures are tokens.

Budgets come from wakes. A replica that nobody has woken yet is taken to have what the stage's last woken one had; if
that was too much it says so (KvExhausted), and `full` lets nobody in until something there has ended.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

Homes = Sequence[str | None]  # replica per stage, None: not known yet


class KvLedger:
    def __init__(self, stages: int) -> None:
        self._sizes = [0] * stages  # by the stage's last wake
        self._budgets: list[dict[str, int]] = [{} for _ in range(stages)]
        self._promised: list[dict[str | None, int]] = [{} for _ in range(stages)]

    @property
    def largest(self) -> int:
        """The longest sequence that the chain can hold when it holds nothing else."""
        return min(self._sizes)

    def learn(self, stage: int, replica: str, free: int, total: int) -> None:
        """A replica has told its memory. What it holds for us is not free but is ours to promise; what others left
        there is neither."""
        self._budgets[stage][replica] = min(total, free + self.promised(stage, replica))

    def resize(self, stage: int, replica: str) -> None:
        """From now on this replica stands for all of its stage that have not told their memory."""
        self._sizes[stage] = self._budgets[stage][replica]

    def full(self, stage: int, replica: str) -> None:
        """The replica has less than it was thought to have: it cannot hold all that is promised there."""
        self._budgets[stage][replica] = max(0, self.promised(stage, replica) - 1)

    def forget(self, stage: int, replica: str) -> None:
        """The replica is gone or going; one that comes at the same address may have another budget."""
        self._budgets[stage].pop(replica, None)

    def known(self, stage: int, replica: str) -> bool:
        return replica in self._budgets[stage]

    def another(self, stage: int, tokens: int, others: Collection[str]) -> str | None:
        """A replica in use, none of `others`, that has room for so many tokens; None if there is none."""
        for replica in self._promised[stage]:
            if replica is not None and replica not in others and self._fits(stage, replica, tokens, 1.0):
                return replica
        return None

    def promised(self, stage: int, replica: str | None) -> int:
        return self._promised[stage].get(replica, 0)

    def fits(self, homes: Homes, tokens: int, share: float = 1.0) -> bool:
        """Whether a lane with these homes may take a sequence of `tokens` and leave all but `share` of each replica's
        memory free. A replica that holds nothing takes any: if it is too small after all, it says so itself."""
        return all(self._fits(stage, replica, tokens, share) for stage, replica in enumerate(homes))

    def promise(self, homes: Homes, tokens: int) -> None:
        for stage, replica in enumerate(homes):
            self._add(stage, replica, tokens)

    def free(self, homes: Homes, tokens: int) -> None:
        """`homes` as they were when the sequences left their lane."""
        self.promise(homes, -tokens)

    def move(self, stage: int, old: str | None, new: str, tokens: int) -> None:
        """A lane that was promised `tokens` is on another replica now."""
        self._add(stage, old, -tokens)
        self._add(stage, new, tokens)

    def _fits(self, stage: int, replica: str | None, tokens: int, share: float) -> bool:
        promised = self._promised[stage]
        if replica is not None:
            held, budget = promised.get(replica, 0), self._budgets[stage].get(replica, self._sizes[stage])
        else:
            held = max((n for home, n in promised.items() if home is not None), default=0)
            in_use = (size for home, size in self._budgets[stage].items() if home in promised)
            budget = min(in_use, default=self._sizes[stage])
        held += promised.get(None, 0)
        return held == 0 or held + tokens <= budget * share

    def _add(self, stage: int, replica: str | None, tokens: int) -> None:
        left = self.promised(stage, replica) + tokens
        if left > 0:
            self._promised[stage][replica] = left
        else:
            self._promised[stage].pop(replica, None)
            if replica is not None:
                self.forget(stage, replica)  # it is asked again when it is used again
