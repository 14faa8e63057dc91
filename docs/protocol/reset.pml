/* Giving up (wait_failed.cuh) and reset (nvlink.py, endpoint.cc: restart, exclude). */

#ifdef FAULTS
bit excluded[W]; /* ghost: a reset has left it out, and its post says so */
bit at_host[W];
byte meeting;    /* of the reset; 0: nobody has come */
byte met_before, met_after; /* masks: the two meetings */
byte most_epoch, most_generation;
#ifdef BUG_WRAPS_COUNT /* what stands above the epoch is the generation, wrap-arounds and all */
#define POSTS(tag) GENERATION(tag)
#else
byte resets[W];
#define POSTS(tag) (resets[r] + 1)
#endif
#define MEETING_OVER(met) (((met) & meeting) == meeting)

#define RESTS(p) (at_host[p] && idle[p]) /* both blocks are through */
#if W == 2
#define ALL_AT_HOST (RESTS(0) && RESTS(1))
#else
#define ALL_AT_HOST (RESTS(0) && RESTS(1) && RESTS(2))
#endif

#ifdef EXCLUDE /* the last rank is left out, and lives on */
#define JOINS(r) ((r) != W - 1)
#else
#define JOINS(r) true
#endif
#define MUST_RESET(r) (JOINS(r) && !life[r] && TROUBLE)
#define MAY_LEAVE(r) (!JOINS(r) || (!life[r] && ALL_AT_HOST && !TROUBLE))

/* look_around, give_up: one block of a rank takes it on, the others end. `failed` comes a grace
 * later; blocks that begin in between know nothing yet. */
inline give_up() {
  d_step {
    takes = !failing[r];
    if
    :: takes ->
       failing[r] = 1;
       i = 0;
       for (p : 0 .. W - 1) {
         if :: p != r && post[PAIR(p, r)] > POSTS(tag) -> i = 1 :: else fi
       };
       assert(!i || excluded[r] || excluded_without_reset);
       assert(i || !excluded[r] || excluded_unnoticed);
       for (p : 0 .. W - 1) {
         if :: p != r -> post[PAIR(r, p)] = POSTS(tag) :: else fi
       };
       i = 0
    :: else
    fi
  };
  if
  :: atomic { takes -> takes = 0; failed[r] = 1 }
  :: else
  fi
}

inline clear_window() {
  d_step {
    for (i : 0 .. CELLS - 1) {
      if :: i >= VIEWS -> cell[r * CELLS + i] = 0 :: else fi
    };
    for (p : 0 .. W - 1) {
      for (i : 0 .. CHUNKS - 1) { line[PAIR(p, r) * CHUNKS + i] = 0 };
      dispatch_header[PAIR(p, r)] = 0; dispatch_count[PAIR(p, r)] = 0;
      combine_header[PAIR(p, r)] = 0;
      unheard_dispatch[PAIR(p, r)] = 0; unheard_combine[PAIR(p, r)] = 0;
      counter[PAIR(p, r)] = 0; post[PAIR(p, r)] = 0; received[PAIR(p, r)] = 0
    };
    unread[r] = 0; pending[r] = 0; earlier[r] = 0;
    i = 0
  }
}

#define HIGH(tag, other) ((tag) > (other) -> (tag) : (other))

/* The mover is through and waits; `ended` kernels and rounds count on, so that the rounds after the
 * reset have choices of their own. */
inline reset() {
  atomic {
    if
    :: meeting == 0 ->
#ifdef EXCLUDE
       meeting = OFFSETS(W - 1)
#else
       for (p : 0 .. W - 1) { meeting = meeting | ((1 - stopped[p]) << p) }
#endif
    :: else
    fi
  };
  /* Drained: what this rank stored has landed. Ranks left out must have ended. */
  p = 0;
  do
  :: p < W ->
#ifndef BUG_NOT_DRAINED
     LANDED(PAIR(r, p));
#endif
#ifndef EXCLUDE
     HAS(meeting, p) || LANDED(PAIR(p, r));
#endif
     p++
  :: else -> break
  od;
  skip;
#ifdef BUG_CLEARS_BEFORE_MEETING
  clear_window();
#endif
  d_step {
    tag = HIGH(dispatch_tag[r], combine_tag[r]);  /* position() */
    most_epoch = HIGH(most_epoch, EPOCH(tag));
    most_generation = HIGH(most_generation, GENERATION(tag));
    met_before = met_before | 1 << r
  };
  MEETING_OVER(met_before);
#ifndef BUG_CLEARS_BEFORE_MEETING
  clear_window();
#endif
  d_step {
    i = (most_epoch + 2) % (EPOCHS + 1);
    i = (i == 0 -> 1 : i);
#ifdef BUG_SAME_GENERATION
    tag = TAG(most_generation, i);
#else
    tag = TAG(most_generation + 1, i);
#endif
#if !defined(BUG_WRAPS_COUNT) && !defined(BUG_SAME_GENERATION)
    resets[r]++;
#endif
    dispatch_tag[r] = tag; combine_tag[r] = 0;
    failing[r] = 0; failed[r] = 0;
    members[r] = meeting;
    rounds[r] = ROUNDS + AFTER;
    ended_header[r] = DISPATCH(ROUNDS); ended_mover[r] = DISPATCH(ROUNDS);
    for (p : 0 .. W - 1) {
      if
      :: !HAS(meeting, p) -> post[PAIR(r, p)] = POSTS(tag); excluded[p] = 1
      :: else
      fi
    };
    i = 0;
    met_after = met_after | 1 << r
  };
#ifndef BUG_NO_SECOND_MEETING
  MEETING_OVER(met_after);
#endif
  d_step { n = ROUNDS; life[r] = 1; at_host[r] = 0 }
}
#endif
