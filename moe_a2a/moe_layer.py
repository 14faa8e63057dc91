"""A whole Mixture-of-Experts layer: router output in, hidden states out.

Shape letters: T tokens of this rank, K top_k, H hidden_size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from moe_a2a.alltoall import AllToAll
from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.experts.base import PLAIN_OUTPUTS, output_dtype, wire_misfit
from moe_a2a.prepare_finalize import PrepareFinalize
from moe_a2a.spec import Spec
from moe_a2a.wording import describe, shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import torch.distributed as dist
    from torch import Tensor

    from moe_a2a.experts.base import Experts
    from moe_a2a.grouped import Grouped
    from moe_a2a.received import Received

__all__ = ["MoELayer"]


class MoELayer:
    """Dispatch, this rank's experts and combine as one call, on any backend.

    ``MoELayer(spec, group, experts)`` opens an exchange of its own, which is collective;
    ``MoELayer(a2a, experts=experts)`` uses one that is open, for as many layers as follow each
    other. `close`, and leaving a ``with``, close only what was opened here.

    Args:
        exchange: an open `AllToAll`, or the `Spec` to open one with.
        group: of `AllToAll`; None with an open one.
        experts: of this rank: a backend of `moe_a2a.experts` (``select`` makes one), or any
            callable ``experts(recv, out=y)`` that returns ``y [W, R, H]`` with the router weights
            applied, or grouped rows, ``(rows [N, H], grouped)``, for `AllToAll.combine_grouped`.
            Asked of it, where it has them: ``expects_unquantized_inputs`` (then the layer defers),
            ``accepts``, ``invalid_expert_id`` and ``hidden_dim_unpadded``; and ``grouped_rows``
            (`moe_a2a.experts.base.GroupsRows`), which is called instead. No gradient is recorded.
        options: of `AllToAll`, besides a Spec: ``backend``, ``device``, ``timeout``...

    Raises:
        GeometryError: another kind of argument, or experts that don't fit the exchange.
        BackendUnavailable, WorkspaceError, PeerTimeout: as `AllToAll`.
    """

    def __init__(
        self,
        exchange: AllToAll | Spec,
        group: dist.ProcessGroup | None = None,
        experts: Experts | Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        is_open = isinstance(exchange, AllToAll)
        if not is_open and not isinstance(exchange, Spec):
            raise GeometryError(f"exchange={shown(exchange)}: must be an AllToAll or a Spec")
        if is_open and (group is not None or options):
            given = ", ".join([*(["group"] if group is not None else []), *options])
            raise GeometryError(f"{given} given with an open AllToAll: those open one, with a Spec")
        spec: Spec = exchange.spec if isinstance(exchange, AllToAll) else exchange
        # Before anything is opened: the window of a layer that can't be is nobody's to close.
        self.experts: Callable[..., Any] = _fitting(experts, spec)
        self._defers = spec.quantized and bool(getattr(experts, "expects_unquantized_inputs", 0))
        self._owns = not is_open
        self.a2a: AllToAll = (
            exchange if isinstance(exchange, AllToAll) else AllToAll(spec, group, **options)
        )
        self._ends = PrepareFinalize(self.a2a)
        self._grouped_rows: Callable[[Received], Any] | None = getattr(
            experts, "grouped_rows", None
        )
        check_fits = getattr(getattr(experts, "weights", None), "check_fits", None)
        if check_fits is not None:
            try:
                check_fits(spec, self.a2a.ep_rank)
            except GeometryError:
                self.close()
                raise

    @property
    def spec(self) -> Spec:
        return self.a2a.spec

    def __call__(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        shared: Tensor | None = None,
        routed_scaling_factor: float | None = None,
        runtime_max_tokens: int | None = None,
        out: Tensor | None = None,
        **prepare_keywords: Any,
    ) -> Tensor:
        """``round(f32(sum over the experts of weight * expert(x)) * factor + shared)``, [T, H].

        The sum is rounded to the combine wire before the factor and the shared experts' output are
        applied, here and nowhere else. If the experts raise, or return what combine refuses, the
        round stays open on this rank and the others time out: `AllToAll.reset` on all of them goes
        on.

        Args:
            x: [T, H], as `AllToAll.dispatch` takes it; T may be 0.
            topk_weights: float32 [T, K].
            topk_ids: int32 or int64 [T, K]; -1 routes nowhere.
            shared: [T, H], output of the shared experts for the same tokens.
            routed_scaling_factor: default 1.
            runtime_max_tokens: R, this round's largest T over the ranks, the same on each; default
                the capacity.
            out: [T, H] in the dtype that is returned; may be x.
            prepare_keywords: of `PrepareFinalize.prepare`: ``global_scale`` (nvfp4), ``scales``,
                ``active_ranks``, ``extra``, ``apply_router_weight_on_input``...

        Returns:
            ``out``, or a new tensor: bf16, or fp16 or fp32 where that is the combine wire.

        Raises:
            PayloadError, CapacityError, StateError: a wrong argument or a wrong phase; nothing was
                sent, and the layer may be called again. What experts return is looked at when they
                do, as said above.
            PeerTimeout: ranks that did not arrive.
        """
        if isinstance(x, torch.Tensor) and x.dim() == 2:  # dispatch refuses anything else
            # What finalize would refuse, while peers wait for rows: refused here, before any left.
            tokens = x.shape[0]
            self._ends.check_finalize(tokens, shared, routed_scaling_factor)
            if is_dynamo_compiling():  # a graph has no addresses to compare
                self._check_out(out, tokens)
            else:
                self.a2a.check_layer(tokens, out, shared)
        recv = self._ends.prepare(
            x,
            topk_weights,
            topk_ids,
            runtime_max_tokens=runtime_max_tokens,
            defer_input_quant=self._defers,
            **prepare_keywords,
        ).received
        y, grouped = self.compute(recv)
        more: dict[str, Any] = {"routed_scaling_factor": routed_scaling_factor, "shared": shared}
        dtype = output_dtype(self.spec)
        if self.spec.combine_wire in PLAIN_OUTPUTS or y.dtype == dtype:
            return self._ends.finalize(y, grouped=grouped, out=out, **more)
        # A quantized combine returns what it was given: of experts with fp32, fp32.
        wide = self._ends.finalize(y, grouped=grouped, **more)
        return wide.to(dtype) if out is None else out.copy_(wide)

    def compute(self, recv: Received) -> tuple[Tensor, Grouped | None]:
        """The experts alone, between `PrepareFinalize.prepare` and ``finalize``: y, and its order
        where it is grouped rows."""
        with torch.no_grad():
            if self._grouped_rows is not None:
                made = self._grouped_rows(recv)
            else:
                made = self.experts(recv, out=self.a2a.combine_buffer())
        if isinstance(made, torch.Tensor) and self._grouped_rows is None:
            return made, None
        pair = isinstance(made, tuple) and len(made) == 2
        if not pair or not isinstance(made[0], torch.Tensor):
            wanted = "(rows [N, H], grouped)"
            if self._grouped_rows is None:
                wanted = f"a tensor y [W, R, H], or {wanted}"
            raise PayloadError(f"the experts returned {shown(made)}: expected {wanted}")
        rows, grouped = made
        return rows, grouped

    def close(self) -> None:
        """Closes the exchange if this layer opened it; local, idempotent, waits for nobody."""
        if self._owns:
            self.a2a.close()

    def __enter__(self) -> MoELayer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = getattr(self.experts, "name", type(self.experts).__name__)
        return f"MoELayer({self.a2a!r}, experts {name})"

    def _check_out(self, out: object, tokens: int) -> None:
        """What a graph knows of ``out`` before there is a y."""
        if out is None:
            return
        dtype, shape = output_dtype(self.spec), (tokens, self.spec.hidden_size)
        if (
            not isinstance(out, torch.Tensor)
            or out.is_nested
            or (out.shape, out.dtype, out.device) != (shape, dtype, self.a2a.device)
        ):
            raise PayloadError(
                f"out is {describe(out)}: expected {str(dtype)[6:]} {list(shape)} on "
                f"{self.a2a.device}"
            )


def _fitting(experts: object, spec: Spec) -> Callable[..., Any]:
    """``experts``, or a GeometryError that says what does not fit."""
    grouped_rows = getattr(experts, "grouped_rows", None)
    if grouped_rows is not None and not callable(grouped_rows):
        raise GeometryError(f"experts.grouped_rows={shown(grouped_rows)}: must be a method")
    if not callable(experts) or isinstance(experts, type):
        raise GeometryError(
            f"experts={shown(experts)}: must be experts of this rank, such as "
            "moe_a2a.experts.select(spec, device, weights) gives"
        )
    misfit = wire_misfit(experts, spec)
    if misfit is not None:
        raise GeometryError(f"experts={shown(experts)} {misfit}")
    made_for = getattr(experts, "spec", spec)
    if isinstance(made_for, Spec) and made_for != spec:
        pairs = zip(asdict(made_for).items(), asdict(spec).values(), strict=True)
        differ = [f"{name}={old!r}, not {new!r}" for (name, old), new in pairs if old != new]
        raise GeometryError(f"experts={shown(experts)} are for {', '.join(differ)}")
    for name, wanted in (
        ("invalid_expert_id", spec.invalid_expert_id),
        ("hidden_dim_unpadded", spec.hidden_size),
    ):
        found = getattr(experts, name, wanted)
        if found != wanted:
            raise GeometryError(
                f"experts={shown(experts)} have {name}={shown(found)}: the Spec says {wanted}"
            )
    return experts
