"""`close` waits for nobody; memory that queued kernels use goes when the device is through."""

from __future__ import annotations

import weakref

import pytest

from moe_a2a.backends import departing
from tests.collective.rounds import Case, Round, opened, play
from tests.simt.backend import Simt, register
from tests.simt.playing import NEEDS

pytestmark = NEEDS


def closes_before_the_device_is_through(ranks):
    register()
    ended, told = [False], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Simt, "_ended", lambda _: lambda: ended[0])
        a2a = opened(ranks, "simt", Case(1))
        play(a2a, ranks, Case(1), Round(1))
        impl = a2a._impl
        impl._library = _Told(impl._library, told)  # not by the patch, which would hold it
        memory = [weakref.ref(part) for part in (impl._memory, impl._window.tensor)]
        a2a.close()
        a2a.close()
        del a2a, impl
        departing.sweep()
        assert all(part() is not None for part in memory), "kernels still use it"
        assert not told, "a round that was queued was cut off"
        ended[0] = True
        departing.sweep()
        assert all(part() is None for part in memory)


class _Told:
    """A library, and whether waits were told to end."""

    def __init__(self, library, told):
        self._library, self._told = library, told

    def __getattr__(self, name):
        return getattr(self._library, name)

    def abandon(self, endpoint):
        self._told.append(endpoint)


def test_memory_stays_for_rounds_that_are_queued(pool):
    pool.run(closes_before_the_device_is_through, ranks=1)
