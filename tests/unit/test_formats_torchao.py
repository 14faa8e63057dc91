"""The wires that torchao has too, against torchao."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from moe_a2a.formats import quantize, swizzle
from tests import formats_cases as cases
from tests import oracle_formats as oracle

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize
    from torchao.prototype.mx_formats.utils import to_blocked


def bf16_rows(rows=64, hidden_size=512):
    # torchao's RCEIL goes through log2: bf16 values keep clear of where that rounds.
    return torch.from_numpy(cases.gaussian(rows, hidden_size)).to(torch.bfloat16)


def test_mxfp8_is_rceil():
    x = bf16_rows()
    scales, payload = to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
    ours, our_scales = quantize(x, "mxfp8")
    np.testing.assert_array_equal(cases.raw(our_scales), cases.raw(scales))
    np.testing.assert_array_equal(cases.raw(ours), cases.raw(payload))


@pytest.mark.parametrize(
    ("rule", "mode"), [("ceil", "RCEIL"), ("even", "EVEN"), ("floor", "FLOOR")]
)
def test_mxfp4_rules(rule, mode):
    x = bf16_rows()
    scales, payload = to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[mode])
    ours, our_scales = quantize(x, "mxfp4", rule=rule)
    np.testing.assert_array_equal(cases.raw(our_scales), cases.raw(scales))
    np.testing.assert_array_equal(cases.raw(ours), cases.raw(payload))


def test_nvfp4_but_for_rare_ties():
    x = bf16_rows(256)
    gs = 448 * 6 / x.abs().max().to(torch.float32)
    # Blocks that torchao lifts to its smallest scale are left out.
    x = x[x.abs().amax(-1) > x.abs().max() / 64]
    scales, payload = nvfp4_quantize(x, per_tensor_scale=1 / gs)
    ours, our_scales = quantize(x, "nvfp4", global_scale=gs)
    same_block = cases.raw(our_scales) == cases.raw(scales)
    assert same_block.mean() > 0.999
    codes = [oracle.unpack(cases.raw(p)).reshape(*same_block.shape, 16) for p in (ours, payload)]
    differing = (codes[0] != codes[1])[same_block]
    assert differing.mean() < 1e-3
    assert np.abs(codes[0].astype(int) - codes[1])[same_block].max() <= 1


def test_swizzle_is_to_blocked():
    scales = torch.randint(0, 255, (300, 22), dtype=torch.uint8)
    assert torch.equal(swizzle(scales).flatten(), to_blocked(scales).flatten())
