"""Divisions that are products: compiled for the CPU, they need no kernel."""

from __future__ import annotations

import subprocess

from moe_a2a._build import cpu_compiler, source_directory
from tests.simt.build import HERE


def test_quotients_are_exact(tmp_path):
    program = tmp_path / "divisors"
    flags = ["-std=c++17", "-O2", f"-I{source_directory()}", str(HERE / "divisors.cc")]
    subprocess.run([*cpu_compiler().split(), *flags, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[:1000]
