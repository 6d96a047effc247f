// The operators on packed sequences: see ../api/pack.h for what they compute.
#include <ATen/core/Tensor.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../api/pack.h"
#include "device.h"
#include "memory.h"

namespace leeway {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 16384;  // tokens that are worth a thread

// ---- Arguments: checked, and named where they are wrong. What lies on a device is not looked into.

void check_vector(const Tensor& given, const char* name, int64_t size, c10::Device device, c10::ScalarType type) {
  TORCH_CHECK_VALUE(given.dim() == 1 && given.size(0) == size, name, ": has shape ", given.sizes(), " where [", size,
                    "] is needed");
  TORCH_CHECK_VALUE(given.scalar_type() == type, name, ": is of type ", given.scalar_type(), " where ", type,
                    " is needed");
  TORCH_CHECK_VALUE(given.device() == device, name, ": is on ", given.device(), ", other arguments on ", device);
  TORCH_CHECK_VALUE(given.is_contiguous(), name, ": must be contiguous");
}

void check_vector(const MaybeTensor& given, const char* name, int64_t size, c10::Device device, c10::ScalarType type) {
  if (given) check_vector(*given, name, size, device, type);
}

void check_number(const Tensor& given, const char* name) {
  TORCH_CHECK_VALUE(given.dim() == 1, name, ": has shape ", given.sizes(), " where [N] is needed");
  TORCH_CHECK_VALUE(given.scalar_type() == c10::kFloat || given.scalar_type() == c10::kDouble, name, ": is of type ",
                    given.scalar_type(), " where float32 or float64 is needed");
}

// Sequences on the packed axis; keeps their bounds, int32.
struct Sequences {
  Tensor cu_seqlens;
  int64_t num_tokens;

  Sequences(const Tensor& given, int64_t num_tokens, c10::Device device) : num_tokens(num_tokens) {
    TORCH_CHECK_VALUE(num_tokens >= 0 && num_tokens <= std::numeric_limits<int32_t>::max(), "num_tokens: ", num_tokens,
                      " is not from 0 to 2^31 - 1");
    TORCH_CHECK_VALUE(given.dim() == 1 && given.size(0) >= 1, "cu_seqlens: has shape ", given.sizes(),
                      " where [S + 1] is needed");
    const bool wide = given.scalar_type() == c10::kLong;
    check_vector(given, "cu_seqlens", given.size(0), device, wide ? c10::kLong : c10::kInt);
    if (given.is_cpu()) wide ? check_rising<int64_t>(given) : check_rising<int32_t>(given);
    cu_seqlens = given.to(c10::kInt);
  }

  int64_t num() const { return cu_seqlens.size(0) - 1; }
  LeewayPacked view() const { return {num_tokens, num(), cu_seqlens.const_data_ptr<int32_t>()}; }

 private:
  template <typename T>
  void check_rising(const Tensor& given) const {
    const T* bounds = given.const_data_ptr<T>();
    const int64_t last = given.size(0) - 1;
    TORCH_CHECK_VALUE(bounds[0] == 0, "cu_seqlens: begins with ", bounds[0], ", not with 0");
    for (int64_t i = 0; i < last; ++i) {
      TORCH_CHECK_VALUE(bounds[i] <= bounds[i + 1], "cu_seqlens: falls from ", bounds[i], " to ", bounds[i + 1],
                        " at sequence ", i);
    }
    TORCH_CHECK_VALUE(bounds[last] == num_tokens, "cu_seqlens: ends with ", bounds[last], " where there are ",
                      num_tokens, " tokens");
  }
};

LeewayReduction reduction_of(c10::string_view name) {
  if (name == "sum") return LEEWAY_SUM;
  if (name == "mean") return LEEWAY_MEAN;
  TORCH_CHECK_VALUE(name == "max", "reduction: '", name, "' is none of sum, mean, max");
  return LEEWAY_MAX;
}

const void* pointer(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// ---- Streams

// The same number of elements in each stream.
int64_t check_streams(at::TensorList streams) {
  TORCH_CHECK_VALUE(!streams.empty(), "streams: are none");
  for (size_t k = 0; k < streams.size(); ++k) {
    const Tensor& stream = streams[k];
    const int64_t width = stream.element_size();
    TORCH_CHECK_VALUE(width == 1 || width == 2 || width == 4 || width == 8, "streams[", k, "]: is of type ",
                      stream.scalar_type(), ", ", width, " bytes wide where 1, 2, 4 or 8 are needed");
    TORCH_CHECK_VALUE(stream.is_contiguous(), "streams[", k, "]: must be contiguous");
    TORCH_CHECK_VALUE(stream.device() == streams[0].device(), "streams[", k, "]: is on ", stream.device(),
                      ", streams[0] on ", streams[0].device());
    TORCH_CHECK_VALUE(stream.numel() == streams[0].numel(), "streams[", k, "]: has ", stream.numel(),
                      " elements, streams[0] ", streams[0].numel());
  }
  return streams[0].numel();
}

void check_starts(const Tensor& starts, const Sequences& sequences, int64_t size, c10::Device device) {
  check_vector(starts, "starts", sequences.num(), device, c10::kLong);
  if (!starts.is_cpu()) return;
  const int64_t* values = starts.const_data_ptr<int64_t>();
  const int32_t* bounds = sequences.view().cu_seqlens;
  for (int64_t i = 0; i < sequences.num(); ++i) {
    const int64_t length = bounds[i + 1] - bounds[i];
    TORCH_CHECK_VALUE(values[i] >= 0 && values[i] <= size - length, "starts: sequence ", i, ", of ", length,
                      " tokens from ", values[i], " on, does not lie within 0..", size);
  }
}

// The sequences by where they start, empty ones last.
Tensor order_of(const Tensor& starts, const Sequences& sequences, int64_t size) {
  const Tensor& cu = sequences.cu_seqlens;
  const Tensor is_empty = cu.narrow(0, 1, sequences.num()).eq(cu.narrow(0, 0, sequences.num()));
  const Tensor order = at::argsort(starts.masked_fill(is_empty, size), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  if (!starts.is_cpu()) return order;
  const int64_t* at = order.const_data_ptr<int64_t>();
  const int64_t* values = starts.const_data_ptr<int64_t>();
  const int32_t* bounds = cu.const_data_ptr<int32_t>();
  for (int64_t i = 1; i < sequences.num(); ++i) {
    const int64_t length = bounds[at[i - 1] + 1] - bounds[at[i - 1]];
    if (bounds[at[i]] == bounds[at[i] + 1]) break;
    TORCH_CHECK_VALUE(values[at[i - 1]] + length <= values[at[i]], "starts: sequences ", at[i - 1], " and ", at[i],
                      " overlap");
  }
  return order;
}

uint64_t fill_of(double value, c10::ScalarType type) {
  const Tensor filled = at::scalar_tensor(value, at::TensorOptions(type));
  uint64_t bits = 0;
  std::memcpy(&bits, filled.const_data_ptr(), filled.element_size());
  return bits;
}

// Moves all streams, so many at a time as one launch takes.
template <typename Run>
std::vector<Tensor> move_streams(LeewayMove move, at::TensorList from, int64_t size, at::ArrayRef<double> fill, Run run) {
  std::vector<Tensor> to;
  for (const Tensor& stream : from) to.push_back(bind::fresh({size}, stream.options()));
  for (size_t begin = 0; begin < from.size(); begin += LEEWAY_MOST_STREAMS) {
    const size_t end = std::min(from.size(), begin + LEEWAY_MOST_STREAMS);
    for (size_t k = begin; k < end; ++k) {
      const uint64_t bits = fill.empty() ? 0 : fill_of(fill[k], from[k].scalar_type());
      move.streams[k - begin] = {from[k].const_data_ptr(), to[k].mutable_data_ptr(),
                                 static_cast<int32_t>(from[k].element_size()), bits};
    }
    move.num_streams = static_cast<int32_t>(end - begin);
    if (size > 0) run(move);
  }
  return to;
}

std::vector<Tensor> pack(at::TensorList streams, const Tensor& starts, const Tensor& cu_seqlens, int64_t num_tokens) {
  const int64_t size = check_streams(streams);
  const c10::Device device = streams[0].device();
  const Sequences sequences(cu_seqlens, num_tokens, device);
  check_starts(starts, sequences, size, device);
  const LeewayMove move{sequences.view(), starts.const_data_ptr<int64_t>(), size, nullptr, 0, {}};
  return move_streams(move, streams, num_tokens, {}, [&](const LeewayMove& move) {
    if (!device.is_cpu()) return LEEWAY_LAUNCH(leeway_pack_cuda, device, &move);
    at::parallel_for(0, num_tokens, kGrain, [&](int64_t begin, int64_t end) { leeway_pack_cpu(&move, begin, end); });
  });
}

std::vector<Tensor> unpack(at::TensorList streams, const Tensor& starts, const Tensor& cu_seqlens, int64_t size,
                           at::ArrayRef<double> fill) {
  const int64_t num_tokens = check_streams(streams);
  const c10::Device device = streams[0].device();
  TORCH_CHECK_VALUE(size >= 0, "size: ", size, " is below 0");
  TORCH_CHECK_VALUE(fill.size() == streams.size(), "fill: has ", fill.size(), " values for ", streams.size(),
                    " streams");
  const Sequences sequences(cu_seqlens, num_tokens, device);
  check_starts(starts, sequences, size, device);
  const Tensor order = order_of(starts, sequences, size);
  const LeewayMove move{sequences.view(), starts.const_data_ptr<int64_t>(), size, order.const_data_ptr<int64_t>(), 0, {}};
  return move_streams(move, streams, size, fill, [&](const LeewayMove& move) {
    if (!device.is_cpu()) return LEEWAY_LAUNCH(leeway_unpack_cuda, device, &move);
    at::parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) { leeway_unpack_cpu(&move, begin, end); });
  });
}

// ---- Sequences

// The threads take sequences of about kGrain tokens together.
template <typename Args>
void for_sequences(const Args& args, void (*run)(const Args*, int64_t, int64_t)) {
  const int64_t num = args.packed.num_sequences;
  const int64_t grain = 1 + kGrain * num / (args.packed.num_tokens + 1);
  at::parallel_for(0, num, grain, [&](int64_t begin, int64_t end) { run(&args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_layout(const Tensor& tokens, const Tensor& prompt_lengths,
                                                        const Tensor& cu_seqlens) {
  const c10::Device device = tokens.device();
  TORCH_CHECK_VALUE(tokens.dim() == 1, "tokens: has shape ", tokens.sizes(), " where [N] is needed");
  check_vector(tokens, "tokens", tokens.size(0), device, c10::kLong);
  const Sequences sequences(cu_seqlens, tokens.size(0), device);
  check_vector(prompt_lengths, "prompt_lengths", sequences.num(), device, c10::kLong);
  const Tensor position_ids = at::empty_like(tokens), labels = at::empty_like(tokens);
  const Tensor mask = at::empty_like(tokens, tokens.options().dtype(c10::kFloat)), sequence = at::empty_like(tokens);
  const LeewayTokenLayout args{sequences.view(), tokens.const_data_ptr<int64_t>(),
                               prompt_lengths.const_data_ptr<int64_t>(), position_ids.mutable_data_ptr<int64_t>(),
                               labels.mutable_data_ptr<int64_t>(), mask.mutable_data_ptr<float>(),
                               sequence.mutable_data_ptr<int64_t>()};
  if (device.is_cpu()) {
    for_sequences(args, leeway_token_layout_cpu);
  } else {
    LEEWAY_LAUNCH(leeway_token_layout_cuda, device, &args);
  }
  return {position_ids, labels, mask, sequence};
}

std::tuple<Tensor, Tensor> segment_reduce(const Tensor& values, const MaybeTensor& mask, const Tensor& cu_seqlens,
                                          c10::string_view reduction) {
  const c10::Device device = values.device();
  check_number(values, "values");
  check_vector(values, "values", values.size(0), device, values.scalar_type());
  check_vector(mask, "mask", values.size(0), device, values.scalar_type());
  const Sequences sequences(cu_seqlens, values.size(0), device);
  const Tensor result = at::empty({sequences.num()}, values.options()), count = at::empty_like(result);
  const LeewayReduce args{sequences.view(), reduction_of(reduction), type_of(values.scalar_type()),
                          values.const_data_ptr(), pointer(mask), result.mutable_data_ptr(), count.mutable_data_ptr()};
  if (device.is_cpu()) {
    for_sequences(args, leeway_reduce_cpu);
  } else {
    LEEWAY_LAUNCH(leeway_reduce_cuda, device, &args);
  }
  return {result, count};
}

Tensor segment_spread(const Tensor& values, const MaybeTensor& mask, const Tensor& cu_seqlens, int64_t num_tokens) {
  const c10::Device device = values.device();
  check_number(values, "values");
  const Sequences sequences(cu_seqlens, num_tokens, device);
  check_vector(values, "values", sequences.num(), device, values.scalar_type());
  check_vector(mask, "mask", num_tokens, device, values.scalar_type());
  const Tensor result = at::empty({num_tokens}, values.options());
  const LeewaySpread args{sequences.view(), type_of(values.scalar_type()), values.const_data_ptr(), pointer(mask),
                          result.mutable_data_ptr()};
  if (device.is_cpu()) {
    for_sequences(args, leeway_spread_cpu);
  } else {
    LEEWAY_LAUNCH(leeway_spread_cuda, device, &args);
  }
  return result;
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const MaybeTensor& mask,
                               const Tensor& cu_seqlens, const MaybeTensor& bootstrap, double gamma,
                               const Tensor& lambda_critic, const Tensor& lambda_policy) {
  const c10::Device device = rewards.device();
  const c10::ScalarType type = rewards.scalar_type();
  check_number(rewards, "rewards");
  check_vector(rewards, "rewards", rewards.size(0), device, type);
  check_vector(values, "values", rewards.size(0), device, type);
  check_vector(mask, "mask", rewards.size(0), device, type);
  const Sequences sequences(cu_seqlens, rewards.size(0), device);
  check_vector(bootstrap, "bootstrap", sequences.num(), device, type);
  check_vector(lambda_critic, "lambda_critic", sequences.num(), device, type);
  check_vector(lambda_policy, "lambda_policy", sequences.num(), device, type);
  const Tensor advantages = at::empty_like(rewards), returns = at::empty_like(rewards);
  const LeewayGae args{sequences.view(),
                       type_of(type),
                       gamma,
                       rewards.const_data_ptr(),
                       values.const_data_ptr(),
                       pointer(mask),
                       pointer(bootstrap),
                       lambda_critic.const_data_ptr(),
                       lambda_policy.const_data_ptr(),
                       advantages.mutable_data_ptr(),
                       returns.mutable_data_ptr()};
  if (device.is_cpu()) {
    for_sequences(args, leeway_gae_cpu);
  } else {
    LEEWAY_LAUNCH(leeway_gae_cuda, device, &args);
  }
  return {advantages, returns};
}

void implement(torch::Library& m) {
  m.impl("pack", pack);
  m.impl("unpack", unpack);
  m.impl("token_layout", token_layout);
  m.impl("segment_reduce", segment_reduce);
  m.impl("segment_spread", segment_spread);
  m.impl("gae", gae);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(leeway, m) {
  m.def("pack(Tensor[] streams, Tensor starts, Tensor cu_seqlens, SymInt num_tokens) -> Tensor[]");
  m.def("unpack(Tensor[] streams, Tensor starts, Tensor cu_seqlens, SymInt size, float[] fill) -> Tensor[]");
  m.def("token_layout(Tensor tokens, Tensor prompt_lengths, Tensor cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("segment_reduce(Tensor values, Tensor? mask, Tensor cu_seqlens, str reduction) -> (Tensor, Tensor)");
  m.def("segment_spread(Tensor values, Tensor? mask, Tensor cu_seqlens, SymInt num_tokens) -> Tensor");
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor? mask, Tensor cu_seqlens, Tensor? bootstrap, float gamma, "
      "Tensor lambda_critic, Tensor lambda_policy) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(leeway, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(leeway, CUDA, m) { implement(m); }

}  // namespace leeway
