"""Calls into gloo that end: it does not hear Ctrl-C, nor always keep its limits."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["interruptible"]


def interruptible(call: Callable[[], Any], seconds: float) -> Any:
    """``call()`` in a thread of its own, for at most ``seconds``.

    Raises:
        RuntimeError: that of the call, or that it took longer than ``seconds``.
    """
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return result.result(seconds)
    except FutureTimeout as error:
        raise RuntimeError(f"no answer within {seconds:.2f} s") from error
