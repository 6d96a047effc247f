// Norms, rotations and the gated unit: row by row.
#pragma once

#include "cpu_lanes.h"
#include "kernels.h"

namespace leeway::LEEWAY_ISA {
namespace {

template <typename T>
const T* row(const void* array, int64_t index) {
  return array ? static_cast<const T*>(array) + index : nullptr;
}

// 1 / sqrt(mean(x^2) + eps)
template <typename T>
LEEWAY_INLINE T per_norm(const T* x, int64_t width, double eps) {
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t d = 0; d < width; ++d) square += x[d] * x[d];
  return T(1) / T(::sqrt(square / T(width) + T(eps)));
}

// In place: (a, b) to (a cos - b sin, b cos + a sin), or for the gradient by the transposed matrix.
template <bool transposed, typename T>
LEEWAY_INLINE void rotate(T* y, const T* cos, const T* sin, int64_t width) {
  const int64_t half = width / 2;
#pragma omp simd
  for (int64_t d = 0; d < half; ++d) {
    const T a = y[d], b = y[d + half];
    y[d] = transposed ? a * cos[d] + b * sin[d + half] : a * cos[d] - b * sin[d];
    y[d + half] = transposed ? b * cos[d + half] - a * sin[d] : b * cos[d + half] + a * sin[d + half];
  }
}

template <typename T>
void norm(const LeewayNorm& norm, int64_t begin, int64_t end) {
  const int64_t width = norm.width;
  const T* weight = row<T>(norm.weight, 0);
  for (int64_t token = begin; token < end; ++token) {
    const T *cos = row<T>(norm.cos, token * width), *sin = row<T>(norm.sin, token * width);
    for (int64_t head = 0; head < norm.heads; ++head) {
      const T* x = row<T>(norm.x, token * norm.x_stride + head * width);
      T* y = static_cast<T*>(norm.y) + (token * norm.heads + head) * width;
      if (weight) {
        const T scale = per_norm(x, width, norm.eps);
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) y[d] = x[d] * scale * weight[d];
      } else {
        memcpy(y, x, width * sizeof(T));
      }
      if (cos) rotate<false>(y, cos, sin, width);
    }
  }
}

// With n = w x r, r = per_norm(x): dx = r (w dn - x r^2 mean(w dn x)), dw = sum of dn x r over rows.
template <typename T>
LEEWAY_INLINE void norm_row_grad(const T* x, const T* weight, T scale, int64_t width, T* dx, T* dweight) {
  T dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t d = 0; d < width; ++d) dot += dx[d] * weight[d] * x[d];
  const T along = dot * scale * scale / T(width);
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) {
    const T dn = dx[d];
    dweight[d] += dn * x[d] * scale;
    dx[d] = scale * (dn * weight[d] - x[d] * along);
  }
}

template <typename T>
void norm_grad(const LeewayNorm& norm, const LeewayNormGrad& grad, int64_t begin, int64_t end) {
  const int64_t width = norm.width;
  const T* weight = row<T>(norm.weight, 0);
  for (int64_t block = begin; block < end; ++block) {
    T* dweight = weight ? static_cast<T*>(grad.dweight) + block * width : nullptr;
    if (weight) memset(dweight, 0, width * sizeof(T));
    const int64_t last = (block + 1) * LEEWAY_NORM_BLOCK;
    for (int64_t token = block * LEEWAY_NORM_BLOCK; token < (last < norm.num_tokens ? last : norm.num_tokens); ++token) {
      const T *cos = row<T>(norm.cos, token * width), *sin = row<T>(norm.sin, token * width);
      for (int64_t head = 0; head < norm.heads; ++head) {
        const T* x = row<T>(norm.x, token * norm.x_stride + head * width);
        T* dx = static_cast<T*>(grad.dx) + (token * norm.heads + head) * width;
        memcpy(dx, row<T>(grad.dy, token * grad.dy_stride + head * width), width * sizeof(T));
        if (cos) rotate<true>(dx, cos, sin, width);
        if (weight) norm_row_grad(x, weight, per_norm(x, width, norm.eps), width, dx, dweight);
      }
    }
  }
}

// 1 / (1 + exp(-g)), exp(-g) kept finite
template <typename T>
LEEWAY_INLINE V<T> sigmoid(V<T> g) {
  return T(1) / (T(1) + exp_or_zero<T>(lesser(splat(T(-kExpLowest)), -g)));
}

template <typename T>
void swiglu(const LeewaySwiglu& swiglu, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T *gate = row<T>(swiglu.gate, i * swiglu.gate_stride), *up = row<T>(swiglu.up, i * swiglu.up_stride);
    T* y = static_cast<T*>(swiglu.y) + i * swiglu.width;
    by_vector<T>(swiglu.width, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      const V<T> g = load_part(gate + j, count);
      store_part<T>(y + j, g * sigmoid<T>(g) * load_part(up + j, count), count);
    });
  }
}

template <typename T>
void swiglu_grad(const LeewaySwiglu& swiglu, const LeewaySwigluGrad& grad, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T *gate = row<T>(swiglu.gate, i * swiglu.gate_stride), *up = row<T>(swiglu.up, i * swiglu.up_stride);
    const T* dy = row<T>(grad.dy, i * swiglu.width);
    T* dgate = static_cast<T*>(grad.dgate) + i * grad.dgate_stride;
    T* dup = static_cast<T*>(grad.dup) + i * grad.dup_stride;
    by_vector<T>(swiglu.width, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      const V<T> g = load_part(gate + j, count), s = sigmoid<T>(g), d = load_part(dy + j, count);
      store_part<T>(dgate + j, d * load_part(up + j, count) * s * (T(1) + g * (T(1) - s)), count);
      store_part<T>(dup + j, d * g * s, count);
    });
  }
}

}  // namespace
}  // namespace leeway::LEEWAY_ISA
