"""Which experts the tokens of a rank choose: drawn from a seed, or recorded from a model.

Shape letters: T tokens of this rank, N recorded tokens, K top_k, E num_experts.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe_a2a.bench.cases import Geometry, UsageError

__all__ = ["DISTRIBUTIONS", "Choices", "Recorded", "draw", "load_recorded"]

DISTRIBUTIONS = ("uniform", "zipf", "hotspot")
_HOT_SHARE, _HOT_FACTOR = 16, 16.0  # a sixteenth of the experts, sixteen times as likely


class Choices(NamedTuple):
    """topk_ids: int32 [T, K], -1 routes nowhere. topk_weights: float32 [T, K]."""

    topk_ids: Tensor
    topk_weights: Tensor


class Recorded(NamedTuple):
    """A file's first K choices. topk_ids: int32 [N, K]. topk_weights: float32 [N, K]."""

    topk_ids: Tensor
    topk_weights: Tensor

    def slice_of(self, rank: int, tokens: int) -> Choices:
        """``tokens`` consecutive rows; rank after rank, starting over at the end of the file."""
        rows = (torch.arange(tokens) + rank * tokens) % self.topk_ids.shape[0]
        return Choices(self.topk_ids[rows], self.topk_weights[rows])


def draw(distribution: str, geometry: Geometry, tokens: int, generator: torch.Generator) -> Choices:
    """K distinct experts per token without replacement (Gumbel top-k); weights that sum to 1.

    ``zipf``: the i-th most popular expert is chosen as 1/i, popularity scattered over the ids.
    ``hotspot``: the first sixteenth of the experts, so one rank's, is sixteen times as likely.
    """
    experts, top_k = geometry.num_experts, geometry.top_k
    logits = torch.zeros(experts)
    if distribution == "zipf":
        # One order for all ranks, so its seed is not theirs.
        order = torch.randperm(experts, generator=torch.Generator().manual_seed(experts))
        logits[order] = -torch.log(torch.arange(1, experts + 1, dtype=torch.float32))
    elif distribution == "hotspot":
        logits[: -(-experts // _HOT_SHARE)] = torch.log(torch.tensor(_HOT_FACTOR))
    noise = torch.rand(tokens, experts, generator=generator).clamp_(min=1e-9)
    ids = (logits - torch.log(-torch.log(noise))).topk(top_k, dim=1).indices
    weights = torch.rand(tokens, top_k, generator=generator) + 0.05
    return Choices(ids.to(torch.int32), weights / weights.sum(1, keepdim=True))


def load_recorded(path: str, geometry: Geometry) -> Recorded:
    """Reads ``topk_ids`` [N, K'] and ``topk_weights`` [N, K'] of an .npz, K' >= K.

    The first K columns count, their weights renormalized.

    Raises:
        UsageError: with what the file has and what was expected.
    """
    try:
        import numpy
    except ImportError:
        raise UsageError(
            f"--routing {path} needs numpy to read the file: pip install 'moe-a2a[bench]'"
        ) from None
    if not Path(path).is_file():
        raise UsageError(
            f"--routing {path}: neither one of {', '.join(DISTRIBUTIONS)} nor a file that exists"
        )
    try:
        with numpy.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("topk_ids", "topk_weights") if name in file}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile):
        raise UsageError(
            f"--routing {path}: expected an .npz file with topk_ids and topk_weights, and this is "
            "none"
        ) from None
    for name in ("topk_ids", "topk_weights"):
        if name not in arrays:
            raise UsageError(f"--routing {path}: it has no array {name} [tokens, top_k]")
        if arrays[name].dtype.kind not in ("iu" if name == "topk_ids" else "f"):
            kind = "integers" if name == "topk_ids" else "floats"
            raise UsageError(f"--routing {path}: {name} is {arrays[name].dtype}, expected {kind}")
    ids = torch.from_numpy(arrays["topk_ids"].astype("int64"))
    weights = torch.from_numpy(arrays["topk_weights"].astype("float32"))
    return _validated(path, geometry, ids, weights)


def _validated(path: str, geometry: Geometry, ids: Tensor, weights: Tensor) -> Recorded:
    experts, top_k = geometry.num_experts, geometry.top_k
    if ids.dim() != 2 or ids.shape != weights.shape or not ids.numel():
        raise UsageError(
            f"--routing {path}: topk_ids is {list(ids.shape)} and topk_weights "
            f"{list(weights.shape)}, expected two of the same [tokens >= 1, top_k >= {top_k}]"
        )
    if ids.shape[1] < top_k:
        raise UsageError(
            f"--routing {path}: it has {ids.shape[1]} choices per token, expected at least "
            f"top_k={top_k}"
        )
    ids, weights = ids[:, :top_k], weights[:, :top_k]
    if int(ids.max()) >= experts or int(ids.min()) < -1:
        raise UsageError(
            f"--routing {path}: its ids are {int(ids.min())}..{int(ids.max())}, expected "
            f"0..{experts - 1} (num_experts={experts}) or -1 for a choice that routes nowhere"
        )
    total = weights.sum(1, keepdim=True)
    if not bool((torch.isfinite(total) & (total > 0)).all()):
        row = int((~(torch.isfinite(total) & (total > 0))).flatten().nonzero()[0])
        raise UsageError(
            f"--routing {path}: the first {top_k} weights of row {row} sum to "
            f"{float(total[row]):g}, expected a positive number"
        )
    return Recorded(ids.to(torch.int32), weights / total)
