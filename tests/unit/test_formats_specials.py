"""NaN, infinities, zeros and extremes, one fixed answer each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_a2a.formats import dequantize, quantize
from tests import formats_cases as cases
from tests import oracle_formats as oracle

QUANTIZED = ["fp8", "fp8_block128", "mxfp8", "nvfp4", "mxfp4"]
FP4 = ("nvfp4", "mxfp4")
every_quantized = pytest.mark.parametrize("wire", QUANTIZED)


def codes_and_scales(values, wire, **options):
    """One row of 128 columns that begins with `values` and ends in +0: its codes, its scales."""
    row = torch.zeros(128)
    row[: len(values)] = torch.tensor(values, dtype=torch.float32)
    payload, scales = quantize(row, wire, **options)
    codes = oracle.unpack(cases.raw(payload)) if wire in FP4 else cases.raw(payload)
    return codes.tolist(), scales


def top(wire):
    return (0x07, 0x0F) if wire in FP4 else (0x7E, 0xFE)


def nan(wire):
    return 0x07 if wire in FP4 else 0x7F


def zero(wire):
    return (0x00, 0x08) if wire in FP4 else (0x00, 0x80)


@every_quantized
def test_nan_has_one_code_and_no_say_in_the_scale(wire):
    codes, scales = codes_and_scales([1.0, float("nan"), float(cases.NEGATIVE_NAN), -1.0], wire)
    clean, clean_scales = codes_and_scales([1.0, 0.0, 0.0, -1.0], wire)
    assert codes[1:3] == [nan(wire)] * 2
    assert codes[:1] + codes[3:] == clean[:1] + clean[3:]
    assert torch.equal(scales, clean_scales)


@every_quantized
def test_all_nan_block_has_amax_zero(wire):
    codes, scales = codes_and_scales([float("nan")] * 128, wire)
    assert codes == [nan(wire)] * 128
    assert torch.equal(scales, codes_and_scales([], wire)[1])


@pytest.mark.parametrize(
    ("wire", "largest"),
    [
        ("fp8", np.float32(cases.FLT_MAX) / np.float32(448)),
        ("fp8_block128", np.float32(cases.FLT_MAX) / np.float32(448)),
        ("mxfp8", 254),
        ("nvfp4", 0x7E),
        ("mxfp4", 254),
    ],
)
def test_infinity_takes_the_largest_scale(wire, largest):
    codes, scales = codes_and_scales([np.inf, -np.inf, -0.0, np.nan, 1.0], wire)
    assert codes[:2] == list(top(wire))
    assert codes[2:4] == [zero(wire)[1], nan(wire)]
    assert codes[4:] == [zero(wire)[0]] * 124
    assert scales.flatten()[0].item() == largest


@pytest.mark.parametrize("rule", ["ceil", "even", "floor"])
def test_finite_elements_beside_infinity_are_quantized(rule):
    codes, scales = codes_and_scales([np.inf, 2.0**127, -(2.0**126)], "mxfp4", rule=rule)
    assert scales[0] == 254
    assert codes[:3] == [7, 2, 8 + 1]


@every_quantized
@pytest.mark.parametrize("value", [1.5 * 2.0**127, 2.0**127])
def test_largest_values_come_back_finite(wire, value):
    gs = {"global_scale": torch.tensor(448 * 6 / value)} if wire == "nvfp4" else {}
    row = torch.zeros(128)
    row[:2] = torch.tensor([value, -value])
    payload, scales = quantize(row, wire, **gs)
    back = dequantize(payload, scales, wire, **gs)
    assert back.isfinite().all()
    assert back[0] == -back[1]
    assert 0.8 < back[0].item() / value < 1.2


@pytest.mark.parametrize(
    ("wire", "scale", "code"), [("mxfp8", 254 - 8 + 1, 0x78), ("mxfp4", 254 - 2 + 1, 6)]
)
def test_flt_max_rounds_up_to_a_value_past_fp32(wire, scale, code):
    # The nearest code is 2^128: its bytes are ordinary, and only fp32 has no such number.
    codes, scales = codes_and_scales([cases.FLT_MAX], wire)
    assert (codes[0], scales[0].item()) == (code, scale)
    back = dequantize(*quantize(torch.full((32,), cases.FLT_MAX), wire), wire)
    assert back.tolist() == [np.inf] * 32


@pytest.mark.parametrize("wire", ["fp8", "fp8_block128"])
def test_fp8_of_flt_max(wire):
    codes, scales = codes_and_scales([cases.FLT_MAX, -cases.FLT_MAX, 1.0], wire)
    assert codes[:3] == [0x7E, 0xFE, 0]
    assert scales.isfinite().all()


@every_quantized
def test_zeros_keep_their_sign(wire):
    codes, _ = codes_and_scales([-0.0, 0.0, -0.0], wire)
    assert codes[:3] == [zero(wire)[1], zero(wire)[0], zero(wire)[1]]
    assert set(codes[3:]) == {zero(wire)[0]}


@pytest.mark.parametrize(
    ("wire", "byte"), [("mxfp8", 0), ("mxfp4", 0), ("nvfp4", 0), ("fp8", None)]
)
def test_zero_block_has_the_smallest_scale(wire, byte):
    scales = codes_and_scales([-0.0], wire)[1]
    if byte is None:
        byte = np.float32(1e-10) / np.float32(448)
    assert set(scales.flatten().tolist()) == {byte}


@every_quantized
def test_subnormals_neither_overflow_nor_vanish_into_nan(wire):
    codes, _ = codes_and_scales([1e-45, -1e-45, 1e-40, -1e-40], wire)
    allowed = {*range(8), *range(8, 16)} if wire in FP4 else {*range(0x7F), *range(0x80, 0xFF)}
    assert set(codes) <= allowed
    assert [code // zero(wire)[1] for code in codes[:4]] == [0, 1, 0, 1]


def test_mx_scale_zero_is_two_to_minus_127():
    # amax 4 * 2^-127 fits byte 0, so the codes are x * 2^127.
    row = torch.zeros(32)
    row[:4] = torch.tensor([4.0, -3.0, 1.0, 0.5]) * 2.0**-126 * 0.5
    payload, scales = quantize(row, "mxfp4")
    assert scales.tolist() == [0]
    assert oracle.unpack(cases.raw(payload)).tolist()[:4] == [6, 8 + 5, 2, 1]
    assert torch.equal(dequantize(payload, scales, "mxfp4"), row)
    payload, scales = quantize(row, "mxfp8")
    assert scales.tolist() == [0]
    assert torch.equal(dequantize(payload, scales, "mxfp8"), row)


@pytest.mark.parametrize("wire", ["mxfp8", "mxfp4"])
def test_e8m0_nan_byte_decodes_to_nan(wire):
    payload, scales = quantize(torch.ones(64), wire)
    scales[1] = 255
    back = dequantize(payload, scales, wire)
    assert back[:32].isfinite().all()
    assert back[32:].isnan().all()


def test_nvfp4_underflowed_scale_gives_signed_zeros():
    tiny = 1e-3  # 1e-3 / 6 is far below half of E4M3's smallest, 2^-10
    codes, scales = codes_and_scales([tiny, -tiny, np.nan, -0.0], "nvfp4")
    assert codes[:4] == [0, 8, 7, 8]
    assert scales.tolist() == [0] * 8


def test_nvfp4_smallest_scales():
    # sf ties at 2^-10 and goes to 0 (even); one step of amax higher it is 2^-9.
    c = np.float32(11184811 * 2.0**-26)
    amax = np.float32(2.0**-10) / c
    while amax * c > np.float32(2.0**-10):
        amax = np.nextafter(amax, np.float32(0))
    above = amax
    while above * c <= np.float32(2.0**-10):
        above = np.nextafter(above, np.float32(1))
    assert codes_and_scales([float(amax)], "nvfp4")[1][0] == 0
    assert codes_and_scales([float(above)], "nvfp4")[1][0] == 1


@pytest.mark.parametrize("wire", ["bf16", "fp16"])
def test_plain_wires_keep_specials(wire):
    values = torch.tensor([np.nan, np.inf, -np.inf, -0.0])
    rows = dequantize(*quantize(values, wire), wire)
    assert rows[0].isnan()
    assert torch.equal(rows[1:], values[1:])
    assert rows[3].signbit()
