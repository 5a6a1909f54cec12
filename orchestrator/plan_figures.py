"""The figures of stages in a plan file: `cost` (counted) and `profile` (measured). Reading complains line by line."""

from __future__ import annotations

from dataclasses import asdict, fields
from decimal import Decimal

from ruamel.yaml.nodes import MappingNode, Node

from orchestrator.cost import (
    COUNT_MAX,
    WIDTH_MAX,
    Cost,
    StageProfile,
    Timings,
    day_problem,
    seconds_problem,
    timings_problem,
)
from orchestrator.plan_reader import PlanReader, kind_of, scalar

_COST_KEYS = tuple(field.name for field in fields(Cost))
_PROFILE_REQUIRED = ("device", "dtype", "measured", "load_s", "decode_ms", "prefill_ms", "memory_bytes")
_PROFILE_KEYS = (*_PROFILE_REQUIRED, "device_memory_bytes")
FIGURES_COMMENT = (
    "# cost: counted from the headers of the checkpoint; bytes as loaded, two FLOPs for each parameter a token meets.",
    "# profile: measured by `stagecraft profile`. Both are of these blocks: remove them where you move a border.",
)


def read_cost(reader: PlanReader, node: Node, stage: str) -> Cost:
    """Raises PlanError with the line."""
    entries = reader.entries(node, f"cost of {stage}", _COST_KEYS, _COST_KEYS)
    return Cost(**{key: reader.whole_number(entries[key], f"{stage}: {key}", COUNT_MAX) for key in _COST_KEYS})


def read_profile(reader: PlanReader, node: Node, stage: str) -> StageProfile:
    """Raises PlanError with the line."""
    entries = reader.entries(node, f"profile of {stage}", _PROFILE_KEYS, _PROFILE_REQUIRED)
    device, dtype = (_printable(reader, entries[key], f"{stage}: {key}") for key in ("device", "dtype"))
    measured = reader.day(entries["measured"], f"{stage}: measured")
    if problem := day_problem(measured):
        reader.fail(entries["measured"], f"{stage}: {problem}")
    load_s = float(reader.decimal(entries["load_s"], f"{stage}: load_s"))
    reader.fail_if(entries["load_s"], seconds_problem(f"{stage}: load_s", load_s))
    memory = {
        key: reader.whole_number(entries[key], f"{stage}: {key}", COUNT_MAX)
        for key in ("memory_bytes", "device_memory_bytes")
        if key in entries
    }
    decode_s, prefill_s = (_timings(reader, entries[key], f"{stage}: {key}") for key in ("decode_ms", "prefill_ms"))
    return StageProfile(device, dtype, measured, load_s, decode_s, prefill_s, **memory)


def cost_line(cost: Cost) -> str:
    """What `read_cost` reads, on one line."""
    return f"cost: {{{', '.join(f'{key}: {value}' for key, value in asdict(cost).items())}}}"


def profile_lines(profile: StageProfile) -> list[str]:
    """What `read_profile` reads: a block with a comment on what each figure means."""
    lines = [
        "profile:",
        f"  device: {scalar(profile.device)}",
        f"  dtype: {scalar(profile.dtype)}",
        f"  measured: {profile.measured}",
        f"  load_s: {_plain(profile.load_s)}  # from the start of the process to its answer to a wake",
        f"  decode_ms: {_timings_text(profile.decode_s)}  # sequences in a step, a token each: median of the step",
        f"  prefill_ms: {_timings_text(profile.prefill_s)}  # tokens of a prompt in a step: median of the step",
        f"  memory_bytes: {profile.memory_bytes}  # most that the process took of the host's memory",
    ]
    if profile.device_memory_bytes:
        lines.append(f"  device_memory_bytes: {profile.device_memory_bytes}  # and of the accelerator's")
    return lines


def _printable(reader: PlanReader, node: Node, what: str) -> str:
    text = reader.text(node, what)
    if not text.strip() or not text.isprintable():
        reader.fail(node, f"{what} must be text that can be printed, at least one character, got {text!r}")
    return text


def _timings(reader: PlanReader, node: Node, what: str) -> Timings:
    """A mapping of widths to milliseconds, as pairs of width and seconds."""
    if not isinstance(node, MappingNode):
        reader.fail(
            node, f"{what} is a mapping of widths to milliseconds, such as {{1: 5.2, 8: 9.1}}, got {kind_of(node)}"
        )
    timings: list[tuple[int, float]] = []
    for key, value in node.value:
        width = reader.whole_number(key, f"{what}: a width", WIDTH_MAX, least=1)
        duration_s = float(reader.decimal(value, f"{what} at {width}").scaleb(-3))
        timings.append((width, duration_s))
        reader.fail_if(key, timings_problem(what, timings[-2:]))
    reader.fail_if(node, timings_problem(what, timings))
    return tuple(timings)


def _timings_text(timings: Timings) -> str:
    return f"{{{', '.join(f'{width}: {_plain(duration_s, shift=3)}' for width, duration_s in timings)}}}"


def _plain(value: float, shift: int = 0) -> str:
    """All digits of a number times 10^shift, never as 1e-5, so that nothing is lost between file and memory."""
    return f"{Decimal(repr(value)).scaleb(shift).normalize():f}"
