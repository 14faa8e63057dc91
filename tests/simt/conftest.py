"""The kernels on the CPU, compiled once before any rank opens them."""

from __future__ import annotations

import pytest

from tests.simt.backend import library


@pytest.fixture(scope="session")
def compiled():
    library()
