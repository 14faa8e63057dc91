"""Element codecs: E2M1, E4M3 and E8M0 against ml_dtypes and the thresholds of formats.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_a2a.formats import e2m1, e4m3, e8m0
from tests import formats_cases as cases
from tests import oracle_formats as oracle

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
RULES = {
    ("mxfp8", "ceil"): e8m0.CEIL_448,
    ("mxfp4", "ceil"): e8m0.CEIL_6,
    ("mxfp4", "even"): e8m0.EVEN,
    ("mxfp4", "floor"): e8m0.FLOOR,
}


@pytest.fixture(params=cases.DEVICES)
def device(request):
    return request.param


def e2m1_codes(x, device="cpu"):
    x = np.asarray(x, np.float32)
    padded = np.append(x, np.zeros(len(x) % 2, np.float32))
    packed = e2m1.encode(torch.from_numpy(padded).to(device))
    return oracle.unpack(cases.raw(packed))[: len(x)]


def e4m3_bytes(x, device="cpu"):
    x = torch.from_numpy(np.array(x, np.float32, ndmin=1))
    return cases.raw(e4m3.encode(x.to(device)))


@pytest.mark.parametrize(
    ("tie", "below", "at", "above"),
    [
        (0.25, 0, 0, 1),
        (0.75, 1, 2, 2),
        (1.25, 2, 2, 3),
        (1.75, 3, 4, 4),
        (2.5, 4, 4, 5),
        (3.5, 5, 6, 6),
        (5.0, 6, 6, 7),
    ],
)
def test_e2m1_ties_go_to_the_even_code(tie, below, at, above, device):
    tie = np.float32(tie)
    x = np.array([np.nextafter(tie, np.float32(0)), tie, np.nextafter(tie, np.float32(9))])
    assert e2m1_codes(x, device).tolist() == [below, at, above]
    assert e2m1_codes(-x, device).tolist() == [below + 8, at + 8, above + 8]


def test_e2m1_specials(device):
    x = [0.0, -0.0, 1e-45, -1e-45, 6.1, -6.1, cases.FLT_MAX, np.inf, -np.inf]
    assert e2m1_codes(x, device).tolist() == [0, 8, 0, 8, 7, 15, 7, 7, 15]
    assert e2m1_codes([np.nan, cases.NEGATIVE_NAN], device).tolist() == [7, 7]


def test_e2m1_packs_the_even_element_low(device):
    packed = e2m1.encode(torch.tensor([[0.5, -6.0, 4.0, 1.0]], device=device))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0xF1, 0x26]]


def test_e2m1_of_every_bf16(device):
    x = cases.every_bf16()
    np.testing.assert_array_equal(e2m1_codes(x, device), oracle.e2m1(x))


def test_e2m1_decodes_every_byte(device):
    packed = torch.arange(256, dtype=torch.uint8, device=device)
    values = E2M1_VALUES + [-v for v in E2M1_VALUES]
    expected = [values[half] for byte in range(256) for half in (byte & 15, byte >> 4)]
    decoded = e2m1.decode(packed).cpu()
    assert decoded.dtype == torch.float32
    # By bits: -0.0 == 0.0 would hide a lost sign.
    np.testing.assert_array_equal(cases.raw(decoded), np.array(expected, "<f4").view(np.uint8))
    assert torch.equal(e2m1.encode(e2m1.decode(packed)), packed)


def test_e4m3_round_trips_every_byte(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    back = cases.raw(e4m3.encode(e4m3.decode(codes)))
    expected = np.arange(256, dtype=np.uint8)
    expected[0xFF] = 0x7F
    np.testing.assert_array_equal(back, expected)


def test_e4m3_decodes_every_byte(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    decoded = cases.raw(e4m3.decode(codes)).view(np.float32)
    np.testing.assert_array_equal(decoded, oracle.e4m3_value(np.arange(256, dtype=np.uint8)))
    assert np.signbit(decoded[0x80])


def test_e4m3_of_every_bf16(device):
    x = cases.every_bf16()
    np.testing.assert_array_equal(e4m3_bytes(x, device), oracle.e4m3(x))


def test_e4m3_ties_and_their_neighbours(device):
    values = oracle.e4m3_value(np.arange(0x7F, dtype=np.uint8))
    x = cases.with_neighbours(np.concatenate([(values[1:] + values[:-1]) / 2, values]))
    x = np.concatenate([x, -x])
    np.testing.assert_array_equal(e4m3_bytes(x, device), oracle.e4m3(x))
    assert e4m3_bytes([2.0**-10, 3 * 2.0**-10, 17.0, 19.0], device).tolist() == [0, 2, 0x58, 0x5A]


@pytest.mark.parametrize("value", [448.0, 448.00003, 464.0, 464.1, 480.0, 1e30, np.inf])
def test_e4m3_saturates(value, device):
    assert e4m3_bytes([value, -value], device).tolist() == [0x7E, 0xFE]


# The lengths pass through both the vector loop and the scalar tail of torch's cast.
@pytest.mark.parametrize("length", [1, 7, 64, 1027])
def test_e4m3_nan_and_zero(length, device):
    for value, byte in [(np.nan, 0x7F), (cases.NEGATIVE_NAN, 0x7F), (0.0, 0), (-0.0, 0x80)]:
        x = np.full(length, value, np.float32)
        assert set(e4m3_bytes(x, device).tolist()) == {byte}


def test_e8m0_decodes_every_byte(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    decoded = cases.raw(e8m0.decode(codes)).view(np.float32)
    np.testing.assert_array_equal(decoded, oracle.e8m0_value(np.arange(256, dtype=np.uint8)))
    assert decoded[0] == 2.0**-127
    assert np.isnan(decoded[255])


def test_e8m0_inverse_is_exact(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    inverse = cases.raw(e8m0.decode_inverse(codes)).view(np.float32)
    np.testing.assert_array_equal(inverse[:255], np.exp2(np.float64(127) - np.arange(255)))
    assert np.isnan(inverse[255])


@pytest.mark.parametrize(("wire", "rule"), RULES)
def test_e8m0_choice_around_every_threshold(wire, rule, device):
    mantissas = np.array([1.0, 1.25, 1.5, 1.75])
    powers = np.exp2(np.arange(-149, 128, dtype=np.float64))
    amax = cases.with_neighbours(np.outer(mantissas, powers).ravel())
    amax = np.append(np.abs(amax), cases.SPECIALS[~np.isnan(cases.SPECIALS)].clip(0))
    chosen = e8m0.choose(torch.from_numpy(amax).to(device), RULES[wire, rule])
    assert chosen.dtype == torch.uint8
    np.testing.assert_array_equal(cases.raw(chosen), oracle.exponent(amax, wire, rule))


@pytest.mark.parametrize("rule", RULES.values())
def test_e8m0_choice_at_the_ends(rule, device):
    amax = torch.tensor([0.0, 1e-45, 2.0**-126, float("inf")], device=device)
    assert e8m0.choose(amax, rule).tolist() == [0, 0, 0, 254]
