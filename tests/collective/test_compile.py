"""torch.compile(fullgraph=True) around dispatch and combine: what eager code gives, bit for bit.

The experts of these tests multiply by powers of two and add small integers, so that a compiler may
fuse them as it likes. T tokens of a rank, H hidden_size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

import pytest
import torch

from moe_a2a import AllToAll, MoELayer, PrepareFinalize, Spec
from moe_a2a.errors import CapacityError, PayloadError, PeerTimeout, StateError

H, K, E, CAPACITY = 128, 2, 8, 6
COMPILERS = ("eager", "aot_eager", "inductor")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
SLOW = pytest.mark.timeout(400)  # a cold Inductor compiles C++, on every rank
LIMIT = 300.0


def spec(size, **more):
    return Spec(size, E, K, H, CAPACITY, **more)


def compiled(function, compiler, **more):
    torch._dynamo.reset()  # what an earlier test compiled does not count against the limits
    return torch.compile(function, backend=compiler, fullgraph=True, **more)


def inputs(tokens, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randint(-4, 5, (tokens, H), generator=numbers).bfloat16()
    ids = torch.randint(-1, E, (tokens, K), generator=numbers)
    return x, ids, torch.rand(tokens, K, generator=numbers)


def experts(recv):
    """y [W, R, H] of everything in ``recv``; padding rows are poisoned."""
    y = recv.dequantize() * 0.5 + (recv.local_ids() >= 0).sum(-1, keepdim=True)
    if "id" in recv.extra:
        y = y + recv.extra["id"][:, :, :1]
    row = torch.arange(recv.x.shape[1])
    real = row[None, :] < recv.counts[:, None]
    return torch.where(real[:, :, None], y, torch.nan).bfloat16()


def two_layers(a2a):
    def layers(x, ids, weights, request):
        first = a2a.dispatch(x, ids, weights, extra={"id": request})
        total = first.topk_weights.sum(-1)
        out = a2a.combine(experts(first))
        second = a2a.dispatch(out, ids.flip(0), weights, extra={"id": request})
        y = a2a.combine_buffer()
        y.copy_(experts(second))
        more = a2a.combine(y)
        # Used only now: a compiler may want to compute the total here, behind another round.
        return more, out, total * more.sum().float(), first.counts

    return layers


def same(got, want):
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs), f"{mine}\nis not\n{theirs}"


def play_layers(ranks, backend, compiler, wire):
    chosen = spec(ranks.size, wire=wire, extra={"id": 2})
    with AllToAll(chosen, ranks.group, backend=backend, timeout=LIMIT) as a2a:
        eager = two_layers(a2a)
        fast = compiled(eager, compiler)
        for number, tokens in enumerate((3, 3, 5, 2, 6, 0 if compiler == "eager" else 4)):
            x, ids, weights = inputs(tokens, 10 * number + ranks.rank)
            request = torch.full((tokens, 2), number + 1, dtype=torch.uint8)
            got = fast(x, ids, weights, request)
            same(got, eager(x, ids, weights, request))
            if number == 3:
                a2a.reset()  # shm moves to another window
        assert a2a.phase == "idle"


@SLOW
@pytest.mark.parametrize(
    ("backend", "compiler"),
    [
        ("shm", "eager"),
        pytest.param("shm", "inductor", marks=pytest.mark.slow),
        ("collective", "aot_eager"),
    ],
)
def test_two_layers_on_two_ranks(pool, backend, compiler):
    wire = "nvfp4" if backend == "shm" else "bf16"
    pool.run(play_layers, backend, compiler, wire, ranks=2, timeout=LIMIT)


@pytest.mark.slow
@SLOW
@pytest.mark.parametrize("compiler", COMPILERS[1:])
def test_one_rank_without_a_group(compiler):
    with AllToAll(spec(1, wire="fp8", scrub="all")) as a2a:

        def layer(x, ids, weights, rows):
            recv = a2a.dispatch(x, ids, weights, runtime_max_tokens=rows)
            return a2a.combine(experts(recv)), recv.x, recv.scales, recv.topk_ids, recv.topk_weights

        fast = compiled(layer, compiler)
        for seed, (tokens, rows) in enumerate(((3, 4), (3, 5), (4, 6), (1, 1))):
            given = inputs(tokens, seed)
            got = [part.view(torch.uint8) for part in fast(*given, rows)]
            same(got, [part.view(torch.uint8) for part in layer(*given, rows)])


@SLOW
@pytest.mark.parametrize("compiler", COMPILERS[1:])
@pytest.mark.parametrize("dynamic", [None, True])
def test_any_t_and_r(compiler, dynamic):
    with AllToAll(spec(1)) as a2a, torch.inference_mode():

        def layer(x, ids, weights, rows):
            recv = a2a.dispatch(x, ids, weights, runtime_max_tokens=rows)
            return a2a.combine(recv.x * 2)

        fast = compiled(layer, compiler, dynamic=dynamic)
        for seed, (tokens, rows) in enumerate(((3, 4), (5, 6), (5, 6), (1, 1), (2, 5), (0, 0))):
            given = inputs(tokens, seed)
            same([fast(*given, rows)], [layer(*given, rows)])


@SLOW
@pytest.mark.parametrize("compiler", COMPILERS[1:])
def test_prepare_and_finalize(compiler):
    with AllToAll(spec(1, wire="mxfp8", allow_defer=True)) as a2a:
        for quant in ("wire", "defer"):
            layer = PrepareFinalize(a2a, quant)

            def moe(x, ids, weights, out, shared, layer=layer):
                prepared = layer.prepare(x, weights, ids)
                y = experts(prepared.received)
                return layer.finalize(y, out=out, routed_scaling_factor=2.0, shared=shared)

            x, ids, weights = inputs(4)
            wants, gots = (torch.ones_like(x) for _ in range(2))
            moe(x, ids, weights, wants, wants)
            assert compiled(moe, compiler)(x, ids, weights, gots, gots) is not None
            same([gots], [wants])


@SLOW
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_a_layer(compiler):
    def written(recv, *, out):
        return out.copy_(experts(recv))

    with AllToAll(spec(1, wire="mxfp8")) as a2a:
        layer = MoELayer(a2a, experts=written)

        def two(x, ids, weights):
            x = layer(x, weights, ids, shared=x, routed_scaling_factor=2.0)
            return layer(x, weights, ids, runtime_max_tokens=4)

        given = inputs(4)
        same([compiled(two, compiler)(*given)], [two(*given)])


@pytest.mark.parametrize("compiler", COMPILERS[1:])
def test_one_function_for_several_objects(compiler):
    def layer(a2a, x, ids, weights):
        return a2a.combine(experts(a2a.dispatch(x, ids, weights)))

    objects = [AllToAll(spec(1)) for _ in range(12)]  # more than recompilations are allowed
    fast = compiled(layer, compiler)
    for seed, a2a in enumerate(objects):
        given = inputs(3, seed)
        same([fast(a2a, *given)], [layer(a2a, *given)])
        a2a.close()
        with pytest.raises(StateError, match="close"):
            fast(a2a, *given)


def note(backend, call, entry, calls):
    run = getattr(backend, call)

    def noted(*arguments):
        calls.append(entry)
        return run(*arguments)

    setattr(backend, call, noted)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_calls_whose_results_nobody_uses_are_made_in_order(compiler):
    with AllToAll(spec(1)) as a2a, AllToAll(spec(1)) as other:
        calls = []
        for name, opened in (("a", a2a), ("b", other)):
            for call in ("dispatch", "combine"):
                note(opened._impl, call, (name, call), calls)

        def drafts(x, ids, weights):
            a2a.dispatch(x, ids, weights)
            other.dispatch(x, ids, weights)
            a2a.combine(torch.zeros(1, CAPACITY, H, dtype=torch.bfloat16))
            other.combine(other.combine_buffer().zero_())
            return x + 1

        compiled(drafts, compiler)(*inputs(2))
        order = [("a", "dispatch"), ("b", "dispatch"), ("a", "combine"), ("b", "combine")]
        assert calls == order


def shrink(ranks, compiler):
    """Rank 0 goes on alone, with rows that it has quantized itself."""
    with AllToAll(spec(2, wire="nvfp4"), ranks.group, backend="shm", timeout=10) as a2a:
        packed, scales = torch.zeros(3, H // 2).byte() + 0x21, torch.zeros(3, H // 16).byte() + 56
        _, ids, weights = inputs(3)

        def layer(packed, scales, ids, weights, factor, active):
            recv = a2a.dispatch(
                packed, ids, weights, scales=scales, global_scale=factor, active_ranks=active
            )
            return a2a.combine(experts(recv)), recv.topk_ids, recv.topk_weights

        factor = torch.tensor(2.0)
        fast = compiled(layer, compiler)
        for active in ([True, False], torch.tensor([True, False]), None) * (ranks.rank == 0):
            got = fast(packed, scales, ids, weights, factor, active)
            assert got[1].max() < E // 2
            same(got, layer(packed, scales, ids, weights, factor, None))
        torch.distributed.barrier(group=ranks.group)


@SLOW
@pytest.mark.parametrize("compiler", COMPILERS[1:])
def test_active_ranks_scales_and_a_global_scale(pool, compiler):
    pool.run(shrink, compiler, ranks=2, timeout=LIMIT)


@pytest.mark.parametrize("compiler", COMPILERS[2:])
def test_errors_are_those_of_eager_calls(compiler):
    x, ids, weights = inputs(3)
    y = torch.zeros(1, CAPACITY, H, dtype=torch.bfloat16)
    with AllToAll(spec(1)) as a2a:
        dispatch = compiled(lambda *given, **more: a2a.dispatch(*given, **more).x, compiler)
        combine = torch.compile(lambda y: a2a.combine(y), backend=compiler, fullgraph=True)
        for wrong, error, text in (
            ({"runtime_max_tokens": 2}, CapacityError, "3 tokens.*2"),
            ({"runtime_max_tokens": -1}, CapacityError, "-1"),
            ({"extra": {"lora": ids.byte()}}, PayloadError, "lora"),
            ({"defer": True, "scales": weights}, PayloadError, "none"),
        ):
            with pytest.raises(error, match=text):
                dispatch(x, ids, weights, **wrong)
        with pytest.raises(PayloadError, match="x is float64"):
            dispatch(x.double(), ids, weights)
        with pytest.raises(PayloadError, match="x requires grad"):
            dispatch(x.clone().requires_grad_(), ids, weights)
        with pytest.raises(StateError, match="dispatch comes first"):
            combine(y)
        assert torch.equal(dispatch(x, ids, weights)[0, 0], x[(ids >= 0).any(-1)][0])
        with pytest.raises(StateError, match="combine comes first"):
            dispatch(x, ids, weights)
        with pytest.raises(PayloadError, match="y is float32"):
            combine(y.float())
        with pytest.raises(PayloadError, match="y requires grad"):
            combine(y.clone().requires_grad_())
        assert torch.equal(combine(y), torch.zeros(3, H))


def one_is_missing(ranks, compiler):
    with AllToAll(spec(ranks.size), ranks.group, backend="shm", timeout=1) as a2a:
        fast = compiled(two_calls(a2a), compiler)
        if ranks.rank == 0:
            with pytest.raises(PeerTimeout) as caught:
                fast(*inputs(3))
            assert caught.value.ranks == (1,)
            with pytest.raises(PeerTimeout):
                a2a.check()
        torch.distributed.barrier(group=ranks.group)
        a2a.reset()
        a2a.check()


def two_calls(a2a):
    def layer(x, ids, weights):
        return a2a.combine(experts(a2a.dispatch(x, ids, weights)))

    return layer


@SLOW
@pytest.mark.parametrize("compiler", COMPILERS[2:])
def test_a_missing_rank_is_named(pool, compiler):
    pool.run(one_is_missing, compiler, ranks=2, timeout=LIMIT)
