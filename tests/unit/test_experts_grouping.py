"""What the grouped kernels stand on, in plain torch: rows by expert, and what backends ask for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_a2a import Spec, experts
from moe_a2a.errors import GeometryError
from moe_a2a.experts import ExpertMatrix, ExpertWeights, triton_w4a16
from moe_a2a.experts.four_bits import arrange
from moe_a2a.experts.grouping import group
from moe_a2a.experts.tiles import Tile, tiles_for


def grouped_by_hand(ids, weights, count, align):
    """Lists: row_index, expert_offsets, row_weights, positions."""
    n, top_k = ids.shape
    length = n * min(top_k, count) + count * (align - 1)
    index, held, offsets = [], [], [0]
    positions = np.full((n, top_k), -1)
    for e in range(count):
        for row in range(n):
            for k in range(top_k):
                if ids[row, k] == e:
                    positions[row, k] = len(index) if len(index) < length else -2
                    index.append(row)
                    held.append(weights[row, k])
        while len(index) % align:
            index.append(-1)
            held.append(0.0)
        offsets.append(min(len(index), length))
    index += [-1] * (length - len(index))
    held += [0.0] * (length - len(held))
    return index[:length], offsets, held[:length], positions


@pytest.mark.parametrize("align", [1, 16, 128])
@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (5, 2), (3, 8), (2, 4)])
def test_rows_by_expert(align, count, top_k):
    rng = np.random.default_rng([align, count, top_k])
    for n in (0, 1, 40):
        ids = rng.integers(-1, count + 3, (n, top_k)).astype(np.int32)
        weights = rng.random((n, top_k), dtype=np.float32)
        found = group(torch.from_numpy(ids), torch.from_numpy(weights), count, align)
        index, offsets, held, positions = grouped_by_hand(ids, weights, count, align)
        assert found.row_index.tolist() == index
        assert found.expert_offsets.tolist() == offsets
        np.testing.assert_array_equal(found.row_weights.numpy(), np.array(held, np.float32))
        np.testing.assert_array_equal(found.positions.numpy(), positions)
        assert {
            part.dtype for part in (found.row_index, found.expert_offsets, found.positions)
        } == {torch.int32}


def test_choices_without_room_are_marked():
    ids = torch.zeros((4, 3), dtype=torch.int32)  # each names the only expert three times
    found = group(ids, torch.ones(4, 3), 1, 1)
    assert found.row_index.tolist() == [0, 0, 0, 1]
    assert (found.positions == -2).sum() == 8
    assert found.expert_offsets.tolist() == [0, 4]


def test_what_tiles_and_arrangements_refuse():
    assert tiles_for(0.5).align < tiles_for(1000).align
    for wrong in ((8, 64, 4, 3), (16, 64, 8, 3), (16, 96, 4, 3), (16, 64, 4, 0)):
        with pytest.raises(GeometryError, match="must be"):
            Tile(*wrong)
    good = ExpertMatrix.quantize(torch.ones(2, 128, 256), "mxfp4")
    assert arrange(good).words.nbytes == good.payload.nbytes
    for wrong in (
        ExpertMatrix.quantize(torch.ones(1, 128, 96), "mxfp4"),
        ExpertMatrix.quantize(torch.ones(1, 96, 128), "mxfp4"),
        ExpertMatrix.quantize(torch.ones(1, 128, 128), "mxfp8"),
    ):
        with pytest.raises(GeometryError, match="multiples of 128"):
            arrange(wrong)


SPEC = Spec(1, 2, 1, 128, 4)


def weights(form="mxfp4", hidden=128):
    made = [
        ExpertMatrix.quantize(torch.ones(2, *size), form) for size in ((256, hidden), (hidden, 128))
    ]
    return ExpertWeights(*made)


@pytest.fixture
def machine(monkeypatch):
    def is_like(capability, triton="3.6.0"):
        monkeypatch.setattr(triton_w4a16, "version", lambda name: triton)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return is_like


def test_each_gpu_has_its_backend(machine):
    for capability, chosen in (((10, 0), "mxfp4_w4a4"), ((9, 0), "triton_w4a16")):
        machine(capability)
        found = experts.reasons(SPEC, "cuda", weights())
        assert next(name for name, why in found.items() if why is None) == chosen
    assert found["mxfp4_w4a4"] == ("MXFP4 tensor cores have compute capability 10.x, this is 9.0")
    for other in ((8, 9), (12, 0)):
        machine(other)
        assert "shared memory" in experts.reasons(SPEC, "cuda", weights())["triton_w4a16"]


def test_why_kernels_are_passed_over(machine):
    machine((10, 0))
    other = experts.reasons(SPEC, "cuda", weights("nvfp4"))
    assert other["triton_w4a16"] == "computes with mxfp4 weights, not nvfp4"
    assert other["mxfp4_w4a4"] == "computes with mxfp4 weights, not nvfp4"
    assert other["emulated"] is None
    odd = experts.reasons(Spec(1, 2, 1, 96, 4), "cuda", weights(hidden=96))
    assert odd["triton_w4a16"] is None, "padded as it is loaded"
    assert "H = 96 and I = 128 must be multiples of 128" in odd["mxfp4_w4a4"]
    quantized = experts.reasons(Spec(1, 2, 1, 128, 4, wire="mxfp8"), "cuda", weights())
    assert "allow_defer=True" in quantized["mxfp4_w4a4"]
    assert quantized["triton_w4a16"] is None
    machine((9, 0), triton="3.2.0")
    assert experts.reasons(None, "cuda", None)["triton_w4a16"] == (
        "triton 3.2.0 is installed, 3.4 is needed"
    )
    machine(None)
    assert experts.reasons(None, "cuda", None)["triton_w4a16"] == "there is no CUDA device"


def test_without_triton(monkeypatch):
    def missing(name):
        raise triton_w4a16.PackageNotFoundError(name)

    monkeypatch.setattr(triton_w4a16, "version", missing)
    for name in ("triton_w4a16", "mxfp4_w4a4"):
        assert "pip install 'moe-a2a[cuda]'" in experts.reasons(None, "cuda", None)[name]
