"""Experts: what consumes the rows of a dispatch and makes those of a combine.

One file per backend, one line each in the table `EXPERTS`; docs/experts.md says which there are,
what they take and how weights are loaded.
"""

from moe_a2a.experts.activation import GPT_OSS, SILU, Activation, deepseek_v4
from moe_a2a.experts.base import Experts
from moe_a2a.experts.checkpoints import e8m0_bytes, from_deepseek_v4, from_gpt_oss
from moe_a2a.experts.input_scale import shared_encode_scale
from moe_a2a.experts.matrix import WEIGHT_FORMATS, ExpertMatrix
from moe_a2a.experts.padding import padded
from moe_a2a.experts.selection import EXPERTS, explain, load, reasons, select
from moe_a2a.experts.weights import ExpertWeights

__all__ = [
    "EXPERTS",
    "GPT_OSS",
    "SILU",
    "WEIGHT_FORMATS",
    "Activation",
    "ExpertMatrix",
    "ExpertWeights",
    "Experts",
    "deepseek_v4",
    "e8m0_bytes",
    "explain",
    "from_deepseek_v4",
    "from_gpt_oss",
    "load",
    "padded",
    "reasons",
    "select",
    "shared_encode_scale",
]
