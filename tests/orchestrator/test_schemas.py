"""Requests made from the published descriptions of the endpoints, good and bad ones, to a real process: whatever a
description allows or forbids, the reply is no error of the server, shows no trace, and fits the description.

The descriptions are those of the protocols (Open Inference REST, text generation, OpenAI), and the one that the process
itself publishes at /openapi.json, which KServe makes for its own V1 and V2 endpoints.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema import Draft202012Validator
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance

from tests.orchestrator.conftest import LiveServer
from tools.fuzzing.door import judged

SPECS = Path(__file__).resolve().parents[3] / "shared" / "specs"
MODEL = "toy"
OWN = "/openapi.json"
# what is described, and the path below which the orchestrator has it
DESCRIPTIONS = {
    "open-inference/open_inference_rest.yaml": "",
    "open-inference/generate_rest.yaml": "",
    "openai/openapi-excerpt.yaml": "/openai/v1",
    OWN: "",
}
ABSENT = ("/embeddings", "/batches", "/files", "/chat/completions/{")  # of OpenAI's: not served
NOT_IMPLEMENTED = frozenset({501})  # versions of models, and taking the model away
STREAM = "text/event-stream"
TIMEOUT_S = 120


def described(name: str, server: LiveServer) -> dict[str, Any]:
    """The document, with this server's model where any name could stand. Paths are without a version where that may be
    left out."""
    if name == OWN:
        document: dict[str, Any] = httpx.get(server.url + OWN).json()
    else:
        path = SPECS / name
        if not path.exists():
            pytest.skip(f"NO DESCRIPTION: {path} is not there")
        document = yaml.safe_load(path.read_text())
        fill(document["paths"])
    document["paths"] = {path: item for path, item in document["paths"].items() if not path.startswith(ABSENT)}
    for schema in document.get("components", {}).get("schemas", {}).values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": [MODEL]}
    return document


def fill(paths: dict[str, Any]) -> None:
    """${MODEL_NAME}, which is no OpenAPI, becomes the model's name; and no version is asked for."""
    for path in [path for path in paths if "${" in path]:
        item = paths.pop(path)
        item.pop("parameters", None)
        for operation in item.values():
            operation.pop("parameters", None)
        paths[path.replace("${MODEL_NAME}", MODEL).replace("/versions/${MODEL_VERSION}", "")] = item


def ask_all(server: LiveServer, name: str, examples: int) -> Counter[str]:
    """How often each operation gave which verdict: of so many good requests, and as many bad ones where it has a
    body."""
    document = described(name, server)
    schema = schemathesis.openapi.from_dict(document)
    verdicts: Counter[str] = Counter()

    def ask(case: Case) -> None:
        for parameter in case.path_parameters or {}:
            if parameter.lower() in ("model_name", "model"):
                case.path_parameters[parameter] = MODEL
        reply = case.call(base_url=server.url + DESCRIPTIONS[name], timeout=TIMEOUT_S)
        headers = {key.lower(): values[0] for key, values in reply.headers.items()}
        verdict = judged(reply.status_code, headers, reply.content, allowed=NOT_IMPLEMENTED)
        verdicts[f"{case.operation.label} {verdict}"] += 1
        if reply.status_code == 200 and headers["content-type"].startswith(STREAM):
            check_stream(document, case, reply.content)
        elif reply.status_code == 200:
            case.validate_response(reply, checks=[response_schema_conformance])

    limits = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # making an example smaller takes many requests
    )
    for found in schema.get_all_operations():
        operation = found.ok()
        limits(given(operation.as_strategy(GenerationMode.POSITIVE))(ask))()
        if operation.body:
            limits(given(operation.as_strategy(GenerationMode.NEGATIVE))(ask))()
    return verdicts


def check_stream(document: dict[str, Any], case: Case, content: bytes) -> None:
    """What a description says of a stream is meant of the JSON in each event; Schemathesis takes it for the event."""
    described = case.operation.definition.raw["responses"]["200"]["content"].get(STREAM)
    if described is None:
        return  # OpenAI's tells of no streams
    validator = Draft202012Validator({**described["schema"], "components": document["components"]})
    data = [line.removeprefix(b"data:").strip() for line in content.splitlines() if line.startswith(b"data:")]
    assert data
    for event in data:
        validator.validate(json.loads(event))


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_what_is_described_is_answered(live_server: LiveServer, name: str) -> None:
    verdicts = ask_all(live_server, name, 4)
    assert verdicts.total() > 0
    assert live_server.process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_much_of_what_is_described_is_answered(live_server: LiveServer, name: str) -> None:
    verdicts = ask_all(live_server, name, 150)
    assert {"accepted", "refused"} == {label.rsplit(" ", 1)[1] for label in verdicts}, verdicts
    assert live_server.process.poll() is None
