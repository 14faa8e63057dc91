// Rows of local experts, grouped by expert, on their way back: where combine.cu loads a run of a
// row of y, the runs of its choices are loaded here, weighted and summed.
#include "combine.cuh"
#include "weigh.cuh"

namespace moe_a2a::cuda {
namespace {

// `kScalar`: of the rows.
template <int kScalar>
struct Sums {
  using Launch = GroupedLaunch;
  static constexpr bool kSums = true;
  using Element = int32_t;

  // Places of the choices of a received row.
  static __device__ __forceinline__ const int32_t* row(const GroupedLaunch& p, int source,
                                                       int slot) {
    const int64_t row = int64_t{source} * p.facts.rows + slot;
    return p.grouped.positions + row * p.c.top_k;
  }

  template <class Row, int kRun>
  static __device__ __forceinline__ void push(const GroupedLaunch& p, Share share,
                                              const Outgoing<Sums, Row, kRun>& first);

  // A run of one of the rank's own rows, which is asked for before those of others.
  template <class Row, int kRun>
  struct Own {
    typename Row::Item item[kRun];

    __device__ __forceinline__ Own(const GroupedLaunch& p, const Steps<Row, kRun>& steps,
                                   const Slots& slots) {
      if ((slots.ranks >> p.c.rank & 1) == 0) return;
      Weighed<Row, kScalar, kRun> sum;
      sum.ask(p, row(p, p.c.rank, slots.of(p.c.rank)));
      sum.load(p, steps);
      sum.finish(p, steps, item);
    }
  };
};

// All units of a warp. While one is summed the places of the next are on their way; its rows are
// asked for before the stores of this one, which wait for the link. Nothing goes ahead of the loop:
// sums are long, and code is time.
template <int kScalar>
template <class Row, int kRun>
__device__ __forceinline__ void Sums<kScalar>::push(const GroupedLaunch& p, Share share,
                                                    const Outgoing<Sums, Row, kRun>& first) {
  if (share.first >= p.units) return;
  const int total = units_to_push(p);
  Sequence sequence(p, share, total);
  Outgoing<Sums, Row, kRun> out = first, next = first;
  bool more = sequence.index() < total, follows = more && next.exists(p), exists = false;
  Weighed<Row, kScalar, kRun> sum;
#pragma unroll 1
  for (;;) {
    Weighed<Row, kScalar, kRun> ahead;
    if (follows) ahead.ask(p, next.row);
    typename Row::Item item[kRun];
    if (exists) sum.finish(p, out.steps, item);
    if (follows) ahead.load(p, next.steps);
    if (exists) Row::template send<kRun>(p, out.inbox, out.steps, item);
    if (!more) return;
    out = next;
    exists = follows;
    sum = ahead;
    sequence.advance(p);
    next = Outgoing<Sums, Row, kRun>(p, sequence.index());
    more = sequence.index() < total;
    follows = more && next.exists(p);
  }
}

template <class Row, int kScalar>
const void* kernel(CombineRuns runs) {
  constexpr CombineRuns longest = longest_grouped_runs(Row::kChunks);
  return runs.push == 1 ? reinterpret_cast<const void*>(combine<Sums<kScalar>, Row, 1, 1>)
                        : reinterpret_cast<const void*>(
                              combine<Sums<kScalar>, Row, longest.push, longest.sum>);
}

template <class Row>
const void* plain_kernel(int scalar, CombineRuns runs) {
  return scalar == kScalarBf16   ? kernel<Row, kScalarBf16>(runs)
         : scalar == kScalarFp16 ? kernel<Row, kScalarFp16>(runs)
                                 : kernel<Row, kScalarFp32>(runs);
}

template <int kWire>
const void* scaled_kernel(int scalar, CombineRuns runs) {
  return scalar == kScalarBf16   ? kernel<Scaled<kWire, kScalarBf16>, kScalarBf16>(runs)
         : scalar == kScalarFp16 ? kernel<Scaled<kWire, kScalarFp16>, kScalarFp16>(runs)
                                 : kernel<Scaled<kWire, kScalarFp32>, kScalarFp32>(runs);
}

}  // namespace

const void* grouped_kernel(int combine_wire, int scalar, CombineRuns runs) {
  switch (combine_wire) {
    case kBf16:
      return plain_kernel<Plain<kScalarBf16>>(scalar, runs);
    case kFp16:
      return plain_kernel<Plain<kScalarFp16>>(scalar, runs);
    case kFp32:
      return plain_kernel<Plain<kScalarFp32>>(scalar, runs);
    case kFp8Block128:
      return scaled_kernel<kFp8Block128>(scalar, runs);
    default:
      return scaled_kernel<kMxfp8>(scalar, runs);
  }
}

}  // namespace moe_a2a::cuda
