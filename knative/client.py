"""Asks a running platform by its control API, as the commands do: one thread, one question after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx

from knative.errors import KnativeError, NotFound, Unavailable, ValidationError

if TYPE_CHECKING:
    from knative.resources.documents import Document

CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one document. `action` is created, configured, unchanged or skipped; `note` says why."""

    kind: str
    namespace: str
    name: str
    action: str
    note: str = ""


class Client:
    """A context manager. Methods raise the KnativeError of the platform, and Unavailable when it has gone."""

    def __init__(self, socket: Path) -> None:
        # no limit on the time: applying and deleting wait for processes
        self._http = httpx.Client(
            # a socket of this machine: reading the trusted certificates would take longer than most questions
            transport=httpx.HTTPTransport(uds=str(socket), verify=False),
            base_url="http://platform",
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_error: object) -> None:
        self._http.close()

    def apply(self, documents: Sequence[Document], *, dry_run: bool = False) -> list[Applied]:
        body = {"documents": [asdict(document) for document in documents], "dry_run": dry_run}
        return [Applied(**entry) for entry in self._json("POST", "/apply", json=body)["applied"]]

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Returns when the replicas are gone."""
        self._json("DELETE", f"/objects/{_part(kind)}/{_part(namespace)}/{_part(name)}")

    def get(self, kind: str, namespace: str | None = None) -> list[dict[str, Any]]:
        """Manifests with their status; of all namespaces if none is named."""
        params = {} if namespace is None else {"namespace": namespace}
        items: list[dict[str, Any]] = self._json("GET", f"/objects/{_part(kind)}", params=params)["items"]
        return items

    def logs(
        self, namespace: str, name: str, *, follow: bool = False, previous: bool = False, tail: int | None = None
    ) -> Iterator[str]:
        """Text as it comes, each line behind the name of its pod in brackets; with `follow` without an end."""
        params: dict[str, int] = {"follow": int(follow), "previous": int(previous)}
        params |= {} if tail is None else {"tail": tail}
        with (
            _translated(),
            self._http.stream("GET", f"/logs/{_part(namespace)}/{_part(name)}", params=params) as answer,
        ):
            if answer.status_code >= 400:
                answer.read()
                raise _error(answer)
            yield from answer.iter_text()

    def status(self) -> dict[str, Any]:
        return self._json("GET", "/status")

    def metrics(self) -> bytes:
        """Prometheus text."""
        return self._answer("GET", "/metrics").content

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        data: dict[str, Any] = self._answer(method, path, **options).json()
        return data

    def _answer(self, method: str, path: str, **options: Any) -> httpx.Response:
        with _translated():
            answer = self._http.request(method, path, **options)
        if answer.status_code >= 400:
            raise _error(answer)
        return answer


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError:
        raise Unavailable(
            "the platform ended or was ended meanwhile; start one with `stagecraft local start` or `stagecraft up`"
        ) from None


def _error(answer: httpx.Response) -> KnativeError:
    """What the platform raised."""
    try:
        data = answer.json()
        text, problems = str(data["error"]), [str(problem) for problem in data["problems"]]
    except (ValueError, KeyError, TypeError):
        return KnativeError(f"the platform answered {answer.status_code}: {answer.text[:200]}")
    if answer.status_code == ValidationError.status:
        return ValidationError(problems or [text])
    kinds: dict[int, type[KnativeError]] = {NotFound.status: NotFound, Unavailable.status: Unavailable}
    return kinds.get(answer.status_code, KnativeError)(text)


def _part(text: str) -> str:
    return quote(text, safe="")
