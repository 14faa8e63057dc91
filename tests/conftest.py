"""Rank processes shared by all collective tests, and how much hypothesis tries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from moe_a2a.testing import RankPool

if TYPE_CHECKING:
    from collections.abc import Iterator

BACKENDS = ("shm", "collective")
PRELOAD = ("pytest", "hypothesis", "hypothesis.strategies", "ml_dtypes")

# The same examples in every run, so that a red build means a change; a search for new ones is
# `pytest --hypothesis-profile=search`.
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("search", deadline=None, max_examples=500)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    with RankPool(8, preload=PRELOAD) as ranks:
        yield ranks


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
