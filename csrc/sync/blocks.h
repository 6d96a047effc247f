// The passes over a bucket's blocks, compiled for every instruction set.
#pragma once

#include "../api/sync.h"
#include "checksum.h"
#include "fp8.h"

namespace leeway {

struct BlockKernels {  // see ../api/sync.h for each
  void (*scales)(const LeewayBucket*, int64_t begin, int64_t end);
  uint64_t (*flatten)(const LeewayBucket*, int64_t begin, int64_t end);
  uint64_t (*delta)(const LeewayBucket*, int64_t begin, int64_t end, uint32_t*, uint16_t*, uint16_t*);
  uint64_t (*checksum)(const void*, int64_t num_bytes, int64_t position);
};

namespace portable {
extern const BlockKernels kBlocks;
}
namespace avx2 {
extern const BlockKernels kBlocks;
}
namespace avx512 {
extern const BlockKernels kBlocks;
}

// The last tensor whose `key` is at most `at`; -1: none.
LEEWAY_HD int64_t find_placed(const LeewayPlaced* tensors, int64_t count, int64_t at, int64_t LeewayPlaced::*key) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (tensors[middle].*key <= at) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

LEEWAY_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LEEWAY_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Where fp8 tile `tile` of its matrix lies.
struct Tile {
  int64_t row, column, rows, columns;
};
LEEWAY_HD Tile tile_of(const LeewayPlaced& matrix, int64_t tile) {
  const int64_t across = ceil_div(matrix.columns, LEEWAY_TILE), rows = (matrix.end - matrix.begin) / matrix.columns;
  const int64_t row = tile / across * LEEWAY_TILE, column = tile % across * LEEWAY_TILE;
  return {row, column, least(LEEWAY_TILE, rows - row), least(LEEWAY_TILE, matrix.columns - column)};
}
LEEWAY_HD int64_t tile_at(const LeewayPlaced& matrix, int64_t row, int64_t column) {
  return row / LEEWAY_TILE * ceil_div(matrix.columns, LEEWAY_TILE) + column / LEEWAY_TILE;
}

}  // namespace leeway
