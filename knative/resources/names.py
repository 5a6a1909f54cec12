"""Forms of names in Kubernetes (after k8s.io/apimachinery pkg/util/validation)."""

from __future__ import annotations

import re

_LABEL_MAX = 63
_SUBDOMAIN_MAX = 253
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_DNS_1123.pattern}(\.{_DNS_1123.pattern})*")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")

_DNS_1035_RULE = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    "and end with an alphanumeric character (e.g. 'my-name', or 'abc-123')"
)


def dns_1035_problem(name: str) -> str:
    """What is wrong with `name` as a DNS-1035 label; "" when nothing is."""
    rules = []
    if len(name) > _LABEL_MAX:
        rules.append(f"must be no more than {_LABEL_MAX} characters")
    if not _DNS_1035.fullmatch(name):
        rules.append(_DNS_1035_RULE)
    return f"not a DNS 1035 label: [{' '.join(rules)}]" if rules else ""


def is_dns_1123_label(name: str) -> bool:
    return len(name) <= _LABEL_MAX and _DNS_1123.fullmatch(name) is not None


def is_dns_1123_subdomain(name: str) -> bool:
    return len(name) <= _SUBDOMAIN_MAX and _SUBDOMAIN.fullmatch(name) is not None


def is_qualified_name(name: str) -> bool:
    return len(name) <= _LABEL_MAX and _QUALIFIED.fullmatch(name) is not None
