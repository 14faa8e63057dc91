"""What the constructor of `AllToAll` is given, and what the ranks must agree on."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from moe_a2a import backends
from moe_a2a.errors import GeometryError
from moe_a2a.group import LocalRank
from moe_a2a.spec import Spec
from moe_a2a.wording import shown

if TYPE_CHECKING:
    from moe_a2a.backends.base import Backend
    from moe_a2a.group import Group
    from moe_a2a.timeline import Timeline

__all__ = ["check_arguments", "close", "compare", "place", "seconds"]


def seconds(timeout: float | None) -> float:
    """``timeout``, or that of the environment, or 30."""
    name, given = "timeout", timeout
    if given is None:
        name, text = "MOE_A2A_TIMEOUT", os.environ.get("MOE_A2A_TIMEOUT") or "30"
        try:
            given = float(text)
        except ValueError:
            raise GeometryError(f"{name}={shown(text)}: must be a number of seconds") from None
    if isinstance(given, (int, float)) and not isinstance(given, bool) and 0 < given < 1e9:
        return float(given)
    raise GeometryError(f"{name}={shown(given)}: must be a positive number of seconds")


def close(impl: Backend, timeline: Timeline | None) -> None:
    """What was opened, after the trace that ``MOE_A2A_TRACE`` asks for."""
    try:
        if timeline is not None and timeline.directory is not None:
            with suppress(Exception):  # of a device that has failed
                impl.collect_times()
            timeline.close()
    finally:
        impl.close()


def check_arguments(spec: object, backend: object, max_blocks: object, debug: object) -> None:
    """Raises `GeometryError` for an argument of the wrong kind."""
    if not isinstance(spec, Spec):
        raise GeometryError(f"spec={shown(spec)}: must be a Spec")
    if not isinstance(backend, str):
        raise GeometryError(f"backend={shown(backend)}: must be a name, or 'auto'")
    if not isinstance(debug, bool):
        raise GeometryError(f"debug={shown(debug)}: must be True or False")
    is_int = isinstance(max_blocks, int) and not isinstance(max_blocks, bool)
    if max_blocks is not None and not (is_int and max_blocks >= 1):  # type: ignore[operator]
        raise GeometryError(f"max_blocks={shown(max_blocks)}: must be an integer >= 1, or None")


def place(device: object, backend: str, group: object) -> torch.device:
    """The device of the tensors, as they themselves say it: ``cpu``, or ``cuda:0`` with an index.

    Raises:
        GeometryError: no device, or an index past this machine's. (Where there is no CUDA at all
            `BackendUnavailable` follows, with the reason.)
    """
    if device is None:
        found = torch.device("cuda" if _wants_cuda(backend, group) else "cpu")
    else:
        try:
            found = torch.device(device)  # type: ignore[call-overload]
        except (RuntimeError, TypeError, ValueError) as error:
            why = str(error).splitlines()[0][:200]
            raise GeometryError(
                f"device={shown(device)}: {why}; must be a device such as 'cpu'"
            ) from None
    if found.type == "cpu":
        return torch.device("cpu")  # tensors never say "cpu:0"
    if found.type != "cuda" or not torch.cuda.is_available():
        return found  # why no backend moves such tensors is for them to say
    there = torch.cuda.device_count()
    if found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if found.index >= there:
        raise GeometryError(f"device={shown(device)}: this machine has {there} CUDA devices")
    return found


def _wants_cuda(backend: str, group: object) -> bool:
    if backend in backends.BACKENDS:
        return "cpu" not in backends.load(backend).device_types
    if backend != "auto" or not torch.cuda.is_available():
        return False
    if isinstance(group, LocalRank):
        return True  # no CPU backend runs between threads
    if not (dist.is_available() and dist.is_initialized()):
        return False
    # Not the device types of the group: gloo claims CUDA tensors too, whatever it is used for.
    chosen = group if isinstance(group, dist.ProcessGroup) else None
    return "nccl" in dist.get_backend_config(chosen)


def compare(group: Group, spec: Spec) -> None:
    """Raises `GeometryError` on every rank alike if the ranks do not agree."""
    for rank, facts in enumerate(group.facts):
        for name in ("spec", "backend", "debug"):
            mine, theirs = group.facts[0][name], facts[name]
            if name == "spec":
                changed = [key for key in mine if mine[key] != theirs.get(key)]
                mine = {key: mine[key] for key in changed}
                theirs = {key: theirs.get(key) for key in changed}
            if mine != theirs:
                hint = " (MOE_A2A_TRACE turns it on)" if name == "debug" else ""
                raise GeometryError(
                    f"the ranks disagree on {name}: rank 0 has {mine}, rank {rank} has {theirs}"
                    + hint
                )
    if group.size != spec.ep_size:
        raise GeometryError(
            f"ep_size={spec.ep_size}, and the group has {group.size} ranks: they must be equal"
            + ("" if group.store else " (is torch.distributed initialized?)")
        )
