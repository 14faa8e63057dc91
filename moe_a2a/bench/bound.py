"""The memcpy bound: what copying the round's rows costs, with no protocol at all.

The same processes, at the same time, copy between shared mappings every row that a dispatch writes
(the rank's own included), every row that a combine pushes back to a peer, and the output. Nobody
waits for anybody. Two ways of copying are tried and the faster one counts.

Shape letters: T tokens of this rank, W ep_size.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from itertools import starmap
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["METHODS", "MemcpyBound", "RowBytes"]

METHODS = ("memmove", "index_select")
_WORD = 8


class RowBytes(NamedTuple):
    """Bytes of a row in dispatch, in combine, and of an output row."""

    dispatch: int
    combine: int
    output: int


class _Copies(NamedTuple):
    """Rows ``source[rows[i]] -> target[i]``; source and target are int64 [rows, words]."""

    source: Tensor
    rows: Tensor
    target: Tensor


class MemcpyBound:
    """The copies of one rank. Collective: the ranks map each other's memory.

    Args:
        goes: bool [T, W], of this rank's tokens.
        arriving: rows from each source.
    """

    def __init__(self, goes: Tensor, arriving: list[int], nbytes: RowBytes, rank: int) -> None:
        tokens, size = goes.shape
        # Slot regions of the largest T over all ranks: a rank knows its own and its peers' rows.
        words = RowBytes(*(-(-count // _WORD) for count in nbytes))
        slots = _largest(max(tokens, *arriving, 1))
        with _Mappings(size * slots * (words.dispatch + words.combine), rank, size) as windows:
            regions = [_regions(window, size, slots, words) for window in windows]
        x = torch.ones(max(tokens, 1), words.dispatch, dtype=torch.int64)
        y = torch.ones(max(*arriving, 1), words.combine, dtype=torch.int64)
        self.dispatch_copies = [
            _Copies(x, index, regions[to][0][rank, : index.numel()])
            for to in range(size)
            if (index := goes[:, to].nonzero().squeeze(1)).numel()
        ]
        self.combine_copies = [
            _Copies(y, torch.arange(count), regions[to][1][rank, :count])
            for to, count in enumerate(arriving)
            if count and to != rank
        ]
        source = torch.ones(max(tokens, 1), words.output, dtype=torch.int64)
        out = torch.empty_like(source)
        if tokens:
            self.combine_copies.append(_Copies(source, torch.arange(tokens), out[:tokens]))

    def calls(self, method: str) -> tuple[Callable[[], object], Callable[[], object]]:
        """What takes the place of dispatch and of combine."""
        make = _by_memmove if method == "memmove" else _by_index_select
        return make(self.dispatch_copies), make(self.combine_copies)


def _by_memmove(copies: list[_Copies]) -> Callable[[], object]:
    # PyDLL: no release of the interpreter lock around each row.
    library = ctypes.PyDLL(None)
    library.memmove.restype = None
    rows = [row for part in copies for row in _addresses(part)]

    def call() -> None:
        deque(starmap(library.memmove, rows), maxlen=0)

    return call


def _addresses(
    copies: _Copies,
) -> Iterator[tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]]:
    width = copies.source.shape[1] * _WORD
    for slot, row in enumerate(copies.rows.tolist()):
        yield (
            ctypes.c_void_p(copies.target.data_ptr() + slot * width),
            ctypes.c_void_p(copies.source.data_ptr() + row * width),
            ctypes.c_size_t(width),
        )


def _by_index_select(copies: list[_Copies]) -> Callable[[], object]:
    def call() -> None:
        for source, rows, target in copies:
            torch.index_select(source, 0, rows, out=target)

    return call


def _regions(window: Tensor, size: int, slots: int, words: RowBytes) -> tuple[Tensor, Tensor]:
    """int64 [W, slots, words] of dispatch and of combine."""
    split = size * slots * words.dispatch
    dispatch, combine = window[:split], window[split:]
    return (
        dispatch.view(size, slots, words.dispatch),
        combine.view(size, slots, words.combine),
    )


def _largest(count: int) -> int:
    largest = torch.tensor(count)
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


class _Mappings:
    """One anonymous shared file per rank, mapped by all; the files are closed at the end.

    memfd: no name to clean up, and no /dev/shm of 64 MB in a container.
    """

    def __init__(self, words: int, rank: int, size: int) -> None:
        self._words, self._rank, self._size = words, rank, size

    def __enter__(self) -> list[Tensor]:
        nbytes = self._words * _WORD
        self._descriptor = os.memfd_create("moe_a2a_bound")
        os.ftruncate(self._descriptor, nbytes)
        os.posix_fallocate(self._descriptor, 0, nbytes)
        mine = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        paths = [mine] * self._size
        if dist.is_initialized():
            dist.all_gather_object(paths, mine)
        mapped = [
            torch.from_file(path, shared=True, size=self._words, dtype=torch.int64)
            for path in paths
        ]
        for window in mapped:  # touch every page through this process's own page table
            window[:: 4096 // _WORD].sum()
        mapped[self._rank].zero_()
        return mapped

    def __exit__(self, *_: object) -> None:
        if dist.is_initialized():
            dist.barrier()
        os.close(self._descriptor)
