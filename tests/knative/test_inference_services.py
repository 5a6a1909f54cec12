"""InferenceServices on a platform: applied, reached by both addresses, scaled, changed and deleted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from knative.errors import NotFound, ValidationError

Start = Callable[..., Any]
Until = Callable[..., Any]

SERVER = """
import http.server, os

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{os.environ['INFERENCE_SERVICE_NAME']} says {os.environ.get('TEXT', 'nothing')}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""
PROCESS = {"image": "stagecraft/process", "command": [sys.executable, "-S", "-c", SERVER]}
ZERO = {"allow-zero-initial-scale": "true", "initial-scale": "0", "stable-window": "6s"}
GROUP = "serving.kserve.io"


def inference_service(name: str, /, annotations: dict[str, str] | None = None, **predictor: Any) -> dict[str, Any]:
    """A custom predictor, unless `predictor` has a model."""
    given = {"minReplicas": 0, **({} if "model" in predictor else {"containers": [PROCESS]}), **predictor}
    return {
        "apiVersion": f"{GROUP}/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, "annotations": annotations or {}},
        "spec": {"predictor": given},
    }


def runtime(text: str) -> dict[str, Any]:
    container = {"name": "kserve-container", **PROCESS, "env": [{"name": "TEXT", "value": text}]}
    return {
        "apiVersion": f"{GROUP}/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": "speaker"},
        "spec": {"supportedModelFormats": [{"name": "huggingface"}], "containers": [container]},
    }


MODEL = {"modelFormat": {"name": "huggingface"}, "runtime": "speaker"}


def actions(applied: list[Any]) -> list[str]:
    return [f"{one.kind}/{one.name} {one.action}" for one in applied]


async def test_an_inference_service_from_apply_to_delete(start: Start, settings_of: Callable[..., Any]) -> None:
    cluster = await start(clock=True, default_service="default/bard")
    await cluster.apply(settings_of(**ZERO))
    assert actions(await cluster.apply(inference_service("bard"))) == [f"inferenceservice.{GROUP}/bard created"]
    assert actions(await cluster.apply(inference_service("bard"))) == [f"inferenceservice.{GROUP}/bard unchanged"]

    # initial-scale of the settings is in force: nothing runs before somebody asks, by whichever address
    assert cluster.status("bard-predictor")["pods"] == []
    assert await cluster.get("bard") == (200, "bard says nothing")
    assert await cluster.get("bard-predictor") == (200, "bard says nothing")
    for host in ("bard.default.svc.cluster.local", "bard-predictor.default.svc.cluster.local", "not.a.service"):
        async with cluster.client.get(f"{cluster.platform.url}/", headers={"Host": host}) as answer:
            assert await answer.text() == "bard says nothing"

    (shown,) = cluster.platform.get("inferenceservice", "default")
    status = shown["status"]
    assert status["url"] == f"{cluster.platform.url}/default/bard"
    assert status["address"] == {"url": "http://bard.default.svc.cluster.local"}
    conditions = {one["type"]: one["status"] for one in status["conditions"]}
    assert conditions == dict.fromkeys(("IngressReady", "PredictorReady", "Ready"), "True")
    assert status["components"]["predictor"]["latestReadyRevision"] == "bard-predictor-00001"
    assert cluster.platform.logs("default", "bard") == cluster.platform.logs("default", "bard-predictor") != []

    await cluster.turn_until(lambda: not cluster.status("bard-predictor")["pods"])  # quiet: back to zero
    with pytest.raises(ValidationError, match="belongs to inferenceservice 'bard'"):
        await cluster.platform.delete("service", "default", "bard-predictor")
    await cluster.platform.delete("inferenceservice", "default", "bard")
    assert cluster.platform.get("service", None) == cluster.platform.get("inferenceservice", None) == []
    assert (await cluster.get("bard"))[0] == 404
    with pytest.raises(NotFound):
        await cluster.platform.delete("inferenceservice", "default", "bard")


async def test_a_runtime_that_changes_changes_its_services(start: Start, until: Until) -> None:
    cluster = await start()
    applied = await cluster.apply(inference_service("one", minReplicas=1, model=MODEL), runtime("this"))
    assert actions(applied) == [
        f"servingruntime.{GROUP}/speaker created", f"inferenceservice.{GROUP}/one created",
    ]  # fmt: skip
    assert await cluster.get("one") == (200, "one says this")
    assert actions(await cluster.apply(runtime("that"))) == [
        f"servingruntime.{GROUP}/speaker configured", f"inferenceservice.{GROUP}/one configured",
    ]  # fmt: skip
    await until(lambda: cluster.condition("one-predictor")["status"] == "True")
    assert await cluster.get("one") == (200, "one says that")
    assert [one["metadata"]["name"] for one in cluster.platform.get("servingruntime", "default")] == ["speaker"]
    await cluster.platform.delete("servingruntime", "default", "speaker")
    assert cluster.platform.get("servingruntime", None) == []
    assert await cluster.get("one") == (200, "one says that")
    with pytest.raises(ValidationError, match='there is no ServingRuntime or ClusterServingRuntime "speaker"'):
        await cluster.apply(inference_service("two", model=MODEL))


async def test_a_request_wakes_the_inference_services_it_will_need(
    start: Start, settings_of: Callable[..., Any], until: Until
) -> None:
    cluster = await start()
    front = inference_service("front", annotations={"stagecraft.dev/wakes": "stage, other-predictor"})
    await cluster.apply(settings_of(**ZERO), front, inference_service("stage"), inference_service("other"))
    assert (await cluster.get("front"))[0] == 200
    for name in ("stage", "other"):  # by either name
        await until(cluster.ready(f"{name}-predictor"))


async def test_what_does_not_go_with_what_there_is_is_refused(start: Start, settings_of: Callable[..., Any]) -> None:
    cluster = await start()
    await cluster.apply(settings_of(**ZERO), inference_service("bard"))
    owned = {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": "bard-predictor"},
        "spec": {"template": {"spec": {"containers": [PROCESS]}}},
    }
    with pytest.raises(ValidationError, match='Service "bard-predictor" belongs to InferenceService "bard"'):
        await cluster.apply(owned)
    with pytest.raises(ValidationError, match=r"runs as bard-predictor: spec\.predictor\.name cannot change"):
        await cluster.apply(inference_service("bard", name="main"))
