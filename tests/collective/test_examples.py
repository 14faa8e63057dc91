"""The examples run as their first lines say, and notice when they are wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / "examples" / "moe_runtime.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        pytest.param(["--weights", "nvfp4"], marks=pytest.mark.slow),
        pytest.param(["--wire", "fp16"], marks=pytest.mark.slow),
        pytest.param(["--weights", "nvfp4", "--wire", "mxfp8"], marks=pytest.mark.slow),
    ],
)
def test_runtime_on_ranks_of_its_own(arguments):
    done = run(RUNTIME, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *batches, last = done.stdout.splitlines()
    assert first.endswith("4 ranks")
    assert len(batches) == 3
    assert last.startswith("equal within 0.02")


@pytest.mark.slow
def test_runtime_under_torchrun_reads_the_file_that_is_there(tmp_path):
    file = tmp_path / "weights.pt"
    done = run(*TORCHRUN, RUNTIME, "--weights", "nvfp4", "--file", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal within" in done.stdout
    stored = torch.load(file, weights_only=True)
    stored["layers"].pop()
    torch.save(stored, file)
    written = file.read_bytes()
    assert run(RUNTIME, "--weights", "nvfp4", "--file", file, "--ranks", 2).returncode == 0
    assert file.read_bytes() == written


@pytest.fixture
def runtime(monkeypatch):
    monkeypatch.syspath_prepend(str(RUNTIME.parent))
    import moe_runtime

    return moe_runtime


def test_runtime_fails_where_ranks_differ_from_one_process(runtime, capsys):
    options = runtime.Options("mxfp4", "mxfp4", "", 1, "cpu")
    wanted = [torch.randn(count, 8) for count in (3, 2)]
    whole = [torch.cat([wanted[0]]), wanted[1].clone()]
    assert runtime.compare([whole], wanted, options, print)
    for wrong in (wanted[1] + 0.1, wanted[1] * float("nan"), wanted[1][:1]):
        assert not runtime.compare([[whole[0], wrong]], wanted, options, print)
        assert "NOT EQUAL" in capsys.readouterr().out


@pytest.mark.slow
def test_runtime_exit_code_is_1_where_a_rank_is_wrong(tmp_path):
    """One that holds the experts of its neighbour."""
    text = RUNTIME.read_text()
    right = "mine = spec.experts_of(self.a2a.ep_rank)"
    wrong = "mine = spec.experts_of(max(self.a2a.ep_rank - 1, 0))"
    assert text.count(right) == 1
    broken = tmp_path / "broken.py"
    broken.write_text(text.replace(right, wrong))
    done = run(broken, "--ranks", 2)
    assert done.returncode == 1, done.stderr
    assert "NOT EQUAL" in done.stdout
    assert done.stderr.splitlines() == ["moe_runtime: rank 0: logits are not those of one process"]


def left_of(group):
    """Processes of the group that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


@pytest.fixture
def refused(runtime, capsys, monkeypatch):
    """What `main` says of arguments that it refuses before any rank starts."""

    def say(*arguments):
        def started(*given):
            raise AssertionError("ranks started")

        monkeypatch.setattr(runtime, "start_ranks", started)
        try:
            code = runtime.main([str(one) for one in arguments])
        except SystemExit as ended:
            code = ended.code
        assert code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return say


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "0"], "'0' given, expected an integer >= 1"),
        (["--ranks=-1"], "'-1' given, expected an integer >= 1"),
        (["--wire", "bogus"], "invalid choice: 'bogus'"),
        (["--file", "/nowhere/moe.pt"], "there is no folder /nowhere"),
        (["--file", "/tmp"], "--file /tmp: Is a directory"),
    ],
)
def test_runtime_refuses_a_wrong_argument_in_one_line(refused, arguments, said):
    assert said in refused(*arguments)


def test_under_torchrun_the_first_rank_says_what_concerns_all(runtime, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        runtime.main(["--wire", "bogus"])
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("WORLD_SIZE", "2")

    def failed(*given):
        raise runtime.RankFailed("rank 1: why")

    monkeypatch.setattr(runtime, "join_torchrun", failed)
    monkeypatch.setattr(runtime, "ready", lambda *given: None)
    assert runtime.main([]) == 1
    assert capsys.readouterr().err == "moe_runtime: rank 1: why\n"


def test_runtime_refuses_a_file_that_is_not_what_was_asked_for(
    runtime, refused, tmp_path, monkeypatch
):
    monkeypatch.setattr(runtime, "E", 1)
    file = tmp_path / "moe.pt"
    runtime.write_checkpoint(file, "nvfp4")
    assert refused("--file", file).endswith("it holds nvfp4 weights, not mxfp4")
    whole = "not a whole checkpoint of this example"
    stored = torch.load(file, weights_only=True)
    mixed = [*stored["layers"][:1], {"gate_up_proj_blocks": stored["embedding"]}]
    for other in (torch.zeros(3), {}, {**stored, "layers": []}, {**stored, "layers": mixed}):
        other_file = tmp_path / "other.pt"
        torch.save(other, other_file)
        assert refused("--file", other_file, "--weights", "nvfp4").endswith(whole)

    def full(*given):
        raise RuntimeError("enforce fail: the disk is full\nand a stack")

    monkeypatch.setattr(runtime, "write_checkpoint", full)
    assert refused("--file", tmp_path / "new.pt").endswith("enforce fail: the disk is full")
    file.write_bytes(file.read_bytes()[:-1000])
    assert refused("--file", file, "--weights", "nvfp4").endswith(
        "not a whole checkpoint of this example"
    )


def test_an_interrupted_runtime_leaves_no_file(runtime, tmp_path, monkeypatch):
    def interrupted(stored, path):
        Path(path).write_bytes(b"the first half")
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "E", 1)
    monkeypatch.setattr(runtime.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runtime.write_checkpoint(tmp_path / "moe.pt", "nvfp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3, 6])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_runtime_and_its_ranks_end_together(tmp_path, number, processes):
    """Ctrl-C reaches the whole group, a kill the parent only: during imports, and while the
    forkserver or ranks start."""
    process = subprocess.Popen(
        [sys.executable, RUNTIME],
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "err").open("w"),
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        while len(left_of(process.pid)) < processes:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        code = process.wait(timeout=10)
        deadline = time.monotonic() + 10
        while left_of(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left_of(process.pid)
    finally:
        for pid in left_of(process.pid):
            os.kill(pid, signal.SIGKILL)
    if number == signal.SIGKILL:
        assert code == -number
        return
    assert code == 128 + number
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert (tmp_path / "err").read_text() == f"moe_runtime: {word}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["err"]
