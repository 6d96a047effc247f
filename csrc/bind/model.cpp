// The operators of a transformer's layer: on the CPU, in float32 and float64.
#include "../api/model.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "device.h"

namespace leeway {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 1 << 14;  // numbers below which a thread of its own does not pay

int64_t grain(int64_t numbers) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, numbers)); }

const void* read(const Tensor& tensor) { return tensor.const_data_ptr(); }
const void* read(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
void* write(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

// `given` [sizes], -1 for any size, with rows of its last dimensions' numbers that lie together; else a copy.
Tensor rows(const Tensor& given, const char* name, at::IntArrayRef sizes, at::ScalarType type) {
  bool fits = given.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] < 0 || given.size(i) == sizes[i];
  TORCH_CHECK_VALUE(fits, name, ": has shape ", given.sizes(), " where ", sizes, " is needed");
  TORCH_CHECK_VALUE(given.scalar_type() == type, name, ": is of type ", given.scalar_type(), " where ", type,
                    " is needed");
  TORCH_CHECK_VALUE(given.is_cpu(), name, ": is on ", given.device(), " where cpu is needed");
  return given.numel() == 0 || given.select(0, 0).is_contiguous() ? given : given.contiguous();
}

MaybeTensor rows(const MaybeTensor& given, const char* name, at::IntArrayRef sizes, at::ScalarType type) {
  return given ? MaybeTensor(rows(*given, name, sizes, type).contiguous()) : std::nullopt;
}

void check_type(const Tensor& given, const char* name) {
  TORCH_CHECK_VALUE(given.scalar_type() == at::kFloat || given.scalar_type() == at::kDouble, name, ": is of type ",
                    given.scalar_type(), " where float32 or float64 is needed");
}

// ---- Norm and rotation

struct Norm {
  Tensor x;
  MaybeTensor weight, cos, sin;
  double eps;

  Norm(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& cos, const MaybeTensor& sin, double eps)
      : eps(eps) {
    check_type(x, "x");
    const at::ScalarType type = x.scalar_type();
    this->x = rows(x, "x", {-1, -1, -1}, type);
    const int64_t width = x.size(2);
    this->weight = rows(weight, "weight", {width}, type);
    this->cos = rows(cos, "cos", {x.size(0), width}, type);
    this->sin = rows(sin, "sin", {x.size(0), width}, type);
    TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), "sin: must be given where cos is");
    TORCH_CHECK_VALUE(!cos || width % 2 == 0, "x: rows of ", width, " numbers, which have no halves to rotate");
  }

  LeewayNorm view(void* y) const {
    return {x.size(0), x.size(1), x.size(2), read(x), x.stride(0), read(weight), read(cos), read(sin), eps, y,
            type_of(x.scalar_type())};
  }
};

Tensor norm(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& cos, const MaybeTensor& sin, double eps) {
  const Norm given(x, weight, cos, sin, eps);
  const Tensor y = at::empty(x.sizes(), x.options());
  const LeewayNorm args = given.view(write(y));
  at::parallel_for(0, args.num_tokens, grain(args.heads * args.width), [&](int64_t begin, int64_t end) {
    leeway_norm_cpu(&args, begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& x, const MaybeTensor& weight,
                                         const MaybeTensor& cos, const MaybeTensor& sin, double eps) {
  const Norm given(x, weight, cos, sin, eps);
  const LeewayNorm args = given.view(nullptr);
  const Tensor dy = rows(grad, "grad", x.sizes(), x.scalar_type());
  const int64_t num_blocks = (args.num_tokens + LEEWAY_NORM_BLOCK - 1) / LEEWAY_NORM_BLOCK;
  const Tensor dx = at::empty(x.sizes(), x.options());
  const Tensor partial = at::empty({weight ? num_blocks : 0, args.width}, x.options());
  const LeewayNormGrad out{read(dy), dy.stride(0), write(dx), write(partial)};
  at::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) { leeway_norm_grad_cpu(&args, &out, begin, end); });
  return {dx, partial.sum(0)};
}

// ---- The gated unit

LeewaySwiglu view(const Tensor& gate, const Tensor& up, void* y) {
  return {gate.size(0), gate.size(1), read(gate), read(up), gate.stride(0), up.stride(0), y,
          type_of(gate.scalar_type())};
}

std::pair<Tensor, Tensor> gates(const Tensor& gate, const Tensor& up) {
  check_type(gate, "gate");
  return {rows(gate, "gate", {-1, -1}, gate.scalar_type()), rows(up, "up", gate.sizes(), gate.scalar_type())};
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  const auto [g, u] = gates(gate, up);
  const Tensor y = at::empty(g.sizes(), g.options());
  const LeewaySwiglu args = view(g, u, write(y));
  at::parallel_for(0, args.num_rows, grain(args.width), [&](int64_t begin, int64_t end) {
    leeway_swiglu_cpu(&args, begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const auto [g, u] = gates(gate, up);
  const Tensor dy = rows(grad, "grad", g.sizes(), g.scalar_type()).contiguous();
  const Tensor dgate = at::empty(g.sizes(), g.options()), dup = at::empty(g.sizes(), g.options());
  const LeewaySwiglu args = view(g, u, nullptr);
  const LeewaySwigluGrad out{read(dy), write(dgate), write(dup), dgate.stride(0), dup.stride(0)};
  at::parallel_for(0, args.num_rows, grain(args.width), [&](int64_t begin, int64_t end) {
    leeway_swiglu_grad_cpu(&args, &out, begin, end);
  });
  return {dgate, dup};
}

// ---- Attention

struct Attention {
  Tensor query, key, value, cu_seqlens, members, bounds;
  double scale;

  Attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens,
            const Tensor& members, const Tensor& bounds, double scale)
      : scale(scale) {
    check_type(query, "query");
    const at::ScalarType type = query.scalar_type();
    this->query = rows(query, "query", {-1, -1, -1}, type);
    this->key = rows(key, "key", {query.size(0), -1, query.size(2)}, type);
    this->value = rows(value, "value", key.sizes(), type);
    TORCH_CHECK_VALUE(key.size(1) > 0 && query.size(1) % key.size(1) == 0, "key: ", key.size(1),
                      " heads do not divide the query's ", query.size(1));
    TORCH_CHECK_VALUE(scale > 0, "scale: must be above 0, not ", scale);
    this->members = rows(members, "members", {-1}, at::kLong).contiguous();
    this->cu_seqlens = rows(cu_seqlens, "cu_seqlens", {members.size(0) + 1}, at::kLong).contiguous();
    this->bounds = rows(bounds, "bounds", {-1}, at::kLong).contiguous();
    check_bounds(this->cu_seqlens, "cu_seqlens", query.size(0));
    check_bounds(this->bounds, "bounds", members.size(0));
    const int64_t* member = this->members.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < members.size(0); ++i) {
      TORCH_CHECK_VALUE(member[i] >= 0 && member[i] < members.size(0), "members: value ", member[i], " at row ", i,
                        " is not a segment");
    }
  }

  static void check_bounds(const Tensor& given, const char* name, int64_t last) {
    const int64_t *at = given.const_data_ptr<int64_t>(), num = given.size(0);
    bool rising = num > 0 && at[0] == 0 && at[num - 1] == last;
    for (int64_t i = 1; rising && i < num; ++i) rising = at[i] >= at[i - 1];
    TORCH_CHECK_VALUE(rising, name, ": must rise from 0 to ", last);
  }

  LeewayAttention view(const Tensor& out, const Tensor& lse) const {
    return {bounds.size(0) - 1, query.size(1), key.size(1), query.size(2), cu_seqlens.const_data_ptr<int64_t>(),
            members.const_data_ptr<int64_t>(), bounds.const_data_ptr<int64_t>(), read(query), read(key), read(value),
            query.stride(0), key.stride(0), value.stride(0), scale, write(out), write(lse),
            type_of(query.scalar_type())};
  }
};

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const Tensor& cu_seqlens, const Tensor& members, const Tensor& bounds,
                                     double scale) {
  const Attention given(query, key, value, cu_seqlens, members, bounds, scale);
  const Tensor out = at::empty(query.sizes(), query.options());
  const Tensor lse = at::empty({query.size(0), query.size(1)}, query.options());
  const LeewayAttention args = given.view(out, lse);
  at::parallel_for(0, args.num_families * args.kv_heads, 1, [&](int64_t begin, int64_t end) {
    leeway_attention_cpu(&args, begin, end);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                      const Tensor& value, const Tensor& out, const Tensor& lse,
                                                      const Tensor& cu_seqlens, const Tensor& members,
                                                      const Tensor& bounds, double scale) {
  const Attention given(query, key, value, cu_seqlens, members, bounds, scale);
  const at::ScalarType type = query.scalar_type();
  const Tensor dout = rows(grad, "grad", query.sizes(), type).contiguous();
  const LeewayAttention args =
      given.view(rows(out, "out", query.sizes(), type).contiguous(),
                 rows(lse, "lse", {query.size(0), query.size(1)}, type).contiguous());
  const Tensor dquery = at::empty(query.sizes(), query.options());
  const Tensor dkey = at::empty(key.sizes(), key.options()), dvalue = at::empty(value.sizes(), value.options());
  const LeewayAttentionGrad grads{read(dout), write(dquery), write(dkey), write(dvalue)};
  at::parallel_for(0, args.num_families * args.kv_heads, 1, [&](int64_t begin, int64_t end) {
    leeway_attention_grad_cpu(&args, &grads, begin, end);
  });
  return {dquery, dkey, dvalue};
}

Tensor decode(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
              const Tensor& lengths, double scale) {
  check_type(query, "query");
  const at::ScalarType type = query.scalar_type();
  const Tensor q = rows(query, "query", {-1, -1, -1}, type);
  const int64_t num = q.size(0), dim = q.size(2);
  const Tensor k = rows(key, "key", {num, -1, dim}, type), v = rows(value, "value", k.sizes(), type);
  const int64_t kv_heads = k.size(1);
  TORCH_CHECK_VALUE(kv_heads > 0 && q.size(1) % kv_heads == 0, "key: ", kv_heads, " heads do not divide the query's ",
                    q.size(1));
  TORCH_CHECK_VALUE(scale > 0, "scale: must be above 0, not ", scale);
  rows(keys, "keys", {-1, kv_heads, -1, dim}, type);
  rows(values, "values", keys.sizes(), type);
  TORCH_CHECK_VALUE(keys.is_contiguous() && values.is_contiguous() && keys.size(0) >= num,
                    "keys: must have a slot for each of ", num, " tokens and lie together, values too");
  const Tensor kept = rows(lengths, "lengths", {num}, at::kLong).contiguous();
  const int64_t* length = kept.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < num; ++i) {
    TORCH_CHECK_VALUE(length[i] >= 0 && length[i] < keys.size(2), "lengths: value ", length[i], " at row ", i,
                      " leaves no place in a cache of ", keys.size(2));
  }
  const Tensor out = at::empty(q.sizes(), q.options());
  const LeewayDecode args{num, q.size(1), kv_heads, dim, keys.size(2), length, read(q), read(k), read(v),
                          q.stride(0), k.stride(0), v.stride(0), write(keys), write(values), scale, write(out),
                          type_of(type)};
  at::parallel_for(0, num, 1, [&](int64_t begin, int64_t end) { leeway_decode_cpu(&args, begin, end); });
  return out;
}

TORCH_LIBRARY_FRAGMENT(leeway, m) {
  m.def("norm(Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, float eps) -> Tensor");
  m.def(
      "norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, float eps) -> (Tensor, Tensor)");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor members, Tensor bounds, "
      "float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor cu_seqlens, Tensor members, Tensor bounds, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "decode(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, "
      "float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(leeway, CPU, m) {
  m.impl("norm", norm);
  m.impl("norm_backward", norm_backward);
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
  m.impl("attention", attention);
  m.impl("attention_backward", attention_backward);
  m.impl("decode", decode);
}

}  // namespace
}  // namespace leeway
