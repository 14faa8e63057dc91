"""What the binding of the CPU library refuses: each would have let a kernel read or write outside
of the memory that it was given. `make fuzz-binding` looks for more."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch

from moe_a2a import Spec
from moe_a2a._ops import cpu_library
from moe_a2a.workspace import geometry_numbers, shape_numbers
from tests.fuzz.binding import play

NS = 10**10
SPEC = Spec(2, 4, 2, 128, 4, wire="nvfp4", combine_wire="mxfp8", extra={"id": 4})
GEOMETRY, SHAPE = geometry_numbers(SPEC), shape_numbers(SPEC, False)
X, IDS = torch.zeros(3, 128), torch.zeros(3, 2, dtype=torch.int32)
GOOD = {
    "x": X,
    "scales": None,
    "ids": IDS,
    "weights": torch.zeros(3, 2),
    "counts": torch.zeros(2, dtype=torch.int32),
    "rows": 4,
    "deferred": False,
    "global_scale": 1.0,
    "active": 0b01,
    "slice_ns": 0,
}
EXTRA = torch.zeros(3, 4, dtype=torch.uint8)


@pytest.fixture
def window():
    memory = (ctypes.c_uint8 * (SPEC.workspace_bytes() + 128))()
    yield -(-ctypes.addressof(memory) // 128) * 128
    del memory


def opened(window, geometry=GEOMETRY, shape=SHAPE, rank=0, windows=None):
    windows = [window, 0] if windows is None else windows
    return cpu_library().endpoint_open(geometry, shape, rank, windows, NS, 0, 1 << 20)


def dispatch(endpoint, **change):
    cpu_library().stage_extra(endpoint, 0, EXTRA)
    return cpu_library().dispatch(endpoint, *(GOOD | change).values())


def put(numbers, at, value):
    return [*numbers[:at], value, *numbers[at + 1 :]]


def test_right_ones_pass(window):
    endpoint = opened(window)
    assert dispatch(endpoint) == 0
    assert dispatch(endpoint, ids=IDS.long(), x=X.half()) == 0
    y = torch.zeros(2, 4, 128)
    assert cpu_library().combine(endpoint, y, torch.zeros(3, 128), 0) == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"active": 0b11}, "windows"),
        ({"active": 0b101}, "active"),
        ({"active": -1}, "active"),
        ({"deferred": True, "x": X.bfloat16()}, "deferred"),
        ({"scales": torch.zeros(3, 8).byte()}, "x .T, row"),
        ({"ids": torch.zeros(3, 8, dtype=torch.int8)}, "topk_ids"),
        ({"ids": torch.zeros(3, 2)}, "topk_ids"),
        ({"counts": torch.zeros(2)}, "counts"),
        ({"counts": torch.zeros(8, dtype=torch.int32)[::4]}, "counts"),
        ({"counts": torch.zeros(1, dtype=torch.int32).expand(2)}, "counts"),
        ({"rows": 5}, "capacity"),
        ({"rows": 2}, "T <= R"),
        ({"slice_ns": -1}, "slice"),
        ({"x": torch._efficientzerotensor((3, 128))}, "x .T, row"),
    ],
)
def test_wrong_dispatches(window, change, text):
    with pytest.raises(ValueError, match=text):
        dispatch(opened(window), **change)


def test_extras_are_of_this_dispatch(window):
    endpoint = opened(window)
    with pytest.raises(ValueError, match="extras"):  # never staged: a null pointer
        cpu_library().dispatch(endpoint, *GOOD.values())
    assert dispatch(endpoint) == 0
    with pytest.raises(ValueError, match="extras"):  # of the round before, and given back since
        cpu_library().dispatch(endpoint, *GOOD.values())
    cpu_library().stage_extra(endpoint, 0, EXTRA[:1])
    with pytest.raises(ValueError, match="extras"):  # fewer rows than tokens
        cpu_library().dispatch(endpoint, *GOOD.values())
    for wrong in (torch.zeros(()).byte(), EXTRA[0], EXTRA[:, :3]):
        with pytest.raises(ValueError, match="extra"):
            cpu_library().stage_extra(endpoint, 0, wrong)


def test_nothing_is_resumed_twice(window):
    """It would write into tensors that are gone."""
    endpoint = opened(window)
    with pytest.raises(ValueError, match="pending"):
        cpu_library().resume(endpoint, 0)
    dispatch(endpoint)
    with pytest.raises(ValueError, match="pending"):
        cpu_library().resume(endpoint, 0)


@pytest.mark.parametrize("windows", [[], [1], [0, 0], [64, 0], [0, 128, 128]])
def test_windows_of_an_endpoint(window, windows):
    given = [window + (at if at != 128 else 0) if at else 0 for at in windows]
    with pytest.raises(ValueError, match="window"):
        opened(window, windows=given)
    endpoint = opened(window)
    with pytest.raises(ValueError, match="window"):
        cpu_library().restart(endpoint, given, 1, 1)
    assert dispatch(endpoint) == 0


def test_rows_of_another_generation_are_gone(window):
    endpoint = opened(window)
    dispatch(endpoint)
    cpu_library().restart(endpoint, [window, 0], 9, 9)
    with pytest.raises(ValueError, match=r"y \[W, R, H\]"):
        cpu_library().combine(endpoint, torch.zeros(2, 4, 128), torch.zeros(3, 128), 0)


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, 65), (0, 2**48), (1, 2**40), (2, 33), (3, 2**47), (4, 2**62), (4, 8), (5, 1), (6, 8)],
)
def test_wrong_geometries(window, at, value):
    with pytest.raises(ValueError, match="binding"):
        opened(window, geometry=put(GEOMETRY, at, value))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        *((0, 136), (0, 256), (0, 2**40), (1, 0), (2, 7), (2, -1), (2, 4), (3, 5), (3, 99)),
        *((4, 32), (5, 0), (6, 2**31), (1, 160), (1, 2**32)),  # only mxfp8 rows are padded
    ],
)
def test_wrong_shapes(window, at, value):
    with pytest.raises(ValueError, match="binding"):
        opened(window, shape=put(SHAPE, at, value))


def test_y_has_the_dtype_of_the_combine_wire(window):
    spec = Spec(2, 4, 2, 128, 4)
    endpoint = opened(window, geometry_numbers(spec), shape_numbers(spec, False))
    good = GOOD | {"x": X.bfloat16()}
    assert cpu_library().dispatch(endpoint, *good.values()) == 0
    y, out = torch.zeros(2, 4, 128).half(), torch.zeros(3, 128).half()
    with pytest.raises(ValueError, match="dtype of the combine wire"):
        cpu_library().combine(endpoint, y, out, 0)


@pytest.mark.parametrize(
    ("at", "wrong", "text"),
    [
        (0, torch.zeros(3, 64), "rows"),
        (0, torch.zeros(3, 128, dtype=torch.int32), "floating"),
        (0, torch.zeros(3, 128).half(), "out has the dtype"),
        (0, torch.zeros(4, 128), "row_weights"),
        (1, torch.zeros(15, dtype=torch.int32), "positions"),
        (1, torch.zeros(16), "positions"),
        (1, torch.zeros(8, 4, dtype=torch.int32)[:, ::2], "positions"),
        (2, torch.zeros(3).double(), "row_weights"),
        (3, torch.zeros(4, 128), "out"),
    ],
)
def test_wrong_grouped_rows(window, at, wrong, text):
    endpoint = opened(window)
    assert dispatch(endpoint) == 0
    good = [torch.ones(3, 128), torch.full((8, 2), -1).int(), torch.ones(3), torch.zeros(3, 128)]
    given = [*good[:at], wrong, *good[at + 1 :]]
    with pytest.raises(ValueError, match=text):
        cpu_library().combine_grouped(endpoint, *given, 0)
    good[1][0] = torch.tensor([3, -7])  # past the rows: no address is made of it
    assert cpu_library().combine_grouped(endpoint, *good, 10**9) in (0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_any_bytes(seed):
    """A little of what `make fuzz-binding` does with guidance and for long."""
    rng = random.Random(seed)
    for _ in range(40):
        tally = play(cpu_library(), rng.randbytes(rng.randrange(200)))
        assert sum(tally.values()) >= 0
