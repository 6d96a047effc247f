// Attention over segments with shared prefixes, and of one new token over a cache.
//
// Queries are taken in blocks, the heads that share a kept head under one another: row t r + i is query head i of those
// r at token t. A block's scores lie in scratch as a whole, so softmax is taken in one go.
#pragma once

#include <stdlib.h>

#include "cpu_product.h"
#include "kernels.h"

namespace leeway::LEEWAY_ISA {
namespace {

constexpr int64_t kQueryRows = 96;  // of a block

// Numbers of one thread, at first 0, cut up from front to back.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : all_(static_cast<T*>(calloc(size, sizeof(T)))), next_(all_) {
    if (!all_) abort();
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { free(all_); }
  T* take(int64_t size) {
    T* taken = next_;
    next_ += size;
    return taken;
  }

 private:
  T *all_, *next_;
};

template <typename T>
LEEWAY_INLINE V<T> lane_numbers() {
  V<T> numbers{};
  for (int i = 0; i < lanes<T>; ++i) numbers[i] = T(i);
  return numbers;
}

// Replaces scores s [0, valid) by exp(scale s - shift) and what is behind them, up to `end`, by 0. Returns the sum.
template <typename T>
LEEWAY_INLINE T exponentials(T* scores, int64_t valid, int64_t end, T scale, T shift) {
  V<T> total{};
  int64_t j = 0;
  for (; j + lanes<T> <= valid; j += lanes<T>) {
    const V<T> e = exp_or_zero<T>(load(scores + j) * scale - shift);
    store(scores + j, e);
    total += e;
  }
  for (; j < end; j += lanes<T>) {
    const V<T> e = exp_or_zero<T>(load(scores + j) * scale - shift);
    const V<T> kept = lane_numbers<T>() < T(valid - j) ? e : V<T>{};
    store(scores + j, kept);
    total += kept;
  }
  return sum(total);
}

template <typename T>
LEEWAY_INLINE T greatest_of(const T* scores, int64_t valid) {
  V<T> top = splat(T(-INFINITY));
  int64_t j = 0;
  for (; j + lanes<T> <= valid; j += lanes<T>) top = greater(load(scores + j), top);
  if (j < valid) top = lane_numbers<T>() < T(valid - j) ? greater(load(scores + j), top) : top;
  return greatest(top);
}

// Softmax of `valid` scores without its division: exponentials, their sum and its logarithm.
template <typename T>
LEEWAY_INLINE T soften(T* scores, int64_t valid, int64_t end, T scale, T* lse) {
  const T shift = greatest_of(scores, valid) * scale;  // scale > 0
  const T total = exponentials(scores, valid, end, scale, shift);
  *lse = shift + T(::log(double(total)));
  return total;
}

// Rows of `width` numbers that are `stride` apart, to rows of `padded` ones.
template <typename T>
LEEWAY_INLINE void pack(const T* from, int64_t stride, int64_t num, int64_t width, T* to, int64_t padded) {
  for (int64_t i = 0; i < num; ++i) memcpy(to + i * padded, from + i * stride, width * sizeof(T));
}

template <typename T>
LEEWAY_INLINE void pack_transposed(const T* from, int64_t stride, int64_t num, int64_t width, T* to, int64_t to_stride) {
  for (int64_t i = 0; i < num; ++i) {
    for (int64_t d = 0; d < width; ++d) to[d * to_stride + i] = from[i * stride + d];
  }
}

// One kept head of one family.
template <typename T>
struct Part {
  const LeewayAttention& all;
  int64_t head, repeat, dim, wide;  // wide: dim, padded
  const int64_t* members;
  int64_t num_members, shared, capacity;  // tokens of the prefix; keys that a token may see, padded

  Part(const LeewayAttention& attention, int64_t pair) : all(attention) {
    const int64_t family = pair / all.kv_heads;
    head = pair % all.kv_heads;
    repeat = all.heads / all.kv_heads;
    dim = all.dim;
    wide = padded<T>(dim);
    members = all.members + all.bounds[family];
    num_members = all.bounds[family + 1] - all.bounds[family];
    shared = length(0);
    int64_t longest = 0;
    for (int64_t m = 1; m < num_members; ++m) longest = length(m) > longest ? length(m) : longest;
    capacity = padded<T>(shared + longest);
  }

  int64_t start(int64_t member) const { return all.cu_seqlens[members[member]]; }
  int64_t length(int64_t member) const { return all.cu_seqlens[members[member] + 1] - start(member); }
  int64_t before(int64_t member) const { return member ? shared : 0; }  // keys before the member's own
  int64_t tokens_at_once() const { return repeat < kQueryRows ? kQueryRows / repeat : 1; }
  int64_t rows_at_once() const { return tokens_at_once() * repeat; }

  const T* query(int64_t token) const {
    return static_cast<const T*>(all.query) + token * all.query_stride + head * repeat * dim;
  }
  const T* key(int64_t token) const { return static_cast<const T*>(all.key) + token * all.key_stride + head * dim; }
  const T* value(int64_t token) const {
    return static_cast<const T*>(all.value) + token * all.value_stride + head * dim;
  }
  // Of this part's first head, in arrays [T, H, D], [T, H_kv, D] and [T, H].
  template <typename X>
  X* of_query(X* array, int64_t token) const {
    return array + (token * all.heads + head * repeat) * dim;
  }
  T* of_key(void* array, int64_t token) const {
    return static_cast<T*>(array) + (token * all.kv_heads + head) * dim;
  }
  T* of_row(void* array, int64_t token) const { return static_cast<T*>(array) + token * all.heads + head * repeat; }

  // `repeat` rows a token.
  void pack_queries(const T* from, int64_t stride, int64_t num, T* to) const {
    for (int64_t t = 0; t < num; ++t) pack(from + t * stride, dim, repeat, dim, to + t * repeat * wide, wide);
  }
};

template <typename T>
void attend_part(const Part<T>& part) {
  const int64_t capacity = part.capacity, wide = part.wide, repeat = part.repeat, most = part.rows_at_once();
  Scratch<T> scratch(capacity * 2 * wide + most * (2 * wide + capacity + 1));
  T *keys = scratch.take(wide * capacity), *values = scratch.take(capacity * wide);
  T *queries = scratch.take(most * wide), *out = scratch.take(most * wide), *scores = scratch.take(most * capacity);
  T* totals = scratch.take(most);
  for (int64_t member = 0; member < part.num_members; ++member) {
    const int64_t start = part.start(member), length = part.length(member), before = part.before(member);
    pack_transposed(part.key(start), part.all.key_stride, length, part.dim, keys + before, capacity);
    pack(part.value(start), part.all.value_stride, length, part.dim, values + before * wide, wide);
    for (int64_t first = 0; first < length; first += part.tokens_at_once()) {
      const int64_t num = length - first < part.tokens_at_once() ? length - first : part.tokens_at_once();
      const int64_t visible = before + first + num, columns = padded<T>(visible);
      part.pack_queries(part.query(start + first), part.all.query_stride, num, queries);
      product<false, T>(num * repeat, columns, part.dim, {queries, wide, 1}, {keys, capacity}, {scores, capacity});
      for (int64_t t = 0; t < num; ++t) {
        T* lse = part.of_row(part.all.lse, start + first + t);
        for (int64_t i = 0; i < repeat; ++i) {
          T* row = scores + (t * repeat + i) * capacity;
          totals[t * repeat + i] = soften(row, before + first + t + 1, columns, T(part.all.scale), lse + i);
        }
      }
      product<false, T>(num * repeat, wide, visible, {scores, capacity, 1}, {values, wide}, {out, wide});
      for (int64_t t = 0; t < num; ++t) {
        T* to = part.of_query(static_cast<T*>(part.all.out), start + first + t);
        for (int64_t i = 0; i < repeat; ++i) {
          const T per_total = T(1) / totals[t * repeat + i];
          for (int64_t d = 0; d < part.dim; ++d) to[i * part.dim + d] = out[(t * repeat + i) * wide + d] * per_total;
        }
      }
    }
  }
}

template <typename T>
void attention(const LeewayAttention& attention, int64_t begin, int64_t end) {
  for (int64_t pair = begin; pair < end; ++pair) attend_part(Part<T>(attention, pair));
}

// With weights p = exp(scale q k - lse) and delta = dout out: dv = p^T dout, ds = scale p (dout v^T - delta),
// dq = ds k, dk = ds^T q.
template <typename T>
void attend_part_grad(const Part<T>& part, const LeewayAttentionGrad& grad) {
  const int64_t capacity = part.capacity, wide = part.wide, repeat = part.repeat, most = part.rows_at_once();
  const int64_t dim = part.dim, query_stride = part.all.heads * dim;
  Scratch<T> scratch(capacity * 5 * wide + most * (3 * wide + 2 * capacity));
  T *keys = scratch.take(capacity * wide), *keys_t = scratch.take(wide * capacity);
  T* values_t = scratch.take(wide * capacity);
  T *dkeys = scratch.take(capacity * wide), *dvalues = scratch.take(capacity * wide);
  T *queries = scratch.take(most * wide), *dout = scratch.take(most * wide), *dqueries = scratch.take(most * wide);
  T *weights = scratch.take(most * capacity), *dscores = scratch.take(most * capacity);
  const auto write = [&](int64_t member) {
    const int64_t start = part.start(member), before = part.before(member);
    for (int64_t t = 0; t < part.length(member); ++t) {
      memcpy(part.of_key(grad.dkey, start + t), dkeys + (before + t) * wide, dim * sizeof(T));
      memcpy(part.of_key(grad.dvalue, start + t), dvalues + (before + t) * wide, dim * sizeof(T));
    }
  };
  for (int64_t member = 0; member < part.num_members; ++member) {
    const int64_t start = part.start(member), length = part.length(member), before = part.before(member);
    pack(part.key(start), part.all.key_stride, length, dim, keys + before * wide, wide);
    pack_transposed(part.key(start), part.all.key_stride, length, dim, keys_t + before, capacity);
    pack_transposed(part.value(start), part.all.value_stride, length, dim, values_t + before, capacity);
    memset(dkeys + before * wide, 0, length * wide * sizeof(T));
    memset(dvalues + before * wide, 0, length * wide * sizeof(T));
    for (int64_t first = 0; first < length; first += part.tokens_at_once()) {
      const int64_t num = length - first < part.tokens_at_once() ? length - first : part.tokens_at_once();
      const int64_t rows = num * repeat, visible = before + first + num, columns = padded<T>(visible);
      const T* out = part.of_query(static_cast<const T*>(part.all.out), start + first);
      part.pack_queries(part.query(start + first), part.all.query_stride, num, queries);
      part.pack_queries(part.of_query(static_cast<const T*>(grad.dout), start + first), query_stride, num, dout);
      product<false, T>(rows, columns, dim, {queries, wide, 1}, {keys_t, capacity}, {weights, capacity});
      product<false, T>(rows, columns, dim, {dout, wide, 1}, {values_t, capacity}, {dscores, capacity});
      for (int64_t t = 0; t < num; ++t) {
        const T* lse = part.of_row(part.all.lse, start + first + t);
        for (int64_t i = 0; i < repeat; ++i) {
          const int64_t row = t * repeat + i;
          T delta = 0;
#pragma omp simd reduction(+ : delta)
          for (int64_t d = 0; d < dim; ++d) delta += dout[row * wide + d] * out[t * query_stride + i * dim + d];
          T *p = weights + row * capacity, *ds = dscores + row * capacity;
          exponentials(p, before + first + t + 1, columns, T(part.all.scale), lse[i]);
#pragma omp simd
          for (int64_t j = 0; j < columns; ++j) ds[j] = p[j] * (ds[j] - delta) * T(part.all.scale);
        }
      }
      product<true, T>(visible, wide, rows, {weights, 1, capacity}, {dout, wide}, {dvalues, wide});
      product<true, T>(visible, wide, rows, {dscores, 1, capacity}, {queries, wide}, {dkeys, wide});
      product<false, T>(rows, wide, visible, {dscores, capacity, 1}, {keys, wide}, {dqueries, wide});
      for (int64_t t = 0; t < num; ++t) {
        T* to = part.of_query(static_cast<T*>(grad.dquery), start + first + t);
        for (int64_t i = 0; i < repeat; ++i) memcpy(to + i * dim, dqueries + (t * repeat + i) * wide, dim * sizeof(T));
      }
    }
    if (member) write(member);
  }
  write(0);
}

template <typename T>
void attention_grad(const LeewayAttention& attention, const LeewayAttentionGrad& grad, int64_t begin, int64_t end) {
  for (int64_t pair = begin; pair < end; ++pair) attend_part_grad(Part<T>(attention, pair), grad);
}

// The numbers 0 to lanes - 1 as a list of a template's arguments.
template <int... l>
struct Lanes {};
template <int n, int... l>
struct LanesTo : LanesTo<n - 1, n - 1, l...> {};
template <int... l>
struct LanesTo<0, l...> {
  typedef Lanes<l...> type;
};

// Lane l is a[l] + a[l ^ width] where bit `width` of l is 0, else the same of b.
template <int width, typename T, int... l>
LEEWAY_INLINE V<T> join(V<T> a, V<T> b, Lanes<l...>) {
  constexpr int second = sizeof...(l);
  typedef decltype(a < b) Numbers;
  return __builtin_shuffle(a, b, Numbers{(l & width ? second + l : l)...}) +
         __builtin_shuffle(a, b, Numbers{(l & width ? second : 0) + (l ^ width)...});
}

// The sums of `lanes` vectors, as one vector.
template <int width, typename T>
LEEWAY_INLINE V<T> sums(V<T>* x) {
  for (int i = 0; i < width; ++i) x[i] = join<width, T>(x[i], x[i + width], typename LanesTo<lanes<T>>::type{});
  if constexpr (width > 1) return sums<width / 2, T>(x);
  return x[0];
}

// q k of keys first, first + 1, ...: rows of `dim` numbers, of which there are `num`; any value for keys beyond.
template <typename T>
LEEWAY_INLINE V<T> dots(const T* query, const T* keys, int64_t dim, int64_t first, int64_t num) {
  V<T> products[lanes<T>] = {};
  const T* rows[lanes<T>];
  for (int i = 0; i < lanes<T>; ++i) rows[i] = keys + (first + i < num ? first + i : num - 1) * dim;
  by_vector<T>(dim, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
    const V<T> q = load_part(query + d, count);
    for (int i = 0; i < lanes<T>; ++i) products[i] += q * load_part(rows[i] + d, count);
  });
  return sums<lanes<T> / 2, T>(products);
}

template <typename T>
void decode(const LeewayDecode& decode, int64_t begin, int64_t end) {
  const int64_t repeat = decode.heads / decode.kv_heads, dim = decode.dim, wide = padded<T>(dim);
  const int64_t capacity = padded<T>(decode.context);
  Scratch<T> scratch(repeat * (capacity + wide + 1) + (wide == dim ? 0 : decode.context * wide));
  T *scores = scratch.take(repeat * capacity), *out = scratch.take(repeat * wide), *totals = scratch.take(repeat);
  T* padded_values = scratch.take(0);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t visible = decode.lengths[n] + 1, columns = padded<T>(visible);
    for (int64_t head = 0; head < decode.kv_heads; ++head) {
      const int64_t slot = (n * decode.kv_heads + head) * decode.context * dim;
      T *keys = static_cast<T*>(decode.keys) + slot, *values = static_cast<T*>(decode.values) + slot;
      const T* query = static_cast<const T*>(decode.query) + n * decode.query_stride + head * repeat * dim;
      const T* key = static_cast<const T*>(decode.key) + n * decode.key_stride + head * dim;
      const T* value = static_cast<const T*>(decode.value) + n * decode.value_stride + head * dim;
      memcpy(keys + (visible - 1) * dim, key, dim * sizeof(T));
      memcpy(values + (visible - 1) * dim, value, dim * sizeof(T));
      for (int64_t j = 0; j < visible; j += lanes<T>) {
        for (int64_t i = 0; i < repeat; ++i) store(scores + i * capacity + j, dots(query + i * dim, keys, dim, j, visible));
      }
      if (wide != dim) pack(values, dim, visible, dim, padded_values, wide);
      const T* rows = wide == dim ? values : padded_values;
      T* to = static_cast<T*>(decode.out) + (n * decode.heads + head * repeat) * dim;
      T lse;
      for (int64_t i = 0; i < repeat; ++i) {
        totals[i] = soften(scores + i * capacity, visible, columns, T(decode.scale), &lse);
      }
      product<false, T>(repeat, wide, visible, {scores, capacity, 1}, {rows, wide}, {out, wide});
      for (int64_t i = 0; i < repeat; ++i) {
        for (int64_t d = 0; d < dim; ++d) to[i * dim + d] = out[i * wide + d] / totals[i];
      }
    }
  }
}

}  // namespace
}  // namespace leeway::LEEWAY_ISA
