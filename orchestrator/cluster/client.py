"""The API server over HTTP: a thin shell around the Kubernetes client.

Its DynamicClient sends the requests. Its discovery is not used: that keeps a cache in a file that every user of the
machine could have written, and reads more than is needed here.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from orchestrator.cluster.errors import ApiError, ClusterError, Unreachable

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

FIELD_MANAGER = "stagecraft"
REQUEST_TIMEOUT_S = 30.0
RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0)  # between the tries of one request
RETRY_AFTER_S_MAX = 30.0  # a server that asks for more patience than this is not waited for
_APPLY = "application/apply-patch+yaml"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_WARNING = re.compile(r'299 \S+ "((?:[^"\\]|\\.)*)"')  # RFC 7234, 5.5

Tree = dict[str, Any]
Query = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of objects and where its API is."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def full_name(self) -> str:
        """services.serving.knative.dev."""
        return ".".join(part for part in (self.plural, self.api_version.rpartition("/")[0]) if part)

    def path(self, namespace: str, name: str = "") -> str:
        """Of one object, or of all in the namespace."""
        inside = ["namespaces", quote(namespace, safe="")] if self.namespaced else []
        return "/".join([_api(self.api_version), *inside, self.plural, *([quote(name, safe="")] if name else [])])


SERVICE = Kind("serving.knative.dev/v1", "Service", "services")
REVISION = Kind("serving.knative.dev/v1", "Revision", "revisions")
INFERENCE_SERVICE = Kind("serving.kserve.io/v1beta1", "InferenceService", "inferenceservices")
POD = Kind("v1", "Pod", "pods")
EVENT = Kind("v1", "Event", "events")


class Cluster:
    """One API server. Every method raises ApiError for its refusals, Unreachable when it gives no answer."""

    def __init__(
        self,
        api: ApiClient,
        *,
        context: str,
        namespace: str,
        tell: Callable[[str], None],
        retry_waits_s: Sequence[float] = RETRY_WAITS_S,
    ) -> None:
        from kubernetes.dynamic import DynamicClient

        self.context = context  # "" inside a cluster
        self.namespace = namespace  # where objects go that name none
        self.server = str(api.configuration.host)
        self._dynamic = DynamicClient(api, discoverer=_none)  # type: ignore[no-untyped-call]  # the client's annotations end here
        self._tell = tell
        self._waits_s = retry_waits_s
        self._kinds: dict[str, dict[str, Kind]] = {}
        self._warned: set[str] = set()

    def kind(self, api_version: str, kind: str) -> Kind | None:
        """The kind as this cluster serves it; None if it does not."""
        if api_version not in self._kinds:
            self._kinds[api_version] = self._served(api_version)
        return self._kinds[api_version].get(kind)

    def get(self, kind: Kind, namespace: str, name: str) -> Tree | None:
        """The object, None if there is none."""
        try:
            return self._json("get", kind.path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def select(self, kind: Kind, namespace: str, *, labels: str = "", fields: str = "") -> list[Tree]:
        """The objects that the selectors pick; none if the cluster does not know the kind."""
        query = [("labelSelector", labels), ("fieldSelector", fields)]
        try:
            found = self._json("get", kind.path(namespace), query=[pair for pair in query if pair[1]])
        except ApiError as error:
            if error.status == 404:
                return []
            raise
        return [dict(item) for item in found.get("items") or ()]

    def apply(self, kind: Kind, namespace: str, name: str, tree: Tree, *, dry_run: bool, force: bool) -> Tree:
        """Server-side apply; returns the object as it is afterwards. With `dry_run` nothing is written."""
        query = [("fieldManager", FIELD_MANAGER), ("fieldValidation", "Strict"), ("force", str(force).lower())]
        query += [("dryRun", "All")] if dry_run else []
        return self._json("patch", kind.path(namespace, name), query=query, body=tree, content_type=_APPLY)

    def delete(self, kind: Kind, namespace: str, name: str) -> bool:
        """Whether there was something to delete. What belongs to the object is deleted after it, as kubectl does."""
        try:
            self._json("delete", kind.path(namespace, name), query=[("propagationPolicy", "Background")])
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    def log(self, namespace: str, pod: str, container: str, *, lines: int, previous: bool) -> list[str]:
        """The last lines of a container's log; none where there is none to read."""
        query = [("container", container), ("tailLines", str(lines)), ("previous", str(previous).lower())]
        try:
            return self._request("get", f"{POD.path(namespace, pod)}/log", query=query).splitlines()
        except ApiError as error:
            if error.status in (400, 404):  # not started yet, no former one, or gone meanwhile
                return []
            raise

    def _served(self, api_version: str) -> dict[str, Kind]:
        try:
            found = self._json("get", _api(api_version))
        except ApiError as error:
            if error.status == 404:
                return {}
            raise
        return {
            one["kind"]: Kind(api_version, one["kind"], one["name"], bool(one["namespaced"]))
            for one in found.get("resources") or ()
            if "/" not in one["name"]  # that is a part of an object, such as its status
        }

    def _json(self, method: str, path: str, **options: Any) -> Tree:
        text = self._request(method, path, **options)
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ClusterError(f"{self.server} does not answer like a Kubernetes API server: {text[:80]!r}")
        return found

    def _request(self, method: str, path: str, **options: Any) -> str:
        """Tries again where that can heal: all that is asked for here may be asked for twice."""
        for wait_s in self._waits_s:
            try:
                return self._once(method, path, **options)
            except (Unreachable, ApiError) as error:
                asked_s = error.retry_after_s or 0.0 if isinstance(error, ApiError) else 0.0
                if (isinstance(error, ApiError) and not error.heals) or asked_s > RETRY_AFTER_S_MAX:
                    raise
                self._tell(f"trying again: {error}")
                time.sleep(max(wait_s, asked_s))
        return self._once(method, path, **options)

    def _once(
        self, method: str, path: str, *, query: Query = (), body: Tree | None = None, content_type: str = ""
    ) -> str:
        import urllib3
        from kubernetes.client.exceptions import ApiException

        options: dict[str, Any] = {"content_type": content_type} if content_type else {}
        try:
            reply = self._dynamic.request(
                method,
                path,
                body=body,
                query_params=list(query),
                serialize=False,
                _request_timeout=REQUEST_TIMEOUT_S,
                **options,
            )
            data: bytes = reply.data
        except ApiException as error:
            raise self._error(error) from None
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(f"no answer from the cluster at {self.server}: {_cause(error)}") from None
        self._pass_on_warnings(reply.headers)
        return data.decode("utf-8", "replace")

    def _error(self, error: Any) -> ClusterError:
        if not error.status:  # no answer at all: the client says so of TLS only
            return ClusterError(
                f"no safe connection to the cluster at {self.server}: {' '.join(str(error.reason).split())}"
            )
        try:
            answer = json.loads(error.body)
        except (TypeError, ValueError):
            answer = None
        if not isinstance(answer, dict):  # from something before the API server
            answer = {"message": f"{self.server} answers {error.status} {error.reason}"}
        return ApiError(error.status, answer, _seconds((error.headers or {}).get("Retry-After")))

    def _pass_on_warnings(self, headers: Mapping[str, str]) -> None:
        for text in _WARNING.findall(headers.get("Warning") or ""):
            if text not in self._warned:
                self._warned.add(text)
                self._tell("warning: " + text.replace('\\"', '"'))


@contextmanager
def connect(
    context: str | None = None,
    *,
    tell: Callable[[str], None] = lambda _text: None,
    retry_waits_s: Sequence[float] = RETRY_WAITS_S,
) -> Iterator[Cluster]:
    """The cluster that kubectl would speak to: a context of the kubeconfig, or the cluster that this process runs in.

    `tell` gets what a person should know: warnings of the API server, and that a request is tried again.
    Raises ClusterError if there is no such context, or no cluster."""
    from kubernetes.client import ApiClient, Configuration
    from kubernetes.config import ConfigException

    configuration = Configuration()
    configuration.retries = False  # ours are bounded, wait in between, and are told
    try:
        chosen, namespace = _configured(configuration, context)
    except (ConfigException, OSError, KeyError, TypeError, ValueError) as error:  # the client raises them for odd files
        raise ClusterError(f"the kubeconfig cannot be used: {error}") from None
    if not configuration.verify_ssl:
        import urllib3

        # the kubeconfig asks for it; one warning a request tells nobody more
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    with ApiClient(configuration) as api:
        try:
            yield Cluster(api, context=chosen, namespace=namespace, tell=tell, retry_waits_s=retry_waits_s)
        finally:
            api.rest_client.close()


def _configured(configuration: Any, context: str | None) -> tuple[str, str]:
    """Fills the configuration in; returns the context's name and namespace."""
    from kubernetes.config import load_incluster_config, load_kube_config

    files = os.environ.get("KUBECONFIG") or "~/.kube/config"
    contexts, current = _contexts(files)
    if contexts is None and context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
        load_incluster_config(configuration)  # type: ignore[no-untyped-call]  # the client's annotations end here
        return "", _NAMESPACE_FILE.read_text() if _NAMESPACE_FILE.is_file() else "default"
    if contexts is None:
        raise ClusterError(
            f"there is no kubeconfig at {files}, which says where the cluster is; set KUBECONFIG, or make one as your "
            "cluster's provider describes"
        )
    chosen = context or current
    known = ", ".join(contexts) or "none"
    if not chosen:
        raise ClusterError(f"the kubeconfig {files} has no current context; choose one with --context: {known}")
    if chosen not in contexts:
        raise ClusterError(f"the kubeconfig {files} has no context {chosen}; there are: {known}")
    load_kube_config(files, chosen, configuration)  # type: ignore[no-untyped-call]  # the client's annotations end here
    return chosen, contexts[chosen] or "default"


def _contexts(files: str) -> tuple[dict[str, str] | None, str]:
    """The namespaces of the contexts, by name, and the current one; None without a kubeconfig."""
    import yaml
    from kubernetes.config.kube_config import KubeConfigMerger

    try:
        merged = KubeConfigMerger(files).config  # type: ignore[no-untyped-call]  # the client's annotations end here
        if merged is None:
            return None, ""
        entries = [one.value for one in merged.value["contexts"]]
        found = {str(one["name"]): str((one.get("context") or {}).get("namespace") or "") for one in entries}
        return found, str(merged.value.get("current-context") or "")
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ClusterError(f"the kubeconfig {files} is not one that can be read: {error}") from None


def _none(_client: object, _cache_file: object) -> None:
    """No discovery: see the head of this file."""


def _api(api_version: str) -> str:
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"


def _seconds(text: str | None) -> float | None:
    """Of a Retry-After header; the API server gives seconds, never a date."""
    return float(text) if text and text.isdigit() else None


def _cause(error: Exception) -> str:
    """The client's own words begin with the address of a Python object."""
    text = str(error)
    for known, meaning in (
        ("Connection refused", "connection refused"),
        ("Name or service not known", "its name is not known"),
        ("Read timed out", f"none within {REQUEST_TIMEOUT_S:g} s"),
        ("timed out", "the connection cannot be made in time"),
        ("Connection reset", "the connection was reset"),
        ("Remote end closed", "the connection was closed"),
        ("No route to host", "no route to it"),
    ):
        if known in text:
            return meaning
    return text.rpartition(">: ")[2] or type(error).__name__
