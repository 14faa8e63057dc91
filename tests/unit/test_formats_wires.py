"""Every wire against the oracle, byte for byte: data, dtypes, shapes, strides, devices."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_a2a.formats import FORMATS, dequantize, quantize
from tests import formats_cases as cases
from tests import oracle_formats as oracle

# Every wire, and every variant of one.
VARIANTS = [
    *((wire, {}) for wire in FORMATS),
    ("fp8_block128", {"ue8m0": True}),
    ("mxfp8", {"alignment": 96}),
    ("mxfp4", {"rule": "even"}),
    ("mxfp4", {"rule": "floor"}),
    ("nvfp4", {"global_scale": 896.0}),
    ("nvfp4", {"global_scale": 0.0123}),
    ("nvfp4", {"global_scale": 2.0**-119}),
    ("nvfp4", {"global_scale": 2.0**118}),
]
every_variant = pytest.mark.parametrize(("wire", "options"), VARIANTS)
every_wire = pytest.mark.parametrize("wire", FORMATS)
DATA = [cases.gaussian, cases.any_bits, cases.wild, cases.near_ties]


@pytest.fixture(params=cases.DEVICES)
def device(request):
    return request.param


def tensor_options(options, device="cpu"):
    gs = options.get("global_scale")
    if gs is None:
        return options
    return {**options, "global_scale": torch.tensor(gs, dtype=torch.float32, device=device)}


def assert_same_rows(x, wire, options, device="cpu"):
    """Quantizes and dequantizes x (a tensor) here and in the oracle."""
    x32 = x.to(torch.float32).numpy()
    given = tensor_options(options, device)
    payload, scales = quantize(x.to(device), wire, **given)
    expected, expected_scales = oracle.quantize(x32, wire, **options)
    if wire in ("bf16", "fp16"):
        # Libraries keep different bits of a NaN.
        dtype = np.uint16
        nan = np.isnan(x32)
        assert torch.equal(payload.cpu().isnan(), torch.from_numpy(nan))
        np.testing.assert_array_equal(
            cases.raw(payload).view(dtype)[~nan], expected.view(dtype)[~nan]
        )
        return
    np.testing.assert_array_equal(cases.raw(scales), expected_scales)
    np.testing.assert_array_equal(cases.raw(payload), expected)
    gs = {name: value for name, value in given.items() if name == "global_scale"}
    rows = dequantize(payload, scales, wire, hidden_size=x.shape[-1], **gs).cpu().numpy()
    assert rows.dtype == np.float32
    expected_rows = oracle.dequantize(
        expected, expected_scales, wire, x.shape[-1], options.get("global_scale", 1.0)
    )
    np.testing.assert_array_equal(rows, expected_rows)
    # Equal zeros may differ in sign.
    signs = [np.signbit(r)[~np.isnan(r)] for r in (rows, expected_rows)]
    np.testing.assert_array_equal(*signs)


@every_variant
def test_bytes_are_the_oracles(wire, options, device):
    for data in DATA:
        for seed in range(2):
            assert_same_rows(torch.from_numpy(data(24, 384, seed)), wire, options, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_wire
def test_half_precision_input(wire, dtype, device):
    for data in DATA:
        assert_same_rows(torch.from_numpy(data(16, 256)).to(dtype), wire, {}, device)


@every_wire
def test_every_bf16_input(wire):
    # Shuffled, so that a block mixes exponents, NaN and infinities.
    x = np.random.default_rng(5).permutation(cases.every_bf16()).reshape(-1, 128)
    assert_same_rows(torch.from_numpy(x), wire, {})


@pytest.mark.parametrize("gs", [1.0, 896.0, 0.0123])
def test_nvfp4_scales_at_the_ties_of_e4m3(gs, device):
    # Where one rounding more, or another order of the products, changes the scale.
    values = oracle.e4m3_value(np.arange(0x7F, dtype=np.uint8)).astype(np.float64)
    amax = ((values[1:] + values[:-1]) / 2 * 6 / gs).astype(np.float32)
    for _ in range(2):
        amax = cases.with_neighbours(amax)
    x = np.zeros((len(amax), 16), np.float32)
    x[:, 3] = amax
    other = oracle.e4m3((amax / np.float32(6) * np.float32(gs)).clip(0, 448))
    assert (other != oracle.quantize(x, "nvfp4", gs)[1][:, 0]).any()
    assert_same_rows(torch.from_numpy(x), "nvfp4", {"global_scale": gs}, device)


# Outside the range of global scales nothing is promised but the same arithmetic and no exception.
@pytest.mark.parametrize("gs", [0.0, 1e-45, 1e-40, 3e38, np.inf, np.nan, -896.0])
def test_nvfp4_global_scale_out_of_range(gs):
    x = torch.from_numpy(np.append(cases.wild(8, 256), cases.gaussian(8, 256), axis=0))
    assert_same_rows(x, "nvfp4", {"global_scale": gs})


bit_patterns = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from(cases.SPECIALS.view(np.uint32).tolist()),
    st.builds(lambda e, m: e << 23 | m << 21, st.integers(0, 511), st.integers(0, 3)),
)
rows = hnp.arrays(np.uint32, (2, 128), elements=bit_patterns, fill=bit_patterns)


@settings(max_examples=60, deadline=None, database=None)
@given(bits=rows, gs=st.floats(2.0**-119, 2.0**118, width=32))
@pytest.mark.parametrize(("wire", "options"), VARIANTS[:11])
def test_any_rows(wire, options, bits, gs):
    options = {"global_scale": gs} if wire == "nvfp4" else options
    assert_same_rows(torch.from_numpy(bits.view(np.float32)), wire, options)


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3), (2, 0, 3), (1, 2, 2, 2)])
@every_wire
def test_leading_dimensions(wire, leading, device):
    flat = torch.from_numpy(cases.gaussian(24, 256))[: int(np.prod(leading))]
    x = flat.reshape(*leading, 256).to(device)
    payload, scales = quantize(x, wire)
    assert payload.shape == (*leading, FORMATS[wire].payload_width(256, 32))
    if scales is not None:
        assert scales.shape == (*leading, FORMATS[wire].scale_width(256, 32))
    back = dequantize(payload, scales, wire)
    assert back.shape == x.shape
    flat_payload, _ = quantize(flat.to(device), wire)
    np.testing.assert_array_equal(cases.raw(payload).ravel(), cases.raw(flat_payload).ravel())


@every_wire
def test_strided_rows(wire):
    whole = torch.from_numpy(cases.gaussian(12, 512))
    views = (
        whole[::3, 64:320],
        whole[:, ::2],
        whole[:4].T.reshape(8, 256),
        whole.view(4, 3, 512).mT,
    )
    for x in (*views[:3], whole.view(3, 4, 512).transpose(0, 1), whole[:1, :256].expand(5, 256)):
        payload, scales = quantize(x, wire)
        assert payload.is_contiguous()
        expected, expected_scales = quantize(x.contiguous(), wire)
        np.testing.assert_array_equal(cases.raw(payload), cases.raw(expected))
        np.testing.assert_array_equal(cases.raw(scales), cases.raw(expected_scales))
        rows = dequantize(payload, scales, wire)
        for strided in (torch.stack([payload] * 2, -1)[..., 0], payload.mT.contiguous().mT):
            again = dequantize(strided, scales, wire)
            assert again.is_contiguous()
            assert torch.equal(again, rows)


@every_wire
def test_input_is_left_alone(wire):
    x = torch.from_numpy(cases.gaussian(4, 256)).requires_grad_()
    before = x.detach().clone()
    payload, scales = quantize(x, wire)
    copies = [cases.raw(payload).copy(), cases.raw(scales).copy()]
    dequantize(payload, scales, wire)
    assert torch.equal(x, before)
    assert not payload.requires_grad
    np.testing.assert_array_equal(cases.raw(payload), copies[0])
    np.testing.assert_array_equal(cases.raw(scales), copies[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_wire
def test_dequantize_rounds_once(wire, dtype):
    payload, scales = quantize(torch.from_numpy(cases.gaussian(4, 256)), wire)
    rows = dequantize(payload, scales, wire, dtype=dtype)
    assert rows.dtype == dtype
    assert torch.equal(rows, dequantize(payload, scales, wire).to(dtype))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_global_scale_is_one_element_of_any_shape(shape):
    x = torch.from_numpy(cases.gaussian(4, 64))
    gs = torch.full(shape, 3.7)
    payload, scales = quantize(x, "nvfp4", global_scale=gs)
    expected, _ = quantize(x, "nvfp4", global_scale=torch.tensor(3.7))
    assert torch.equal(payload, expected)
    assert dequantize(payload, scales, "nvfp4", global_scale=gs).shape == (4, 64)


@every_wire
def test_no_value_reaches_the_host(wire):
    # A fake tensor has no values: .item(), or a shape that depends on data, raises.
    with FakeTensorMode():
        gs = torch.ones(()) if wire == "nvfp4" else None
        payload, scales = quantize(torch.empty(4, 256), wire, global_scale=gs)
        assert dequantize(payload, scales, wire, global_scale=gs).shape == (4, 256)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_wire
def test_cuda_graph(wire):
    x = torch.from_numpy(cases.gaussian(8, 256)).cuda()
    quantize(x, wire)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        payload, scales = quantize(x, wire)
        rows = dequantize(payload, scales, wire)
    x.copy_(torch.from_numpy(cases.wild(8, 256, seed=3)))
    graph.replay()
    expected, expected_scales = quantize(x, wire)
    np.testing.assert_array_equal(cases.raw(payload), cases.raw(expected))
    decoded = dequantize(expected, expected_scales, wire)
    np.testing.assert_array_equal(cases.raw(rows), cases.raw(decoded))
