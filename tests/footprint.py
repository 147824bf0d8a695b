"""What this process holds: tasks, threads, open files by their kind, and memory."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import threading
from collections import Counter
from pathlib import Path


def held() -> Counter[str]:
    """Tasks, threads, and open files by their kind."""
    counts = Counter(tasks=len(asyncio.all_tasks()), threads=threading.active_count())
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one of the listing itself
            target = os.readlink(f"/proc/self/fd/{number}")
            counts[target.partition(":")[0] if ":" in target else "file"] += 1
    return counts


def more(now: Counter[str], before: Counter[str]) -> dict[str, int]:
    """What there is more of."""
    return dict(now - before)


def resident_mb() -> float:
    """The memory of this process, after everything that nothing leads to is gone."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not every C library can give back what is free
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
