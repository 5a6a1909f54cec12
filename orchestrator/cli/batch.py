"""`stagecraft batch`: many requests sent as events, their results collected, stopped and gone on with."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.batch_addresses import addresses, results_address
from orchestrator.cli.batch_errors import readable_errors
from orchestrator.cli.console import fail, note
from orchestrator.cli.platform_client import PlatformOption

if TYPE_CHECKING:
    from orchestrator.batches.collect import ResultsClient
    from orchestrator.batches.journal import Journal, State

DEAD_LETTERS_SHOWN = 20
SERVICE_TIMEOUT_S = 15.0
LOOK_EVERY_S = 0.2

app = typer.Typer(
    name="batch",
    help="Many requests through a broker: each is an event, each result comes back as one.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

BrokerOption = Annotated[
    str | None,
    typer.Option(
        help="Address of the broker; by default that of the platform on this machine.",
        envvar="STAGECRAFT_BROKER",
        show_default=False,
    ),
]
ResultsOption = Annotated[
    str | None,
    typer.Option(
        help="Address of the results service; by default that of the platform on this machine.",
        envvar="STAGECRAFT_RESULTS",
        show_default=False,
    ),
]
WaitOption = Annotated[
    bool | None,
    typer.Option(
        "--wait/--no-wait", help="Wait for all results; by default if there is a file for them.", show_default=False
    ),
]
BatchArgument = Annotated[str, typer.Argument(help="Id of the batch, or the file of its results.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead.")]


@app.command()
def submit(
    file: Annotated[
        str, typer.Argument(help="Requests, one a line; - reads them from standard input.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the results to this file, as they come.")
    ] = None,
    broker: BrokerOption = None,
    results: ResultsOption = None,
    model: Annotated[
        str | None, typer.Option(help="Model of lines that name none; lines that name another are left out.")
    ] = None,
    wait: WaitOption = None,
    platform: PlatformOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send the requests of a file to a broker, and collect their results.

    A line is one of OpenAI's batch input (custom_id, method, url, body), or just {"prompt": ...} or {"messages": ...}
    with any sampling parameters. Lines that cannot be sent are left out, told with their numbers, and make the exit
    code 1 at the end. A request that the model refuses has a result that says so.

    Ctrl-C, or any other end, loses nothing: [bold]stagecraft batch resume[/] goes on.

    [bold]Examples[/]

    stagecraft batch submit prompts.jsonl -o results.jsonl

    stagecraft batch submit prompts.jsonl --no-wait --json

    generate-prompts | stagecraft batch submit - -o results.jsonl --model demo

    stagecraft batch submit prompts.jsonl --broker http://broker.example.com/default/default
    """
    from orchestrator.batches.journal import Journal, State
    from orchestrator.batches.known import KnownBatches

    waits = output is not None if wait is None else wait
    source, size_bytes = _input(file)
    if output is not None and not output.absolute().parent.is_dir():
        fail(f"there is no folder {output.absolute().parent} to write {output.name} to", 2)
    where = addresses(broker, results, platform, need_results=waits)
    batch = f"batch-{secrets.token_hex(6)}"
    state = State(
        batch,
        source,
        size_bytes,
        str(output.absolute()) if output else None,
        where.broker,
        where.results,
        model or where.model,
        time.time(),
    )
    with readable_errors():
        known = KnownBatches()
        path = known.journal_path(batch, output.absolute() if output else None)
        with known.working_on(batch), Journal.create(path, state) as journal, _interruptible(journal):
            known.remember(batch, path)
            note(f"batch {batch}; if it is stopped, `stagecraft batch resume {batch}` goes on")
            _work(journal, waits, as_json)


@app.command()
def resume(
    batch: BatchArgument,
    broker: BrokerOption = None,
    results: ResultsOption = None,
    wait: WaitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on with a batch where it stopped: send what is not sent, collect what has come.

    Of a batch from standard input, the same input has to come again; what was sent of it is passed over.

    [bold]Examples[/]

    stagecraft batch resume results.jsonl

    stagecraft batch resume batch-0123456789ab --no-wait

    stagecraft batch resume results.jsonl --broker http://127.0.0.1:9000/default/default
    """
    with _opened(batch) as journal:
        if broker or results:
            where = addresses(
                broker or journal.state.broker, results or journal.state.results, None, need_results=False
            )
            journal.note_addresses(where.broker, where.results)
        _work(journal, journal.state.output is not None if wait is None else wait, as_json)


@app.command()
def cancel(batch: BatchArgument, as_json: JsonOption = False) -> None:
    """Stop sending, tell the model to drop what waits, and give open requests a result that says so.

    Results that have come stay. It also ends a `submit` or `resume` that runs elsewhere for this batch.

    [bold]Examples[/]

    stagecraft batch cancel results.jsonl
    """
    from orchestrator.batches.job import cancel as cancel_batch
    from orchestrator.batches.journal import Journal
    from orchestrator.batches.known import KnownBatches
    from orchestrator.cli.batch_view import facts, summary, watched

    path, state = _find(batch)
    known = KnownBatches()
    with readable_errors():
        while True:
            with known.working_on(state.batch) as is_free:
                if is_free:
                    with Journal(path) as journal, _interruptible(journal):
                        if not journal.state.is_over:
                            with watched(wait=False) as teller:
                                asyncio.run(cancel_batch(journal, teller))
                        state = journal.state
                    break
                known.ask_to_cancel(state.batch)
            time.sleep(LOOK_EVERY_S)
    if as_json:
        print(json.dumps(facts(path, state)))
    else:
        note(summary(state, waited=True))


@app.command()
def status(
    batch: BatchArgument,
    results: ResultsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how far a batch is, and which of its requests the broker gave up.

    Of a batch that was sent from another machine, the results service alone knows: name it with --results.

    [bold]Examples[/]

    stagecraft batch status results.jsonl

    stagecraft batch status batch-0123456789ab --json
    """
    from orchestrator.batches.known import KnownBatches
    from orchestrator.cli.batch_view import facts, service_lines, state_lines

    data: dict[str, Any] = {"batch": batch}
    if results is None or KnownBatches().find(batch):
        path, state = _find(batch)
        data = facts(path, state if results is None else replace(state, results=results))
    else:
        data["results"] = results_address(results, None)
    with readable_errors():
        answered, counts, dead = asyncio.run(_ask_service(data["batch"], data["results"]))
    data |= {"service": counts, "dead_letters": dead}
    if as_json:
        print(json.dumps(data))
        return
    for line in [*(state_lines(data) if "state" in data else []), *(service_lines(counts, dead) if answered else [])]:
        print(line)


@app.command(name="list")
def list_batches(as_json: JsonOption = False) -> None:
    """List the batches that were submitted on this machine, the newest first.

    [bold]Examples[/]

    stagecraft batch list

    stagecraft batch list --json
    """
    from orchestrator.batches.journal import JournalError, read_state
    from orchestrator.batches.known import KnownBatches
    from orchestrator.cli.batch_view import batch_table, facts

    found = []
    for path in KnownBatches().journals():
        try:
            found.append(facts(path, read_state(path)))
        except JournalError as error:
            note(f"left out: {error}")
    found.sort(key=lambda one: -one["created_s"])
    if as_json:
        print(json.dumps({"batches": found}))
    elif not found:
        note("no batch was submitted on this machine")
    else:
        from orchestrator.cli.status import result_console

        result_console().print(batch_table(found))


@app.command()
def results(
    batch: BatchArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write them to this file instead of standard output.")
    ] = None,
    results: ResultsOption = None,
    platform: PlatformOption = None,
) -> None:
    """Print all results of a batch that the results service has, one JSON line each.

    They are in OpenAI's batch output form, in the order in which they came. Nothing is waited for.

    [bold]Examples[/]

    stagecraft batch results batch-0123456789ab -o results.jsonl

    stagecraft batch results batch-0123456789ab | jq .custom_id
    """
    from orchestrator.batches.journal import read_state
    from orchestrator.batches.known import KnownBatches

    if output is not None and os.path.lexists(output):
        fail(f"{output} exists already; choose another file", 2)
    with readable_errors():
        path = KnownBatches().find(batch)
        state = read_state(path) if path else None
        url = results or (state.results if state else None) or results_address(None, platform)
        name = state.batch if state else batch
        count = asyncio.run(_write_results(name, results_address(url, platform), output))
    of = f" of {state.sent:,}" if state else ""
    note(f"{count:,}{of} results" + (f" in {output}" if output else ""))


def _input(file: str) -> tuple[str, int | None]:
    """How the journal names the input, and its size if it is a file. Ends the command with 2 if it cannot be read."""
    if file == "-":
        return file, None
    path = Path(file)
    if not path.exists() or path.is_dir() or not os.access(path, os.R_OK):  # opening it would break a named pipe
        fail(f"cannot read {file}: there is no such file, or you may not read it", 2)
    size_bytes = path.stat().st_size if path.is_file() else None
    return str(path.absolute()), size_bytes


def _find(reference: str) -> tuple[Path, State]:
    """The journal of a batch. Ends the command with 1 if there is none."""
    from orchestrator.batches.journal import read_state
    from orchestrator.batches.known import KnownBatches

    path = KnownBatches().find(reference)
    if path is None:
        fail(f"there is no batch {reference} on this machine; `stagecraft batch list` shows which there are")
    with readable_errors():
        return path, read_state(path)


@contextmanager
def _opened(reference: str) -> Iterator[Journal]:
    """The journal of a batch, for this process alone. Ends the command with 1 if another one works on it."""
    from orchestrator.batches.journal import Journal
    from orchestrator.batches.known import KnownBatches

    path, state = _find(reference)
    with readable_errors(), KnownBatches().working_on(state.batch) as is_free:
        if not is_free:
            fail(
                f"another process works on batch {state.batch}; `stagecraft batch status {state.batch}` shows how far "
                "it is"
            )
        with Journal(path) as journal, _interruptible(journal):
            yield journal


def _work(journal: Journal, wait: bool, as_json: bool) -> None:
    """Sends and collects; says what became of it. Ends the command: 1 when lines were left out, 130 after Ctrl-C."""
    from orchestrator.batches.job import cancel as cancel_batch
    from orchestrator.batches.job import work
    from orchestrator.batches.known import KnownBatches
    from orchestrator.cli.batch_view import facts, summary, watched

    known, batch = KnownBatches(), journal.state.batch
    with watched(wait=wait) as teller:
        if journal.state.cancelling:
            asyncio.run(cancel_batch(journal, teller))
        else:
            asyncio.run(work(journal, teller, wait=wait, cancel_wanted=lambda: known.is_cancel_wanted(batch)))
    state = journal.state
    if as_json:
        print(json.dumps(facts(journal.path, state)))
    else:
        note(summary(state, waited=wait))
        if not wait:
            print(batch)
    if state.bad:
        from orchestrator.batches.journal import errors_path

        lines = "1 line was" if state.bad == 1 else f"{state.bad:,} lines were"
        fail(f"{lines} left out; {errors_path(journal.path)} says why")


@contextmanager
def _interruptible(journal: Journal) -> Iterator[None]:
    """Ctrl-C ends the command with 130 and says how to go on; so does an error, which is then told."""
    from orchestrator.batches.broker_client import ServiceError
    from orchestrator.batches.reader import InputChanged

    try:
        yield
    except KeyboardInterrupt:
        state = journal.state
        note(
            f"stopped: {state.sent:,} sent, {state.finished:,} results; `stagecraft batch resume {state.batch}` goes on"
        )
        raise typer.Exit(130) from None
    except InputChanged as error:
        fail(f"{journal.state.input} is not what this batch was begun with: {error}; submit it as a new batch")
    except ServiceError as error:
        note(f"`stagecraft batch resume {journal.state.batch}` goes on; it takes --broker and --results as well")
        fail(str(error))


async def _ask_service(batch: str, url: str | None) -> tuple[bool, dict[str, Any] | None, list[dict[str, Any]]]:
    """Whether it answered in time, its counts, and some dead letters."""
    from orchestrator.batches.collect import ResultsClient
    from orchestrator.batches.job import session

    if url is None:
        return False, None, []
    try:
        async with asyncio.timeout(SERVICE_TIMEOUT_S), session() as http:
            service = ResultsClient(http, url, note)
            counts = await service.counts(batch)
            dead = await service.dead_letters(batch, DEAD_LETTERS_SHOWN) if counts and counts["dead_letters"] else []
            return True, counts, dead
    except TimeoutError:
        note(f"{url} did not answer within {SERVICE_TIMEOUT_S:g} s")
        return False, None, []


async def _write_results(batch: str, url: str, output: Path | None) -> int:
    """Returns how many there are. A file is there only when it is complete."""
    from orchestrator.batches.collect import ResultsClient
    from orchestrator.batches.job import session

    count = 0
    async with session() as http:
        pages = _pages(ResultsClient(http, url, note), batch)
        if output is None:
            async for lines in pages:
                sys.stdout.buffer.write(b"".join(line + b"\n" for line in lines))
                count += len(lines)
            sys.stdout.buffer.flush()
            return count
        part = output.with_name(f".{output.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                async for lines in pages:
                    file.write(b"".join(line + b"\n" for line in lines))
                    count += len(lines)
            part.replace(output)
        except OSError as error:
            fail(f"cannot write {output}: {error.strerror or error}")
        finally:
            part.unlink(missing_ok=True)
    return count


async def _pages(service: ResultsClient, batch: str) -> AsyncIterator[tuple[bytes, ...]]:
    after = 0
    while (page := await service.page(batch, after)).lines:
        yield page.lines
        after = page.next
