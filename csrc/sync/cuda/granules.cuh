// A bucket as CUDA makes it: in granules of 16 bytes, one a thread at a time, in stretches that a block makes together.
//
// Tensors begin at multiples of a granule, so each granule holds elements of one tensor, zeros, or both in this order.
#pragma once

#include "../../common/cuda.cuh"
#include "../blocks.h"

namespace leeway {

constexpr int kThreads = 256;
constexpr int64_t kGranule = 16;
constexpr int kRounds = LEEWAY_STRETCH_BYTES / (kThreads * kGranule);  // granules of a thread in a stretch

inline int64_t num_stretches(const LeewayBucket& bucket) { return ceil_div(bucket.num_bytes, LEEWAY_STRETCH_BYTES); }

// As many blocks as the device holds at once, at most one for each of `pieces`.
inline int64_t num_resident(int64_t pieces, int on_each) {
  return least(pieces, int64_t(device_attribute(cudaDevAttrMultiProcessorCount)) * on_each);
}

// Where in a stretch a thread's granule of round `round` lies.
__device__ __forceinline__ int64_t granule_at(int64_t stretch, int round) {
  return stretch * LEEWAY_STRETCH_BYTES + (int64_t(round) * kThreads + threadIdx.x) * kGranule;
}

struct alignas(16) Granule {  // its two words
  uint64_t low, high;
};

__device__ __forceinline__ Granule granule_of(uint4 x) {
  return {uint64_t(x.y) << 32 | x.x, uint64_t(x.w) << 32 | x.z};
}

// Its first `count` bytes, byte by byte.
__device__ inline Granule load_part(const uint8_t* from, int64_t count) {
  Granule granule = {0, 0};
#pragma unroll 1
  for (int64_t i = 0; i < least(count, kGranule); ++i) {
    (i < 8 ? granule.low : granule.high) |= uint64_t(from[i]) << i % 8 * 8;
  }
  return granule;
}

__device__ inline void store_part(uint8_t* to, Granule granule, int64_t count) {
#pragma unroll 1
  for (int64_t i = 0; i < count; ++i) to[i] = uint8_t((i < 8 ? granule.low : granule.high) >> i % 8 * 8);
}

// That at byte `at` of the bucket, of which the last one may lack some bytes.
__device__ __forceinline__ Granule load_granule(const LeewayBucket& bucket, int64_t at) {
  const int64_t count = bucket.num_bytes - at;
  return count >= kGranule ? granule_of(load16_once(bucket.bytes + at)) : load_part(bucket.bytes + at, count);
}

__device__ __forceinline__ void store_granule(const LeewayBucket& bucket, int64_t at, Granule granule) {
  const int64_t count = bucket.num_bytes - at;
  if (count < kGranule) return store_part(bucket.bytes + at, granule, count);
  const uint4 bytes = {uint32_t(granule.low), uint32_t(granule.low >> 32), uint32_t(granule.high),
                       uint32_t(granule.high >> 32)};
  store16_once(bucket.bytes + at, bytes);
}

// --- Whole granules of one tensor.

template <typename From, typename To>
__device__ __forceinline__ void cast_one(const From& from, float scale, To& to) {
  const float x = to_float(from);
  from_float(scale == 1 ? x : x / scale, to);
}

// The granule that `count` = 16 / sizeof(To) elements make, which lie aligned to 16 bytes or to all of theirs.
template <typename From, typename To>
__device__ __forceinline__ Granule cast16(const From* from, float scale) {
  constexpr int count = kGranule / sizeof(To);
  constexpr int size = count * sizeof(From);
  alignas(16) From read[count];
  alignas(16) To made[count];
  if constexpr (size >= 16) {
#pragma unroll
    for (int i = 0; i < size / 16; ++i) {
      const uint4 part = load16_once(reinterpret_cast<const uint4*>(from) + i);
      memcpy(reinterpret_cast<unsigned char*>(read) + 16 * i, &part, 16);
    }
  } else {
    const uint2 part = __ldcs(reinterpret_cast<const uint2*>(from));
    memcpy(read, &part, 8);
  }
#pragma unroll
  for (int i = 0; i < count; ++i) cast_one(read[i], scale, made[i]);
  Granule granule;
  memcpy(&granule, made, sizeof granule);
  return granule;
}

__device__ __forceinline__ float scale_at(const LeewayPlaced& tensor, int64_t element) {
  return tensor.scales[tile_at(tensor, element / tensor.columns, element % tensor.columns)];
}

// Whether all granules of the tensor that are full of its elements can be made by cast16.
__device__ __forceinline__ bool is_regular(const LeewayPlaced& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 &&
         (tensor.format != LEEWAY_TO_FP8 || tensor.columns % kGranule == 0);
}

// --- Any granule, element by element.

// The bits of the element at `byte` of the tensor in the bucket.
template <typename From>
__device__ __forceinline__ uint32_t cast_element(const LeewayPlaced& tensor, int64_t byte) {
  const From* data = static_cast<const From*>(tensor.data);
  if (tensor.format == LEEWAY_TO_BF16) {
    Bf16 made;
    cast_one(data[byte / 2], 1, made);
    return made.bits;
  }
  if (tensor.format == LEEWAY_TO_F32) return bits_of(to_float(data[byte / 4]));
  Fp8 made;
  cast_one(data[byte], scale_at(tensor, byte), made);
  return made.bits;
}

__device__ inline Granule cast_slowly(const LeewayPlaced& tensor, int64_t first_byte) {
  const int64_t count = least(kGranule, tensor.end - tensor.begin - first_byte);
  if (tensor.format == LEEWAY_AS_IS) return load_part(static_cast<const uint8_t*>(tensor.data) + first_byte, count);
  const int step = tensor.format == LEEWAY_TO_BF16 ? 2 : tensor.format == LEEWAY_TO_F32 ? 4 : 1;
  Granule granule = {0, 0};
#pragma unroll 1
  for (int64_t i = 0; i < count; i += step) {
    const uint64_t bits = tensor.type == LEEWAY_F64   ? cast_element<double>(tensor, first_byte + i)
                          : tensor.type == LEEWAY_F32 ? cast_element<float>(tensor, first_byte + i)
                                                      : cast_element<Bf16>(tensor, first_byte + i);
    (i < 8 ? granule.low : granule.high) |= bits << i % 8 * 8;
  }
  return granule;
}

// --- A stretch.

template <typename From, typename To>
__device__ __forceinline__ void cast_rounds(const LeewayPlaced& tensor, int64_t stretch, Granule (&made)[kRounds]) {
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t element = (granule_at(stretch, round) - tensor.begin) / sizeof(To);
    const float scale = sizeof(To) == 1 ? scale_at(tensor, element) : 1;
    made[round] = cast16<From, To>(static_cast<const From*>(tensor.data) + element, scale);
  }
}

template <typename From>
__device__ __forceinline__ void cast_from(const LeewayPlaced& tensor, int64_t stretch, Granule (&made)[kRounds]) {
  if (tensor.format == LEEWAY_TO_BF16) {
    cast_rounds<From, Bf16>(tensor, stretch, made);
  } else if (tensor.format == LEEWAY_TO_F32) {
    cast_rounds<From, float>(tensor, stretch, made);
  } else {
    cast_rounds<From, Fp8>(tensor, stretch, made);
  }
}

// A stretch that lies within one regular tensor.
__device__ __forceinline__ void make_regular(const LeewayPlaced& tensor, int64_t stretch, Granule (&made)[kRounds]) {
  if (tensor.format == LEEWAY_AS_IS) {
    const unsigned char* data = static_cast<const unsigned char*>(tensor.data) - tensor.begin;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      made[round] = granule_of(load16_once(data + granule_at(stretch, round)));
    }
  } else if (tensor.type == LEEWAY_F64) {
    cast_from<double>(tensor, stretch, made);
  } else if (tensor.type == LEEWAY_F32) {
    cast_from<float>(tensor, stretch, made);
  } else {
    cast_from<Bf16>(tensor, stretch, made);
  }
}

// Moves `index` on to the last tensor that begins at or before byte `at`; -1 where none does.
__device__ __forceinline__ void seek(const LeewayBucket& bucket, int64_t& index, int64_t at) {
  while (index + 1 < bucket.num_tensors && bucket.tensors[index + 1].begin <= at) ++index;
}

// A thread's granules of the stretch; of zeros beyond the bucket. `index` is as `seek` has it, for the stretch's begin.
__device__ __forceinline__ void make_stretch(const LeewayBucket& bucket, int64_t& index, int64_t stretch,
                                             Granule (&made)[kRounds]) {
  const int64_t begin = stretch * LEEWAY_STRETCH_BYTES;
  seek(bucket, index, begin);
  if (index >= 0 && begin + LEEWAY_STRETCH_BYTES <= bucket.tensors[index].end && is_regular(bucket.tensors[index])) {
    return make_regular(bucket.tensors[index], stretch, made);
  }
  int64_t mine = index;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t at = granule_at(stretch, round);
    seek(bucket, mine, at);
    const bool filled = mine >= 0 && at < bucket.tensors[mine].end;
    made[round] = filled ? cast_slowly(bucket.tensors[mine], at - bucket.tensors[mine].begin) : Granule{0, 0};
  }
}

// --- Sums.

// Of `count` bytes, at least 1, of a granule that stands at byte `at` of the payload.
__device__ __forceinline__ uint64_t mix_granule(Granule granule, int64_t count, int64_t at) {
  const uint64_t key = key_of(at / 8);
  return mix(granule.low, key) + (count > 8 ? mix(granule.high, key + kKeyStep) : 0);
}

// By whole warps: sum += the total of `part`.
__device__ __forceinline__ void add_to(uint64_t* sum, uint64_t part) {
  part = warp_reduce(part, [](uint64_t a, uint64_t b) { return a + b; });
  if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(sum), part);
}

}  // namespace leeway
