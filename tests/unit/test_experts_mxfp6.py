"""MXFP6, which only experts know: all 64 codes, every bf16, packing, shared exponents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_a2a.errors import GeometryError
from moe_a2a.experts import WEIGHT_FORMATS, mxfp6
from moe_a2a.formats import FORMATS, quantize
from tests import formats_cases as cases
from tests import oracle_experts as oracle

ELEMENTS = {"mxfp6_e3m2": mxfp6.E3M2, "mxfp6_e2m3": mxfp6.E2M3}
VALUES = {  # by hand, the positive half
    "mxfp6_e3m2": [0, 1, 2, 3] + [m * 2**e for e in range(7) for m in (4, 5, 6, 7)],  # in 1/16
    "mxfp6_e2m3": [*range(8)] + [m * 2**e for e in range(3) for m in range(8, 16)],  # in 1/8
}
UNIT = {"mxfp6_e3m2": 1 / 16, "mxfp6_e2m3": 1 / 8}


@pytest.fixture(params=ELEMENTS)
def name(request):
    return request.param


@pytest.fixture(params=cases.DEVICES)
def device(request):
    return request.param


def test_all_64_codes(name, device):
    codes = torch.arange(64, dtype=torch.uint8, device=device)
    half = np.array(VALUES[name], np.float32) * UNIT[name]
    wanted = np.concatenate([half, -half]).astype(np.float32)
    decoded = ELEMENTS[name].decode(codes)
    np.testing.assert_array_equal(cases.raw(decoded), wanted.view(np.uint8))
    np.testing.assert_array_equal(oracle.six_value(np.arange(64, dtype=np.uint8), name), wanted)
    assert torch.equal(ELEMENTS[name].encode(decoded), codes)


def test_every_bf16_and_every_tie(name, device):
    values = oracle.six_value(np.arange(32, dtype=np.uint8), name)
    ties = cases.with_neighbours(np.concatenate([(values[1:] + values[:-1]) / 2, values]))
    x = np.concatenate([cases.every_bf16(), ties, -ties, cases.SPECIALS])
    codes = ELEMENTS[name].encode(torch.from_numpy(x).to(device))
    np.testing.assert_array_equal(codes.cpu().numpy(), oracle.six_codes(x, name))


def test_specials(name):
    x = [np.nan, cases.NEGATIVE_NAN, np.inf, -np.inf, 1e30, 0.0, -0.0, -1e-45]
    codes = ELEMENTS[name].encode(torch.from_numpy(np.array(x, np.float32)))
    assert codes.tolist() == [31, 31, 31, 63, 31, 0, 32, 32]


@pytest.mark.parametrize("rule", ["ceil", "even", "floor"])
def test_rows_byte_for_byte(name, rule, device):
    form = WEIGHT_FORMATS[name]
    given = {"global_scale": None, "alignment": 32, "rule": rule, "ue8m0": False}
    wild = cases.wild(64, 256)
    amax = np.outer(
        np.exp2(np.arange(-140.0, 128, 6)), [1, 1.5, 1.75, 1.8125, 1.875, 1.9375, 1.96875]
    )
    blocks = np.zeros((amax.size * 3, 32), np.float32)
    blocks[:, 7] = cases.with_neighbours(amax.ravel())
    for x in (wild, blocks, cases.gaussian(16, 128)):
        payload, scales = form.quantize(torch.from_numpy(x).to(device), **given)
        want_payload, want_scales = oracle.quantize(x, name, rule=rule)
        np.testing.assert_array_equal(cases.raw(scales), want_scales)
        np.testing.assert_array_equal(cases.raw(payload), want_payload)
        back = form.dequantize(payload, scales, hidden_size=x.shape[1], global_scale=None)
        np.testing.assert_array_equal(
            cases.raw(back), oracle.dequantize(want_payload, want_scales, name).view(np.uint8)
        )


def test_golden_packing_and_exponents():
    # Codes 1, 2, 3, 32: 000001 | 000010 << 6 | 000011 << 12 | 100000 << 18 = 0x803081.
    packed = mxfp6._pack(torch.tensor([[1, 2, 3, 32]], dtype=torch.uint8))
    assert packed.tolist() == [[0x81, 0x30, 0x80]]
    x = torch.zeros(3, 32)
    x[:, 0] = torch.tensor([28.0, 28.1, 29.9])
    found = {
        rule: WEIGHT_FORMATS["mxfp6_e3m2"]
        .quantize(x, global_scale=None, alignment=32, rule=rule, ue8m0=False)[1]
        .flatten()
        .tolist()
        for rule in ("ceil", "even", "floor")
    }
    assert found == {"ceil": [127, 128, 128], "even": [127] * 3, "floor": [127] * 3}


def test_it_is_no_wire():
    assert not set(ELEMENTS) & set(FORMATS)
    with pytest.raises(GeometryError, match="mxfp6_e3m2"):
        quantize(torch.zeros(1, 32), "mxfp6_e3m2")
