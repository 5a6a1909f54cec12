"""`stagecraft score`: log-likelihoods and embeddings of many texts, by stages that a broker chains."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal

import typer

from orchestrator.cli.batch import BrokerOption, JsonOption, ResultsOption
from orchestrator.cli.batch_addresses import NAMESPACE, Addresses, addresses
from orchestrator.cli.batch_errors import readable_errors
from orchestrator.cli.console import fail, note
from orchestrator.cli.platform_client import PlatformOption, connected

if TYPE_CHECKING:
    from orchestrator.batches.journal import Journal, State
    from orchestrator.score_lines import Encode

JOURNAL_SUFFIX = ".score"


def score(
    file: Annotated[
        str, typer.Argument(help="Texts, one JSON object a line; - reads standard input.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the results to this file, as they come. [default: standard output]"),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="A vector for each text instead of log-probabilities.")
    ] = False,
    pooling: Annotated[
        Literal["mean", "last"], typer.Option(help="Of an embedding: over all tokens, or the last token's.")
    ] = "mean",
    tokenizer: Annotated[
        str,
        typer.Option(
            help="Model whose tokenizer cuts texts: a folder, a URL, owner/name, or demo. Not for lines of tokens.",
            show_default=False,
        ),
    ] = "",
    model: Annotated[
        str | None,
        typer.Option(help="Model to score with; by default that of the platform on this machine.", show_default=False),
    ] = None,
    broker: BrokerOption = None,
    results: ResultsOption = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for all results.")] = True,
    platform: PlatformOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score the texts of a file: the log-probability of every token given those before it.

    A line is {"text": ...} or {"tokens": [...]}, with a custom_id if it should have one. Results are lines of OpenAI's
    batch output; the body has tokens, logprobs, their sum and the perplexity, or with --embeddings what OpenAI's
    embeddings endpoint answers. No orchestrator takes part: the broker hands each text from stage to stage (see
    `stagecraft render --scoring`).

    The same command again goes on where it stopped, if the results go to a file.

    [bold]Examples[/]

    stagecraft score texts.jsonl --tokenizer demo -o scores.jsonl

    stagecraft score texts.jsonl --tokenizer demo --embeddings | jq .response.body.data[0].embedding

    stagecraft score tokens.jsonl --model llama --broker http://broker.example.com/default/default --no-wait
    """
    if output is not None and not output.absolute().parent.is_dir():
        fail(f"there is no folder {output.absolute().parent} to write {output.name} to", 2)
    kind = f"embed-{pooling}" if embeddings else "score"
    encode = _encoder(tokenizer)
    with _folder_of(output) as (folder, target), readable_errors():
        journal_path = folder / f"{target.name}{JOURNAL_SUFFIX}"
        if journal_path.exists():
            state = _begun(journal_path, file, kind)
        else:
            where = addresses(broker, results, platform, need_results=wait)
            name = model or (_model_of(platform) if broker is None else None)
            state = _new(file, target, kind, where, name)
            if os.path.lexists(target):
                fail(f"{target} exists already; choose another output or remove it", 2)
        _work(journal_path, state, encode, wait=wait, to_stdout=output is None and wait, as_json=as_json)


def _work(path: Path, state: State, encode: Encode | None, *, wait: bool, to_stdout: bool, as_json: bool) -> None:
    """Ends the command: 1 when lines were left out, 130 after Ctrl-C."""
    from orchestrator.batches.journal import Journal, errors_path
    from orchestrator.batches.known import KnownBatches
    from orchestrator.cli.batch_view import facts, summary

    with KnownBatches().working_on(state.batch) as is_free:
        if not is_free:
            fail(f"another process works on {path}")
        journal = Journal(path) if path.exists() else Journal.create(path, state)
        _run(journal, encode, wait=wait)
    state = journal.state
    if to_stdout and state.output:
        with open(state.output, "rb") as lines:
            for line in lines:
                sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    if as_json and not to_stdout:
        print(json.dumps(facts(path, state)))
    else:
        note(summary(state, waited=wait and not to_stdout))
        if not wait:
            print(state.batch)
    if state.is_over:
        path.unlink(missing_ok=True)
    if state.bad:
        where = "" if to_stdout else f"; {errors_path(path)} says why"
        fail(f"{state.bad:,} lines were left out{where}")


def _run(journal: Journal, encode: Encode | None, *, wait: bool) -> None:
    from functions.contract.scoring import Ask
    from orchestrator.batches.job import Kind, work
    from orchestrator.batches.reader import InputChanged
    from orchestrator.cli.batch_view import watched
    from orchestrator.score_lines import TextReader, score_event

    state = journal.state
    pooling: Literal["mean", "last"] = "last" if state.batch.startswith("embed-last-") else "mean"
    ask = Ask("embedding" if state.batch.startswith("embed-") else "logprobs", pooling)

    def reader(stream: BinaryIO, state: State) -> TextReader:
        return TextReader(stream, state.model or "", ask, encode)

    try:
        with watched(wait=wait) as teller:
            texts = Kind(reader, score_event)
            asyncio.run(work(journal, teller, wait=wait, cancel_wanted=lambda: False, kind=texts))
    except KeyboardInterrupt:
        note(f"stopped: {journal.state.sent:,} sent, {journal.state.finished:,} results; the same command goes on")
        raise typer.Exit(130) from None
    except InputChanged as error:
        fail(f"{state.input} is not what was begun with: {error}; remove {journal.path} to begin anew")
    finally:
        journal.close()


def _model_of(platform: str | None) -> str | None:
    """The one model that gets texts to score from the platform's broker; None if there is not exactly one."""
    from functions.contract.scoring import SCORE

    with connected(platform) as client:
        triggers = client.get("trigger", NAMESPACE)
    filters = [(trigger["spec"].get("filter") or {}).get("attributes") or {} for trigger in triggers]
    models = {str(one["model"]) for one in filters if one.get("type") == SCORE and one.get("model")}
    return models.pop() if len(models) == 1 else None


def _new(file: str, target: Path, kind: str, where: Addresses, name: str | None) -> State:
    from knative.eventing.attributes import problem_of
    from orchestrator.batches.journal import State

    if not name:
        fail("say with --model which model scores; it is the name that its stages were rendered with", 2)
    if problem := problem_of("model", name):
        fail(f"--model: {problem}", 2)
    source, size_bytes = _input(file)
    batch = f"{kind}-{secrets.token_hex(6)}"
    return State(batch, source, size_bytes, str(target), where.broker, where.results, name, time.time())


def _begun(path: Path, file: str, kind: str) -> State:
    """What an earlier run has left. Ends the command with 2 if that was for something else."""
    from orchestrator.batches.journal import read_state

    state = read_state(path)
    source, _ = _input(file)
    if state.input != source or state.batch.rpartition("-")[0] != kind:
        fail(f"{path} belongs to {state.batch} of {state.input}; choose another output, or remove it", 2)
    note(f"going on with {state.batch}: {state.sent:,} sent, {state.finished:,} results")
    return state


def _input(file: str) -> tuple[str, int | None]:
    """How the journal names the input, and its size if it is a file. Ends the command with 2 if it cannot be read."""
    if file == "-":
        return file, None
    path = Path(file)
    try:
        with path.open("rb"):
            return str(path.absolute()), path.stat().st_size if path.is_file() else None
    except OSError as error:
        fail(f"cannot read {file}: {error.strerror or error}", 2)


def _encoder(tokenizer: str) -> Encode | None:
    """Ends the command with 2 if there is no such tokenizer."""
    if not tokenizer:
        return None
    from functions.contract.checkpoint import CheckpointError
    from orchestrator.model_source import ModelSourceError, open_model
    from orchestrator.tokenizer import TokenizerError, load_tokenizer

    try:
        location = tokenizer if Path(tokenizer).is_dir() else open_model(tokenizer)[0].location
        found = load_tokenizer(location)
        found.encode("")  # says so now if there is no tokenizer.json
        return found.encode
    except (CheckpointError, ModelSourceError, TokenizerError) as error:
        fail(f"--tokenizer: {error}", 2)


@contextmanager
def _folder_of(output: Path | None) -> Iterator[tuple[Path, Path]]:
    """Where the journal is, and the output: without one, both are there for this command alone."""
    if output is not None:
        yield output.absolute().parent, output.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="stagecraft-score-") as folder:
        yield Path(folder), Path(folder) / "results.jsonl"
