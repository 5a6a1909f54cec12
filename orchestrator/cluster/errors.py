"""What can go wrong with a cluster, in words for people.

ClusterError          `problems`: complete sentences, one for each thing that is wrong
├── Unreachable       no answer from the API server, after as many tries as make sense
└── ApiError          the API server answered with an error; `status`, `reason` and `causes` are from its Status object
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_FORBIDDEN = re.compile(r'cannot (?P<verb>\w+) resource "(?P<resource>[^"]+)"(?: in API group "(?P<group>[^"]*)")?')
_HEALING = (429, 500, 502, 503, 504)  # another try may go well


class ClusterError(Exception):
    """`problems` are single complaints, each with what to do about it."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class Unreachable(ClusterError):
    """The API server gives no answer."""


@dataclass(frozen=True, slots=True)
class Cause:
    """A part of a refusal: which field, and why."""

    reason: str
    message: str
    field: str


class ApiError(ClusterError):
    """An answer other than 2xx. The message is the API server's own."""

    def __init__(self, status: int, answer: Mapping[str, Any], retry_after_s: float | None = None) -> None:
        details = answer.get("details") or {}
        self.status = status
        self.reason = str(answer.get("reason") or "")
        self.message = str(answer.get("message") or f"HTTP status {status}")
        self.kind = str(details.get("kind") or "")
        self.name = str(details.get("name") or "")
        self.retry_after_s = retry_after_s
        self.causes = tuple(
            Cause(str(cause.get("reason", "")), str(cause.get("message", "")), str(cause.get("field", "")))
            for cause in details.get("causes") or ()
        )
        super().__init__(readable(self))

    @property
    def heals(self) -> bool:
        """Whether another try may go well."""
        return self.status in _HEALING

    @property
    def conflicts(self) -> tuple[Cause, ...]:
        """Fields that other managers own and that would change; see server-side apply in the Kubernetes manual."""
        return tuple(cause for cause in self.causes if cause.reason == "FieldManagerConflict")


def readable(error: ApiError) -> str:
    """What the answer means, and what to do."""
    if error.status == 404 and error.kind == "namespaces":
        return f"there is no namespace {error.name}; make it first: kubectl create namespace {error.name}"
    if error.status == 401:
        return (
            "the cluster does not accept your credentials (401 Unauthorized); they may have expired: log in again, or "
            "choose other ones with --context"
        )
    if error.status == 403 and '"system:anonymous"' in error.message:
        return (
            "the cluster takes you for nobody (403 Forbidden, system:anonymous): the kubeconfig's user has no "
            "credentials, or the program that fetches them failed; log in again"
        )
    if error.status == 403 and (found := _FORBIDDEN.search(error.message)):
        resource = ".".join(part for part in (found["resource"], found["group"]) if part)
        return (
            f"you may not {found['verb']} {resource} (403 Forbidden): {error.message}; ask for a Role with "
            "that verb and resource"
        )
    if error.conflicts:
        return _conflict(error)
    return f"{error.message} ({error.status} {error.reason})" if error.reason else error.message


def _conflict(error: ApiError) -> str:
    fields = [f"  {cause.field}: {_manager(cause.message)}" for cause in error.conflicts]
    return "\n".join(
        [
            "somebody else has given these fields other values:",
            *fields,
            "take them over with --force-conflicts, or write the present values into the files",
        ]
    )


def _manager(message: str) -> str:
    """The name out of: conflict with "kubectl-edit" using serving.knative.dev/v1."""
    quoted = message.split('"')
    return f"set by {quoted[1]}" if len(quoted) >= 3 else message
