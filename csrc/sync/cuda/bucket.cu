// Tensors into a bucket, and sums over bytes.
#include "granules.cuh"

namespace leeway {
namespace {

constexpr int kBlocksOnEach = 6;  // of the device's processors

// Block b makes stretches [b each, (b + 1) each): as they follow each other, it looks for their tensors once.
__global__ void __launch_bounds__(kThreads, 3) flatten(LeewayBucket bucket, int64_t each, uint64_t* sum) {
  const int64_t first = blockIdx.x * each;
  int64_t index = find_placed(bucket.tensors, bucket.num_tensors, first * LEEWAY_STRETCH_BYTES, &LeewayPlaced::begin);
  uint64_t part = 0;
  for (int i = 0; i < each; ++i) {
    Granule made[kRounds];
    make_stretch(bucket, index, first + i, made);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int64_t at = granule_at(first + i, round), count = bucket.num_bytes - at;
      if (count <= 0) continue;
      part += mix_granule(made[round], count, bucket.position + at);
      store_granule(bucket, at, made[round]);
    }
  }
  add_to(sum, part);
}

__global__ void __launch_bounds__(kThreads) checksum(const uint8_t* bytes, int64_t num_bytes, int64_t position,
                                                     uint64_t* sum) {
  const bool aligned = reinterpret_cast<uintptr_t>(bytes) % 16 == 0;
  uint64_t part = 0;
  for (int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kGranule; at < num_bytes;
       at += int64_t(gridDim.x) * kThreads * kGranule) {
    const bool whole = aligned && at + kGranule <= num_bytes;
    const Granule granule = whole ? granule_of(load16_once(bytes + at)) : load_part(bytes + at, num_bytes - at);
    part += mix_granule(granule, num_bytes - at, position + at);
  }
  add_to(sum, part);
}

template <typename From>
__device__ uint32_t top_of(const LeewayPlaced& matrix, const Tile& tile) {
  uint32_t top = 0;
  for (int64_t i = threadIdx.x; i < tile.rows * LEEWAY_TILE; i += kThreads) {
    const int64_t row = tile.row + i / LEEWAY_TILE, column = i % LEEWAY_TILE;
    if (column >= tile.columns) continue;
    const From x = static_cast<const From*>(matrix.data)[row * matrix.columns + tile.column + column];
    const uint32_t magnitude = bits_of(to_float(x)) & 0x7fffffff;
    if (magnitude < 0x7f800000 && magnitude > top) top = magnitude;
  }
  return top;
}

// A block for each tile of 128 x 128.
__global__ void __launch_bounds__(kThreads) scales(LeewayBucket bucket) {
  const int64_t index = find_placed(bucket.tensors, bucket.num_tensors, blockIdx.x, &LeewayPlaced::first_tile);
  const LeewayPlaced matrix = bucket.tensors[index];
  const Tile tile = tile_of(matrix, blockIdx.x - matrix.first_tile);
  uint32_t top = matrix.type == LEEWAY_F64   ? top_of<double>(matrix, tile)
                 : matrix.type == LEEWAY_F32 ? top_of<float>(matrix, tile)
                                             : top_of<Bf16>(matrix, tile);
  uint32_t* warps = shared<uint32_t>();
  const auto greater = [](uint32_t a, uint32_t b) { return a > b ? a : b; };
  top = warp_reduce(top, greater);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = top;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) top = greater(top, warps[warp]);
  matrix.scales[blockIdx.x - matrix.first_tile] = fp8_scale(of_bits(top));
}

}  // namespace
}  // namespace leeway

using namespace leeway;

extern "C" int leeway_scales_cuda(const LeewayBucket* bucket, void* stream) {
  if (bucket->num_tiles == 0) return cudaSuccess;
  const Shape shape{.grid = bucket->num_tiles, .block = kThreads, .shared = kThreads / 32 * sizeof(uint32_t)};
  return launch<scales>(shape, stream, *bucket);
}

extern "C" int leeway_flatten_cuda(const LeewayBucket* bucket, uint64_t* sum, void* stream) {
  const int64_t stretches = num_stretches(*bucket);
  if (stretches == 0) return cudaSuccess;
  const int64_t each = ceil_div(stretches, num_resident(stretches, kBlocksOnEach));
  const Shape shape{.grid = ceil_div(stretches, each), .block = kThreads};
  return launch<flatten>(shape, stream, *bucket, each, sum);
}

extern "C" int leeway_checksum_cuda(const void* bytes, int64_t num_bytes, int64_t position, uint64_t* sum,
                                    void* stream) {
  if (num_bytes == 0) return cudaSuccess;
  const Shape shape{.grid = num_resident(ceil_div(num_bytes, kThreads * kGranule), 8), .block = kThreads};
  return launch<checksum>(shape, stream, static_cast<const uint8_t*>(bytes), num_bytes, position, sum);
}
