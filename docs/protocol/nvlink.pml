/* The protocol of csrc/cuda. README.md says what stands for what; check.py knows the
 * configurations. */

#include "memory.pml"
#include "round.pml"
#include "dispatch.pml"
#include "combine.pml"
#include "reset.pml"

#ifdef FAULTS
#define UNLESS_STOPPED unless { stopped[r] }
#else
#define UNLESS_STOPPED
#endif

/* The block that moves rows. */
proctype mover(byte r) {
  byte n, p, i, tag;
  bit dead, takes;
  {
  again:
    do
    :: mover_dispatches()
    :: mover_combines()
#ifdef FAULTS
    :: atomic { failed[r] && !idle[r] && at_host[r] -> idle[r] = 1 } /* kernels that find it dead */
    :: atomic { n == ROUNDS && rounds[r] == ROUNDS && !idle[r] -> idle[r] = 1 }
    :: atomic { idle[r] && life[r] -> idle[r] = 0; n = ROUNDS }
    :: over[r] -> goto done
#else
    :: n == ROUNDS -> goto done
#endif
    od;
#ifdef FAULTS
  giving_up: give_up();
#endif
  returned: atomic { skip -> mover_ends(); goto again };
  done: skip
  } UNLESS_STOPPED
}

/* The block with the headers; the caller; the host. */
proctype header(byte r) {
  byte n, p, i, tag;
  bit dead, takes;
#ifdef BUG_NO_ACQUIRE
  byte early;
#endif
  {
  again:
    do
    :: header_dispatches()
    :: experts()
    :: header_combines()
#ifdef FAULTS
    :: atomic { !at_host[r] && !life[r] && (n == ROUNDS || failed[r]) -> at_host[r] = 1 }
    :: at_host[r] && idle[r] && MUST_RESET(r) -> reset()
    :: atomic { (at_host[r] && idle[r] && MAY_LEAVE(r)) || (life[r] && n == rounds[r] &&
         ended_mover[r] == DISPATCH(n)) -> over[r] = 1; goto done }
#else
    :: n == ROUNDS -> goto done
#endif
    od;
#ifdef FAULTS
  giving_up: give_up();
#endif
  returned: atomic { skip -> header_ends(); goto again };
  done: skip
#ifdef CANARY /* a run that gets here makes this false: the model has not held for lack of runs */
    ; assert(rounds[r] != ALL_ROUNDS || n != ALL_ROUNDS || never_through)
#endif
  } UNLESS_STOPPED
}

#ifdef THIRD_BLOCK
/* One more block that moves rows, those of `mover`: all that it does by itself is give up. */
proctype third(byte r) {
end:
  atomic { ended_mover[r] < DISPATCH(ROUNDS) && ended_mover[r] == ended_header[r] &&
      ended_mover[r] % 3 == 0 && !failing[r] && !life[r] ->
    failing[r] = 1; failed[r] = 1
  }
}
#endif

#ifdef STOPS
/* The last rank ends, at any time before the others meet. */
proctype stopper() {
end:
  atomic { meeting == 0 && !over[0] && !over[1] -> stopped[W - 1] = 1 }
}
#endif

#ifndef SILENCES
#define SILENCES 1
#endif

init {
  byte r, p;
  atomic {
#ifdef STALE
    /* What an inbox holds from a time long ago: an epoch of this run, at an earlier count of the
     * high word. */
    if
    :: p = FIRST
    :: p = EPOCH(NEXT(NEXT(FIRST)))
    fi;
    for (r : 0 .. W * W * CHUNKS - 1) { line[r] = p };
#endif
    silences = SILENCES;
    for (r : 0 .. W - 1) {
      dispatch_tag[r] = TAG(1, FIRST);
      members[r] = OFFSETS(W);
      rounds[r] = ROUNDS;
      run header(r);
      run mover(r);
#ifdef THIRD_BLOCK
      run third(r);
#endif
      for (p : 0 .. W - 1) {
        if :: p != r -> run link(r, p) :: else fi
      }
    };
#ifdef STOPS
    run stopper();
#endif
  }
}
