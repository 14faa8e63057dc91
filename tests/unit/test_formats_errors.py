"""Mistakes in arguments: the error's type, and that its text says what was given and expected."""

from __future__ import annotations

import pytest
import torch

from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.formats import FORMATS, dequantize, quantize

ROWS = torch.zeros(2, 256)


@pytest.mark.parametrize(
    ("wire", "x", "options", "error", "text"),
    [
        ("fp9", ROWS, {}, GeometryError, "'fp9'.*bf16, fp16, fp8, fp8_block128, mxfp8"),
        ("fp8", ROWS.double(), {}, PayloadError, "float64"),
        ("bf16", ROWS.to(torch.int32), {}, PayloadError, "int32"),
        ("fp8", torch.tensor(1.0), {}, PayloadError, "hidden_size"),
        ("fp8", ROWS[:, :0], {}, GeometryError, "hidden_size=0"),
        ("mxfp8", ROWS[:, :0], {}, GeometryError, "hidden_size=0"),
        ("fp8_block128", ROWS[:, :192], {}, GeometryError, "hidden_size=192.*128"),
        ("nvfp4", ROWS[:, :24], {}, GeometryError, "hidden_size=24.*16"),
        ("mxfp4", ROWS[:, :48], {}, GeometryError, "hidden_size=48.*32"),
        ("mxfp8", ROWS, {"alignment": 48}, GeometryError, "alignment=48.*32"),
        ("mxfp8", ROWS, {"alignment": 0}, GeometryError, "alignment=0.*32"),
        ("mxfp8", ROWS, {"alignment": -32}, GeometryError, "alignment=-32"),
        ("mxfp4", ROWS, {"rule": "round"}, GeometryError, "'round'.*ceil, even, floor"),
        ("mxfp8", ROWS, {"rule": "even"}, GeometryError, "'even'.*mxfp8.*mxfp4"),
        ("bf16", ROWS, {"rule": "floor"}, GeometryError, "'floor'.*bf16"),
        ("mxfp8", ROWS, {"ue8m0": True}, GeometryError, "ue8m0.*mxfp8.*fp8_block128"),
        ("fp8", ROWS, {"ue8m0": True}, GeometryError, "ue8m0.*fp8_block128"),
        ("mxfp4", ROWS, {"global_scale": torch.tensor(1.0)}, PayloadError, "mxfp4.*only nvfp4"),
        ("nvfp4", ROWS, {"global_scale": 896.0}, PayloadError, "896"),
        ("nvfp4", ROWS, {"global_scale": torch.ones(2)}, PayloadError, r"one element.*\(2,\)"),
        ("nvfp4", ROWS, {"global_scale": torch.tensor(1)}, PayloadError, "float32.*int64"),
    ],
)
def test_quantize_refuses(wire, x, options, error, text):
    with pytest.raises(error, match=text):
        quantize(x, wire, **options)


def payload_of(wire, width=None):
    payload, scales = quantize(ROWS, wire)
    return payload[:, :width], scales


@pytest.mark.parametrize("wire", FORMATS)
def test_dequantize_refuses_missing_or_superfluous_scales(wire):
    payload, scales = payload_of(wire)
    wrong = torch.zeros(2, 1) if scales is None else None
    with pytest.raises(PayloadError, match=f"{wire}.*scales"):
        dequantize(payload, wrong, wire)


@pytest.mark.parametrize("wire", FORMATS)
def test_dequantize_refuses_another_dtype(wire):
    payload, scales = payload_of(wire)
    with pytest.raises(PayloadError, match=f"{wire}.*int8"):
        dequantize(payload.to(torch.int8), scales, wire)
    if scales is not None:
        with pytest.raises(PayloadError, match=f"scales of wire {wire}.*int64"):
            dequantize(payload, scales.to(torch.int64), wire)


@pytest.mark.parametrize("wire", ["fp8", "fp8_block128", "mxfp8", "nvfp4", "mxfp4"])
def test_dequantize_refuses_another_shape_of_scales(wire):
    payload, scales = payload_of(wire)
    for wrong in (scales[:1], scales[:, :-1], scales[None], scales.flatten()):
        with pytest.raises(PayloadError, match=f"scales of wire {wire}"):
            dequantize(payload, wrong, wire)


@pytest.mark.parametrize(
    ("wire", "width", "options", "text"),
    [
        ("mxfp8", 48, {}, "48 columns.*32"),
        ("nvfp4", 12, {}, "24 columns.*16"),
        ("mxfp4", 0, {}, "0 columns"),
        ("bf16", None, {"hidden_size": 255}, "hidden_size=255.*256"),
        ("nvfp4", None, {"hidden_size": 128}, "hidden_size=128.*256"),
        ("mxfp8", None, {"hidden_size": 257}, r"hidden_size=257.*1\.\.256"),
        ("mxfp8", None, {"hidden_size": 0}, "hidden_size=0"),
        ("fp8", None, {"dtype": torch.float64}, "float64"),
        ("mxfp8", None, {"global_scale": torch.tensor(1.0)}, "mxfp8.*only nvfp4"),
        ("nvfp4", None, {"global_scale": torch.ones(3)}, "one element"),
    ],
)
def test_dequantize_refuses(wire, width, options, text):
    payload, scales = payload_of(wire, width)
    with pytest.raises(PayloadError, match=text):
        dequantize(payload, scales, wire, **options)


def test_dequantize_refuses_an_unknown_wire():
    with pytest.raises(GeometryError, match="'fp3'"):
        dequantize(ROWS, None, "fp3")


def test_dequantize_refuses_another_device():
    payload, scales = payload_of("mxfp8")
    with pytest.raises(PayloadError, match=r"on cpu; got .* on meta"):
        dequantize(payload, scales.to("meta"), "mxfp8")
    with pytest.raises(PayloadError, match=r"on cpu; got .* on meta"):
        quantize(ROWS, "nvfp4", global_scale=torch.ones((), device="meta"))
