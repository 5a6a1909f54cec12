"""Which events a Trigger passes on (knative/eventing pkg/eventfilter and pkg/apis/eventing/v1/trigger_validation.go).

`filters`, if there are any, are used in place of `filter`. Stricter than Knative, which takes some wrong filters and
then skips them or fails on each event: an entry without a dialect, an empty value, CESQL with an unknown function.
CESQL that fails or gives no boolean does not pass (there, a result that is no boolean ends the filter process). How
many filters a Trigger may have is bounded, since each event has to wait for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from knative.errors import ValidationError
from knative.eventing.cesql.expression import compile_expression
from knative.eventing.cesql.lexer import ParseError
from knative.eventing.event import CloudEvent
from knative.resources.field_errors import Problems

Predicate = Callable[[CloudEvent], bool]

DIALECTS = ("exact", "prefix", "suffix", "all", "any", "not", "cesql")
NESTING_MAX = 32
ENTRIES_MAX = 1000  # of one Trigger, those inside others too
CESQL_CHARACTERS_MAX = 65_536  # of all expressions of one Trigger
_NAME = re.compile(r"[a-z][a-z0-9]*")
_NAME_RULE = "Attribute name must start with a letter and can only contain lowercase alphanumeric"


@dataclass(frozen=True, slots=True)
class Filter:
    """`predicate` None: everything passes."""

    predicate: Predicate | None = None

    def passes(self, event: CloudEvent) -> bool:
        """Whether the event is for the Trigger. Raises nothing."""
        return self.predicate is None or self.predicate(event)


def compile_filter(trigger_spec: Mapping[str, object]) -> Filter:
    """The filter of a Trigger's spec. Raises ValidationError with every problem, named by path below "spec"."""
    problems = Problems()
    compiled = read_filter(trigger_spec, problems)
    if problems.errors:
        raise ValidationError([str(error) for error in problems.errors])
    return compiled


def read_filter(trigger_spec: Mapping[str, object], problems: Problems, path: str = "spec") -> Filter:
    """As compile_filter; what is wrong goes to `problems`."""
    by_attributes = _read_attributes(trigger_spec.get("filter"), problems, f"{path}.filter")
    entries = trigger_spec.get("filters")
    if entries is None or entries == []:
        return Filter(by_attributes)
    if not _within_bounds(entries, problems, f"{path}.filters"):
        return Filter(_never)
    predicates = _read_list(entries, problems, f"{path}.filters", 1)
    return Filter(_all(predicates))


def _read_attributes(tree: object, problems: Problems, path: str) -> Predicate | None:
    """`filter.attributes`. A value of "" passes any that is not empty. An extension that is a number or boolean in a
    JSON event equals no value, since Knative compares it with its type; `filters` compare the text."""
    if tree is None:
        return None
    if not isinstance(tree, Mapping):
        problems.invalid(tree, path, "expected a mapping with attributes")
        return None
    for name in sorted(str(key) for key in tree if key != "attributes"):
        problems.unknown(f"{path}.{name}")
    wanted = _read_texts(tree.get("attributes") or {}, problems, f"{path}.attributes", may_be_empty=True)

    def passes(event: CloudEvent) -> bool:
        for name, value in wanted.items():
            found = _attribute(event, name)
            if not found or (value and (found != value or name in event.typed)):
                return False
        return True

    return passes if wanted else None


def _within_bounds(entries: object, problems: Problems, path: str) -> bool:
    """Whether there are few enough filters to read them all; complains if not."""
    count = characters = 0
    left: list[tuple[object, int]] = [(entries, 1)]
    while left:
        members, nesting = left.pop()
        if not isinstance(members, list) or nesting > NESTING_MAX:
            continue
        count += len(members)
        if count > ENTRIES_MAX:
            problems.add(f"more than {ENTRIES_MAX} filters; use several Triggers", path)
            return False
        for entry in members:
            if isinstance(entry, Mapping):
                left += [(entry.get("all"), nesting + 1), (entry.get("any"), nesting + 1)]
                left.append(([entry["not"]] if "not" in entry else None, nesting + 1))
                characters += len(str(entry.get("cesql", "")))
    if characters > CESQL_CHARACTERS_MAX:
        problems.add(
            f"the CESQL expressions have {characters} characters together, at most {CESQL_CHARACTERS_MAX} are taken; "
            "use several Triggers",
            path,
        )
        return False
    return True


def _read_list(entries: object, problems: Problems, path: str, nesting: int) -> list[Predicate]:
    if not isinstance(entries, list):
        problems.invalid(entries, path, "expected a list of filters")
        return []
    if not entries:
        problems.missing(path)
    return [_read_entry(entry, problems, f"{path}[{index}]", nesting) for index, entry in enumerate(entries)]


def _read_entry(entry: object, problems: Problems, path: str, nesting: int) -> Predicate:
    if nesting > NESTING_MAX:
        problems.add(f"filters are nested deeper than {NESTING_MAX}", path)
        return _never
    if not isinstance(entry, Mapping):
        problems.invalid(entry, path, f"expected a mapping with one of {', '.join(DIALECTS)}")
        return _never
    for name in sorted(str(key) for key in entry if key not in DIALECTS):
        problems.unknown(f"{path}.{name}", f"a filter is one of {', '.join(DIALECTS)}")
    # an empty map or list counts as not said, as in Knative
    given = [name for name in DIALECTS if name in entry and entry[name] not in (None, {}, [], "")]
    if len(given) > 1:
        problems.add("multiple dialects found, filters can have only one dialect set", path)
    elif not given:
        problems.add("expected exactly one, got neither", *(f"{path}.{name}" for name in DIALECTS))
    else:
        return _read_dialect(given[0], entry[given[0]], problems, f"{path}.{given[0]}", nesting)
    return _never


def _read_dialect(dialect: str, value: object, problems: Problems, path: str, nesting: int) -> Predicate:
    match dialect:
        case "all":
            return _all(_read_list(value, problems, path, nesting + 1))
        case "any":
            return _any(_read_list(value, problems, path, nesting + 1))
        case "not":
            return _not(_read_entry(value, problems, path, nesting + 1))
        case "cesql":
            return _read_cesql(value, problems, path)
    return _compared(_COMPARISONS[dialect], _read_texts(value, problems, path, may_be_empty=False))


def _read_texts(tree: object, problems: Problems, path: str, *, may_be_empty: bool) -> dict[str, str]:
    """Attribute names and values."""
    if not isinstance(tree, Mapping):
        problems.invalid(tree, path, "expected attribute names with their values")
        return {}
    texts = {}
    for name, value in tree.items():
        at = f"{path}[{name}]"
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            problems.invalid_key(str(name), at, _NAME_RULE)
        elif not isinstance(value, str):
            problems.invalid(value, at, "expected a string; put the value into quotes")
        elif not value and not may_be_empty:
            problems.invalid(value, at, "must not be empty")
        else:
            texts[name] = value
    return texts


def _read_cesql(text: object, problems: Problems, path: str) -> Predicate:
    if not isinstance(text, str):
        problems.invalid(text, path, "expected a CESQL expression as a string")
        return _never
    try:
        expression = compile_expression(text)
    except ParseError as error:
        problems.invalid(text, path, str(error))
        return _never
    if expression.missing_functions:
        problems.invalid(text, path, f"there is no function {', '.join(expression.missing_functions)}")

    def passes(event: CloudEvent) -> bool:
        result = expression.evaluate(event.values())
        return result.value is True and not result.errors

    return passes


def _never(event: CloudEvent) -> bool:
    return False


def _all(predicates: list[Predicate]) -> Predicate:
    return lambda event: all(predicate(event) for predicate in predicates)


def _any(predicates: list[Predicate]) -> Predicate:
    return lambda event: any(predicate(event) for predicate in predicates)


def _not(predicate: Predicate) -> Predicate:
    return lambda event: not predicate(event)


_COMPARISONS: Mapping[str, Callable[[str, str], bool]] = {
    "exact": str.__eq__,
    "prefix": str.startswith,
    "suffix": str.endswith,
}


def _compared(holds: Callable[[str, str], bool], wanted: Mapping[str, str]) -> Predicate:
    """Every attribute is there and its text fits."""

    def passes(event: CloudEvent) -> bool:
        for name, value in wanted.items():
            found = _attribute(event, name)
            if found is None or not holds(found, value):
                return False
        return True

    return passes


def _attribute(event: CloudEvent, name: str) -> str | None:
    """The text of an attribute, under its own name or one that Knative also takes; `time` as it was sent."""
    if name == "schemaurl" and name not in event.attributes:
        name = "dataschema"
    if name == "datamediatype" and name not in event.attributes:
        content_type = event.attributes.get("datacontenttype")
        return None if content_type is None else content_type.partition(";")[0].strip()
    return event.attributes.get(name)
