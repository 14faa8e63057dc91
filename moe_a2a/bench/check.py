"""The oracle: what every byte of a round must be, from the inputs of all ranks.

Plain torch and the definitions of the design; no code of the backends. Only the arithmetic of the
numeric formats is `moe_a2a.formats`, which has oracles of its own in the tests.

Shape letters: T tokens of a rank, K top_k, H hidden_size, E num_experts, W ep_size,
R runtime_max_tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_a2a import formats
from moe_a2a.bench.inputs import Inputs, global_scale_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_a2a.spec import Spec

__all__ = ["CheckFailed", "Oracle", "SourceRows", "destinations", "expert_output", "same_bytes"]

_CONTEXT = 8  # bytes shown from the first wrong one on


class CheckFailed(Exception):
    """A byte is wrong; the text says which."""


class SourceRows(NamedTuple):
    """The rows that one source sends to one rank, n of them, in the source's order.

    Attributes:
        x: [n, row] in the wire's storage dtype.
        scales: [n, s] or None.
        topk_ids: int32 [n, K], the invalid id where a choice routes nowhere.
        topk_weights: float32 [n, K], 0 there.
    """

    x: Tensor
    scales: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor


def destinations(topk_ids: Tensor, num_experts: int, ep_size: int) -> Tensor:
    """bool [T, W]: whether a token has an expert on a rank. topk_ids: int [T, K]."""
    base, more = divmod(num_experts, ep_size)
    goes = torch.zeros(topk_ids.shape[0], ep_size, dtype=torch.bool)
    first = 0
    for rank in range(ep_size):
        end = first + base + (rank < more)
        goes[:, rank] = ((topk_ids >= first) & (topk_ids < end)).any(1)
        first = end
    return goes


def expert_output(rows: Tensor, topk_ids: Tensor, rank: int) -> Tensor:
    """What the experts of ``rank`` make of rows in this benchmark: float32 [n, H].

    Depends on the row, on its ids and on the rank, and every operation is exact or rounds once, so
    that it comes out the same wherever it is computed.
    """
    factor = 1 + (topk_ids.sum(1, keepdim=True) % 13).to(torch.float32) / 16
    return rows.to(torch.float32) * factor + (rank + 1) / 8


def same_bytes(region: str, expected: Tensor, given: Tensor, where: str) -> None:
    """Compares [n, width] row by row, byte by byte.

    Raises:
        CheckFailed: region, row, byte, and the bytes expected and given.
    """
    if expected.shape != given.shape or expected.dtype != given.dtype:
        raise CheckFailed(
            f"{where}, {region}: {given.dtype} {list(given.shape)} given, expected "
            f"{expected.dtype} {list(expected.shape)}"
        )
    if not expected.numel():
        return
    wanted = expected.contiguous().view(torch.uint8)
    got = given.contiguous().view(torch.uint8)
    if torch.equal(wanted, got):
        return
    row, byte = (int(n) for n in (wanted != got).nonzero()[0])
    wrong = int((wanted != got).sum())
    shown = slice(byte, byte + _CONTEXT)
    raise CheckFailed(
        f"{where}, row {row}, region {region}, byte {byte}: expected {_hex(wanted[row, shown])}, "
        f"given {_hex(got[row, shown])} ({wrong} bytes of {wanted.numel()} differ)"
    )


def _hex(values: Tensor) -> str:
    return " ".join(f"{int(byte):02x}" for byte in values)


class Oracle:
    """One round, as ``rank`` must see it.

    Args:
        inputs: of every rank, by rank.
        label: what ran, for the messages.
    """

    def __init__(self, spec: Spec, rank: int, inputs: Sequence[Inputs], label: str) -> None:
        self.spec, self.rank, self.label = spec, rank, label
        self._own = inputs[rank]
        self._goes = [destinations(i.topk_ids, spec.num_experts, spec.ep_size) for i in inputs]
        self.received = [
            self._rows(source, self._goes[s][:, rank]) for s, source in enumerate(inputs)
        ]
        self.combined = self._combine()

    @property
    def rows_between(self) -> Tensor:
        """int64 [W, W]: rows from source (first) to destination (second)."""
        return torch.stack([goes.sum(0) for goes in self._goes])

    def _rows(self, source: Inputs, goes: Tensor) -> SourceRows:
        spec, ids = self.spec, source.topk_ids[goes]
        nowhere = (ids < 0) | (ids >= spec.num_experts)
        payload, scales = formats.quantize(
            source.x[goes],
            spec.wire,
            alignment=spec.alignment,
            global_scale=global_scale_of(spec.wire),
        )
        return SourceRows(
            payload,
            scales,
            ids.masked_fill(nowhere, spec.invalid_expert_id),
            source.topk_weights[goes].masked_fill(nowhere, 0.0),
        )

    def output_of(self, rows: SourceRows, rank: int) -> Tensor:
        """The experts' output for rows as they are on the wire: [n, H] in y's dtype."""
        spec = self.spec
        values = formats.dequantize(
            rows.x,
            rows.scales,
            spec.wire,
            hidden_size=spec.hidden_size,
            global_scale=global_scale_of(spec.wire),
        )
        dtypes = {"fp16": torch.float16, "fp32": torch.float32}
        dtype = dtypes.get(spec.combine_wire, torch.bfloat16)
        return expert_output(values, rows.topk_ids, rank).to(dtype)

    def expert_outputs(self, rows: int) -> Tensor:
        """``y`` [W, R, H] of this rank; NaN in rows that combine must not read."""
        parts = [self.output_of(source, self.rank) for source in self.received]
        shape = (self.spec.ep_size, rows, self.spec.hidden_size)
        y = torch.full(shape, float("nan"), dtype=parts[0].dtype)
        for source, part in enumerate(parts):
            y[source, : part.shape[0]] = part
        return y

    def _combine(self) -> Tensor:
        """[T, H]: the fp32 sum in rank order from +0.0, rounded once."""
        goes, spec = self._goes[self.rank], self.spec
        total = torch.zeros(goes.shape[0], spec.hidden_size)
        dtype = total.dtype
        for rank in range(spec.ep_size):
            sent = goes[:, rank]
            y = self.output_of(self._rows(self._own, sent), rank)
            dtype, arrived = y.dtype, y.float()
            if spec.combine_wire not in ("bf16", "fp16", "fp32"):
                payload, scales = formats.quantize(y, spec.combine_wire)
                arrived = formats.dequantize(payload, scales, spec.combine_wire)
                arrived = arrived[:, : spec.hidden_size]
            total[sent] = total[sent] + arrived
        return total.to(dtype)

    def check_received(
        self,
        x: Tensor,
        scales: Tensor | None,
        topk_ids: Tensor,
        topk_weights: Tensor,
        counts: Tensor,
    ) -> None:
        """Compares what a dispatch delivered, shapes as in `Received`.

        Raises:
            CheckFailed: rank, source, row, region, expected and given bytes.
        """
        where = f"{self.label}: on rank {self.rank}"
        expected = torch.tensor([r.topk_ids.shape[0] for r in self.received], dtype=torch.int32)
        same_bytes("counts", expected.unsqueeze(1), counts.unsqueeze(1), f"{where}, source = row")
        for source, rows in enumerate(self.received):
            count = int(counts[source])
            at = f"{where}, source {source}"
            same_bytes("payload", rows.x, x[source, :count], at)
            if rows.scales is not None:
                if scales is None:
                    raise CheckFailed(f"{at}: no scales were given, wire {self.spec.wire} has some")
                same_bytes("scales", rows.scales, scales[source, :count], at)
            same_bytes("topk_ids", rows.topk_ids, topk_ids[source, :count], at)
            same_bytes("topk_weights", rows.topk_weights, topk_weights[source, :count], at)
            at += f", padding behind {count} rows"
            padding = topk_ids[source, count:]
            invalid = torch.full_like(padding, self.spec.invalid_expert_id)
            same_bytes("topk_ids", invalid, padding, at)
            weights = topk_weights[source, count:]
            same_bytes("topk_weights", torch.zeros_like(weights), weights, at)

    def check_combined(self, out: Tensor) -> None:
        """Compares what a combine returned, [T, H].

        Raises:
            CheckFailed: rank, row (a token of this rank), expected and given bytes.
        """
        where = f"{self.label}: combine on rank {self.rank}"
        same_bytes("out", self.combined, out, where)
