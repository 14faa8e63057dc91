"""Mixture-of-Experts dispatch and combine between expert-parallel ranks, quantized on the way."""

from moe_a2a import errors, formats
from moe_a2a.alltoall import AllToAll
from moe_a2a.grouped import Grouped
from moe_a2a.moe_layer import MoELayer
from moe_a2a.prepare_finalize import Prepared, PrepareFinalize
from moe_a2a.received import Received
from moe_a2a.spec import Spec

__version__ = "0.1.0"
__all__ = [
    "AllToAll",
    "Grouped",
    "MoELayer",
    "PrepareFinalize",
    "Prepared",
    "Received",
    "Spec",
    "errors",
    "formats",
]
