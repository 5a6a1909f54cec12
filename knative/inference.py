"""The status of an InferenceService, from that of the Knative Service that it owns.

After pkg/apis/serving/v1beta1/inference_service_status.go of kserve/kserve.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NOT_YET = {"status": "False", "reason": "Predictor ingress not created"}


def inference_status(predictor: Mapping[str, Any], url: str, address: str) -> dict[str, Any]:
    """`predictor` is the status of the Service; `url` and `address` are from outside and inside of the platform."""
    ready = next((one for one in predictor["conditions"] if one["type"] == "Ready"), {"status": "Unknown"})
    rest = {key: value for key, value in ready.items() if key != "type"}
    is_ready = rest["status"] == "True"
    conditions = [
        {"type": "IngressReady", **({"status": "True"} if is_ready else _NOT_YET)},
        {"type": "PredictorReady", **rest},
        {"type": "Ready", **rest},
    ]
    component = {
        "latestCreatedRevision": predictor["latestCreatedRevisionName"],
        "latestReadyRevision": predictor["latestReadyRevisionName"],
        "traffic": predictor["traffic"],
        **({"url": predictor["url"]} if is_ready else {}),
    }
    return {
        "address": {"url": address},
        "components": {"predictor": component},
        "conditions": conditions,
        "deploymentMode": "Knative",
        "observedGeneration": predictor["observedGeneration"],
        "url": url,
    }
