// Small products of matrices, in tiles of registers.
#pragma once

#include "cpu_lanes.h"

namespace leeway::LEEWAY_ISA {
namespace {

// A matrix whose element (i, l) is at from[i * by_row + l * by_column].
template <typename T>
struct Left {
  const T* from;
  int64_t by_row, by_column;
};

// A matrix of rows that are `stride` apart.
template <typename T>
struct Rows {
  T* from;
  int64_t stride;
};

constexpr int kTileRows = 6;

template <int rows, int columns, bool add, typename T>
LEEWAY_INLINE void tile(int64_t depth, Left<T> a, Rows<const T> b, Rows<T> c) {
  V<T> sums[rows][columns];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) sums[i][j] = add ? load(c.from + i * c.stride + j * lanes<T>) : V<T>{};
  }
  for (int64_t l = 0; l < depth; ++l) {
    V<T> right[columns];
    for (int j = 0; j < columns; ++j) right[j] = load(b.from + l * b.stride + j * lanes<T>);
    for (int i = 0; i < rows; ++i) {
      const V<T> left = splat(a.from[i * a.by_row + l * a.by_column]);
      for (int j = 0; j < columns; ++j) sums[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) store(c.from + i * c.stride + j * lanes<T>, sums[i][j]);
  }
}

template <int columns, bool add, typename T>
LEEWAY_INLINE void strip(int64_t num_rows, int64_t depth, Left<T> a, Rows<const T> b, Rows<T> c) {
  int64_t i = 0;
  for (; i + kTileRows <= num_rows; i += kTileRows) {
    tile<kTileRows, columns, add>(depth, {a.from + i * a.by_row, a.by_row, a.by_column}, b,
                                  {c.from + i * c.stride, c.stride});
  }
  a.from += i * a.by_row;
  c.from += i * c.stride;
  switch (num_rows - i) {
    case 5: return tile<5, columns, add>(depth, a, b, c);
    case 4: return tile<4, columns, add>(depth, a, b, c);
    case 3: return tile<3, columns, add>(depth, a, b, c);
    case 2: return tile<2, columns, add>(depth, a, b, c);
    case 1: return tile<1, columns, add>(depth, a, b, c);
  }
}

// C [num_rows, num_columns] = A B, or C + A B; B has `depth` rows; num_columns is a multiple of the lanes.
template <bool add, typename T>
void product(int64_t num_rows, int64_t num_columns, int64_t depth, Left<T> a, Rows<const T> b, Rows<T> c) {
  int64_t j = 0;
  for (; j + 2 * lanes<T> <= num_columns; j += 2 * lanes<T>) {
    strip<2, add>(num_rows, depth, a, {b.from + j, b.stride}, {c.from + j, c.stride});
  }
  if (j < num_columns) strip<1, add>(num_rows, depth, a, {b.from + j, b.stride}, {c.from + j, c.stride});
}

}  // namespace
}  // namespace leeway::LEEWAY_ISA
