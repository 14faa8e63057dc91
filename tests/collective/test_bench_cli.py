"""``python -m moe_a2a bench`` as people start it: processes, exit codes, what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = [sys.executable, "-m", "moe_a2a", "bench"]
LONG = ["--hidden", "256", "--tokens", "8", "--seconds", "60", "--no-plot", "--no-rivals"]


def run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BENCH, *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.slow
def test_quick_run_checks_times_and_writes(tmp_path):
    start = time.monotonic()
    done = run("--ranks", "2", "--quick", "--hidden", "1024", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 20
    (path,) = tmp_path.glob("*.json")
    assert path.with_suffix(".png").is_file()
    document = json.loads(path.read_text())
    names = {case["name"] for case in document["cases"]}
    assert {"shm", "collective", "memcpy bound", "gloo a2a, whole"} <= names
    assert all(len(case["per_rank"]) == 2 for case in document["cases"])
    assert str(tmp_path) not in path.read_text()
    assert str(path) in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "1,x"], "'x' given, expected an integer >= 1"),
        (["--wire", "fp9"], "fp8_block128"),
        (["--hidden", "100"], "multiple of 16"),
        (["--routing", "nowhere.npz"], "nor a file that exists"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_exit_code_2(arguments, said):
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


class Running:
    """A bench with two ranks in a process group of its own, in the middle of its first point."""

    def __init__(self, out: Path) -> None:
        self.process = subprocess.Popen(
            [*BENCH, *LONG, "--ranks", "2", "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        while not self.process.stderr.readline().startswith("[1/"):
            assert self.process.poll() is None
        time.sleep(0.3)

    def left(self) -> dict[int, str]:
        """Processes of the group that still run: pid -> threads and command."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    name, _, rest = (entry / "stat").read_text().rpartition(")")
                except OSError:
                    continue
                fields = rest.split()  # state, ppid, pgrp, ..., threads at 17
                if int(fields[2]) == self.process.pid and fields[0] not in "ZX":
                    found[int(entry.name)] = f"{fields[17]} threads, {name}"
        return found

    def wait_until_none_is_left(self) -> None:
        deadline = time.monotonic() + 5
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not self.left()

    def end(self) -> None:
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def running(tmp_path):
    bench = Running(tmp_path)
    yield bench
    bench.end()


def test_ctrl_c_ends_all_ranks_at_once(running):
    start = time.monotonic()
    os.killpg(running.process.pid, signal.SIGINT)
    assert running.process.wait(timeout=10) == 130
    assert time.monotonic() - start < 2.5
    running.wait_until_none_is_left()
    said = running.process.stderr.read()
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "python -m moe_a2a bench: interrupted"


def ranks_of(running: Running) -> list[int]:
    """The processes of the group with threads (gloo's), in the order in which they started."""
    with_threads = [pid for pid, text in running.left().items() if not text.startswith("1 ")]
    return sorted(pid for pid in with_threads if pid != running.process.pid)


def test_a_rank_that_dies_is_named(running):
    os.kill(ranks_of(running)[1], signal.SIGKILL)
    assert running.process.wait(timeout=10) == 1
    running.wait_until_none_is_left()
    assert "rank 1 was ended by SIGKILL" in running.process.stderr.read()


def test_ranks_end_with_their_parent(running):
    running.process.kill()
    running.process.wait()
    running.wait_until_none_is_left()


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "moe_a2a", "bench", "--quick", "--hidden", "256", "--no-rivals", "--no-plot",
        "--out", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.json"))) == 1
