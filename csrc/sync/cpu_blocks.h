// The passes over a bucket's blocks, in the instruction set of the file that includes this.
//
// A block is made piece by piece, and each vector of a piece summed and written past the cache, or compared with what
// the bucket holds, as soon as it is there. Where one tensor fills a piece, vectors are copied or rounded to bf16 on the
// way; other pieces `fill` makes before, in a buffer that stays in the first-level cache.
#pragma once

#include "cpu_vec.h"

namespace leeway::LEEWAY_ISA {
namespace {

constexpr int64_t kPieceBytes = 4096;
constexpr int64_t kSumBytes = 131072;
constexpr int64_t kAhead = 6144;  // bytes that are asked for early: the processor's own prefetch ends with each page.
                                  // No multiple of a page, of which the cache holds few lines at the same place.

// Where a piece's words come from.
struct Bytes {
  const uint8_t* from;
  __attribute__((always_inline)) W words(int64_t byte) const {
    __builtin_prefetch(from + byte + kAhead);
    return load_words(from + byte);
  }
  uint64_t tail(int64_t byte, int64_t size) const { return load_tail(from + byte, size); }
};

struct Rounded {  // to bf16
  const float* from;
  __attribute__((always_inline)) W words(int64_t byte) const {
    const float* two = from + byte / 2;
    __builtin_prefetch(two + kAhead / 4);
    return joined(bf16_bits(load(two)), bf16_bits(load(two + kLanes)));
  }
  uint64_t tail(int64_t byte, int64_t size) const {
    Bf16 units[4]{};
    for (int64_t i = 0; i < size / 2; ++i) from_float(from[byte / 2 + i], units[i]);
    return load_word(units);
  }
};

// Calls visit(half, byte, words) for every whole vector of a piece's `num_bytes` bytes, and rest(byte, size, word) for
// each word after them, the last one of up to 8 bytes. Their sum, the first byte standing at `position`.
//
// The two halves are read side by side: that keeps the multipliers busy, and more lines on their way from memory.
template <typename Source, typename Visit, typename Rest>
LEEWAY_INLINE uint64_t sum_words(Source source, int64_t num_bytes, int64_t position, Visit visit, Rest rest) {
  const int64_t middle = num_bytes / (2 * sizeof(W)) * sizeof(W);
  uint64_t keys[2][kWords];
  for (int i = 0; i < kWords; ++i) {
    keys[0][i] = key_of(position / 8 + i);
    keys[1][i] = key_of((position + middle) / 8 + i);
  }
  W key[2], total[2]{};
  memcpy(key, keys, sizeof key);
  const auto step = [&](int half, int64_t at) __attribute__((always_inline)) {
    const W words = source.words(at);
    visit(half, at, words);
    total[half] += mix(words, key[half]);
    key[half] += kWords * kKeyStep;
  };
  int64_t at = 0;
  for (; at < middle; at += sizeof(W)) {
    step(0, at);
    step(1, middle + at);
  }
  for (at *= 2; at + int64_t(sizeof(W)) <= num_bytes; at += sizeof(W)) step(1, at);
  uint64_t sum = 0;
  for (int i = 0; i < kWords; ++i) sum += total[0][i] + total[1][i];
  for (; at < num_bytes; at += 8) {
    const int64_t size = least(8, num_bytes - at);
    const uint64_t word = source.tail(at, size);
    rest(at, size, word);
    sum += leeway::mix(word, key_of((position + at) / 8));
  }
  return sum;
}

// --- Casts.

// Asks for what the next piece reads, which then comes while this one is summed.
template <typename From, typename To>
LEEWAY_INLINE void cast(const From* from, int64_t count, float scale, To* to) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    __builtin_prefetch(from + j + kPieceBytes / sizeof(To), 0, 2);
    store(to + j, scale == 1 ? load(from + j) : load(from + j) / scale);
  }
  for (; j < count; ++j) from_float(scale == 1 ? to_float(from[j]) : to_float(from[j]) / scale, to[j]);
}

// Elements [first, first + count) of a matrix, in runs that share a scale.
template <typename From>
void quantise(const LeewayPlaced& matrix, int64_t first, int64_t count, uint8_t* to) {
  for (int64_t done = 0; done < count;) {
    const int64_t row = (first + done) / matrix.columns, column = (first + done) % matrix.columns;
    const int64_t of_tile = LEEWAY_TILE - column % LEEWAY_TILE, of_row = matrix.columns - column;
    const int64_t run = least(count - done, least(of_tile, of_row));
    const From* from = static_cast<const From*>(matrix.data) + first + done;
    cast(from, run, matrix.scales[tile_at(matrix, row, column)], reinterpret_cast<Fp8*>(to + done));
    done += run;
  }
}

template <typename From>
void cast_to(const LeewayPlaced& tensor, int64_t first_byte, int64_t num_bytes, uint8_t* to) {
  const From* data = static_cast<const From*>(tensor.data);
  switch (tensor.format) {
    case LEEWAY_TO_BF16:
      return cast(data + first_byte / 2, num_bytes / 2, 1, reinterpret_cast<Bf16*>(to));
    case LEEWAY_TO_F32:
      return cast(data + first_byte / 4, num_bytes / 4, 1, reinterpret_cast<float*>(to));
    case LEEWAY_TO_FP8:
      return quantise<From>(tensor, first_byte, num_bytes, to);
  }
}

// What the tensor's bytes in the bucket from its `first_byte` on are.
void cast_bytes(const LeewayPlaced& tensor, int64_t first_byte, int64_t num_bytes, uint8_t* to) {
  if (tensor.format == LEEWAY_AS_IS) {
    memcpy(to, static_cast<const uint8_t*>(tensor.data) + first_byte, num_bytes);
  } else if (tensor.type == LEEWAY_F64) {
    cast_to<double>(tensor, first_byte, num_bytes, to);
  } else if (tensor.type == LEEWAY_F32) {
    cast_to<float>(tensor, first_byte, num_bytes, to);
  } else {
    cast_to<Bf16>(tensor, first_byte, num_bytes, to);
  }
}

// Bytes [at, end) of the bucket. `index` is the last tensor that begins at or before them, and moves on.
void fill(const LeewayBucket& bucket, int64_t& index, int64_t at, int64_t end, uint8_t* to) {
  while (at < end) {
    const bool last = index + 1 == bucket.num_tensors;
    const int64_t next = last ? bucket.num_bytes : bucket.tensors[index + 1].begin;
    if (next == at && !last) {
      ++index;
      continue;
    }
    int64_t until = least(end, next);
    if (index >= 0 && at < bucket.tensors[index].end) {
      const LeewayPlaced& tensor = bucket.tensors[index];
      until = least(until, tensor.end);
      cast_bytes(tensor, at - tensor.begin, until - at, to);
    } else {
      memset(to, 0, until - at);
    }
    to += until - at;
    at = until;
  }
}

// Calls piece(at, size, source) for the pieces of blocks [begin, end), in order.
template <typename Piece>
LEEWAY_INLINE void each_piece(const LeewayBucket& bucket, int64_t begin, int64_t end, Piece piece) {
  alignas(64) uint8_t bytes[kPieceBytes];
  const int64_t last = least(end * LEEWAY_BLOCK_BYTES, bucket.num_bytes);
  int64_t index = find_placed(bucket.tensors, bucket.num_tensors, begin * LEEWAY_BLOCK_BYTES, &LeewayPlaced::begin);
  for (int64_t at = begin * LEEWAY_BLOCK_BYTES; at < last; at += kPieceBytes) {
    const int64_t size = least(kPieceBytes, last - at);
    const LeewayPlaced* whole = index >= 0 && at + size <= bucket.tensors[index].end ? &bucket.tensors[index] : nullptr;
    if (whole && whole->format == LEEWAY_AS_IS) {
      piece(at, size, Bytes{static_cast<const uint8_t*>(whole->data) + at - whole->begin});
    } else if (whole && whole->format == LEEWAY_TO_BF16 && whole->type == LEEWAY_F32) {
      piece(at, size, Rounded{static_cast<const float*>(whole->data) + (at - whole->begin) / 2});
    } else {
      fill(bucket, index, at, at + size, bytes);
      piece(at, size, Bytes{bytes});
    }
  }
}

// --- The table's functions.

LEEWAY_INLINE void stream_words(uint8_t* to, W words) { stream(reinterpret_cast<float*>(to), bits<F>(words)); }

uint64_t flatten(const LeewayBucket* bucket, int64_t begin, int64_t end) {
  const bool aligned = reinterpret_cast<uintptr_t>(bucket->bytes) % sizeof(W) == 0;
  uint64_t sum = 0;
  each_piece(*bucket, begin, end, [&](int64_t at, int64_t size, auto source) {
    uint8_t* to = bucket->bytes + at;
    const auto past_cache = [&](int, int64_t i, W words) { stream_words(to + i, words); };
    const auto plainly = [&](int, int64_t i, W words) { memcpy(to + i, &words, sizeof words); };
    const auto rest = [&](int64_t i, int64_t count, uint64_t word) { memcpy(to + i, &word, count); };
    sum += aligned ? sum_words(source, size, bucket->position + at, past_cache, rest)
                   : sum_words(source, size, bucket->position + at, plainly, rest);
  });
  fence();
  return sum;
}

// Units of a piece that are not as the bucket holds them: bit j stands for the one at `byte` + 2 j.
struct Difference {
  uint32_t byte, mask;
};

uint64_t delta(const LeewayBucket* bucket, int64_t begin, int64_t end, uint32_t* counts, uint16_t* offsets,
               uint16_t* values) {
  uint64_t sum = 0;
  for (int64_t block = begin; block < end; ++block) {
    int64_t count = 0;
    each_piece(*bucket, block, block + 1, [&](int64_t at, int64_t size, auto source) {
      uint8_t* shadow = bucket->bytes + at;
      // Where units differ is listed without a branch, which would be mispredicted at every change, and told afterwards.
      Difference found[2][kPieceBytes / 16];
      int64_t num[2]{};
      alignas(64) uint8_t bytes[kPieceBytes];
      const auto list = [&](int half, int64_t i, uint32_t mask) {
        found[half][num[half]] = {uint32_t(i), mask};
        num[half] += mask != 0;
      };
      const auto vector = [&](int half, int64_t i, W words) {
        memcpy(bytes + i, &words, sizeof words);
        list(half, i, differing(words, Bytes{shadow}.words(i)));
      };
      const auto rest = [&](int64_t i, int64_t size, uint64_t word) {
        const uint64_t difference = word ^ load_tail(shadow + i, size);
        uint32_t mask = 0;
        for (int j = 0; j < 4; ++j) mask |= uint32_t((difference >> 16 * j & 0xffff) != 0) << j;
        memcpy(bytes + i, &word, size);
        list(1, i, mask);
      };
      sum += sum_words(source, size, bucket->position + at, vector, rest);
      const auto tell = [&](Difference difference) {
        for (uint32_t mask = difference.mask; mask != 0; mask &= mask - 1) {
          const int64_t byte = difference.byte + 2 * __builtin_ctz(mask);
          offsets[count] = uint16_t((at + byte) % LEEWAY_BLOCK_BYTES / 2);
          memcpy(&values[count++], bytes + byte, 2);
          memcpy(shadow + byte, bytes + byte, 2);
        }
      };
      for (int half = 0; half < 2; ++half) for (int64_t k = 0; k < num[half]; ++k) tell(found[half][k]);
    });
    counts[block - begin] = uint32_t(count);
    offsets += count;
    values += count;
  }
  return sum;
}

uint64_t checksum(const void* bytes, int64_t num_bytes, int64_t position) {
  const auto nothing = [](auto...) {};
  uint64_t sum = 0;
  for (int64_t at = 0; at < num_bytes; at += kSumBytes) {
    const Bytes source{static_cast<const uint8_t*>(bytes) + at};
    sum += sum_words(source, least(kSumBytes, num_bytes - at), position + at, nothing, nothing);
  }
  return sum;
}

template <typename From>
float top_of(const LeewayPlaced& matrix, Tile tile) {
  constexpr int32_t infinity = 0x7f800000;
  I top{};
  int32_t tail = 0;
  for (int64_t row = tile.row; row < tile.row + tile.rows; ++row) {
    const From* from = static_cast<const From*>(matrix.data) + row * matrix.columns + tile.column;
    int64_t j = 0;
    for (; j + kLanes <= tile.columns; j += kLanes) {
      I magnitude = bits<I>(load(from + j)) & 0x7fffffff;
      magnitude = magnitude < infinity ? magnitude : I{};
      top = magnitude > top ? magnitude : top;
    }
    for (; j < tile.columns; ++j) {
      const int32_t magnitude = int32_t(bits_of(to_float(from[j])) & 0x7fffffff);
      if (magnitude < infinity && magnitude > tail) tail = magnitude;
    }
  }
  for (int i = 0; i < kLanes; ++i) tail = top[i] > tail ? top[i] : tail;
  return of_bits(uint32_t(tail));
}

void scales(const LeewayBucket* bucket, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t index = find_placed(bucket->tensors, bucket->num_tensors, i, &LeewayPlaced::first_tile);
    const LeewayPlaced& matrix = bucket->tensors[index];
    const Tile tile = tile_of(matrix, i - matrix.first_tile);
    const float top = matrix.type == LEEWAY_F64   ? top_of<double>(matrix, tile)
                      : matrix.type == LEEWAY_F32 ? top_of<float>(matrix, tile)
                                                  : top_of<Bf16>(matrix, tile);
    matrix.scales[i - matrix.first_tile] = fp8_scale(top);
  }
}

}  // namespace

extern const BlockKernels kBlocks = {scales, flatten, delta, checksum};

}  // namespace leeway::LEEWAY_ISA
