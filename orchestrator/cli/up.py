"""`stagecraft up`: a model in stages on this machine, from one command, until Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orchestrator.cli.console import fail, note

if TYPE_CHECKING:
    from orchestrator.launcher import Deployment, LaunchSettings, Urls
    from orchestrator.plan import Plan

Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # a plan may say no others

LOG_BYTES_MIN = 64 << 10  # room there must be for logs
PROMPT_TOKENS = 120
PROMPT_TEMPERATURE = 0.7
PROMPT_SEED = 1


def up(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder with a checkpoint, a hub id (owner/name), or demo.", show_default=False),
    ] = None,
    stages: Annotated[int | None, typer.Option(min=1, help="Cut the model into this many stages.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan file of `stagecraft plan`, instead of --stages.")] = None,
    name: Annotated[str | None, typer.Option(help="Name that clients use; by default from MODEL.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 takes any free one.")] = 8080,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0 takes any free one.")] = 8081,
    dtype: Annotated[Dtype | None, typer.Option(help="Of weights and arithmetic; auto: as stored.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads per stage; by default the cores divided by the stages."),
    ] = None,
    kv_memory: Annotated[
        str | None,
        typer.Option(help="KV cache budget of each stage, such as 512MiB; by default a share of the free memory."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Send this once it serves and print the text.")] = None,
    leave: Annotated[bool, typer.Option("--exit", help="Stop after the answer to --prompt.")] = False,
    log_dir: Annotated[
        Path | None, typer.Option(help="Keep the logs here; by default in a temporary folder.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line when ready, for programs.")] = False,
) -> None:
    """Serve a model in stages on this machine, until Ctrl-C.

    Each stage is a process of its own that holds its own blocks only; one more, the orchestrator, answers clients.
    When one of them ends, all are stopped and the exit code is 1.

    [bold]Examples[/]

    stagecraft up demo --stages 2

    stagecraft up ./my-checkpoint --stages 3 --name mine --port 9000

    stagecraft up --plan plan.yaml

    stagecraft up demo --stages 2 --prompt "ROMEO:" --exit
    """
    from orchestrator.launcher import LaunchSettings, default_threads

    if leave and prompt is None:
        fail("--exit needs --prompt: what should be done before the exit?", 2)
    chosen = _plan(model, stages, plan, name, dtype)
    folder, temporary = _log_folder(log_dir)
    settings = LaunchSettings(
        log_dir=folder,
        host=host,
        http_port=port,
        grpc_port=grpc_port,
        device=device,
        threads_per_stage=threads or default_threads(len(chosen.stages)),
        kv_bytes_max=None if kv_memory is None else _bytes("--kv-memory", kv_memory),
    )
    exit_code = asyncio.run(_until_signal(chosen, settings, prompt, leave, as_json))
    if temporary and exit_code == 0:
        shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(exit_code)


async def _until_signal(plan: Plan, settings: LaunchSettings, prompt: str | None, leave: bool, as_json: bool) -> int:
    """Runs the deployment and returns the exit code. The first signal stops it, a second one without grace."""
    work = asyncio.create_task(_serve(plan, settings, prompt, leave, as_json))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    try:
        return await work
    except asyncio.CancelledError:
        return 0


async def _serve(plan: Plan, settings: LaunchSettings, prompt: str | None, leave: bool, as_json: bool) -> int:
    from orchestrator.cli.completions import EndpointError
    from orchestrator.cli.startup_view import StartupView
    from orchestrator.launcher import LaunchError, launch, stage_name

    rows = {stage_name(index): f"blocks {stage.blocks}" for index, stage in enumerate(plan.stages)}
    view = StartupView({**rows, "orchestrator": "endpoints"})
    try:
        async with launch(plan, settings) as deployment:
            with view.shown():
                await deployment.wait_ready(view.observe)
            if as_json:
                print(json.dumps(_facts(plan, deployment, settings)), flush=True)
            if prompt is not None:
                await deployment.unless_one_ends(_answer(deployment.urls, prompt))
            if not leave:
                if not as_json:
                    print(_banner(plan, deployment.urls), flush=True)
                await deployment.wait_end()
    except (LaunchError, EndpointError) as error:
        note(f"error: {error}")
        return error.exit_code if isinstance(error, LaunchError) else 1
    return 0


async def _answer(urls: Urls, prompt: str) -> None:
    from orchestrator.cli import completions
    from orchestrator.cli.console import write_text
    from orchestrator.cli.generate import Tally, show

    body = {
        "model": urls.name,
        "prompt": prompt,
        "max_tokens": PROMPT_TOKENS,
        "temperature": PROMPT_TEMPERATURE,
        "seed": PROMPT_SEED,
    }
    tally = Tally()
    write_text(f"\n{prompt}")
    async with completions.client() as http:
        await show(http, urls.base, body, tally)
    note(tally.line())


def _plan(model: str | None, stages: int | None, plan_file: Path | None, name: str | None, dtype: str | None) -> Plan:
    """The plan that the options ask for. Ends the command when they contradict each other or the model."""
    from functions.contract.checkpoint import CheckpointError
    from orchestrator.model_source import ModelSourceError
    from orchestrator.plan import PlanError, load_plan

    if (stages is None) == (plan_file is None):
        fail("give either --stages N or --plan FILE", 2)
    try:
        given = None if plan_file is None else load_plan(plan_file)
        source = model or (given.model if given is not None else None)
        if source is None:
            fail("name a MODEL: a folder with a checkpoint, a hub id such as owner/name, or demo", 2)
        return _fitted(source, given, stages or 1, name, dtype)
    except PlanError as error:
        fail(str(error), 2)
    except (CheckpointError, ModelSourceError) as error:
        fail(str(error))


def _fitted(model: str, given: Plan | None, stages: int, name: str | None, dtype: str | None) -> Plan:
    """A plan whose model is a place that stages can read. Raises PlanError, CheckpointError and ModelSourceError."""
    from functions.contract.checkpoint import open_checkpoint
    from orchestrator.model_source import check_index, resolve_model
    from orchestrator.planner import check_plan, plan_by_stages

    source = resolve_model(model)
    checkpoint = open_checkpoint(source.location)
    check_index(checkpoint)
    if given is None:
        options = {"dtype": dtype or "auto", "name": name or source.name, "model": source.location}
        return plan_by_stages(checkpoint, stages, **options)
    check_plan(given, checkpoint)
    return replace(given, model=source.location, name=name or given.name, dtype=dtype or given.dtype)


def _bytes(option: str, text: str) -> int:
    from orchestrator.planner import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        fail(f"{option}: {error}", 2)


def _log_folder(wanted: Path | None) -> tuple[Path, bool]:
    """The folder, and whether it is a temporary one of ours."""
    try:
        folder = wanted or Path(tempfile.mkdtemp(prefix="stagecraft-"))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"?" * LOG_BYTES_MIN)
    except OSError as error:
        place = wanted or "the temporary folder"
        fail(f"cannot write logs to {place}: {error.strerror or error}; name another folder with --log-dir")
    return folder, wanted is None


def _facts(plan: Plan, deployment: Deployment, settings: LaunchSettings) -> dict[str, object]:
    urls = deployment.urls
    stages = [
        {"index": index, "blocks": str(stage.blocks), "url": url, "pid": child.pid}
        for index, (stage, url, child) in enumerate(
            zip(plan.stages, deployment.stage_urls, deployment.stages, strict=True)
        )
    ]
    return {
        "model": plan.name,
        "url": urls.base,
        "openai": urls.openai,
        "v1": urls.v1,
        "v2": urls.v2,
        "grpc": urls.grpc,
        "metrics": urls.metrics,
        "stages": stages,
        "orchestrator": {"pid": deployment.orchestrator.pid},
        "log_dir": str(settings.log_dir),
    }


def _banner(plan: Plan, urls: Urls) -> str:
    body = json.dumps({"model": plan.name, "prompt": "ROMEO:", "max_tokens": 60})
    return f"""
{plan.name} is served in {len(plan.stages)} stage{"s"[: len(plan.stages) > 1]}; Ctrl-C stops it.

  OpenAI   {urls.openai}
  V1       {urls.v1}
  V2       {urls.v2}
  gRPC     {urls.grpc}
  metrics  {urls.metrics}

Try:
  curl {urls.openai}/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}
  stagecraft generate "ROMEO:" --url {urls.base}
"""
