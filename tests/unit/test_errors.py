"""The error classes as callers catch, read and send them."""

from __future__ import annotations

import pickle

import pytest

from moe_a2a import errors
from moe_a2a.errors import BackendUnavailable, MoeA2AError, PeerTimeout

TIMEOUT = PeerTimeout("late", ranks=[3, 5], phase="combine", round=7, waited=1.5)
PLAIN = (
    "GeometryError",
    "StateError",
    "PayloadError",
    "CapacityError",
    "WorkspaceError",
    "BuildError",
)


def test_all_are_subclasses_of_one():
    names = {*PLAIN, "PeerTimeout", "BackendUnavailable"}
    assert names <= set(errors.__all__)
    for name in names:
        assert issubclass(getattr(errors, name), MoeA2AError)
    assert (TIMEOUT.ranks, TIMEOUT.phase, TIMEOUT.round, TIMEOUT.waited) == (
        (3, 5),
        "combine",
        7,
        1.5,
    )
    assert str(TIMEOUT) == "late"
    assert issubclass(PeerTimeout, TimeoutError)


def test_plain_errors_survive_pickling():
    for name in PLAIN:
        error = pickle.loads(pickle.dumps(getattr(errors, name)("why")))
        assert (type(error).__name__, str(error)) == (name, "why")


@pytest.mark.parametrize("error", [TIMEOUT, BackendUnavailable("no", reasons={"shm": "why"})])
def test_errors_with_attributes_survive_pickling(error):
    """They cross process boundaries: torch.multiprocessing, Ray, concurrent.futures."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
