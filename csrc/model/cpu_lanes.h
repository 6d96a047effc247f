// Vectors of float and of double under one name, for kernels written once for both.
#pragma once

#include "../common/exp.h"

namespace leeway::LEEWAY_ISA {

typedef double D __attribute__((vector_size(4 * kLanes)));  // as many bytes as F

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef F type;
};
template <>
struct Vector<double> {
  typedef D type;
};
template <typename T>
using V = typename Vector<T>::type;

template <typename T>
constexpr int64_t lanes = sizeof(V<T>) / sizeof(T);

LEEWAY_INLINE D splat(double x) { return x - D{}; }
LEEWAY_INLINE D load(const double* from) {
  D x;
  memcpy(&x, from, sizeof x);
  return x;
}
LEEWAY_INLINE void store(double* to, D x) { memcpy(to, &x, sizeof x); }
LEEWAY_INLINE D greater(D a, D b) { return a > b ? a : b; }
LEEWAY_INLINE F lesser(F a, F b) { return -greater(-a, -b); }
LEEWAY_INLINE D lesser(D a, D b) { return a < b ? a : b; }
LEEWAY_INLINE D exp(D x) {
  D y{};
  for (int i = 0; i < lanes<double>; ++i) y[i] = ::exp(x[i]);
  return y;
}
LEEWAY_INLINE double sum(D x) {
  double total = 0;
  for (int i = 0; i < lanes<double>; ++i) total += x[i];
  return total;
}
LEEWAY_INLINE double greatest(D x) {
  double top = x[0];
  for (int i = 1; i < lanes<double>; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// exp(x), 0 below what float's exponential knows, for x <= 88.
template <typename T>
LEEWAY_INLINE V<T> exp_or_zero(V<T> x) {
  return exp(greater(splat(T(kExpLowest)), x));
}

// The least multiple of a vector's lanes that is at least n.
template <typename T>
LEEWAY_INLINE int64_t padded(int64_t n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// f(j, count) for every vector's worth of 0..n-1, count < lanes at the end.
template <typename T, typename Of>
LEEWAY_INLINE void by_vector(int64_t n, Of f) {
  int64_t j = 0;
  for (; j + lanes<T> <= n; j += lanes<T>) f(j, lanes<T>);
  if (j < n) f(j, n - j);
}

// The first `count` elements, zeros behind them.
template <typename T>
LEEWAY_INLINE V<T> load_part(const T* from, int64_t count) {
  if (count == lanes<T>) return load(from);
  T filled[lanes<T>] = {};
  memcpy(filled, from, count * sizeof(T));
  return load(filled);
}
template <typename T>
LEEWAY_INLINE void store_part(T* to, V<T> x, int64_t count) {
  if (count == lanes<T>) return store(to, x);
  T filled[lanes<T>];
  store(filled, x);
  memcpy(to, filled, count * sizeof(T));
}

}  // namespace leeway::LEEWAY_ISA
