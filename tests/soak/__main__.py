"""Soak: random exchanges that lose ranks, every byte against the oracle, for as long as wanted.

    make soak MINUTES=10 [RANKS=8] [SEED=1] [DEVICE=cpu|simt|cuda]

Every exchange follows from the seed and its number: `--first 17 --episodes 1` repeats the
eighteenth. Ends with status 1 at the first wrong byte, hang, leak or broken promise.
"""

from __future__ import annotations

import argparse
import secrets
import sys

from tests.soak.places import PLACES
from tests.soak.run import Found, Soak


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--ranks", type=int, help="default: 8 on the CPU, 3 or 4 elsewhere")
    parser.add_argument("--seed", type=int, help="default: another one each time")
    parser.add_argument("--device", choices=sorted(PLACES), default="cpu")
    parser.add_argument("--first", type=int, default=0, help="number of the first episode")
    parser.add_argument("--episodes", type=int, help="how many, whatever the time")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    seed = given.seed if given.seed is not None else secrets.randbelow(10**6)
    soak = Soak(seed, given.device, ranks=given.ranks)
    status, end = 0, "nothing wrong was found"
    try:
        soak.run(given.minutes * 60, first=given.first, episodes=given.episodes)
    except Found as error:
        ranks = f" --ranks {given.ranks}" if given.ranks else ""
        again = f"--device {given.device}{ranks} --seed {seed} --first {error.number} --episodes 1"
        status, end = 1, f"FOUND: {error}\n\nAgain: python -m tests.soak {again}"
    except KeyboardInterrupt:
        status, end = 130, "interrupted; nothing wrong was found until then"
    finally:
        soak.close()
    print(f"\n{soak.ledger.table()}\n\n{end}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
