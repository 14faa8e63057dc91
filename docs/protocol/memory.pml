/* Windows, stores on their way to them, and what a fence or the end of a kernel orders.
 *
 * A store to a peer is issued, and lands at a time of its own, after any store that follows it in
 * the code as well as before (process `link`): nothing but a release or a wait orders two of them.
 * A row's value is the tag of its operation with its source, so a reader knows whose it has.
 *
 * What a rank does in its own memory takes effect at once for itself; for its peers it is pending
 * until it is ordered before a header: a peer's store that lands on memory with a pending access
 * could as well have come before it.
 */

#ifndef W
#define W 2 /* ranks */
#endif
#ifndef TMAX
#define TMAX 3 /* capacity; R is 1 or TMAX */
#endif
#ifndef CHUNKS
#define CHUNKS 1 /* accesses that a row takes: lines of a packet row, chunks of a combine row */
#endif
#ifndef EPOCHS
#define EPOCHS 7 /* largest epoch, 2^32 - 1 in the code */
#endif
#ifndef FIRST
#define FIRST 1 /* epoch of the first operation */
#endif

/* The name of a property is in the text of each assertion that checks it. */
hidden byte read_before_written, overwritten_before_read, header_of_another_operation;
hidden byte excluded_without_reset, excluded_unnoticed, never_through;

/* ---- tags: csrc/epoch.h, context.h ---------------------------------------------------------- */

#define TAG(generation, epoch) ((generation) << 3 | (epoch))
#define EPOCH(tag) ((tag) & 7)
#define GENERATION(tag) ((tag) >> 3)
#define NEXT(tag) (EPOCH(tag) == EPOCHS -> TAG(GENERATION(tag) + 1, 1) : (tag) + 1)
#define VALUE(tag, source) ((tag) << 2 | (source))

#ifdef BUG_EPOCH_ONLY /* packets compare the low word only */
#define FRESH(seen, tag) (EPOCH(seen) == EPOCH(tag))
#else
#define FRESH(seen, tag) ((seen) == (tag))
#endif

/* ---- the window of each rank: csrc/layout.h ------------------------------------------------- */

#define VIEWS (W * TMAX)
#define CELLS (VIEWS + W * CHUNKS)
#define VIEW(source, rows, slot) ((source) * (rows) + (slot))
#ifdef BUG_OFFSET_OF_R
#define INBOX(rows, source) (W * (rows) + (source) * CHUNKS)
#else
#define INBOX(rows, source) (VIEWS + (source) * CHUNKS)
#endif

#define PAIR(from, to) ((from) * W + (to))
#define OFFSETS(cells) ((1 << (cells)) - 1)

byte cell[W * CELLS];          /* receive views, then the inbox of combine; 0: all ones there */
byte line[W * W * CHUNKS];     /* by pair: tags of the lines in the inbox of dispatch */
byte dispatch_header[W * W], dispatch_count[W * W], combine_header[W * W]; /* by pair */
byte counter[W * W];           /* by pair: blocks that are through; kBlocks */
byte post[W * W];              /* by pair: generation */

/* Ghosts, by rank, a bit a cell: a row has landed and nobody has read it; accesses of the owner in
 * the kernel under way, and in those before it. */
short unread[W], pending[W], earlier[W];
bit unheard_dispatch[W * W], unheard_combine[W * W];

/* ---- stores on their way, by pair ----------------------------------------------------------- */

byte going_lines[W * W], going_tag[W * W];   /* bits; whose */
byte going_row[W * W];                       /* cell + 1 */
byte going_adds[W * W];
byte going_dispatch[W * W], going_count[W * W], going_combine[W * W]; /* headers: tags */
byte going_chunks[W * W], going_sum[W * W], going_to[W * W];  /* rows of combine: bits; tag; cell */

/* A row that is still on its way, or has landed and was not read, would be lost. */
#define IDLE_OR_LOST(x) assert((x) == 0 || overwritten_before_read)

inline land(owner, at, value) {
  assert((unread[owner] & (1 << (at))) == 0 || overwritten_before_read);
  assert(((pending[owner] | earlier[owner]) & (1 << (at))) == 0 || overwritten_before_read);
  cell[(owner) * CELLS + (at)] = value;
  unread[owner] = unread[owner] | (1 << (at))
}

/* A store of the owner. */
inline put(owner, at, value) {
  assert((unread[owner] & (1 << (at))) == 0 || overwritten_before_read);
  cell[(owner) * CELLS + (at)] = value;
  pending[owner] = pending[owner] | (1 << (at))
}

inline take(owner, at, value) {
  assert(cell[(owner) * CELLS + (at)] == (value) || read_before_written);
  unread[owner] = unread[owner] & ~(1 << (at));
  pending[owner] = pending[owner] | (1 << (at))
}

/* The end of a kernel. To the memory model it orders what this rank does later, and nothing for its
 * peers until a fence. With lines the code relies on more: accesses to this rank's own memory have
 * been performed (design.md, Why this order is enough). */
inline end_of_kernel(owner) {
#ifdef LINES
  earlier[owner] = 0;
#else
  earlier[owner] = earlier[owner] | pending[owner];
#endif
  pending[owner] = 0
}

/* fence.acq_rel.sys before a header: accesses of the kernels before. Not those of other blocks in
 * this kernel. That it also orders stores on their way to peers is not made use of. */
inline fence(owner) { earlier[owner] = 0 }

inline land_dispatch_header(pair) {
  IDLE_OR_LOST(unheard_dispatch[pair]);
  dispatch_header[pair] = going_dispatch[pair];
  dispatch_count[pair] = going_count[pair];
  unheard_dispatch[pair] = 1;
  going_dispatch[pair] = 0; going_count[pair] = 0
}

inline land_combine_header(pair) {
  IDLE_OR_LOST(unheard_combine[pair]);
  combine_header[pair] = going_combine[pair];
  unheard_combine[pair] = 1;
  going_combine[pair] = 0
}

/* For three ranks: headers and additions land as they are issued. A poll that comes late stands for
 * one that lands late. */
#ifdef AT_ONCE
#define AFTER_DISPATCH_HEADER land_dispatch_header(PAIR(r, p))
#define AFTER_COMBINE_HEADER land_combine_header(PAIR(r, p))
#define ADD_TO_COUNTER counter[PAIR(r, p)]++
#else
#define AFTER_DISPATCH_HEADER skip
#define AFTER_COMBINE_HEADER skip
#define ADD_TO_COUNTER going_adds[PAIR(r, p)]++
#endif

/* All stores of one rank to another one, landing in any order. */
proctype link(byte from, to) {
  byte q = PAIR(from, to);
end:
  do
  :: d_step { going_dispatch[q] != 0 -> land_dispatch_header(q) }
  :: d_step { going_combine[q] != 0 -> land_combine_header(q) }
#ifndef ONLY_BULK
  :: d_step { (going_lines[q] & 1) != 0 ->
       line[q * CHUNKS] = going_tag[q];
       going_lines[q] = going_lines[q] & ~1 }
#if CHUNKS > 1
  :: d_step { (going_lines[q] & 2) != 0 ->
       line[q * CHUNKS + 1] = going_tag[q];
       going_lines[q] = going_lines[q] & ~2 }
#endif
#endif
#ifndef ONLY_PACKETS
  :: d_step { going_row[q] != 0 ->
       land(to, going_row[q] - 1, VALUE(going_tag[q], from));
       going_row[q] = 0 }
  :: d_step { going_adds[q] != 0 -> counter[q]++; going_adds[q]-- }
#endif
  :: d_step { (going_chunks[q] & 1) != 0 ->
       land(to, going_to[q], VALUE(going_sum[q], from));
       going_chunks[q] = going_chunks[q] & ~1 }
#if CHUNKS > 1
  :: d_step { (going_chunks[q] & 2) != 0 ->
       land(to, going_to[q] + 1, VALUE(going_sum[q], from));
       going_chunks[q] = going_chunks[q] & ~2 }
#endif
  od
}

/* Nothing of `from` is on its way to `to`. */
#define LANDED(q) (going_lines[q] == 0 && going_row[q] == 0 && going_adds[q] == 0 && \
                   going_dispatch[q] == 0 && going_combine[q] == 0 && going_chunks[q] == 0)
