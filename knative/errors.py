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


class ValidationError(KnativeError):
    """`problems` are single complaints, in the words of Knative's admission webhook."""

    status = 400

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class NotFound(KnativeError):
    status = 404


class Unavailable(KnativeError):
    status = 503
