"""What the benchmarks ask for: words, lengths of a trace, passes of the floor."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import checkpoints
from benchmarks.bench import Bench, MeasureError
from benchmarks.floors import linear_floor, passes
from benchmarks.kv_watch import KvSample, KvWatch, sample_of
from benchmarks.peers import transformers_peer
from benchmarks.prompts import prompts_of, read, spell
from benchmarks.traces import Arrival, Scale, excerpt
from functions.contract.spans import BlockSpan
from orchestrator.chain import ChainSettings
from orchestrator.layout import Layout

SCALE = Scale(prompt_by=10, prompt_max=50, output_by=4, output_max=30, span_s=2.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny one, which speaks in words."""
    return asyncio.run(checkpoints.spelling(Bench(tmp_path_factory.mktemp("bench"), quick=True)))


def test_every_token_is_a_word_to_the_tokenizer_of_a_spelling_model(model: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = list(range(checkpoints.vocab_size(model)))
    assert tokenizer.encode(spell(ids)).ids == ids
    assert read(tokenizer.decode(ids)) == ids


async def test_shorter_prompts_of_a_batch_get_the_tokens_that_they_get_alone(model: Path) -> None:
    prompts = prompts_of([3, 9, 5], checkpoints.vocab_size(model))
    async with transformers_peer(model, 1) as peer:
        together = await peer.generate(prompts, 6)
        alone = [(await peer.generate([prompt], 6)).tokens[0] for prompt in prompts]
    assert together.tokens == alone


def test_lengths_are_divided_rounded_up_and_cut_off() -> None:
    found = SCALE.apply([Arrival(5.0, 1, 1), Arrival(6.0, 11, 9), Arrival(9.0, 9999, 9999)])
    assert found == [Arrival(0.0, 1, 1), Arrival(0.5, 2, 3), Arrival(2.0, 50, 30)]


def test_requests_that_all_come_at_once_still_do() -> None:
    assert [one.at_s for one in SCALE.apply([Arrival(5.0, 1, 1), Arrival(5.0, 1, 1)])] == [0.0, 0.0]


def test_an_excerpt_is_the_beginning_of_a_trace(tmp_path: Path) -> None:
    rows = "arrival_s,prompt_tokens,output_tokens\n0.5,42,167\n0.7,10,20\n1.5,1,1\n"
    (tmp_path / "some.csv.gz").write_bytes(gzip.compress(rows.encode()))
    assert excerpt("some", 2, tmp_path) == [Arrival(0.5, 42, 167), Arrival(0.7, 10, 20)]


def test_a_trace_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match=r"no trace other\.csv\.gz"):
        excerpt("other", 2, tmp_path)


@given(st.integers(1, 64), st.integers(1, 300), st.integers(1, 70))
def test_passes_of_the_floor_are_the_rows_of_a_lane(sequences: int, prompt: int, new: int) -> None:
    found = passes(sequences, prompt, new)
    assert sum(rows * count for rows, _, count in found) == sequences * (prompt + new - 1)
    assert sum(sampled * count for _, sampled, count in found) == sequences * new
    assert all(0 < rows <= max(ChainSettings().step_tokens_max, sequences) and count > 0 for rows, _, count in found)
    assert all(sampled <= sequences for _, sampled, _ in found)


@pytest.mark.parametrize("spread", [1, 2])
async def test_the_floor_of_real_processes_takes_some_time(model: Path, spread: int) -> None:
    layout = Layout(spread, threads=1, in_turn=False)
    async with linear_floor(model, [BlockSpan(0, 2), BlockSpan(2, 4)], layout) as floor:
        way = await floor.choose(4, 8, 3)
        assert await way.seconds() > 0


def metrics(set_aside: int, filled: int) -> str:
    names = {"stagecraft_stage_kv_bytes": set_aside, "stagecraft_stage_kv_bytes_filled": filled}
    return "".join(f"# TYPE {name} gauge\n{name} {value}\n" for name, value in names.items())


def test_kv_bytes_of_all_stages_are_added() -> None:
    assert sample_of([metrics(100, 80), metrics(50, 40)]) == KvSample(150, 120)


def test_metrics_without_kv_bytes_are_told() -> None:
    with pytest.raises(MeasureError, match="kv_bytes_filled"):
        sample_of(["stagecraft_stage_kv_bytes 5\n"])


def test_the_median_sample_is_one_with_something_filled() -> None:
    watch = KvWatch([KvSample(100, 0), KvSample(150, 100), KvSample(110, 100), KvSample(120, 100)])
    assert watch.median() == KvSample(120, 100)
    with pytest.raises(MeasureError, match="never seen"):
        KvWatch([KvSample(100, 0)]).median()
