"""The launcher: addresses and environments, then real stages of a small checkpoint."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import httpx
import psutil
import pytest

from functions.contract.checkpoint import open_checkpoint
from functions.contract.spans import BlockSpan
from orchestrator import launcher
from orchestrator.launcher import AddressError, LaunchError, LaunchSettings, Urls
from orchestrator.plan import Plan, StageSpec
from orchestrator.planner import plan_by_stages

TWO = Plan("/models/x", "x", (StageSpec(BlockSpan(0, 3)), StageSpec(BlockSpan(3, 4))), "float32")


@pytest.fixture
def settings(tmp_path: Path) -> LaunchSettings:
    return LaunchSettings(log_dir=tmp_path, http_port=0, grpc_port=0)


def test_each_stage_is_told_its_span_and_the_plan(settings: LaunchSettings) -> None:
    env = launcher.stage_environment(TWO, 1, settings)
    assert (env["STAGE_BLOCKS"], env["STAGE_INDEX"], env["STAGE_COUNT"]) == ("3:4", "1", "2")
    assert (env["STAGE_MODEL"], env["STAGE_DTYPE"], env["STAGE_PLAN"]) == ("/models/x", "float32", TWO.digest)


def test_the_orchestrator_is_told_the_stages_in_order(settings: LaunchSettings) -> None:
    env = launcher.orchestrator_environment(TWO, ["http://a", "http://b"], settings)
    assert env["ORCHESTRATOR_STAGE_URLS"] == "http://a,http://b"
    assert env["ORCHESTRATOR_PLAN"] == TWO.digest


def test_threads_share_the_cores_but_are_never_none() -> None:
    cores = launcher.default_threads(1)
    assert cores >= 1
    assert launcher.default_threads(10 * cores) == 1


def test_a_name_with_a_slash_stays_one_part_of_the_path() -> None:
    assert Urls("http://h:1", "h:2", "owner/name").v2 == "http://h:1/v2/models/owner%2Fname/infer"


@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_a_taken_port_names_itself_and_the_option(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = (port, 0) if option == "--port" else (0, port)
        with pytest.raises(AddressError, match=rf"port {port} .* {option} "):
            launcher.choose_ports("127.0.0.1", *ports)


def test_http_and_grpc_cannot_share_a_port() -> None:
    port, _ = launcher.choose_ports("127.0.0.1", 0, 0)
    with pytest.raises(AddressError, match="--grpc-port"):
        launcher.choose_ports("127.0.0.1", port, port)


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(AddressError, match=r"192\.0\.2\.1"):  # TEST-NET-1, RFC 5737
        launcher.choose_ports("192.0.2.1", 0, 0)


def test_free_ports_are_two_different_ones() -> None:
    http_port, grpc_port = launcher.choose_ports("127.0.0.1", 0, 0)
    assert http_port != grpc_port
    assert min(http_port, grpc_port) > 0


async def test_processes_become_ready_and_all_end(tiny_checkpoint: Path, settings: LaunchSettings) -> None:
    plan = plan_by_stages(open_checkpoint(str(tiny_checkpoint)), 3)
    seen: list[tuple[str, str]] = []
    async with launcher.launch(plan, settings) as deployment:
        await deployment.wait_ready(lambda name, state: seen.append((name, state)))
        pids = [child.pid for child in (*deployment.stages, deployment.orchestrator)]
        async with httpx.AsyncClient() as client:
            for url in deployment.stage_urls:
                assert (await client.get(f"{url}/healthz")).status_code == 200
    assert {name for name, state in seen if state == "ready"} == {"stage 0", "stage 1", "stage 2", "orchestrator"}
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_a_stage_that_cannot_load_is_named_with_its_last_lines(
    tiny_checkpoint: Path, settings: LaunchSettings
) -> None:
    plan = plan_by_stages(open_checkpoint(str(tiny_checkpoint)), 2)
    (settings.log_dir / "copy").mkdir()
    broken = Plan(str(settings.log_dir / "copy"), plan.name, plan.stages)
    (settings.log_dir / "copy" / "config.json").write_text("{}")
    with pytest.raises(LaunchError, match=r"stage \d .*\n  \| ") as failure:
        async with launcher.launch(broken, settings) as deployment:
            await deployment.wait_ready(lambda name, state: None)
    assert str(settings.log_dir / "copy") in str(failure.value)


async def test_a_stage_that_dies_ends_the_wait_for_the_end(tiny_checkpoint: Path, settings: LaunchSettings) -> None:
    plan = plan_by_stages(open_checkpoint(str(tiny_checkpoint)), 2)
    async with launcher.launch(plan, settings) as deployment:
        await deployment.wait_ready(lambda name, state: None)
        os.kill(deployment.stages[1].pid, signal.SIGKILL)
        with pytest.raises(LaunchError, match="stage 1 was killed by SIGKILL"):
            await deployment.wait_end()


async def test_a_cancelled_start_leaves_nothing(tiny_checkpoint: Path, settings: LaunchSettings) -> None:
    plan = plan_by_stages(open_checkpoint(str(tiny_checkpoint)), 2)
    pids: list[int] = []

    async def start() -> None:
        async with launcher.launch(plan, settings) as deployment:
            pids.extend(child.pid for child in (*deployment.stages, deployment.orchestrator))
            await deployment.wait_ready(lambda name, state: None)

    work = asyncio.create_task(start())
    while not pids:  # noqa: ASYNC110 (a list sets no event)
        await asyncio.sleep(0.01)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert len(pids) == 3
    assert not any(psutil.pid_exists(pid) for pid in pids)
