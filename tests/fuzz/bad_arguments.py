"""Wrong calls that need no open object: Spec, AllToAll, and the functions of moe_a2a.formats."""

from __future__ import annotations

import torch

from moe_a2a import AllToAll, Spec, formats
from moe_a2a.errors import GeometryError, MoeA2AError, PayloadError
from tests.fuzz import wrong
from tests.fuzz.bad_calls import FLOATS, Call, printed
from tests.fuzz.wrong import Rng, Wrong

SPEC = {"ep_size": 1, "num_experts": 8, "top_k": 2, "hidden_size": 128, "max_tokens_per_rank": 4}
HUGE = (0, -1, 2**31, 2**62, 2**64, 10**30, 10**5000, -(10**5000))
WRONG_SPEC: dict[str, tuple[object, ...]] = {
    "ep_size": (*HUGE[:2], *HUGE[4:]),
    "num_experts": (*HUGE, 1),
    "top_k": (*HUGE, 9, 33),
    "hidden_size": (*HUGE[:2], *HUGE[3:], 120, 8, 17),
    "max_tokens_per_rank": HUGE,
    "wire": ("", "fp4", "BF16", "fp32", "bf16 ", "bf16\0"),
    "combine_wire": ("", "nvfp4", "fp8", "mxfp4"),
    "invalid_expert_id": (0, 7, 2**31, -(2**31) - 1, 10**5000),
    "scrub": ("", "none", "ID"),
    "alignment": (*HUGE[:2], 16, 33, 10**5000),
    "extra": ({"a": 0}, {"": 1}, {1: 1}, {"a": 1.0}, {"a": 2**62}, {"a": 10**5000}, {"a": None}),
    "num_eplb_experts": (-1, 10**5000),
    "allow_defer": (0, 1),
}


def bad_spec(rng: Rng) -> Call:
    name = rng.choice(sorted(WRONG_SPEC))
    value = rng.choice(WRONG_SPEC[name])
    if rng.random() < 0.4:
        types = (int,) if isinstance(value, int) else (type(value), str)
        value = wrong.no_tensor(rng, *types, *((bool,) if name == "allow_defer" else ())).value
        value = ["extra"] if name == "extra" and isinstance(value, dict) and not value else value
    shown = (name, "extra", "hidden_size", "top_k")  # what the rule that it breaks is about
    arguments = {**SPEC, name: value}
    if rng.random() < 0.05:
        arguments.pop("top_k")
        errors = (TypeError, GeometryError)
        return Call("Spec without top_k", lambda: Spec(**arguments), (), errors)
    what = f"Spec({name}={printed(value)})"
    return Call(what, lambda: Spec(**arguments), shown, (GeometryError,))


def bad_opening(rng: Rng) -> Call:
    good = Spec(**SPEC)
    name = rng.choice(("spec", "group", "backend", "device", "timeout", "max_blocks", "debug"))
    more: dict[str, tuple[object, ...]] = {
        "backend": ("", "nccl", "SHM", "shm\0"),
        "device": ("", "cuda:x", "meta", "gpu", "cuda:99", torch.device("meta"), 10**30, -1),
        "timeout": (0, -1, 0.0, float("inf"), 1e9, True, "5", 10**400),
        "max_blocks": (0, -1, True, 1.0),
        "debug": (0, 1),
    }
    value = rng.choice((wrong.no_tensor(rng, type(None)).value, *more.get(name, ())))
    fine = {"debug": bool, "max_blocks": int, "timeout": (int, float)}
    if isinstance(value, fine.get(name, ())):
        value = rng.choice(more[name])
    if name == "device" and isinstance(value, torch.device) and value.type == "cpu":
        value = "meta"
    arguments = {"spec": good, name: value}
    return Call(
        f"AllToAll({name}={printed(value)})",
        lambda: AllToAll(**arguments).close(),
        (name,) if name != "device" else (name, "backend", "moves"),
        (GeometryError, MoeA2AError),
    )


def bad_format(rng: Rng) -> Call:
    """quantize, dequantize, swizzle, unswizzle."""
    wire = rng.choice(sorted(formats.FORMATS))
    x = torch.ones(3, 128)
    payload, scales = formats.quantize(x.bfloat16() if wire == "bf16" else x, wire)
    kind = rng.choice(("quantize", "dequantize", "options", "swizzle"))
    errors = (PayloadError, GeometryError)
    bad: Wrong
    if kind == "quantize":
        bad = wrong.no_tensor(rng) if rng.random() < 0.3 else wrong.other_dtype(rng, x, FLOATS)
        if rng.random() < 0.3:
            bad = wrong.other_layout(rng, x)
        call = lambda: formats.quantize(bad.value, wire)  # noqa: E731
    elif kind == "dequantize":
        bad = wrong.other_dtype(rng, payload, (payload.dtype,))
        if rng.random() < 0.5:
            bad = rng.choice((wrong.no_tensor(rng), wrong.other_layout(rng, payload)))
        call = lambda: formats.dequantize(bad.value, scales, wire)  # noqa: E731
        if rng.random() < 0.5:
            bad = wrong.tensor(rng, scales) if scales is not None else Wrong(x, ("scales",))
            bad = Wrong("x", ("str",)) if bad.value is None else bad
            if bad.shown[0] in ("grad", "sign", "contiguous", "strides", "FakeTensor"):
                bad = wrong.other_shape(rng, x)  # numbers like any other, to plain torch
            call = lambda: formats.dequantize(payload, bad.value, wire)  # noqa: E731
    elif kind == "swizzle":
        bad = rng.choice((wrong.no_tensor(rng), wrong.other_layout(rng, x), Wrong(x, ("1-byte",))))
        swizzle = rng.choice((formats.swizzle, formats.unswizzle))
        call = lambda: swizzle(bad.value)  # noqa: E731
    else:
        name = rng.choice(("alignment", "rule", "ue8m0", "global_scale", "wire"))
        bad = wrong.no_tensor(rng, type(None), *((bool,) if name == "ue8m0" else ()))
        given = {"wire": wire, name: bad.value}
        call = lambda: formats.quantize(x, **given)  # noqa: E731
        bad = Wrong(bad.value, (name, "dense"))
    return Call(
        f"{kind} of {wire}: {printed(bad.value)}", call, (*bad.shown, "got", "scales"), errors
    )
