"""All doors by name, and their share of a run that is for all of them."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.fuzzing.door import Door


@dataclass(frozen=True, slots=True)
class Entry:
    """`share` of the inputs, by how fast the door is and how much there is behind it. `kept_mib` is what libraries
    keep of 100,000 inputs, where they keep it for each of what a server has one of."""

    about: str
    share: int
    open: Callable[[Path], Door]  # the folder is empty and the door's own
    kept_mib: float = 0.0


def _stage_events(folder: Path) -> Door:
    import torch

    from tools.fuzzing.stage_doors import StageDoor

    torch.set_num_threads(1)
    return StageDoor(_tiny(folder), folder / "claims")


def _public(folder: Path) -> Door:
    import torch

    from tools.fuzzing.http_doors import PublicDoor

    torch.set_num_threads(1)
    return PublicDoor(_tiny(folder))


def _grpc(folder: Path) -> Door:
    import torch

    from orchestrator.server import bare_argv

    with bare_argv():
        from tools.fuzzing.grpc_door import GrpcDoor

    torch.set_num_threads(1)
    return GrpcDoor(_tiny(folder), folder / "keys")


def _results(folder: Path) -> Door:
    from tools.fuzzing.http_doors import ResultsDoor

    return ResultsDoor(folder)


def _broker(folder: Path) -> Door:
    from tools.fuzzing.event_doors import BrokerDoor

    return BrokerDoor()


def _replies(folder: Path) -> Door:
    from tools.fuzzing.event_doors import ReplyDoor

    return ReplyDoor()


def _proxies(folder: Path) -> Door:
    from tools.fuzzing.proxy_door import ProxyDoor

    return ProxyDoor()


def _checkpoints(folder: Path) -> Door:
    from tools.fuzzing.checkpoint_doors import CheckpointDoor

    return CheckpointDoor(_all_tiny(folder), folder / "hostile")


def _loading(folder: Path) -> Door:
    from tools.fuzzing.checkpoint_doors import LoadingDoor

    return LoadingDoor(_all_tiny(folder), folder / "hostile")


def _function(name: str) -> Callable[[Path], Door]:
    def open_one(folder: Path) -> Door:
        from tools.fuzzing import function_doors

        door: Door = getattr(function_doors, name)()
        return door

    return open_one


def _all_tiny(folder: Path) -> list[Path]:
    from tools.fuzzing.tiny_model import ARCHITECTURES, save_tiny

    for architecture in ARCHITECTURES:
        save_tiny(folder / architecture, architecture)
    return [folder / architecture for architecture in ARCHITECTURES]


def _tiny(folder: Path) -> Path:
    from tools.fuzzing.tiny_model import save_tiny

    save_tiny(folder / "model")
    return folder / "model"


DOORS: Mapping[str, Entry] = {
    "stage-events": Entry("events to two stages in this process", 100, _stage_events),
    "stage-replies": Entry("replies of stages, read by the orchestrator's client over a socket", 100, _replies),
    "public": Entry("OpenAI, V1, V2, generate and events of the orchestrator, over two stages", 30, _public),
    "grpc": Entry("KServe's gRPC service of the orchestrator, over two stages", 30, _grpc),
    "results": Entry("the results service of batches", 50, _results),
    "broker-events": Entry("CloudEvents in binary, structured and batched mode", 300, _broker),
    "proxies": Entry("raw bytes to ingress, queue-proxies and uvicorn, with replicas behind them", 50, _proxies),
    "filters": Entry("filters of Triggers, CESQL among them", 150, _function("filter_door")),
    "batch-lines": Entry("lines of batches, in and out", 200, _function("line_door")),
    "plans": Entry("plan files", 15, _function("plan_door")),
    "manifests": Entry("manifests in YAML and JSON", 15, _function("manifest_door")),
    "settings": Entry(
        "environments of stages and orchestrators",
        20,
        _function("settings_door"),
        kept_mib=40,  # glibc keeps each text that was ever set as an environment variable
    ),
    "checkpoints": Entry(
        "checkpoints, tokenizers and chat templates, as planning and serving read them",
        20,
        _checkpoints,
        kept_mib=250,  # tokenizers 0.23 keeps 1.4 KB and more of each tokenizer that has encoded something
    ),
    "stage-loading": Entry(
        "checkpoints, as a stage loads them",
        1,
        _loading,
        kept_mib=2000,  # torch keeps 10 to 20 KB of each model that was built, none of it objects of Python
    ),
}


def open_door(name: str, folder: Path) -> Door:
    """Opens a door of the catalogue, or one of another file: PATH.py:FUNCTION, which is given the folder."""
    if name in DOORS:
        return DOORS[name].open(folder)
    file, _, function = name.rpartition(":")
    door: Door = runpy.run_path(file)[function](folder)
    return door


def is_door(name: str) -> bool:
    return name in DOORS or ".py:" in name


def kept_mib(name: str) -> float:
    return DOORS[name].kept_mib if name in DOORS else 0.0
