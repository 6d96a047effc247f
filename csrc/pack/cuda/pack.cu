// Streams between the loose and the packed axis: each position is looked up once for all streams. Warps write whole
// lines; eight loads of each lane are under way at a time.
#include "search.cuh"

namespace leeway {
namespace {

constexpr int64_t kNowhere = -1;

template <typename T>
__device__ __forceinline__ void move_stream(const LeewayStream& stream, const int64_t (&from)[kPerLane], int64_t to,
                                            int64_t size) {
  const T* source = static_cast<const T*>(stream.from);
  T* destination = static_cast<T*>(stream.to);
  T value[kPerLane];
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) value[k] = from[k] == kNowhere ? static_cast<T>(stream.fill) : source[from[k]];
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    if (to + 32 * k < size) destination[to + 32 * k] = value[k];
  }
}

template <typename Runs>
__global__ void __launch_bounds__(kSearchThreads) move_streams(const LeewayMove move) {
  const Runs runs{move};
  const int64_t size = runs.size(), begin = warp_begin(), num = move.packed.num_sequences;
  if (begin >= size) return;
  const int64_t to = begin + threadIdx.x % 32;
  int64_t from[kPerLane];
  int64_t i = warp_last_before(runs, begin, num);
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    from[k] = kNowhere;
    const int64_t position = to + 32 * k;
    if (position >= size || num == 0) continue;
    i = advance(runs, i, position, num);
    const Run run = runs.run(i);
    if (run.to <= position && position < run.to + run.length) from[k] = run.from + position - run.to;
  }
  for (int32_t s = 0; s < move.num_streams; ++s) {
    const LeewayStream& stream = move.streams[s];
    switch (stream.width) {
      case 1: move_stream<uint8_t>(stream, from, to, size); break;
      case 2: move_stream<uint16_t>(stream, from, to, size); break;
      case 4: move_stream<uint32_t>(stream, from, to, size); break;
      default: move_stream<uint64_t>(stream, from, to, size);
    }
  }
}

}  // namespace
}  // namespace leeway

extern "C" int leeway_pack_cuda(const LeewayMove* move, void* stream) {
  using namespace leeway;
  if (move->packed.num_tokens == 0) return cudaSuccess;
  return launch<move_streams<Packing>>(search_shape(move->packed.num_tokens), stream, *move);
}

extern "C" int leeway_unpack_cuda(const LeewayMove* move, void* stream) {
  using namespace leeway;
  if (move->size == 0) return cudaSuccess;
  return launch<move_streams<Unpacking>>(search_shape(move->size), stream, *move);
}
