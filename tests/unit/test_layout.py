"""The workspace: regions apart, aligned, sized by the formula, placed by the Spec alone."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

from moe_a2a import Spec
from moe_a2a.formats import FORMATS
from moe_a2a.spec import COMBINE_WIRES
from tests.oracle_formats import WIRES

ROOT = Path(__file__).resolve().parents[2]


def pad128(nbytes: int) -> int:
    return -(-nbytes // 128) * 128


def geometries():
    sizes = ((1, 1, 1, 16), (3, 7, 5, 128), (4, 256, 8, 7168), (8, 6, 3, 2944), (64, 128, 16, 256))
    for (size, experts, top_k, hidden), tokens, wire, combine_wire in product(
        sizes, (1, 37, 4096), WIRES, COMBINE_WIRES
    ):
        for defer, extra in ((False, {}), (True, {"z": 1, "a": 515})):
            try:
                yield Spec(
                    size, experts, min(top_k, experts), hidden, tokens, wire, combine_wire,
                    allow_defer=defer, extra=extra,
                )  # fmt: skip
            except ValueError:  # noqa: PERF203 - a wire that does not fit
                continue


SPECS = list(geometries())


def test_regions_are_disjoint_aligned_and_in_order():
    assert len(SPECS) > 500
    for spec in SPECS:
        table = spec.workspace()
        end = 0
        for name, offset, nbytes in table:
            assert offset % 128 == 0, (spec, name)
            assert offset >= end, (spec, name, "overlaps")
            assert nbytes >= 0
            end = offset + nbytes
        assert spec.workspace_bytes() == end
        names = [region.name for region in table]
        assert len(set(names)) == len(names)
        assert {f"extra:{name}" for name in spec.extra} <= set(names)


def test_size_is_the_formula():
    for spec in SPECS:
        rows = spec.ep_size * spec.max_tokens_per_rank
        payload, scales = spec.row_bytes
        if spec.allow_defer:
            payload = max(payload, 2 * spec.hidden_size)
        parts = [payload, scales, 4 * spec.top_k, 4 * spec.top_k, *spec.extra.values()]
        received = sum(pad128(rows * part) for part in parts)
        combine_row = {"bf16": 2, "fp16": 2}.get(spec.combine_wire, 4) * spec.hidden_size
        regions = {name: nbytes for name, _, nbytes in spec.workspace()}
        inboxes = regions.pop("dispatch_inbox")
        control, combine = regions.pop("control"), regions.pop("combine")
        assert sum(regions.values()) == received, spec
        if spec.combine_wire in ("bf16", "fp16", "fp32"):
            assert combine == pad128(rows * combine_row), spec
        else:
            assert rows * spec.hidden_size < combine <= pad128(rows * 4 * spec.hidden_size), spec
        assert inboxes <= min(1.15 * (received + combine), 64 * 2**20), spec
        assert control < 128 * (8 * spec.ep_size + 8), "a few lines per rank"


def test_the_inbox_holds_2_mib_of_packets_per_peer_at_most():
    for ranks, tokens, wanted in ((2, 4096, 4 * 2**20), (2, 8, 2 * 8 * 60 * 256), (64, 512, 2**25)):
        spec = Spec(ranks, 256, 8, 7168, tokens)
        inbox = {name: nbytes for name, _, nbytes in spec.workspace()}["dispatch_inbox"]
        assert inbox == wanted


def test_the_table_prints():
    spec = Spec(4, 256, 8, 7168, 512, wire="nvfp4", extra={"request": 8})
    lines = str(spec.workspace()).splitlines()
    assert len(lines) == len(spec.workspace()) + 2
    for region, line in zip(spec.workspace(), lines[1:], strict=False):
        assert line.split() == [region.name, f"{region.offset:,}", f"{region.nbytes:,}"]
    assert f"{spec.workspace_bytes():,}" in lines[-1]


def test_wires_are_numbered_as_in_the_formats_table():
    source = (ROOT / "csrc" / "args.h").read_text()
    found = re.search(r"enum Wire : int \{([^}]*)\}", source)
    numbered = [name.strip() for name in found[1].split(",") if name.strip()]
    wanted = ["k" + "".join(part.capitalize() for part in name.split("_")) for name in FORMATS]
    assert numbered == [*wanted, "kFp32"]
    assert list(FORMATS) == list(WIRES)


def test_owners_of_experts():
    """With b = E // W and r = E % W the first r ranks own b + 1 experts, the others b."""
    for size in (1, 2, 3, 4, 7, 8, 64):
        for experts in range(1, 3 * size + 2):
            spec = Spec(size, experts, 1, 16, 1)
            base, more = experts // size, experts % size
            runs = [list(spec.experts_of(rank)) for rank in range(size)]
            assert [len(run) for run in runs] == [base + 1] * more + [base] * (size - more)
            assert [expert for run in runs for expert in run] == list(range(experts))
