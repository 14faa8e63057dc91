"""The model of the protocol (docs/protocol): each rule that the protocol rests on, taken away, must
break the property that it is for. The smallest model that shows it, so that all take seconds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

_CHECK = Path(__file__).parents[2] / "docs" / "protocol" / "check.py"
_SPEC = importlib.util.spec_from_file_location("protocol_check", _CHECK)
assert _SPEC is not None and _SPEC.loader is not None
protocol = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = protocol  # dataclasses look their module up
_SPEC.loader.exec_module(protocol)

pytestmark = [
    pytest.mark.slow,  # the landing runs them beside `make test`
    pytest.mark.skipif(
        shutil.which("spin") is None or shutil.which("gcc") is None,
        reason="needs spin and gcc (apt-get install spin)",
    ),
]

READ, OVERWRITTEN = "read_before_written", "overwritten_before_read"
PLAIN = "LINES SILENCES=0"
FAULTS = "LINES FAULTS ROUNDS=1 SILENCES=0 ROWS_GROW"


HOLDS = {
    "lines": (PLAIN, "nvlink"),
    "shm": ("", "shm"),
}
# By rule taken away: the model, and the property that breaks. The first two have neither fences
# before headers nor the property of hardware that stands in for them.
BUGS = {
    "no fence, packets": ("ONLY_PACKETS SILENCES=0", OVERWRITTEN),
    "no fence, bulk": ("ONLY_BULK SILENCES=0", OVERWRITTEN),
    "NO_BULK_FENCE": ("STRICT ONLY_BULK", OVERWRITTEN),
    "NO_RELEASE": (PLAIN, READ),
    "NO_ACQUIRE": (PLAIN, READ),
    "LATE_BLOCK": (PLAIN, READ),
    "OFFSET_OF_R": (f"{PLAIN} ROWS_GROW", OVERWRITTEN),
    "FIRST_CHUNK packets": (f"{PLAIN} CHUNKS=2", READ),
    "FIRST_CHUNK combine": (f"{PLAIN} CHUNKS=2 ONLY_BULK", READ),
    "EPOCH_ONLY": (f"{PLAIN} STALE EPOCHS=4 FIRST=3 ONLY_PACKETS", READ),
    "ROW_LEFT": (PLAIN, READ),
    "COUNTER_LEFT": (PLAIN, protocol.NEVER_ENDS),
    "COMBINE_WAITS_FOR_NOBODY": (PLAIN, OVERWRITTEN),
    "DEAD_SAYS_NOTHING": (f"{FAULTS} ONLY_BULK THIRD_BLOCK", protocol.NEVER_ENDS),
    "NOT_DRAINED": (FAULTS, OVERWRITTEN),
    "CLEARS_BEFORE_MEETING": (FAULTS, OVERWRITTEN),
    "NO_SECOND_MEETING": (FAULTS, protocol.NEVER_ENDS),
    "SAME_GENERATION": (f"{FAULTS} ONLY_PACKETS EXCLUDE", "excluded_unnoticed"),
    "WRAPS_COUNT": (f"{FAULTS} EPOCHS=4 FIRST=4", "excluded_without_reset"),
}
SHM_BUGS = {
    "NO_RELEASE": ("", READ),
    "NO_ACQUIRE": ("", READ),
    "OFFSET_OF_R": ("ROWS_GROW", OVERWRITTEN),
}
CANARY = f"{FAULTS} CANARY"


def with_bug(defines: str, bug: str) -> str:
    name = bug.split()[0]
    return f"{defines} BUG_{name}" if name.isupper() else defines


def models() -> list[tuple[str, str]]:
    """(defines, source) of every model below."""
    bugs = [(with_bug(defines, bug), "nvlink") for bug, (defines, _) in BUGS.items()]
    shm = [(with_bug(defines, bug), "shm") for bug, (defines, _) in SHM_BUGS.items()]
    return [*HOLDS.values(), (CANARY, "nvlink"), *bugs, *shm]


def verdict(defines: str, source: str) -> str | None:
    model = protocol.Configuration("test", defines, source=source)
    violates: str | None = protocol.check(model, limit=60, optimize="-O0").violates
    return violates


@pytest.fixture(scope="module")
def verdicts():
    """By (defines, source): nearly all of the time goes to gcc, so several at once."""
    wanted = models()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(wanted, pool.map(lambda model: verdict(*model), wanted), strict=True))


@pytest.mark.parametrize("model", HOLDS)
def test_the_protocol_holds(verdicts, model):
    assert verdicts[HOLDS[model]] is None


def test_runs_get_through_all_rounds(verdicts):
    """Also those after a reset: a model in which nobody gets anywhere holds whatever it says."""
    assert verdicts[CANARY, "nvlink"] == "never_through"


@pytest.mark.parametrize("bug", BUGS)
def test_without_a_rule_its_property_breaks(verdicts, bug):
    defines, breaks = BUGS[bug]
    assert verdicts[with_bug(defines, bug), "nvlink"] == breaks


@pytest.mark.parametrize("bug", SHM_BUGS)
def test_shm_without_a_rule(verdicts, bug):
    defines, breaks = SHM_BUGS[bug]
    assert verdicts[with_bug(defines, bug), "shm"] == breaks


def test_a_model_that_does_not_parse_has_no_verdict():
    with pytest.raises(protocol.CheckError, match="spin says"):
        verdict("W=nothing", "nvlink")
