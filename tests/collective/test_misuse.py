"""What goes wrong in ordinary programs: forks, inference mode, gradients, one rank that differs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from moe_a2a import AllToAll, PrepareFinalize, Spec, formats
from moe_a2a.errors import GeometryError, MoeA2AError, PayloadError, PeerTimeout, StateError
from tests.collective.rounds import Case, Round, play


def alone(**more) -> AllToAll:
    return AllToAll(Spec(1, 8, 2, 64, 16, **more))


def inputs(tokens=4):
    return (
        torch.randn(tokens, 64).bfloat16(),
        torch.randint(0, 8, (tokens, 2)),
        torch.rand(tokens, 2),
    )


def fork_and_use(ranks, backend, case):
    with AllToAll(case.spec(), ranks.group, backend=backend, timeout=5) as a2a:
        play(a2a, ranks, case, Round(1))
        dist.barrier(group=ranks.group)
        child = os.fork()
        if child == 0:
            with pytest.raises(StateError, match="forked"):
                a2a.dispatch(*inputs(0))
            with pytest.raises(StateError, match="forked"):
                a2a.reset()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        dist.barrier(group=ranks.group)
        play(a2a, ranks, case, Round(2))


def test_a_forked_child_is_refused_and_harms_nobody(pool):
    pool.run(fork_and_use, "shm", Case(3), ranks=3)


def differ_in_active_ranks(ranks, backend, case):
    """Rank 2 waits for rank 0, which takes it for inactive and never announces anything to it."""
    with AllToAll(case.spec(), ranks.group, backend=backend, timeout=4) as a2a:
        active = [True, True, False] if ranks.rank == 0 else None
        none = torch.zeros(0, case.hidden, dtype=torch.bfloat16), torch.zeros(0, case.top_k).int()
        start = time.monotonic()
        with pytest.raises(StateError, match="disagree"):
            a2a.dispatch(*none, torch.zeros(0, case.top_k), active_ranks=active)
        assert time.monotonic() - start < 3
        a2a.reset()
        play(a2a, ranks, case, Round(2))


def test_ranks_that_differ_in_active_ranks_all_hear_of_it(pool):
    pool.run(differ_in_active_ranks, "shm", Case(3), ranks=3)


def without_a_compiler(ranks, cache):
    if ranks.rank == 1:
        os.environ |= {"CXX": "/nonexistent/g++", "MOE_A2A_CACHE": cache}
        from moe_a2a import _ops, workspace

        _ops.cpu_library.cache_clear()
        workspace._workspace.cache_clear()
    start = time.monotonic()
    with pytest.raises(MoeA2AError, match="no such compiler"):
        AllToAll(Case(3).spec(), ranks.group, timeout=20)
    assert time.monotonic() - start < 10


def test_a_missing_compiler_on_one_rank_is_told_to_all(pool, tmp_path):
    with pytest.raises(RuntimeError, match="done"):  # the pool's processes have changed: new ones
        pool.run(then_raise, str(tmp_path), ranks=3)


def then_raise(ranks, cache):
    without_a_compiler(ranks, cache)
    dist.barrier(group=ranks.group)
    raise RuntimeError("done")


def test_a_warm_up_in_inference_mode_leaves_nothing_behind():
    with alone() as a2a:
        with torch.inference_mode():
            y = a2a.dispatch(*inputs()).dequantize(torch.bfloat16)
            a2a.combine_buffer().copy_(y)
            a2a.combine(y)
        received = a2a.dispatch(*inputs())
        a2a.combine_buffer().copy_(received.x)
        received.x.mul_(2)


def test_a_write_with_gradients_stays_with_its_tensor():
    with alone() as a2a:
        for _ in range(2):
            received = a2a.dispatch(*inputs())
            y = a2a.combine_buffer()
            assert not y.requires_grad
            y.copy_(received.dequantize() * torch.ones(1, requires_grad=True))
            with pytest.raises(PayloadError, match="grad"):
                a2a.combine(y)
            a2a.combine(y.detach())


def test_dequantize_gives_a_copy():
    with alone() as a2a:
        x, ids, weights = inputs()
        assert torch.equal(a2a.combine(a2a.dispatch(x, ids, weights).dequantize(torch.bfloat16)), x)


def test_scales_and_extras_may_not_lie_in_the_receive_views():
    with alone(wire="fp8", extra={"id": 8}) as a2a:
        x, ids, weights = inputs(16)
        own = {"id": torch.zeros(16, 8, dtype=torch.uint8)}
        received = a2a.dispatch(x, ids, weights, extra=own)
        a2a.combine(a2a.combine_buffer())
        payload = received.x[0].clone()
        with pytest.raises(PayloadError, match="receive views"):
            a2a.dispatch(payload, ids, weights, scales=received.scales[0], extra=own)
        with pytest.raises(PayloadError, match="receive views"):
            a2a.dispatch(x, ids, weights, extra={"id": received.extra["id"][0]})


@pytest.mark.parametrize("defer", [None, "x", torch.tensor([True, False])])
def test_defer_must_be_a_bool(defer):
    with alone(wire="fp8", allow_defer=True) as a2a:
        with pytest.raises(PayloadError, match="defer"):
            a2a.dispatch(*inputs(), defer=defer)
        a2a.dispatch(*inputs(), defer=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"routed_scaling_factor": "2"},
        {"routed_scaling_factor": torch.ones(3)},
        {"shared": torch.zeros(4, 64, device="meta")},
        {"shared": torch.zeros(4, 64, requires_grad=True)},
    ],
)
def test_finalize_refuses_before_it_combines(wrong):
    with alone() as a2a:
        layer = PrepareFinalize(a2a)
        x, ids, weights = inputs()
        y = layer.prepare(x, weights, ids).received.dequantize(torch.bfloat16)
        with pytest.raises(PayloadError):
            layer.finalize(y, **wrong)
        assert torch.equal(layer.finalize(y), x)


def test_a_failure_holds_on_to_nobody():
    """The remembered error has no traceback: the object goes with its last reference."""
    a2a = alone()
    a2a._failed("dispatch", PeerTimeout("late", ranks=[0], phase="dispatch", round=1, waited=1.0))
    for _ in range(2):
        with pytest.raises(PeerTimeout, match="late") as caught:
            a2a.dispatch(*inputs())
        assert (caught.value.ranks, caught.value.phase) == ((0,), "dispatch")
        assert caught.value is not a2a._failure
    assert a2a._failure.__traceback__ is None


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_every_name_of_the_cpu(device):
    with AllToAll(Spec(1, 8, 2, 64, 16), device=device) as a2a:
        a2a.dispatch(*inputs())


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: formats.quantize([1.0], "fp8"), PayloadError),
        (lambda: formats.quantize(torch.zeros(32), []), GeometryError),
        (lambda: formats.quantize(torch.zeros(32), "mxfp8", alignment="a"), GeometryError),
        (lambda: formats.dequantize(None, None, "fp8"), PayloadError),
        (lambda: formats.swizzle(None), PayloadError),
        (lambda: formats.swizzle(torch.zeros(2, 2).byte(), []), GeometryError),
        (lambda: AllToAll(Spec(1, 8, 2, 64, 16), backend=["shm"]), GeometryError),
        (lambda: AllToAll(Spec(1, 8, 2, 64, 16), debug="yes"), GeometryError),
        (lambda: AllToAll(Spec(1, 8, 2, 64, 16), timeout=True), GeometryError),
        (lambda: PrepareFinalize(None), GeometryError),
        (lambda: alone().dispatch(*inputs(), extra=3), PayloadError),
        (lambda: alone().reset(torch.ones(1, dtype=torch.bool, device="meta")), PayloadError),
        (lambda: alone().dispatch(inputs()[0].to_sparse_csr(), *inputs()[1:]), PayloadError),
        (
            lambda: alone(wire="nvfp4").dispatch(*inputs(), global_scale=torch.tensor(0.0)),
            PayloadError,
        ),
    ],
)
def test_wrong_types_raise_typed_errors(call, kind):
    with pytest.raises(kind) as caught:
        call()
    assert len(str(caught.value)) < 500


def test_the_variable_is_named(monkeypatch):
    monkeypatch.setenv("MOE_A2A_TIMEOUT", "soon")
    with pytest.raises(GeometryError, match="MOE_A2A_TIMEOUT='soon'"):
        alone()
    monkeypatch.setenv("MOE_A2A_TIMEOUT", "")
    alone().close()


def test_outputs_that_someone_holds_are_never_written_again():
    with AllToAll(Spec(1, 8, 2, 4096, 16)) as a2a:
        ids, weights = inputs(16)[1:]
        held, expected, places = [], [], set()
        for number in range(12):
            x = torch.full((16, 4096), float(number), dtype=torch.bfloat16)
            out = a2a.combine(a2a.dispatch(x, ids, weights).dequantize(torch.bfloat16))
            places.add(out.data_ptr())
            if number % 3 == 0:
                held.append((out, out[3], out.view(torch.uint8).numpy())[number // 3 % 3])
                expected.append(x[3, 0].item())
            del out
        for value, number in zip(held, expected, strict=True):
            rows = torch.as_tensor(value).reshape(-1).view(torch.bfloat16)
            assert (rows == number).all()
        places.clear()
        for _ in range(8):  # held until the next one is there, as loops do
            out = a2a.combine(a2a.dispatch(x, ids, weights).dequantize(torch.bfloat16))
            places.add(out.data_ptr())
        assert len(places) <= 4, "memory that nobody holds is used again"
