"""`stagecraft up`: a model in stages on this machine, from one command, until Ctrl-C.

It runs a platform (`knative/`), applies the manifests of the plan to it, and tells people where the model answers.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from urllib.parse import quote

import typer

from orchestrator.cli.api_key import read_api_key
from orchestrator.cli.console import fail, note
from orchestrator.cli.data_folder import DataDirOption, data_folder
from orchestrator.cli.log_folder import log_folder
from orchestrator.cli.options import duration_s
from orchestrator.cli.running_platform import problems_of, stop_told, tell_problems

if TYPE_CHECKING:
    from knative.platform import Platform, PlatformSettings
    from orchestrator.layout import Layout
    from orchestrator.plan import Plan
    from orchestrator.render.deployment import Deployment

Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # a plan may say no others
Quantize = Literal["none", "int8"]
T = TypeVar("T")

PLATFORM_LOG = "platform.log"  # why the autoscaler decides what, as JSON lines
CORES_LOCK = "cores.lock"
ONE_LANE_WIDTH = 256  # sequences; as many as requests at once, since a second lane would only take turns with the first
LOOK_EVERY_S = 0.1
PROMPT_TOKENS = 120
PROMPT_TEMPERATURE = 0.7
PROMPT_SEED = 1


class UpError(Exception):
    """It cannot start or go on; `problems` are texts for people. `exit_code` is what `up` ends with."""

    def __init__(self, *problems: str, exit_code: int = 1) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Urls:
    """The ways in, as a client on this machine writes them."""

    base: str  # http://HOST:PORT
    grpc: str  # HOST:PORT
    name: str  # of the model

    @property
    def openai(self) -> str:
        return f"{self.base}/openai/v1"

    @property
    def v1(self) -> str:
        return f"{self.base}/v1/models/{quote(self.name, safe='')}:predict"

    @property
    def v2(self) -> str:
        return f"{self.base}/v2/models/{quote(self.name, safe='')}/infer"


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
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the platform's metrics; 0 takes any free one.")
    ] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Of weights and arithmetic; auto: as stored.")] = None,
    quantize: Annotated[
        Quantize | None, typer.Option(help="int8: weights of linear layers and the head in 8 bits.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads per replica; by default all cores, or a share of many (see --spread)."),
    ] = None,
    spread: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stages that compute at once; by default 1, with all cores, and all of them from 5 cores a stage on.",
        ),
    ] = None,
    kv_memory: Annotated[
        str | None,
        typer.Option(help="KV cache budget of each replica, such as 512MiB; by default a share of the free memory."),
    ] = None,
    target: Annotated[
        float, typer.Option(min=0.01, help="Steps that a replica should have at once; the stage scales by it.")
    ] = 2.0,
    window: Annotated[str, typer.Option(help="Stable window of the autoscaler, 6s to 1h.")] = "60s",
    grace: Annotated[str, typer.Option(help="Longest time that the last replica is kept after the window.")] = "30s",
    min_scale: Annotated[int, typer.Option(min=0, help="Replicas of each stage to keep; 0 scales to zero.")] = 0,
    max_scale: Annotated[
        int | None,
        typer.Option(min=1, help="Replicas of a stage at most; by default as many as the machine has cores for."),
    ] = None,
    lane_width: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sequences that travel together, 64, or 256 in turn; fewer make more lanes to spread."
        ),
    ] = None,
    fork: Annotated[
        bool, typer.Option("--fork/--no-fork", help="Start replicas from processes that have imported torch already.")
    ] = True,
    prompt: Annotated[str | None, typer.Option(help="Send this and print the text.")] = None,
    leave: Annotated[bool, typer.Option("--exit", help="Stop after the answer to --prompt.")] = False,
    log_dir: Annotated[
        Path | None, typer.Option(help="Keep the logs here; by default in a temporary folder.", show_default=False)
    ] = None,
    data_dir: DataDirOption = None,
    batch: Annotated[
        bool,
        typer.Option("--batch", help="Take batch jobs: a broker for events, and a service that keeps results."),
    ] = False,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(help="File of API keys, one a line: only clients that send one are served.", show_default=False),
    ] = None,
    signing_key_file: Annotated[
        Path | None,
        typer.Option(help="File of keys that orchestrator and stages sign their events with.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line when it listens, for programs.")] = False,
) -> None:
    """Serve a model in stages on this machine, until Ctrl-C.

    Each stage is a service of its own that holds its own blocks only; one more, the orchestrator, answers clients.
    All start with the first request, scale out with the load, and go back to zero when nobody asks.

    [bold]Examples[/]

    stagecraft up demo --stages 2

    stagecraft up ./my-checkpoint --stages 3 --name mine --port 9000

    stagecraft up demo --stages 2 --window 6s --grace 1s

    stagecraft up --plan plan.yaml --target 2 --max-scale 4

    stagecraft up demo --stages 2 --prompt "ROMEO:" --exit

    stagecraft up demo --stages 2 --batch
    """
    from orchestrator.render.deployment import Deployment, DeploymentError, Scaling, WeightSource

    if leave and prompt is None:
        fail("--exit needs --prompt: what should be done before the exit?", 2)
    api_key = read_api_key(api_keys_file, "--api-keys-file")
    if batch and api_key is not None:
        fail("--batch does not go with --api-keys-file: brokers bring events without a key", 2)
    chosen = _plan(model, stages, plan, name, dtype, quantize)
    layout = _layout(len(chosen.stages), device, threads, spread)
    most = max(min_scale, max_scale or default_replicas(len(chosen.stages), layout.threads))
    if max_scale is not None and max_scale < min_scale:
        fail(f"--max-scale {max_scale} is below --min-scale {min_scale}", 2)
    try:
        deployment = Deployment(
            chosen,
            # initial scale 0: everything starts with the first request
            scaling=Scaling(target, None, _window_s(window), min_scale, most, initial_scale=0, grace_s=_grace_s(grace)),
            device=device,
            threads_per_stage=layout.threads,
            kv_bytes_max=None if kv_memory is None else _bytes("--kv-memory", kv_memory),
            # all stages, and all replicas they may have, share what one machine has
            kv_share=1 / (len(chosen.stages) * most),
            weights=WeightSource(chosen.model if "://" in chosen.model else f"file://{chosen.model}"),
            lane_width=lane_width or (ONE_LANE_WIDTH if layout.spread == 1 and most == 1 else None),
            lane_age_s=0 if most == 1 else None,  # no replica will come that younger lanes would find
            spread=layout.spread if layout.spread != len(chosen.stages) else 0,
            env=_key_files(api_keys_file, signing_key_file),
        )
    except DeploymentError as error:
        fail(str(error), 2)
    with log_folder(log_dir) as folder:
        if layout.in_turn:
            deployment = replace(deployment, cores_lock=str(folder.resolve() / CORES_LOCK))
        settings = _platform_settings(deployment, folder, host, (port, grpc_port, metrics_port), fork, data_dir)
        if batch:
            deployment = _with_batch(deployment, settings)
        raise typer.Exit(_run(_until_signal(deployment, settings, _Question(prompt, api_key), leave, as_json), folder))


@dataclass(frozen=True, slots=True)
class _Question:
    """What `up` asks once all is there."""

    prompt: str | None
    api_key: str | None


def _key_files(api_keys_file: Path | None, signing_key_file: Path | None) -> dict[str, str]:
    """The variables that name them; what the files hold is never a variable. Ends the command for one without keys."""
    from functions.contract.seals import Seals
    from functions.contract.watched_file import FileError

    try:
        Seals.open(signing_key_file)
    except FileError as error:
        fail(f"--signing-key-file: {error}", 2)
    found = {
        "ORCHESTRATOR_API_KEYS_FILE": api_keys_file,
        "ORCHESTRATOR_STAGE_SIGNING_KEY_FILE": signing_key_file,
        "STAGE_SIGNING_KEY_FILE": signing_key_file,
    }
    return {name: str(path.absolute()) for name, path in found.items() if path is not None}


def _with_batch(deployment: Deployment, settings: PlatformSettings) -> Deployment:
    """Results lie beside the broker's events. Ends the command if they cannot."""
    from orchestrator.render.deployment import Batch

    data = settings.data_folder
    assert data is not None  # `up` names one
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot use {data}: {error.strerror or error}; name another folder with --data-dir", 2)
    return replace(deployment, batch=Batch(results_file=str(data / "results.sqlite")))


def _layout(stages: int, device: str, threads: int | None, spread: int | None) -> Layout:
    """On a GPU cores matter little: each stage has its share of them, and all are kept busy."""
    from orchestrator.layout import Layout, shared_cores_layout

    if device == "cpu" or (device == "auto" and not has_nvidia_gpu()):
        return shared_cores_layout(stages, _cores(), threads=threads, spread=spread)
    return Layout(spread or stages, threads or max(1, _cores() // stages), in_turn=False)


def has_nvidia_gpu() -> bool:
    """Whether the driver has found one; this process has no torch to ask."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def default_replicas(stages: int, threads: int) -> int:
    """As many replicas of each stage as there are cores to compute in, at least 1."""
    return max(1, _cores() // (stages * threads))


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _run(work: Any, folder: Path) -> int:
    import uvloop

    from functions.contract.logs import configure_logs

    with (folder / PLATFORM_LOG).open("a", buffering=1) as stream:
        configure_logs(as_json=True, to=stream)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return int(runner.run(work))


async def _until_signal(
    deployment: Deployment, settings: PlatformSettings, question: _Question, leave: bool, as_json: bool
) -> int:
    """Runs the deployment and returns the exit code. The first signal stops it."""
    work = asyncio.create_task(_serve(deployment, settings, question, leave, as_json))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    try:
        return await work
    except asyncio.CancelledError:
        return 0


async def _serve(
    deployment: Deployment, settings: PlatformSettings, question: _Question, leave: bool, as_json: bool
) -> int:
    from knative.errors import KnativeError
    from orchestrator.cli.completions import EndpointError

    try:
        async with _deployed(deployment, settings) as (platform, urls):
            if as_json:
                print(json.dumps(_facts(deployment, platform, urls)), flush=True)
            with stop_told(platform):
                if question.prompt is not None:
                    await _unless_failing(
                        platform, _answer(deployment, platform, urls, question.prompt, question.api_key)
                    )
                if not leave:
                    if not as_json:
                        print(_banner(deployment, platform, urls), flush=True)
                    await _tell_failures(platform)
    except UpError as error:
        tell_problems(error.problems)
        return error.exit_code
    except (KnativeError, EndpointError) as error:
        tell_problems([str(error)])
        return 1
    return 0


@asynccontextmanager
async def _deployed(deployment: Deployment, settings: PlatformSettings) -> AsyncIterator[tuple[Platform, Urls]]:
    """The platform with the plan's services applied, listening. Raises KnativeError and UpError."""
    from knative.errors import Unavailable
    from knative.platform import Platform
    from knative.resources.documents import read_documents
    from orchestrator.render.local import write_local

    written = write_local(deployment, settings.folder / "manifests")
    async with AsyncExitStack() as stack:
        try:
            platform = await stack.enter_async_context(Platform(settings))
        except Unavailable as error:
            problems = problems_of(error, "--port, --grpc-port, --metrics-port or --host")
            raise UpError(*problems, exit_code=2) from None
        await _publish(platform, deployment.service_name, stack)
        # these only: --log-dir may hold those of another run
        await platform.apply([document for path in written for document in read_documents(path)])
        yield platform, Urls(platform.url, platform.grpc, deployment.plan.name)


async def _publish(platform: Platform, wanted: str, stack: AsyncExitStack) -> None:
    """Has the other commands find it, by `wanted` or a name like it. Raises RegistryError."""
    from knative.control import control_api
    from knative.registry import RegistryError

    while True:
        name = platform.settings.name
        try:
            await stack.enter_async_context(control_api(platform, name, platform.settings.folder))
        except RegistryError:  # another `up` may have taken the name since it was chosen
            platform.settings = replace(platform.settings, name=_free_name(wanted))
            if platform.settings.name == name:
                raise
        else:
            return


async def _unless_failing(platform: Platform, work: Awaitable[T]) -> T:
    """The result of `work`; raises UpError as soon as a service cannot start: waiting would not help."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            ended = task.done()
            failures = _failures(platform)
            if failures and not (ended and task.exception() is None):  # they say more than the answer of a chain
                raise UpError(*failures.values())
            if ended:
                return await task
            await asyncio.wait({task}, timeout=LOOK_EVERY_S)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # its own error says no more than the failures


async def _tell_failures(platform: Platform) -> None:
    """Says once why a service does not start, as long as it serves."""
    told: dict[str, str] = {}
    while True:
        failures = _failures(platform)
        for name, text in failures.items():
            if told.get(name) != text:
                note(f"warning: {text}")
        told = failures
        await asyncio.sleep(LOOK_EVERY_S)


def _failures(platform: Platform) -> dict[str, str]:
    """What is wrong, by revision."""
    logs = platform.settings.folder / "logs"
    return {
        one["revision"]: f"{one['service']} cannot start: {one['message']} (its log is in {logs})"
        for one in platform.status()["revisions"]
        if one["state"] == "Failed"
    }


async def _answer(deployment: Deployment, platform: Platform, urls: Urls, prompt: str, api_key: str | None) -> None:
    from orchestrator.cli import completions
    from orchestrator.cli.console import write_text
    from orchestrator.cli.generate import Tally, show
    from orchestrator.cli.wake_view import WakeView

    body = {
        "model": urls.name,
        "prompt": prompt,
        "max_tokens": PROMPT_TOKENS,
        "temperature": PROMPT_TEMPERATURE,
        "seed": PROMPT_SEED,
    }
    stages = zip(deployment.stage_names, deployment.plan.stages, strict=True)
    rows = {name: (f"stage {index}", f"blocks {stage.blocks}") for index, (name, stage) in enumerate(stages)}
    view = WakeView({**rows, deployment.service_name: ("orchestrator", "endpoints")}, platform.status)
    tally = Tally()

    def first_text() -> None:
        view.end()
        write_text(f"\n{prompt}")

    async with completions.client(api_key) as http, view.shown():
        await show(http, urls.base, body, tally, before_text=first_text)
    note(tally.line())


def _plan(
    model: str | None,
    stages: int | None,
    plan_file: Path | None,
    name: str | None,
    dtype: str | None,
    quantize: str | None,
) -> Plan:
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
        return _fitted(source, given, stages or 1, name, dtype, quantize)
    except PlanError as error:
        fail(str(error), 2)
    except (CheckpointError, ModelSourceError) as error:
        fail(str(error))


def _fitted(
    model: str, given: Plan | None, stages: int, name: str | None, dtype: str | None, quantize: str | None
) -> Plan:
    """A plan whose model is a place that stages can read. Raises PlanError, CheckpointError and ModelSourceError."""
    from functions.contract.checkpoint import open_checkpoint
    from orchestrator.model_source import check_index, resolve_model
    from orchestrator.planner import check_plan, plan_by_stages

    source = resolve_model(model)
    checkpoint = open_checkpoint(source.location)
    check_index(checkpoint)
    if given is None:
        options = {"dtype": dtype or "auto", "quantize": quantize or "none", "model": source.location}
        return plan_by_stages(checkpoint, stages, name=name or source.name, **options)
    check_plan(given, checkpoint)
    return replace(
        given,
        model=source.location,
        name=name or given.name,
        dtype=dtype or given.dtype,
        quantize=quantize or given.quantize,
    )


def _bytes(option: str, text: str) -> int:
    from orchestrator.planner import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        fail(f"{option}: {error}", 2)


def _window_s(text: str) -> int:
    seconds = duration_s("--window", text)
    if not 6 <= seconds <= 3600 or seconds != int(seconds):
        fail(f"--window: {text!r} must be whole seconds from 6s to 1h", 2)
    return int(seconds)


def _grace_s(text: str) -> float:
    seconds = duration_s("--grace", text)
    if not seconds:
        fail(f"--grace: {text!r} must be more than 0, such as 1s", 2)
    return seconds


def _platform_settings(
    deployment: Deployment, folder: Path, host: str, ports: tuple[int, int, int], fork: bool, data_dir: Path | None
) -> PlatformSettings:
    from knative.platform import PlatformSettings

    port, grpc_port, metrics_port = ports
    name = _free_name(deployment.service_name)
    return PlatformSettings(
        folder=folder.resolve(),
        name=name,
        host=host,
        port=port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        default_service=f"{deployment.namespace}/{deployment.service_name}",
        fork=fork,
        data_folder=data_folder(data_dir, name),
    )


def _free_name(wanted: str) -> str:
    """The model's name for `stagecraft status --platform`, with a number behind it when it is taken."""
    from knative.registry import entries

    taken = {entry.name for entry in entries()}
    names = (wanted[:36].strip("-") + suffix for suffix in ("", *(f"-{number}" for number in range(2, 1000))))
    return next(name for name in names if name not in taken)


def _facts(deployment: Deployment, platform: Platform, urls: Urls) -> dict[str, object]:
    stages = [
        {"index": index, "blocks": str(stage.blocks), "service": name, "url": _url(platform, deployment, name)}
        for index, (stage, name) in enumerate(zip(deployment.plan.stages, deployment.stage_names, strict=True))
    ]
    return {
        "model": urls.name,
        "url": urls.base,
        "openai": urls.openai,
        "v1": urls.v1,
        "v2": urls.v2,
        "grpc": urls.grpc,
        "metrics": f"{urls.base}/metrics",
        "platform_metrics": platform.metrics_url,
        "stages": stages,
        "orchestrator": {"service": deployment.service_name},
        **_batch_urls(deployment, platform),
        "platform": platform.settings.name,
        "log_dir": str(platform.settings.folder),
    }


def _batch_urls(deployment: Deployment, platform: Platform) -> dict[str, str]:
    """Where requests of batches go, and where their results are; nothing without --batch."""
    from orchestrator.render.batch import results_name

    if deployment.batch is None:
        return {}
    broker = _url(platform, deployment, deployment.batch.broker)
    return {"broker": broker, "results": _url(platform, deployment, results_name(deployment))}


def _url(platform: Platform, deployment: Deployment, name: str) -> str:
    return platform.service_url(deployment.namespace, name)


def _banner(deployment: Deployment, platform: Platform, urls: Urls) -> str:
    body = json.dumps({"model": urls.name, "prompt": "ROMEO:", "max_tokens": 60})
    count = len(deployment.plan.stages)
    broker = _batch_urls(deployment, platform).get("broker")
    batch = "\n  stagecraft batch submit prompts.jsonl -o results.jsonl" if broker else ""
    broker_line = f"\n  broker   {broker}" if broker else ""
    return f"""
{urls.name} is served in {count} stage{"s"[: count > 1]}, from zero with the first request; Ctrl-C stops it.

  OpenAI   {urls.openai}
  V1       {urls.v1}
  V2       {urls.v2}
  gRPC     {urls.grpc}{broker_line}
  metrics  {platform.metrics_url}
  watch    stagecraft top --platform {platform.settings.name}
  files    {platform.settings.folder} (manifests, logs, {PLATFORM_LOG})

Try:
  curl {urls.openai}/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}
  stagecraft generate "ROMEO:" --url {urls.base}{batch}
"""
