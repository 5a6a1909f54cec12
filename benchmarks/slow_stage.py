"""A stage whose steps take at least BENCH_STEP_MS milliseconds, whatever the computation takes: `python -m functions`
with that one difference. The time left over is slept, so a stage that is slow in this way does not take the others'
cores.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from functions.contract.messages import Step
    from functions.stage import Outcome, Stage

STEP_MS = "BENCH_STEP_MS"


def pad_steps(step_s: float) -> None:
    """From now on every pass of this process takes `step_s` seconds, or as long as it takes to compute."""
    from functions.stage import Stage  # which brings torch

    compute = Stage.steps

    def padded(stage: Stage, steps: Sequence[Step]) -> list[Outcome]:
        ends_s = time.monotonic() + step_s
        outcomes = compute(stage, steps)
        time.sleep(max(0.0, ends_s - time.monotonic()))
        return outcomes

    Stage.steps = padded  # type: ignore[method-assign]  # the product has no knob for it


if __name__ == "__main__":
    from functions.__main__ import main

    pad_steps(float(os.environ[STEP_MS]) / 1e3)
    sys.exit(main())
