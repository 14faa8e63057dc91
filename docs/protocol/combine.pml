/* Combine: combine.cu, inbox.cuh, finish_combine(). */

inline push_rows() {
  for (p : 0 .. W - 1) {
    if
    :: PEER(p) && received[PAIR(p, r)] ->
       IDLE_OR_LOST(going_chunks[PAIR(r, p)]);
       going_chunks[PAIR(r, p)] = OFFSETS(CHUNKS);
       going_sum[PAIR(r, p)] = tag;
       going_to[PAIR(r, p)] = INBOX(rows[n], r)
    :: else
    fi
  }
}

#define CHUNK(p, c) cell[r * CELLS + INBOX(rows[n], p) + (c)]
#ifdef BUG_FIRST_CHUNK
#define PUSHED(p) (!sends[r] || CHUNK(p, 0) != 0)
#else
#define PUSHED(p) (!sends[r] || (CHUNK(p, 0) != 0 && CHUNK(p, CHUNKS - 1) != 0))
#endif

/* sum_run: what has come is read, and ones are stored in its place. */
inline sum_rows() {
  for (p : 0 .. W - 1) {
    if
    :: PEER(p) && sends[r] ->
       for (i : 0 .. CHUNKS - 1) {
         take(r, INBOX(rows[n], p) + i, VALUE(tag, p));
#ifndef BUG_ROW_LEFT
         put(r, INBOX(rows[n], p) + i, 0)
#endif
       }
    :: else
    fi
  }
}

inline mover_combines() {
  atomic { MOVER_BEGINS(COMBINE(n)) ->
    tag = combine_tag[r]; dead = failed[r];
    if :: dead -> goto returned :: else -> push_rows() fi
  };
  atomic { AWAIT(OF_PEERS(PUSHED)); sum_rows(); mover_ends() }
}

#define BEGUN(p) (EPOCH(combine_header[PAIR(p, r)]) == EPOCH(tag))

inline header_combines() {
  atomic { HEADER_BEGINS(COMBINE(n)) ->
    tag = combine_tag[r]; dead = failed[r];
    if :: dead -> goto returned :: else fi;
    STRICT_FENCE;
    for (p : 0 .. W - 1) {
      if
      :: PEER(p) ->
         IDLE_OR_LOST(going_combine[PAIR(r, p)]);
         going_combine[PAIR(r, p)] = tag;
         AFTER_COMBINE_HEADER
      :: else
      fi
    }
  };
  atomic {
#ifndef BUG_COMBINE_WAITS_FOR_NOBODY
    AWAIT(OF_PEERS(BEGUN));
#endif
    for (p : 0 .. W - 1) {
      if
      :: PEER(p) ->
#ifndef BUG_COMBINE_WAITS_FOR_NOBODY
         assert(combine_header[PAIR(p, r)] == tag || header_of_another_operation);
#endif
         unheard_combine[PAIR(p, r)] = 0
      :: else
      fi
    };
    dispatch_tag[r] = NEXT(tag);
    header_ends()
  }
}
