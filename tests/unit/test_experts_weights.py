"""Weight containers: every format decoded, one scale per expert, what is refused, padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_a2a import Spec
from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.experts import (
    WEIGHT_FORMATS,
    ExpertMatrix,
    ExpertWeights,
    padded,
    shared_encode_scale,
)
from moe_a2a.experts.four_bits import arrange
from tests import oracle_experts as oracle
from tests.formats_cases import raw

E, ROWS, K = 3, 6, 256


def master(*shape, seed=0):
    """float32, each expert at its own magnitude."""
    rng = np.random.default_rng(seed)
    magnitude = np.exp2(rng.integers(-3, 4, (shape[0], 1, 1)))
    return torch.from_numpy((rng.standard_normal(shape) * magnitude).astype(np.float32))


def decoded(matrix):
    """By the oracle: float64 [E, N, K]."""
    decode = None if matrix.decode_scale is None else matrix.decode_scale.numpy()
    return oracle.weights(raw(matrix.payload), raw(matrix.scales), matrix.format, decode)


def weights(experts=2, inner=64, hidden=96, form="mxfp4", **more):
    w13 = ExpertMatrix.quantize(master(experts, 2 * inner, hidden, seed=1), form)
    return ExpertWeights(
        w13, ExpertMatrix.quantize(master(experts, hidden, inner, seed=2), form), **more
    )


def plain(experts=2, rows=8, columns=4):
    return ExpertMatrix(torch.zeros(experts, rows, columns, dtype=torch.bfloat16))


@pytest.mark.parametrize("form", oracle.FORMATS)
def test_every_format_is_decoded_expert_by_expert(form):
    assert set(oracle.FORMATS) == set(WEIGHT_FORMATS)
    w = master(E, ROWS, K)
    for given in (w, w.bfloat16()):
        matrix = ExpertMatrix.quantize(given, form)
        assert (matrix.num_experts, matrix.rows, matrix.columns) == (E, ROWS, K)
        assert (matrix.decode_scale is not None) == (form == "nvfp4")
        values = matrix.dequantize()
        assert values.dtype == torch.float32
        np.testing.assert_array_equal(values.numpy(), decoded(matrix).astype(np.float32))
        assert torch.equal(matrix.dequantize(slice(1, 2)), values[1:2])
        error = (values - given.float()).abs().amax((1, 2)) / given.float().abs().amax((1, 2))
        assert error.max() < {"bf16": 2**-8, "fp32": 1e-9}.get(form, 0.17)


def test_nvfp4_decode_scales_multiply_their_own_expert():
    payload = torch.full((3, 1, 8), 0x22, dtype=torch.uint8)  # ones
    scales = torch.full((3, 1, 1), 0x38, dtype=torch.uint8)  # 1
    matrix = ExpertMatrix(payload, "nvfp4", scales, torch.tensor([1.0, 0.3, 1e-4]))
    assert torch.equal(
        matrix.dequantize(), torch.tensor([1.0, 0.3, 1e-4])[:, None, None].expand(3, 1, 16)
    )
    one = ExpertMatrix(payload, "nvfp4", scales)
    assert torch.equal(one.dequantize(), torch.ones(3, 1, 16))


def test_other_dtypes_for_the_same_bytes():
    four = ExpertMatrix.quantize(master(E, ROWS, K), "mxfp4")
    nv = ExpertMatrix.quantize(master(E, ROWS, K), "nvfp4")
    for matrix, scales in ((four, torch.float8_e8m0fnu), (nv, torch.float8_e4m3fn)):
        for payload in (torch.int8, torch.float4_e2m1fn_x2):
            same = ExpertMatrix(
                matrix.payload.view(payload),
                matrix.format,
                matrix.scales.view(scales),
                matrix.decode_scale,
            )
            assert same.payload.dtype == same.scales.dtype == torch.uint8
            assert torch.equal(same.dequantize(), matrix.dequantize())


@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
def test_no_experts_are_arranged_too(form):
    some = ExpertMatrix.quantize(torch.ones(1, 128, 256), form)
    decode = None if some.decode_scale is None else some.decode_scale[:0]
    none, one = (
        arrange(ExpertMatrix(some.payload[:0], form, some.scales[:0], decode)),
        arrange(some),
    )
    assert none.words.shape == (0, *one.words.shape[1:])
    assert none.scales.shape == (0, *one.scales.shape[1:])


def test_no_experts_at_all():
    for form in WEIGHT_FORMATS:
        none = ExpertMatrix.quantize(torch.zeros(0, ROWS, K), form)
        assert none.dequantize().shape == (0, ROWS, K)


@pytest.mark.parametrize("form", [form for form in oracle.FORMATS if form not in ("bf16", "fp32")])
def test_a_nan_costs_no_other_weight_its_value(form):
    w = master(E, ROWS, K)
    block, clean = WEIGHT_FORMATS[form].block, ExpertMatrix.quantize(w, form)
    w[0, 0, 0] = torch.nan  # not the largest weight of its expert
    w[1] = torch.nan
    matrix = ExpertMatrix.quantize(w, form)
    if form == "nvfp4":
        assert torch.equal(matrix.decode_scale[[0, 2]], clean.decode_scale[[0, 2]])
        assert matrix.decode_scale[1] == 1.0
    ours, others = matrix.dequantize()[0], clean.dequantize()[0]
    assert torch.equal(ours[1:], others[1:])
    beyond = K if form == "fp8" else block  # fp8 has a scale per row
    assert torch.equal(ours[0, beyond:], others[0, beyond:])


def test_nvfp4_weights_tiny_and_infinite():
    w = torch.zeros(4, 8, 64)
    w[0] = master(1, 8, 64)[0] * 1e-37
    w[1] = master(1, 8, 64)[0]
    w[1, 3, 5] = -torch.inf
    w[2, 0, 0] = 1e-45
    w[3] = torch.finfo(torch.float32).max
    matrix = ExpertMatrix.quantize(w, "nvfp4")
    assert (matrix.decode_scale.isfinite() & (matrix.decode_scale > 0)).all()
    values = matrix.dequantize()
    assert (values[0] - w[0]).abs().max() < 0.2 * w[0].abs().max()
    infinite = torch.zeros(8, 64)
    infinite[3, 5] = -torch.inf
    assert torch.equal(values[1], infinite)
    assert not values[2].any()
    np.testing.assert_allclose(values[3] / w[3], 1.0, rtol=1e-6)


def test_matrices_without_rows():
    for form in WEIGHT_FORMATS:
        none = ExpertMatrix.quantize(torch.zeros(E, 0, K), form)
        assert none.dequantize().shape == (E, 0, K)


BYTES = torch.zeros(2, 8, 32, dtype=torch.uint8)
SF, SF4 = torch.zeros(2, 8, 2, dtype=torch.uint8), torch.zeros(2, 8, 4, dtype=torch.uint8)
NOT = torch.full((2,), torch.nan)


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (GeometryError, "format='int4': use one of bf16", (BYTES, "int4")),
        (PayloadError, "list.*dense tensor", ([1, 2], "bf16")),
        (PayloadError, r"uint8 \[2, 8, 32\].*bfloat16 \[E, N, row\]", (BYTES, "bf16")),
        (PayloadError, r"\[8, 32\].*\[E, N, row\]", (BYTES[0], "mxfp4", SF)),
        (PayloadError, r"scales=None.*uint8 \[2, 8, 2\]", (BYTES, "mxfp4")),
        (PayloadError, r"\[2, 8, 2\].*expected uint8 \[2, 8, 4\]", (BYTES, "nvfp4", SF)),
        (PayloadError, "float8_e4m3fn", (BYTES, "mxfp4", SF.view(torch.float8_e4m3fn))),
        (PayloadError, "scales were given", (BYTES.bfloat16(), "bf16", SF)),
        (PayloadError, "decode_scale.*nvfp4 does", (BYTES, "mxfp4", SF, torch.ones(2))),
        (PayloadError, r"\[3\].*float32 \[2\]", (BYTES, "nvfp4", SF4, torch.ones(3))),
        (PayloadError, r"decode_scale\[1\] is 0.0", (BYTES, "nvfp4", SF4, torch.tensor([1.0, 0]))),
        (GeometryError, "34 columns.*mxfp4 needs.*32", (BYTES[..., :17], "mxfp4", SF)),
        (GeometryError, "mxfp6_e3m2 needs.*32", (BYTES, "mxfp6_e3m2", SF)),
        (PayloadError, "on meta: expected cpu", (BYTES, "mxfp4", SF.to("meta"))),
    ],
)  # fmt: skip
def test_a_wrong_matrix_is_refused(error, text, arguments):
    with pytest.raises(error, match=text):
        ExpertMatrix(*arguments)


def test_quantize_refuses():
    w = torch.zeros(2, 4, 48)
    with pytest.raises(GeometryError, match="multiple of 32"):
        ExpertMatrix.quantize(w, "mxfp4")
    with pytest.raises(GeometryError, match="nearest"):
        ExpertMatrix.quantize(w[..., :32], "mxfp4", rule="nearest")
    with pytest.raises(PayloadError, match=r"int32.*\[E, N, K\]"):
        ExpertMatrix.quantize(w.int(), "fp8")


@pytest.mark.parametrize(
    ("error", "text", "more"),
    [
        (GeometryError, r"w13 is \[2, 8, 4\] and w2 is \[2, 4, 8\]", {"w2": plain(2, 4, 8)}),
        (GeometryError, r"w2 is \[3, 4, 4\]", {"w2": plain(3, 4, 4)}),
        (GeometryError, r"w13 is \[2, 7, 4\]", {"w13": plain(2, 7, 4)}),
        (PayloadError, "w2 is bfloat16.*ExpertMatrix", {"w2": plain(2, 4, 4).payload}),
        (GeometryError, "activation='silu'", {"activation": "silu"}),
        (PayloadError, r"b13 is float32 \[2, 4\].*\[2, 8\]", {"b13": torch.zeros(2, 4)}),
        (PayloadError, r"b2 is int64 \[2, 4\]", {"b2": torch.zeros(2, 4).long()}),
        (PayloadError, "b2 is on meta", {"b2": torch.zeros(2, 4, device="meta")}),
        (PayloadError, r"w13_input_scale\[0\] is nan", {"w13_input_scale": NOT}),
        (PayloadError, r"w2_input_scale.*\[2\]", {"w2_input_scale": torch.ones(1)}),
        (GeometryError, "hidden_size=5", {"hidden_size": 5}),
    ],
)  # fmt: skip
def test_weights_that_do_not_belong_together_are_refused(error, text, more):
    with pytest.raises(error, match=text):
        ExpertWeights(**({"w13": plain(), "w2": plain(2, 4, 4)} | more))


def test_weights_and_spec():
    held = weights(experts=2)
    held.check_fits(Spec(3, 7, 1, 96, 4))  # ranks own 3, 2, 2
    with pytest.raises(GeometryError, match=r"hold 2 experts.*rank 0 owns 3 of 7"):
        held.check_fits(Spec(3, 7, 1, 96, 4), 0)
    with pytest.raises(GeometryError, match=r"a rank owns 3 or 4 of 7"):
        held.check_fits(Spec(2, 7, 1, 96, 4))
    with pytest.raises(GeometryError, match="hidden_size=96, the Spec 128"):
        held.check_fits(Spec(3, 7, 1, 128, 4))
    with pytest.raises(PayloadError, match="on cpu: expected cuda"):
        held.check_on("cuda:0")
    moved = weights(b2=torch.zeros(2, 96), w2_input_scale=torch.ones(2), form="nvfp4").to("meta")
    parts = (moved.w13.payload, moved.w2.scales, moved.w2.decode_scale, moved.b2)
    assert {part.device.type for part in (*parts, moved.w2_input_scale)} == {"meta"}


@pytest.mark.parametrize("form", [form for form in oracle.FORMATS if form != "fp8_block128"])
def test_padding_pads_each_half_by_itself(form):
    before = weights(form=form, b13=master(2, 128, 1)[..., 0], b2=master(2, 96, 1)[..., 0])
    after = padded(before)
    assert (after.hidden_size, after.w13.columns, after.w2.rows) == (96, 128, 128)
    assert (after.w13.rows, after.intermediate_size) == (256, 128)
    w13, was13 = decoded(after.w13), decoded(before.w13)
    for half in range(2):
        at, was = w13[:, 128 * half :][:, :128], was13[:, 64 * half :][:, :64]
        np.testing.assert_array_equal(at[:, :64, :96], was)
        assert not at[:, 64:].any() and not at[:, :, 96:].any()
        b = after.b13[:, 128 * half :][:, :128]
        assert torch.equal(b[:, :64], before.b13[:, 64 * half :][:, :64]) and not b[:, 64:].any()
    w2 = decoded(after.w2)
    np.testing.assert_array_equal(w2[:, :96, :64], decoded(before.w2))
    assert not w2[:, 96:].any() and not w2[:, :, 64:].any()
    assert torch.equal(after.b2[:, :96], before.b2) and not after.b2[:, 96:].any()
    assert padded(after) is after


def test_padding_to_another_multiple():
    assert padded(weights(), 32).intermediate_size == 64
    assert padded(weights(), 160).w13.columns == 160
    for multiple in (0, -128, 48, True, 1.5):
        with pytest.raises(GeometryError, match="multiple of 32"):
            padded(weights(), multiple)
    for wrong in (None, weights().w13, "x"):
        with pytest.raises(GeometryError, match=r"weights=.*must be ExpertWeights"):
            padded(wrong)


def test_the_largest_decode_scale_is_shared():
    with pytest.warns(UserWarning, match=r"w13_input_scale differs.*0\.01 to 0\.25"):
        encode = shared_encode_scale(torch.tensor([0.01, 0.25, 0.1]), name="w13_input_scale")
    assert encode.item() == 4.0
    assert encode.shape == ()
    assert shared_encode_scale(torch.tensor([0.5, 0.5])).item() == 2.0  # warnings are errors here
    assert shared_encode_scale(torch.zeros(0)).item() == 1.0
    with pytest.raises(PayloadError, match=r"decode\[1\] is -1"):
        shared_encode_scale(torch.tensor([1.0, -1.0]))
    assert shared_encode_scale(torch.tensor([2.0**-127])).item() == 2.0**127
    with pytest.raises(PayloadError, match=r"decode is 1e-39 at most.*must be finite"):
        shared_encode_scale(torch.tensor([1e-39, 1e-40]))


pytestmark = pytest.mark.filterwarnings("error::UserWarning")
