"""`stagecraft profile`: what each stage of a plan takes on this machine, measured, and written into the plan."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.cli.console import err, fail, note

if TYPE_CHECKING:
    from orchestrator.cost import StageProfile, Timings
    from orchestrator.plan import Plan
    from orchestrator.planner import ModelCost
    from orchestrator.profile import ProfileOptions, Tell

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def profile(
    plan: Annotated[Path, typer.Argument(help="A plan file of `stagecraft plan`.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan with its figures to this file.")
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Write the figures into PLAN itself.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Let -o overwrite a file.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of a stage; 0: torch decides.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Of weights and arithmetic; by default the plan's.")] = None,
    widths: Annotated[str, typer.Option(help="Sequences in a decode step, one token each.")] = "1,8,32,64",
    prefill: Annotated[str, typer.Option(help="Tokens of a prompt in a prefill step.")] = "128,512",
    repeat: Annotated[int, typer.Option(min=1, max=1000, help="Steps of each kind; the median counts.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Measure the stages of a plan on this machine: loading, decode and prefill steps, memory.

    Each stage runs in a process of its own, one after another, on the kind of hardware that is to serve it.
    Without -o or --in-place the figures are printed only. A plan that holds them gets its autoscaling
    targets from them instead of from an estimate. Comments written by hand are not kept.

    [bold]Examples[/]

    stagecraft profile plan.yaml

    stagecraft profile plan.yaml --in-place --threads 2

    stagecraft profile plan.yaml --device cuda --widths 1,16,64 -o measured.yaml --json
    """
    from orchestrator.profile import ProfileOptions

    options = ProfileOptions(
        device, dtype or "auto", threads, _numbers("--widths", widths), _numbers("--prefill", prefill), repeat
    )
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        fail(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}", 2)
    target = _target(plan, output, in_place, force)
    with _readable_errors():
        text, written, cost, location = _open(plan)
        options = replace(options, dtype=dtype or written.dtype)
        profiles = _measure(written, location, options)
    stages = tuple(
        replace(stage, cost=cost.of(stage.blocks), profile=figures)
        for stage, figures in zip(written.stages, profiles, strict=True)
    )
    measured = replace(written, stages=stages)
    if as_json:
        print(json.dumps(_facts(measured, target)))
    else:
        _show(measured)
    if target is not None:
        _write(target, plan, text, measured, cost)
        note(f"wrote {target}")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """1,8,32 -> (1, 8, 32), in order and without doubles."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,4}", part) for part in parts):
        fail(f"{option} must be whole numbers in 1..99999 with commas between them, such as 1,8,32; got {text!r}", 2)
    return tuple(sorted({int(part) for part in parts}))


def _target(plan: Path, output: Path | None, in_place: bool, force: bool) -> Path | None:
    """The file to write, looked at before minutes of measuring; None for none."""
    if in_place and output is not None:
        fail("give either -o FILE or --in-place", 2)
    if output is not None and not force and os.path.lexists(output):
        fail(f"{output} exists already; choose another file, or overwrite it with --force", 2)
    target = plan if in_place else output
    if target is None:
        return None
    target = Path(os.path.realpath(target))  # a link stays one
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        fail(f"cannot write {output or plan}: there must be a folder {target.parent} that you may write to", 2)
    return target


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Ends the command: 2 for a plan that cannot be used, 1 for a model or a stage that cannot."""
    from functions.contract.checkpoint import CheckpointError
    from orchestrator.model_source import ModelSourceError
    from orchestrator.plan import PlanError
    from orchestrator.profile import ProfileError

    try:
        yield
    except PlanError as error:
        fail(str(error), 2)
    except (CheckpointError, ModelSourceError, ProfileError) as error:
        fail(str(error), 1)


def _open(path: Path) -> tuple[str, Plan, ModelCost, str]:
    """The plan's text, the plan as it is written, the model's costs and where its weights are.

    Raises PlanError, CheckpointError and ModelSourceError."""
    from functions.contract.checkpoint import open_checkpoint
    from orchestrator.model_source import check_index, resolve_model
    from orchestrator.plan import load_plan, parse_plan
    from orchestrator.planner import check_plan, model_cost

    found = load_plan(path)  # says what is wrong with the file
    text = path.read_text(encoding="utf-8")
    location = resolve_model(found.model).location
    checkpoint = open_checkpoint(location)
    check_index(checkpoint)
    check_plan(found, checkpoint)
    return text, parse_plan(text, str(path)), model_cost(checkpoint, found.dtype, found.quantize), location


def _measure(plan: Plan, location: str, options: ProfileOptions) -> tuple[StageProfile, ...]:
    """Raises ProfileError."""
    from orchestrator.profile import profile_stages

    with _progress(len(plan.stages)) as tell:
        return asyncio.run(profile_stages(plan, location, options, tell))


@contextmanager
def _progress(stages: int) -> Iterator[Tell]:
    """A bar on standard error, where that is a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("stage {task.fields[stage]}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=stages, stage=0)

        def tell(index: int, doing: str, part: float) -> None:
            bar.update(task, completed=index + part, description=doing, stage=f"{index} of {stages}")

        yield tell


def _write(target: Path, source: Path, text: str, plan: Plan, cost: ModelCost) -> None:
    """All or nothing: the file is complete before it takes the place of another."""
    from orchestrator.plan import dump_plan, locate_model
    from orchestrator.planner import summary

    if target != Path(os.path.realpath(source)):
        located = locate_model(plan.model, source.parent)
        plan = replace(plan, model=plan.model if located == plan.model else _seen_from(target.parent, located))
    elif _text(source) != text:
        fail(f"{source} was changed while its stages were measured, so it was left alone; measure again, or use -o")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(dump_plan(plan, summary(plan, cost)), encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            part.chmod(target.stat().st_mode & 0o7777)
        os.replace(part, target)
    except OSError as error:
        fail(f"cannot write {target}: {error.strerror or error}; choose another file with -o")
    finally:
        part.unlink(missing_ok=True)


def _text(path: Path) -> str | None:
    """None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _seen_from(folder: Path, location: str) -> str:
    relative = os.path.relpath(location, folder)
    return relative if relative.startswith("..") else f"./{relative}"


def _facts(plan: Plan, target: Path | None) -> dict[str, Any]:
    return {
        "name": plan.name,
        "digest": plan.digest,
        "stages": [
            {"stage": index, "blocks": str(stage.blocks), **_figures(stage.profile)}
            for index, stage in enumerate(plan.stages)
            if stage.profile is not None
        ],
        "file": None if target is None else str(target),
    }


def _figures(profile: StageProfile) -> dict[str, Any]:
    return {
        "device": profile.device,
        "dtype": profile.dtype,
        "measured": profile.measured,
        "load_s": profile.load_s,
        "decode_ms": _ms(profile.decode_s),
        "prefill_ms": _ms(profile.prefill_s),
        "memory_bytes": profile.memory_bytes,
        "device_memory_bytes": profile.device_memory_bytes,
    }


def _ms(timings: Timings) -> dict[str, float]:
    return {str(width): float(f"{duration_s * 1000:.4g}") for width, duration_s in timings}


def _show(plan: Plan) -> None:
    """The table, on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from orchestrator.planner import size_text

    profiles = [stage.profile for stage in plan.stages if stage.profile is not None]
    first = profiles[0]
    title = Text(f"{plan.name} on {first.device}, {first.dtype}: medians in milliseconds")
    table = Table(title=title, title_justify="left")
    widths = ["/".join(str(width) for width, _ in timings) for timings in (first.decode_s, first.prefill_s)]
    for heading in ("stage", "blocks", "load", f"decode\n{widths[0]}", f"prefill\n{widths[1]}", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, (stage, one) in enumerate(zip(plan.stages, profiles, strict=True)):
        memory = size_text(one.device_memory_bytes or one.memory_bytes)
        steps = _short(one.decode_s), _short(one.prefill_s)
        table.add_row(str(index), str(stage.blocks), f"{one.load_s:.1f} s", *steps, memory)
    Console(highlight=False).print(table)


def _short(timings: Timings) -> str:
    """Milliseconds with three digits: 2.79/5.07/12.2."""
    return "/".join(f"{duration_s * 1000:#.3g}".rstrip(".") for _, duration_s in timings)
