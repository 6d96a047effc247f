// Buckets, checksums and deltas against loops that are too slow to be wrong, bit for bit.
#include <cmath>
#include <vector>

#include "../../csrc/api/sync.h"
#include "../../csrc/sync/checksum.h"
#include "../../csrc/sync/fp8.h"
#include "driver.h"

// Absent where the program is not linked for CUDA.
extern "C" {
[[gnu::weak]] decltype(leeway_scales_cuda) leeway_scales_cuda;
[[gnu::weak]] decltype(leeway_flatten_cuda) leeway_flatten_cuda;
[[gnu::weak]] decltype(leeway_delta_cuda) leeway_delta_cuda;
[[gnu::weak]] decltype(leeway_checksum_cuda) leeway_checksum_cuda;
[[gnu::weak]] decltype(leeway_apply_cuda) leeway_apply_cuda;
}

namespace driver {
namespace {

using Bytes = std::vector<uint8_t>;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
int64_t num_blocks(int64_t num_bytes) { return round_up(num_bytes, LEEWAY_BLOCK_BYTES) / LEEWAY_BLOCK_BYTES; }

template <typename T>
Array<T> copied(const std::vector<T>& from) {
  Array<T> to(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = from[i];
  return to;
}

template <typename T>
bool equal(const Array<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.bytes()) == 0;
}

// --- A tensor, its place, and what the slow loops make of it.

int64_t size_of(LeewayType type) { return type == LEEWAY_F64 ? 8 : type == LEEWAY_F32 ? 4 : 2; }

struct Tensor {
  int64_t rows, columns, begin;
  LeewayType type;
  LeewayFormat format;
  int64_t shift;  // bytes by which its memory is off the vectors' alignment
  Array<uint8_t> memory;
  Array<float> scales;

  int64_t count() const { return rows * columns; }
  int64_t tiles_across() const { return (columns + LEEWAY_TILE - 1) / LEEWAY_TILE; }
  int64_t num_tiles() const { return (rows + LEEWAY_TILE - 1) / LEEWAY_TILE * tiles_across(); }
  int64_t size() const {  // of an element in the bucket
    const int64_t sizes[] = {size_of(type), 2, 4, 1};
    return sizes[format];
  }
  int64_t end() const { return begin + count() * size(); }
  int64_t scales_begin() const { return round_up(end(), LEEWAY_BUCKET_ALIGNMENT); }
  int64_t end_with_scales() const { return format == LEEWAY_TO_FP8 ? scales_begin() + 4 * num_tiles() : end(); }
  uint8_t* at(int64_t element) { return memory.data() + shift + element * size_of(type); }
  float get(int64_t element) {
    double x = 0;
    float y = 0;
    leeway::Bf16 z{};
    if (type == LEEWAY_F64) memcpy(&x, at(element), 8);
    if (type == LEEWAY_F32) memcpy(&y, at(element), 4);
    if (type == LEEWAY_BF16) memcpy(&z, at(element), 2);
    return type == LEEWAY_F64 ? leeway::to_float(x) : type == LEEWAY_F32 ? y : leeway::to_float(z);
  }
};

// Ordinary weights in a share of the elements, and in one of 16 of these any bits at all.
void randomise(Random& random, Tensor& tensor, double share) {
  for (int64_t i = 0; i < tensor.count(); ++i) {
    if (random.uniform(0, 1) >= share) continue;
    const uint64_t any = random.bits();
    const double x = random.uniform(-0.1, 0.1);
    const float narrow = float(x);
    leeway::Bf16 half;
    leeway::from_float(narrow, half);
    const void* usual[] = {&x, &narrow, &half};
    memcpy(tensor.at(i), random.below(16) == 0 ? &any : usual[tensor.type], size_of(tensor.type));
  }
}

void make_scales(Tensor& tensor) {
  for (int64_t tile = 0; tile < tensor.num_tiles(); ++tile) {
    const int64_t row = tile / tensor.tiles_across() * LEEWAY_TILE, column = tile % tensor.tiles_across() * LEEWAY_TILE;
    float top = 0;
    for (int64_t i = row; i < std::min<int64_t>(tensor.rows, row + LEEWAY_TILE); ++i) {
      for (int64_t j = column; j < std::min<int64_t>(tensor.columns, column + LEEWAY_TILE); ++j) {
        const float x = std::fabs(tensor.get(i * tensor.columns + j));
        if (std::isfinite(x)) top = std::max(top, x);
      }
    }
    tensor.scales[tile] = std::isnormal(top / 448) ? top / 448 : 1;
  }
}

void write(Tensor& tensor, Bytes& bucket) {
  uint8_t* to = bucket.data() + tensor.begin;
  for (int64_t i = 0; i < tensor.count(); ++i, to += tensor.size()) {
    const float x = tensor.get(i);
    const int64_t row = i / tensor.columns / LEEWAY_TILE, column = i % tensor.columns / LEEWAY_TILE;
    leeway::Bf16 half;
    leeway::Fp8 quarter;
    leeway::from_float(x, half);
    leeway::from_float(x / tensor.scales[row * tensor.tiles_across() + column], quarter);
    const void* made[] = {tensor.at(i), &half, &x, &quarter};
    memcpy(to, made[tensor.format], tensor.size());
  }
  if (tensor.format == LEEWAY_TO_FP8) {
    memcpy(bucket.data() + tensor.scales_begin(), tensor.scales.data(), tensor.scales.bytes());
  }
}

uint64_t slow_sum(const Bytes& bytes, int64_t position) {
  uint64_t sum = 0;
  for (size_t at = 0; at < bytes.size(); at += 8) {
    uint64_t word = 0;
    for (size_t i = at; i < std::min(at + 8, bytes.size()); ++i) word |= uint64_t(bytes[i]) << 8 * (i - at);
    sum += leeway::mix(word, leeway::key_of((position + int64_t(at)) / 8));
  }
  return sum;
}

struct Changes {
  std::vector<int64_t> starts{0};
  std::vector<uint16_t> offsets, values;
  int64_t size() const { return int64_t(offsets.size()); }
};

Changes slow_changes(const Bytes& before, const Bytes& after) {
  Changes changes;
  for (size_t at = 0; at < after.size(); at += 2) {
    if (at > 0 && at % LEEWAY_BLOCK_BYTES == 0) changes.starts.push_back(changes.size());
    if (memcmp(&before[at], &after[at], 2) == 0) continue;
    changes.offsets.push_back(uint16_t(at % LEEWAY_BLOCK_BYTES / 2));
    changes.values.push_back(uint16_t(after[at] | after[at + 1] << 8));
  }
  if (!after.empty()) changes.starts.push_back(changes.size());
  return changes;
}

// --- A bucket of random tensors.

struct Case {
  std::vector<Tensor> tensors;
  int64_t num_bytes, position, num_tiles = 0;

  explicit Case(Random& random) : num_bytes(random.below(4) * 16), position(random.below(3) * 8000) {
    const int64_t limit = random.below(6) == 0 ? 400 : 60;
    for (int64_t left = random.below(9); left > 0; --left) {
      const int64_t rows = random.below(limit), columns = round_up(1 + random.below(limit), random.below(3) ? 1 : 16);
      const auto type = LeewayType(random.below(3));
      const int64_t size = size_of(type), shift = random.below(3) ? 0 : size;
      const int64_t tiles = (rows + 127) / 128 * ((columns + 127) / 128);
      Array<uint8_t> memory(rows * columns * size + shift);
      Array<float> scales(tiles, 1);
      tensors.push_back({rows, columns, num_bytes, type, LeewayFormat(random.below(4)), shift, memory, scales});
      randomise(random, tensors.back(), 1);
      num_bytes = round_up(tensors.back().end_with_scales(), 16) + random.below(3) * 16;
    }
    num_bytes += random.below(20) * 2;
  }

  Bytes bucket() {
    Bytes made(num_bytes);
    for (Tensor& tensor : tensors) {
      if (tensor.format == LEEWAY_TO_FP8) make_scales(tensor);
      write(tensor, made);
    }
    return made;
  }

  // The tensors' table; scales are poisoned, to be made anew.
  Array<LeewayPlaced> table() {
    std::vector<LeewayPlaced> placed;
    num_tiles = 0;
    for (Tensor& tensor : tensors) {
      const bool scaled = tensor.format == LEEWAY_TO_FP8;
      float* scales = scaled ? tensor.scales.data() : nullptr;
      placed.push_back(
          {tensor.at(0), scales, tensor.begin, tensor.end(), tensor.columns, num_tiles, tensor.type, tensor.format});
      if (!scaled) continue;
      tensor.scales.poison();
      num_tiles += tensor.num_tiles();
      placed.push_back(
          {scales, nullptr, tensor.scales_begin(), tensor.end_with_scales(), 0, num_tiles, 0, LEEWAY_AS_IS});
    }
    return copied(placed);
  }

  LeewayBucket bucket_at(const Array<LeewayPlaced>& table, Array<uint8_t>& bytes) const {
    return {table.data(), int64_t(table.size()), num_tiles, bytes.data(), num_bytes, position};
  }
};

uint64_t checksum(Device device, const uint8_t* bytes, int64_t num_bytes, int64_t position) {
  if (device == Device::cpu) return leeway_checksum_cpu(bytes, num_bytes, position);
  Array<uint64_t> sum(1, 0);
  finish(leeway_checksum_cuda(bytes, num_bytes, position, sum.data(), nullptr));
  return sum[0];
}

void scales(Device device, const LeewayBucket& bucket) {
  if (device == Device::cuda) return finish(leeway_scales_cuda(&bucket, nullptr));
  leeway_scales_cpu(&bucket, 0, bucket.num_tiles / 2);
  leeway_scales_cpu(&bucket, bucket.num_tiles / 2, bucket.num_tiles);
}

uint64_t flatten(Device device, const LeewayBucket& bucket) {
  uint64_t total = 0;
  if (device == Device::cpu) {  // in any order
    for (int64_t block = num_blocks(bucket.num_bytes); block-- > 0;) {
      total += leeway_flatten_cpu(&bucket, block, block + 1);
    }
    return total;
  }
  Array<uint64_t> sum(1, 5);
  finish(leeway_flatten_cuda(&bucket, sum.data(), nullptr));
  return sum[0] - 5;
}

// The sum, and in `changes` the first `capacity` ones.
uint64_t delta(Device device, const LeewayBucket& bucket, int64_t capacity, Changes& changes) {
  const int64_t blocks = num_blocks(bucket.num_bytes);
  const int64_t room = device == Device::cpu ? blocks * LEEWAY_BLOCK_UNITS : capacity;
  Array<uint32_t> counts(blocks, 0);
  Array<uint16_t> offsets(room), values(room);
  Array<uint64_t> sum(1, 0);
  if (device == Device::cpu) {
    sum[0] = leeway_delta_cpu(&bucket, 0, blocks, counts.data(), offsets.data(), values.data());
  } else {
    Array<uint8_t> scratch(leeway_delta_scratch(bucket.num_bytes), 0);
    finish(leeway_delta_cuda(&bucket, counts.data(), offsets.data(), values.data(), capacity, sum.data(),
                             scratch.data(), nullptr));
  }
  changes = {};
  for (const uint32_t count : counts) changes.starts.push_back(changes.starts.back() + count);
  const int64_t known = std::min(changes.starts.back(), capacity);
  changes.offsets.assign(offsets.data(), offsets.data() + known);
  changes.values.assign(values.data(), values.data() + known);
  return sum[0];
}

// By how much the sum grows; -1: a change did not fit.
int64_t apply(Device device, Array<uint8_t>& bytes, const Changes& changes, int64_t position) {
  const Array<int64_t> starts = copied(changes.starts);
  const Array<uint16_t> offsets = copied(changes.offsets), values = copied(changes.values);
  const LeewayBucket bucket{nullptr, 0, 0, bytes.data(), int64_t(bytes.size()), position};
  const LeewayChanges what{starts.data(), offsets.data(), values.data(), changes.size()};
  const int64_t blocks = num_blocks(bucket.num_bytes);
  if (device == Device::cpu) {
    const bool fits = leeway_find_misfit_cpu(&bucket, &what, 0, blocks) < 0;
    return fits ? int64_t(leeway_apply_cpu(&bucket, &what, 0, blocks)) : -1;
  }
  Array<uint64_t> sum(1, 0);
  Array<uint32_t> misfits(1, 0);
  finish(leeway_apply_cuda(&bucket, &what, sum.data(), misfits.data(), nullptr));
  return misfits[0] > 0 ? -1 : int64_t(sum[0]);
}

const char* name(Device device) { return device == Device::cpu ? "cpu" : "cuda"; }

// A change in the wrong place, where there is a place for one.
bool spoil(Random& random, Changes& changes, int64_t num_bytes) {
  const int64_t blocks = num_blocks(num_bytes), last = changes.starts[blocks - 1];
  if (random.below(2) == 0 && last < changes.size() && num_bytes % LEEWAY_BLOCK_BYTES != 0) {
    changes.offsets.back() = uint16_t(num_bytes % LEEWAY_BLOCK_BYTES / 2);  // past the end
    return true;
  }
  for (int64_t i = changes.size() - 1; i > last; --i) {
    if (random.below(2) == 0) continue;
    changes.offsets[i] = changes.offsets[i - 1];  // not rising
    return true;
  }
  return false;
}

void check_flatten(Case& given) {
  const Bytes expected = given.bucket();
  const uint64_t sum = slow_sum(expected, given.position);
  for (const Device device : devices()) {
    const Array<LeewayPlaced> table = given.table();
    Array<uint8_t> bytes(given.num_bytes);
    const LeewayBucket bucket = given.bucket_at(table, bytes);
    scales(device, bucket);
    REQUIRE(flatten(device, bucket) == sum, "%s", name(device));
    for (int64_t i = 0; i < given.num_bytes; ++i) {
      REQUIRE(bytes[i] == expected[i], "%s, byte %ld", name(device), long(i));
    }
  }
}

void check_delta(Case& given, const Bytes& before, const Bytes& after, int64_t capacity) {
  const Changes expected = slow_changes(before, after);
  for (const Device device : devices()) {
    const Array<LeewayPlaced> table = given.table();
    Array<uint8_t> bytes = copied(before);
    const LeewayBucket bucket = given.bucket_at(table, bytes);
    Changes changes;
    scales(device, bucket);
    REQUIRE(delta(device, bucket, capacity, changes) == slow_sum(after, given.position), "%s", name(device));
    REQUIRE(equal(bytes, after), "%s", name(device));
    REQUIRE(changes.starts == expected.starts, "%s", name(device));
    for (int64_t i = 0; i < std::min(expected.size(), capacity); ++i) {
      REQUIRE(changes.offsets[i] == expected.offsets[i], "%s, change %ld", name(device), long(i));
      REQUIRE(changes.values[i] == expected.values[i], "%s, change %ld", name(device), long(i));
    }
  }
}

void check_apply(Random& random, const Bytes& before, const Bytes& after, int64_t position) {
  const Changes changes = slow_changes(before, after);
  Changes wrong = changes;
  const bool spoiled = spoil(random, wrong, int64_t(after.size()));
  for (const Device device : devices()) {
    Array<uint8_t> bytes = copied(before);
    REQUIRE(!spoiled || apply(device, bytes, wrong, position) == -1, "%s", name(device));
    REQUIRE(equal(bytes, before), "%s: a delta that does not fit was applied", name(device));
    const uint64_t grown = apply(device, bytes, changes, position);
    REQUIRE(grown == slow_sum(after, position) - slow_sum(before, position), "%s", name(device));
    REQUIRE(equal(bytes, after), "%s", name(device));
  }
}

}  // namespace

CHECK(buckets_of_random_tensors) {
  Random random(1);
  for (int i = 0; i < 18; ++i) {
    Case given(random);
    check_flatten(given);
    const Bytes before = given.bucket();
    if (before.empty()) continue;
    const double shares[] = {0, 0.01, 1};
    const double share = shares[i % 3];
    for (Tensor& tensor : given.tensors) randomise(random, tensor, share);
    const Bytes after = given.bucket();
    const int64_t total = slow_changes(before, after).size();
    check_delta(given, before, after, total);
    check_delta(given, before, after, total / 2);
    check_apply(random, before, after, given.position);
  }
}

// Changes that are far apart, so that on CUDA more than a warp of stretches is looked back upon.
CHECK(deltas_of_many_stretches) {
  Random random(2);
  const int64_t count = 40 * LEEWAY_STRETCH_BYTES / 2 + 3;
  Case given(random);
  given.tensors.clear();
  given.tensors.push_back({1, count, 16, LEEWAY_F32, LEEWAY_TO_BF16, 0, Array<uint8_t>(4 * count),
                           Array<float>(count / LEEWAY_TILE + 1, 1)});
  given.num_bytes = round_up(given.tensors[0].end(), 16);
  randomise(random, given.tensors[0], 1);
  const Bytes before = given.bucket();
  for (const int64_t changed : {int64_t(3), count - 20000, count - 1}) {
    leeway::from_float(7, *reinterpret_cast<float*>(given.tensors[0].at(changed)));
  }
  const Bytes after = given.bucket();
  REQUIRE(slow_changes(before, after).size() == 3, "%ld", long(slow_changes(before, after).size()));
  check_delta(given, before, after, 3);
  check_apply(random, before, after, given.position);
}

CHECK(checksums_of_any_length_at_any_address) {
  Random random(3);
  for (int64_t size = 0; size < 300; size += size < 34 ? 1 : 37) {
    Bytes bytes(size);
    for (uint8_t& byte : bytes) byte = uint8_t(random.bits());
    const int64_t position = random.below(1 << 20) * 8;
    for (int shift = 0; shift < 17; shift += 1 + shift % 8) {
      Array<uint8_t> memory(size + shift);
      for (int64_t i = 0; i < size; ++i) memory[i + shift] = bytes[i];
      for (const Device device : devices()) {
        const uint64_t sum = checksum(device, memory.data() + shift, size, position);
        REQUIRE(sum == slow_sum(bytes, position), "%s: %ld bytes, shifted by %d", name(device), long(size), shift);
      }
    }
  }
}

}  // namespace driver
