"""All doors by name, and their share of a run that is for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.fuzzing.door import Door


@dataclass(frozen=True, slots=True)
class Entry:
    """`share` of the inputs, by how fast the door is and how much there is behind it."""

    about: str
    share: int
    open: Callable[[Path], Door]  # the folder is empty and the door's own


def _stage_events(folder: Path) -> Door:
    from tools.fuzzing.stage_doors import StageDoor

    return StageDoor(_tiny(folder), folder / "claims")


def _tiny(folder: Path) -> Path:
    from tools.fuzzing.tiny_model import save_tiny

    save_tiny(folder / "model")
    return folder / "model"


DOORS: Mapping[str, Entry] = {
    "stage-events": Entry("events to two stages in this process", 10, _stage_events),
}


def open_door(name: str, folder: Path) -> Door:
    """Opens a door of the catalogue; in a process of its own."""
    import torch

    torch.set_num_threads(1)
    return DOORS[name].open(folder)
