"""Back-off, readiness thresholds, ports, GPUs and log files: what needs no process."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from knative.kubelet import gpus, logs, ports
from knative.kubelet.backoff import Backoff
from knative.kubelet.gpus import Gpus
from knative.kubelet.health import Readiness
from knative.kubelet.ports import Ports
from knative.resources.objects import Probe


def test_the_first_restart_is_at_once_and_later_ones_double_up_to_300_s() -> None:
    backoff = Backoff()
    assert [backoff.after_run(1) for _ in range(8)] == [0, 10, 20, 40, 80, 160, 300, 300]


def test_a_run_of_ten_minutes_forgives_all_crashes_before() -> None:
    backoff = Backoff()
    assert [backoff.after_run(ran_s) for ran_s in (1, 1, 1, 599, 600, 1)] == [0, 10, 20, 40, 0, 10]


def test_readiness_needs_its_thresholds_in_a_row() -> None:
    state = Readiness(Probe(period_s=2, success_threshold=2, failure_threshold=3))
    seen = []
    for succeeded in (True, False, True, True, False, False, True, False, False, False, True, True):
        state.add(succeeded)
        seen.append(state.ready)
    assert seen == [False, False, False, True, True, True, True, True, True, False, False, True]


@pytest.mark.parametrize(
    ("probe", "results", "period_s", "timeout_s"),
    [
        (Probe(), (), 0.05, 0.1),
        (Probe("http"), (False,) * 1000, 0.05, 0.1),
        (Probe(), (True,), 10, 1),
        (Probe(timeout_s=4), (True, False, False), 10, 4),
        (Probe(), (True, False, False, False), 1, 1),
        (Probe("exec"), (), 1, 1),
        (Probe(period_s=3, timeout_s=2), (), 3, 2),
        (Probe(period_s=3, timeout_s=2), (True,), 3, 2),
    ],
)
def test_readiness_is_aggressive_only_until_ready_and_only_by_default(
    probe: Probe, results: tuple[bool, ...], period_s: float, timeout_s: float
) -> None:
    state = Readiness(probe)
    for succeeded in results:
        state.add(succeeded)
    assert (state.period_s, state.timeout_s) == (period_s, timeout_s)


def test_ports_are_free_distinct_and_not_for_outgoing_connections() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    machine = Ports()
    taken = [machine.take() for _ in range(200)]
    assert len(set(taken)) == 200
    assert all(ports.is_free(port) and not first <= port <= last for port in taken)
    machine.close()


def test_two_platforms_do_not_choose_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_user_ports", lambda: list(range(20_000, 20_050)))
    one, other = Ports(), Ports()
    taken = [platform.take() for _ in range(10) for platform in (one, other)]
    assert len(set(taken)) == 20
    one.close()
    other.close()


def test_a_port_given_back_can_be_taken_again_but_not_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    every = Ports()
    port = every.take()
    every.close()
    monkeypatch.setattr(ports, "_user_ports", lambda: [port])
    platform = Ports()
    assert platform.take() == port
    with pytest.raises(Exception, match="no free port"):
        platform.take()
    platform.give_back(port)
    with socket.create_server(("127.0.0.1", port)), pytest.raises(Exception, match="no free port"):
        platform.take()
    assert platform.take() == port
    platform.close()


async def test_gpus_go_to_the_first_that_fits() -> None:
    pool = Gpus(("0", "1", "2"))
    one, three, two, four = (pool.ask(count) for count in (1, 3, 2, 4))
    assert (one.result(), two.result()) == (("0",), ("1", "2"))
    assert not three.done()
    assert pool.shortage(3) == "waiting for a GPU: 0/3 nvidia.com/gpu available, 3 asked for"
    pool.give_back(one.result())
    pool.give_back(two.result())
    assert sorted(await three) == ["0", "1", "2"]
    assert not four.done()


async def test_who_gives_up_waiting_for_a_gpu_gets_none() -> None:
    pool = Gpus(("0",))
    first, second, third = (pool.ask(1) for _ in range(3))
    second.cancel()
    pool.give_back(await first)
    assert await asyncio.wait_for(third, 10) == ("0",)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("-1", ()),
        ("0", ("0",)),
        ("1, 0", ("1", "0")),
        ("0,-1,1", ("0",)),
        ("GPU-8f3a,MIG-1", ("GPU-8f3a", "MIG-1")),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(text: str, names: tuple[str, ...]) -> None:
    assert gpus.listed(text) == names


def test_the_logs_of_two_runs_are_kept(tmp_path: Path) -> None:
    for run in range(12):
        logs.start_log(tmp_path / "pod", run).write_text(str(run))
    assert [file.name for file in logs.runs(tmp_path / "pod")] == ["10.log", "11.log"]


def test_the_last_lines_are_those_with_text(tmp_path: Path) -> None:
    (tmp_path / "0.log").write_bytes(b"a\n" * 100_000 + b"b \xff\nc\n\n  \n")
    assert logs.last_lines(tmp_path / "0.log", 2) == ["b \N{REPLACEMENT CHARACTER}", "c"]
    assert logs.last_lines(tmp_path / "none.log") == []


def test_the_logs_of_the_last_pods_outlive_them(tmp_path: Path) -> None:
    gone = logs.GonePods()
    folders = [tmp_path / f"p{index}" for index in range(60)]
    for folder in folders:
        folder.mkdir()
        gone.add(folder)
    assert [folder.exists() for folder in folders] == [False] * 10 + [True] * 50
