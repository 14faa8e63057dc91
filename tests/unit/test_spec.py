"""Spec: the rules of the geometry, and the bytes that follow from it."""

from __future__ import annotations

import dataclasses
import pickle
from itertools import product

import pytest

from moe_a2a import Spec
from moe_a2a.errors import GeometryError, MoeA2AError
from moe_a2a.spec import COMBINE_WIRES
from tests.oracle_formats import WIRES

GOOD = {
    "ep_size": 4,
    "num_experts": 8,
    "top_k": 2,
    "hidden_size": 256,
    "max_tokens_per_rank": 16,
}


RULES = [
    *(({name: 0}, (name, "0", ">= 1")) for name in GOOD),
    *(({name: 2.0}, (name, "2.0", "integer")) for name in GOOD),
    ({"num_experts": True}, ("num_experts", "True")),
    ({"ep_size": "4"}, ("ep_size", "'4'")),
    ({"top_k": 9}, ("top_k", "9", "num_experts (8)")),
    ({"top_k": 33, "num_experts": 64}, ("top_k", "33", "32")),
    ({"hidden_size": 24}, ("hidden_size", "24", "16")),
    ({"hidden_size": 48, "wire": "mxfp4"}, ("hidden_size", "48", "32", "mxfp4")),
    ({"hidden_size": 192, "wire": "fp8_block128"}, ("192", "128", "fp8_block128")),
    ({"hidden_size": 48, "combine_wire": "mxfp8"}, ("48", "32", "combine_wire")),
    ({"hidden_size": 64, "combine_wire": "fp8_block128"}, ("64", "128", "combine_wire")),
    ({"wire": "fp32"}, ("wire", "fp32", "nvfp4")),
    ({"wire": None}, ("wire", "None")),
    ({"combine_wire": "nvfp4"}, ("combine_wire", "nvfp4", "mxfp8")),
    ({"invalid_expert_id": 7}, ("invalid_expert_id", "7")),
    ({"invalid_expert_id": 0}, ("invalid_expert_id", "0")),
    ({"invalid_expert_id": 2**31}, ("invalid_expert_id", str(2**31))),
    ({"invalid_expert_id": None}, ("invalid_expert_id", "None")),
    ({"scrub": "rows"}, ("scrub", "rows", "ids", "all")),
    ({"alignment": 48}, ("alignment", "48", "32")),
    ({"alignment": 0}, ("alignment", "0")),
    ({"allow_defer": 1}, ("allow_defer", "1")),
    ({"extra": {"id": 0}}, ("extra", "id", "0", ">= 1")),
    ({"extra": {"id": 1.5}}, ("extra", "id", "1.5")),
    ({"extra": {"": 4}}, ("extra", "''")),
    ({"extra": {3: 4}}, ("extra", "3")),
    ({"extra": None}, ("extra", "None")),
    ({"extra": ["id"]}, ("extra", "id")),
    ({"num_eplb_experts": -1}, ("num_eplb_experts", "-1")),
    ({"max_tokens_per_rank": 2**31}, ("max_tokens_per_rank", str(2**31))),
]


def test_bad_geometry_names_argument_value_and_rule():
    for change, texts in RULES:
        with pytest.raises(GeometryError) as caught:
            print(Spec(**GOOD | change))
        for text in texts:
            assert text in str(caught.value), (change, text, str(caught.value))


def test_limits_are_legal():
    Spec(**GOOD | {"num_experts": 2, "top_k": 2})  # fewer experts than ranks
    Spec(**GOOD | {"num_experts": 32, "top_k": 32, "hidden_size": 16})
    Spec(**GOOD | {"invalid_expert_id": 8})
    Spec(**GOOD | {"hidden_size": 2880, "wire": "mxfp8", "alignment": 256})


@pytest.mark.parametrize(
    ("wire", "payload", "scales"),
    [
        ("bf16", 14336, 0),
        ("fp16", 14336, 0),
        ("fp8", 7168, 4),
        ("fp8_block128", 7168, 224),
        ("mxfp8", 7168, 224),
        ("nvfp4", 3584, 448),
        ("mxfp4", 3584, 224),
    ],
)
def test_bytes_of_a_row(wire, payload, scales):
    assert Spec(**GOOD | {"hidden_size": 7168, "wire": wire}).row_bytes == (payload, scales)


def test_mxfp8_rows_are_padded_to_the_alignment():
    spec = Spec(**GOOD | {"hidden_size": 2880, "wire": "mxfp8", "alignment": 256})
    assert spec.row_bytes == (3072, 96)


def test_frozen_hashable_picklable_and_independent_of_the_caller():
    extra = {"b": 2, "a": 1}
    spec = Spec(**GOOD, extra=extra)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.top_k = 3
    extra["b"] = 7
    assert dict(spec.extra) == {"a": 1, "b": 2}
    assert spec == Spec(**GOOD, extra={"a": 1, "b": 2})
    assert hash(spec) == hash(Spec(**GOOD, extra={"a": 1, "b": 2}))
    copy = pickle.loads(pickle.dumps(spec))
    assert copy == spec
    assert copy.workspace() == spec.workspace()


def test_geometries_too_large_for_64_bits_do_not_wrap_around():
    large = {"ep_size": 64, "max_tokens_per_rank": 2**31 - 1}
    for hidden, alignment in ((2**12, 32), (2**24, 32), (2**40, 32), (2**60, 32), (256, 2**58)):
        for wire, combine_wire in product(WIRES, COMBINE_WIRES):
            odd = large | {"hidden_size": hidden, "alignment": alignment}
            try:
                spec = Spec(**GOOD | odd, wire=wire, combine_wire=combine_wire)
                nbytes = spec.workspace_bytes()
            except MoeA2AError:
                continue
            assert nbytes > 64 * (2**31 - 1) * sum(spec.row_bytes), (spec, nbytes)
