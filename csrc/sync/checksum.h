// A 64-bit checksum that any number of threads compute in any order, from pieces that arrive in any order.
//
//     sum    = sum over 8-byte words i of mix(word_i, key_i)  mod 2^64,   the last word filled up with zeros
//     key_i  = (i + 1) * 0x9e3779b97f4a7c15  mod 2^64                      i counts from the payload's begin
//     mix    : x = word ^ key,  y = lo(x) hi(x) + x,  mix = lo(y) hi(y) + swap(y) + x
//     digest = a bijection of sum + length * odd constant
//
// lo and hi are halves of 32 bits, swap exchanges them; products have 64 bits. AVX2 and CUDA have all this cheaply.
//
// What it finds. A sum misses what its terms' changes cancel. Keys make the same bytes at two places two different
// terms, so that exchanged, shifted and torn regions and zero runs of another length count like other damage. The two
// products make the change of a term depend on the whole word: were they linear, two flips of one bit would cancel half
// the time, and with a single product once in 2^32. The same functions on words of 16 bits can be tried out whole: over
// all pairs of words two terms are equal 1.1 times as often as by chance (a random function: 1.0), for the worst
// difference of words 64 times; the changes of two words by the same difference cancel 2.0 times as often as by chance
// (a random function: 2.0), for the worst difference 4.7 times. So damage that knows nothing of the keys passes with a
// chance of about 2^-63. It is no defence against an adversary, for whom equal sums are easy to make.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../common/device.h"

namespace leeway {

constexpr uint64_t kKeyStep = 0x9e3779b97f4a7c15;

LEEWAY_HD uint64_t key_of(int64_t word) { return (uint64_t(word) + 1) * kKeyStep; }

LEEWAY_HD uint64_t swap_halves(uint64_t x) { return x << 32 | x >> 32; }

LEEWAY_HD uint64_t product_of_halves(uint64_t x) { return (x & 0xffffffff) * (x >> 32); }

LEEWAY_HD uint64_t mix(uint64_t word, uint64_t key) {
  const uint64_t x = word ^ key;
  const uint64_t y = product_of_halves(x) + x;
  return product_of_halves(y) + swap_halves(y) + x;
}

// The last word of a payload, of `num_bytes` bytes below 8.
LEEWAY_HD uint64_t load_tail(const void* from, int64_t num_bytes) {
  uint64_t word = 0;
  memcpy(&word, from, num_bytes);
  return word;
}

LEEWAY_HD uint64_t load_word(const void* from) {
  uint64_t word;
  memcpy(&word, from, sizeof word);
  return word;
}

LEEWAY_HD uint64_t digest_of(uint64_t sum, int64_t num_bytes) {
  uint64_t x = sum + uint64_t(num_bytes) * 0xd6e8feb86659fd93;
  x = (x ^ x >> 32) * 0xd6e8feb86659fd93;
  x = (x ^ x >> 32) * 0xd6e8feb86659fd93;
  return x ^ x >> 32;
}

}  // namespace leeway
