"""The single-machine Knative in a process of its own, as `stagecraft local start` runs it, and how to talk to it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.bench import CORES, Bench, MeasureError
from benchmarks.peers import program
from functions.contract.checkpoint import open_checkpoint
from knative.client import Client
from knative.errors import KnativeError
from knative.resources.documents import parse_documents
from orchestrator.planner import plan_by_stages
from orchestrator.render.deployment import Deployment, Scaling, WeightSource

NAMESPACE = "default"
SCALING = "autoscaling.knative.dev"
LOOK_EVERY_S = 0.05
SETTLE_TIMEOUT_S = 60.0
AUTOSCALER = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "config-autoscaler", "namespace": "knative-serving"},
    "data": {"allow-zero-initial-scale": "true"},
}

_numbers = itertools.count()


class RunningPlatform:
    """`url` is that of the ingress; what outlives the platform lies in `data_folder`. Methods raise MeasureError."""

    def __init__(self, url: str, pid: int, data_folder: Path, client: Client) -> None:
        self.url = url
        self.pid = pid
        self.data_folder = data_folder
        self._client = client

    @property
    def address(self) -> str:
        """HOST:PORT of the ingress."""
        return self.url.removeprefix("http://")

    def service_url(self, name: str) -> str:
        return f"{self.url}/{NAMESPACE}/{name}"

    async def apply(self, manifests: Sequence[Mapping[str, Any]]) -> None:
        documents = [one for manifest in manifests for one in parse_documents(json.dumps(manifest), "benchmark")]
        with _as_measure_error():
            await asyncio.to_thread(self._client.apply, documents)

    async def delete(self, services: Sequence[str]) -> None:
        """Returns when nothing of the services is left."""
        with _as_measure_error():
            await asyncio.gather(
                *(asyncio.to_thread(self._client.delete, "service", NAMESPACE, name) for name in services)
            )

    async def revisions(self) -> dict[str, dict[str, Any]]:
        """What `stagecraft status` shows, by service."""
        with _as_measure_error():
            status = await asyncio.to_thread(self._client.status)
        return {one["service"]: one for one in status["revisions"]}

    async def triggers(self) -> dict[str, dict[str, Any]]:
        """What `stagecraft status` counts, by name: waiting, delivered, and so on."""
        with _as_measure_error():
            status = await asyncio.to_thread(self._client.status)
        return {one["name"]: one for one in status["triggers"]}

    async def settled(self, wanted: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """The revisions, once each of the services has a ready replica and its activator in or out of the path:
        `wanted` says proxy or serve."""
        started_s = time.monotonic()
        while time.monotonic() - started_s < SETTLE_TIMEOUT_S:
            found = await self.revisions()
            if all(found[name]["ready"] and found[name]["mode"] == mode for name, mode in wanted.items()):
                return found
            await asyncio.sleep(LOOK_EVERY_S)
        raise MeasureError(f"the services did not become {dict(wanted)} in {SETTLE_TIMEOUT_S:.0f} s")


@asynccontextmanager
async def running_platform(
    bench: Bench, images: Mapping[str, Mapping[str, Any]], *, fork: bool = True
) -> AsyncIterator[RunningPlatform]:
    """An empty platform, with `images` besides the built-in ones. It and its replicas end with the context."""
    name = f"bench-{os.getpid()}-{next(_numbers)}"
    table = bench.folder / f"{name}.yaml"
    table.write_text(json.dumps(images))  # which is YAML too
    # replicas end as soon as they have answered: between two rounds nobody should wait for late requests
    data = bench.folder / f"{name}-data"
    arguments = ["orchestrator.cli", "local", "start", "--name", name, "--port", "0", "--drain-quiet", "0s", "--json"]
    arguments += ["--data-dir", str(data)]
    arguments += ["--images", str(table), "--log-dir", str(bench.log_dir / name), *([] if fork else ["--no-fork"])]
    async with program(arguments, CORES, own_registry(bench), bench.log_dir / f"{name}.log") as running:
        facts = await running.read_line()
        with Client(Path(facts["control"])) as client:
            platform = RunningPlatform(facts["url"], facts["pid"], data, client)
            await platform.apply([AUTOSCALER])
            yield platform


def deployable(model: Path, name: str, stages: int, threads: int, scaling: Scaling, **options: Any) -> Deployment:
    """The model in `stages` stages on the CPU in float32, under service names that begin with `name`."""
    plan = plan_by_stages(open_checkpoint(str(model)), stages, dtype="float32", name=name, model=str(model))
    memory: dict[str, Any] = {"kv_bytes_max": 256 << 20, "weights": WeightSource(f"file://{model}")}
    return Deployment(
        plan, namespace=NAMESPACE, scaling=scaling, device="cpu", threads_per_stage=threads, **(memory | options)
    )


def service(name: str, image: str, annotations: Mapping[str, str], env: Mapping[str, str] | None = None,
            probe: Mapping[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """A Knative Service of one container; `annotations` are those of the autoscaler, without their prefix."""
    container = {"image": image, "env": [{"name": key, "value": value} for key, value in (env or {}).items()]}
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "template": {
                "metadata": {"annotations": {f"{SCALING}/{key}": value for key, value in annotations.items()}},
                "spec": {"containers": [container | ({"readinessProbe": dict(probe)} if probe else {})]},
            }
        },
    }


def own_registry(bench: Bench) -> dict[str, str]:
    """A folder of our own for control sockets, so that nobody's `stagecraft status` sees these platforms."""
    folder = bench.folder / "run"
    folder.mkdir(mode=0o700, exist_ok=True)
    return {"STAGECRAFT_RUNTIME_DIR": str(folder)}


@contextmanager
def _as_measure_error() -> Iterator[None]:
    try:
        yield
    except KnativeError as error:
        raise MeasureError(str(error)) from None
