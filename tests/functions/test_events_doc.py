"""docs/events.md and docs/events.schema.json, held against running stages."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from functions.contract import events
from functions.contract.errors import StageError
from functions.contract.handover import Adopt, Export
from functions.contract.messages import StageInfo, Step
from functions.contract.sampling import SamplingParams

REPLY_TYPES = {
    events.WOKEN, events.STEPPED, events.RELEASED, events.RENEWED, events.ADOPTED, events.EXPORTED, events.ERROR,
}  # fmt: skip
KEY = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def schema(root: Path) -> Any:
    schema = json.loads((root / "docs" / "events.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return schema


def described(headers: Any, body: bytes) -> dict[str, Any]:
    """An event in the form that the schema describes: attributes, and as data JSON or the header of the arrays."""
    event = {name.lower()[3:]: value for name, value in headers.items() if name.lower().startswith("ce-")}
    if headers.get("content-type"):
        event["datacontenttype"] = headers["content-type"]
    if headers.get("content-type") == events.TENSORS:
        (size,) = struct.unpack("<Q", body[:8])
        event["data"] = json.loads(body[8 : 8 + size])
    elif body:
        event["data"] = json.loads(body)
    return event


Exchange = tuple[dict[str, str], bytes, httpx.Response]


def exchanges(stages: list[Any], step_of: Callable[..., Step]) -> Iterator[Exchange]:
    """A request of each kind, good and bad, with its reply."""
    params = SamplingParams(temperature=0.5, logprobs=3, logit_bias={5: 1.5}, seed=7)
    step = step_of((20, 0, [1, 2]), (21, 0, [3]), params=params)
    keyed = {sequence: replace(opening, key=KEY) for sequence, opening in step.openings.items()}
    opening = b"".join(replace(step, openings=keyed).to_body())
    hidden = b""
    for kind, content_type, body in [
        (events.WAKE, None, b""),
        (events.WAKE, events.JSON, b"{}"),
        (events.STEP, events.TENSORS, opening),
        (events.STEP, events.TENSORS, b"".join(step_of((20, 2, [1])).to_body())),
        (events.STEP, events.TENSORS, b"".join(step_of((22, 2, [1])).to_body())),
        (events.STEP, events.TENSORS, b"".join(step_of((22, 0, [1] * 300)).to_body())),
        (events.RENEW, events.JSON, b'{"sequences": [20, 99]}'),
        (events.EXPORT, events.JSON, Export(KEY, {99: 0, 20: 1, 21: 0}, 1 << 20).to_body()),
        (events.EXPORT, events.JSON, Export(KEY, {99: 0}, 1 << 20).to_body()),
        (events.ADOPT, events.JSON, Adopt(f"{stages[0].url}/", KEY, (20, 99)).to_body()),
        (events.RELEASE, events.JSON, b'{"sequences": [20, 99]}'),
    ]:
        headers = stages[0].headers(kind, content_type=content_type, ce_lane="a1")
        response = stages[0].post(headers, body)
        hidden = response.content if body is opening else hidden
        yield headers, body, response
    headers = stages[1].headers(events.STEP, events.TENSORS)
    yield headers, hidden, stages[1].post(headers, hidden)
    for stage in stages:
        stage.release(20, 21)


def test_events_of_a_running_stage_are_as_the_schema_says(
    stages: list[Any], step_of: Callable[..., Step], schema: Any
) -> None:
    validator, seen = Draft202012Validator(schema), Counter[str]()
    openings = Draft202012Validator({"$ref": "#/$defs/openings", "$defs": schema["$defs"]})
    for headers, body, response in exchanges(stages, step_of):
        request, reply = described(headers, body), described(response.headers, response.content)
        for event in (request, reply):
            validator.validate(event)
            seen[event["type"]] += 1
            if text := event.get("data", {}).get("__metadata__", {}).get("openings"):
                openings.validate(json.loads(text))
                seen["openings"] += 1
    assert set(seen) == {*events.REQUEST_TYPES, *REPLY_TYPES, "openings"}
    assert seen[events.ERROR] == 2


OTHERWISE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no plan": lambda event: event.pop("plan"),
    "stage in words": lambda event: event.update(stage="first"),
    "specversion 0.3": lambda event: event.update(specversion="0.3"),
    "unknown type": lambda event: event.update(type="dev.stagecraft.stage.explode.v1"),
    "no content type": lambda event: event.pop("datacontenttype"),
    "no tokens": lambda event: event["data"].pop("tokens"),
    "an array more": lambda event: event["data"].update(extra=event["data"]["tokens"]),
    "slices of int32": lambda event: event["data"]["slices"].update(dtype="I32"),
    "slices of three columns": lambda event: event["data"]["slices"].update(shape=[1, 3]),
    "tokens of two dimensions": lambda event: event["data"]["tokens"].update(shape=[1, 1]),
}


@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE)
def test_schema_refuses_what_a_stage_refuses(
    stages: list[Any], step_of: Callable[..., Step], schema: Any, change: Callable[[dict[str, Any]], Any]
) -> None:
    body = b"".join(step_of((1, 0, [1, 2])).to_body())
    event = described(stages[0].headers(events.STEP, events.TENSORS), body)
    validator = Draft202012Validator(schema)
    assert validator.is_valid(event)
    change(event)
    assert not validator.is_valid(event)


def test_schema_knows_every_sampling_parameter_and_stage_info(schema: Any) -> None:
    def names(kind: Any) -> set[str]:
        return {field.name for field in fields(kind)}

    assert set(schema["$defs"]["samplingParams"]["properties"]) == names(SamplingParams)
    assert set(schema["$defs"]["stageInfo"]["required"]) == names(StageInfo)


def test_page_lists_every_error_with_its_status(root: Path) -> None:
    page = (root / "docs" / "events.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (yes|no) \|", page, re.MULTILINE)
    kinds = StageError.__subclasses__()
    assert sorted(rows) == sorted((k.code, str(k.status), "yes" if k.retriable else "no") for k in kinds)


def test_page_names_every_event_type_and_parameter(root: Path) -> None:
    page = (root / "docs" / "events.md").read_text()
    wanted = {*events.REQUEST_TYPES, *REPLY_TYPES, events.TENSORS, *(f"`{f.name}`" for f in fields(SamplingParams))}
    assert [word for word in sorted(wanted) if word not in page] == []


def test_json_of_the_page_is_as_the_schema_says(root: Path, schema: Any) -> None:
    page = (root / "docs" / "events.md").read_text()
    woken = re.search(r'^{"model".*?}$', page, re.MULTILINE | re.DOTALL)
    texts = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert woken is not None
    names = ["stageInfo", "openings", *(f"{name}/properties/data" for name in ("adopt", "adopted", "export"))]
    for name, text in zip([*names, "errorData"], [woken[0], *texts], strict=True):
        Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema["$defs"]}).validate(json.loads(text))


def test_program_on_the_page_runs(root: Path, stages: list[Any], reference: Any) -> None:
    page = (root / "docs" / "events.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for number, stage in enumerate(stages):
        program = program.replace(f"http://127.0.0.1:900{number}/", stage.url)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    token = reference([84, 111, 32, 98, 101], 1)[0]
    assert done.stdout == f"sequence 7: token {token} at position 5\n"
