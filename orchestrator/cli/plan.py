"""`stagecraft plan`: where a model would be cut and what each stage would take, from the headers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.cli.console import fail, note

if TYPE_CHECKING:
    from orchestrator.plan import Plan
    from orchestrator.planner import ModelCost

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["none", "int8"]


def plan(
    model: Annotated[
        str,
        typer.Argument(help="A folder with a checkpoint, a hub id (owner/name), a URL, or demo.", show_default=False),
    ],
    stages: Annotated[int | None, typer.Option(min=1, help="Cut the model into this many stages.")] = None,
    memory_per_stage: Annotated[
        str | None, typer.Option(help="Cut it into as few stages as fit into this much memory each, such as 16GiB.")
    ] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="With --memory-per-stage: room for the KV cache of so many tokens. [default: 8192]"),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and arithmetic; auto: as the checkpoint says.")] = "auto",
    quantize: Annotated[Quantize, typer.Option(help="Weights of linear layers and the head as int8.")] = "none",
    name: Annotated[str | None, typer.Option(help="Name that clients use; by default from MODEL.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan to this YAML file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let -o overwrite a file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Show where a model would be cut into stages and what each stage would take.

    Only configuration and tensor headers are read, never weights, also of a model on the hub.
    The largest stage is kept as small as can be, by weight bytes and arithmetic.
    The file that -o writes can be edited by hand and served with `stagecraft up --plan`.

    [bold]Examples[/]

    stagecraft plan demo --stages 2

    stagecraft plan ./my-checkpoint --stages 3 --dtype float32 -o plan.yaml

    stagecraft plan meta-llama/Llama-2-13b-hf --memory-per-stage 16GiB --json
    """
    if (stages is None) == (memory_per_stage is None):
        fail("give either --stages N or --memory-per-stage SIZE", 2)
    if kv_tokens is not None and memory_per_stage is None:
        fail("--kv-tokens goes with --memory-per-stage only", 2)
    if name is not None and not (name.strip() and name.isprintable()):
        fail("--name must be text that can be printed, at least one character", 2)
    if output is not None and not force and os.path.lexists(output):
        fail(f"{output} exists already; choose another file, or overwrite it with --force", 2)
    memory_bytes = None if memory_per_stage is None else _bytes(memory_per_stage)
    with _readable_errors():
        chosen, cost = _make(
            model, stages, memory_bytes, kv_tokens, {"dtype": dtype, "quantize": quantize}, name, output
        )
    if output is not None:
        _write(output, chosen, cost, force)
    if as_json:
        print(json.dumps({**_facts(chosen, cost), "file": None if output is None else str(output)}))
    else:
        _show(chosen, cost)
    if output is not None:
        note(f"wrote {output}; serve it with: stagecraft up --plan {output}")


def _make(
    model: str,
    stages: int | None,
    memory_bytes: int | None,
    kv_tokens: int | None,
    loaded_as: dict[str, str],
    name: str | None,
    output: Path | None,
) -> tuple[Plan, ModelCost]:
    """Raises CheckpointError, ModelSourceError and PlanError."""
    from orchestrator.model_source import open_model
    from orchestrator.planner import KV_TOKENS, model_cost, plan_by_memory, plan_by_stages

    found, checkpoint = open_model(model)
    options: dict[str, Any] = {**loaded_as, "name": name or found.name, "model": _as_written(model, output)}
    if memory_bytes is not None:
        tokens = KV_TOKENS if kv_tokens is None else kv_tokens
        made = plan_by_memory(checkpoint, memory_bytes, kv_tokens=tokens, **options)
    else:
        assert stages is not None  # checked where the options are
        made = plan_by_stages(checkpoint, stages, **options)
    return made, model_cost(checkpoint, **loaded_as)


def _as_written(model: str, output: Path | None) -> str:
    """How the plan names the model: a relative folder as seen from the plan file, so that both can move together."""
    expanded = os.path.expanduser(model)
    if "://" in model or not os.path.isdir(expanded) or os.path.isabs(expanded):
        return expanded if os.path.isdir(expanded) else model
    relative = os.path.relpath(expanded, output.parent if output is not None else None)
    return relative if relative.startswith("..") else f"./{relative}"


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Ends the command: 2 where other options heal it, 1 for a model that cannot be used."""
    from functions.contract.checkpoint import CheckpointError
    from orchestrator.model_source import ModelSourceError
    from orchestrator.plan import PlanError

    try:
        yield
    except PlanError as error:
        fail(str(error), 2)
    except (CheckpointError, ModelSourceError) as error:
        fail(str(error), 1)


def _bytes(text: str) -> int:
    from orchestrator.planner import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        fail(f"--memory-per-stage: {error}", 2)


def _write(output: Path, plan: Plan, cost: ModelCost, force: bool) -> None:
    from orchestrator.plan import dump_plan
    from orchestrator.planner import summary

    text = dump_plan(plan, summary(plan, cost))
    try:
        with open(output, "w" if force else "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        fail(f"{output} exists already; choose another file, or overwrite it with --force", 2)
    except OSError as error:
        fail(f"cannot write {output}: {error.strerror or error}; choose another file with -o")


def _facts(plan: Plan, cost: ModelCost) -> dict[str, Any]:
    stages = [
        {"stage": index, "blocks": str(stage.blocks), **asdict(cost.of(stage.blocks))}
        for index, stage in enumerate(plan.stages)
    ]
    return {
        "model": plan.model,
        "name": plan.name,
        "dtype": plan.dtype,
        "quantize": plan.quantize,
        "block_count": plan.block_count,
        "fingerprint": plan.fingerprint,
        "digest": plan.digest,
        "stages": stages,
    }


def _show(plan: Plan, cost: ModelCost) -> None:
    """The table, on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from orchestrator.cost import Cost
    from orchestrator.planner import count_text, size_text

    parts = [cost.of(stage.blocks) for stage in plan.stages]
    total = sum(parts, Cost())
    title = Text(f"{plan.name}: {plan.block_count} blocks in {len(parts)} stage{'s' if len(parts) != 1 else ''}")
    table = Table(title=title, title_justify="left", show_footer=True)
    numbers = (count_text(total.parameters), size_text(total.weight_bytes), size_text(total.kv_bytes_per_token))
    for heading, footer in zip(
        ("stage", "blocks", "parameters", "weights", "KV/token", "FLOPs/token", "share"),
        ("all", f"0:{plan.block_count}", *numbers, count_text(total.flops_per_token), "100 %"),
        strict=True,
    ):
        table.add_column(heading, footer=footer, justify="right", no_wrap=True)
    for index, (stage, part) in enumerate(zip(plan.stages, parts, strict=True)):
        table.add_row(
            str(index),
            str(stage.blocks),
            count_text(part.parameters),
            size_text(part.weight_bytes),
            size_text(part.kv_bytes_per_token),
            count_text(part.flops_per_token),
            f"{100 * part.flops_per_token / max(1, total.flops_per_token):.0f} %",
        )
    Console(highlight=False).print(table)
