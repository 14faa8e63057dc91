"""Rows worth quantizing, and torch tensors as the bytes that tests compare.

T rows, H hidden_size.
"""

from __future__ import annotations

import numpy as np
import torch

FLT_MAX = float(np.finfo(np.float32).max)
NEGATIVE_NAN = np.array(0xFFC00001, np.uint32).view(np.float32)
_SMALL = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 2.0**-126, -(2.0**-127), 1e-10]
_LARGE = [6.0, -448.0, 448.00003, 464.0, 1e30, FLT_MAX, -FLT_MAX, np.inf, -np.inf]
SPECIALS = np.array([*_SMALL, *_LARGE, np.nan, NEGATIVE_NAN], np.float32)
DEVICES = ("cpu", "cuda") if torch.cuda.device_count() else ("cpu",)


def raw(tensor: torch.Tensor | None) -> np.ndarray:
    """The bytes of a tensor, `[..., n]` uint8; None has none."""
    if tensor is None:
        return np.zeros(0, np.uint8)
    return tensor.cpu().contiguous().view(torch.uint8).numpy()


def gaussian(rows: int, hidden_size: int, seed: int = 0) -> np.ndarray:
    """Activations: float32 `[rows, hidden_size]`, each row at its own magnitude."""
    rng = np.random.default_rng(seed)
    magnitude = np.exp2(rng.uniform(-12, 12, (rows, 1)))
    return (rng.standard_normal((rows, hidden_size)) * magnitude).astype(np.float32)


def any_bits(rows: int, hidden_size: int, seed: int = 0) -> np.ndarray:
    """Random fp32 bit patterns, NaN and infinities among them: float32 `[rows, hidden_size]`."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1 << 32, (rows, hidden_size), np.uint32).view(np.float32)


def wild(rows: int, hidden_size: int, seed: int = 0) -> np.ndarray:
    """Exponents that change every 16 columns, with a special here and there."""
    rng = np.random.default_rng(seed)
    power = np.repeat(rng.integers(-150, 128, (rows, -(-hidden_size // 16))), 16, axis=1)
    x = np.ldexp(rng.uniform(-2, 2, (rows, hidden_size)), power[:, :hidden_size])
    special = rng.choice(SPECIALS, (rows, hidden_size))
    with np.errstate(over="ignore"):
        return np.where(rng.random((rows, hidden_size)) < 0.02, special, x).astype(np.float32)


def near_ties(rows: int, hidden_size: int, seed: int = 0) -> np.ndarray:
    """Multiples of 1/8 up to 6 and their fp32 neighbours, each block's amax a power of two times 6.

    Scaled by their block they sit on E2M1's ties and one step beside them.
    """
    rng = np.random.default_rng(seed)
    x = (rng.integers(-48, 49, (rows, hidden_size)) / 8).astype(np.float32)
    step = rng.choice(np.array([-np.inf, 0.0, np.inf], np.float32), x.shape)
    x = np.where(step == 0, x, np.nextafter(x, step))
    x[:, ::16] = 6.0
    return (x * np.exp2(rng.integers(-20, 20, (rows, 1)))).astype(np.float32)


def every_bf16() -> np.ndarray:
    """All 65536 values of bf16 as float32, `[65536]`."""
    return (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)


def with_neighbours(x: np.ndarray) -> np.ndarray:
    """Each float32 with the one below and the one above, `[3 * len(x)]`."""
    x = x.astype(np.float32)
    return np.concatenate([np.nextafter(x, np.float32(-np.inf)), x, np.nextafter(x, np.inf)])
