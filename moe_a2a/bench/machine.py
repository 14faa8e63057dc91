"""Where and with what a figure was measured. No names of hosts, users or directories."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch

import moe_a2a
from moe_a2a._build import cpu_compiler
from moe_a2a.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "circumstances",
    "compiler_version",
    "machine",
    "shown_command",
    "versions",
    "without_directory",
]


def circumstances(argv: Sequence[str]) -> dict[str, Any]:
    """All of it, for the JSON. ``argv``: the arguments behind ``python -m moe_a2a``."""
    commit, dirty = _commit()
    return {
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shown_command(argv),
        "commit": commit,
        "dirty": dirty,
        "machine": machine(),
        "load_average": round(os.getloadavg()[0], 2),  # what else ran: W of it are the ranks
        "versions": versions(),
    }


def shown_command(argv: Sequence[str]) -> str:
    """The command with every absolute path cut down to its last part."""
    return shlex.join(["python", "-m", "moe_a2a", *map(without_directory, argv)])


def without_directory(argument: str) -> str:
    """An argument with a path outside the working directory cut down to its last part."""
    option, equals, value = argument.partition("=")
    if option.startswith("-") and equals:
        return f"{option}={without_directory(value)}"
    outside = argument.startswith(("/", "~")) or ".." in PurePath(argument).parts
    return PurePath(argument).name if outside else argument


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, bytes of memory."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "moe_a2a": moe_a2a.__version__,
        "tvm-ffi": _installed("apache-tvm-ffi"),
        "compiler": compiler_version(),
    }


def compiler_version() -> str:
    """First line of the C++ compiler's ``--version``."""
    try:
        command = [*shlex.split(cpu_compiler()), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.splitlines()[0]
    except (BuildError, OSError, IndexError):
        return "none"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> tuple[str, bool | None]:
    """(commit, whether files differ from it); ("unknown", None) outside our checkout."""
    root = Path(__file__).resolve().parents[2]
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    # An environment inside some other project's checkout is not a checkout of this one.
    if not commit or top is None or Path(top) != root:
        return "unknown", None
    return commit, bool(_git(root, "status", "--porcelain"))


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
