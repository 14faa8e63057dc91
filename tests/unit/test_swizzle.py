"""Swizzled scales: the offsets of formats.md, padding, dtypes, batches, and the way back."""

from __future__ import annotations

import pytest
import torch

from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.formats import swizzle, unswizzle

SHAPES = [(128, 4), (1, 1), (127, 3), (129, 5), (300, 22), (8, 8), (0, 4), (256, 448)]


def offset(layout, m, k, columns):
    tiles = -(-columns // 4)
    if layout == "128x4":
        return (m // 128) * tiles * 512 + k // 4 * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
    return (m // 8) * tiles * 32 + k // 4 * 32 + m % 8 * 4 + k % 4


def random_scales(*shape):
    return torch.randint(1, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("layout", ["128x4", "8x4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_byte_is_where_the_formula_says(layout, shape):
    scales = random_scales(*shape)
    swizzled = swizzle(scales, layout)
    height = 128 if layout == "128x4" else 8
    assert swizzled.shape == (-(-shape[0] // height) * height, -(-shape[1] // 4) * 4)
    assert swizzled.is_contiguous()
    expected = torch.zeros(swizzled.numel(), dtype=torch.uint8)
    for m in range(shape[0]):
        for k in range(0, shape[1], 1 if shape[1] < 30 else 37):
            expected[offset(layout, m, k, shape[1])] = scales[m, k]
    flat = swizzled.flatten()
    if shape[1] < 30:
        assert torch.equal(flat, expected)
    else:
        assert torch.equal(flat[expected != 0], expected[expected != 0])


@pytest.mark.parametrize("layout", ["128x4", "8x4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(layout, shape):
    scales = random_scales(*shape)
    back = unswizzle(swizzle(scales, layout), layout, rows=shape[0], cols=shape[1])
    assert torch.equal(back, scales)
    assert back.is_contiguous()


def test_unswizzle_without_a_crop_keeps_the_padding():
    scales = random_scales(100, 6)
    whole = unswizzle(swizzle(scales))
    assert whole.shape == (128, 8)
    assert torch.equal(whole[:100, :6], scales)
    assert whole.sum(dtype=torch.int64) == scales.sum(dtype=torch.int64)


@pytest.mark.parametrize("layout", ["128x4", "8x4"])
def test_matrices_of_a_batch_are_independent(layout):
    scales = random_scales(2, 3, 130, 6)
    swizzled = swizzle(scales, layout)
    for i in range(2):
        for j in range(3):
            assert torch.equal(swizzled[i, j], swizzle(scales[i, j], layout))
    assert torch.equal(unswizzle(swizzled, layout, rows=130, cols=6), scales)
    assert swizzle(scales[:0], layout).shape[0] == 0


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e8m0fnu]
)
def test_dtype_stays(dtype):
    scales = random_scales(40, 6).view(dtype)
    swizzled = swizzle(scales)
    assert swizzled.dtype == dtype
    assert torch.equal(swizzled.view(torch.uint8), swizzle(scales.view(torch.uint8)))
    back = unswizzle(swizzled, rows=40, cols=6)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


@pytest.mark.parametrize("layout", ["128x4", "8x4"])
def test_strided_input(layout):
    scales = random_scales(8, 256).T[::2]
    # One column of tiles is hardly permuted: torch could return a view with the input's strides.
    for view in (scales, random_scales(4, 128).T):
        assert torch.equal(swizzle(view, layout), swizzle(view.contiguous(), layout))
        assert swizzle(view, layout).is_contiguous()
    spread = torch.stack([scales.contiguous()] * 2, -1)[..., 0]
    assert torch.equal(unswizzle(spread, layout), unswizzle(spread.contiguous(), layout))


def test_shards_of_whole_tiles_concatenate():
    scales = random_scales(384, 12)
    parts = [swizzle(scales[:128]), swizzle(scales[128:])]
    assert torch.equal(torch.cat(parts), swizzle(scales))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda s: swizzle(s, "64x4"), GeometryError, "'64x4'.*128x4, 8x4"),
        (lambda s: unswizzle(s, "4x4"), GeometryError, "'4x4'"),
        (lambda s: swizzle(s[0]), PayloadError, r"\(4,\)"),
        (lambda s: swizzle(s.to(torch.int16)), PayloadError, "int16"),
        (lambda s: unswizzle(s.float()), PayloadError, "float32"),
        (lambda s: unswizzle(s[:127]), PayloadError, "multiple of 128"),
        (lambda s: unswizzle(s[:, :3]), PayloadError, "columns of 4"),
        (lambda s: unswizzle(s[:12], "8x4"), PayloadError, "multiple of 8"),
        (lambda s: unswizzle(s, rows=129), PayloadError, r"rows=129.*0\.\.128"),
        (lambda s: unswizzle(s, cols=-1), PayloadError, r"cols=-1.*0\.\.4"),
    ],
)
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call(random_scales(128, 4))
