"""What the machine is good at: number format by measurement, and the cores that are ours."""

import contextlib
import functools
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch

SIDE = 512  # of the matrices that are multiplied for the measurement
RUNS = 10  # of each product, or fewer on a slow machine
GAIN = 1.5  # bfloat16 must be so many times faster, for it costs accuracy


@functools.cache
def use_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies matrices of bfloat16 much faster than of float32.

    Measured once a process, in well under a second: one answer for all of its work. A CPU without matrix units for it
    is far slower, and no flag of the processor says so on every system.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    matrices = {dtype: torch.ones(SIDE, SIDE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(matrices, math.inf)
    begun = time.perf_counter()
    for run in range(RUNS):
        # In turns, and in the thread's own time, so that other work on the machine weighs on neither.
        for dtype, x in matrices.items():
            start = time.thread_time()
            x @ x
            best[dtype] = min(best[dtype], time.thread_time() - start)
        if run and time.perf_counter() - begun > 0.4:  # the first run is slower than the rest
            break
    return best[torch.float32] > GAIN * best[torch.bfloat16]


def usable_cores() -> int:
    """Cores that this process may use; a container sees all of its host's, and more threads than cores are slow."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(count, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or "max": no limit
        return count


@functools.cache
def own_threads() -> int:
    """Threads that torch works with in this process as a whole, as it was set when this was first asked."""
    return torch.get_num_threads()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads in this thread; each has a number of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processor() -> str:
    """The processor's name, and what it multiplies matrices of 16 and of 8 bits with."""
    try:
        told = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    told = {key.strip(): value.strip() for key, value in told.items()}
    units = [name for name in ("amx_bf16", "avx512_bf16", "avx512_vnni") if name in told.get("flags", "").split()]
    name = told.get("model name") or platform.machine()
    return f"{name} ({', '.join(units)})" if units else name


def fast_dtype(device: torch.device) -> torch.dtype:
    """The number format that ``device`` is fast in."""
    return torch.bfloat16 if use_bfloat16(device) else torch.float32


def fast_precision(device: torch.device) -> torch.autocast:
    """Computing in the number format that ``device`` is fast in, for a ``with`` statement."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) is torch.bfloat16)


def precision_here(device: torch.device) -> torch.autocast:
    """What this thread computes in now, for a ``with`` statement in another thread, which does not know of it."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type) if enabled else None, enabled=enabled)
