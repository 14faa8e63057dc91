"""A few hundred bad calls; `make fuzz` makes many thousands. And those that once got through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_a2a import AllToAll, PrepareFinalize, Spec, formats
from moe_a2a.errors import GeometryError, MoeA2AError, PayloadError
from tests.fuzz.lots import on_an_object, without_an_object

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, about the odd tensors
IDS, WEIGHTS = torch.tensor([[0], [7], [3]]), torch.rand(3, 1)
X = torch.randn(3, 64).bfloat16()
HUGE = 10**5000  # Python refuses to print it


@pytest.mark.parametrize("seed", range(6))
def test_bad_calls_on_an_object(backend, seed):
    seen = on_an_object(seed, backend, 40)
    assert seen["rounds"] == 3
    assert seen.total() == 43


def test_bad_calls_without_an_object():
    assert without_an_object(1, 120).total() == 120


def opened(backend="shm", **more):
    return AllToAll(Spec(1, 8, 1, 64, 16, **more), backend=backend)


def nested():
    return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(5)])


def fake(right):
    with FakeTensorMode():
        return torch.zeros(right.shape, dtype=right.dtype)


def not_in_memory(right):
    """Like `right` in all but that its memory has been given back."""
    value = right.clone()
    value.untyped_storage().resize_(0)
    return value


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("make", [fake, nested, not_in_memory])
@pytest.mark.parametrize("name", ["x", "topk_ids", "topk_weights"])
def test_tensors_without_memory_are_no_crash(name, make, warm):
    good = {"x": X, "topk_ids": IDS, "topk_weights": WEIGHTS}
    with opened() as a2a:
        if warm:  # the short way past the rules
            a2a.combine(a2a.dispatch(**good).x.clone())
        value = make(good[name]) if make is not nested else nested()
        with pytest.raises(PayloadError, match=name if make is not not_in_memory else None):
            a2a.dispatch(**good | {name: value})
        y = a2a.dispatch(**good).x.clone()
        for out in (fake(X), nested(), not_in_memory(X)):
            with pytest.raises(PayloadError):
                a2a.combine(y, out=out)
            with pytest.raises(PayloadError):
                a2a.combine(out)
        with pytest.raises(PayloadError):
            a2a.combine(not_in_memory(y))
        assert torch.equal(a2a.combine(y), X)


def test_a_view_that_is_yet_to_be_negated_is_refused(backend):
    """`imag` of a conjugate: one column of it has any stride, and the memory has the other sign."""
    weights = torch.randn(3, 1, dtype=torch.complex64).conj().imag
    with opened(backend) as a2a:
        with pytest.raises(PayloadError, match="resolve_neg"):
            a2a.dispatch(X, IDS, weights)
        got = a2a.dispatch(X, IDS, weights.resolve_neg()).topk_weights
        assert torch.equal(got[0, :3], weights)


@pytest.mark.parametrize("value", [torch.ones(1, dtype=torch.bool).to_sparse(), nested()])
def test_active_ranks_are_a_dense_tensor(value, backend):
    with opened(backend) as a2a:
        with pytest.raises(PayloadError, match="bool"):
            a2a.dispatch(X, IDS, WEIGHTS, active_ranks=value)
        with pytest.raises(PayloadError, match="bool"):
            a2a.reset(value)


@pytest.mark.parametrize("value", [torch.ones(1).to_sparse(), nested(), fake(torch.ones(1))])
def test_global_scale_is_a_dense_tensor(value, backend):
    with opened(backend, wire="nvfp4") as a2a:
        with pytest.raises(PayloadError, match="global_scale"):
            a2a.dispatch(X, IDS, WEIGHTS, global_scale=value)
        with pytest.raises(PayloadError, match="global_scale"):
            formats.quantize(X, "nvfp4", global_scale=value) if value.is_sparse else opened(
                wire="nvfp4"
            ).dispatch(X, IDS, WEIGHTS, global_scale=value)


ARRAY = np.array(["bf16", "fp8"])


@pytest.mark.parametrize(
    "call",
    [
        lambda: Spec(1, 8, 1, 64, 16, wire=ARRAY),
        lambda: Spec(1, 8, 1, 64, 16, wire=np.array("bf16")),
        lambda: Spec(1, 8, 1, 64, 16, combine_wire=ARRAY),
        lambda: Spec(1, 8, 1, 64, 16, scrub=ARRAY),
        lambda: Spec(1, HUGE, 1, 64, 16),
        lambda: Spec(1, 8, 1, HUGE, 16),
        lambda: Spec(1, 8, HUGE, 64, 16),
        lambda: Spec(1, 8, 1, 64, 16, num_eplb_experts=HUGE),
        lambda: Spec(1, 8, 1, 64, 16, alignment=32 * HUGE),
        lambda: Spec(1, 8, 1, 64, 16, extra={"a": HUGE}),
        lambda: AllToAll(Spec(1, 8, 1, 64, 16), device=2**70),
        lambda: AllToAll(Spec(1, 8, 1, 64, 16), timeout=HUGE),
        lambda: AllToAll(HUGE),
        lambda: formats.quantize(X, "bf16", rule=ARRAY),
        lambda: formats.quantize(X, "mxfp8", alignment=HUGE),
        lambda: formats.quantize(nested(), "bf16"),
        lambda: formats.dequantize(X, None, "bf16", hidden_size=HUGE),
        lambda: formats.unswizzle(torch.zeros(128, 4).byte(), rows="3"),
        lambda: PrepareFinalize(opened(), ARRAY),
        lambda: opened().dispatch(X, IDS, WEIGHTS, runtime_max_tokens=HUGE),
    ],
)
def test_values_that_break_comparisons_and_texts(call):
    with pytest.raises(MoeA2AError) as caught:
        call()
    assert isinstance(caught.value, (GeometryError, PayloadError, ValueError))
    assert len(str(caught.value)) < 500


def test_a_dtype_of_no_kind():
    with opened() as a2a:
        a2a.dispatch(X, IDS, WEIGHTS)
        with pytest.raises(PayloadError, match="combine_buffer"):
            a2a.combine_buffer(np.zeros(3))


def test_finalize_refuses_before_it_combines():
    with opened() as a2a:
        layer = PrepareFinalize(a2a)
        y = layer.prepare(X, WEIGHTS, IDS).received.x.clone()
        for wrong in ({"routed_scaling_factor": 10**400}, {"shared": nested()}):
            with pytest.raises(PayloadError):
                layer.finalize(y, **wrong)
        assert torch.equal(layer.finalize(y), X)
