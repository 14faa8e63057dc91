"""A rival's round on the GPU against the oracle, compared on the CPU.

Shape letters: H hidden_size; n rows that a dispatch delivers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_a2a.bench.check import CheckFailed, Oracle, same_bytes

if TYPE_CHECKING:
    from moe_a2a.bench.rivals_cuda import DeviceRival

__all__ = ["check_rival", "order_of"]

_KEY = 64  # bytes of a row that tell it from every other: its values are random


def check_rival(rival: DeviceRival, oracle: Oracle) -> None:
    """One round.

    Raises:
        CheckFailed: a row or a scale is missing or wrong, or the output is off.
    """
    where = f"{rival.name}, {oracle.label}: on rank {oracle.rank}"
    delivered = rival.dispatch()
    rows = delivered.cpu()
    here = rival.here().cpu()
    expected = torch.cat([source.x for source in oracle.received])
    if not rival.ordered:
        here = here[_order(expected, rows[here], oracle, where)]
    same_bytes("payload", expected, rows[here], where)
    scales = rival.scales()
    if scales is not None:
        wanted = [source.scales for source in oracle.received]
        parts = [part for part in wanted if part is not None]
        same_bytes("scales", torch.cat(parts), scales.cpu()[here], where)
    outputs = [oracle.output_of(source, oracle.rank) for source in oracle.received]
    y = torch.zeros(rows.shape[0], oracle.spec.hidden_size, dtype=torch.bfloat16)
    y[here] = torch.cat(outputs).to(torch.bfloat16)
    rival.stage(y.to(delivered.device))
    rival.combine()
    out = rival.output().cpu()
    if rival.exact:
        same_bytes("out", oracle.combined, out, where)
        return
    lossy = oracle.spec.combine_wire not in ("bf16", "fp16", "fp32")
    relative, absolute = (2**-3, 2**-1) if lossy else (2**-6, 2**-4)
    if not torch.allclose(oracle.combined.float(), out.float(), relative, absolute):
        off = (oracle.combined.float() - out.float()).abs().max()
        raise CheckFailed(f"{where}: the output is off by up to {float(off):g}")


def _order(expected: Tensor, given: Tensor, oracle: Oracle, where: str) -> Tensor:
    """Which row of ``given`` is each row of ``expected``, source by source."""
    order, first = [], 0
    for source, rows in enumerate(oracle.received):
        part = slice(first, first + rows.x.shape[0])
        found = order_of(expected[part], given[part])
        if found is None:
            raise CheckFailed(f"{where}, source {source}: rows of it are missing or wrong")
        order.append(found + first)
        first = part.stop
    return torch.cat(order)


def order_of(expected: Tensor, given: Tensor) -> Tensor | None:
    """int64 [n] with ``given[order]`` in the order of ``expected`` [n, row]; None if a row is new.

    Rows are told apart by their first bytes.
    """
    places = {key: place for place, key in enumerate(_keys(given))}
    found = [places.get(key) for key in _keys(expected)]
    known = [place for place in found if place is not None]
    if len(known) < len(found) or len(places) < len(found):
        return None
    return torch.tensor(known, dtype=torch.int64)


def _keys(rows: Tensor) -> list[bytes]:
    return [bytes(row.tolist()) for row in rows.contiguous().view(torch.uint8)[:, :_KEY]]
