"""Name and namespace of an object, checked as Kubernetes does it for kinds whose names are DNS subdomains."""

from __future__ import annotations

from knative.resources.field_errors import Problems
from knative.resources.names import is_dns_1123_label, is_dns_1123_subdomain


def check_identity(name: str, namespace: str, problems: Problems) -> None:
    """`namespace` "" is that of an object of the whole cluster."""
    if not name:
        problems.missing("metadata.name")
    elif not is_dns_1123_subdomain(name):
        problems.invalid(name, "metadata.name", "not a DNS 1123 subdomain")
    if namespace and not is_dns_1123_label(namespace):
        problems.invalid(namespace, "metadata.namespace", "not a DNS 1123 label")
