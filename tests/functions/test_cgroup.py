"""Limits of a container, read from files like the kernel's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from functions.cgroup import cpu_limit, memory_available_bytes

GIB = 1 << 30
UNLIMITED_V1 = 9223372036854771712  # what version 1 shows without a limit: the largest multiple of a page

MEMORY = {
    "limit_less_what_is_used": ({"memory.max": f"{4 * GIB}\n", "memory.current": f"{GIB}\n"}, 3 * GIB),
    "cached_files_count_as_free": (
        {
            "memory.max": f"{4 * GIB}",
            "memory.current": f"{3 * GIB}",
            "memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file 7\n",
        },
        3 * GIB,
    ),
    "a_full_group_has_nothing_left": ({"memory.max": "100", "memory.current": "120"}, 0),
    "max_is_no_limit": ({"memory.max": "max", "memory.current": "5"}, None),
    "v1": (
        {
            "memory/memory.limit_in_bytes": f"{2 * GIB}",
            "memory/memory.usage_in_bytes": f"{GIB}",
            "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}",
        },
        GIB + GIB // 2,
    ),
    "v1_without_limit_is_more_than_any_memory": (
        {"memory/memory.limit_in_bytes": f"{UNLIMITED_V1}", "memory/memory.usage_in_bytes": "0"},
        UNLIMITED_V1,
    ),
    "v2_goes_first": (
        {
            "memory.max": "10",
            "memory.current": "10",
            "memory/memory.limit_in_bytes": "99",
            "memory/memory.usage_in_bytes": "0",
        },
        0,
    ),
    "no_control_groups": ({}, None),
    "nonsense": ({"memory.max": "lots", "memory.current": "5"}, None),
}
CPU = {
    "half_a_processor_is_one_thread": ({"cpu.max": "50000 100000\n"}, 1),
    "whole": ({"cpu.max": "400000 100000"}, 4),
    "a_part_more_is_one_more": ({"cpu.max": "250000 100000"}, 3),
    "max_is_no_limit": ({"cpu.max": "max 100000"}, None),
    "v1": ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    "v1_minus_one_is_no_limit": ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    "no_control_groups": ({}, None),
    "period_of_nothing": ({"cpu.max": "1 0"}, None),
}


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(("files", "expected"), MEMORY.values(), ids=MEMORY)
def test_memory(tmp_path: Path, files: Mapping[str, str], expected: int | None) -> None:
    write(tmp_path, files)
    assert memory_available_bytes(tmp_path) == expected


@pytest.mark.parametrize(("files", "expected"), CPU.values(), ids=CPU)
def test_processors(tmp_path: Path, files: Mapping[str, str], expected: int | None) -> None:
    write(tmp_path, files)
    assert cpu_limit(tmp_path) == expected
