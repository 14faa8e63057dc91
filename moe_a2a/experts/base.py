"""What an expert backend is: a callable from received rows to the rows that combine takes.

Shape letters: H hidden_size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

from moe_a2a.errors import PayloadError
from moe_a2a.received import Received
from moe_a2a.wording import describe

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.experts.weights import ExpertWeights
    from moe_a2a.grouped import Grouped
    from moe_a2a.spec import Spec

__all__ = [
    "PLAIN_OUTPUTS",
    "Experts",
    "GroupsRows",
    "Held",
    "check_call",
    "output_dtype",
    "rows_dtype",
    "wire_misfit",
]

# By combine wire; quantized ones return what they are given.
PLAIN_OUTPUTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Experts(Protocol):
    """The experts of one rank.

    Attributes:
        name: in the table of backends.
        device_types: of the tensors that it computes with.
        accepts: wires whose rows it takes as they arrive.
        expects_unquantized_inputs: it quantizes by itself, so that on a quantized wire `prepare`
            has to defer (``defer_input_quant=experts.expects_unquantized_inputs``).
        invalid_expert_id: what it wants padding rows and choices that route nowhere to have:
            the Spec's, where it takes any.
        hidden_dim_unpadded: columns of its output: H, however wide rows and weights are padded.
        spec: of the exchange whose rows it takes.
        weights: what says whether they are as many as a rank owns.
    """

    name: ClassVar[str]
    device_types: ClassVar[tuple[str, ...]]
    accepts: ClassVar[tuple[str, ...]]
    expects_unquantized_inputs: ClassVar[bool]
    invalid_expert_id: int
    hidden_dim_unpadded: int

    def __init__(self, spec: Spec, device: torch.device | str, weights: ExpertWeights) -> None:
        """Raises:
        GeometryError: weights that don't fit the Spec.
        PayloadError: weights on another device.
        """

    @staticmethod
    def unusable(
        spec: Spec | None, device: torch.device, weights: ExpertWeights | None
    ) -> str | None:
        """Why it can't be used, None where it can: what the attributes above don't say already.

        The machine is asked first (versions, compute capability), so that the answer means
        something without a Spec and without weights too.
        """

    def __call__(self, recv: Received, *, out: Tensor | None = None) -> Tensor:
        """y [W, R, H] of a dispatch, the router weights applied, in `output_dtype`.

        A row is the sum over its token's choices of experts here, in fp32 from +0.0, ascending by
        expert, then choice, product and add unfused, rounded once. What is summed may have been
        rounded to `rows_dtype` before. Rows without such a choice,
        padding among them, are zeros, whatever they held.

        Args:
            out: [W, R, H] bf16, fp16 or fp32 to write to, ``a2a.combine_buffer()`` for one.

        Raises:
            PayloadError: rows of another Spec, or an ``out`` that doesn't fit.
            GeometryError: weights of another number of experts than the receiving rank owns.
        """


class GroupsRows(Experts, Protocol):
    """Experts that can leave the weighted sum to `AllToAll.combine_grouped`."""

    def grouped_rows(self, recv: Received) -> tuple[Tensor, Grouped]:
        """Rows [N, H] in `rows_dtype`, not weighted, in the order of ``recv.group()``; and that.

        Raises:
            As `Experts.__call__`.
        """


class Held(Protocol):
    """What a call is checked against: `ExpertWeights`, or what a backend made of them."""

    @property
    def device(self) -> torch.device: ...

    def check_fits(self, spec: Spec, ep_rank: int | None = None) -> None: ...


def output_dtype(spec: Spec) -> torch.dtype:
    """What experts return without ``out``: the combine wire's dtype, bf16 if that is quantized."""
    return PLAIN_OUTPUTS.get(spec.combine_wire, torch.bfloat16)


def rows_dtype(output: torch.dtype) -> torch.dtype:
    """Of rows that are weighted and added to such an output.

    bf16 sums are as coarse as bf16 rows; fp16's range could be left by a row whose weighted sum
    stays in it.
    """
    return torch.bfloat16 if output == torch.bfloat16 else torch.float32


def wire_misfit(experts: object, spec: Spec) -> str | None:
    """Why rows of that exchange can't be their input, None where they can.

    ``experts``: a backend, or its class; what doesn't say what it accepts takes anything.
    """
    arriving = spec.wire
    if getattr(experts, "expects_unquantized_inputs", False) and spec.quantized:
        if not spec.allow_defer:
            return (
                f"quantizes by itself, and wire {spec.wire} arrives quantized: open with "
                "Spec(allow_defer=True) and defer"
            )
        arriving = "bf16"
    accepts: tuple[str, ...] = getattr(experts, "accepts", (arriving,))
    if arriving not in accepts:
        return f"takes rows of wire {'/'.join(accepts)}, not {arriving}"
    return None


def check_call(spec: Spec, recv: object, weights: Held, out: object) -> Received:
    """Raises what `Experts.__call__` documents.

    Returns:
        ``recv``.
    """
    if not isinstance(recv, Received):
        raise PayloadError(f"recv is {describe(recv)}: expected what dispatch returned")
    if recv.spec != spec:
        raise PayloadError(f"recv is of {recv.spec}: these experts are for {spec}")
    weights.check_fits(spec, recv.ep_rank)
    if recv.x.device != weights.device:
        raise PayloadError(f"recv.x is on {recv.x.device}: the weights are on {weights.device}")
    if out is None:
        return recv
    shape = (spec.ep_size, recv.x.shape[1], spec.hidden_size)
    good = (
        isinstance(out, torch.Tensor)
        and not out.is_nested
        and out.shape == shape
        and out.dtype in PLAIN_OUTPUTS.values()
        and out.device == recv.x.device
    )
    if not good:
        raise PayloadError(
            f"out is {describe(out)}: expected bfloat16, float16 or float32 {list(shape)} on "
            f"{recv.x.device}"
        )
    return recv
