"""`python -m benchmarks`: all figures, or some, as tables and as one JSON line each."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from benchmarks import goals, report
from benchmarks.bench import ROOT, Bench, MeasureError
from benchmarks.figures import FIGURES
from benchmarks.report import Section
from orchestrator.generation import GenerationError
from orchestrator.stage_client import StageUnreachable

RESULTS = ROOT / "benchmarks" / "results" / "latest.json"
BUSY = 0.5  # load average above which figures are not to be trusted


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this figure, one of {', '.join(FIGURES)}; may be repeated.", show_default=False),
    ] = None,
    for_goals: Annotated[bool, typer.Option("--goals", help="Only the figures that the goals need.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Toy size, one round: does it run at all?")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating runs of each thing that is compared.")] = 5,
    first: Annotated[
        bool,
        typer.Option(
            "--first", help="Before other programs: all processes, peers too, in real time. Needs CAP_SYS_NICE."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Only the JSON lines, no tables.")] = False,
    output: Annotated[Path, typer.Option(help="Where all figures are written as JSON.")] = RESULTS,
) -> None:
    """Measure Stagecraft beside its peers, on two cores of this machine.

    Each figure ends as a row of a table and as a JSON line; the goals come last, likewise. It takes about an hour, with
    --goals some 25 minutes; let nothing else run. A goal that is missed is no error: the exit code is 1 only when
    something could not be measured.

    [bold]Examples[/]

    python -m benchmarks

    python -m benchmarks --goals

    python -m benchmarks --only hop --only latency

    python -m benchmarks --first --only latency

    python -m benchmarks --quick --json
    """
    if only and for_goals:
        raise typer.BadParameter("--goals chooses the figures, so --only cannot", param_hint="--goals")
    names = list(dict.fromkeys(only or (goals.sources() if for_goals else FIGURES)))
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise typer.BadParameter(f"no figure {unknown[0]}; there are {', '.join(FIGURES)}", param_hint="--only")
    console = Console(quiet=as_json, width=None if sys.stdout.isatty() else 140)
    load_before = os.getloadavg()[0]
    console.print(f"load average before the run: {load_before:.2f}", highlight=False)
    if first:
        _go_first()
    elif load_before > BUSY and not quick:
        print(f"warning: other programs keep this machine busy (load {load_before:.1f})", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: processes and temporary files go
    with tempfile.TemporaryDirectory(prefix="stagecraft-bench-") as folder:
        bench = Bench(Path(folder), quick, 1 if quick else rounds)
        sections, failed = uvloop.run(_measure(names, bench, console))  # as the orchestrator runs
    verdicts = goals.judge(sections, names)
    facts = [verdict.to_json() for verdict in verdicts]
    report.write(output, sections, quick=quick, load_before=load_before, first=first, goals=facts)
    for line in report.json_lines(sections):
        print(line)
    sys.stdout.flush()
    if verdicts:
        goals.show(verdicts, console)
        for fact in facts:
            print(json.dumps(fact))
    raise typer.Exit(1 if failed or any(verdict.holds is None for verdict in verdicts) else 0)


def _go_first() -> None:
    """This process and all that it starts, ours and peers, take turns among themselves, and the kernel lets others run
    in one twentieth of the time (sched(7), sched_rt_runtime_us). What shares caches and memory still disturbs."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        raise typer.BadParameter(
            "this user may not start real-time processes; run it as root, or with CAP_SYS_NICE", param_hint="--first"
        ) from None


async def _measure(names: list[str], bench: Bench, console: Console) -> tuple[list[Section], list[str]]:
    """The sections, and the figures that could not be measured. One that fails does not hold up the others."""
    sections, failed = [], []
    for name in names:
        try:
            found = await FIGURES[name](bench)
        except (MeasureError, GenerationError, StageUnreachable, OSError) as error:
            print(f"error: {name} could not be measured: {error}", file=sys.stderr)
            failed.append(name)
            continue
        for section in found:
            report.show(section, console)
        sys.stdout.flush()  # a full run takes minutes; whoever reads a pipe wants to follow it
        sections += found
    return sections, failed


if __name__ == "__main__":
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app(prog_name="python -m benchmarks")
