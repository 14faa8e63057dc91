"""A process whose peers have died ends like any other, though it never calls close() or reset()."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_a2a import AllToAll, Spec
from moe_a2a.errors import PeerTimeout

LIMIT = 1.0


def main(rank: int, port: int) -> None:
    """Rank 0, which hosts the group's store, dies. Rank 1 returns from main with the exchange as
    it is, rank 2 ends by the error that it does not catch."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    AllToAll(Spec(3, 8, 2, 64, 4), backend="shm").close()  # a process loads for longer than LIMIT
    a2a = AllToAll(Spec(3, 8, 2, 64, 4), backend="shm", timeout=LIMIT)
    call = (
        torch.zeros(4, 64, dtype=torch.bfloat16),
        torch.arange(8).int().view(4, 2),
        torch.ones(4, 2),
    )
    recv = a2a.dispatch(*call)
    dist.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        a2a.combine(a2a.combine_buffer().zero_())
    except PeerTimeout as error:
        lines = Path("/proc/self/maps").read_text().splitlines()
        windows = {line.split()[4] for line in lines if "memfd:moe_a2a" in line}
        print("missing", *error.ranks, "at", time.time(), "windows", *windows, flush=True)
        if rank == 2:
            raise
    globals()["kept"] = a2a, recv  # until the interpreter takes its modules apart


def mapped() -> set[str]:
    """Inodes of windows that some process holds."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:  # it has ended
            continue
        found |= {line.split()[4] for line in lines if "memfd:moe_a2a" in line}
    return found


@pytest.mark.slow
def test_survivors_exit_without_hanging_and_leave_nothing():
    names = {path.name for path in Path("/dev/shm").iterdir()}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.collective.test_exits"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(3)
    ]
    try:
        outputs = [process.communicate(timeout=60) for process in ranks]
        ended = time.time()
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [-signal.SIGKILL, 0, 1], outputs
    assert "PeerTimeout" in outputs[2][1]
    windows = set()
    for rank in (1, 2):
        words = outputs[rank][0].split()
        assert words[:3] == ["missing", "0", "at"], outputs[rank]
        assert ended - float(words[3]) < 5, "seconds from the error to the end of the process"
        windows |= set(words[5:])
    assert windows, "this looks at nothing"
    assert not windows & mapped()
    new = {path.name for path in Path("/dev/shm").iterdir()} - names
    assert not [name for name in new if any(str(p.pid) in name for p in ranks)], new


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
