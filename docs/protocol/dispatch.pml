/* Dispatch: dispatch_{small,quantized,packets}.cu (rows in packets), dispatch_bulk.cu. */

/* A row to each peer, each a store of its own, or a line each. */
inline send_rows() {
  for (p : 0 .. W - 1) {
    if
    :: PEER(p) && sends[r] ->
       going_tag[PAIR(r, p)] = tag;
       if
       :: BULK ->
          IDLE_OR_LOST(going_row[PAIR(r, p)]);
          going_row[PAIR(r, p)] = VIEW(r, rows[n], 0) + 1
       :: else ->
          IDLE_OR_LOST(going_lines[PAIR(r, p)]);
          going_lines[PAIR(r, p)] = OFFSETS(CHUNKS)
       fi
    :: else
    fi
  };
  p = 0
}

/* This rank's own stores to the part of a source: the rows from `first` on. */
inline write_view(source, first, value) {
  for (i : first .. rows[n] - 1) { put(r, VIEW(source, rows[n], i), value) };
  i = 0
}

/* announce_block: red.release, one block's share. */
inline add_to_counters() {
  for (p : 0 .. W - 1) {
    if :: PEER(p) -> ADD_TO_COUNTER :: else fi
  };
  p = 0
}

#define ROW_LANDED(p) (going_row[PAIR(r, p)] == 0)
#define COUNTED(p) (EPOCH(dispatch_header[PAIR(p, r)]) == EPOCH(tag))
#define FIRST_LINE(p) line[PAIR(p, r) * CHUNKS]
#define LAST_LINE(p) line[PAIR(p, r) * CHUNKS + CHUNKS - 1]
#ifdef BUG_FIRST_CHUNK
#define ROW_HERE(p) FRESH(FIRST_LINE(p), tag)
#else
#define ROW_HERE(p) (FRESH(FIRST_LINE(p), tag) && FRESH(LAST_LINE(p), tag))
#endif
#define ROW_OR_PADDING(p) (ROW_HERE(p) || (COUNTED(p) && dispatch_count[PAIR(p, r)] == 0))

inline unpack_rows() {
  for (p : 0 .. W - 1) {
    if
    :: PEER(p) && ROW_HERE(p) ->
       assert((FIRST_LINE(p) == tag && LAST_LINE(p) == tag) || read_before_written);
       put(r, VIEW(p, rows[n], 0), VALUE(tag, p));
       write_view(p, 1, 0)
    :: PEER(p) && !ROW_HERE(p) -> write_view(p, 0, 0)
    :: else
    fi
  }
}

inline scrub_padding() {
  for (p : 0 .. W - 1) {
    if :: PEER(p) -> write_view(p, dispatch_count[PAIR(p, r)], 0) :: else fi
  }
}

inline mover_dispatches() {
  atomic { MOVER_BEGINS(DISPATCH(n)) ->
    choose();
    tag = dispatch_tag[r]; dead = failed[r];
#ifdef BUG_DEAD_SAYS_NOTHING
    if :: BULK && !dead -> tally[r] = tag :: else fi;
#else
    if :: BULK -> tally[r] = tag :: else fi; /* dead or not: a later block waits for it */
#endif
    if
    :: dead -> goto returned
    :: else ->
       send_rows();
       write_view(r, 0, sends[r] * VALUE(tag, r)) /* its own rows */
    fi
  };
  if
  :: BULK ->
     /* Release: the block's stores land before its addition. */
#ifdef BUG_NO_RELEASE
     atomic { skip -> add_to_counters() };
#endif
#ifdef BUG_LATE_BLOCK
     atomic { skip };
#endif
#if !defined(BUG_NO_RELEASE) && !defined(BUG_LATE_BLOCK)
     atomic { OF_PEERS(ROW_LANDED) -> add_to_counters() };
#endif
     atomic { AWAIT(OF_PEERS(COUNTED)); scrub_padding(); mover_ends() }
  :: atomic { !BULK -> AWAIT(OF_PEERS(ROW_OR_PADDING)); unpack_rows(); mover_ends() }
  fi
}

#define THROUGH(p) (COUNTED(p) && (!BULK || counter[PAIR(p, r)] == 2)) /* of two blocks */

/* finish_dispatch */
inline hear_dispatches() {
  for (p : 0 .. W - 1) {
    if
    :: PEER(p) ->
       assert(dispatch_header[PAIR(p, r)] == tag || header_of_another_operation);
       unheard_dispatch[PAIR(p, r)] = 0;
       received[PAIR(p, r)] = dispatch_count[PAIR(p, r)];
#ifndef BUG_COUNTER_LEFT
       counter[PAIR(p, r)] = 0
#endif
    :: else -> received[PAIR(p, r)] = 0
    fi
  };
  combine_tag[r] = NEXT(tag)
}

#ifdef BUG_NO_ACQUIRE /* the experts' loads may be satisfied before the counter's is */
inline load_early() {
  if
  :: skip
  :: for (p : 0 .. W - 1) {
       if
       :: cell[r * CELLS + VIEW(p, rows[n], 0)] != VALUE(tag, p) -> early = early | (1 << p)
       :: else
       fi
     }
  fi
}
#endif

inline header_dispatches() {
  atomic { HEADER_BEGINS(DISPATCH(n)) ->
    choose();
    tag = dispatch_tag[r]; dead = failed[r];
    if :: dead -> goto returned :: else fi
  };
  /* announce_tallies: no peer is in this wait, so it has no limit. */
  atomic { (!BULK || tally[r] == tag) ->
    if
#ifdef BUG_NO_BULK_FENCE
    :: BULK -> skip
#else
    :: BULK -> fence(r)
#endif
    :: else -> STRICT_FENCE
    fi;
    for (p : 0 .. W - 1) {
      if
      :: PEER(p) ->
         IDLE_OR_LOST(going_dispatch[PAIR(r, p)]);
         going_dispatch[PAIR(r, p)] = tag;
         going_count[PAIR(r, p)] = sends[r];
         AFTER_DISPATCH_HEADER
      :: else
      fi
    };
    if
    :: BULK ->
#ifdef BUG_LATE_BLOCK  /* one block says that all are through */
       add_to_counters();
#endif
       add_to_counters()
    :: else
    fi;
#ifdef BUG_NO_ACQUIRE
    load_early()
#endif
  };
  atomic { AWAIT(OF_PEERS(THROUGH)); hear_dispatches(); header_ends() }
}

/* A kernel of the caller's: reads all rows that came. */
inline experts() {
  atomic { HEADER_BEGINS(EXPERTS(n)) && !failed[r] ->
    for (p : 0 .. W - 1) {
      if
      :: (p == r && sends[r]) || (PEER(p) && received[PAIR(p, r)]) ->
         take(r, VIEW(p, rows[n], 0), VALUE(dispatch_tag[r], p));
#ifdef BUG_NO_ACQUIRE
         assert(!HAS(early, p) || p == r || read_before_written)
#endif
      :: else
      fi
    };
#ifdef BUG_NO_ACQUIRE
    early = 0;
#endif
    header_ends()
  }
}
