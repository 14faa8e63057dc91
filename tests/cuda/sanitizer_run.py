"""A few dozen small rounds of two ranks, for compute-sanitizer, which may check all kernels or, as
here, those of this library:

compute-sanitizer --kernel-name kernel_substring=moe_a2a python -m tests.cuda.sanitizer_run
"""

from __future__ import annotations

import dataclasses
import time

from moe_a2a import local_ranks
from tests.collective.rounds import Case, Round, play_rounds

# The tools take minutes to load all that torch has; what is left is loaded by `main`.
local_ranks.CUDA_SETTINGS["CUDA_MODULE_LOADING"] = "LAZY"

CASES = [
    Case(2, 5, 3, 128, 20, "bf16", "bf16", {"extra": {"id": 8, "odd": 3}}),
    Case(2, 5, 3, 48, 20, "fp16", "fp32"),
    Case(2, 5, 3, 256, 20, "fp8", "fp16", {"scrub": "all"}),
    Case(2, 5, 3, 256, 20, "fp8_block128", "fp8_block128"),
    Case(2, 5, 3, 160, 20, "mxfp8", "mxfp8", {"alignment": 96, "scrub": "all"}),
    Case(2, 5, 3, 128, 20, "nvfp4", "bf16", {"allow_defer": True}),
    Case(2, 1, 1, 128, 20, "mxfp4", "mxfp8"),
    Case(2, 5, 3, 128, 300, "bf16", "bf16"),  # more tokens than the kernel for few takes
    # Rows that no inbox takes: every round goes in bulk.
    Case(2, 5, 3, 256, 20, "bf16", "bf16", {"extra": {"large": 65_536}}),
    Case(2, 5, 3, 4096, 20, "nvfp4", "mxfp8", {"extra": {"large": 65_536}}),
    Case(2, 5, 3, 256, 20, "fp8", "fp32", {"extra": {"large": 65_536}, "scrub": "all"}),
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
    began = time.monotonic()
    for case in CASES:
        rounds = ROUNDS + [Round(7, defer=True)] * bool(case.more.get("allow_defer"))
        # Loading a kernel waits for the device, where the other rank's may be waiting for this one.
        # So all are loaded by a rank with nobody to wait for, and tokens in every round.
        alone = [dataclasses.replace(rnd, tokens=None) for rnd in rounds]
        for size, played in ((1, alone), (case.size, rounds)):
            play = (play_rounds, "nvlink", dataclasses.replace(case, size=size), played)
            local_ranks.run_local(size, play_with_patience, *play, device="cuda:0", timeout=900)
        print(
            f"{len(rounds)} rounds: {case.wire}, {case.combine_wire} "
            f"({time.monotonic() - began:.0f} s)",
            flush=True,
        )


def play_with_patience(ranks, play, backend, case, rounds):
    """The tools slow kernels down a hundred times."""
    return play(ranks, backend, case, rounds, timeout=300)


if __name__ == "__main__":
    main()
