"""What the sanitizers are for is broken, one line at a time, and each time they have to say so."""

from __future__ import annotations

import pytest

from tests.sanitize.build import SANITIZERS, Change, Unsupported, build, play, probe

RACE = "WARNING: ThreadSanitizer: data race"
ANNOUNCE = "__atomic_store_n(&arrival.epoch, e.epoch, __ATOMIC_RELEASE)"
POST = "__atomic_store_n(&post.generation, e.generation, __ATOMIC_RELEASE)"
ACQUIRE = "__atomic_load_n(&word, __ATOMIC_ACQUIRE)"
SEEN = "const uint32_t seen = load_acquire(e.line<Arrival>(e.rank, row, peer).epoch)"
SENT = "  announce(e, kArriveDispatch, sent);\n"
SEND_AGAIN = (
    "  if (!a.wide_ids) send_rows<int32_t>(e, a, std::vector<int32_t>(kMaxRanks).data());\n"
)
READ = "sequence.load(std::memory_order_acquire)"
POSTED = "line.sequence.store((at | 1) + 1, std::memory_order_release)"
AWAIT = "const Status status = await_arrivals(e, kArriveCombine, slice_ns);"
OWNER = "exists ? (uint64_t{1} << e.owner[id]) & a.active : 0"
CELL = "(from * geometry.max_tokens + slot)"

CHANGES = {
    "rows announced without a release": (
        "thread", RACE, Change("cpu/wait.cc", ANNOUNCE, ANNOUNCE.replace("RELEASE", "RELAXED"))),
    "rows looked at without an acquire": (
        "thread", RACE, Change("cpu/wait.cc", ACQUIRE, ACQUIRE.replace("ACQUIRE", "RELAXED"))),
    "a post without a release": (
        "thread", RACE, Change("cpu/wait.cc", POST, POST.replace("RELEASE", "RELAXED"))),
    "an announcement looked at by a plain load": (
        "thread", RACE, Change("cpu/wait.cc", SEEN, SEEN.replace("load_acquire", ""))),
    "a meeting without a release": (
        "thread", RACE, Change("cpu/meet.h", POSTED, POSTED.replace("release", "relaxed"))),
    "a meeting without an acquire": (
        "thread", RACE, Change("cpu/meet.h", READ, READ.replace("acquire", "relaxed"))),
    "rows written after their announcement": (
        "thread", RACE, Change("cpu/dispatch.cc", SENT, SENT + SEND_AGAIN)),
    "rows summed before they are awaited": (
        "thread", RACE, Change("cpu/combine.cc", AWAIT, "reduce(e);\n  " + AWAIT)),
    "poison where peers may be writing": (
        "thread", RACE, Change("cpu/debug.cc", "e.facts.phase == kDispatch",
                               "e.facts.phase == kCombineOp")),
    "a row too many is scrubbed": (
        "address,undefined", "AddressSanitizer: use-after-poison",
        Change("cpu/dispatch.cc", "e.max_rows - e.received[source];",
               "e.max_rows - e.received[source] + 1;")),
    "a row of the inbox too far": (
        "address,undefined", "AddressSanitizer: use-after-poison",
        Change("cpu/endpoint.h", CELL, CELL.replace("slot", "slot + 1"))),
    "a row of the caller read too far": (
        "address,undefined", "AddressSanitizer: heap-buffer-overflow",
        Change("cpu/dispatch.cc", "a.ids.row(t)", "a.ids.row(t + 1)")),
    "an empty y is copied from": (
        "address,undefined", "runtime error: null pointer",
        Change("cpu/combine.cc", "if (rows == 0) return;", "")),
    "a shift by what is no rank": (
        "address,undefined", "runtime error: shift exponent",
        Change("cpu/dispatch.cc", OWNER,
               "(uint64_t{1} << (exists ? e.owner[id] : id)) & (exists ? a.active : 0)")),
    # Without a sanitizer's help: what arrives is compared.
    "weights of choices that go nowhere": (
        "thread", "weights are not what was sent",
        Change("cpu/dispatch.cc", "bit ? weights[k] : 0.0f", "weights[k]")),
    "sums that begin with something": (
        "thread", "sums are not what was sent",
        Change("cpu/combine.cc", "float s = 0.0f", "float s = 1.0f")),
}  # fmt: skip


# Each compiles everything anew: `make test` takes one of each kind.
QUICK = ("rows announced without a release", "a row too many is scrubbed")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CHANGES]
)
def test_it_is_reported(name, tmp_path):
    kind, report, *changes = CHANGES[name]
    sanitizer = SANITIZERS[kind]
    try:
        probe(sanitizer)
    except Unsupported as error:
        pytest.skip(str(error))
    build(sanitizer, tmp_path / "rounds", *changes)
    done = play(sanitizer, tmp_path / "rounds", rounds=8, first_only=True)
    assert done.returncode != 0
    assert report in done.stdout + done.stderr[-30_000:], done.stdout + done.stderr[-3000:]
