"""The expert backends, in the order in which `select` tries them. One line and one file each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from moe_a2a.errors import BackendUnavailable, GeometryError
from moe_a2a.experts.arguments import place
from moe_a2a.experts.base import wire_misfit
from moe_a2a.experts.weights import ExpertWeights, check_weights
from moe_a2a.spec import Spec
from moe_a2a.wording import shown

if TYPE_CHECKING:
    import torch

    from moe_a2a.experts.base import Experts

__all__ = ["EXPERTS", "explain", "load", "reasons", "select"]

EXPERTS = {
    "mxfp4_w4a4": "moe_a2a.experts.mxfp4_w4a4:Mxfp4W4A4",
    "triton_w4a16": "moe_a2a.experts.triton_w4a16:TritonW4A16",
    # Reported against Marlin, by rows of a call: 12 to 15 % slower up to 64, a tie near 256, 24 to
    # 36 % faster from 1024 on. So it is for prefill: `auto` comes to it only where no line above
    # can be used, and a runtime with an exchange for prefill asks for it there by name.
    "flashinfer_sm90": "moe_a2a.experts.flashinfer_sm90:FlashInferSm90",
    "emulated": "moe_a2a.experts.emulated:Emulated",
}


def load(name: str) -> type[Experts]:
    """The class behind a name.

    Raises:
        BackendUnavailable: no such backend.
    """
    if not isinstance(name, str) or name not in EXPERTS:
        text = f"no such expert backend; there are: auto, {', '.join(EXPERTS)}"
        raise BackendUnavailable(f"backend={shown(name)}: {text}", reasons={str(name): text})
    module, _, attribute = EXPERTS[name].partition(":")
    found: type[Experts] = getattr(import_module(module), attribute)
    return found


def reasons(
    spec: Spec | None, device: torch.device | str, weights: ExpertWeights | None
) -> dict[str, str | None]:
    """Why each backend can't be used, None where it can.

    Without ``spec`` and ``weights``: why it can't be used on this machine.

    Raises:
        GeometryError: no Spec, no device, or no weights.
    """
    there = place(device)
    if spec is not None and not isinstance(spec, Spec):
        raise GeometryError(f"spec={shown(spec)}: must be a Spec, or None")
    if weights is not None and not isinstance(weights, ExpertWeights):
        raise GeometryError(f"weights={shown(weights)}: must be ExpertWeights, or None")
    return {name: _reason(load(name), spec, there, weights) for name in EXPERTS}


def select(
    spec: Spec, device: torch.device | str, weights: ExpertWeights, *, backend: str = "auto"
) -> Experts:
    """The first backend that can compute with these weights on that device; or the one named.

    Raises:
        BackendUnavailable: none can; ``reasons`` has why not, by backend.
        GeometryError: no Spec, no device, or (whichever the backend) weights that don't fit.
        PayloadError: weights on another device.
    """
    check_weights(weights, spec, place(device))
    if backend != "auto":
        load(backend)
    found = reasons(spec, device, weights)
    wanted = tuple(EXPERTS) if backend == "auto" else (backend,)
    for name in wanted:
        if found[name] is None:
            return load(name)(spec, device, weights)
    blocked = {name: str(found[name]) for name in wanted}
    text = "\n".join(f"  {name}: {why}" for name, why in blocked.items())
    raise BackendUnavailable(f"experts={backend!r} can't be used:\n{text}", reasons=blocked)


def explain(spec: Spec, device: torch.device | str, weights: ExpertWeights) -> str:
    """What `select` makes of the same arguments, as a table to print: one line for each backend.

    Raises:
        GeometryError: as `select`.
        PayloadError: as `select`.
    """
    there = place(device)
    check_weights(weights, spec, there)
    formats = " and ".join(dict.fromkeys((weights.w13.format, weights.w2.format)))
    lines = [f"experts for {formats} weights, wire {spec.wire}, on {there}"]
    width = max(map(len, EXPERTS)) + 2
    chosen = False
    for name, why in reasons(spec, there, weights).items():
        state = f"not usable: {why}" if why is not None else "usable" if chosen else "chosen"
        chosen |= why is None
        lines.append(f"  {name:<{width}}{state}")
    return "\n".join(lines)


def _reason(
    backend: type[Experts],
    spec: Spec | None,
    device: torch.device,
    weights: ExpertWeights | None,
) -> str | None:
    if device.type not in backend.device_types:
        return f"computes with {'/'.join(backend.device_types)} tensors, not {device.type}"
    misfit = None if spec is None else wire_misfit(backend, spec)
    return misfit or backend.unusable(spec, device, weights)
