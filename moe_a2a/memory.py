"""How much memory there is to take."""

from __future__ import annotations

from pathlib import Path

__all__ = ["memory_available"]


def memory_available() -> int:
    """Bytes that this process may still take: the machine's and every enclosing cgroup's limit.

    Only the OOM killer limits a memfd, so one looks before allocating.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, usage in _cgroup_limits():
        available = min(available, limit - usage)
    return max(available, 0)


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, reclaimed usage) of this process's cgroup (v2, else v1) and its parents."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        for directory in (own, *own.parents):
            if not directory.is_relative_to(root):
                break
            try:
                most = (directory / limit).read_text().strip()
                used = int((directory / usage).read_text()) - _page_cache(directory)
            except (OSError, ValueError):
                continue
            if most != "max":
                found.append((int(most), used))
    return found


def _page_cache(directory: Path) -> int:
    """Bytes of file cache that the kernel would drop before it kills."""
    for line in (directory / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0
