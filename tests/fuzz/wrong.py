"""Values that no call takes: things that are no tensor, and tensors that are not the right one.

Each comes with what a text about it must have in it, one of them at least: an error says what it
was given.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

if TYPE_CHECKING:
    from collections.abc import Callable

Rng = random.Random
DTYPES = (
    "bool uint8 int8 int16 uint16 int32 uint32 int64 float16 bfloat16 float32 float64 complex64 "
    "complex128 float8_e4m3fn float8_e5m2 float8_e8m0fnu"
)
EVERY_DTYPE = tuple(getattr(torch, name) for name in DTYPES.split())


class Wrong(NamedTuple):
    value: Any
    shown: tuple[str, ...]


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text for this")


NO_TENSORS = (
    *(None, True, 0, -1, 3.5, float("nan"), 10**5000, -(10**400), "x", "x" * 10_000, b"x", "\0\n"),
    *([], (), {}, [[1.0]], {1: 2}, range(3), {3}, object(), Unprintable(), len, torch.float32),
    *(np.zeros((3, 4), np.float32), np.zeros(0), np.array("a"), np.int64(3), np.float32(1)),
    *(torch.Tensor, torch.Size((3, 4)), torch.device("cpu"), torch.zeros(4).untyped_storage()),
    slice(1, 2),
)


def no_tensor(rng: Rng, *but: type) -> Wrong:
    """Anything that is not of the types `but`."""
    value = rng.choice([v for v in NO_TENSORS if type(v) not in but])
    return Wrong(value, (type(value).__name__, *numbers(value)))


def numbers(value: object) -> tuple[str, ...]:
    """How an error may show a small value: as Python prints it."""
    if isinstance(value, Unprintable) or (isinstance(value, int) and abs(value) > 10**300):
        return ()
    return (repr(value)[:20],)


def other_dtype(rng: Rng, right: torch.Tensor, accepted: tuple[torch.dtype, ...]) -> Wrong:
    dtype = rng.choice([d for d in EVERY_DTYPE if d not in accepted])
    return Wrong(torch.zeros(right.shape, dtype=dtype), (str(dtype)[6:],))


def other_shape(rng: Rng, right: torch.Tensor) -> Wrong:
    shape = list(right.shape)
    wrong = rng.choice(
        [
            [],
            [1, *shape],
            shape[1:],
            [*shape, 1],
            [*shape[:-1], shape[-1] + rng.randint(1, 9)],
            [*shape[:-1], shape[-1] - 1],
            [*shape[:-2], shape[-2] + rng.randint(1, 99), shape[-1]] if len(shape) > 1 else [2, 2],
            [0] * (len(shape) + 1),
        ]
    )
    return Wrong(torch.zeros(wrong, dtype=right.dtype), (str(wrong), "tokens"))


def elsewhere(rng: Rng, right: torch.Tensor) -> Wrong:
    """Without memory: on the meta device, at most with a shape that no memory has."""
    shape = list(right.shape)
    if rng.random() < 0.3:
        shape[0] = 2 ** rng.randint(31, 50)
    return Wrong(
        torch.empty(shape, dtype=right.dtype, device="meta"), ("meta", str(shape), "tokens")
    )


def fake(rng: Rng, right: torch.Tensor) -> Wrong:
    with FakeTensorMode():
        return Wrong(torch.zeros(right.shape, dtype=right.dtype), ("FakeTensor",))


def other_layout(rng: Rng, right: torch.Tensor) -> Wrong:
    """Sparse, blocked or nested."""
    dtype = right.dtype if right.dtype in (torch.float32, torch.bfloat16) else torch.float32
    dense, parts = torch.zeros(right.shape), [torch.zeros(n, dtype=dtype) for n in (3, 5)]
    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "sparse_coo": lambda: dense.to_sparse().to(dtype),
        "sparse_csr": lambda: dense.to_sparse_csr().to(dtype),
        "mkldnn": dense.to_mkldnn,
        "nested": lambda: torch.nested.nested_tensor(parts),
        "jagged": lambda: torch.nested.nested_tensor(parts, layout=torch.jagged),
    }
    kind = rng.choice([k for k in kinds if k != "sparse_csr" or right.dim() == 2])
    return Wrong(kinds[kind](), (kind, "nested"))


def gaps(rng: Rng, right: torch.Tensor) -> Wrong:
    """Elements of a row that are not next to each other, or all the same one."""
    shape, dtype = tuple(right.shape), right.dtype
    if shape[-1] < 2 or right.numel() == 0:
        return other_shape(rng, right)
    if rng.random() < 0.5:
        step = rng.randint(2, 5)
        wide = torch.zeros((*shape[:-1], shape[-1] * step), dtype=dtype)
        return Wrong(wide[..., ::step], ("contiguous", "strides"))
    return Wrong(torch.zeros((*shape[:-1], 1), dtype=dtype).expand(shape), ("strides",))


def with_gradient(rng: Rng, right: torch.Tensor) -> Wrong:
    if not right.dtype.is_floating_point or right.element_size() < 2:
        return other_layout(rng, right)
    value = torch.zeros(right.shape, dtype=right.dtype, requires_grad=True)
    return Wrong(torch.nn.Parameter(value) if rng.random() < 0.3 else value, ("grad",))


def quantized(rng: Rng, right: torch.Tensor) -> Wrong:
    dtype = rng.choice((torch.quint8, torch.qint8, torch.qint32))
    value = torch.quantize_per_tensor(torch.zeros(right.shape), 0.5, 0, dtype)
    return Wrong(value, (str(dtype)[6:],))


def negated(rng: Rng, right: torch.Tensor) -> Wrong:
    """A view whose memory holds the values with the other sign."""
    if right.dtype != torch.float32 or right.numel() < 2:
        return quantized(rng, right)
    value = torch.zeros(right.shape, dtype=torch.complex64).conj().imag
    return Wrong(value, ("sign", "strides"))


TENSORS: tuple[Callable[[Rng, torch.Tensor], Wrong], ...] = (
    *(other_shape, other_shape, elsewhere, fake, other_layout, gaps, with_gradient, quantized),
    negated,
)


def tensor(rng: Rng, right: torch.Tensor, accepted: tuple[torch.dtype, ...] = ()) -> Wrong:
    """A tensor that can't stand in for `right`, or no tensor."""
    if rng.random() < 0.25:
        return no_tensor(rng)
    if rng.random() < 0.2:
        return other_dtype(rng, right, accepted or (right.dtype,))
    return rng.choice(TENSORS)(rng, right)


def shared(rng: Rng, right: torch.Tensor, memory: torch.Tensor) -> Wrong:
    """Like `right`, but somewhere in the storage of `memory`, which peers write."""
    storage = memory.untyped_storage()
    item = right.element_size()
    room = (storage.nbytes() - right.nbytes) // item
    value = torch.empty(0, dtype=right.dtype)
    if room < 0 or right.numel() == 0:
        return elsewhere(rng, right)
    value.set_(storage, rng.randint(0, room), right.shape)
    return Wrong(value, ("receive",))
