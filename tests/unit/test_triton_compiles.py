"""Every Triton kernel compiles for Hopper and Blackwell, and to the instructions meant."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed (extra `cuda`)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from moe_a2a.experts import tiles
from moe_a2a.formats import FORMATS
from tests.triton_builds import built, loop_of

ARCHITECTURES = {90: "sm_90a", 100: "sm_100a"}
SHARED = 227 * 1024  # bytes that one program can have


def gemm(
    arch,
    tile,
    *,
    gated,
    form="mxfp4",
    wide=False,
    bias=True,
    n=2048,
    k=7168,
    x_columns=None,
    out="bf16",
):
    from moe_a2a.experts.triton_gemm import grouped_gemm

    types = {
        "x": "*bf16", "row_index": "*i32", "expert_offsets": "*i32", "words": "*i32",
        "scales": "*i32", "out": f"*{out}", "length": "i32", "x_stride": "i32",
        "out_stride": "i32", "group_m": "i32",
    }  # fmt: skip
    constants = {
        "decode_scale": None, "bias": None, "experts": 32, "experts_up": 32, "n": n, "k": k,
        "x_columns": x_columns or k, "out_columns": n, "gather": gated, "gated": gated,
        "alpha": 1.702, "beta": 1.0, "limit": 7.0 if bias else None, "nvfp4": form == "nvfp4",
        "wide": wide, "far": wide, "block_m": tile.block_m, "block_n": tile.block_n,
        "warps": tile.warps,
    }  # fmt: skip
    for name in ("decode_scale",) * (form == "nvfp4") + ("bias",) * bias:
        del constants[name]
        types[name] = "*fp32"
    return built(grouped_gemm, types, constants, arch=arch, warps=tile.warps, stages=tile.stages)


TABLE = [
    pytest.param(getattr(pair, part), part == "gate_up", id=f"{part}-{at}")
    for at, (_, pair) in enumerate(tiles._TABLE)
    for part in ("gate_up", "down")
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("tile", "gated"), TABLE)
def test_the_tiles_of_the_table(arch, tile, gated):
    made = gemm(arch, tile, gated=gated)
    assert made.target == ARCHITECTURES[arch]
    assert made.shared <= SHARED
    assert made.stack <= 64, "more registers are spilled than some around the last step"
    if arch != 90:
        return
    loop = loop_of(made.ptx)
    assert loop.count("wgmma.mma_async") == 8 * (1 + gated) * max(
        1, tile.block_n // 16 // tile.warps
    )
    # Decoded weights go from registers to the tensor core: no thread hands any to another one.
    for exchange in ("st.shared", "shfl", "prmt"):
        assert exchange not in loop, exchange
    assert loop.count("mul.rn.bf16x2") == (1 + gated) * tile.block_n * 128 // 2 // 32 // tile.warps
    assert "cp.async" in loop, "loads are not pipelined"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_in_fp32(arch):
    made = gemm(arch, tiles.Tile(256, 128, 8, 3, 8), gated=False, out="fp32")
    assert made.shared <= SHARED
    assert made.stack <= 64


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("form", ["nvfp4", "wide"])
def test_other_ways_to_decode(arch, form):
    tile = tiles.Tile(32, 64, 4, 3)
    more = {"form": form} if form == "nvfp4" else {"wide": True}
    made = gemm(arch, tile, gated=True, bias=False, x_columns=7168 - 32, **more)
    assert made.stack == 0
    assert made.target == ARCHITECTURES[arch]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rows", ["bf16", "fp32"])
def test_the_sum_has_no_fused_multiply_add(arch, rows):
    from moe_a2a.experts.triton_sum import weighted_sum

    types = {"rows": f"*{rows}", "positions": "*i32", "weights": "*fp32", "out": "*bf16",
             "rows_stride": "i32", "weights_stride": "i32", "out_stride": "i32"}  # fmt: skip
    constants = {"hidden": 7168, "top_k": 8, "top_k_up": 8, "block": 1024}
    made = built(weighted_sum, types, constants, arch=arch, warps=4)
    assert "mul.f32" in made.ptx.replace(".rn", "")
    assert "fma" not in made.ptx


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("wire", [wire for wire in FORMATS if wire != "bf16"])
def test_decoding_rows(arch, wire):
    from moe_a2a.experts.triton_decode import decode_rows

    payload, scales = "*fp16" if wire == "fp16" else "*u8", "*fp32" if wire[:3] == "fp8" else "*u8"
    types = {"payload": payload, "scales": scales, "counts": "*i32", "out": "*bf16", "rows": "i32",
             "payload_stride": "i32", "scales_stride": "i32"}  # fmt: skip
    constants = {"hidden": 7168, "wire": wire, "per_scale": 0 if wire == "fp8" else 32,
                 "block": 2048, "global_scale": None}  # fmt: skip
    if wire == "nvfp4":
        types["global_scale"] = "*fp32"
        del constants["global_scale"]
    made = built(decode_rows, types, constants, arch=arch, warps=4)
    assert (made.target, made.stack) == (ARCHITECTURES[arch], 0)
    assert "ftz" not in made.ptx  # codes in place are subnormal
    assert ("div.rn.f32" in made.ptx) == (wire == "nvfp4")


def scaled(arch, block_k=256, warps=8):
    from moe_a2a.experts.triton_mxfp4 import scaled_gemm

    types = {
        "codes": "*u8", "code_scales": "*u8", "row_index": "*i32", "expert_offsets": "*i32",
        "payload": "*u8", "scales": "*u8", "bias": "*fp32", "out": "*fp32", "length": "i32",
        "out_stride": "i32", "group_m": "i32",
    }  # fmt: skip
    constants = {"experts": 32, "experts_up": 32, "n": 4096, "k": 7168, "out_columns": 4096,
                 "block_k": block_k}  # fmt: skip
    return built(scaled_gemm, types, constants, arch=arch, warps=warps, stages=3)


@pytest.mark.parametrize("block_k", [128, 256])
def test_w4a4_uses_the_tensor_cores_of_blackwell(block_k):
    made = scaled(100, block_k)
    assert made.target == "sm_100a"
    assert made.shared <= SHARED
    # Both operands as codes with E8M0 scales of 32 columns, neither decoded.
    assert "kind::mxf4.block_scale" in made.ptx
    assert "cvt.rn.f16x2.e2m1x2" not in made.ptx
    assert made.stack == 0


def test_w4a4_is_decoded_on_hopper():
    made = scaled(90)
    assert made.target == "sm_90a"
    assert "wgmma.mma_async" in made.ptx
    assert made.shared <= SHARED


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_quantizing(arch):
    from moe_a2a.experts.triton_mxfp4 import activate_and_quantize, quantize_rows

    types = {"x": "*bf16", "row_index": "*i32", "expert_offsets": "*i32", "codes": "*u8",
             "scales": "*u8", "length": "i32", "x_stride": "i32"}  # fmt: skip
    constants = {"experts": 32, "k": 7168, "x_columns": 7168, "rows": 32, "columns": 128}
    made = built(quantize_rows, types, constants, arch=arch, warps=4)
    assert (made.target, made.stack) == (ARCHITECTURES[arch], 0)
    del types["x"], types["x_stride"], constants["x_columns"]
    types["gate_up"] = "*fp32"
    constants |= {"alpha": 1.702, "beta": 1.0, "limit": 7.0}
    made = built(activate_and_quantize, types, constants, arch=arch, warps=4)
    assert (made.target, made.stack) == (ARCHITECTURES[arch], 0)
    assert "fma" not in made.ptx
