"""What bytes say is done with the binding of the CPU library: endpoints opened with numbers that
may be wrong, operations on tensors of any dtype, shape and strides.

Whatever the bytes are, a function does its work or raises ValueError, TypeError or OverflowError.
Memory is laid out so that AddressSanitizer sees a read or write outside of it. Addresses of windows
are right or zero: that they are is for the caller of the binding to know.

W ep_size, R rows of a round, T tokens, K top_k, H hidden_size.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from moe_a2a import Spec
from moe_a2a.workspace import geometry_numbers, shape_numbers

REFUSALS = (ValueError, TypeError, OverflowError)
_WIRES = ("bf16", "fp16", "fp8", "fp8_block128", "mxfp8", "nvfp4", "mxfp4")
_BACK = ("bf16", "fp16", "fp32", "fp8_block128", "mxfp8")
_DTYPES = (
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.int8),
    *(torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn),
    *(torch.uint16, torch.float8_e8m0fnu),
)
_NUMBERS = (0, 1, -1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 65, 127, 128, 255, 256, 1 << 15, 1 << 20)
_LARGE = (1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 32, 1 << 48, 1 << 50, 1 << 62, (1 << 63) - 1)
_MOST_BYTES = 1 << 20
_NS = 10**10  # a wait is never over before the slice is
_libc = ctypes.CDLL(None)
_libc.aligned_alloc.restype = ctypes.c_void_p
_libc.aligned_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class Bytes:
    """A source of decisions; zeros where the bytes have come to their end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def more(self) -> bool:
        return self._at < len(self._data)

    def below(self, count: int) -> int:
        return self.byte() % count

    def pick(self, choices: Any) -> Any:
        return choices[self.byte() % len(choices)]

    def seldom(self) -> bool:
        return self.byte() >= 224

    def number(self) -> int:
        kind = self.below(4)
        if kind == 0:
            return self.pick(_NUMBERS)
        if kind == 1:
            return self.pick(_LARGE)
        if kind == 2:
            return self.byte()
        return int.from_bytes(bytes(self.byte() for _ in range(8)), "little", signed=True)


class Session:
    """One geometry, its windows, and an endpoint per rank in this one process."""

    def __init__(self, library: Any, given: Bytes) -> None:
        self.library, self.given = library, given
        self.kept: list[torch.Tensor] = []  # what a pending operation may still look at
        self.windows: list[int] = []
        self.spec = self._spec()
        self.geometry = self._numbers(geometry_numbers(self.spec))
        self.shape = self._numbers(shape_numbers(self.spec, given.below(2) == 1))
        self.endpoints: list[Any] = []

    def _spec(self) -> Spec:
        given = self.given
        experts = 1 + given.below(6)
        return Spec(
            1 + given.below(3),
            experts,
            1 + given.below(min(experts, 3)),
            128 * (1 + given.below(2)),
            given.below(5) + 1,
            wire=given.pick(_WIRES),
            combine_wire=given.pick(_BACK),
            allow_defer=given.below(2) == 1,
            extra=[{}, {"a": 3}, {"a": 1, "b": 20}][given.below(3)],
            scrub=given.pick(("ids", "all")),
        )

    def _numbers(self, right: list[int]) -> list[int]:
        numbers, given = list(right), self.given
        while given.seldom():
            kind = given.below(4)
            if kind == 0:
                numbers.append(given.number())
            elif kind == 1 and numbers:
                numbers.pop(given.below(len(numbers)))
            elif numbers:
                numbers[given.below(len(numbers))] = given.number()
        return numbers

    def open(self) -> None:
        regions = list(self.library.workspace_regions(self.geometry))
        committed = next(int(at) for name, at, _ in regions if str(name) == "dispatch_inbox")
        size, given = self.geometry[0], self.given
        if committed * size > _MOST_BYTES or size > 64:
            return
        for _ in range(size):
            self.windows.append(_libc.aligned_alloc(128, committed))
            ctypes.memset(self.windows[-1], 0, committed)
        for rank in range(size):
            windows = list(self.windows)
            if given.seldom():
                windows = self._other_windows(windows)
            at = given.number() if given.seldom() else rank
            numbers = (self.geometry, self.shape, at, windows, _NS, 0, given.number())
            self.endpoints.append(self.library.endpoint_open(*numbers))

    def _other_windows(self, right: list[int]) -> list[int]:
        kind, at = self.given.below(4), self.given.below(len(right))
        if kind == 0:
            right[at] = 0
        elif kind == 1:
            right[at] += 1 + self.given.below(127)
        elif kind == 2:
            right.pop()
        else:
            right.append(right[0])
        return right

    def close(self) -> None:
        self.endpoints.clear()
        for address in self.windows:
            _libc.free(address)

    # ---- operations ------------------------------------------------------------------------

    def step(self) -> None:
        names = ("round", "dispatch", "combine", "resume", "stage", "record", "restart", "meeting",
                 "combine_grouped", "group")  # fmt: skip
        getattr(self, f"_{self.given.pick(names)}")(self.given.pick(self.endpoints))

    def _round(self, _: Any) -> None:
        """A right one of all endpoints, where the numbers allow it."""
        tokens = self.given.below(self.spec.max_tokens_per_rank + 1)
        statuses = []
        for endpoint in self.endpoints:
            for index, width in enumerate(self.spec.extra.values()):
                extra = torch.zeros(tokens, width, dtype=torch.uint8)
                self.library.stage_extra(endpoint, index, self._keep(extra))
            x, ids, weights = self._inputs(tokens)
            rows, active = self.spec.max_tokens_per_rank, (1 << len(self.endpoints)) - 1
            args = (x, None, ids, weights, self._counts(), rows, False, 1.0, active, 0)
            statuses.append(self.library.dispatch(endpoint, *args))
        self._finish(statuses)
        y, out = self._outputs(tokens)
        self._finish([self.library.combine(e, y, out, 0) for e in self.endpoints])

    def _finish(self, statuses: list[int]) -> None:
        for endpoint, status in zip(self.endpoints, statuses, strict=True):
            if status == 1:
                self.library.resume(endpoint, 0)

    def _dispatch(self, endpoint: Any) -> None:
        given, spec = self.given, self.spec
        tokens = given.below(spec.max_tokens_per_rank + 2)
        x, ids, weights = self._inputs(tokens)
        scales = None
        if given.below(4) == 0:
            width = spec.scale_width or 1
            scales = torch.zeros(tokens, width, dtype=given.pick((torch.float32, torch.uint8)))
            x = torch.zeros(tokens, spec.row_bytes[0], dtype=torch.uint8)
        everyone = (1 << len(self.windows)) - 1
        self.library.dispatch(
            endpoint,
            self._tensor(x),
            None if scales is None else self._tensor(scales),
            self._tensor(ids),
            self._tensor(weights),
            self._tensor(self._counts()),
            given.number() if given.seldom() else spec.max_tokens_per_rank,
            given.below(4) == 0,
            given.pick((1.0, 0.0, float("nan"), float("inf"), 1e300)),
            given.number() if given.seldom() else everyone,
            given.pick((0, 1, 100, -1)),
        )

    def _combine(self, endpoint: Any) -> None:
        y, out = self._outputs(self.given.below(self.spec.max_tokens_per_rank + 1))
        slice_ns = self.given.pick((0, 1, 100, -1))
        self.library.combine(endpoint, self._tensor(y), self._tensor(out), slice_ns)

    def _combine_grouped(self, endpoint: Any) -> None:
        """Places are any; those past the rows, and below -1, make NaN."""
        given, spec = self.given, self.spec
        y, out = self._outputs(given.below(spec.max_tokens_per_rank + 1))
        rows = self._keep(torch.zeros(given.below(9), spec.hidden_size, dtype=y.dtype))
        choices = spec.ep_size * spec.max_tokens_per_rank * spec.top_k
        places = [given.byte() % 12 - 2 for _ in range(choices)]
        positions = self._keep(torch.tensor(places, dtype=torch.int32))
        weights = self._keep(torch.ones(len(rows)))
        given_tensors = [self._tensor(t) for t in (rows, positions, weights, out)]
        self.library.combine_grouped(endpoint, *given_tensors, given.pick((0, 1, 100, -1)))

    def _group(self, _: Any) -> None:
        given, spec = self.given, self.spec
        size, rows, experts = spec.ep_size, given.below(6), given.below(5)
        ids = [given.byte() - 4 for _ in range(size * rows * spec.top_k)]
        shape = (size, rows, spec.top_k)
        align = given.number() if given.seldom() else 1 + given.below(5)
        places = size * rows * min(spec.top_k, experts) + experts * (min(align, 8) - 1)
        index = torch.zeros(max(places - given.below(3), 0), dtype=torch.int32)
        given_tensors = [
            self._tensor(t)
            for t in (
                torch.tensor(ids, dtype=torch.int32).view(shape),
                torch.ones(shape),
                torch.tensor([given.byte() - 2 for _ in range(size)], dtype=torch.int32),
                torch.zeros(experts + 1, dtype=torch.int32),
                index,
                index.float(),
                torch.zeros(size * rows, spec.top_k, dtype=torch.int32),
            )
        ]
        first = given.number() if given.seldom() else given.below(4)
        self.library.group(*given_tensors[:3], first, align, *given_tensors[3:])

    def _resume(self, endpoint: Any) -> None:
        self.library.resume(endpoint, self.given.pick((0, 1, 100, -1)))

    def _stage(self, endpoint: Any) -> None:
        widths = [*self.spec.extra.values(), 1]
        extra = torch.zeros(self.given.below(5), self.given.pick(widths), dtype=torch.uint8)
        index = self.given.number() if self.given.seldom() else self.given.below(2)
        self.library.stage_extra(endpoint, index, self._tensor(extra))

    def _record(self, endpoint: Any) -> None:
        handle = self.given.pick((endpoint, endpoint, None, 3, "x"))
        assert len(self.library.failure_record(handle)) == 17 + self.geometry[0]
        self.library.position(handle)

    def _restart(self, endpoint: Any) -> None:
        windows = list(self.windows)
        if self.given.below(2):
            windows = self._other_windows(windows)
        # Not 0, that of lines that nobody has posted on: each wait would end in a grace.
        generation = 1 + self.given.byte()
        self.library.restart(endpoint, windows, self.given.number(), generation)

    def _meeting(self, _: Any) -> None:
        size, given = len(self.windows), self.given
        source = given.number() if given.seldom() else given.below(size)
        words = [given.byte()] * (10 if given.below(4) else given.below(20))
        self.library.post_meeting(self.windows[0], size, source, words)
        self.library.read_meeting(given.pick((self.windows[0], 0)), size, source)

    # ---- tensors ---------------------------------------------------------------------------

    def _inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        given, spec = self.given, self.spec
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(spec.wire)
        x = torch.ones(tokens, spec.hidden_size, dtype=dtype or given.pick(_DTYPES[:3]))
        ids = torch.zeros(tokens, spec.top_k, dtype=given.pick((torch.int32, torch.int64)))
        for row in range(tokens):
            ids[row] = given.byte() - 8 if given.below(2) else given.below(spec.num_experts)
        return self._keep(x), self._keep(ids), self._keep(torch.ones(tokens, spec.top_k))

    def _outputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        spec = self.spec
        fixed = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        dtype = fixed.get(spec.combine_wire, torch.float32)
        y = torch.zeros(spec.ep_size, spec.max_tokens_per_rank, spec.hidden_size, dtype=dtype)
        return self._keep(y), self._keep(torch.zeros(tokens, spec.hidden_size, dtype=dtype))

    def _counts(self) -> torch.Tensor:
        return self._keep(torch.zeros(len(self.windows), dtype=torch.int32))

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.kept.append(tensor)
        return tensor

    def _tensor(self, right: torch.Tensor) -> Any:
        """`right`, or something else."""
        given = self.given
        if not given.seldom():
            return self._keep(right)
        kind = given.below(7)
        shape = list(right.shape)
        if kind == 0:
            return given.pick((None, 3, "x", [1], right.tolist(), 1.5, right.numpy()))
        if kind == 1:
            return self._keep(torch.zeros(shape, dtype=given.pick(_DTYPES)))
        if kind == 2:
            shape[given.below(len(shape))] = given.below(40)
        elif kind == 3:
            shape.pop(given.below(len(shape)))
        elif kind == 4:
            shape.insert(given.below(len(shape) + 1), given.below(4))
        elif kind == 5:  # as many bytes a row in other elements
            dtype = given.pick((torch.uint8, torch.int16, torch.int32))
            fits = right.numel() and shape[-1] * right.element_size() % dtype.itemsize == 0
            return self._keep(right.view(dtype) if fits else right)
        else:
            return self._strided(right)
        return self._keep(torch.zeros(shape, dtype=right.dtype))

    def _strided(self, right: torch.Tensor) -> torch.Tensor:
        """The shape with any strides, over memory that ends with its last element."""
        strides = [self.given.below(300) for _ in right.shape]
        at = self.given.below(9)
        sizes = zip(right.shape, strides, strict=True)
        last = at + sum((n - 1) * stride for n, stride in sizes) if right.numel() else at
        memory = torch.zeros(last + 1, dtype=right.dtype)
        return self._keep(memory.as_strided(right.shape, strides, at))


def play(library: Any, data: bytes) -> dict[str, int]:
    """Does what the bytes say; how many calls were done and how many refused."""
    given = Bytes(data)
    session = Session(library, given)
    tally = {"done": 0, "refused": 0}
    try:
        session.open()
        while session.endpoints and given.more():
            try:
                session.step()
                tally["done"] += 1
            except REFUSALS:  # noqa: PERF203
                tally["refused"] += 1
    except REFUSALS:
        tally["refused"] += 1
    finally:
        session.close()
    return tally
