"""Doors that are one function: plan files, manifests, filters, lines of batches, settings.

What they may raise is their own error; whatever else comes out is a crash. What they take must hold: a plan that was
read can be written and read again, an event that was taken can leave in every form.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import yaml

from functions.contract.settings_error import SettingsError
from knative.autoscaler.config import AutoscalerConfig
from knative.errors import ValidationError
from knative.eventing.event import CloudEvent
from knative.eventing.filters import compile_filter
from knative.resources.config_maps import DefaultsConfig
from knative.resources.documents import parse, parse_documents
from orchestrator.batches.lines import BadLine, OutputLineError, Request, parse_line, parse_output
from orchestrator.plan import PlanError, dump_plan, parse_plan
from orchestrator.settings import load_settings
from tools.fuzzing.door import Verdict, Violation
from tools.fuzzing.mutations import TEXTS, changed_value, dumped, hostile, mutated, mutated_json, mutated_text

_YAML_WORDS = (
    "&a ", "*a", "<<: *a", "!!binary ", "!!python/object/apply:os.system [id]", "!!set ", "!!omap ", "!<x> ", "? ",
    "|", ">-", "%YAML 1.2\n---\n", "---\n", "...\n", "# ", ": ", "- ", "[", "]", "{", "}", "\t", "'", '"', "~",
    "0o17", "0b1", "1:30", ".inf", ".nan", "2026-11-28T00:00:00Z", "yes", "=", "\x85", "\u2028", "@", "`",
    "a: &x [*x]", "[&a [x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a]]", "{" * 500, "- " * 500, "9" * 5000,
)  # fmt: skip
_CESQL_WORDS = ("AND", "OR", "XOR", "NOT", "LIKE", "EXISTS", "IN", "TRUE", "FALSE", "(", ")", "'%_'", "'\\'", "ABS(",
                "CONCAT(", "SUBSTRING(", "INT(", "-", "%", "/", "0", "2147483648", "<>", "!=", "''", "NOT " * 200,
                "(" * 300, "'" + "%" * 40 + "'", "a" * 3000)  # fmt: skip


class FunctionDoor:
    """`give` returns whether the input was accepted; `errors` are what it may raise for one that is not."""

    def __init__(
        self,
        name: str,
        make: Callable[[Random], bytes],
        give: Callable[[bytes], bool],
        errors: tuple[type[Exception], ...],
        good: Sequence[bytes],
    ) -> None:
        self.name = name
        self.make = make
        self._give = give
        self._errors = errors
        self._good = good

    def take(self, data: bytes) -> Verdict:
        try:
            return "accepted" if self._give(data) else "refused"
        except self._errors as error:
            told = str(error)
            if not told or "Traceback" in told or len(told) > 100_000:
                raise Violation("crash", f"it says nothing that helps: {told[:300]!r}") from error
            return "refused"

    def check(self) -> None:
        for data in self._good:
            if not self._give(data):
                raise Violation("harm", f"what is right is refused: {data[:200]!r}")

    def close(self) -> None:
        """Nothing is open."""


# -- plan files

_PLAN = b"""\
version: 1
name: demo
model: demo
dtype: auto
quantize: none
blocks: 8
fingerprint: "0123456789abcdef"
stages:
  - blocks: "0:4"
    cost: {parameters: 500, weight_bytes: 1000, kv_bytes_per_token: 128, flops_per_token: 5000}
  - blocks: "4:8"
    profile:
      device: cpu
      dtype: float32
      measured: 2026-11-28
      load_s: 1.25
      decode_ms: {1: 5.2, 8: 9.1}
      prefill_ms: {16: 20.5}
      memory_bytes: 1000000
"""


_PLANS = (_PLAN, b'version: 1\nname: a\nmodel: ./m\nstages: [{blocks: "0:1"}]\n')


def plan_door() -> FunctionDoor:
    def give(data: bytes) -> bool:
        plan = parse_plan(data.decode(errors="replace"))
        again = parse_plan(dump_plan(plan))
        if again != plan or again.digest != plan.digest:
            raise Violation("harm", "a plan that was read is another one after it was written and read again")
        return True

    return FunctionDoor("plans", lambda random: _yaml(random, _PLANS), give, (PlanError,), _PLANS)


# -- manifests

_MANIFESTS = (
    b"""\
apiVersion: serving.knative.dev/v1
kind: Service
metadata: {name: stage-0, labels: {app: demo}}
spec:
  template:
    metadata:
      annotations: {autoscaling.knative.dev/target: "2.5", autoscaling.knative.dev/window: 30s,
                    autoscaling.knative.dev/min-scale: "0", autoscaling.knative.dev/max-scale: "3"}
    spec:
      containerConcurrency: 4
      timeoutSeconds: 600
      containers:
        - image: stage:0.3
          command: [python, -m, functions]
          env: [{name: STAGE_BLOCKS, value: "0:4"}, {name: A, value: "1"}]
          ports: [{containerPort: 8080, name: http1}]
          resources: {requests: {cpu: 500m, memory: 1Gi}, limits: {cpu: "2", memory: 2Gi, nvidia.com/gpu: 1}}
          readinessProbe: {httpGet: {path: /readyz, port: 8080}, periodSeconds: 1, failureThreshold: 30}
          volumeMounts: [{name: data, mountPath: /data, readOnly: true}]
      volumes: [{name: data, emptyDir: {sizeLimit: 1Gi}}]
  traffic: [{latestRevision: true, percent: 100, tag: now}]
""",
    b"""\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {name: demo, annotations: {serving.kserve.io/deploymentMode: Serverless}}
spec:
  predictor:
    minReplicas: 0
    maxReplicas: 2
    scaleTarget: 4
    model: {modelFormat: {name: huggingface}, runtime: demo-runtime, args: [--a]}
---
apiVersion: serving.kserve.io/v1alpha1
kind: ServingRuntime
metadata: {name: demo-runtime}
spec:
  supportedModelFormats: [{name: huggingface, version: "1", autoSelect: true, priority: 1}]
  containers: [{name: kserve-container, image: "stage:0.3", args: ["--model={{.Name}}"]}]
""",
    b"""\
apiVersion: eventing.knative.dev/v1
kind: Broker
metadata: {name: default}
spec: {delivery: {retry: 5, backoffPolicy: exponential, backoffDelay: PT1S, timeout: PT10S}}
---
apiVersion: eventing.knative.dev/v1
kind: Trigger
metadata: {name: t}
spec:
  broker: default
  filters:
    - {exact: {type: a}}
    - {any: [{prefix: {source: /b}}, {not: {suffix: {id: "1"}}}]}
    - {cesql: "a = 'b' OR EXISTS c"}
  subscriber: {ref: {apiVersion: serving.knative.dev/v1, kind: Service, name: stage-0}, uri: /x}
---
apiVersion: flows.knative.dev/v1
kind: Sequence
metadata: {name: s}
spec:
  steps: [{ref: {apiVersion: serving.knative.dev/v1, kind: Service, name: stage-0}}, {uri: "http://127.0.0.1:1/"}]
  reply: {ref: {apiVersion: eventing.knative.dev/v1, kind: Broker, name: default}}
""",
    b"""\
apiVersion: v1
kind: ConfigMap
metadata: {name: config-autoscaler, namespace: knative-serving}
data: {stable-window: 60s, container-concurrency-target-percentage: "70", panic-window-percentage: "10.0"}
---
apiVersion: v1
kind: List
items: [{apiVersion: v1, kind: Namespace, metadata: {name: x}}]
""",
)


def manifest_door() -> FunctionDoor:
    def give(data: bytes) -> bool:
        text = data.decode(errors="replace")
        documents = parse_documents(text, "a.json" if text.startswith("{") else "a.yaml")
        parse(documents, autoscaler=AutoscalerConfig(), defaults=DefaultsConfig())
        return True

    return FunctionDoor("manifests", lambda random: _yaml(random, _MANIFESTS), give, (ValidationError,), _MANIFESTS)


def _yaml(random: Random, good: Sequence[bytes]) -> bytes:
    """A text with something else in it, or the tree behind it with another value, as JSON, which is YAML too."""
    text = random.choice(good)
    if random.random() < 0.5:
        return mutated_text(random, text.decode(), (*_YAML_WORDS, *TEXTS[:20])).encode(errors="replace")
    value = changed_value(random, random.choice(_trees(text)))
    return dumped(changed_value(random, value) if random.random() < 0.3 else value)


_TREES: dict[bytes, list[Any]] = {}


def _trees(text: bytes) -> list[Any]:
    if text not in _TREES:
        # dates as texts, which JSON can hold
        _TREES[text] = [json.loads(json.dumps(tree, default=str)) for tree in yaml.safe_load_all(text)]
    return _TREES[text]


# -- filters of Triggers

_FILTERS: tuple[Any, ...] = (
    {"filter": {"attributes": {"type": "a", "source": "/b"}}},
    {"filters": [{"exact": {"type": "a"}}, {"all": [{"prefix": {"source": "/"}}, {"not": {"suffix": {"id": "2"}}}]}]},
    {"filters": [{"cesql": "type = 'a' AND (LENGTH(source) > 1 OR NOT EXISTS x) AND id LIKE '_%' AND 1 IN (1, 2)"}]},
    {"filters": [{"cesql": "ABS(-5) = 5 XOR SUBSTRING('abc', 2) = UPPER(LEFT('bcd', 2))"}]},
)
_EVENT = CloudEvent.build(
    {"id": "1", "source": "/b", "specversion": "1.0", "type": "a", "count": 5, "flag": True,
     "time": "2026-11-28T00:00:00Z"}
)  # fmt: skip


def filter_door() -> FunctionDoor:
    def make(random: Random) -> bytes:
        spec = random.choice(_FILTERS)
        if "cesql" in json.dumps(spec) and random.random() < 0.7:
            text = mutated_text(random, spec["filters"][0]["cesql"], (*_CESQL_WORDS, *TEXTS[:20]))
            return json.dumps({"filters": [{"cesql": text}]}).encode()
        return mutated_json(random, spec)

    def give(data: bytes) -> bool:
        try:
            spec = json.loads(data)
        except (ValueError, RecursionError):
            return False
        if not isinstance(spec, dict):
            return False
        passes = compile_filter(spec).passes(_EVENT)
        if not isinstance(passes, bool):
            raise Violation("crash", f"a filter says {passes!r}")
        return True

    good = [json.dumps(spec).encode() for spec in _FILTERS]
    return FunctionDoor("filters", make, give, (ValidationError,), good)


# -- lines of batches

_LINES = (
    b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "demo", "prompt": "To be"}}',
    b'{"prompt": "To be", "max_tokens": 16, "custom_id": "b"}',
    b'{"messages": [{"role": "user", "content": "Who is there?"}], "temperature": 0.5}',
)
_OUTPUTS = (
    b'{"id": "x", "custom_id": "a", "response": {"status_code": 200, "request_id": "r", "body": {}}, "error": null}',
    b'{"id": "x", "custom_id": "a", "response": {"status_code": 400, "body": {"error": {"message": "no"}}}}',
    b'{"id": "x", "custom_id": "a", "response": null, "error": {"code": "batch_cancelled", "message": "m"}}',
)


def line_door() -> FunctionDoor:
    """Input lines of batches, and output lines that come back as events."""

    def make(random: Random) -> bytes:
        line = random.choice(_LINES + _OUTPUTS)
        if random.random() < 0.3:
            return mutated(random, line, [word.encode(errors="replace") for word in TEXTS[:40]])
        return mutated_json(random, json.loads(line))

    def give(data: bytes) -> bool:
        if b'"response"' in data:
            parse_output(data)
            return True
        found = parse_line(7, data, "demo")
        if isinstance(found, BadLine):
            json.loads(found.to_json())
        elif isinstance(found, Request):
            again = parse_line(7, found.line, "demo")
            if not isinstance(again, Request) or again.custom_id != found.custom_id:
                raise Violation("harm", f"a line that was read is not read again: {again}")
        return isinstance(found, Request)

    return FunctionDoor("batch-lines", make, give, (OutputLineError,), [*_LINES, *_OUTPUTS])


# -- settings of both processes, and numbers in options

_ENVIRONMENTS: tuple[Mapping[str, str], ...] = (
    {
        "ORCHESTRATOR_MODEL": "demo", "ORCHESTRATOR_MODEL_NAME": "demo", "ORCHESTRATOR_PLAN": "0123456789abcdef",
        "ORCHESTRATOR_STAGE_URLS": "http://a:1,http://b:2", "ORCHESTRATOR_EVENTS": "reply", "PORT": "8080",
        "ORCHESTRATOR_LANE_WIDTH": "8", "ORCHESTRATOR_BATCH_SHARE": "0.5", "ORCHESTRATOR_GRACE_S": "5",
    },
    {
        "STAGE_MODEL": "demo", "STAGE_BLOCKS": "0:4", "STAGE_INDEX": "1", "STAGE_COUNT": "2", "STAGE_PLAN": "x",
        "STAGE_DTYPE": "auto", "STAGE_DEVICE": "cuda:0", "STAGE_KV_BYTES_MAX": "1000", "STAGE_KV_SHARE": "0.5",
        "STAGE_CLAIMS": "/tmp/claims", "STAGE_THREADS": "1", "STAGE_QUANTIZE": "none",
    },
)  # fmt: skip


def settings_door() -> FunctionDoor:
    from functions.settings import read_settings  # which imports torch

    def make(random: Random) -> bytes:
        environment = dict(random.choice(_ENVIRONMENTS))
        name = random.choice(sorted(environment))
        environment[name] = mutated_text(random, environment[name], TEXTS[:40])
        if random.random() < 0.2:
            environment[random.choice((name.lower(), name + "X", name[:-1]))] = str(hostile(random, "1"))
        return dumped(environment)

    def give(data: bytes) -> bool:
        try:
            given = json.loads(data)
        except (ValueError, RecursionError):
            return False
        if not isinstance(given, dict):
            return False
        with _environment({str(name): str(value) for name, value in given.items()}):
            if any(name.startswith("STAGE_") for name in os.environ):
                read_settings()
            else:
                load_settings(os.environ)
        return True

    return FunctionDoor("settings", make, give, (SettingsError,), [json.dumps(one).encode() for one in _ENVIRONMENTS])


@contextmanager
def _environment(given: Mapping[str, str]) -> Iterator[None]:
    """These variables and no others, as far as an operating system can hold them."""
    before = dict(os.environ)
    os.environ.clear()
    try:
        for name, value in given.items():
            if name and "=" not in name and "\0" not in name + value:
                os.environ[name.encode(errors="ignore").decode()] = value.encode(errors="ignore").decode()
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
