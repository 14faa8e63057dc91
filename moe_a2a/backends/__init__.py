"""The backends, in the order in which ``backend="auto"`` tries them. One line and one file each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from moe_a2a.errors import BackendUnavailable
from moe_a2a.wording import shown

if TYPE_CHECKING:
    from moe_a2a.backends.base import Backend
    from moe_a2a.group import Group
    from moe_a2a.spec import Spec

__all__ = ["BACKENDS", "choose", "load", "reasons"]

BACKENDS = {
    "shm": "moe_a2a.backends.shm:Shm",
    "nvlink": "moe_a2a.backends.nvlink:Nvlink",
    "collective": "moe_a2a.backends.collective:Collective",
}


def load(name: str) -> type[Backend]:
    """The class behind a name.

    Raises:
        BackendUnavailable: no such backend.
    """
    if name not in BACKENDS:
        text = f"no such backend; there are: auto, {', '.join(BACKENDS)}"
        raise BackendUnavailable(f"backend={shown(name)}: {text}", reasons={name: text})
    module, _, attribute = BACKENDS[name].partition(":")
    found: type[Backend] = getattr(import_module(module), attribute)
    return found


def reasons(
    names: tuple[str, ...], device_type: str, spec: Spec | None = None, group: Group | None = None
) -> dict[str, str | None]:
    """Why each backend can't be used with tensors on ``device_type``; None where it can."""
    found: dict[str, str | None] = {}
    for name in names:
        backend = load(name)
        if device_type in backend.device_types:
            found[name] = backend.unusable(spec, group)
        else:
            found[name] = f"moves {'/'.join(backend.device_types)} tensors, not {device_type}"
    return found


def choose(wanted: str, device_type: str, spec: Spec, group: Group) -> type[Backend]:
    """The backend wanted, or with ``"auto"`` the first that every rank can use.

    Raises:
        BackendUnavailable: on every rank alike, with each rank's reasons.
    """
    names = tuple(BACKENDS) if wanted == "auto" else (wanted,)
    replies = group.exchange({"reasons": reasons(names, device_type, spec, group)})
    blocked: dict[str, str] = {}
    for name in names:
        why = [
            f"rank {r}: {reply['reasons'][name]}"
            for r, reply in enumerate(replies)
            if reply["reasons"][name] is not None
        ]
        if not why:
            return load(name)
        blocked[name] = "; ".join(why)
    text = "\n".join(f"  {name}: {why}" for name, why in blocked.items())
    raise BackendUnavailable(f"backend={wanted!r} can't be used:\n{text}", reasons=blocked)
