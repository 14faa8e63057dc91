"""The kernels' model itself: what it calls one access has to be one."""

from __future__ import annotations

import subprocess

from moe_a2a._build import cpu_compiler, source_directory
from tests.simt.build import FLAGS, HERE


def test_sixteen_bytes_are_loaded_at_once(tmp_path):
    program = tmp_path / "accesses"
    flags = [*FLAGS.split(), "-pthread", "-include", str(HERE / "simt.h")]
    flags += [f"-I{HERE}", f"-I{source_directory()}"]
    source = str(HERE / "accesses.cc")
    subprocess.run([*cpu_compiler().split(), *flags, source, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
