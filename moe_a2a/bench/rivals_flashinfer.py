"""FlashInfer's MoE all-to-all (one-sided, over memory that peers map), as its users call it.

Payloads come quantized where the wire is (its quantizers do nothing on Hopper), padding keeps stale
ids (the kernel that clears them is left out where nobody computes), and bf16 output is written into
its workspace, so that combine stages nothing: each the quickest that it offers.

Shape letters: T tokens of this rank, K top_k, H hidden_size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from moe_a2a.bench.rivals_cuda import DeviceRound
    from moe_a2a.spec import Spec

__all__ = ["FlashInfer"]

_TOP_K = (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 22)  # those it has kernels for
_FP8_COMBINE = ("fp8_block128", "mxfp8")  # here its fp8, an unscaled cast, is the nearest


class _Package(NamedTuple):
    """Its names that are used here, or why there are none."""

    moe_alltoall: Any = None
    mnnvl: Any = None
    mapping: Any = None
    missing: str | None = None


@cache
def _package() -> _Package:
    try:
        exchange: Any = import_module("flashinfer.comm.trtllm_moe_alltoall")
        memory: Any = import_module("flashinfer.comm.mnnvl")
        mapping: Any = import_module("flashinfer.comm.mapping")
        exchange.get_moe_alltoall_module()  # compiles for minutes, if it has to
    except Exception as error:
        return _Package(missing=f"FlashInfer can't be used: {type(error).__name__}: {error}")
    return _Package(exchange.MoeAlltoAll, memory, mapping.Mapping)


class FlashInfer:
    """One geometry's object; its workspace is kept by FlashInfer itself from round to round."""

    name: ClassVar[str] = "FlashInfer"
    captured: ClassVar[bool] = True
    ordered: ClassVar[bool] = False  # slots are handed out by an atomic counter
    exact: ClassVar[bool] = False

    @staticmethod
    def unusable(spec: Spec) -> str | None:
        if spec.top_k not in _TOP_K:
            return f"FlashInfer has no kernels for top_k={spec.top_k}"
        if spec.num_experts < spec.ep_size:
            return "FlashInfer wants an expert on every rank"
        if spec.combine_wire not in ("bf16", *_FP8_COMBINE):
            return f"FlashInfer has no combine in {spec.combine_wire}"
        return _package().missing

    def __init__(self, round: DeviceRound, *, cleared: bool = False) -> None:
        """``cleared``: padding arrives with the Spec's invalid id, for experts that look."""
        spec, package = round.spec, _package()
        self._clearing: dict[str, int] = {}
        if cleared:
            self._clearing = {
                "invalid_token_expert_id": spec.invalid_expert_id,
                "expert_id_payload_index": 1,
            }
        self._round, self._rows = round, round.rows
        self._low_precision = spec.combine_wire in _FP8_COMBINE
        config = None
        if package.mnnvl.MnnvlMemory.comm is None:  # one communicator serves all objects
            config = package.mnnvl.MnnvlConfig(comm_backend=package.mnnvl.TorchDistBackend())
        self._exchange = package.moe_alltoall(
            package.mapping(
                world_size=spec.ep_size,
                rank=round.rank,
                gpus_per_node=spec.ep_size,
                tp_size=spec.ep_size,
                moe_ep_size=spec.ep_size,
            ),
            max_num_tokens=spec.max_tokens_per_rank,
            top_k=spec.top_k,
            num_experts=spec.num_experts,
            hidden_size=spec.hidden_size,
            mnnvl_config=config,
        )
        # Scales last: copies are as wide as a row divides by, and nobody checks the alignment.
        parts = [_bytes(round.payload), round.topk_ids, round.topk_weights]
        if round.scales is not None:
            parts.append(_bytes(round.scales))
        self._parts = parts
        shape = (round.payload.shape[0], spec.hidden_size)
        self._out = torch.empty(shape, dtype=torch.bfloat16, device=round.payload.device)
        torch.cuda.synchronize()
        dist.barrier()  # nobody's flags are cleared any more when the first dispatch comes

    def dispatch(self) -> Tensor:
        self._received = self._exchange.dispatch(
            self._round.topk_ids, self._parts, self._rows, **self._clearing
        )
        return self._as(self._received[0], self._round.payload)

    def scales(self) -> Tensor | None:
        if self._round.scales is None:
            return None
        return self._as(self._received[3], self._round.scales)

    @staticmethod
    def _as(received: Tensor, like: Tensor) -> Tensor:
        return received.flatten(0, 1).view(like.dtype)

    def here(self) -> Tensor:
        return torch.cat(
            [
                torch.arange(count) + source * self._rows
                for source, count in enumerate(self._round.arriving)
            ]
        )

    def choices(self) -> tuple[Tensor, Tensor]:
        """int32 ids and float32 router weights of the rows that arrived, [n, K] each."""
        ids, weights = self._received[1:3]
        return ids.flatten(0, 1), weights.flatten(0, 1)

    def combine_target(self) -> Tensor | None:
        """bf16 [W, R, H] that `combine` reads without a copy; None with a quantized combine."""
        if self._low_precision:
            return None
        target: Tensor = self._exchange.get_combine_payload_tensor_in_workspace(
            self._rows, self._round.spec.hidden_size, torch.bfloat16
        )
        return target

    def stage(self, y: Tensor) -> None:
        spec = self._round.spec
        y = y.view(spec.ep_size, self._rows, spec.hidden_size)
        target = self.combine_target()
        if target is None:  # in place it could not be repeated: the cast eats what it reads
            self._y = y
            return
        self._y = target
        if y.data_ptr() != target.data_ptr():
            target.copy_(y)

    def combine(self) -> None:
        self._exchange.combine(
            self._y,
            self._rows,
            payload_in_workspace=not self._low_precision,
            output=self._out,
            use_low_precision=self._low_precision,
        )

    def output(self) -> Tensor:
        return self._out

    def close(self) -> None:
        torch.cuda.synchronize()
        dist.barrier()


def _bytes(rows: Tensor) -> Tensor:
    """Rows of one byte an element as uint8, others as they are."""
    return rows.view(torch.uint8) if rows.element_size() == 1 else rows
