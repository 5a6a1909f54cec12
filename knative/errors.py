"""What can go wrong, for people and for programs.

KnativeError              message, and `status`: the HTTP status that says the same
├── ValidationError 400   a manifest that a cluster's webhook would refuse; nothing of it was applied
├── NotFound 404          no such object
└── Unavailable 503       the platform cannot do it now
"""

from __future__ import annotations

from collections.abc import Sequence


class KnativeError(Exception):
    """The text says what happened, what was expected and what to do."""

    status = 500

    def __str__(self) -> str:
        """Can be written anywhere: half a surrogate pair, which JSON can bring in, becomes an escape."""
        return super().__str__().encode(errors="backslashreplace").decode()


PROBLEMS_TOLD_MAX = 100  # a manifest of megabytes has room for more than anybody reads


class ValidationError(KnativeError):
    """`problems` are single complaints, in the words of Knative's admission webhook. The text has the first of them."""

    status = 400

    def __init__(self, problems: Sequence[str]) -> None:
        told = list(problems[:PROBLEMS_TOLD_MAX])
        if left := len(problems) - len(told):
            told.append(f"and {left} more problems")
        super().__init__("\n".join(told))
        self.problems = tuple(problems)


class NotFound(KnativeError):
    status = 404


class Unavailable(KnativeError):
    status = 503
