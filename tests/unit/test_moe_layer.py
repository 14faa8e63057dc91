"""`MoELayer` on one rank: what it opens and closes, what it refuses and when, what experts are."""

from __future__ import annotations

import pytest
import torch

from moe_a2a import AllToAll, MoELayer, Spec
from moe_a2a.errors import CapacityError, GeometryError, PayloadError, StateError
from moe_a2a.experts import ExpertMatrix, ExpertWeights, select
from moe_a2a.experts.emulated import Emulated

T, H, E, K = 5, 64, 4, 2
DRAWN = torch.Generator().manual_seed(5)
X = torch.randn(T, H, generator=DRAWN).bfloat16()
IDS = torch.tensor([[0, 3], [1, -1], [-1, -1], [2, 0], [3, 9]])
ROUTER = torch.rand(T, K, generator=DRAWN)
WEIGHTS = ExpertWeights(
    ExpertMatrix(torch.randn(E, 2 * 32, H, generator=DRAWN).bfloat16() / 8),
    ExpertMatrix(torch.randn(E, H, 32, generator=DRAWN).bfloat16() / 8),
)


def spec(**more):
    return Spec(1, E, K, H, 8, **more)


def experts(of=None):
    return select(of or spec(), "cpu", WEIGHTS)


def doubled(recv, *, out):
    """A callable is enough: the row itself, twice."""
    return out.copy_(2 * recv.dequantize())


def test_opens_and_closes_its_own(backend):
    with MoELayer(spec(), None, experts(), backend=backend, timeout=7) as layer:
        a2a = layer.a2a
        assert (a2a.backend, layer.spec, a2a.phase) == (backend, spec(), "idle")
        assert layer(X, ROUTER, IDS).shape == (T, H)
        assert "emulated" in repr(layer)
    with pytest.raises(StateError, match="close"):
        layer(X, ROUTER, IDS)
    layer.close()


def test_leaves_open_what_was_open(backend):
    with AllToAll(spec(), backend=backend) as a2a:
        with MoELayer(a2a, experts=experts()) as layer:
            first = layer(X, ROUTER, IDS)
        again = MoELayer(a2a, None, doubled)(X, ROUTER, IDS)
        there = (IDS >= 0).any(1, keepdim=True)
        assert torch.equal(again, torch.where(there, 2 * X, torch.zeros_like(X)))
        assert torch.equal(layer(X, ROUTER, IDS), first)
        assert a2a.phase == "idle"


def test_experts_write_where_combine_reads():
    seen = []

    def noted(recv, *, out):
        seen.append((recv.x.shape, out))
        return doubled(recv, out=out)

    with MoELayer(spec(), None, noted, backend="shm") as layer:
        layer(X, ROUTER, IDS, runtime_max_tokens=T)
        layer.a2a.dispatch(X, IDS, ROUTER, runtime_max_tokens=T)
        buffer = layer.a2a.combine_buffer()
        layer.a2a.combine(buffer)
    assert [tuple(shape) for shape, _ in seen] == [(1, T, H)]
    assert seen[0][1].data_ptr() == buffer.data_ptr()


def test_an_output_of_ones_own(backend):
    with MoELayer(spec(), None, experts(), backend=backend) as layer:
        wanted = layer(X, ROUTER, IDS, shared=X, routed_scaling_factor=0.5)
        x = X.clone()
        got = layer(x, ROUTER, IDS, shared=x, routed_scaling_factor=0.5, out=x)
        assert got is x
        assert torch.equal(got, wanted), "out, x and shared in one place"


@pytest.mark.parametrize("value", [None, "emulated", Emulated, 3])
def test_experts_that_are_none(value):
    with pytest.raises(GeometryError, match=r"experts=.*select\(spec, device, weights\)"):
        MoELayer(spec(), None, value)


def test_experts_that_do_not_fit():
    class Fp8Only(Emulated):
        accepts = ("fp8",)

    class Defers(Emulated):
        accepts, expects_unquantized_inputs = ("bf16",), True

    class Elsewhere(Emulated):
        def __init__(self, *given):
            super().__init__(*given)
            self.invalid_expert_id, self.hidden_dim_unpadded = E, H

    class Wide(Emulated):
        def __init__(self, *given):
            super().__init__(*given)
            self.hidden_dim_unpadded = 2 * H

    mxfp8 = spec(wire="mxfp8")
    for of, kind, said in (
        (spec(), Fp8Only, "takes rows of wire fp8, not bf16"),
        (mxfp8, Defers, "allow_defer=True"),
        (spec(), Elsewhere, "invalid_expert_id=4: the Spec says -1"),
        (spec(), Wide, "hidden_dim_unpadded=128: the Spec says 64"),
    ):
        with pytest.raises(GeometryError, match=said):
            MoELayer(of, None, kind(of, "cpu", WEIGHTS))
    assert Elsewhere(spec(), "cpu", WEIGHTS).invalid_expert_id == E
    roomy = spec(wire="mxfp8", allow_defer=True)
    with MoELayer(roomy, None, Defers(roomy, "cpu", WEIGHTS), backend="shm") as layer:
        plain = MoELayer(spec(), None, experts(), backend="shm")
        assert torch.equal(layer(X, ROUTER, IDS), plain(X, ROUTER, IDS)), "nothing was quantized"
        plain.close()


def test_an_exchange_that_is_none():
    with pytest.raises(GeometryError, match="exchange=3: must be an AllToAll or a Spec"):
        MoELayer(3, None, experts())
    with AllToAll(spec(), backend="shm") as a2a:
        with pytest.raises(GeometryError, match="group, timeout given with an open AllToAll"):
            MoELayer(a2a, object(), experts(), timeout=3)
        with pytest.raises(TypeError, match="colour"):
            MoELayer(spec(), None, experts(), colour="red")


def test_a_refused_call_sends_nothing(backend):
    refused = [
        ({"shared": torch.zeros(T + 1, H)}, PayloadError, r"shared .*\[6, 64\].*\[5, 64\]"),
        ({"routed_scaling_factor": "2"}, PayloadError, "routed_scaling_factor='2'"),
        ({"out": torch.zeros(T, H)}, PayloadError, r"out is float32.*expected bfloat16 \[5, 64\]"),
        ({"out": X[1:].clone()}, PayloadError, r"out is bfloat16 \[4, 64\]"),
        ({"runtime_max_tokens": T - 1}, CapacityError, "4"),
        ({"global_scale": torch.ones(())}, PayloadError, "global_scale"),
    ]
    with MoELayer(spec(), None, experts(), backend=backend) as layer:
        wanted = layer(X, ROUTER, IDS)
        for keywords, error, said in refused:
            with pytest.raises(error, match=said):
                layer(X, ROUTER, IDS, **keywords)
            assert layer.a2a.phase == "idle"
        with pytest.raises(PayloadError, match="x is"):
            layer([1.0], ROUTER, IDS)
        with pytest.raises(PayloadError, match="top"):
            layer(X, IDS, ROUTER)
        assert torch.equal(layer(X, ROUTER, IDS), wanted)


def test_experts_that_raise_leave_the_round_open_until_a_reset():
    def broken(recv, *, out):
        raise RuntimeError("no experts today")

    with AllToAll(spec(), backend="shm") as a2a:
        with pytest.raises(RuntimeError, match="no experts today"):
            MoELayer(a2a, None, broken)(X, ROUTER, IDS)
        assert a2a.phase == "dispatched"
        a2a.reset()
        assert MoELayer(a2a, None, doubled)(X, ROUTER, IDS).shape == (T, H)


def outs():
    """Outputs that combine would refuse, and why."""
    return {
        "last dimension": torch.empty(H, T).bfloat16().t(),
        "its last": torch.empty(T, 2 * H).bfloat16()[:, ::2],
        "rows overlap": torch.empty(1, H).bfloat16().expand(T, H),
        "requires grad": torch.empty(T, H).bfloat16().requires_grad_(),
        "sparse": torch.empty(T, H).bfloat16().to_sparse(),
    }


@pytest.mark.parametrize("text", outs())
def test_an_output_that_combine_would_refuse_is_refused_before_rows_leave(text):
    with MoELayer(spec(), None, experts()) as layer:
        with pytest.raises(PayloadError, match=text):
            layer(X, ROUTER, IDS, out=outs()[text])
        assert layer.a2a.phase == "idle"
        layer(X, ROUTER, IDS)


@pytest.mark.parametrize("name", ["out", "shared"])
def test_memory_that_experts_or_peers_write_is_refused(name):
    with MoELayer(spec(), None, experts()) as layer:
        recv = layer.a2a.dispatch(X, IDS, ROUTER)
        buffer = layer.a2a.combine_buffer()
        layer.a2a.combine(buffer.zero_())
        for rows, text in ((buffer, "combine_buffer"), (recv.x, "receive views")):
            with pytest.raises(PayloadError, match=rf"{name} lies in .*{text}"):
                layer(X, ROUTER, IDS, **{name: rows.flatten(0, 1)[:T]})
            assert layer.a2a.phase == "idle"


def test_experts_of_another_exchange_are_refused_at_once():
    with AllToAll(spec()) as a2a:
        with pytest.raises(GeometryError, match=r"are for wire='mxfp8', not 'bf16'$"):
            MoELayer(a2a, experts=experts(spec(wire="mxfp8")))
        few = experts()
        few.weights = ExpertWeights(
            ExpertMatrix(torch.zeros(3, 64, H).bfloat16()),
            ExpertMatrix(torch.zeros(3, H, 32).bfloat16()),
        )
        with pytest.raises(GeometryError, match="hold 3 experts: rank 0 owns 4"):
            MoELayer(a2a, experts=few)
        with pytest.raises(GeometryError, match="hold 3 experts: rank 0 owns 4"):
            MoELayer(spec(), None, few)


@pytest.mark.parametrize(
    "made", [None, 7, (), (torch.zeros(3),), (1, 2, 3), (None, None)], ids=repr
)
def test_what_experts_return_is_looked_at(made):
    class Groups:
        def grouped_rows(self, recv):
            return made

        def __call__(self, recv, *, out):
            raise AssertionError("grouped_rows goes first")

    with AllToAll(spec(), backend="shm") as a2a:
        for given, text in (
            (lambda recv, out: made, "y .W, R, H., or"),
            (Groups(), "expected .rows"),
        ):
            with pytest.raises(PayloadError, match=f"the experts returned .*{text}"):
                MoELayer(a2a, None, given)(X, ROUTER, IDS)
            assert a2a.phase == "dispatched"
            a2a.reset()


def test_grouped_rows_that_are_no_method():
    class Groups:
        grouped_rows = 7

        def __call__(self, recv, *, out):
            return out

    with pytest.raises(GeometryError, match=r"experts\.grouped_rows=7: must be a method"):
        MoELayer(spec(), None, Groups())


@pytest.mark.parametrize("grouped", [False, True])
def test_a_quantized_combine_gives_bf16_of_experts_with_fp32(grouped):
    def wide(recv, *, out):
        if not grouped:
            return 2 * recv.dequantize()
        lists = recv.group(4)
        return recv.gather(lists)[0].float() * 2, lists

    with MoELayer(spec(combine_wire="mxfp8"), None, wide) as layer:
        out = torch.full((T, H), torch.nan, dtype=torch.bfloat16)
        found = layer(X, ROUTER, IDS, shared=X)
        assert found.dtype == torch.bfloat16
        assert layer(X, ROUTER, IDS, shared=X, out=out) is out
        assert torch.equal(out, found)
        assert (found - X)[(IDS >= 0).any(1)].abs().sum() > 1


def test_experts_with_parameters_record_no_gradient():
    module = torch.nn.Linear(H, H, dtype=torch.bfloat16)
    with MoELayer(spec(), None, lambda recv, out: module(recv.dequantize(torch.bfloat16))) as layer:
        assert not layer(X, ROUTER, IDS).requires_grad
