// Rows of y [W, R, H] on their way back, as they lie there.
#include "combine.cuh"

namespace moe_a2a::cuda {
namespace {

struct Whole {
  using Launch = CombineLaunch;
  static constexpr bool kSums = false;
  using Element = uint8_t;
  static __device__ __forceinline__ const uint8_t* row(const CombineLaunch& p, int source,
                                                       int slot) {
    return row_of_y(p, source, slot);
  }
  template <class Row, int kRun>
  static __device__ __forceinline__ void push(const CombineLaunch& p, Share share,
                                              const Outgoing<Whole, Row, kRun>&);
  // The rank's own rows are summed from y.
  template <class Row, int kRun>
  struct Own {
    __device__ __forceinline__ Own(const CombineLaunch&, const Steps<Row, kRun>&, const Slots&) {}
  };
};

// All units of a warp. The next one is asked for before the stores of this one, which wait for the
// link.
template <class Row, int kRun>
__device__ __forceinline__ void Whole::push(const CombineLaunch& p, Share share,
                                            const Outgoing<Whole, Row, kRun>&) {
  if (share.first >= p.units) return;
  const int total = units_to_push(p);
  Sequence sequence(p, share, total);
  Outgoing<Whole, Row, kRun> out(p, sequence.index());
  bool more = sequence.index() < total, exists = more && out.exists(p);
  Chunk data[kRun][Row::kChunks];
  if (exists) out.load(p, data);
#pragma unroll 1
  while (more) {
    sequence.advance(p);
    const Outgoing<Whole, Row, kRun> next(p, sequence.index());
    more = sequence.index() < total;
    const bool follows = more && next.exists(p);
    Chunk ahead[kRun][Row::kChunks];
    if (follows) next.load(p, ahead);
    if (exists) out.send(p, data);
    out = next;
    exists = follows;
#pragma unroll
    for (int u = 0; u < kRun; ++u)
#pragma unroll
      for (int i = 0; i < Row::kChunks; ++i) data[u][i] = ahead[u][i];
  }
}

template <class Row>
const void* kernel(CombineRuns runs) {
  if (runs.sum == 1) return reinterpret_cast<const void*>(combine<Whole, Row, 1, 1>);
  if (runs.push == 2) return reinterpret_cast<const void*>(combine<Whole, Row, 2, 2>);
  if constexpr (Row::kChunks == 1) return reinterpret_cast<const void*>(combine<Whole, Row, 4, 4>);
  if constexpr (Row::kChunks == 2) return reinterpret_cast<const void*>(combine<Whole, Row, 4, 2>);
  return nullptr;
}

template <int kWire>
const void* scaled_kernel(int scalar, CombineRuns runs) {
  return scalar == kScalarBf16   ? kernel<Scaled<kWire, kScalarBf16>>(runs)
         : scalar == kScalarFp16 ? kernel<Scaled<kWire, kScalarFp16>>(runs)
                                 : kernel<Scaled<kWire, kScalarFp32>>(runs);
}

}  // namespace

const void* combine_kernel(int combine_wire, int scalar, CombineRuns runs) {
  switch (combine_wire) {
    case kBf16:
      return kernel<Plain<kScalarBf16>>(runs);
    case kFp16:
      return kernel<Plain<kScalarFp16>>(runs);
    case kFp32:
      return kernel<Plain<kScalarFp32>>(runs);
    case kFp8Block128:
      return scaled_kernel<kFp8Block128>(scalar, runs);
    default:
      return scaled_kernel<kMxfp8>(scalar, runs);
  }
}

}  // namespace moe_a2a::cuda
