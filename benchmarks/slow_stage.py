"""A stage whose steps take at least BENCH_STEP_MS milliseconds, whatever the computation takes: `python -m functions`
with that one difference. The time left over is slept, so a stage that is slow in this way does not take the others'
cores.
"""

from __future__ import annotations

import os
import sys
import time

from functions.__main__ import main
from functions.contract.messages import Samples, Step
from functions.stage import Stage

STEP_MS = "BENCH_STEP_MS"


def pad_steps(step_s: float) -> None:
    """From now on every step of this process takes `step_s` seconds, or as long as it takes to compute."""
    compute = Stage.step

    def padded(stage: Stage, step: Step) -> Step | Samples:
        ends_s = time.monotonic() + step_s
        answer = compute(stage, step)
        time.sleep(max(0.0, ends_s - time.monotonic()))
        return answer

    Stage.step = padded  # type: ignore[method-assign, assignment]  # the product has no knob for it


if __name__ == "__main__":
    pad_steps(float(os.environ[STEP_MS]) / 1e3)
    sys.exit(main())
