"""Where to cut a model: what each block costs, from the headers of its checkpoint, and the split that follows.

    cost of a stage = its blocks [+ embeddings, if first] [+ final norm and head, if last]

A stage is as good as its slowest: memory decides how many replicas fit on a machine, arithmetic how long a step takes.
The split therefore minimises the largest stage, where a stage's size is the mean of its share of the model's weight
bytes and its share of the model's FLOPs. The dynamic programme is exact, over whole numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate, islice
from typing import Any

from functions.contract.checkpoint import Checkpoint, CheckpointError, TensorInfo
from functions.contract.frames import ITEM_BYTES
from functions.contract.spans import BlockSpan
from orchestrator.cost import COUNT_MAX, Cost
from orchestrator.plan import Plan, PlanError, StageSpec

KV_TOKENS = 8192  # the reserve of plan_by_memory, unless told otherwise
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_SCALE_BYTES = 4  # of a row of a matrix of int8

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_UNITS = {
    "": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12,
    "tb": 10**12, "ki": 1 << 10, "kib": 1 << 10, "mi": 1 << 20, "mib": 1 << 20, "gi": 1 << 30, "gib": 1 << 30,
    "ti": 1 << 40, "tib": 1 << 40,
}  # fmt: skip

# parts of tensor names; what a multi-modal checkpoint holds beside its decoder is not served
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|project_in)(\.|$)")
_TOKEN_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embedding)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
_OTHER_TOWERS = re.compile(r"(^|\.)(vision\w*|visual|audio\w*|image\w*|multi_modal\w*|mm_\w+|aligner|connector)\.")
# buffers that older releases saved among the weights
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|attn\.masked_bias|attn\.(attention\.)?bias)$")
_CAST = frozenset({"F64", "F32", "F16", "BF16"})  # loaded as the plan's dtype
# settings that say where a checkpoint came from rather than what the model is
_PROVENANCE = frozenset({"transformers_version", "_name_or_path"})


@dataclass(frozen=True)
class ModelCost:
    """The cost of each block, and of what stands before (embeddings) and after them (final norm, head).

    `tied` is how much of `after` a stage saves that also holds the embedding, whose matrix the head then shares."""

    blocks: tuple[Cost, ...]
    before: Cost
    after: Cost
    tied: Cost = field(default_factory=Cost)

    def of(self, span: BlockSpan) -> Cost:
        """The cost of a stage that runs `span`."""
        ends = [self.before] if span.start == 0 else []
        ends += [self.after] if span.end == len(self.blocks) else []
        cost = sum(ends, self._sums[span.end])
        start = self._sums[span.start]
        saved = self.tied if len(ends) == 2 else Cost()
        return Cost(
            cost.parameters - start.parameters - saved.parameters,
            cost.weight_bytes - start.weight_bytes - saved.weight_bytes,
            cost.kv_bytes_per_token - start.kv_bytes_per_token,
            cost.flops_per_token - start.flops_per_token,
        )

    @property
    def whole(self) -> Cost:
        """The cost of the model in one stage."""
        return self.of(BlockSpan(0, len(self.blocks)))

    @cached_property
    def _sums(self) -> tuple[Cost, ...]:
        return tuple(accumulate(self.blocks, initial=Cost()))


def model_cost(checkpoint: Checkpoint, dtype: str = "auto", quantize: str = "none") -> ModelCost:
    """Costs when loaded as `dtype` (auto: as config.json says), with `quantize` the matrices of the blocks and the head
    as int8 with a scale a row. Raises CheckpointError that names what is missing.

    Estimates where headers do not tell: tensors with several values to an item (4-bit weights) count as items, and
    the KV cache of latent attention (MLA) counts as full keys and values, which is how Transformers caches it."""
    item_bytes = _item_bytes(checkpoint, dtype)
    blocks, beside = _sorted_tensors(checkpoint)
    share = _expert_share(checkpoint.text_config)
    kv_bytes = _kv_values_per_token(checkpoint.text_config) * item_bytes
    if not 0 <= kv_bytes * checkpoint.block_count <= COUNT_MAX:
        raise CheckpointError(
            f"{checkpoint.location}/config.json: no model has heads of such a number and size (head_dim, hidden_size, "
            "num_attention_heads, num_key_value_heads)"
        )
    embedding = _token_embedding(checkpoint, beside)
    before = [info for info in beside if _EMBEDDING.search(info.name) and not _HEAD.search(info.name)]
    after = [info for info in beside if info not in before]
    int8 = quantize == "int8"
    after_cost = _cost(after, item_bytes, int8=_is_head if int8 else _never)
    tied = Cost()
    if not any(_HEAD.search(info.name) for info in after):
        shared = _cost([embedding], item_bytes, int8=_is_matrix if int8 else _never)
        # one matrix serves both ends, but arithmetic is done where the head is; quantised, the head has one of its own
        same_bytes = 0 if int8 else shared.weight_bytes
        after_cost, tied = after_cost + shared, Cost(shared.parameters, same_bytes)
    lookups = _cost(before, item_bytes)
    return ModelCost(
        tuple(
            _cost(tensors, item_bytes, share, _is_linear if int8 else _never) + Cost(kv_bytes_per_token=kv_bytes)
            for tensors in blocks
        ),
        Cost(lookups.parameters, lookups.weight_bytes),  # looking up is no arithmetic
        after_cost,
        tied,
    )


def plan_by_stages(
    checkpoint: Checkpoint,
    stages: int,
    *,
    dtype: str = "auto",
    quantize: str = "none",
    name: str | None = None,
    model: str | None = None,
) -> Plan:
    """The split into `stages` whose largest stage is smallest; among equals the one with the most even spans.

    `model` is written into the plan where that should differ from the checkpoint's location. Raises PlanError for more
    stages than blocks and CheckpointError for a checkpoint that lacks some."""
    count = checkpoint.block_count
    if not 1 <= stages <= count:
        raise PlanError(
            f"{checkpoint.location} has {count} block{'s' if count != 1 else ''}, so it can be cut into 1 to {count} "
            f"stages, not into {stages}"
        )
    cost = model_cost(checkpoint, dtype, quantize)
    return _plan(checkpoint, cost, split(_sizes(cost), stages), dtype, quantize, name, model)


def plan_by_memory(
    checkpoint: Checkpoint,
    memory_bytes: int,
    *,
    kv_tokens: int = KV_TOKENS,
    dtype: str = "auto",
    quantize: str = "none",
    name: str | None = None,
    model: str | None = None,
) -> Plan:
    """The fewest stages that each fit into `memory_bytes` with their weights and KV caches of `kv_tokens` tokens.

    Among these the split is balanced like that of `plan_by_stages`. Activations, and what a process needs anyway, are
    not counted. Raises PlanError that names the smallest memory that would do, and CheckpointError."""
    cost = model_cost(checkpoint, dtype, quantize)
    count = len(cost.blocks)

    @cache
    def fits(start: int, end: int) -> bool:
        return needed_bytes(cost.of(BlockSpan(start, end)), kv_tokens) <= memory_bytes

    alone = [needed_bytes(cost.of(BlockSpan(block, block + 1)), kv_tokens) for block in range(count)]
    if max(alone) > memory_bytes:
        raise PlanError(_too_small(checkpoint, alone, memory_bytes, kv_tokens))
    lengths = split(_sizes(cost), _fewest(count, fits), fits)
    return _plan(checkpoint, cost, lengths, dtype, quantize, name, model)


def needed_bytes(cost: Cost, kv_tokens: int) -> int:
    """Weights, and a KV cache of `kv_tokens` tokens."""
    return cost.weight_bytes + kv_tokens * cost.kv_bytes_per_token


def check_plan(plan: Plan, checkpoint: Checkpoint) -> None:
    """Whether the plan is one for this checkpoint. Raises PlanError, or CheckpointError."""
    count = checkpoint.block_count
    if plan.stages[-1].blocks.end != count:
        raise PlanError(
            f"the plan's stages end at block {plan.stages[-1].blocks.end}, {checkpoint.location} has {count} blocks; "
            "edit the plan, or make a new one with `stagecraft plan`"
        )
    if plan.fingerprint not in (None, fingerprint(checkpoint)):
        raise PlanError(
            f"the plan was made for another checkpoint than {checkpoint.location} (its fingerprint differs); make a "
            "new one with `stagecraft plan`, or remove the line `fingerprint` if the change is meant"
        )


def fingerprint(checkpoint: Checkpoint) -> str:
    """16 hex digits over the configuration and the names, types and shapes of all tensors (not over their values)."""
    config = {key: value for key, value in checkpoint.config.items() if key not in _PROVENANCE}
    tensors = sorted((info.name, info.dtype, info.shape) for info in checkpoint.tensors.values())
    return hashlib.sha256(json.dumps([config, tensors], sort_keys=True).encode()).hexdigest()[:16]


def summary(plan: Plan, cost: ModelCost) -> list[str]:
    """A line for each stage: what it holds and takes. For the comments of `dump_plan`."""
    lines = []
    for stage in plan.stages:
        span, part = stage.blocks, cost.of(stage.blocks)
        blocks = f"block {span.start}" if len(span) == 1 else f"blocks {span.start} to {span.end - 1}"
        names = [*(["embeddings"] if span.start == 0 else []), blocks]
        names += ["norm and head"] if span.end == len(cost.blocks) else []
        lines.append(
            f"{' + '.join(names)}: {count_text(part.parameters)} parameters, "
            f"{size_text(part.weight_bytes)} of weights, {size_text(part.kv_bytes_per_token)} of KV cache per token"
        )
    return lines


def parse_size(text: str) -> int:
    """'16GiB', '800 MiB', '2GB', '1.5Gi' or plain bytes -> bytes. Raises ValueError with what is allowed."""
    match = _SIZE.fullmatch(text.strip())
    factor = _UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(
            f"a size is a number and a unit (KiB, MiB, GiB, TiB, KB, MB, GB, TB), such as 16GiB; got {text!r}"
        )
    if len(match[1]) > 20:
        raise ValueError(f"a size has at most 20 digits, got {text[:40]!r}")
    size = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if size < 1:
        raise ValueError(f"a size is at least 1 byte, got {text!r}")
    return size


def size_text(size_bytes: int) -> str:
    """Bytes for people, such as 1.5 GiB."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.{0 if unit == 'B' else 1}f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def count_text(count: int) -> str:
    """A count for people, such as 2.6 M."""
    for factor, unit in ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= factor:
            return f"{count / factor:.1f}{unit}"
    return str(count)


Fits = Callable[[int, int], bool]


def split(sizes: Sequence[int], stages: int, fits: Fits = lambda start, end: True) -> list[int]:
    """Lengths of `stages` contiguous groups of `sizes` whose largest sum is smallest; then the most even lengths.

    Only groups [start, end) that `fits` allows are made; raises ValueError when there is no such split. Exact: one
    dynamic programme finds the smallest possible maximum, a second the least sum of squared lengths within it."""
    sums = list(accumulate(sizes, initial=0))

    def weight(start: int, end: int) -> float:
        return sums[end] - sums[start] if fits(start, end) else math.inf

    limit, _ = _programme(len(sizes), stages, weight, max)
    if limit == math.inf:
        raise ValueError(f"no split of {len(sizes)} blocks into {stages} stages fits")

    def unevenness(start: int, end: int) -> float:
        return (end - start) ** 2 if weight(start, end) <= limit else math.inf

    _, borders = _programme(len(sizes), stages, unevenness, lambda left, right: left + right)
    return [end - start for start, end in zip([0, *borders], [*borders, len(sizes)], strict=True)]


def _programme(
    count: int, stages: int, cost: Callable[[int, int], float], join: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """The least joined cost of cutting 0..count into `stages` non-empty groups, and the inner borders.

    best[end] is the least cost of the first `end` blocks in as many groups as rounds have passed."""
    best: list[float] = [math.inf] + [cost(0, end) for end in range(1, count + 1)]
    choices: list[list[int]] = []
    for groups in range(2, stages + 1):
        row, cuts = [math.inf] * (count + 1), [0] * (count + 1)
        for end in range(groups, count + 1):
            row[end], cuts[end] = min((join(best[cut], cost(cut, end)), cut) for cut in range(groups - 1, end))
        best = row
        choices.append(cuts)
    borders, end = [], count
    for cuts in reversed(choices):
        end = cuts[end]
        borders.append(end)
    return best[count], borders[::-1]


def _fewest(count: int, fits: Fits) -> int:
    """How few groups will do: filling each as far as it goes is best, as adding a block never makes a group smaller.

    (But for the head of a tied model, which costs nothing in a single stage: that one is tried first.)"""
    if fits(0, count):
        return 1
    groups, start = 0, 0
    while start < count:
        end = start + 1
        while end < count and fits(start, end + 1):
            end += 1
        groups, start = groups + 1, end
    return groups


def _sizes(cost: ModelCost) -> list[int]:
    """The size of each block for `split`, those at the ends with what stands there: both shares on one scale."""
    units = list(cost.blocks)
    units[0] += cost.before
    units[-1] += cost.after
    all_bytes = max(1, sum(unit.weight_bytes for unit in units))
    all_flops = max(1, sum(unit.flops_per_token for unit in units))
    return [unit.weight_bytes * all_flops + unit.flops_per_token * all_bytes for unit in units]


def _plan(
    checkpoint: Checkpoint,
    cost: ModelCost,
    lengths: Iterable[int],
    dtype: str,
    quantize: str,
    name: str | None,
    model: str | None,
) -> Plan:
    ends = list(accumulate(lengths))
    spans = [BlockSpan(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    location = checkpoint.location.rstrip("/")
    return Plan(
        model or location,
        name or re.split(r"[/\\]", location)[-1].partition("@")[0] or "model",
        tuple(StageSpec(span, cost.of(span)) for span in spans),
        dtype,
        ends[-1],
        fingerprint(checkpoint),
        quantize,
    )


def _too_small(checkpoint: Checkpoint, alone: Sequence[int], memory_bytes: int, kv_tokens: int) -> str:
    block = max(range(len(alone)), key=alone.__getitem__)
    where = [f"block {block}"]
    where += ["the embeddings"] if block == 0 else []
    where += ["the head"] if block == len(alone) - 1 else []
    return (
        f"{checkpoint.location}: {' with '.join(where[:2])}{' and the head' if len(where) == 3 else ''} alone needs "
        f"{size_text(alone[block])} (weights, and KV caches of {kv_tokens} tokens), a stage has "
        f"{size_text(memory_bytes)}; the smallest memory that would do is {math.ceil(alone[block] / (1 << 20))}MiB"
    )


def _sorted_tensors(checkpoint: Checkpoint) -> tuple[list[list[TensorInfo]], list[TensorInfo]]:
    """The decoder's tensors: by block, and those beside the blocks. Blocks past the model's last are not served."""
    count = checkpoint.block_count
    blocks: dict[int, list[TensorInfo]] = {}
    beside: list[TensorInfo] = []
    for info in checkpoint.tensors.values():
        if _OTHER_TOWERS.search(info.name) or _is_buffer(info):
            continue
        if info.block is None:
            beside.append(info)
        elif info.block < count:
            blocks.setdefault(info.block, []).append(info)
    if len(blocks) < count:
        missing = [str(block) for block in islice((b for b in range(count) if b not in blocks), 5)]
        more = count - len(blocks) - len(missing)
        raise CheckpointError(
            f"{checkpoint.location} has no tensors for block{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
            f"{f' and {more} more' if more else ''}, config.json speaks of {count} blocks; "
            "the checkpoint is incomplete, copy or download it again"
        )
    return [blocks[block] for block in range(count)], beside


def _is_buffer(info: TensorInfo) -> bool:
    return bool(_BUFFERS.search(info.name)) and (not info.name.endswith("bias") or len(info.shape) in (0, 4))


def _token_embedding(checkpoint: Checkpoint, beside: Iterable[TensorInfo]) -> TensorInfo:
    for info in beside:
        if _TOKEN_EMBEDDING.search(info.name) and len(info.shape) == 2:
            return info
    raise CheckpointError(
        f"{checkpoint.location} has no token embedding (such as model.embed_tokens.weight); "
        "the checkpoint is incomplete, or of an architecture that the planner does not know"
    )


def _never(info: TensorInfo) -> bool:
    return False


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and info.dtype in _CAST


def _is_head(info: TensorInfo) -> bool:
    return _is_matrix(info) and bool(_HEAD.search(info.name))


def _is_linear(info: TensorInfo) -> bool:
    """Whether a tensor of a block is the weight of a linear layer. Experts are loaded as one packed tensor."""
    return _is_matrix(info) and info.name.endswith(".weight") and "experts" not in info.name.split(".")


def _cost(
    tensors: Iterable[TensorInfo],
    item_bytes: int,
    expert_share: float = 1.0,
    int8: Callable[[TensorInfo], bool] = _never,
) -> Cost:
    parameters = weight_bytes = 0
    active = 0.0
    for info in tensors:
        count = math.prod(info.shape)
        parameters += count
        # whole numbers and 8-bit floats are packed weights or their scales: they are loaded as they are stored
        if int8(info):
            weight_bytes += count + _SCALE_BYTES * info.shape[0]
        else:
            weight_bytes += count * (item_bytes if info.dtype in _CAST else ITEM_BYTES[info.dtype])
        active += count * (expert_share if "experts" in info.name.split(".") else 1.0)
    return Cost(parameters, weight_bytes, 0, 2 * round(active))


def _item_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of a weight once loaded. As the stages read auto: config.json's dtype, bfloat16 if it names none."""
    if dtype != "auto":
        return DTYPE_BYTES[dtype]
    saved = checkpoint.text_config.get("dtype") or checkpoint.text_config.get("torch_dtype")
    return DTYPE_BYTES.get(str(saved).removeprefix("torch."), 2)


def _expert_share(config: Mapping[str, Any]) -> float:
    """The part of a block's experts that a token meets; 1 where the configuration does not say."""
    total = _number(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    used = _number(config, "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k")
    return min(used, total) / total if total and used else 1.0


def _kv_values_per_token(config: Mapping[str, Any]) -> int:
    """How many numbers a block caches for a token: keys and values of every KV head.

    Unknown architectures without heads (state-space models) count as one head as wide as the hidden state."""
    hidden = _number(config, "hidden_size", "n_embd", "d_model", "word_embed_proj_dim") or 0
    heads = _number(config, "num_attention_heads", "n_head", "n_heads", "num_heads") or 1
    if _number(config, "kv_lora_rank"):
        key = (_number(config, "qk_nope_head_dim") or 0) + (_number(config, "qk_rope_head_dim") or 0)
        return heads * (key + (_number(config, "v_head_dim") or 0))
    one_head = config.get("multi_query") is True and config.get("new_decoder_architecture") is not True
    kv_heads = 1 if one_head else _number(config, "num_key_value_heads", "num_kv_heads", "n_kv_heads") or heads
    return 2 * kv_heads * (_number(config, "head_dim") or hidden // heads)


def _number(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these settings that is a whole number above 0."""
    return next((config[key] for key in keys if type(config.get(key)) is int and config[key] > 0), None)
