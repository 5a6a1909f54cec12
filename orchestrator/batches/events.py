"""The events of a batch: their types, their names, and what they carry. Pure.

    request   client -> broker -> orchestrator     data: a line of OpenAI's batch input
    result    orchestrator -> broker -> results    data: a line of OpenAI's batch output
    cancel    client -> broker -> both             data: {"batch": ID}

All of them have the extensions `batch` and, but for cancel, `customid`.
"""

from __future__ import annotations

import hashlib
import json

from knative.eventing.event import CloudEvent

REQUEST = "dev.stagecraft.batch.request.v1"
RESULT = "dev.stagecraft.batch.result.v1"
CANCEL = "dev.stagecraft.batch.cancel.v1"
SCORE = "dev.stagecraft.stage.score.v1"  # of functions/contract/scoring.py, which a small service need not import


def request_id(batch: str, custom_id: str) -> str:
    """The same for every sending of a request, so that whoever gets it twice sees that."""
    return hashlib.sha256(f"{batch}\n{custom_id}".encode()).hexdigest()[:32]


def request_event(batch: str, custom_id: str, model: str, line: bytes) -> CloudEvent:
    """Raises InvalidEvent for a custom_id or a model with characters that an attribute may not have."""
    extensions = {"batch": batch, "customid": custom_id, "model": model}
    return CloudEvent.build({**_core(batch, REQUEST, request_id(batch, custom_id)), **extensions}, line)


def cancel_event(batch: str) -> CloudEvent:
    data = json.dumps({"batch": batch}).encode()
    return CloudEvent.build({**_core(batch, CANCEL, f"{batch}.cancel"), "batch": batch}, data)


def _core(batch: str, kind: str, id: str) -> dict[str, str]:
    return {
        "specversion": "1.0",
        "type": kind,
        "source": f"/stagecraft/batches/{batch}",
        "id": id,
        "datacontenttype": "application/json",
    }
