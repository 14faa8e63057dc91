"""What a process holds that could outlive an AllToAll: descriptors and shared memory."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from pathlib import Path


def footprint() -> Counter[str]:
    """Kinds of open descriptors and of shared mappings, with their numbers."""
    gc.collect()
    held: Counter[str] = Counter()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:  # the descriptor of this listing
            continue
        held["descriptor " + target.split(":")[0].rstrip("0123456789")] += 1
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:" in line or "/dev/shm" in line:
            held["mapping " + line.split("/", 1)[1]] += 1
    return held


def settled(before: Counter[str], seconds: float = 2.0) -> Counter[str]:
    """What is held beyond `before`; threads of gloo get a moment to close their sockets."""
    deadline = time.monotonic() + seconds
    while (left := footprint() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def resident() -> int:
    """Bytes of memory that this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
