"""The golden values of formats.md, through the public functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_a2a.formats import FORMATS, dequantize, nvfp4, quantize
from tests import formats_cases as cases

NVFP4_ROW = [0, 0.1, -0.1, 0.2, 0.25, 0.3, 0.5, 0.75, -0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3]


def exponents(amax, wire, **options):
    rows = torch.zeros(len(amax), 32)
    rows[:, 5] = -torch.tensor(amax, dtype=torch.float32)
    return quantize(rows, wire, **options)[1].flatten().tolist()


def test_table_is_in_order():
    assert list(FORMATS) == ["bf16", "fp16", "fp8", "fp8_block128", "mxfp8", "nvfp4", "mxfp4"]
    assert all(FORMATS[name].name == name for name in FORMATS)


@pytest.mark.parametrize(
    ("wire", "total", "dtype", "scale_dtype"),
    [
        ("bf16", 14336, torch.bfloat16, None),
        ("fp16", 14336, torch.float16, None),
        ("fp8", 7172, torch.float8_e4m3fn, torch.float32),
        ("fp8_block128", 7392, torch.float8_e4m3fn, torch.float32),
        ("mxfp8", 7392, torch.float8_e4m3fn, torch.uint8),
        ("nvfp4", 4032, torch.uint8, torch.uint8),
        ("mxfp4", 3808, torch.uint8, torch.uint8),
    ],
)
def test_bytes_per_token(wire, total, dtype, scale_dtype):
    payload, scales = quantize(torch.zeros(3, 7168), wire)
    found = (payload[0].nbytes, 0 if scales is None else scales[0].nbytes)
    assert found == FORMATS[wire].row_bytes(7168, 32)
    assert sum(found) == total
    assert (payload.dtype, None if scales is None else scales.dtype) == (dtype, scale_dtype)


def test_mxfp8_exponents():
    amax = [0, 1e-3, 1, 447.9, 448, 448.1, 896]
    assert exponents(amax, "mxfp8") == [0, 109, 119, 127, 127, 128, 128]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("ceil", [125, 125, 126, 126, 126, 126, 127, 128, 128, 128]),
        ("even", [125, 125, 125, 126, 126, 126, 127, 127, 128, 128]),
        ("floor", [125, 125, 125, 125, 126, 126, 127, 127, 127, 128]),
    ],
)
def test_mxfp4_exponents(rule, expected):
    amax = [1, 1.5, 1.7499, 1.75, 2, 3, 6, 6.0001, 7, 8]
    assert exponents(amax, "mxfp4", rule=rule) == expected


def test_mxfp4_rule_is_ceil_by_default():
    assert exponents([1.7499, 6.0001], "mxfp4") == [126, 128]


def test_mxfp4_floor_saturates():
    row = torch.zeros(32)
    row[0], row[1] = 7.9, -7.9
    payload, scales = quantize(row, "mxfp4", rule="floor")
    assert (scales.tolist(), payload[0].item()) == ([127], 0xF7)


def test_nvfp4_row():
    payload, scales = quantize(torch.tensor(NVFP4_ROW), "nvfp4", global_scale=torch.tensor(896.0))
    assert cases.raw(scales).tobytes().hex() == "7e"
    assert cases.raw(payload).tobytes().hex(" ") == "00 18 11 32 4b 54 66 76"


def test_nvfp4_constant():
    assert np.float32(nvfp4._ONE_SIXTH).view(np.uint32) == 0x3E2AAAAB
    assert float(np.float32(nvfp4._ONE_SIXTH)) == nvfp4._ONE_SIXTH


def test_nvfp4_decode_order_is_product_then_division():
    # 1.5 * 1.875 / 0.3: dividing the scale first gives another last bit.
    sf, gs = np.float32(1.875), np.float32(0.3)
    row = dequantize(
        torch.full((8,), 0x33, dtype=torch.uint8),
        torch.tensor([0x3F], dtype=torch.uint8),
        "nvfp4",
        global_scale=torch.tensor(0.3),
    )
    expected = np.float32(1.5) * sf / gs
    assert expected != np.float32(1.5) * (sf / gs)
    assert row.numpy().tolist() == [expected] * 16


def test_mxfp8_padding():
    x = torch.from_numpy(cases.gaussian(2, 2880))
    payload, scales = quantize(x, "mxfp8", alignment=256)
    assert (payload.shape, scales.shape) == ((2, 3072), (2, 96))
    assert not cases.raw(payload)[:, 2880:].any()
    assert not cases.raw(scales)[:, 90:].any()
    narrow, narrow_scales = quantize(x, "mxfp8")
    assert (narrow.shape, narrow_scales.shape) == ((2, 2880), (2, 90))
    np.testing.assert_array_equal(cases.raw(payload)[:, :2880], cases.raw(narrow))
    np.testing.assert_array_equal(cases.raw(scales)[:, :90], cases.raw(narrow_scales))
    rows = dequantize(payload, scales, "mxfp8", hidden_size=2880)
    assert torch.equal(rows, dequantize(narrow, narrow_scales, "mxfp8"))


def test_mxfp8_partial_last_block():
    x = torch.from_numpy(cases.gaussian(3, 48))
    payload, scales = quantize(x, "mxfp8")
    expected = quantize(torch.nn.functional.pad(x, (0, 16)), "mxfp8")
    np.testing.assert_array_equal(cases.raw(payload), cases.raw(expected[0]))
    np.testing.assert_array_equal(cases.raw(scales), cases.raw(expected[1]))


def test_fp8_scale_is_a_true_quotient():
    amax = np.linspace(1, 2, 1001, dtype=np.float32)
    scales = quantize(torch.from_numpy(amax[:, None]), "fp8")[1]
    np.testing.assert_array_equal(scales.numpy()[:, 0], amax / np.float32(448))


def test_ue8m0_scales_are_the_next_power_of_two():
    rows = torch.zeros(4, 128)
    rows[:, 0] = torch.tensor([448.0, 448.00003, 447.9, 0.0])
    scales = quantize(rows, "fp8_block128", ue8m0=True)[1]
    assert scales.flatten().tolist() == [1.0, 2.0, 1.0, 2.0**-42]
