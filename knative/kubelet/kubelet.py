"""Runs pods on this machine. What one node's kubelet does of a cluster, with processes for containers."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp
import structlog

from knative.errors import Unavailable
from knative.kubelet import gpus, lineage, logs
from knative.kubelet.agent import Start
from knative.kubelet.agents import AgentGone, Agents
from knative.kubelet.gpus import Gpus
from knative.kubelet.pod import Machine, Pod, PodSpec
from knative.kubelet.ports import Ports

_NVIDIA_SMI_WAIT_S = 30.0

log = structlog.get_logger()


class Kubelet:
    """Starts, probes, restarts and ends pods. Nothing it started outlives this process, whatever ends it.

    `folder` takes the logs (logs/POD/N.log, agents/). `fork` False starts a new interpreter for each Python module,
    True forks one that has imported what the command wants preloaded. `gpus` are names for CUDA_VISIBLE_DEVICES;
    None looks for them. `pods_max` is how many there may be at once, as on a node. `backoff_s` is the first delay of
    the crash back-off; the cap and its reset follow from it.

    One for each process: while it is open, orphans of this process's other children come to it too."""

    def __init__(
        self,
        folder: Path,
        *,
        fork: bool = True,
        gpus: Sequence[str] | None = None,
        on_change: Callable[[Pod], None] = lambda pod: None,
        backoff_s: float = 10.0,
        pods_max: int = 110,
    ) -> None:
        self._folder = folder.absolute()
        self._gpus = gpus
        self._on_change = on_change
        self._backoff_s = backoff_s
        self._pods_max = pods_max
        self._agents = Agents(self._folder / "agents", fork=fork)
        self._ports = Ports()
        self._gone = logs.GonePods()
        self._pods: dict[str, Pod] = {}
        self._machine: Machine | None = None

    async def start(self) -> None:
        """On the thread that runs the event loop from now on. Raises OSError if the folder cannot be written."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lineage.adopt_orphans()  # see Agent._bury
        names = await self._find_gpus() if self._gpus is None else self._gpus
        self._machine = Machine(
            agents=self._agents,
            gpus=Gpus(names),
            # each try by a connection of its own, as the kubelet makes it
            session=aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=0)),
            logs=self._folder / "logs",
            backoff_s=self._backoff_s,
        )

    def kill(self) -> None:
        """SIGKILL for all that runs. Those that are not ending are started again."""
        for pod in list(self._pods.values()):
            pod.kill(signal.SIGKILL)

    async def close(self, *, now: bool = False) -> None:
        """Ends all pods, with the grace of each unless `now`, and all agents."""
        await asyncio.gather(*(pod.terminate(0.0 if now else None) for pod in list(self._pods.values())))
        await self._agents.close()
        if self._machine is not None:
            await self._machine.session.close()
        self._ports.close()
        lineage.adopt_orphans(False)

    async def warm(self, preload: Sequence[str]) -> None:
        """Has these modules imported ahead of the first pod that wants them. Failures are only logged."""
        await self._agents.warm(preload)

    def port(self) -> int:
        """A free port of 127.0.0.1 for one pod, which keeps it until it is gone. Raises Unavailable."""
        return self._ports.take()

    def give_back(self, port: int) -> None:
        """For a port that no pod was run with."""
        self._ports.give_back(port)

    def run(self, spec: PodSpec, port: int) -> Pod:
        """Starts a pod; returns at once. Its name must not be in use. Raises Unavailable when there are too many."""
        if self._machine is None:
            raise RuntimeError("the kubelet has not been started")
        if len(self._pods) >= self._pods_max:
            raise Unavailable(f"{len(self._pods)} replicas run here, the most there may be; give services a max-scale")
        if spec.name in self._pods:
            raise ValueError(f"there is a pod {spec.name!r} already")
        pod = self._pods[spec.name] = Pod(spec, port, self._machine, self._changed)
        return pod

    def _changed(self, pod: Pod) -> None:
        if pod.phase == "gone":
            del self._pods[pod.name]
            self._ports.give_back(pod.port)
            self._gone.add(self._folder / "logs" / pod.name)
        try:
            self._on_change(pod)
        except Exception:
            log.exception("on_change_failed", pod=pod.name, phase=pod.phase)

    async def _find_gpus(self) -> Sequence[str]:
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            return gpus.listed(os.environ["CUDA_VISIBLE_DEVICES"])
        program = shutil.which("nvidia-smi")
        if program is None:
            return ()
        printed = self._folder / "nvidia-smi.log"
        argv = (program, "--query-gpu=index", "--format=csv,noheader")
        try:
            process = await self._agents.run(Start(argv, "", (), dict(os.environ), "", str(printed)))
            await asyncio.wait((process.ended,), timeout=_NVIDIA_SMI_WAIT_S)
        except (AgentGone, OSError) as error:
            log.warning("gpus_not_found", error=str(error))
            return ()
        process.send(signal.SIGKILL)
        names = [line for line in printed.read_text().split() if line.isdecimal()]
        log.info("gpus_found", gpus=names)
        return names
