"""Wrong arguments on one rank: a typed error that says what was given and what was expected, before
anything is sent. The other rank is in the right call all the while, and the round goes through."""

from __future__ import annotations

import re

import torch

from moe_a2a import AllToAll, Spec
from moe_a2a.errors import CapacityError, PayloadError, StateError

T, K, H, CAPACITY = 3, 2, 128, 4
BF16 = torch.zeros(T, H, dtype=torch.bfloat16)
IDS = torch.tensor([[0, 3], [1, 2], [-1, 9]])
WEIGHTS = torch.ones(T, K)
PACKED, SCALES = torch.zeros(T, H // 2, dtype=torch.uint8), torch.zeros(T, H // 16).byte()
EXTRA = {"id": torch.zeros(T, 4, dtype=torch.uint8)}
SPEC = Spec(2, 5, K, H, CAPACITY, wire="nvfp4", extra={"id": 4})
GOOD = {"x": BF16, "topk_ids": IDS, "topk_weights": WEIGHTS, "extra": EXTRA}

# What to change in GOOD, the error, and what its text must have in it.
DISPATCHES = [
    ({"x": BF16.double()}, PayloadError, "float64.*bfloat16"),
    ({"x": BF16.int()}, PayloadError, "int32.*bfloat16"),
    ({"x": BF16[:, :64]}, PayloadError, r"\[3, 64\].*128"),
    ({"x": BF16[0]}, PayloadError, r"\[128\].*128"),
    ({"x": None}, PayloadError, "NoneType"),
    ({"x": torch.zeros(H, T, dtype=torch.bfloat16).t()}, PayloadError, "contiguous"),
    ({"x": torch.empty(T, H, device="meta")}, PayloadError, "meta.*cpu"),
    ({"x": PACKED}, PayloadError, "uint8.*scales"),
    ({"x": BF16, "scales": SCALES}, PayloadError, r"bfloat16.*uint8 \[T, 64\]"),
    ({"x": PACKED, "scales": SCALES.float()}, PayloadError, "scales.*float32.*uint8"),
    ({"x": PACKED, "scales": SCALES[:, :4]}, PayloadError, r"scales.*\[3, 4\].*\[3, 8\]"),
    ({"x": PACKED, "scales": SCALES[:2]}, PayloadError, r"scales.*\[2, 8\].*\[3, 8\]"),
    ({"topk_ids": IDS.float()}, PayloadError, "topk_ids.*float32.*int32 or int64"),
    ({"topk_ids": IDS.short()}, PayloadError, "topk_ids.*int16"),
    ({"topk_ids": IDS[:, :1]}, PayloadError, r"topk_ids.*\[3, 1\].*\[3, 2\]"),
    ({"topk_ids": IDS[:2]}, PayloadError, r"topk_ids.*\[2, 2\].*\[3, 2\]"),
    ({"topk_ids": IDS.t().contiguous().t()}, PayloadError, "topk_ids.*contiguous"),
    ({"topk_ids": IDS.tolist()}, PayloadError, "topk_ids.*list"),
    ({"topk_weights": WEIGHTS.bfloat16()}, PayloadError, "topk_weights.*bfloat16.*float32"),
    ({"topk_weights": WEIGHTS[:, 0]}, PayloadError, r"topk_weights.*\[3\].*\[3, 2\]"),
    ({"topk_weights": None}, PayloadError, "topk_weights.*NoneType"),
    ({"runtime_max_tokens": 2}, CapacityError, "3 .*2"),
    ({"runtime_max_tokens": 5}, CapacityError, "5.*4"),
    ({"runtime_max_tokens": -1}, CapacityError, "-1.*4"),
    ({"runtime_max_tokens": 4.0}, CapacityError, "4.0"),
    ({"runtime_max_tokens": True}, CapacityError, "True"),
    ({"global_scale": 2.0}, PayloadError, "global_scale.*float"),
    ({"global_scale": torch.ones(2)}, PayloadError, r"global_scale.*\[2\]"),
    ({"global_scale": torch.ones((), dtype=torch.float64)}, PayloadError, "float64.*float32"),
    ({"extra": None}, PayloadError, "extra.*id"),
    ({"extra": {}}, PayloadError, "extra.*id"),
    ({"extra": EXTRA | {"lora": EXTRA["id"]}}, PayloadError, "lora.*id"),
    ({"extra": {"id": EXTRA["id"][:, :3]}}, PayloadError, r"\[3, 3\].*\[3, 4\]"),
    ({"extra": {"id": EXTRA["id"].char()}}, PayloadError, "int8.*uint8"),
    ({"active_ranks": torch.ones(3, dtype=torch.bool)}, PayloadError, r"\[3\].*\[2\]"),
    ({"active_ranks": torch.ones(2)}, PayloadError, r"float32 \[2\].*bool"),
    ({"active_ranks": [1, 1]}, PayloadError, "bool"),
    ({"active_ranks": 3}, PayloadError, "bool"),
    ({"active_ranks": [False, True]}, StateError, "this rank"),
    ({"defer": True}, PayloadError, "allow_defer=True"),
]


def refuse(what, call, error, text, a2a):
    phase = a2a.phase
    try:
        call()
    except error as refused:
        if not re.search(text, str(refused), re.DOTALL):
            raise AssertionError(f"{what}: {text!r} is not in {str(refused)!r}") from None
    except Exception as other:
        raise AssertionError(f"{what}: {type(other).__name__} ({other}), not {error}") from other
    else:
        raise AssertionError(f"{what} was accepted")
    assert a2a.phase == phase, what


def refused_dispatches(ranks, backend):
    with AllToAll(SPEC, ranks.group, backend=backend, timeout=20) as a2a:
        a2a.dispatch(**GOOD)
        a2a.combine(a2a.combine_buffer().zero_())
        if ranks.rank == 0:
            for change, error, text in DISPATCHES:
                refuse(
                    f"dispatch({change})",
                    lambda c=change: a2a.dispatch(**GOOD | c),
                    error,
                    text,
                    a2a,
                )
            zero = torch.zeros(2, CAPACITY, H, dtype=torch.bfloat16)
            refuse("combine", lambda: a2a.combine(zero), StateError, "idle.*dispatch", a2a)
            refuse("buffer", lambda: a2a.combine_buffer(), StateError, "idle.*dispatch", a2a)
        a2a.dispatch(**GOOD)
        out = a2a.combine(torch.ones(2, CAPACITY, H, dtype=torch.bfloat16))
        assert out[:, 0].tolist() == [2.0, 1.0, 0.0]


def test_wrong_dispatches(pool, backend):
    pool.run(refused_dispatches, backend, ranks=2)


def combines(recv, other, y):
    """(y, out, error, text)"""
    out = torch.zeros(T, H, dtype=torch.bfloat16)
    wide = torch.zeros(2, CAPACITY, 2 * H, dtype=torch.bfloat16)
    return [
        (y.float(), None, PayloadError, "float32.*bfloat16"),
        (y[:, :3], None, PayloadError, r"\[2, 3, 128\].*R=4"),
        (y[0], None, PayloadError, r"\[4, 128\].*W=2"),
        (wide[:, :, ::2], None, PayloadError, "contiguous"),
        (None, None, PayloadError, "NoneType"),
        (y.to("meta"), None, PayloadError, "meta.*cpu"),
        (recv.x, None, PayloadError, "receive"),
        (recv.x.view(-1).view(2, CAPACITY, H), None, PayloadError, "receive"),
        (y, out.float(), PayloadError, "out.*float32.*bfloat16"),
        (y, out[:2], PayloadError, r"out.*\[2, 128\].*\[3, 128\]"),
        (y, out[:1].expand(T, H), PayloadError, "out.*overlap"),
        (y, torch.zeros(H, T, dtype=torch.bfloat16).t(), PayloadError, "out.*contiguous"),
        (y, y[1, :3], PayloadError, "out.*y"),
        (y, recv.x[0, :3], PayloadError, "out.*receive"),
        (y, "out", PayloadError, "out.*str"),
    ]


def refused_combines(ranks, backend):
    spec = Spec(2, 5, K, H, CAPACITY)
    with AllToAll(spec, ranks.group, backend=backend, timeout=20) as a2a:
        for _ in range(2):
            recv = a2a.dispatch(BF16 + 1, IDS, WEIGHTS)
            y = torch.ones(2, CAPACITY, H, dtype=torch.bfloat16)
            if ranks.rank == 0:
                for wrong, out, error, text in combines(recv, a2a, y):
                    what = f"combine({wrong!r:.60}, {out!r:.60})"
                    refuse(what, lambda w=wrong, o=out: a2a.combine(w, out=o), error, text, a2a)
                again = lambda: a2a.dispatch(BF16, IDS, WEIGHTS)  # noqa: E731
                refuse("dispatch", again, StateError, "dispatched.*combine", a2a)
                half = lambda: a2a.combine_buffer(torch.float16)  # noqa: E731
                refuse("combine_buffer", half, PayloadError, "float16.*bfloat16", a2a)
            assert a2a.combine(y)[:, 0].tolist() == [2.0, 1.0, 0.0]
        if ranks.rank == 0:
            stale = recv.x[0, :T]
            refuse(
                "stale x", lambda: a2a.dispatch(stale, IDS, WEIGHTS), PayloadError, "receive", a2a
            )
            scale = {"global_scale": torch.ones(())}
            bad = lambda: a2a.dispatch(BF16, IDS, WEIGHTS, **scale)  # noqa: E731
            refuse("global_scale", bad, PayloadError, "nvfp4.*bf16", a2a)
            unwanted = lambda: a2a.dispatch(BF16, IDS, WEIGHTS, scales=SCALES)  # noqa: E731
            refuse("scales", unwanted, PayloadError, "scales.*bf16", a2a)
        a2a.dispatch(BF16, IDS, WEIGHTS)
        a2a.combine(y)


def test_wrong_combines(pool, backend):
    pool.run(refused_combines, backend, ranks=2)


def after_close(ranks, backend):
    a2a = AllToAll(SPEC, ranks.group, backend=backend, timeout=10)
    recv = a2a.dispatch(**GOOD)
    a2a.close()
    a2a.close()
    assert recv.x.view(torch.uint8).sum() >= 0  # whatever it holds, reading it is safe
    for call in (
        lambda: a2a.dispatch(**GOOD),
        lambda: a2a.combine(torch.zeros(2, CAPACITY, H, dtype=torch.bfloat16)),
        a2a.combine_buffer,
        a2a.reset,
    ):
        refuse("a call after close", call, StateError, "close", a2a)
    with AllToAll(SPEC, ranks.group, backend=backend, timeout=10) as second:
        second.dispatch(**GOOD)


def test_use_after_close(pool, backend):
    pool.run(after_close, backend, ranks=2)
