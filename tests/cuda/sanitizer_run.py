"""A few dozen small rounds of two ranks, for compute-sanitizer:

compute-sanitizer --tool memcheck python -m tests.cuda.sanitizer_run
"""

from __future__ import annotations

from moe_a2a.testing import run_local
from tests.collective.rounds import Case, Round, play_rounds

CASES = [
    Case(2, 5, 3, 128, 20, "bf16", "bf16", {"extra": {"id": 8, "odd": 3}}),
    Case(2, 5, 3, 48, 20, "fp16", "fp32"),
    Case(2, 5, 3, 256, 20, "fp8", "fp16", {"scrub": "all"}),
    Case(2, 5, 3, 256, 20, "fp8_block128", "fp8_block128"),
    Case(2, 5, 3, 160, 20, "mxfp8", "mxfp8", {"alignment": 96, "scrub": "all"}),
    Case(2, 5, 3, 128, 20, "nvfp4", "bf16", {"allow_defer": True}),
    Case(2, 1, 1, 128, 20, "mxfp4", "mxfp8"),
]
ROUNDS = [
    Round(1),
    Round(2, rows=1, specials=True),
    Round(3, routing="invalid", wide_ids=True, strided=True),
    Round(4, rows=2, routing="hot"),
    Round(5, rows=0),
    Round(6, tokens=(0, 20), memory="strided"),
]


def main() -> None:
    for case in CASES:
        rounds = ROUNDS + [Round(7, defer=True)] * bool(case.more.get("allow_defer"))
        play = (play_rounds, "nvlink", case, rounds)
        run_local(2, play_with_patience, *play, device="cuda:0", timeout=900)
        print(f"{len(rounds)} rounds: {case.wire}, {case.combine_wire}", flush=True)


def play_with_patience(ranks, play, backend, case, rounds):
    """The tools slow kernels down a hundred times and run those of several streams in turn."""
    return play(ranks, backend, case, rounds, timeout=300)


if __name__ == "__main__":
    main()
