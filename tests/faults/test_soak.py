"""A short soak: whatever dies on the way, every answer is the one that Transformers gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import ways, workload
from tests.faults.checkpoint import VOCABULARY, write_checkpoint
from tests.faults.run import Result, disturbed_run
from tests.faults.schedule import KINDS, planned

SEED = 7
GENERATIONS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "model"
    write_checkpoint(folder)
    return folder


async def soaked(model: Path, folder: Path, seed: int, *, stages: int, generations: int, each: int) -> Result:
    pool = workload.asks(seed, vocabulary=VOCABULARY, prompt_max=60, tokens_max=40, count=8)
    runs = workload.generations(seed, generations, len(pool))
    counts = dict.fromkeys(KINDS, each)
    faults = planned(seed, counts, stages=stages, tokens=workload.tokens_of(runs, pool), times=0.4)
    return await disturbed_run(ways.setup(model, folder, stages), pool, runs, faults)


async def test_answers_are_right_while_one_fault_of_each_kind_comes(model: Path, tmp_path: Path) -> None:
    result = await soaked(model, tmp_path, SEED, stages=2, generations=GENERATIONS, each=1)
    assert result.complaints == [], "\n".join(result.log)
    assert result.verdicts == {"right": GENERATIONS}
    assert set(result.injected) == set(KINDS), "a fault found nobody to befall"


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 3, 4])
async def test_answers_are_right_while_many_faults_come(stages: int, model: Path, tmp_path: Path) -> None:
    result = await soaked(model, tmp_path, SEED, stages=stages, generations=60, each=8)
    assert result.complaints == [], "\n".join(result.log)
