"""What a model and its context will take of memory, told before any of it is taken, and what the machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from formats.container import TritFile
from formats.kv_modules import KVModule

from .config import ModelConfig
from .ring.codecs import slots_of
from .sampler import OptionError
from .sizes import kv_bytes_per_token, scratch_bytes, weight_bytes

BY_QUALITY = ("f16", "q8", "k=q8,v=q4", "q4")  # what kv="auto" chooses from, best first
_CGROUPS, _GROUPS_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes. weights: of the mapped file, once all are read; cache: a full ring; scratch: buffers of one chunk."""

    weights: int
    cache: int
    scratch: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.scratch

    def __str__(self) -> str:
        return (
            f"{gigabytes(self.total)} = weights {gigabytes(self.weights)} + cache {gigabytes(self.cache)}"
            f" + scratch {gigabytes(self.scratch)}"
        )


def plans(
    file: TritFile, config: ModelConfig, n_ctx: int, n_batch: int, codecs: Sequence[str], modules: Sequence[KVModule]
) -> dict[str, Memory]:
    """Tell what a model will take with a context of n_ctx tokens, read in chunks of n_batch, for each codec."""
    chunk = min(n_batch, n_ctx)
    weights, slots, scratch = weight_bytes(file), slots_of(n_ctx, chunk), scratch_bytes(config, chunk)
    return {codec: Memory(weights, kv_bytes_per_token(config, codec, modules) * slots, scratch) for codec in codecs}


def choose(plans: dict[str, Memory], force: bool = False) -> tuple[str, Memory]:
    """Return the first codec whose plan fits the memory that is free, else the last if the machine could hold it.

    plans: codec -> what it takes, best first
    Raises OptionError with the numbers if not even that fits, unless `force`.
    """
    total, free = machine_memory()
    fitting = [codec for codec, memory in plans.items() if free is None or memory.total <= free]
    codec = fitting[0] if fitting else list(plans)[-1]
    if total is not None and plans[codec].total > total and not force:
        raise OptionError(
            f"this takes {plans[codec]} (kv {codec}), but there are {gigabytes(total)} of memory; "
            "take a smaller context (n_ctx, -c) or codec (kv, --kv), or force it (force, --force)"
        )
    return codec, plans[codec]


def machine_memory() -> tuple[int | None, int | None]:
    """Bytes of memory that this process may use, and those that are free now; None where the system does not tell."""
    total = free = None
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):  # what is free, and what the page cache can give back
                free = int(line.split()[1]) * 1024
    except (AttributeError, ValueError, OSError, IndexError):
        pass
    for limit, used in _cgroup_limits():
        total = limit if total is None else min(total, limit)
        free = limit - used if free is None else min(free, limit - used)
    return total, free


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Give (limit, used without page cache) of the control groups that this process is in, of version 2 and 1."""
    try:
        groups = [line.split(":", 2) for line in _GROUPS_OF_PROCESS.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers not in ("", "memory"):
            continue
        v1, v2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
        names = v1 if controllers else v2
        base = _CGROUPS / controllers
        folder = base / path.strip("/")
        for level in (folder, *folder.parents):
            if level.is_relative_to(base) and (limit := _number(level / names[0])) is not None:
                cached = _file_pages(level / "memory.stat")
                yield limit, max(0, (_number(level / names[1]) or 0) - cached)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None


def _file_pages(path: Path) -> int:
    """Bytes of page cache in a group, which gives way when memory is wanted."""
    try:
        lines = (line.split() for line in path.read_text().splitlines())
        return sum(int(value) for name, value in lines if name in ("inactive_file", "active_file"))
    except (OSError, ValueError):
        return 0


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
