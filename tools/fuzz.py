"""Gives hostile inputs to every door: `python -m tools.fuzz --inputs 100000 --seed 1`, or `make fuzz FUZZ="..."`.

Exit code 1 if any input broke anything; what did is written to a folder, and `--replay FILE` gives it to its door
again. docs/fuzzing.md says what is covered.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.fuzzing.campaign import Finding, Tally, Task, input_of, replay, run, silence
from tools.fuzzing.catalogue import DOORS, is_door, kept_mib, open_door

_MIB = 1 << 20
_COLUMNS = ("door", "inputs", "inputs/s", "refused", "accepted", "5xx", "crashes", "harm", "hangs", "slowest, CPU s",
            "memory, MiB", "growth a 100,000")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.list:
        print("\n".join(f"{name:16} {entry.about}" for name, entry in DOORS.items()))
        return 0
    if options.replay:
        return max(_replay(door, files) for door, files in _by_door(options.replay).items())
    if options.show is not None:
        return _show(options.door or list(DOORS), options.seed, options.show)
    inputs_of = shares(options.door or list(DOORS), options.inputs)
    seconds = options.seconds / len(inputs_of) * min(options.jobs, len(inputs_of))
    tasks = [
        Task(door, options.seed, options.start, options.start + inputs, options.check_every, options.limit_s, seconds)
        for door, inputs in inputs_of.items()
    ]
    with ThreadPoolExecutor(options.jobs) as pool:  # each waits for a process
        tallies = list(pool.map(lambda task: run(task, open_door, _progress), tasks))
    print(file=sys.stderr)
    print(table(tallies))
    for finding in (finding for tally in tallies for finding in tally.findings):
        _keep(finding, options.failures, options.seed)
    bad = [
        problem for tally in tallies for problem in problems(tally, (options.growth_mib + kept_mib(tally.door)) * _MIB)
    ]
    print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


def problems(tally: Tally, growth_bytes_max: float) -> list[str]:
    """Why a run is a failure; a text for each reason."""
    found = [f"{tally.door}: {count} x {kind}" for kind, count in tally.counts.items()]
    growth = tally.growth_bytes
    if growth is not None and growth > growth_bytes_max and _grown(tally) > growth_bytes_max:
        found.append(f"{tally.door}: memory grows by {growth / _MIB:.1f} MiB in 100,000 inputs: {_curve(tally)}")
    return found


def table(tallies: Sequence[Tally]) -> str:
    """In Markdown, with a last line for all doors."""
    rows = [_row(tally) for tally in tallies]
    total = Tally("all")
    for tally in tallies:
        total.inputs += tally.inputs
        total.accepted += tally.accepted
        total.refused += tally.refused
        total.seconds += tally.seconds
        total.slowest_cpu_s = max(total.slowest_cpu_s, tally.slowest_cpu_s)
        for kind, count in tally.counts.items():
            total.counts[kind] = total.count(kind) + count
    rows.append(_row(total))
    lines = [_COLUMNS, tuple("---" if i == 0 else "---:" for i in range(len(_COLUMNS))), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(tally: Tally) -> tuple[str, ...]:
    growth = tally.growth_bytes
    return (
        tally.door,
        f"{tally.inputs:,}",
        f"{tally.inputs / max(tally.seconds, 0.001):,.0f}",
        f"{tally.refused:,}",
        f"{tally.accepted:,}",
        *(f"{tally.count(kind):,}" for kind in ("5xx", "crash", "harm", "hang")),
        f"{tally.slowest_cpu_s:.2f}",
        f"{tally.rss_bytes[-1][1] / _MIB:.0f}" if tally.rss_bytes else "",
        f"{growth / _MIB:+.1f}" if growth is not None else "",
    )


def _curve(tally: Tally) -> str:
    return ", ".join(f"{rss / _MIB:.0f}" for _, rss in tally.rss_bytes) + " MiB"


def _grown(tally: Tally) -> int:
    quarter = len(tally.rss_bytes) // 4
    return tally.rss_bytes[-1][1] - tally.rss_bytes[quarter][1]


def shares(doors: Sequence[str], inputs: int) -> dict[str, int]:
    """Inputs for each door; all together `inputs`, or one each where there are more doors."""
    share = {door: DOORS[door].share if door in DOORS else 1 for door in doors}
    found = {door: max(1, inputs * share[door] // sum(share.values())) for door in doors}
    found[max(found, key=found.__getitem__)] += max(0, inputs - sum(found.values()))  # what was rounded off
    return found


def _progress(tally: Tally) -> None:
    found = sum(tally.counts.values())
    if sys.stderr.isatty():
        print(f"\r{tally.door:16} {tally.inputs:>9,} inputs, {found} findings   ", end="", file=sys.stderr, flush=True)


def _keep(finding: Finding, folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(finding.door).name.replace(":", "-")  # of a door of another file
    file = folder / f"{name}.{finding.kind}.{seed}-{finding.index}.input"
    file.write_bytes(finding.data)
    file.with_suffix(".txt").write_text(
        f"{finding.kind} at the door {finding.door}, input {finding.index} of seed {seed}\n\n{finding.text}",
        errors="backslashreplace",  # half characters
    )
    print(f"{finding.kind}: {ascii(finding.text.strip().splitlines()[-1])[1:300]}\n  --replay {file}", file=sys.stderr)


def _by_door(files: Sequence[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in files:
        name = file.name.split(".")[0]
        if name not in DOORS:
            sys.exit(f"{file}: the name of a kept input begins with its door, one of {', '.join(DOORS)}")
        found.setdefault(name, []).append(file)
    return found


def _replay(name: str, files: Sequence[Path]) -> int:
    silence()
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        door = open_door(name, Path(folder))
        for file in files:
            outcome = replay(door, file.read_bytes())
            print(f"{file.name}: {outcome}")
            code = code if outcome in ("accepted", "refused") else 1
        door.close()
    return code


def _show(doors: Sequence[str], seed: int, index: int) -> int:
    for name in doors:
        with tempfile.TemporaryDirectory() as folder:
            door = open_door(name, Path(folder))
            print(f"{name} {index}: {input_of(door, name, seed, index)!r}")
            door.close()
    return 0


def _door(name: str) -> str:
    if not is_door(name):
        raise argparse.ArgumentTypeError(f"unknown door {name!r}; known are {', '.join(DOORS)}, or PATH.py:FUNCTION")
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="for all doors together (%(default)s)")
    parser.add_argument("--door", action="append", type=_door, help="only this one; may be given again")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same inputs (%(default)s)")
    parser.add_argument("--start", type=int, default=0, help="index of the first input (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="doors at the same time (%(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="shared by the doors; the rest is left out")
    parser.add_argument("--check-every", type=int, default=1000, help="inputs between two controls (%(default)s)")
    parser.add_argument(
        "--limit-s", type=float, default=10, help="CPU seconds of one input that are a hang (%(default)s)"
    )
    parser.add_argument("--growth-mib", type=float, default=16, help="memory per 100,000 inputs (%(default)s)")
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz"), help="what broke a door (%(default)s)")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="give a kept input to its door again")
    parser.add_argument("--show", type=int, metavar="INDEX", help="print one input and end")
    parser.add_argument("--list", action="store_true", help="print the doors and end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
