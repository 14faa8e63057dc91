/* The state of a rank, the order of its kernels on the stream, and waits. A kernel is two blocks:
 * the one that moves rows (process `mover`) and the last one of the grid, which has the headers
 * (process `header`, which is also the caller: the experts' kernel, and the host). Either may begin
 * a kernel long after the other, once all blocks have ended the one before.
 *
 * An atomic step goes from one wait to the next. Nothing is lost by that: in between a block issues
 * stores, which land whenever they like, and touches memory of its own rank that no other block of
 * this kernel looks at. Inlines work on the variables of the block that they are in: its rank `r`,
 * the round `n`, the operation's `tag`, `dead`, and `p` and `i` to count.
 */

#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifdef FAULTS
#ifndef AFTER
#define AFTER 1 /* rounds after a reset; they must end, since no wait gives up in them */
#endif
#define ALL_ROUNDS (ROUNDS + AFTER)
#else
#define ALL_ROUNDS ROUNDS
#endif

byte dispatch_tag[W], combine_tag[W]; /* State */
byte received[W * W];                 /* by pair: State::received */
byte tally[W];                        /* of the mover, in the rank's own memory */
bit failing[W], failed[W];            /* State; `life`: it was reset */
bit life[W];
byte members[W];                      /* mask of active ranks */

byte rows[ALL_ROUNDS];      /* R by round, the same on all ranks; 0: not chosen yet */
byte chosen[W];             /* round + 1 that a rank has chosen its tokens for */
bit sends[W];               /* a row to every rank, or none */
byte silences;              /* how often none may still be chosen */
byte ended_header[W], ended_mover[W]; /* kernels that the block is through with: three a round */
byte rounds[W];             /* that a rank has to play */
bit idle[W];                /* the mover, with nothing to do */
bit over[W];

#define DISPATCH(n) (3 * (n))
#define EXPERTS(n) (3 * (n) + 1)
#define COMBINE(n) (3 * (n) + 2)
#define HAS(mask, rank) (((mask) >> (rank)) & 1)
#define PEER(p) ((p) != r && HAS(members[r], p))

/* A condition that must hold for each peer. */
#if W == 2
#define OF_PEERS(condition) (!PEER(1 - r) || condition(1 - r))
#else
#define OF_PEERS(condition) ((!PEER((r + 1) % 3) || condition((r + 1) % 3)) && \
                             (!PEER((r + 2) % 3) || condition((r + 2) % 3)))
#endif

/* From what all ranks know alike: R. */
#ifdef ONLY_PACKETS
#define BULK false
#else
#ifdef ONLY_BULK
#define BULK true
#else
#define BULK (rows[n] == TMAX)
#endif
#endif

/* The caller's arguments. */
inline choose() {
  if
#ifdef ROWS_GROW
  :: rows[n] == 0 -> rows[n] = (n == 0 -> 1 : TMAX)
#else
  :: rows[n] == 0 -> if :: rows[n] = 1 :: rows[n] = TMAX fi
#endif
  :: else
  fi;
  if
  :: chosen[r] != n + 1 ->
     chosen[r] = n + 1;
     if :: sends[r] = 1 :: silences > 0 -> silences--; sends[r] = 0 fi
  :: else
  fi
}

/* Waits end. With FAULTS a wait may give up at any time until the reset: so does one whose peer has
 * stopped, and one whose peer is only slow. */
#ifdef FAULTS
bit stopped[W]; /* has ended, in the middle of anything */
#if W == 2
#define TROUBLE (failed[0] || failed[1] || stopped[1])
#else
#define TROUBLE (failed[0] || failed[1] || failed[2] || stopped[2])
#endif
#ifdef PATIENT /* only once someone else has stopped or failed: less to look at with more ranks */
#define GIVES_UP (!life[r] && !failing[r] && TROUBLE)
#else
#define GIVES_UP (!life[r] && !failing[r])
#endif
#define AWAIT(condition)            \
  if                                \
  :: (condition)                    \
  :: GIVES_UP -> goto giving_up     \
  :: failing[r] -> goto returned    \
  fi
#else
#define AWAIT(condition) (condition)
#endif

#ifdef STRICT
#define STRICT_FENCE fence(r)
#else
#define STRICT_FENCE skip
#endif

#define MOVER_BEGINS(kernel) \
  (!idle[r] && n < rounds[r] && ended_header[r] >= kernel && \
   ended_mover[r] == kernel - (kernel % 3 == 2))
#define HEADER_BEGINS(kernel) \
  (n < rounds[r] && ended_mover[r] >= kernel - (kernel % 3 == 2) && ended_header[r] == kernel)

/* The last block to end a kernel. */
inline mover_ends() {
  ended_mover[r] = (ended_mover[r] == DISPATCH(n) -> EXPERTS(n) : DISPATCH(n + 1));
  if :: ended_mover[r] == ended_header[r] -> end_of_kernel(r) :: else fi;
  n = ended_mover[r] / 3;
  p = 0; i = 0; tag = 0; dead = 0
}

inline header_ends() {
  ended_header[r]++;
  if
  :: ended_header[r] == COMBINE(n) || ended_header[r] == ended_mover[r] -> end_of_kernel(r)
  :: else
  fi;
  n = ended_header[r] / 3;
  p = 0; i = 0; tag = 0; dead = 0
}
