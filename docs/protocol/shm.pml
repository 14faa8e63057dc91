/* The protocol of csrc/cpu (dispatch.cc, combine.cc, wait.cc): one thread a rank, rows straight to
 * their places, a line with the epoch stored last and with release. A reset moves to fresh windows,
 * in which there is nothing to go wrong, and is not modelled.
 */

#define ONLY_BULK
#include "memory.pml"
#include "round.pml"
#include "dispatch.pml"
#include "combine.pml"

#define CHUNKS_LANDED(p) (going_chunks[PAIR(r, p)] == 0)
#ifdef BUG_NO_RELEASE
#define RELEASED(landed) true
#else
#define RELEASED(landed) OF_PEERS(landed)
#endif

/* announce(): everything before it in this thread happens before the epoch. */
inline announce_dispatch() {
  end_of_kernel(r); fence(r);
  for (p : 0 .. W - 1) {
    if
    :: PEER(p) ->
       IDLE_OR_LOST(going_dispatch[PAIR(r, p)]);
       going_dispatch[PAIR(r, p)] = tag; going_count[PAIR(r, p)] = sends[r]
    :: else
    fi
  }
}

inline announce_combine() {
  end_of_kernel(r); fence(r);
  for (p : 0 .. W - 1) {
    if
    :: PEER(p) ->
       IDLE_OR_LOST(going_combine[PAIR(r, p)]);
       going_combine[PAIR(r, p)] = tag
    :: else
    fi
  }
}

proctype rank(byte r) {
  byte n, p, i, tag;
#ifdef BUG_NO_ACQUIRE
  byte early;
#endif
  do
  :: n < ROUNDS ->
     atomic {
       choose(); tag = dispatch_tag[r];
       send_rows();
       write_view(r, 0, sends[r] * VALUE(tag, r))
     };
     atomic { RELEASED(ROW_LANDED) -> announce_dispatch();
#ifdef BUG_NO_ACQUIRE
       load_early()
#endif
     };
     atomic { OF_PEERS(COUNTED) -> hear_dispatches(); scrub_padding() };
     atomic { /* the experts */
       for (p : 0 .. W - 1) {
         if
         :: (p == r && sends[r]) || (PEER(p) && received[PAIR(p, r)]) ->
            take(r, VIEW(p, rows[n], 0), VALUE(dispatch_tag[r], p));
#ifdef BUG_NO_ACQUIRE
            assert(!HAS(early, p) || p == r || read_before_written)
#endif
         :: else
         fi
       }
     };
     atomic { tag = combine_tag[r]; push_rows() };
     atomic { RELEASED(CHUNKS_LANDED) -> announce_combine() };
     atomic { OF_PEERS(BEGUN) ->
       for (p : 0 .. W - 1) {
         if
         :: PEER(p) ->
            assert(combine_header[PAIR(p, r)] == tag || header_of_another_operation);
            unheard_combine[PAIR(p, r)] = 0;
            if
            :: sends[r] ->
               for (i : 0 .. CHUNKS - 1) { take(r, INBOX(rows[n], p) + i, VALUE(tag, p)) }
            :: else
            fi
         :: else
         fi
       };
       dispatch_tag[r] = NEXT(tag); n++; p = 0; i = 0; tag = 0
     }
  :: else -> break
  od
}

init {
  byte r, p;
  atomic {
    silences = 1;
    for (r : 0 .. W - 1) {
      dispatch_tag[r] = TAG(1, FIRST);
      members[r] = OFFSETS(W);
      run rank(r);
      for (p : 0 .. W - 1) {
        if :: p != r -> run link(r, p) :: else fi
      }
    }
  }
}
