// The processor's own kernels behind the C interface, and those that need none of its vectors.
#include "../common/dispatch.h"
#include "blocks.h"

namespace leeway {
namespace {

const BlockKernels& kernels() {
  switch (isa()) {
    case Isa::avx512:
      return avx512::kBlocks;
    case Isa::avx2:
      return avx2::kBlocks;
    default:
      return portable::kBlocks;
  }
}

}  // namespace
}  // namespace leeway

using namespace leeway;

void leeway_scales_cpu(const LeewayBucket* bucket, int64_t begin, int64_t end) {
  kernels().scales(bucket, begin, end);
}

uint64_t leeway_flatten_cpu(const LeewayBucket* bucket, int64_t begin, int64_t end) {
  return kernels().flatten(bucket, begin, end);
}

uint64_t leeway_delta_cpu(const LeewayBucket* bucket, int64_t begin, int64_t end, uint32_t* counts, uint16_t* offsets,
                          uint16_t* values) {
  return kernels().delta(bucket, begin, end, counts, offsets, values);
}

uint64_t leeway_checksum_cpu(const void* bytes, int64_t num_bytes, int64_t position) {
  return kernels().checksum(bytes, num_bytes, position);
}

uint64_t leeway_digest(uint64_t sum, int64_t num_bytes) { return digest_of(sum, num_bytes); }

int64_t leeway_find_misfit_cpu(const LeewayBucket* bucket, const LeewayChanges* changes, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = changes->starts[block], last = changes->starts[block + 1];
    const int64_t units = least(LEEWAY_BLOCK_UNITS, bucket->num_bytes / 2 - block * LEEWAY_BLOCK_UNITS);
    int64_t above = -1;
    for (int64_t i = first; i < last; ++i) {
      if (changes->offsets[i] <= above || changes->offsets[i] >= units) return i;
      above = changes->offsets[i];
    }
  }
  return -1;
}

// Changes of one word are made together: its mix is taken out of the sum and put in anew.
uint64_t leeway_apply_cpu(const LeewayBucket* bucket, const LeewayChanges* changes, int64_t begin, int64_t end) {
  uint64_t sum = 0;
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t i = changes->starts[block]; i < changes->starts[block + 1];) {
      const int64_t at = block * LEEWAY_BLOCK_BYTES + changes->offsets[i] / 4 * 8;
      const int64_t size = least(8, bucket->num_bytes - at);
      uint8_t* word = bucket->bytes + at;
      const uint64_t key = key_of((bucket->position + at) / 8), before = mix(load_tail(word, size), key);
      const int run = changes->offsets[i] / 4;
      for (; i < changes->starts[block + 1] && changes->offsets[i] / 4 == run; ++i) {
        memcpy(word + changes->offsets[i] % 4 * 2, &changes->values[i], 2);
      }
      sum += mix(load_tail(word, size), key) - before;
    }
  }
  return sum;
}
