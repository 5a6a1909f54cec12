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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from functions.contract.spans import BlockSpan

VERSION = 1
DTYPES = ("auto", "float32", "bfloat16", "float16")
FILE_BYTES_MAX = 1 << 20
BLOCKS_MAX = 1_000_000  # more than any model has; keeps a slip of the finger out of later sums

_KEYS = ("version", "name", "model", "dtype", "blocks", "fingerprint", "stages")
_REQUIRED = ("version", "name", "model", "stages")
_STAGE_KEYS = ("blocks",)
_TYPES = {
    "tag:yaml.org,2002:str": "text", "tag:yaml.org,2002:int": "a whole number", "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:float": "a number with a fraction", "tag:yaml.org,2002:bool": "true or false",
    "tag:yaml.org,2002:seq": "a list", "tag:yaml.org,2002:map": "a mapping", "tag:yaml.org,2002:timestamp": "a date",
}  # fmt: skip
_SPAN_FORM = 'blocks must be "START:END" (half-open, counted from 0), such as "0:6"'
# words that stay the same text for every YAML reader when they stand without quotes
_PLAIN = re.compile(r"(\.{0,2}/)?[A-Za-z][A-Za-z0-9._/@-]*")
_YAML_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})


class PlanError(Exception):
    """The plan cannot be made or used; the text says where (file and line, when read) and what is allowed."""


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage of a plan."""

    blocks: BlockSpan


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

    def __post_init__(self) -> None:
        problem = (
            _text_problem("model", self.model)
            or _text_problem("name", self.name)
            or _dtype_problem(self.dtype)
            or _fingerprint_problem(self.fingerprint)
        )
        if problem:
            raise PlanError(problem)
        for _, text in _span_problems([stage.blocks for stage in self.stages], self.block_count):
            raise PlanError(text)

    @property
    def digest(self) -> str:
        """16 hex digits; equal for two plans whose stages fit together: same model, dtype and spans.

        The model counts by its fingerprint, so moving a checkpoint changes nothing; without one, by its name."""
        facts = [self.fingerprint or self.model, self.dtype, [str(stage.blocks) for stage in self.stages]]
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
    reader = _Reader(source)
    root = reader.compose(text)
    entries = reader.entries(root, "a plan", _KEYS, _REQUIRED)
    version = reader.whole_number(entries["version"], "version")
    if version != VERSION:
        reader.fail(entries["version"], f"version {version} is not known; this release reads version {VERSION}")
    values: dict[str, str] = {"dtype": "auto"}
    for key, problem in (("name", _text_problem), ("model", _text_problem)):
        values[key] = reader.text(entries[key], key)
        reader.fail_if(entries[key], problem(key, values[key]))
    for key, check in (("dtype", _dtype_problem), ("fingerprint", _fingerprint_problem)):
        if key in entries:
            values[key] = reader.text(entries[key], key)
            reader.fail_if(entries[key], check(values[key]))
    count = reader.whole_number(entries["blocks"], "blocks") if "blocks" in entries else None
    if count == 0:
        reader.fail(entries["blocks"], "blocks must be at least 1: how many the model has")
    nodes, spans = _stages(reader, entries["stages"])
    for index, problem_text in _span_problems(spans, count):
        reader.fail(nodes[index], problem_text)
    return Plan(
        values["model"], values["name"], tuple(map(StageSpec, spans)), values["dtype"], count, values.get("fingerprint")
    )


def dump_plan(plan: Plan, summary: Sequence[str] | None = None) -> str:
    """The plan as commented YAML that `parse_plan` reads back. `summary` gives one line of comment for each stage."""
    lines = [
        "# Plan of Stagecraft: which blocks of the model each stage runs.",
        "# To edit: move the borders between stages, add or take away stages. Every block belongs to exactly one",
        "# stage, in order; START:END is half-open, counted from 0. Serve it with `stagecraft up --plan FILE`.",
        f"version: {VERSION}",
        f"name: {_scalar(plan.name)}  # what clients call the model",
        f"model: {_scalar(plan.model)}  # a folder (./ is this file's), a URL, a hub id (owner/name@revision), or demo",
        f"dtype: {_scalar(plan.dtype)}  # {' | '.join(DTYPES)}; auto: as the checkpoint says, on CPUs float32",
    ]
    if plan.block_count is not None:
        lines.append(f"blocks: {plan.block_count}  # of the whole model")
    if plan.fingerprint is not None:
        lines.append(f'fingerprint: "{plan.fingerprint}"  # of the checkpoint; remove it to use another one')
    lines.append("stages:")
    for index, stage in enumerate(plan.stages):
        if summary is not None:
            lines.append(f"  # {index}: {summary[index]}")
        lines.append(f'  - blocks: "{stage.blocks}"')
    return "\n".join(lines) + "\n"


class _Reader:
    """Walks the nodes that YAML text is made of, which know their lines, and complains in terms of them."""

    def __init__(self, source: str) -> None:
        self._source = source

    def compose(self, text: str) -> Node:
        try:
            root = YAML(typ="safe", pure=True).compose(text)
        except MarkedYAMLError as error:
            self._syntax_error(text, error)
        except (YAMLError, ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0] if str(error) else "nested too deeply"
            raise PlanError(f"{self._source} is not YAML: {reason}") from None
        if root is None:
            raise PlanError(f"{self._source} is empty; a plan has {_listed(_REQUIRED)}")
        return cast(Node, root)

    def fail(self, node: Node, text: str) -> NoReturn:
        raise PlanError(f"{self._source}:{node.start_mark.line + 1}: {text}")

    def fail_if(self, node: Node, text: str | None) -> None:
        if text:
            self.fail(node, text)

    def entries(self, node: Node, what: str, known: Sequence[str], required: Sequence[str]) -> Mapping[str, Node]:
        """The values of a mapping by key."""
        if not isinstance(node, MappingNode):
            self.fail(node, f"{what} is a mapping with {_listed(required)}, got {_kind(node)}")
        found: dict[str, Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, ScalarNode) else _kind(key)
            if name not in known:
                self.fail(key, f"unknown key {name!r} in {what}; known are {_listed(known)}")
            if name in found:
                self.fail(key, f"{name} is given twice, first in line {found[name].start_mark.line + 1}; keep one")
            if str(value.tag).endswith(":null"):
                value.start_mark = key.start_mark  # nothing stands where the next thing does, lines further on
            found[name] = value
        missing = [name for name in required if name not in found]
        if missing:
            self.fail(node, f"{what} lacks {_listed(missing)}; it needs {_listed(required)}")
        return found

    def text(self, node: Node, what: str) -> str:
        if not isinstance(node, ScalarNode) or not str(node.tag).endswith(":str"):
            hint = f'; write it in quotes: "{node.value}"' if isinstance(node, ScalarNode) and node.value else ""
            self.fail(node, f"{what} must be text, got {_kind(node)}{hint}")
        return str(node.value)

    def whole_number(self, node: Node, what: str) -> int:
        plain = isinstance(node, ScalarNode) and str(node.tag).endswith(":int") and re.fullmatch(r"\d{1,9}", node.value)
        if not plain or int(node.value) > BLOCKS_MAX:
            self.fail(node, f"{what} must be a whole number in 0..{BLOCKS_MAX}, got {_kind(node)}")
        return int(node.value)

    def _syntax_error(self, text: str, error: MarkedYAMLError) -> NoReturn:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark is not None else 0
        lines = text.splitlines()
        if line < len(lines) and "\t" in lines[line]:
            problem = "a tab; YAML is indented with spaces only"
        else:
            problem = "; ".join(str(part) for part in (error.context, error.problem) if part)
            problem = f"not YAML: {problem}"
        raise PlanError(f"{self._source}:{line + 1}: {problem}") from None


def _stages(reader: _Reader, node: Node) -> tuple[list[Node], list[BlockSpan]]:
    """The nodes that give the blocks of each stage, and what they say."""
    if not isinstance(node, SequenceNode):
        reader.fail(node, f'stages is a list with an entry `- blocks: "START:END"` for each stage, got {_kind(node)}')
    if not node.value:
        reader.fail(node, "stages is empty; a plan has at least one stage")
    nodes, spans = [], []
    for index, item in enumerate(node.value):
        value = reader.entries(item, f"stage {index}", _STAGE_KEYS, _STAGE_KEYS)["blocks"]
        nodes.append(value)
        spans.append(_span(reader, value, index))
    return nodes, spans


def _span(reader: _Reader, node: Node, index: int) -> BlockSpan:
    if not isinstance(node, ScalarNode) or not str(node.tag).endswith(":str"):
        reader.fail(node, f"stage {index}: {_SPAN_FORM}, got {_kind(node)}")
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
    return None if value in DTYPES else f"dtype must be one of {_listed(DTYPES)}, got {value!r}"


def _fingerprint_problem(value: str | None) -> str | None:
    if value is None or re.fullmatch(r"[0-9a-f]{16}", value):
        return None
    return f"fingerprint must be 16 hexadecimal digits, as the planner wrote them, got {value!r}; or remove the line"


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words)


def _kind(node: Node) -> str:
    kind = _TYPES.get(str(node.tag), "a value of another type")
    return f"{kind} ({node.value})" if isinstance(node, ScalarNode) and node.value else kind


def _scalar(text: str) -> str:
    """Text as a YAML scalar; quoted unless every reader takes it for text anyway."""
    if _PLAIN.fullmatch(text) and text.lower() not in _YAML_WORDS:
        return text
    return json.dumps(text, ensure_ascii=False)  # what JSON leaves unescaped is printable, so YAML takes it
