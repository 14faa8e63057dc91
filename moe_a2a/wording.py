"""How errors show what they were given: a caller may pass anything, and an error that fails while
it is put together hides the mistake that it is about."""

from __future__ import annotations

import reprlib

from torch import Tensor, strided

__all__ = ["describe", "shown"]


class _Short(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        bits = value.bit_length()
        return repr(value) if bits <= 256 else f"<int of {bits} bits>"  # Python limits the digits


_short = _Short()
_short.maxstring = _short.maxother = 80


def shown(value: object) -> str:
    """``repr(value)``, shortened; whatever the value is, this raises nothing."""
    try:
        return _short.repr(value).replace("\n", " ")
    except Exception:  # a tensor that can't print itself, say
        return f"<{type(value).__name__}>"


def describe(value: object) -> str:
    """What a tensor is (dtype, shape, device, strides), or the type and value of anything else."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {shown(value)}"
    kind = "" if type(value) is Tensor else f"{type(value).__name__} "
    name = f"{kind}{str(value.dtype)[6:]}"
    if value.is_nested:  # it has no shape to speak of
        return f"{name} tensor that is nested"
    if value.layout is not strided:
        return f"{name} {list(value.shape)} of layout {value.layout}"
    strides = "" if value.is_contiguous() else f" with strides {list(value.stride())}"
    return f"{name} {list(value.shape)} on {value.device}{strides}"
