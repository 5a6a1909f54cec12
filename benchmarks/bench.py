"""What every figure is given: how large to measure, a folder for checkpoints and logs, and who gets which threads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from orchestrator.layout import Layout, shared_cores_layout

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "models" / "demo"
CORES = 2  # all figures are for two cores, whatever the machine has


class MeasureError(Exception):
    """A figure could not be measured; the text is for people."""


@dataclass(frozen=True, slots=True)
class Bench:
    """`rounds` alternating runs are measured. `quick` is toy size: it proves that everything runs, the values say
    nothing. `folder` is temporary."""

    folder: Path
    quick: bool = False
    rounds: int = 5

    @property
    def stage_counts(self) -> tuple[int, ...]:
        return (2,) if self.quick else (1, 2, 4)

    @property
    def log_dir(self) -> Path:
        path = self.folder / "logs"
        path.mkdir(exist_ok=True)
        return path


def fair_threads(stages: int) -> int:
    """Threads of each stage, so that all stages together have as many as the peer: one for each core."""
    return max(1, CORES // stages)


def layout_of(stages: int) -> Layout:
    """How `stagecraft up` would lay out so many stages."""
    return shared_cores_layout(stages, CORES)


def child_environment(threads: int) -> dict[str, str]:
    """For a process that computes with `threads` threads."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    count = str(threads)
    return {
        **os.environ,
        "PYTHONPATH": paths,
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
