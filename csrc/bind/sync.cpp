// The operators of the weights' way to the generators: buckets, their checksums and the deltas between them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "../api/sync.h"
#include "device.h"

namespace leeway::bind {

using at::Tensor;

namespace {

constexpr int64_t GRAIN = 16;  // blocks, 2 MiB, below which a thread of its own does not pay

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t num_blocks(const LeewayBucket& bucket) { return ceil_div(bucket.num_bytes, LEEWAY_BLOCK_BYTES); }

// ---- Arguments

bool is_plain(const Tensor& tensor) {
  return tensor.layout() == at::kStrided && tensor.is_contiguous() && !tensor.is_neg() && !tensor.is_conj();
}

void check_bytes(const Tensor& bytes, const char* name, int64_t position) {
  TORCH_CHECK_TYPE(bytes.scalar_type() == at::kByte, name, ": ", bytes.scalar_type(), ", expected uint8");
  TORCH_CHECK_VALUE(bytes.dim() == 1 && is_plain(bytes), name, ": must be one-dimensional and contiguous");
  TORCH_CHECK_VALUE(position >= 0 && position % 8 == 0, "position: ", position, " is no multiple of 8 from 0 on");
}

LeewayBucket bucket_of(const Tensor& bytes, const char* name, int64_t position) {
  check_bytes(bytes, name, position);
  auto* data = bytes.mutable_data_ptr<uint8_t>();
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(data) % LEEWAY_BUCKET_ALIGNMENT == 0, name,
                    ": its memory starts at no multiple of ", LEEWAY_BUCKET_ALIGNMENT, " bytes");
  return {nullptr, 0, 0, data, bytes.numel(), position};
}

// The tensors of a bucket, and the memory that their places refer to.
struct Placement {
  std::vector<LeewayPlaced> placed;
  std::vector<Tensor> scales;
  Tensor on_device;
  int64_t num_tiles = 0;

  void add(const Tensor& tensor, int64_t offset, int64_t format);
  void show(LeewayBucket& bucket, const Tensor& bytes);
};

int64_t bytes_in_bucket(const Tensor& tensor, int64_t format) {
  switch (format) {
    case LEEWAY_TO_BF16: return 2 * tensor.numel();
    case LEEWAY_TO_F32: return 4 * tensor.numel();
    case LEEWAY_TO_FP8: return tensor.numel();
    default: return static_cast<int64_t>(tensor.nbytes());
  }
}

// A matrix in fp8 counts as two tensors: its elements, and behind them its scales.
void Placement::add(const Tensor& tensor, int64_t offset, int64_t format) {
  LeewayPlaced one{};
  one.data = tensor.const_data_ptr();
  one.begin = offset;
  one.end = offset + bytes_in_bucket(tensor, format);
  one.first_tile = num_tiles;
  one.format = static_cast<int32_t>(format);
  if (format != LEEWAY_AS_IS) one.type = type_of(tensor.scalar_type());
  if (format != LEEWAY_TO_FP8) {
    placed.push_back(one);
    return;
  }
  const int64_t tiles = ceil_div(tensor.size(0), LEEWAY_TILE) * ceil_div(tensor.size(1), LEEWAY_TILE);
  scales.push_back(at::empty({tiles}, tensor.options().dtype(at::kFloat)));
  one.scales = scales.back().mutable_data_ptr<float>();
  one.columns = tensor.size(1);
  placed.push_back(one);
  num_tiles += tiles;
  add(scales.back(), ceil_div(one.end, LEEWAY_BUCKET_ALIGNMENT) * LEEWAY_BUCKET_ALIGNMENT, LEEWAY_AS_IS);
}

// Puts the tensors where the kernels of the bucket's device find them.
void Placement::show(LeewayBucket& bucket, const Tensor& bytes) {
  bucket.tensors = placed.data();
  bucket.num_tensors = static_cast<int64_t>(placed.size());
  bucket.num_tiles = num_tiles;
  if (bytes.is_cpu()) return;
  const int64_t size = bucket.num_tensors * static_cast<int64_t>(sizeof(LeewayPlaced));
  const Tensor here = at::empty({size}, at::TensorOptions(at::kByte).pinned_memory(true));
  std::copy(placed.begin(), placed.end(), static_cast<LeewayPlaced*>(here.mutable_data_ptr()));
  on_device = here.to(bytes.device(), /*non_blocking=*/true);
  bucket.tensors = static_cast<const LeewayPlaced*>(on_device.const_data_ptr());
}

void check_tensor(const Tensor& tensor, int64_t format, const Tensor& bytes, size_t i) {
  TORCH_CHECK_VALUE(tensor.device() == bytes.device(), "tensors[", i, "]: on ", tensor.device(), ", its bucket on ",
                    bytes.device());
  TORCH_CHECK_VALUE(is_plain(tensor), "tensors[", i, "]: must be contiguous");
  TORCH_CHECK_VALUE(format >= LEEWAY_AS_IS && format <= LEEWAY_TO_FP8, "formats[", i, "]: there is no format ", format);
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(format == LEEWAY_AS_IS || type == at::kDouble || type == at::kFloat || type == at::kBFloat16,
                   "tensors[", i, "]: ", type, " cannot be cast, only float64, float32 and bfloat16");
  TORCH_CHECK_VALUE(format != LEEWAY_TO_FP8 || tensor.dim() == 2, "tensors[", i, "]: ", tensor.dim(),
                    " dimensions, but only matrices have fp8 scales");
  const auto* from = static_cast<const uint8_t*>(tensor.const_data_ptr());
  const auto* to = static_cast<const uint8_t*>(bytes.const_data_ptr());
  TORCH_CHECK_VALUE(from + tensor.nbytes() <= to || to + bytes.nbytes() <= from, "tensors[", i,
                    "]: shares memory with its bucket");
}

Placement place(at::TensorList tensors, const Tensor& bytes, at::IntArrayRef offsets, at::IntArrayRef formats) {
  TORCH_CHECK_VALUE(offsets.size() == tensors.size(), "offsets: ", offsets.size(), " for ", tensors.size(), " tensors");
  TORCH_CHECK_VALUE(formats.size() == tensors.size(), "formats: ", formats.size(), " for ", tensors.size(), " tensors");
  Placement placement;
  int64_t end = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_tensor(tensors[i], formats[i], bytes, i);
    TORCH_CHECK_VALUE(offsets[i] % LEEWAY_BUCKET_ALIGNMENT == 0, "offsets[", i, "]: ", offsets[i],
                      " is no multiple of ", LEEWAY_BUCKET_ALIGNMENT);
    TORCH_CHECK_VALUE(offsets[i] >= end && offsets[i] <= bytes.numel(), "offsets[", i, "]: ", offsets[i],
                      " is not between ", end, ", where the tensor before it ends, and ", bytes.numel(),
                      ", where its bucket does");
    placement.add(tensors[i], offsets[i], formats[i]);
    end = placement.placed.back().end;
    TORCH_CHECK_VALUE(end <= bytes.numel(), "bucket: ", bytes.numel(), " bytes, but tensors[", i, "] ends at ", end);
  }
  return placement;
}

// ---- Sums

Tensor sum_on(const Tensor& bytes) { return at::zeros({}, bytes.options().dtype(at::kLong)); }

uint64_t* data_of(const Tensor& sum) { return reinterpret_cast<uint64_t*>(sum.mutable_data_ptr<int64_t>()); }

// sum += part(begin, end) over ranges of [0, size), on as many threads as pay.
template <typename Part>
void add_parts(const Tensor& sum, int64_t size, int64_t grain, Part part) {
  std::atomic<uint64_t> total{0};
  at::parallel_for(0, size, grain, [&](int64_t begin, int64_t end) { total += part(begin, end); });
  *data_of(sum) += total;
}

void write_scales(const LeewayBucket& bucket, const Tensor& bytes) {
  if (bucket.num_tiles == 0) return;
  if (!bytes.is_cpu()) return LEEWAY_LAUNCH(leeway_scales_cuda, bytes.device(), &bucket);
  at::parallel_for(0, bucket.num_tiles, GRAIN,
                   [&](int64_t begin, int64_t end) { leeway_scales_cpu(&bucket, begin, end); });
}

Tensor flatten(at::TensorList tensors, const Tensor& bytes, at::IntArrayRef offsets, at::IntArrayRef formats,
               int64_t position) {
  LeewayBucket bucket = bucket_of(bytes, "bucket", position);
  Placement placement = place(tensors, bytes, offsets, formats);
  placement.show(bucket, bytes);
  write_scales(bucket, bytes);
  const Tensor sum = sum_on(bytes);
  if (bytes.is_cpu()) {
    add_parts(sum, num_blocks(bucket), GRAIN,
              [&](int64_t begin, int64_t end) { return leeway_flatten_cpu(&bucket, begin, end); });
  } else {
    LEEWAY_LAUNCH(leeway_flatten_cuda, bytes.device(), &bucket, data_of(sum));
  }
  return sum;
}

Tensor checksum(const Tensor& bytes, int64_t position) {
  check_bytes(bytes, "data", position);
  const auto* data = bytes.const_data_ptr<uint8_t>();
  const int64_t size = bytes.numel();
  const Tensor sum = sum_on(bytes);
  if (bytes.is_cpu()) {
    add_parts(sum, ceil_div(size, LEEWAY_BLOCK_BYTES), GRAIN, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * LEEWAY_BLOCK_BYTES, last = std::min(end * LEEWAY_BLOCK_BYTES, size);
      return leeway_checksum_cpu(data + first, last - first, position + first);
    });
  } else {
    LEEWAY_LAUNCH(leeway_checksum_cuda, bytes.device(), static_cast<const void*>(data), size, position, data_of(sum));
  }
  return sum;
}

int64_t digest(int64_t sum, int64_t num_bytes) {
  return static_cast<int64_t>(leeway_digest(static_cast<uint64_t>(sum), num_bytes));
}

// ---- Deltas

uint32_t* counts_of(const Tensor& counts) { return reinterpret_cast<uint32_t*>(counts.mutable_data_ptr<int32_t>()); }

// What one thread found, from block `begin` on.
struct Found {
  int64_t begin;
  std::vector<uint16_t> offsets, values;
};

Tensor joined(const std::vector<Found>& all, std::vector<uint16_t> Found::*part, int64_t capacity) {
  int64_t size = 0, at = 0;
  for (const Found& found : all) size += static_cast<int64_t>((found.*part).size());
  const Tensor result = at::empty({std::min(size, capacity)}, at::TensorOptions(at::kUInt16));
  for (const Found& found : all) {
    const int64_t count = std::min(static_cast<int64_t>((found.*part).size()), result.numel() - at);
    std::copy_n((found.*part).data(), count, result.mutable_data_ptr<uint16_t>() + at);
    at += count;
  }
  return result;
}

std::vector<Found> find_changes(const LeewayBucket& bucket, const Tensor& counts, const Tensor& sum) {
  uint32_t* count = counts_of(counts);
  std::vector<Found> all;
  std::mutex mutex;
  add_parts(sum, num_blocks(bucket), GRAIN, [&](int64_t begin, int64_t end) {
    Found found{begin, {}, {}};
    std::vector<uint16_t> offsets(LEEWAY_BLOCK_UNITS), values(LEEWAY_BLOCK_UNITS);
    uint64_t part = 0;
    for (int64_t block = begin; block < end; ++block) {
      part += leeway_delta_cpu(&bucket, block, block + 1, count + block, offsets.data(), values.data());
      found.offsets.insert(found.offsets.end(), offsets.begin(), offsets.begin() + count[block]);
      found.values.insert(found.values.end(), values.begin(), values.begin() + count[block]);
    }
    const std::scoped_lock lock(mutex);
    all.push_back(std::move(found));
    return part;
  });
  std::sort(all.begin(), all.end(), [](const Found& a, const Found& b) { return a.begin < b.begin; });
  return all;
}

void check_even(const Tensor& bytes, const char* name) {
  TORCH_CHECK_VALUE(bytes.numel() % 2 == 0, name, ": ", bytes.numel(), " bytes are no whole number of units of 2");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flatten_delta(at::TensorList tensors, const Tensor& bytes,
                                                         at::IntArrayRef offsets, at::IntArrayRef formats,
                                                         int64_t position, int64_t capacity) {
  LeewayBucket bucket = bucket_of(bytes, "shadow", position);
  check_even(bytes, "shadow");
  TORCH_CHECK_VALUE(capacity >= 0, "capacity: ", capacity, " is negative");
  Placement placement = place(tensors, bytes, offsets, formats);
  placement.show(bucket, bytes);
  write_scales(bucket, bytes);
  const Tensor sum = sum_on(bytes), counts = at::zeros({num_blocks(bucket)}, bytes.options().dtype(at::kInt));
  if (bytes.is_cpu()) {
    const std::vector<Found> all = find_changes(bucket, counts, sum);
    return {sum, counts, joined(all, &Found::offsets, capacity), joined(all, &Found::values, capacity)};
  }
  const auto units = bytes.options().dtype(at::kUInt16);
  const Tensor where = at::empty({std::min(capacity, bucket.num_bytes / 2)}, units), what = at::empty_like(where);
  const Tensor scratch = at::zeros({leeway_delta_scratch(bucket.num_bytes)}, bytes.options());
  LEEWAY_LAUNCH(leeway_delta_cuda, bytes.device(), &bucket, counts_of(counts), where.mutable_data_ptr<uint16_t>(),
                what.mutable_data_ptr<uint16_t>(), where.numel(), data_of(sum), scratch.mutable_data_ptr());
  return {sum, counts, where, what};
}

void check_changes(const Tensor& bytes, const Tensor& counts, const Tensor& offsets, const Tensor& values) {
  const auto check = [&](const Tensor& tensor, const char* name, at::ScalarType type) {
    TORCH_CHECK_VALUE(tensor.device() == bytes.device(), name, ": on ", tensor.device(), ", the bucket on ",
                      bytes.device());
    TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, ": ", tensor.scalar_type(), ", expected ", type);
    TORCH_CHECK_VALUE(tensor.dim() == 1 && is_plain(tensor), name, ": must be one-dimensional and contiguous");
  };
  check(counts, "counts", at::kInt);
  check(offsets, "offsets", at::kUInt16);
  check(values, "values", at::kUInt16);
  const int64_t blocks = ceil_div(bytes.numel(), LEEWAY_BLOCK_BYTES);
  TORCH_CHECK_VALUE(counts.numel() == blocks, "counts: ", counts.numel(), " for a bucket of ", blocks, " blocks");
  TORCH_CHECK_VALUE(values.numel() == offsets.numel(), "values: ", values.numel(), " for ", offsets.numel(),
                    " offsets");
}

// The number of changes before each block, and of all.
Tensor starts_of(const Tensor& counts) {
  const Tensor starts = at::zeros({counts.numel() + 1}, counts.options().dtype(at::kLong));
  starts.narrow(0, 1, counts.numel()).copy_(counts.cumsum(0, at::kLong));
  return starts;
}

void check_fit(const LeewayBucket& bucket, const LeewayChanges& changes, const Tensor& counts) {
  const auto* count = counts.const_data_ptr<int32_t>();
  for (int64_t block = 0; block < counts.numel(); ++block) {
    TORCH_CHECK_VALUE(count[block] >= 0 && count[block] <= LEEWAY_BLOCK_UNITS, "counts[", block, "]: ", count[block],
                      " is not between 0 and ", static_cast<int>(LEEWAY_BLOCK_UNITS));
  }
  const int64_t all = changes.starts[counts.numel()];
  TORCH_CHECK_VALUE(all == changes.num_changes, "counts: ", all, " changes in all, but ", changes.num_changes,
                    " offsets");
  const int64_t misfit = leeway_find_misfit_cpu(&bucket, &changes, 0, counts.numel());
  TORCH_CHECK_VALUE(misfit < 0, "offsets[", misfit, "]: ", changes.offsets[misfit],
                    " is outside the bucket or not above the one before it");
}

Tensor apply_delta(const Tensor& bytes, const Tensor& counts, const Tensor& offsets, const Tensor& values,
                   int64_t position) {
  const LeewayBucket bucket = bucket_of(bytes, "bucket", position);
  check_even(bytes, "bucket");
  check_changes(bytes, counts, offsets, values);
  const Tensor starts = starts_of(counts), sum = sum_on(bytes);
  const LeewayChanges changes{starts.const_data_ptr<int64_t>(), offsets.const_data_ptr<uint16_t>(),
                              values.const_data_ptr<uint16_t>(), offsets.numel()};
  if (bytes.is_cpu()) {
    check_fit(bucket, changes, counts);
    add_parts(sum, counts.numel(), GRAIN,
              [&](int64_t begin, int64_t end) { return leeway_apply_cpu(&bucket, &changes, begin, end); });
  } else {
    const Tensor misfits = at::zeros({}, counts.options());
    LEEWAY_LAUNCH(leeway_apply_cuda, bytes.device(), &bucket, &changes, data_of(sum),
                  counts_of(misfits));
  }
  return sum;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(leeway, m) {
  m.def("flatten_(Tensor[] tensors, Tensor(a!) bucket, int[] offsets, int[] formats, int position) -> Tensor");
  m.def("checksum(Tensor data, int position) -> Tensor");
  m.def("digest(int sum, int num_bytes) -> int", &digest);
  m.def(
      "flatten_delta_(Tensor[] tensors, Tensor(a!) shadow, int[] offsets, int[] formats, int position, int capacity)"
      " -> (Tensor sum, Tensor counts, Tensor offsets, Tensor values)");
  m.def("apply_delta_(Tensor(a!) bucket, Tensor counts, Tensor offsets, Tensor values, int position) -> Tensor");
}

namespace {

void implement(torch::Library& m) {
  m.impl("flatten_", &flatten);
  m.impl("checksum", &checksum);
  m.impl("flatten_delta_", &flatten_delta);
  m.impl("apply_delta_", &apply_delta);
}

}  // namespace

TORCH_LIBRARY_IMPL(leeway, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(leeway, CUDA, m) { implement(m); }

}  // namespace leeway::bind
