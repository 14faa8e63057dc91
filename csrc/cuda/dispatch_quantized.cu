// Dispatch of small rounds whose rows are quantized on the way, in packets. As dispatch_small, but
// that a block takes whole rows: it makes the image of one in shared memory while the ids are on
// their way, and one barrier stands between both and the first strip.
#include "finish.cuh"
#include "row_image.cuh"
#include "targets.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

template <int kWire, class Columns>
__global__ void __launch_bounds__(kColumnThreads, 1)
    dispatch_quantized(const DispatchLaunch __grid_constant__ p) {
  using Image = RowImage<kWire, kAlignedBf16>;
  MOE_SHARED(Columns, columns);
  MOE_DYNAMIC_SHARED(image);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int block = blockIdx.x, last = gridDim.x - 1, movers = max(last, 1);
  const int tokens = static_cast<int>(p.a.tokens);
  const bool moves = block < movers, finishes = block == last && warp == warps - 1;
  uint8_t* const outbox = hold(p.c.window[min(lane, p.c.ep_size - 1)] + p.c.dispatch_outbox);
  Look<Columns> look(p);
  const Operation op = begin(p.c, kDispatch);
  int t = moves ? block : tokens;
  const bool sends = t < tokens;  // all the block, or none of it
  typename Image::Data data;
  look.load(p);
  if (sends) Image::load(p, t, data);
  const float global_scale = p.global_scale == nullptr ? 1.0f : *p.global_scale;
  look.mark(p, columns);
  if (sends) {
    Image::take_rest(p, t, image);
    Image::quantize(p, t, global_scale, data, image);
  }
  columns.close(p);
  const int count = columns.count(tokens);  // of all tokens, to rank `lane`
  if (finishes && !op.dead && lane < p.c.ep_size && (p.a.active >> lane & 1) != 0)
    send_header(p.c, op.tag, p.facts, lane, count);
  while (t < tokens) {
    const Targets targets(p, columns, typename Columns::Position(t), outbox);
#pragma unroll 1
    for (int strip = warp; strip < p.runs && !op.dead; strip += warps) {
      const Run<Line128, 1> run(strip);
      Chunk strips[1];
      load_image_run(p, image, run, strips);
      targets.send(p, op.tag, t, run, strips);
    }
    t += movers;
    // Together: a warp that begins late may know more than the others, which wait for it below.
    if (t >= tokens || __syncthreads_or(op.dead)) break;
    Image::load(p, t, data);
    Image::take_rest(p, t, image);
    Image::quantize(p, t, global_scale, data, image);
    __syncthreads();
  }
  if (op.dead) return;
  if (moves) {
    const Turn turn{block * warps + warp, movers * warps};
    scrub_silent<Line128, 1>(p, __shfl_sync(kAllLanes, count, p.c.rank), turn);
    receive_rows<Line128, 1>(p, op, turn);
  }
  if (finishes) finish_dispatch(p, op, false);
}

template <int kWire>
const void* kernel(bool many) {
  return many ? reinterpret_cast<const void*>(dispatch_quantized<kWire, ManyColumns>)
              : reinterpret_cast<const void*>(dispatch_quantized<kWire, FewColumns>);
}

}  // namespace

const void* dispatch_quantized_kernel(int wire, bool many) {
  switch (wire) {
    case kFp8:
      return kernel<kFp8>(many);
    case kFp8Block128:
      return kernel<kFp8Block128>(many);
    case kMxfp8:
      return kernel<kMxfp8>(many);
    case kMxfp4:
      return kernel<kMxfp4>(many);
    default:
      return kernel<kNvfp4>(many);
  }
}

}  // namespace moe_a2a::cuda
