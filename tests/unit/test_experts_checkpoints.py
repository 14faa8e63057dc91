"""Published layouts against tables of their own, and the activation against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moe_a2a import Spec
from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.experts import (
    GPT_OSS,
    SILU,
    Activation,
    deepseek_v4,
    e8m0_bytes,
    from_deepseek_v4,
    from_gpt_oss,
)
from tests import oracle_experts as oracle

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4 = np.array(FP4 + [-value for value in FP4])
E, INNER, H = 3, 32, 64


def random_bytes(rng, *shape):
    return rng.integers(0, 256, shape, np.uint8)


def values(blocks, scales):
    """uint8 [..., K/32, 16] and [..., K/32] -> float64 [..., K], low nibble first."""
    pairs = np.stack([FP4[blocks & 15], FP4[blocks >> 4]], -1).reshape(*scales.shape, 32)
    return np.ldexp(pairs, scales.astype(int)[..., None] - 127).reshape(*scales.shape[:-1], -1)


def gpt_oss():
    rng = np.random.default_rng(0)
    arrays = {}
    for proj, rows, columns in (("gate_up_proj", 2 * INNER, H), ("down_proj", H, INNER)):
        arrays[f"{proj}_blocks"] = random_bytes(rng, E, rows, columns // 32, 16)
        arrays[f"{proj}_scales"] = rng.integers(117, 130, (E, rows, columns // 32)).astype(np.uint8)
        arrays[f"{proj}_bias"] = rng.standard_normal((E, rows)).astype(np.float32)
    return arrays


def tensors(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_gpt_oss_rows_take_turns():
    arrays = gpt_oss()
    found = from_gpt_oss(tensors(arrays))
    w13 = values(arrays["gate_up_proj_blocks"], arrays["gate_up_proj_scales"])
    ours = found.w13.dequantize().double().numpy()
    np.testing.assert_array_equal(ours[:, :INNER], w13[:, 0::2])
    np.testing.assert_array_equal(ours[:, INNER:], w13[:, 1::2])
    bias = arrays["gate_up_proj_bias"]
    np.testing.assert_array_equal(found.b13[:, :INNER], bias[:, 0::2])
    np.testing.assert_array_equal(found.b13[:, INNER:], bias[:, 1::2])
    w2 = values(arrays["down_proj_blocks"], arrays["down_proj_scales"])
    np.testing.assert_array_equal(found.w2.dequantize().double().numpy(), w2)
    np.testing.assert_array_equal(found.b2, arrays["down_proj_bias"])
    assert found.activation == Activation(1.702, 1.0, 7.0) == GPT_OSS
    mine = from_gpt_oss(tensors(arrays), range(1, 3))
    assert mine.num_experts == 2
    assert torch.equal(mine.w13.dequantize(), found.w13.dequantize()[1:])
    assert torch.equal(mine.b2, found.b2[1:])
    assert from_gpt_oss(tensors(arrays), range(3, 3)).num_experts == 0


def test_gpt_oss_refuses():
    good = tensors(gpt_oss())
    for name, value, text in (
        ("down_proj_scales", None, "down_proj_scales is missing"),
        ("gate_up_proj_blocks", good["gate_up_proj_blocks"].flatten(2), r"\[E, N, K/32, 16\]"),
        ("gate_up_proj_blocks", good["gate_up_proj_blocks"].int(), "int32.*uint8"),
        ("gate_up_proj_scales", good["gate_up_proj_scales"][..., :1], r"uint8 \[3, 64, 2\]"),
        ("down_proj_bias", good["down_proj_bias"][0], r"float32 \[3, 64\]"),
    ):  # fmt: skip
        given = {key: tensor for key, tensor in good.items() if key != name}
        with pytest.raises(PayloadError, match=text):
            from_gpt_oss(given if value is None else given | {name: value})
    with pytest.raises(PayloadError, match=r"range\(2, 5\)"):
        from_gpt_oss(good, range(2, 5))
    for experts in ([0, 1], 5, "x", (0,)):
        with pytest.raises(GeometryError, match=r"experts=.*must be a range"):
            from_gpt_oss(good, experts)
    for wrong in (None, [good], 5):
        with pytest.raises(PayloadError, match=r"tensors is .*expected a mapping"):
            from_gpt_oss(wrong)
    with pytest.raises(PayloadError, match="gate_up_proj_blocks is missing"):
        from_gpt_oss({0: 1, "x": 2})


def deepseek(expert):
    rng = np.random.default_rng([1, expert])
    made = {}
    for name, rows, columns in (("w1", INNER, H), ("w2", H, INNER), ("w3", INNER, H)):
        made[f"{name}.weight"] = random_bytes(rng, rows, columns // 2)
        made[f"{name}.scale"] = rng.integers(110, 130, (rows, columns // 32)).astype(np.uint8)
    return made


def as_published(arrays, weight, scale):
    given = tensors(arrays)
    for name in ("w1", "w2", "w3"):
        given[f"{name}.weight"] = given[f"{name}.weight"].view(weight)
        power = torch.exp2(given[f"{name}.scale"].float() - 127)
        given[f"{name}.scale"] = power if scale is torch.float32 else power.to(scale)
    return given


@pytest.mark.parametrize("weight", [torch.uint8, torch.int8, torch.float4_e2m1fn_x2])
@pytest.mark.parametrize("scale", [torch.float8_e8m0fnu, torch.float32])
def test_deepseek_v4_is_gate_above_up(weight, scale):
    arrays = [deepseek(expert) for expert in range(2)]
    found = from_deepseek_v4([as_published(one, weight, scale) for one in arrays], limit=10.0)
    for e, one in enumerate(arrays):
        of = {
            name: values(one[f"{name}.weight"].reshape(rows, -1, 16), one[f"{name}.scale"])
            for name, rows in (("w1", INNER), ("w2", H), ("w3", INNER))
        }
        ours = found.w13.dequantize()[e].double().numpy()
        np.testing.assert_array_equal(ours, np.concatenate([of["w1"], of["w3"]]))
        np.testing.assert_array_equal(found.w2.dequantize()[e].double().numpy(), of["w2"])
    assert found.activation == Activation(1.0, 0.0, 10.0) == deepseek_v4(10.0)
    assert found.b13 is None


def test_deepseek_v4_refuses():
    good = tensors(deepseek(0))
    for name, value, text in (
        ("w3.scale", None, "w3.scale of expert 1 is missing"),
        ("w1.weight", good["w1.weight"].float(), "w1.weight of expert 1 is float32"),
        ("w1.weight", good["w1.weight"][:8], r"\[8, 32\] on cpu and \[32, 32\]"),
        ("w2.weight", good["w2.weight"][:8], r"w2.weight of expert 1 is \[8, 16\].*\[64, 16\]"),
        ("w2.scale", torch.full((64, 1), 0.75), r"w2.scale of expert 1\[0, 0\] is 0.75"),
        ("w2.scale", torch.tensor(1.0), r"w2.scale of expert 1 is float32 \[\].*\[N, n\]"),
        ("w1.scale", torch.ones(32), r"w1.scale of expert 1 is float32 \[32\].*\[N, n\]"),
        ("w1.scale", torch.ones(1, 32, 2), r"w1.scale of expert 1 is float32 \[1, 32, 2\]"),
        ("w2.scale", torch.ones(64, 1, device="meta"), "w2.scale of expert 1 is.*on meta"),
        ("w1.weight", good["w1.weight"].to("meta"), r"w1 and w3 weight.*on meta and .*on cpu"),
    ):
        wrong = {key: tensor for key, tensor in good.items() if key != name}
        wrong |= {} if value is None else {name: value}
        with pytest.raises(PayloadError, match=text):
            from_deepseek_v4([good, wrong], limit=10.0)
    for wrong in (5, None, "x", torch.tensor(1), good, {0: good, 1: good}):
        with pytest.raises(PayloadError, match=r"experts is .*a list of mappings, in the order"):
            from_deepseek_v4(wrong, limit=10.0)
    with pytest.raises(PayloadError, match="expert 1 is NoneType None: expected a mapping"):
        from_deepseek_v4([good, None], limit=10.0)


def test_deepseek_v4_from_a_generator():
    one = tensors(deepseek(0))
    found = from_deepseek_v4((one for _ in range(2)), limit=10.0)
    assert torch.equal(
        found.w13.dequantize(), from_deepseek_v4([one, one], limit=10.0).w13.dequantize()
    )


def test_deepseek_v4_of_a_rank_without_experts():
    sizes = {"hidden_size": H, "intermediate_size": INNER}
    none = from_deepseek_v4([], limit=10.0, **sizes)
    some = from_deepseek_v4([tensors(deepseek(0))], limit=10.0, **sizes)
    for ours, theirs in ((none.w13, some.w13), (none.w2, some.w2)):
        assert ours.payload.shape == (0, *theirs.payload.shape[1:])
        assert (ours.format, ours.scales.shape) == ("mxfp4", (0, *theirs.scales.shape[1:]))
    assert (none.activation, none.hidden_size) == (some.activation, H)
    none.check_fits(Spec(2, 1, 1, H, 4), 1)  # rank 0 owns the only expert
    for given in ({}, {"hidden_size": H}, {"intermediate_size": INNER}):
        with pytest.raises(PayloadError, match="empty: hidden_size and intermediate_size"):
            from_deepseek_v4([], limit=10.0, **given)
    for name in sizes:
        for wrong in (0, -32, 48, True, 64.0, "64"):
            with pytest.raises(GeometryError, match=f"{name}=.*positive multiple of 32"):
                from_deepseek_v4([], limit=10.0, **(sizes | {name: wrong}))
        with pytest.raises(GeometryError, match=f"{name}=96: the tensors have {sizes[name]}"):
            from_deepseek_v4([tensors(deepseek(0))], limit=10.0, **{name: 96})


def test_e8m0_bytes_are_exact_or_refused():
    codes = np.arange(255)
    powers = torch.from_numpy(np.ldexp(1.0, codes - 127).astype(np.float32))
    assert e8m0_bytes(powers.view(5, 51)).flatten().tolist() == codes.tolist()
    two = np.float32(2)
    for wrong in (0.0, -0.0, -1.0, 3.0, math.nan, math.inf, 1e-40, 2.0**-128, 448.0,
                  np.nextafter(two, np.float32(3)), np.nextafter(two, np.float32(1))):  # fmt: skip
        with pytest.raises(PayloadError, match=r"scales\[0, 1\] is .*powers of two"):
            e8m0_bytes(torch.tensor([[1.0, float(wrong)]]))
    with pytest.raises(PayloadError, match="bfloat16"):
        e8m0_bytes(powers.bfloat16())
    with pytest.raises(PayloadError, match=r"scales is float32 \[255\] on meta: expected"):
        e8m0_bytes(powers.to("meta"))


@pytest.mark.parametrize("act", [SILU, GPT_OSS, deepseek_v4(3.5), Activation(0.5, -2.0, 1.0)])
def test_activation(act):
    rng = np.random.default_rng(3)
    gate_up = np.concatenate([rng.standard_normal((50, 64)) * 8, [[-30.0, 30.0] * 32]])
    gate_up = gate_up.astype(np.float32)
    layer = oracle.Layer(None, None, alpha=act.alpha, beta=act.beta, limit=act.limit)
    got = act(torch.from_numpy(gate_up))
    assert got.shape == (51, 32)
    np.testing.assert_allclose(
        got, oracle.activation(layer, gate_up.astype(np.float64)), rtol=2e-6, atol=1e-9
    )


def test_activation_specials_and_refusals():
    odd = torch.tensor([[math.nan, 1.0, 1.0, math.nan, -50.0, 100.0]])
    got = GPT_OSS(odd[:, [0, 1, 4, 2, 3, 5]])
    assert got.isnan().tolist() == [[True, True, False]]
    assert GPT_OSS(torch.tensor([[9.0, 9.0]])) == GPT_OSS(torch.tensor([[7.0, 7.0]]))
    assert GPT_OSS(torch.tensor([[-9.0, -9.0]])) != GPT_OSS(torch.tensor([[-7.0, -7.0]]))
    for wrong in ({"limit": 0.0}, {"limit": math.nan}, {"alpha": math.inf}, {"beta": "1"}):
        with pytest.raises(GeometryError, match=next(iter(wrong))):
            Activation(**wrong)
    for wrong in (10**400, -(10**400), 1e300):
        for name in ("alpha", "beta", "limit"):
            with pytest.raises(GeometryError, match=f"{name}=.*must be finite in fp32"):
                Activation(**{name: wrong})
        with pytest.raises(GeometryError, match="limit="):
            deepseek_v4(wrong)
    assert Activation(2**70, 1, 2**70)(torch.ones(1, 2)).item() == 2.0
    for wrong in ([1.0], None, torch.zeros(2, 2).to_sparse()):
        with pytest.raises(PayloadError, match=r"gate_up is .*expected a dense tensor"):
            SILU(wrong)
    for wrong in (torch.zeros(1, 3), torch.zeros(1, 4).bfloat16()):
        with pytest.raises(PayloadError, match=r"float32 \[n, 2I\]"):
            SILU(wrong)
