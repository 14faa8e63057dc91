"""``make sanitize``: rounds of the CPU kernels under each sanitizer, or under those named.

python -m tests.sanitize [thread] [address,undefined]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.sanitize.build import SANITIZERS, Sanitizer, Unsupported, build, play, probe

ROUNDS = 100  # of each of 32 setups


def main(names: list[str]) -> int:
    if unknown := set(names) - set(SANITIZERS):
        print(f"no such sanitizer: {', '.join(unknown)}; there are {' and '.join(SANITIZERS)}")
        return 2
    return max(watch(SANITIZERS[name]) for name in names or SANITIZERS)


def watch(sanitizer: Sanitizer) -> int:
    def say(text: str) -> None:
        print(f"{sanitizer.name}: {text}", flush=True)

    try:
        probe(sanitizer)
    except Unsupported as error:
        say(str(error))
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        start = time.monotonic()
        compiled = build(sanitizer, Path(scratch) / "rounds")
        say(f"{compiled} units compiled, {time.monotonic() - start:.1f} s")
        start = time.monotonic()
        try:
            done = play(sanitizer, Path(scratch) / "rounds", ROUNDS)
        except subprocess.TimeoutExpired as error:
            say(f"FAILED: the ranks still wait after {error.timeout:.0f} s")
            return 1
    took = f"{time.monotonic() - start:.1f} s"
    said = done.stdout.strip()
    if done.returncode or not said.startswith("ok:"):
        print(done.stdout + done.stderr)
        say(f"FAILED with exit code {done.returncode}, {took}")
        return 1
    say(f"{said.removeprefix('ok: ')}; {took}, nothing to report")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
