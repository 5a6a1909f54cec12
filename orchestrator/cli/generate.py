"""`stagecraft generate`: a prompt in, the model's text on the terminal as it comes."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.api_key import ApiKeyFileOption, read_api_key
from orchestrator.cli.console import fail, note, write_text

if TYPE_CHECKING:
    from orchestrator.cli.completions import Chunk

DEFAULT_URL = "http://127.0.0.1:8080"


@dataclass(slots=True)
class Tally:
    """What is counted while an answer streams."""

    started_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    last_s: float = 0.0
    texts: list[str] = field(default_factory=list)
    finish: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def add(self, chunk: Chunk) -> None:
        self.last_s = time.monotonic()
        if chunk.text:
            self.first_s = self.first_s or self.last_s
            self.texts.append(chunk.text)
        self.finish = chunk.finish or self.finish
        self.prompt_tokens = chunk.prompt_tokens or self.prompt_tokens
        self.completion_tokens = chunk.completion_tokens or self.completion_tokens

    @property
    def tokens(self) -> int:
        """As the server counted, or else the parts that came."""
        return self.completion_tokens if self.completion_tokens is not None else len(self.texts)

    def to_json(self) -> dict[str, Any]:
        first_s = None if self.first_s is None else round(self.first_s - self.started_s, 4)
        total_s = max(self.last_s - self.started_s, 1e-9)
        return {
            "text": "".join(self.texts),
            "finish_reason": self.finish,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "seconds": round(total_s, 4),
            "seconds_to_first_token": first_s,
            "tokens_per_second": round(self.tokens / total_s, 2),
        }

    def line(self) -> str:
        """The line under the text."""
        data = self.to_json()
        first = f", first after {data['seconds_to_first_token']:.2f} s" if self.first_s is not None else ""
        speed = f"{data['tokens_per_second']:.1f} tokens/s"
        return f"{self.tokens} tokens in {data['seconds']:.2f} s ({speed}{first}; ended by {self.finish})"


def generate(
    prompt: Annotated[str, typer.Argument(help="What the model goes on from; - reads it from standard input.")],
    url: Annotated[str, typer.Option(envvar="STAGECRAFT_URL", help="Base URL of the server.")] = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="Name of the model; not needed when one is served.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a user's message of a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat; implies --chat.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 always takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Sample from this much probability.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed draws the same text again.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    api_key_file: ApiKeyFileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead.")] = False,
) -> None:
    """Send a prompt to a running server and print the text as it comes.

    The text goes to standard output, a line with counts and speed to standard error.

    [bold]Examples[/]

    stagecraft generate "ROMEO:" --max-tokens 60

    stagecraft generate --chat "Who is there?" --temperature 0.7 --seed 1

    echo "To be" | stagecraft generate - --json
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    body: dict[str, Any] = {"model": model, "max_tokens": max_tokens}
    options = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop or None}
    body |= {name: value for name, value in options.items() if value is not None}
    body |= _question(prompt, chat, system)
    try:
        asyncio.run(_run(url.rstrip("/"), body, as_json, read_api_key(api_key_file)))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _question(prompt: str, chat: bool, system: str | None) -> dict[str, Any]:
    if not chat and system is None:
        return {"prompt": prompt}
    messages = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*messages, {"role": "user", "content": prompt}]}


async def _run(url: str, body: dict[str, Any], as_json: bool, api_key: str | None) -> None:
    from orchestrator.cli import completions

    tally = Tally()  # the look at the models may wake the server
    try:
        async with completions.client(api_key) as http:
            if body["model"] is None:
                body["model"] = await completions.only_model(http, url)
            await show(http, url, body, tally, quiet=as_json)
    except completions.EndpointError as error:
        fail(str(error))
    if as_json:
        print(json.dumps({"model": body["model"], **tally.to_json()}))
    else:
        note(tally.line())


async def show(
    http: Any,
    url: str,
    body: dict[str, Any],
    tally: Tally,
    *,
    quiet: bool = False,
    before_text: Callable[[], None] = lambda: None,
) -> None:
    """Streams an answer to standard output, on a line of its own, and counts. `before_text` is called once, when the
    first text has come. Raises EndpointError."""
    from orchestrator.cli import completions

    try:
        async for chunk in completions.stream(http, url, body):
            if chunk.text and not tally.texts:
                before_text()
            tally.add(chunk)
            if not quiet:
                write_text(chunk.text)
    finally:
        if not quiet and tally.texts:
            write_text("\n")
