"""The Triton kernels' tests on a CPU: an interpreter has to be asked for before Triton is imported,
so they run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.triton_cases import *  # noqa: F403
    from tests.triton_layers import *  # noqa: F403
    from tests.triton_w4a4_cases import *  # noqa: F403
else:

    @pytest.mark.timeout(400)
    def test_in_an_interpreter():
        pytest.importorskip("triton", reason="triton is not installed (extra `cuda`)")
        command = [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider"]
        ran = subprocess.run(
            command,
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
