"""Calls that must be refused: each with a typed error that says what was given and what was
expected, and without a trace in the object. A call is made from a seed, so that it can be repeated.

T tokens of a rank, K top_k, H hidden_size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

import random
import re
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moe_a2a.errors import CapacityError, MoeA2AError, PayloadError, StateError
from tests.collective import rounds
from tests.fuzz import wrong
from tests.fuzz.wrong import Rng, Wrong

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_a2a import AllToAll
    from tests.collective.rounds import Case, Round

EXPECTATION = re.compile(
    "expected|must|at most|need|takes|goes with|more than|lies in|shares|overlap|no gradient|leave|"
    "bring|were given|has none|knows|only|comes first|after close|no such|holds|have|are non-empty|"
    "so < |pass None|use one of|moves|sees no|open with",
)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Call(NamedTuple):
    """`run` must raise one of `errors` with a text that has one of `shown` in it."""

    what: str
    run: Callable[[], object]
    shown: tuple[str, ...]
    errors: tuple[type[Exception], ...] = (PayloadError, CapacityError)


def refused(call: Call) -> str:
    """Makes the call; returns the name of its error, or raises an AssertionError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about the odd tensors
            call.run()
    except call.errors as error:
        text = str(error)
        if not isinstance(error, MoeA2AError):
            return type(error).__name__
        if not 15 <= len(text) <= 900:
            raise AssertionError(f"{call.what}: {len(text)} characters: {text:.200}") from None
        if not any(item in text for item in call.shown):
            raise AssertionError(f"{call.what}: none of {call.shown} in {text!r}") from None
        if not EXPECTATION.search(text):
            raise AssertionError(f"{call.what}: no word on what is right in {text!r}") from None
        return type(error).__name__
    except Exception as error:
        raise AssertionError(f"{call.what}: {type(error).__name__} ({error})") from error
    raise AssertionError(f"{call.what} was accepted")


class BadCalls:
    """Of one open object. `good` are the arguments of a right dispatch, by name."""

    def __init__(self, a2a: AllToAll, case: Case, rnd: Round, rank: int) -> None:
        self.a2a, self.case = a2a, case
        self.good = rounds.call_of(case, rnd, rounds.tokens_of(case, rnd, rank), a2a.device)
        self.rows = rounds.max_rows(case, rnd)
        self.rank, self.scaled = rank, "scales" in self.good
        self.memory: torch.Tensor | None = None  # a receive view, once there is one

    def call(self, seed: int) -> Call:
        """A call that is wrong in the phase that the object is in."""
        rng = random.Random(seed)
        if rng.random() < 0.06:
            return self._signature(rng)
        if rng.random() < 0.08:
            return self._reset(rng)
        if self.a2a.phase == "dispatched":
            kinds = (self._combine, self._combine, self._out, self._out, self._buffer, self._phase)
        else:
            kinds = (self._dispatch,) * 8 + (self._phase,)
        return rng.choice(kinds)(rng)

    # ---- dispatch --------------------------------------------------------------------------

    def _dispatch(self, rng: Rng) -> Call:
        names = ["x", "topk_ids", "topk_weights", "scales", "global_scale", "runtime_max_tokens"]
        name = rng.choice([*names, "extra", "active_ranks", "defer"])
        change, errors = getattr(self, f"_{name}")(rng)
        shown = change.shown if name != "x" else (*change.shown, "scales")
        kept = {n: value for n, value in self.good.items() if n != name}
        return Call(
            f"dispatch({name}={printed(change.value)})",
            lambda: self.a2a.dispatch(**kept, **{name: change.value}),
            shown,
            errors,
        )

    def _tensor(self, rng: Rng, name: str, *accepted: torch.dtype) -> tuple[Wrong, tuple]:
        right = self.good[name]
        if self.memory is not None and rng.random() < 0.1:
            return wrong.shared(rng, right, self.memory), (PayloadError, CapacityError)
        return wrong.tensor(rng, right, accepted), (PayloadError, CapacityError)

    def _x(self, rng: Rng) -> tuple[Wrong, tuple]:
        floats = FLOATS if not (self.case.unquantized or self.scaled) else ()
        return self._tensor(rng, "x", self.good["x"].dtype, *floats)

    def _topk_ids(self, rng: Rng) -> tuple[Wrong, tuple]:
        return self._tensor(rng, "topk_ids", torch.int32, torch.int64)

    def _topk_weights(self, rng: Rng) -> tuple[Wrong, tuple]:
        return self._tensor(rng, "topk_weights", torch.float32)

    def _scales(self, rng: Rng) -> tuple[Wrong, tuple]:
        if not self.scaled:  # x is not what scales go with
            rows = len(self.good["x"])
            return Wrong(torch.zeros(rows, 4), ("x is", "scales")), (PayloadError,)
        value, errors = self._tensor(rng, "scales")
        return (value, errors) if value.value is not None else (Wrong(3, ("int",)), errors)

    def _global_scale(self, rng: Rng) -> tuple[Wrong, tuple]:
        if self.case.wire != "nvfp4":
            return Wrong(torch.ones(()), ("nvfp4",)), (PayloadError,)
        number = rng.choice((0.0, -1.0, float("inf"), float("nan"), -float("inf")))
        value = rng.choice(
            (
                Wrong(torch.tensor(number), (str(number),)),
                Wrong(torch.ones(2), ("[2]",)),
                wrong.no_tensor(rng, type(None)),
                wrong.other_dtype(rng, torch.ones(()), (torch.float32,)),
                wrong.elsewhere(rng, torch.ones(1)),
                wrong.fake(rng, torch.ones(())),
                Wrong(torch.ones(1).to_sparse(), ("sparse_coo",)),
                Wrong(torch.nested.nested_tensor([torch.ones(1)]), ("nested",)),
            )
        )
        return value, (PayloadError,)

    def _runtime_max_tokens(self, rng: Rng) -> tuple[Wrong, tuple]:
        number = rng.choice((-1, self.case.capacity + 1, 2**31, 2**63, -(2**70)))
        few = len(self.good["x"]) - 1
        choices = [wrong.no_tensor(rng, type(None), int, bool), Wrong(number, (str(number),))]
        choices += [Wrong(value, (repr(value),)) for value in (True, 1.0, torch.tensor(1), "1")]
        choices += [Wrong(10**5000, ("<int of",))]
        choices += [Wrong(few, ("tokens",))] if few >= 0 else []
        return rng.choice(choices), (CapacityError,)

    def _extra(self, rng: Rng) -> tuple[Wrong, tuple]:
        given = self.good.get("extra", {})
        if given and rng.random() < 0.7:
            name = rng.choice(sorted(given))
            bad = wrong.tensor(rng, given[name])
            if self.memory is not None and rng.random() < 0.2:
                bad = wrong.shared(rng, given[name], self.memory)
            return Wrong({**given, name: bad.value}, bad.shown), (PayloadError,)
        names = [{**given, "more": torch.zeros(1)}, {**given, 7: None}, dict.fromkeys(given, 1)]
        if given:
            names += [{}, dict(list(given.items())[1:]), list(given), {**given, "": None}]
        value = rng.choice(names)
        if isinstance(value, dict) and set(value) == set(given):
            value = wrong.no_tensor(rng, dict, type(None)).value
        return Wrong(value, ("extra",)), (PayloadError,)

    def _active_ranks(self, rng: Rng) -> tuple[Wrong, tuple]:
        size = self.case.size
        flags = [True] * size
        me = [rank != self.rank for rank in range(size)]
        values = (
            wrong.no_tensor(rng, type(None)),
            Wrong([*flags, True], ("list",)),
            Wrong(flags[1:], ("list",)),
            Wrong([1] * size, ("list",)),
            Wrong(tuple(me), ("active_ranks=",)),
            Wrong(torch.tensor(me), ("active_ranks=",)),
            Wrong(torch.ones(size), ("float32",)),
            Wrong(torch.ones(size + 1, dtype=torch.bool), (f"[{size + 1}]",)),
            Wrong(torch.ones(size, dtype=torch.bool).to_sparse(), ("sparse",)),
            Wrong(torch.ones(size, dtype=torch.bool, device="meta"), ("meta",)),
            wrong.fake(rng, torch.ones(size, dtype=torch.bool)),
            Wrong(torch.ones(size, 1, dtype=torch.bool), ("bool",)),
        )
        return rng.choice(values), (PayloadError, StateError)

    def _defer(self, rng: Rng) -> tuple[Wrong, tuple]:
        allowed = self.case.more.get("allow_defer", False)
        if not (self.case.unquantized or allowed) and rng.random() < 0.3:
            return Wrong(True, ("defer=True",)), (PayloadError,)
        if rng.random() < 0.1:
            return Wrong(torch.tensor(True), ("bool []",)), (PayloadError,)
        return wrong.no_tensor(rng, bool), (PayloadError,)

    # ---- combine ---------------------------------------------------------------------------

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A right y and a right out of the round under way."""
        dtype = rounds.TORCH.get(self.case.combine_wire, torch.float16)
        y = torch.zeros(self.case.size, self.rows, self.case.hidden, dtype=dtype)
        return y, torch.zeros(self.a2a.round_tokens, self.case.hidden, dtype=dtype)

    def _accepted(self) -> tuple[torch.dtype, ...]:
        wire = self.case.combine_wire
        return (rounds.TORCH[wire],) if wire in rounds.TORCH else FLOATS

    def _combine(self, rng: Rng) -> Call:
        y = self.outputs()[0]
        change = wrong.tensor(rng, y, self._accepted())
        if self.memory is not None and rng.random() < 0.2:
            change = wrong.shared(rng, y, self.memory)
        what = f"combine({printed(change.value)})"
        return Call(what, lambda: self.a2a.combine(change.value), (*change.shown, "y is"))

    def _out(self, rng: Rng) -> Call:
        y, right = self.outputs()
        change = wrong.tensor(rng, right)
        kind = rng.random()
        if self.memory is not None and kind < 0.1:
            change = wrong.shared(rng, right, self.memory)
        elif len(right) > 1 and kind < 0.2:
            change = Wrong(right[:1].expand(right.shape), ("overlap",))
        elif right.numel() and kind < 0.4:
            change = self._overlapping(rng, y, right)
        if change.value is None:
            change = Wrong("out", ("str",))
        what = f"combine(out={printed(change.value)})"
        return Call(what, lambda: self.a2a.combine(y, out=change.value), change.shown)

    def _overlapping(self, rng: Rng, y: torch.Tensor, right: torch.Tensor) -> Wrong:
        """A part of y's memory: the first elements, the last, or some in between."""
        room = y.numel() - right.numel()
        if room < 0:
            return Wrong("out", ("str",))
        at = rng.choice((0, room, rng.randint(0, room)))
        return Wrong(y.view(-1)[at : at + right.numel()].view(right.shape), ("shares memory",))

    def _buffer(self, rng: Rng) -> Call:
        change = wrong.no_tensor(rng, type(None))
        if rng.random() < 0.5:
            dtype = rng.choice([d for d in wrong.EVERY_DTYPE if d not in self._accepted()])
            change = Wrong(dtype, (str(dtype),))
        elif change.value in self._accepted() if isinstance(change.value, torch.dtype) else False:
            change = Wrong("float32", ("float32",))
        what = f"combine_buffer({printed(change.value)})"
        return Call(what, lambda: self.a2a.combine_buffer(change.value), ("combine_buffer(",))

    # ---- whatever the phase ----------------------------------------------------------------

    def _phase(self, rng: Rng) -> Call:
        """A call that the other phase is for."""
        if self.a2a.phase == "dispatched":
            return Call(
                "dispatch twice",
                lambda: self.a2a.dispatch(**self.good),
                ("dispatched",),
                (StateError,),
            )
        y, out = self.outputs()
        calls = (lambda: self.a2a.combine(y), lambda: self.a2a.combine(y, out=out))
        call = rng.choice((*calls, self.a2a.combine_buffer))
        return Call("combine in phase idle", call, ("idle",), (StateError,))

    def _reset(self, rng: Rng) -> Call:
        change, errors = self._active_ranks(rng)
        shown = (*change.shown, "active_ranks")
        return Call(
            f"reset({printed(change.value)})", lambda: self.a2a.reset(change.value), shown, errors
        )

    def _signature(self, rng: Rng) -> Call:
        good = {name: self.good[name] for name in ("x", "topk_ids", "topk_weights")}
        call: Callable[[], Any] = rng.choice(
            (
                lambda: self.a2a.dispatch(),
                lambda: self.a2a.dispatch(good["x"]),
                lambda: self.a2a.dispatch(**good, scale=None),
                lambda: self.a2a.dispatch(*good.values(), None),
                lambda: self.a2a.combine(),
                lambda: self.a2a.combine(good["x"], good["x"]),
                lambda: self.a2a.combine_buffer(None, None),
                lambda: self.a2a.reset(None, None),
            )
        )
        return Call("a wrong signature", call, (), (TypeError,))


def printed(value: object) -> str:
    """For the messages of failures; some of these values can't be printed."""
    try:
        return f"{type(value).__name__} {value!r:.80}"
    except Exception:
        return type(value).__name__
