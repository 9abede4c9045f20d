"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores of this process's affinity, no more than the CPU quotas of its control groups give (Linux).

    Elsewhere all that the system counts. root: where /proc and /sys are
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = {_siblings(root, cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, math.floor(min(len(cores), *_quotas(root), math.inf)))


def _siblings(root: Path, cpu: int) -> str:
    """The hardware threads of a CPU's core, as the system writes them."""
    return _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """The quota, in cores, of each control group that this process is in, and of those around it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (controllers and "cpu" not in controllers.split(",")) or not path:
            continue
        top = root / "sys/fs/cgroup" / controllers
        here = top / path.lstrip("/")
        for group in (here, *here.parents):
            if controllers:  # version 1
                quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
            else:
                quota, _, period = _read(group / "cpu.max").partition(" ")
            if quota.isdigit() and period.isdigit() and int(period):  # others are "max" and -1
                yield int(quota) / int(period)
            if group == top:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
