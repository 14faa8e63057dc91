"""Rank processes shared by all collective tests, the backends, and how much hypothesis tries."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from moe_a2a.backends import BACKENDS
from moe_a2a.local_ranks import CUDA_SETTINGS
from moe_a2a.testing import RankPool
from tests.faults.crew import Crew

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As shells start what runs in the background; what tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

os.environ.update(CUDA_SETTINGS)
GPUS = torch.cuda.device_count()  # unlike is_available() it does not start the driver
CPU_BACKENDS = ("shm", "collective")
# Where there is no GPU the others are no parameters at all: a skip each would say nothing.
EVERY_BACKEND = CPU_BACKENDS + tuple(name for name in ("nvlink",) if GPUS and name in BACKENDS)
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


@pytest.fixture(scope="session")
def crew() -> Iterator[Crew]:
    """Processes that tests may kill."""
    with Crew(8, PRELOAD) as ranks:
        yield ranks


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=EVERY_BACKEND)
def every_backend(request: pytest.FixtureRequest) -> str:
    """For rank functions that put their tensors where `tests.collective.places` says."""
    return str(request.param)


def sizes(backend: str, *wanted: int) -> list[int]:
    """World sizes for rank processes: up to 4 where they share a GPU, in time slices of ms."""
    return [size for size in wanted if backend in CPU_BACKENDS or size <= max(4, GPUS)]


class NeedsGpu(pytest.Directory):
    """One skip for the whole folder."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip("no CUDA device")


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if path.name == "cuda" and not GPUS:
        return NeedsGpu.from_parent(parent, path=path)
    return None
