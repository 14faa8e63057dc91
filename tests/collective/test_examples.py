"""The examples run as their first lines say, and notice when they are wrong."""

from __future__ import annotations

import subprocess
import sys
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


def test_runtime_fails_where_ranks_differ_from_one_process(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(RUNTIME.parent))
    import moe_runtime

    options = moe_runtime.Options("mxfp4", "mxfp4", "")
    wanted = [torch.randn(count, 8) for count in (3, 2)]
    whole = [torch.cat([wanted[0]]), wanted[1].clone()]
    assert moe_runtime.compare([whole], wanted, options, 1)
    for wrong in (wanted[1] + 0.1, wanted[1] * float("nan"), wanted[1][:1]):
        assert not moe_runtime.compare([[whole[0], wrong]], wanted, options, 1)
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
