"""`python -m tests.faults.soak`: generations while everything that can break does, and a table of what came of it."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import structlog
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.faults import report, ways, workload
from tests.faults.checkpoint import VOCABULARY, write_checkpoint
from tests.faults.client import PATIENCE_S
from tests.faults.run import AT_ONCE, Result, disturbed_run
from tests.faults.schedule import KINDS, Kind, planned

PROMPT_MAX, TOKENS_MAX = 200, 200
_DIARY_LINES = 60  # shown of a run that failed


def main(
    seed: Annotated[
        int | None, typer.Option(help="Chooses requests and faults; by default one that is printed.")
    ] = None,
    generations: Annotated[int, typer.Option(min=1, help="Answers in all.")] = 500,
    faults: Annotated[int, typer.Option(min=0, help="Faults of each kind in all.")] = 100,
    stages: Annotated[str, typer.Option(help="Numbers of stages, a run for each.")] = "2,3,4",
    kinds: Annotated[str, typer.Option(help="Only these kinds of faults, by comma.", show_default="all")] = "",
    at_once: Annotated[int, typer.Option(min=1, help="Clients at the same time.")] = AT_ONCE,
    times: Annotated[float, typer.Option(min=0.01, help="Faults last so many times as long.")] = 1.0,
    patience_s: Annotated[
        float, typer.Option("--patience", min=1, help="Seconds without a token, or a whole answer, that are a hang.")
    ] = PATIENCE_S,
    keep: Annotated[Path | None, typer.Option(help="Folder for the logs of all processes and the diary.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Only the JSON line, no table.")] = False,
) -> None:
    """Generate while faults are injected, and check every answer.

    The exit code is 1 if any answer was wrong, lost, hung or had tokens twice, or if something was left behind. What
    is random comes from the seed: the same numbers bring the same faults at the same moments again.

    [bold]Examples[/]

    python -m tests.faults.soak --seed 17

    python -m tests.faults.soak --generations 40 --faults 10 --stages 3 --kinds kill,stop
    """
    seed = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    counts, chosen = _stage_counts(stages), _kinds(kinds)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: processes and temporary files go
    console = Console(quiet=as_json, width=None if sys.stdout.isatty() else 120)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="stagecraft-soak-") as name, _progress() as progress:
        folder = Path(name)
        model, logs = folder / "model", keep or folder
        write_checkpoint(model)
        for index, count in enumerate(counts):
            part, per_kind = _share(generations, index, len(counts)), _share(faults, index, len(counts))
            again = f"--seed {seed} --generations {part} --faults {per_kind} --stages {count} --at-once {at_once}"
            again += f" --times {times:g} --patience {patience_s:g}" + (f" --kinds {kinds}" if kinds else "")
            print(f'{count} stages; again with: make soak SOAK="{again}"', file=sys.stderr)
            each = dict.fromkeys(chosen, per_kind)
            try:
                result = _run(
                    seed, part, each, count, at_once, times, patience_s, model, logs / f"{count}-stages", progress
                )
            except (RuntimeError, TimeoutError) as error:
                print(f"error: {error or type(error).__name__}; logs of the processes: --keep FOLDER", file=sys.stderr)
                raise typer.Exit(1) from None
            results.append(result)
            for complaint in result.complaints:
                print(f"seed {seed}, {count} stages: {complaint}", file=sys.stderr)
            if result.complaints:
                print("\n".join(result.log[-_DIARY_LINES:]), file=sys.stderr)
    report.show(results, console)
    print(json.dumps(report.to_json(seed, results)))
    raise typer.Exit(1 if any(result.complaints for result in results) else 0)


def _run(
    seed: int,
    generations: int,
    counts: dict[Kind, int],
    stages: int,
    at_once: int,
    times: float,
    patience_s: float,
    model: Path,
    logs: Path,
    progress: Progress,
) -> Result:
    logs.mkdir(parents=True, exist_ok=True)
    pool = workload.asks(
        seed, vocabulary=VOCABULARY, prompt_max=PROMPT_MAX, tokens_max=TOKENS_MAX, count=min(generations, workload.POOL)
    )
    runs = workload.generations(seed, generations, len(pool))
    faults = planned(seed, counts, stages=stages, tokens=workload.tokens_of(runs, pool), times=times)
    bar = progress.add_task(f"{stages} stages", total=generations, faults=0)

    def show(ended: int, tokens: int, injected: int) -> None:
        progress.update(bar, completed=ended, faults=injected)

    setup = ways.setup(model, logs, stages)
    return asyncio.run(disturbed_run(setup, pool, runs, faults, progress=show, at_once=at_once, patience_s=patience_s))


def _share(total: int, index: int, parts: int) -> int:
    """The first parts take one more where it does not come out even."""
    return total // parts + (index < total % parts)


def _stage_counts(text: str) -> list[int]:
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= count <= 4 for count in counts):
        raise typer.BadParameter(f"numbers from 1 to 4 with commas between them, got {text!r}", param_hint="--stages")
    return counts


def _kinds(text: str) -> Sequence[Kind]:
    if not text:
        return KINDS
    unknown = set(text.split(",")) - set(KINDS)
    if unknown:
        raise typer.BadParameter(f"no kind {sorted(unknown)[0]!r}; there are {', '.join(KINDS)}", param_hint="--kinds")
    return [kind for kind in KINDS if kind in text.split(",")]


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[faults]} faults"),
    )
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))


if __name__ == "__main__":
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app(prog_name="python -m tests.faults.soak")
