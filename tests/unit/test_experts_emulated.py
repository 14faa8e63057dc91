"""The emulated experts on one rank: sums, padding, scales, what they return and refuse."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from moe_a2a import AllToAll, Spec
from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.experts import Activation, ExpertMatrix, ExpertWeights, padded
from moe_a2a.experts.emulated import Emulated
from tests import oracle_experts as oracle

E, H, INNER, T = 4, 96, 64, 6
SPEC = Spec(1, E, 3, H, T, combine_wire="fp32")


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def floats(*shape, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32))


def weights(form="bf16", experts=E, **more):
    w13 = ExpertMatrix.quantize(floats(experts, 2 * INNER, H, seed=1, scale=H**-0.5), form)
    w2 = ExpertMatrix.quantize(floats(experts, H, INNER, seed=2, scale=INNER**-0.5), form)
    return ExpertWeights(w13, w2, **more)


def run(experts, ids, router, x=None, *, out=None, spec=SPEC, defer=False):
    """y of the tokens, [T, H], and of the padding behind them."""
    x = floats(len(ids), spec.hidden_size, seed=3) if x is None else x
    with AllToAll(spec, backend="shm") as a2a:
        given = (x.bfloat16(), torch.tensor(ids), torch.tensor(router))
        recv = a2a.dispatch(*given, defer=defer)
        y = experts(recv, out=out)[0]
    # A token that goes nowhere has no row.
    return y[: sum(any(0 <= i < E for i in row) for row in ids)]


def test_terms_are_added_by_expert_then_choice_in_fp32():
    experts, one = Emulated(SPEC, "cpu", weights()), [[1.0, 1.0, 1.0]]
    x = floats(1, H, seed=4)
    alone = [run(experts, [[e, -1, -1]], one, x)[0].numpy() for e in range(E)]
    router = np.array([[0.3, 0.7, 1e3]], np.float32)
    for ids in ([2, 0, 3], [3, 1, 0], [1, 1, 0], [2, -1, 2], [0, E, -7]):
        total = np.zeros(H, np.float32)
        for e, k in sorted((e, k) for k, e in enumerate(ids) if 0 <= e < E):
            total = total + alone[e] * router[0, k]
        y = run(experts, [ids], router, x)[0].numpy()
        np.testing.assert_array_equal(y, total, err_msg=str(ids))
    # The order is one that can be told from others.
    terms = [alone[e] * router[0, k] for k, e in enumerate([2, 0, 3])]
    assert ((terms[1] + terms[0]) + terms[2] != (terms[2] + terms[0]) + terms[1]).any()


def test_rows_without_an_expert_here_are_zeros_in_stale_memory():
    experts = Emulated(SPEC, "cpu", weights(b2=torch.ones(E, H)))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = torch.full((1, T, H), torch.nan, dtype=dtype)
        y = run(experts, [[0, -1, 9], [-1, -1, -1], [3, 3, 3]], [[1.0] * 3] * 3, out=out)
        assert y.dtype == dtype
        assert y.abs().sum(-1).min() > 0
        assert not out[0, 2:].any(), "padding"


@pytest.mark.parametrize(
    ("combine_wire", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32),
     ("mxfp8", torch.bfloat16)],
)  # fmt: skip
def test_output_has_the_dtype_of_the_combine_wire(combine_wire, dtype):
    spec = Spec(1, E, 3, H, T, combine_wire=combine_wire)
    held = weights()
    y = run(Emulated(spec, "cpu", held), [[0, 1, 2]], [[1.0, 0.5, 2.0]], spec=spec)
    exact = run(Emulated(SPEC, "cpu", held), [[0, 1, 2]], [[1.0, 0.5, 2.0]])
    assert y.dtype == dtype
    assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("form", ["bf16", "mxfp4", "nvfp4", "fp8"])
def test_padded_weights_give_the_same_rows(form):
    held = weights(form, b13=floats(E, 2 * INNER, seed=5), b2=floats(E, H, seed=6),
                   activation=Activation(1.702, 1.0, 7.0))  # fmt: skip
    tall = padded(held)
    assert tall.w13.columns > H
    assert tall.intermediate_size > INNER
    ids, router = [[0, 1, 2], [3, 3, -1]], [[0.2, 0.3, 0.5]] * 2
    experts = Emulated(SPEC, "cpu", tall)
    assert experts.hidden_dim_unpadded == H
    y, want = run(experts, ids, router), run(Emulated(SPEC, "cpu", held), ids, router)
    assert y.shape == (2, H)
    assert oracle.distance(y.double().numpy(), want.double().numpy()) < 1e-3


def test_activations_are_chosen_by_name_and_rule():
    ids, router = [[0, 1, 2]] * 4, [[0.2, 0.3, 0.5]] * 4
    held = weights("mxfp4")

    def outputs(**options):
        return run(Emulated(SPEC, "cpu", held, **options), ids, router).double().numpy()

    own = outputs()
    np.testing.assert_array_equal(own, outputs(activations="mxfp4", rule="ceil"))
    even, none = outputs(rule="even"), outputs(activations="bf16")
    assert 1e-6 < oracle.distance(own, even) < 0.05
    assert oracle.distance(outputs(activations="mxfp8"), none) < oracle.distance(own, none) / 4
    for options, text in (
        ({"activations": "int8"}, "format='int8'"),
        ({"rule": "up"}, "rule='up'"),
        ({"activations": "fp8_block128"}, "w13 has 96 columns.*multiple of 128"),
    ):
        with pytest.raises(GeometryError, match=text):
            Emulated(SPEC, "cpu", held, **options)


def test_rows_that_arrived_quantized_are_not_quantized_again():
    # So small that block scales are subnormal: quantizing twice is not the same as once there.
    x = floats(4, H, seed=8, scale=0.01)
    spec = Spec(1, E, 3, H, T, wire="nvfp4", combine_wire="fp32", allow_defer=True)
    held = weights(w2_input_scale=torch.full((E,), 1e-7))
    experts = Emulated(spec, "cpu", held, activations="nvfp4")
    ids, router = [[0, 1, 2]] * 4, [[1.0, 1.0, 1.0]] * 4
    first, later = (run(experts, ids, router, x, spec=spec, defer=d) for d in (False, True))
    assert torch.equal(first, later)
    assert first.any()


def test_the_largest_decode_scale_keeps_every_expert_from_saturating():
    """Expert 0 was calibrated with rows 64 times as large as expert 1's."""
    hidden = 64
    large, small = 16.0, 0.25
    decode = torch.tensor([large / 2688, small / 2688])
    spec = Spec(1, 2, 1, hidden, T, combine_wire="fp32")
    # gate 32 for every row, up = x, w2 = 1/32: what comes out is x, quantized twice.
    w13 = torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)]).expand(2, -1, -1)
    w2 = (torch.eye(hidden) / 32).expand(2, -1, -1)
    b13 = torch.cat([torch.full((hidden,), 32.0), torch.zeros(hidden)]).expand(2, -1)
    held = ExpertWeights(
        ExpertMatrix(w13.bfloat16()), ExpertMatrix(w2.bfloat16()), b13=b13,
        w13_input_scale=decode, w2_input_scale=decode * 32,
    )  # fmt: skip
    with pytest.warns(UserWarning) as seen:
        experts = Emulated(spec, "cpu", held, activations="nvfp4")
    assert [str(one.message).split()[0] for one in seen] == ["w13_input_scale", "w2_input_scale"]
    x = floats(2, hidden, seed=7).clamp(-4, 4)
    x = x / x.abs().amax(1, keepdim=True) * torch.tensor([[large], [small]])
    y = run(experts, [[0], [1]], [[1.0], [1.0]], x, spec=spec)
    # With the smallest scale (or any scale the other way up) row 0 would be clipped to 1/64.
    assert torch.allclose(y.abs().amax(1), torch.tensor([large, small]), rtol=0.2)
    for row in range(2):
        got, want = y[row].double().numpy(), x[row].bfloat16().double().numpy()
        assert oracle.distance(got, want) < 0.02


def test_scales_that_agree_do_not_warn():
    held = weights("nvfp4", w13_input_scale=torch.full((E,), 0.01))
    Emulated(SPEC, "cpu", held)


def test_a_wrong_call_is_refused():
    experts = Emulated(SPEC, "cpu", weights())
    with AllToAll(SPEC, backend="shm") as a2a:
        recv = a2a.dispatch(torch.zeros(1, H).bfloat16(), torch.zeros(1, 3).int(), torch.ones(1, 3))
        for out in (torch.zeros(1, T, H + 32), torch.zeros(1, T, H).double(), 3):
            with pytest.raises(PayloadError, match=r"out is .*\[1, 6, 96\]"):
                experts(recv, out=out)
        other = Emulated(Spec(1, E, 3, H, T + 1), "cpu", weights())
        with pytest.raises(PayloadError, match="these experts are for Spec"):
            other(recv)
    with pytest.raises(PayloadError, match="expected what dispatch returned"):
        experts(torch.zeros(1, T, H))
    with pytest.raises(GeometryError, match="hold 3 experts: a rank owns 4"):
        Emulated(SPEC, "cpu", weights(experts=3))
    with pytest.raises(GeometryError, match="must be ExpertWeights"):
        Emulated(SPEC, "cpu", None)
    with pytest.raises(PayloadError, match="on cpu: expected cuda"):
        Emulated(SPEC, "cuda", weights())


def test_parameters_give_no_gradient():
    w13 = torch.nn.Parameter(floats(E, 2 * INNER, H).bfloat16())
    w2 = torch.nn.Parameter(floats(E, H, INNER).bfloat16())
    experts = Emulated(SPEC, "cpu", ExpertWeights(ExpertMatrix(w13), ExpertMatrix(w2)))
    assert not run(experts, [[0, 1, 2]], [[1.0] * 3]).requires_grad


def test_what_it_prints_as():
    assert repr(Emulated(SPEC, "cpu", weights())) == "Emulated(weights=bf16, activations=bf16)"
    mixed = ExpertWeights(weights("mxfp4").w13, weights("nvfp4").w2)
    own, given = Emulated(SPEC, "cpu", mixed), Emulated(SPEC, "cpu", mixed, activations="mxfp8")
    assert repr(own) == "Emulated(weights=mxfp4+nvfp4, activations=mxfp4+nvfp4)"
    assert repr(given) == "Emulated(weights=mxfp4+nvfp4, activations=mxfp8)"
