"""A plan: which blocks of a model each stage runs. Written for people to edit, checked line by line when read.

    version: 1
    name: demo
    model: demo
    dtype: auto
    blocks: 8
    stages:
      - blocks: "0:4"
      - blocks: "4:8"

`docs/plans.md` describes the file; `orchestrator/planner.py` makes plans.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from ruamel.yaml.nodes import Node, ScalarNode, SequenceNode

from functions.contract.spans import BlockSpan
from orchestrator.cost import Cost, StageProfile
from orchestrator.plan_figures import FIGURES_COMMENT, cost_line, profile_lines, read_cost, read_profile
from orchestrator.plan_reader import PlanError as PlanError  # the plan's errors are part of this module's surface
from orchestrator.plan_reader import PlanReader, kind_of, listed, scalar

VERSION = 1
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8")
FILE_BYTES_MAX = 1 << 20
BLOCKS_MAX = 1_000_000  # more than any model has; keeps a slip of the finger out of later sums

_KEYS = ("version", "name", "model", "dtype", "quantize", "blocks", "fingerprint", "stages")
_REQUIRED = ("version", "name", "model", "stages")
_STAGE_KEYS = ("blocks", "cost", "profile")
_SPAN_FORM = 'blocks must be "START:END" (half-open, counted from 0), such as "0:6"'


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage of a plan: what it runs, and what that takes, as far as it is known.

    `cost` is counted from the checkpoint's headers, `profile` was measured; both are of these very blocks."""

    blocks: BlockSpan
    cost: Cost | None = None
    profile: StageProfile | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Checked when built (PlanError): the stages run every block from 0 on exactly once, in order.

    `model` is what `resolve_model` takes: a folder, a URL, a hub id or `demo`. `block_count` is the model's, None when
    unknown; `fingerprint` identifies the checkpoint's configuration and tensors (planner.fingerprint), None when
    unknown."""

    model: str
    name: str
    stages: tuple[StageSpec, ...]
    dtype: str = "auto"
    block_count: int | None = None
    fingerprint: str | None = None
    quantize: str = "none"

    def __post_init__(self) -> None:
        problem = (
            _text_problem("model", self.model)
            or _text_problem("name", self.name)
            or _dtype_problem(self.dtype)
            or _quantize_problem(self.quantize)
            or _fingerprint_problem(self.fingerprint)
        )
        if problem:
            raise PlanError(problem)
        for _, text in _span_problems([stage.blocks for stage in self.stages], self.block_count):
            raise PlanError(text)

    @property
    def digest(self) -> str:
        """16 hex digits; equal for two plans whose stages fit together: same model, dtype, quantisation and
        spans.

        The model counts by its fingerprint, so moving a checkpoint changes nothing; without one, by its name."""
        facts = [self.fingerprint or self.model, self.dtype, [str(stage.blocks) for stage in self.stages]]
        if self.quantize != "none":
            facts.append(self.quantize)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def load_plan(path: str | Path) -> Plan:
    """The plan in a file. Raises PlanError with file, line and what is allowed.

    A model that lies beside the plan file is found from anywhere: see `locate_model`."""
    source = str(path)
    try:
        with open(path, "rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise PlanError(f"{source}: no such file; `stagecraft plan MODEL --stages N -o {source}` makes one") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PlanError(f"{source} cannot be read: {reason}; a plan is a YAML file") from None
    if len(data) > FILE_BYTES_MAX:
        raise PlanError(f"{source} is larger than {FILE_BYTES_MAX >> 20} MiB; that is no plan")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PlanError(f"{source}:{line}: not UTF-8 text; a plan is a YAML file in UTF-8") from None
    plan = parse_plan(text, source)
    return replace(plan, model=locate_model(plan.model, Path(path).parent))


def locate_model(model: str, folder: Path) -> str:
    """The model of a plan file in `folder`: ./x and ../x are meant from that folder, x too where it exists there.

    Everything else (absolute paths, URLs, hub ids, `demo`, paths from the current folder) stays as it is."""
    if "://" in model or Path(model).is_absolute():
        return model
    if model.startswith(("./", "../")) or model in (".", "..") or (folder / model).is_dir():
        return str((folder / model).absolute())
    return model


def parse_plan(text: str, source: str = "plan.yaml") -> Plan:
    """The plan in `text`; `source` is the file name for errors. Raises PlanError."""
    reader = PlanReader(source)
    root = reader.compose(text, _REQUIRED)
    entries = reader.entries(root, "a plan", _KEYS, _REQUIRED)
    version = reader.whole_number(entries["version"], "version", BLOCKS_MAX)
    if version != VERSION:
        reader.fail(entries["version"], f"version {version} is not known; this release reads version {VERSION}")
    values: dict[str, str] = {"dtype": "auto", "quantize": "none"}
    for key, problem in (("name", _text_problem), ("model", _text_problem)):
        values[key] = reader.text(entries[key], key)
        reader.fail_if(entries[key], problem(key, values[key]))
    checks = {"dtype": _dtype_problem, "quantize": _quantize_problem, "fingerprint": _fingerprint_problem}
    for key, check in checks.items():
        if key in entries:
            values[key] = reader.text(entries[key], key)
            reader.fail_if(entries[key], check(values[key]))
    count = reader.whole_number(entries["blocks"], "blocks", BLOCKS_MAX) if "blocks" in entries else None
    if count == 0:
        reader.fail(entries["blocks"], "blocks must be at least 1: how many the model has")
    nodes, stages = _stages(reader, entries["stages"])
    for index, problem_text in _span_problems([stage.blocks for stage in stages], count):
        reader.fail(nodes[index], problem_text)
    return Plan(
        values["model"], values["name"], tuple(stages), values["dtype"], count, values.get("fingerprint"),
        values["quantize"],
    )  # fmt: skip


def dump_plan(plan: Plan, summary: Sequence[str] | None = None) -> str:
    """The plan as commented YAML that `parse_plan` reads back. `summary` gives one line of comment for each stage."""
    lines = [
        "# Plan of Stagecraft: which blocks of the model each stage runs.",
        "# To edit: move the borders between stages, add or take away stages. Every block belongs to exactly one",
        "# stage, in order; START:END is half-open, counted from 0. Serve it with `stagecraft up --plan FILE`.",
        f"version: {VERSION}",
        f"name: {scalar(plan.name)}  # what clients call the model",
        f"model: {scalar(plan.model)}  # a folder (./ is this file's), a URL, a hub id (owner/name@revision), or demo",
        f"dtype: {scalar(plan.dtype)}  # {' | '.join(DTYPES)}; auto: as the checkpoint says, on CPUs float32",
    ]
    if plan.quantize != "none":
        lines.append(f"quantize: {plan.quantize}  # {' | '.join(QUANTIZATIONS)}; of linear layers and the head")
    if plan.block_count is not None:
        lines.append(f"blocks: {plan.block_count}  # of the whole model")
    if plan.fingerprint is not None:
        lines.append(f'fingerprint: "{plan.fingerprint}"  # of the checkpoint; remove it to use another one')
    if any(stage.cost or stage.profile for stage in plan.stages):
        lines += FIGURES_COMMENT
    lines.append("stages:")
    for index, stage in enumerate(plan.stages):
        if summary is not None:
            lines.append(f"  # {index}: {summary[index]}")
        lines.append(f'  - blocks: "{stage.blocks}"')
        if stage.cost is not None:
            lines.append(f"    {cost_line(stage.cost)}")
        if stage.profile is not None:
            lines += [f"    {line}" for line in profile_lines(stage.profile)]
    return "\n".join(lines) + "\n"


def _stages(reader: PlanReader, node: Node) -> tuple[list[Node], list[StageSpec]]:
    """The stages, and the nodes that give the blocks of each."""
    if not isinstance(node, SequenceNode):
        reader.fail(node, f'stages is a list with an entry `- blocks: "START:END"` for each stage, got {kind_of(node)}')
    if not node.value:
        reader.fail(node, "stages is empty; a plan has at least one stage")
    nodes, stages = [], []
    for index, item in enumerate(node.value):
        what = f"stage {index}"
        entries = reader.entries(item, what, _STAGE_KEYS, ("blocks",))
        nodes.append(entries["blocks"])
        cost = read_cost(reader, entries["cost"], what) if "cost" in entries else None
        profile = read_profile(reader, entries["profile"], what) if "profile" in entries else None
        stages.append(StageSpec(_span(reader, entries["blocks"], index), cost, profile))
    return nodes, stages


def _span(reader: PlanReader, node: Node, index: int) -> BlockSpan:
    if not isinstance(node, ScalarNode) or not str(node.tag).endswith(":str"):
        reader.fail(node, f"stage {index}: {_SPAN_FORM}, got {kind_of(node)}")
    try:
        span = BlockSpan.parse(node.value)
    except ValueError as error:
        reader.fail(node, f"stage {index}: {_SPAN_FORM}: {error}")
    if span.end > BLOCKS_MAX:
        reader.fail(node, f"stage {index}: blocks {span} end past {BLOCKS_MAX}, more than any model has")
    return span


def _span_problems(spans: Sequence[BlockSpan], block_count: int | None) -> Iterator[tuple[int, str]]:
    """(index of the stage to look at, what is wrong and what is allowed), in reading order."""
    rule = "each block must be in exactly one stage, in order"
    if not spans:
        yield 0, "a plan needs at least one stage"
        return
    if spans[0].start:
        yield 0, f"stage 0 must start at block 0, not at {spans[0].start}; {rule}"
    if block_count is not None and len(spans) > block_count:
        yield block_count, f"the plan has {len(spans)} stages, the model only {_counted(block_count)}; {rule}"
    for index, (before, span) in enumerate(pairwise(spans), start=1):
        pair = f"stages {index - 1} and {index}"
        overlap = max(before.start, span.start), min(before.end, span.end)
        if overlap[0] < overlap[1]:
            yield index, f"{pair} overlap: {_blocks(*overlap)} in both; {rule}"
        elif span.start > before.end:
            yield index, f"{pair} leave a gap: {_blocks(before.end, span.start)} in neither; {rule}"
        elif span.start != before.end:
            yield index, f"{pair} are in the wrong order: {span} stands after {before}; {rule}"
    if block_count is not None and spans[-1].end != block_count:
        last = f"the last stage ends at {spans[-1].end}, the model has {_counted(block_count)}"
        yield len(spans) - 1, f"{last}; it must end at {block_count}"


def _blocks(start: int, end: int) -> str:
    return f"block {start} is" if end - start == 1 else f"blocks {start} to {end - 1} are"


def _counted(blocks: int) -> str:
    return f"{blocks} block{'s' if blocks != 1 else ''}"


def _text_problem(what: str, value: str) -> str | None:
    if value.strip() and value.isprintable():
        return None
    return f"{what} must be text that can be printed, at least one character, got {value!r}"


def _dtype_problem(value: str) -> str | None:
    return None if value in DTYPES else f"dtype must be one of {listed(DTYPES)}, got {value!r}"


def _quantize_problem(value: str) -> str | None:
    return None if value in QUANTIZATIONS else f"quantize must be one of {listed(QUANTIZATIONS)}, got {value!r}"


def _fingerprint_problem(value: str | None) -> str | None:
    if value is None or re.fullmatch(r"[0-9a-f]{16}", value):
        return None
    return f"fingerprint must be 16 hexadecimal digits, as the planner wrote them, got {value!r}; or remove the line"
