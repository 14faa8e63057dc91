"""Rounds whose inputs and expected outcome lie on the device already, compared there.

Nothing here waits for the device, so that ranks run ahead of each other as far as the exchange lets
them, and graphs can be replayed round after round.

T tokens of a rank, K top_k, H hidden_size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tests.collective import rounds

if TYPE_CHECKING:
    from moe_a2a import AllToAll, Received
    from tests.collective.rounds import Case, Round

PARTS = ("counts", "topk_ids", "topk_weights", "payload", "scales", "extra", "combine")
AHEAD = 8  # rounds that a host thread enqueues before it waits for the device


class Prepared:
    """One round of one rank."""

    def __init__(self, case: Case, rnd: Round, rank: int, device: torch.device) -> None:
        tokens = [rounds.tokens_of(case, rnd, peer) for peer in range(case.size)]
        want = rounds.expected(case, rnd, rank, tokens)
        self.rnd, self.device = rnd, device
        self.call = rounds.call_of(case, rnd, tokens[rank], device)
        self.y = rounds.answers(case, rnd, rank, want.counts.tolist()).to(device)
        self._real = torch.from_numpy(want.real()).to(device)[..., None]
        self._covered = torch.ones_like(self._real) if _scrubbed(case) else self._real
        self._counts = self._bytes(want.counts)
        self._ids, self._weights = self._bytes(want.ids), self._bytes(want.weights)
        self._payload = self._bytes(want.payload)
        unquantized = case.unquantized or rnd.defer
        self._scales = None if unquantized else self._bytes(want.scales)
        self._extra = {name: self._bytes(rows) for name, rows in want.extra.items()}
        sums = rounds.sums_of(case, rnd, rank, tokens[rank])
        self.sums = rounds.floats(sums.astype(np.float32), rounds.output_dtype(case, rnd))
        self.sums = self.sums.to(device)

    def _bytes(self, array: np.ndarray) -> torch.Tensor:
        return raw(rounds.from_numpy(np.ascontiguousarray(array)).to(self.device))

    def wrong_delivery(self, recv: Received) -> torch.Tensor:
        """bool [6] on the device, by `PARTS`."""
        whole, real = self._covered, self._real
        nothing = torch.zeros((), dtype=torch.bool, device=self.device)
        extra = [
            ((raw(recv.extra[name]) != rows) & real).any() for name, rows in self._extra.items()
        ]
        scales = nothing
        if self._scales is not None:
            scales = ((raw(recv.scales) != self._scales) & whole).any()
        found = [
            (raw(recv.counts) != self._counts).any(),
            (raw(recv.topk_ids) != self._ids).any(),
            (raw(recv.topk_weights) != self._weights).any(),
            ((raw(recv.x) != self._payload) & whole).any(),
            scales,
            torch.stack(extra).any() if extra else nothing,
        ]
        return torch.stack(found)

    def wrong_sums(self, out: torch.Tensor) -> torch.Tensor:
        """bool [1]: other bits than the payload of NaN."""
        integer = torch.int32 if out.dtype == torch.float32 else torch.int16
        differ = out.view(integer) != self.sums.view(integer)
        return (differ & ~(out.isnan() & self.sums.isnan())).any()[None]


def _scrubbed(case: Case) -> bool:
    return case.more.get("scrub") == "all"


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n]"""
    return tensor.contiguous().view(torch.uint8)


class Log:
    """What was wrong in each of many rounds, kept on the device until `check`."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._wrong = torch.zeros(count, len(PARTS), dtype=torch.bool, device=device)
        self._played: list[str] = []

    def note(self, what: str, delivery: torch.Tensor, sums: torch.Tensor) -> None:
        self._wrong[len(self._played)] = torch.cat([delivery, sums])
        self._played.append(what)

    def check(self) -> None:
        """Waits for the device.

        Raises:
            AssertionError: with the first round that was wrong, and how many were.
        """
        wrong = self._wrong[: len(self._played)].cpu()
        bad = wrong.any(1).nonzero()[:, 0].tolist()
        if bad:
            parts = [name for name, flag in zip(PARTS, wrong[bad[0]].tolist(), strict=True) if flag]
            later = ", ".join(f"{n} ({self._played[n]})" for n in bad[1:5])
            raise AssertionError(
                f"{len(bad)} of {len(wrong)} rounds are wrong; the first is number {bad[0]}, "
                f"{self._played[bad[0]]}: {', '.join(parts)}" + (f"; then {later}" * bool(later))
            )


def play(a2a: AllToAll, prepared: Prepared, log: Log, what: str = "") -> None:
    """A round with nothing but launches."""
    recv = a2a.dispatch(**prepared.call)
    delivery = prepared.wrong_delivery(recv)
    out = a2a.combine(prepared.y)
    log.note(what or str(prepared.rnd), delivery, prepared.wrong_sums(out))


def keep_up(number: int) -> None:
    """Waits for the device now and then.

    A launch blocks once some 1000 are in the queue; a rank that held the interpreter meanwhile
    would keep its peers from launching what its own kernels wait for.
    """
    if number % AHEAD == AHEAD - 1:
        torch.cuda.current_stream().synchronize()
