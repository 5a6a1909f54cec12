"""Complaints about fields, in the words of knative.dev/pkg/apis (after apis/field_error.go)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

INT32_MAX = 2**31 - 1
ERRORS_MAX = 1000  # of one object; a manifest of megabytes can have a complaint for every few bytes


@dataclass(frozen=True, slots=True)
class FieldError:
    """`paths` are full: "spec.template.spec.containers[0].image". `details` is a second line for people.

    `at` is the place of a complaint that names it in its message already. `local` is one that a cluster would not make:
    only one machine cannot do it."""

    message: str
    paths: tuple[str, ...]
    details: str = ""
    at: str = ""
    local: bool = False

    @property
    def place(self) -> str:
        return self.at or (self.paths[0] if self.paths else "")

    def __str__(self) -> str:
        text = f"{self.message}: {', '.join(self.paths)}" if self.paths else self.message
        return f"{text}\n{self.details}" if self.details else text


@dataclass(slots=True)
class Problems:
    """Collects complaints about one object, ERRORS_MAX at the most, and what of it has no effect on one machine."""

    errors: list[FieldError] = field(default_factory=list)
    warnings: list[FieldError] = field(default_factory=list)

    def add(self, message: str, *paths: str, details: str = "") -> None:
        self._take(FieldError(message, paths, details))

    def cannot(self, message: str, *paths: str, details: str = "") -> None:
        """A complaint that a cluster would not make."""
        self._take(FieldError(message, paths, details, local=True))

    def warn(self, message: str, path: str) -> None:
        self.warnings.append(FieldError(message, (path,)))

    def unknown(self, path: str, details: str = "") -> None:
        self._take(FieldError(f'unknown field "{path}"', (), details, at=path))

    def missing(self, *paths: str) -> None:
        self.add("missing field(s)", *paths)

    def disallowed(self, *paths: str, details: str = "") -> None:
        self.add("must not set the field(s)", *paths, details=details)

    def invalid(self, value: object, path: str, details: str = "") -> None:
        self.add(f"invalid value: {shown(value)}", path, details=details)

    def invalid_key(self, key: str, path: str, details: str = "") -> None:
        self.add(f'invalid key name "{key}"', path, details=details)

    def bounds(self, value: object, path: str, low: object, high: object) -> None:
        self.add(f"expected {low} <= {shown(value)} <= {high}", path)

    def check_bounds(self, value: int, path: str, low: int, high: int) -> None:
        if not low <= value <= high:
            self.bounds(value, path, low, high)

    def parsed(self, parse: Callable[[object], object], value: object, path: str) -> None:
        """Complains where `parse` refuses `value` with a ValueError."""
        try:
            parse(value)
        except ValueError as error:
            self.invalid(value, path, str(error))

    def _take(self, error: FieldError) -> None:
        if len(self.errors) < ERRORS_MAX:
            self.errors.append(error)


def shown(value: object) -> str:
    """A value as a message shows it: one line, not endless."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return text if len(text) <= 200 else f"{text[:200]}..."


def below(path: str, parent: str) -> bool:
    """Whether `path` is `parent` or lies under it."""
    return path == parent or (path.startswith(parent) and path[len(parent)] in ".[") or parent == ""
