"""How many cores there are to use: affinity, cores of several hardware threads, quotas of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.kernels.cores import usable_cores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="there are no affinities here")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")


def topology(cores: list[str]) -> dict[str, str]:
    """One sibling list for each core: "0,4" for a core of the hardware threads 0 and 4."""
    folder = "sys/devices/system/cpu"
    return {f"{folder}/cpu{cpu}/topology/thread_siblings_list": core for core in cores for cpu in core.split(",")}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6),
        ({"proc/self/cgroup": "damaged"}, 6),
        (topology(["0,4", "1,5", "2,6", "3,7"]), 4),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 6),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "250000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/not/seen/here", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "3:memory:/x\n2:cpu,cpuacct:/c\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_period_us": "50000",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            6,
        ),
    ],
)
def test_what_the_system_says(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5})
    write(tmp_path, files)
    assert usable_cores(tmp_path) == expected


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
