"""``plan``: memory and link bytes of a geometry, worked out without starting a rank.

Shape letters: K top_k, H hidden_size, E num_experts, W ep_size.
"""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING, NamedTuple

from moe_a2a.bench.cases import Geometry, UsageError, misfit, spec_of
from moe_a2a.bench.table import print_table
from moe_a2a.errors import GeometryError
from moe_a2a.formats import FORMATS

if TYPE_CHECKING:
    from moe_a2a.spec import Spec

__all__ = ["LinkBytes", "distinct_ranks", "link_bytes", "print_plan"]


class LinkBytes(NamedTuple):
    """Bytes of one token on its way to one rank; ``reason`` says why a wire does not fit."""

    wire: str
    payload: int
    scales: int
    choices: int  # ids and weights
    reason: str | None

    @property
    def total(self) -> int:
        return self.payload + self.scales + self.choices


def link_bytes(geometry: Geometry) -> list[LinkBytes]:
    """One entry per wire format, in the order of the formats' table."""
    found = []
    for wire in FORMATS:
        reason = misfit(geometry, wire)
        if reason is not None:
            found.append(LinkBytes(wire, 0, 0, 0, reason))
            continue
        payload, scales = spec_of(geometry, 1, 1, wire, "bf16").row_bytes
        found.append(LinkBytes(wire, payload, scales, 8 * geometry.top_k, None))
    return found


def distinct_ranks(geometry: Geometry, ep_size: int) -> float:
    """Expected number of ranks that a token goes to, its K distinct experts drawn uniformly."""
    experts, top_k = geometry.num_experts, geometry.top_k
    base, more = divmod(experts, ep_size)
    owned = [base + (rank < more) for rank in range(ep_size)]
    return sum(1 - comb(experts - own, top_k) / comb(experts, top_k) for own in owned)


def print_plan(
    geometry: Geometry, *, ep_size: int, tokens: int, wire: str, combine_wire: str, per_host: int
) -> None:
    """Prints the workspace of ``wire`` and the link bytes of all wires.

    Args:
        tokens: max_tokens_per_rank.
        per_host: ranks that share a host.

    Raises:
        UsageError: the geometry breaks a rule.
    """
    try:
        spec = spec_of(geometry, ep_size, tokens, wire, combine_wire)
    except GeometryError as error:
        raise UsageError(str(error)) from None
    print(
        f"{geometry.name}: hidden {geometry.hidden_size}, top-{geometry.top_k} of "
        f"{geometry.num_experts} experts, {ep_size} ranks, up to {tokens} tokens per rank, "
        f"wire {wire}, combine wire {combine_wire}\n"
    )
    _print_workspace(spec, per_host)
    _print_link(geometry, ep_size)


def _print_workspace(spec: Spec, per_host: int) -> None:
    table = spec.workspace()
    rows = [[name, f"{offset:,}", f"{nbytes:,}"] for name, offset, nbytes in table]
    rows += [[], ["total per rank", "", f"{table.nbytes:,}"]]
    ranks = min(per_host, spec.ep_size)
    rows.append([f"total per host ({ranks} ranks)", "", f"{ranks * table.nbytes:,}"])
    print_table("workspace, bytes per rank", ("region", "offset", "bytes"), rows)
    print(
        f"A CPU backend takes {table.committed:,} of them (the inboxes are never touched there).\n"
    )


def _print_link(geometry: Geometry, ep_size: int) -> None:
    rows, reasons = [], []
    reference = next(entry for entry in link_bytes(geometry) if entry.wire == "bf16")
    for entry in link_bytes(geometry):
        if entry.reason is not None:
            rows.append([entry.wire, *["-"] * 6])
            reasons.append(f"{entry.wire} does not fit: {entry.reason}")
            continue
        numbers = [entry.payload, entry.scales, entry.payload + entry.scales, entry.choices]
        ratio = f"{entry.total / reference.total:.3f}"
        rows.append([entry.wire, *(f"{n:,}" for n in [*numbers, entry.total]), ratio])
    header = ("wire", "payload", "scales", "row", "ids+weights", "total", "to bf16")
    print_table("dispatch, bytes per token and rank on the link", header, rows)
    for reason in reasons:
        print(reason)
    ranks = distinct_ranks(geometry, ep_size)
    elsewhere = ranks * (ep_size - 1) / ep_size
    print(
        f"\nWith uniform routing a token goes to {ranks:.3f} of {ep_size} ranks on average, "
        f"{elsewhere:.3f} of them other than its own: multiply by that for the bytes that leave a "
        "rank."
    )
