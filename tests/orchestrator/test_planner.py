"""Where models are cut: costs against the parameters that Transformers counts, splits against brute force."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functions.contract.checkpoint import Checkpoint, CheckpointError, TensorInfo, open_checkpoint
from functions.contract.spans import BlockSpan
from functions.span_model import load_span
from orchestrator.cost import Cost
from orchestrator.plan import Plan, PlanError
from orchestrator.planner import (
    ModelCost,
    check_plan,
    fingerprint,
    model_cost,
    needed_bytes,
    parse_size,
    plan_by_memory,
    plan_by_stages,
    split,
    summary,
)

LLAMA = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
# settings of tiny models, and how many numbers each of their blocks caches for a token
TINY: dict[str, tuple[dict[str, Any], int]] = {
    "llama": ({**LLAMA, "num_hidden_layers": 4, "num_key_value_heads": 2}, 16),
    "qwen3": ({**LLAMA, "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 8}, 32),
    "gemma2": ({**LLAMA, "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 8}, 32),
    "mixtral": (
        {**LLAMA, "num_hidden_layers": 3, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 1},
        16,
    ),
    "phi3": ({**LLAMA, "num_hidden_layers": 3, "num_key_value_heads": 2, "pad_token_id": 0}, 16),
    "gpt_oss": (
        {
            **LLAMA,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        32,
    ),
    "gpt2": ({"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32}, 32),
    "opt": (
        {
            "vocab_size": 64,
            "hidden_size": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 8,
            "max_position_embeddings": 32,
        },
        32,
    ),
}
TIED = {"gemma2", "gpt2", "opt"}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Checkpoint, int]]:
    """From a name of TINY to (checkpoint, parameters that Transformers counts)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[str, tuple[Checkpoint, int]] = {}

    def save(kind: str) -> tuple[Checkpoint, int]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY[kind][0]))
            model.save_pretrained(folder, max_shard_size="20KB")
            made[kind] = open_checkpoint(str(folder)), sum(p.numel() for p in model.parameters())
        return made[kind]

    return save


def invented(
    blocks: int = 4, config: Mapping[str, Any] | None = None, without: str = "", hidden: int = 4, vocab: int = 8
) -> Checkpoint:
    """The headers of an untied Llama-like model that exists nowhere; tensors whose name has `without` are left out."""
    matrix = (vocab, hidden)
    shapes = {"model.embed_tokens.weight": matrix, "model.norm.weight": (hidden,), "lm_head.weight": matrix}
    shapes |= {f"model.layers.{i}.mlp.weight": (hidden, 10) for i in range(blocks)} | {
        "lm_head.weight": (vocab, hidden)
    }
    tensors = {
        name: TensorInfo(name, "BF16", shape, "model.safetensors", 0, 0)
        for name, shape in shapes.items()
        if not without or without not in name
    }
    settings = {"num_hidden_layers": blocks, "hidden_size": hidden, "num_attention_heads": 2, **(config or {})}
    return Checkpoint("/nowhere/invented", settings, tensors)


@pytest.mark.parametrize("kind", TINY)
def test_every_parameter_is_counted_in_exactly_one_stage(kind: str, saved: Any) -> None:
    checkpoint, parameters = saved(kind)
    cost = model_cost(checkpoint, "float32")
    assert cost.whole.parameters == parameters
    assert cost.whole.weight_bytes == 4 * parameters
    embedding = max(checkpoint.tensors.values(), key=lambda t: t.shape[0] if t.block is None else 0)
    again = embedding.shape[0] * embedding.shape[1] if kind in TIED else 0
    for stages in range(2, checkpoint.block_count + 1):
        parts = [cost.of(stage.blocks) for stage in plan_by_stages(checkpoint, stages).stages]
        assert sum(part.parameters for part in parts) == parameters + again
        assert sum(part.flops_per_token for part in parts) == cost.whole.flops_per_token


@pytest.mark.parametrize("kind", TINY)
def test_every_block_caches_its_keys_and_values(kind: str, saved: Any) -> None:
    cost = model_cost(saved(kind)[0], "float16")
    assert {block.kv_bytes_per_token for block in cost.blocks} == {2 * TINY[kind][1]}
    assert all(block.parameters > 0 for block in cost.blocks)


@pytest.mark.parametrize(("used", "total"), [(10**400, 1), (1, 10**400), (10**400, 10**400)])
def test_no_number_of_experts_is_too_large(used: int, total: int) -> None:
    checkpoint = invented(config={"num_local_experts": total, "num_experts_per_tok": used})
    assert model_cost(checkpoint).blocks[0].parameters == model_cost(invented()).blocks[0].parameters


def test_tokens_meet_only_their_share_of_the_experts(saved: Any) -> None:
    dense = [t for t in saved("mixtral")[0].tensors.values() if t.block == 0 and ".experts." not in t.name]
    experts = [t for t in saved("mixtral")[0].tensors.values() if t.block == 0 and ".experts." in t.name]
    assert experts

    def count(tensors: list[TensorInfo]) -> int:
        return sum(t.nbytes // 4 for t in tensors)

    block = model_cost(saved("mixtral")[0]).blocks[0]
    assert block.parameters == count(dense) + count(experts)
    assert block.flops_per_token == 2 * (count(dense) + count(experts) // 4)


def test_the_head_is_arithmetic_and_the_embedding_is_not(saved: Any) -> None:
    for kind in ("llama", "gemma2"):
        cost = model_cost(saved(kind)[0])
        assert cost.before.flops_per_token == 0
        assert cost.before.parameters == 64 * 16
        assert cost.after.flops_per_token == 2 * (64 * 16 + 16), "head and final norm"


def test_bytes_follow_the_dtype(saved: Any) -> None:
    checkpoint = saved("llama")[0]
    full, half = model_cost(checkpoint, "float32"), model_cost(checkpoint, "float16")
    assert full.whole.weight_bytes == 2 * half.whole.weight_bytes
    assert model_cost(checkpoint, "auto") == full, "as it was saved"


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "mixtral", "phi3"])
@pytest.mark.parametrize("stages", [1, 2])
def test_int8_is_counted_as_stages_hold_it(kind: str, stages: int, saved: Any) -> None:
    checkpoint = saved(kind)[0]
    for stage in plan_by_stages(checkpoint, stages, dtype="float32", quantize="int8").stages:
        loaded = load_span(checkpoint, stage.blocks, torch.float32, torch.device("cpu"), quantization="int8")
        assert stage.cost is not None
        assert stage.cost.weight_bytes == pytest.approx(loaded.weight_bytes, rel=0.02), "norms outside the blocks"


def test_int8_changes_neither_arithmetic_nor_caches(saved: Any) -> None:
    plain, int8 = (model_cost(saved("llama")[0], "float32", quantize).whole for quantize in ("none", "int8"))
    assert int8 == replace(plain, weight_bytes=int8.weight_bytes)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ({"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}, 2 * (4 + 2 + 3)),
        ({"multi_query": True}, 2 * 2),
        ({"num_attention_heads": None}, 2 * 4),
        ({"head_dim": 7, "num_key_value_heads": 1}, 2 * 7),
    ],
    ids=["mla", "multi-query", "no-heads", "head-dim"],
)
def test_kv_of_rarer_attention(config: dict[str, Any], values: int) -> None:
    assert model_cost(invented(config=config)).blocks[0].kv_bytes_per_token == 2 * values


def test_other_towers_later_blocks_and_buffers_are_not_counted() -> None:
    checkpoint = invented(2)
    extra = ["vision_tower.layers.0.w", "model.layers.2.mtp.w", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    more = {name: TensorInfo(name, "BF16", (99,), "f", 0, 0) for name in extra}
    fuller = Checkpoint(checkpoint.location, checkpoint.config, {**checkpoint.tensors, **more})
    assert model_cost(fuller) == model_cost(checkpoint)


sizes = st.lists(st.integers(0, 30), min_size=1, max_size=9)


@given(sizes, st.data())
def test_no_other_split_is_better(sizes: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(sizes)))

    def quality(lengths: list[int]) -> tuple[int, int]:
        at, sums = 0, []
        for length in lengths:
            sums.append(sum(sizes[at : at + length]))
            at += length
        return max(sums), sum(length**2 for length in lengths)

    every = []
    for cuts in combinations(range(1, len(sizes)), stages - 1):
        borders = [0, *cuts, len(sizes)]
        every.append([b - a for a, b in pairwise(borders)])
    lengths = split(sizes, stages)
    assert len(lengths) == stages
    assert min(lengths) > 0
    assert sum(lengths) == len(sizes)
    assert quality(lengths) == min(map(quality, every))


@given(st.integers(1, 12), st.data())
def test_plans_cover_every_block_once(blocks: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, blocks))
    plan = plan_by_stages(invented(blocks), stages)
    covered = [b for stage in plan.stages for b in range(stage.blocks.start, stage.blocks.end)]
    assert covered == list(range(blocks))
    assert len(plan.stages) == stages


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 20))
def test_memory_plans_fit_with_the_fewest_stages(blocks: int, kilobytes: int, kv_tokens: int) -> None:
    checkpoint = invented(blocks, hidden=16, vocab=32)
    cost = model_cost(checkpoint)
    memory = kilobytes * 200

    def fits(borders: list[int]) -> bool:
        pairs = pairwise(borders)
        return all(needed_bytes(cost.of(BlockSpan(a, b)), kv_tokens) <= memory for a, b in pairs)

    fewest = next(
        (n for n in range(1, blocks + 1) for cuts in combinations(range(1, blocks), n - 1) if fits([0, *cuts, blocks])),
        None,
    )
    try:
        plan = plan_by_memory(checkpoint, memory, kv_tokens=kv_tokens)
    except PlanError:
        assert fewest is None
    else:
        assert len(plan.stages) == fewest
        assert fits([0, *(stage.blocks.end for stage in plan.stages)])


def test_ends_make_stages_shorter() -> None:
    heavy_ends = plan_by_stages(invented(12, hidden=8, vocab=40), 3)
    lengths = [len(stage.blocks) for stage in heavy_ends.stages]
    assert lengths[1] > lengths[0]
    assert lengths[1] > lengths[2]


def test_a_tied_head_costs_nothing_in_a_single_stage() -> None:
    whole, part = Cost(10, 20, 1, 4), Cost(6, 12)
    cost = ModelCost((whole, whole), part, part, tied=part)
    assert cost.whole.weight_bytes == 20 + 20 + 12
    assert cost.of(BlockSpan(0, 1)).weight_bytes == cost.of(BlockSpan(1, 2)).weight_bytes == 32


@pytest.mark.parametrize("stages", [0, -1, 5])
def test_more_stages_than_blocks_names_both(stages: int) -> None:
    with pytest.raises(PlanError, match=f"has 4 blocks, .* 1 to 4 stages, not into {stages}"):
        plan_by_stages(invented(4), stages)


def test_too_little_memory_names_the_least_that_would_do() -> None:
    checkpoint = invented(3, hidden=512, vocab=4096)
    with pytest.raises(PlanError, match=r"block 2 with the head alone .* 100 tokens.* that would do is 5MiB"):
        plan_by_memory(checkpoint, 1 << 20, kv_tokens=100)
    assert plan_by_memory(checkpoint, parse_size("5MiB"), kv_tokens=100).stages


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("layers.3.", "no tensors for block 3, config.json speaks of 9 blocks"),
        ("layers.", "no tensors for blocks 0, 1, 2, 3, 4 and 4 more"),
        ("embed", "no token embedding"),
    ],
)
def test_a_checkpoint_with_a_hole_names_it(without: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        plan_by_stages(invented(9, without=without), 2)


@pytest.mark.parametrize("size", [10**18, 10**70, 10**400], ids=["18 digits", "70", "400"])
def test_heads_of_a_size_that_no_model_has_are_told(size: int) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no model has heads of such a number and size \(head_dim"):
        plan_by_stages(invented(config={"head_dim": size}), 2)


def test_an_absurd_number_of_blocks_is_refused_at_once() -> None:
    with pytest.raises(CheckpointError, match="no tensors for blocks 2, 3, 4, 5, 6 and 999999993 more"):
        model_cost(invented(2, config={"num_hidden_layers": 10**9}))


def test_a_plan_knows_its_checkpoint(saved: Any) -> None:
    checkpoint = saved("llama")[0]
    plan = plan_by_stages(checkpoint, 2, dtype="float32", name="mine", model="owner/name")
    assert (plan.model, plan.name, plan.dtype, plan.block_count) == ("owner/name", "mine", "float32", 4)
    check_plan(plan, checkpoint)
    cost = model_cost(checkpoint, "float32")
    assert [stage.cost for stage in plan.stages] == [cost.of(stage.blocks) for stage in plan.stages]
    with pytest.raises(PlanError, match=r"end at block 4, .* has 3 blocks"):
        check_plan(plan, saved("phi3")[0])
    with pytest.raises(PlanError, match="made for another checkpoint"):
        check_plan(plan, invented(4))
    check_plan(Plan("m", "n", plan.stages), invented(4))


def test_the_fingerprint_is_of_the_model_not_of_its_place() -> None:
    one = invented(4, config={"transformers_version": "5.1"})
    moved = Checkpoint("/elsewhere", {**one.config, "transformers_version": "5.2"}, one.tensors)
    assert fingerprint(one) == fingerprint(moved)
    assert fingerprint(one) != fingerprint(invented(4, config={"rope_theta": 1}))
    assert fingerprint(one) != fingerprint(invented(4, vocab=9))


def test_the_summary_says_what_each_stage_holds(saved: Any) -> None:
    checkpoint = saved("llama")[0]
    lines = summary(plan_by_stages(checkpoint, 4), model_cost(checkpoint))
    assert lines[0].startswith("embeddings + block 0: ")
    assert lines[1].startswith("block 1: ")
    assert lines[3].startswith("block 3 + norm and head: ")
    assert all("parameters" in line and "KV cache per token" in line for line in lines)


def test_the_demonstration_model_can_be_planned(root: Path) -> None:
    demo = open_checkpoint(str(root / "models" / "demo"))
    stored = json.loads((root / "models" / "demo" / "config.json").read_text())
    assert len(plan_by_stages(demo, 2).stages) == 2
    assert model_cost(demo).whole.kv_bytes_per_token == 2 * 2 * 4 * 32 * stored["num_hidden_layers"]


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("16GiB", 16 << 30),
        ("800MiB", 800 << 20),
        ("2GB", 2 * 10**9),
        ("1.5 Gi", 3 << 29),
        ("4g", 4 * 10**9),
        ("123", 123),
        (" 7KiB ", 7 << 10),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "0.1", "1 GiBs", "1e9", "16 G B", "½GB", "9" * 30, "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size"):
        parse_size(text)
