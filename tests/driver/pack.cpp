// Packed sequences: every device against loops that do what the interface says, and nothing outside the arrays.
#include <math.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../../csrc/api/pack.h"
#include "driver.h"

using namespace driver;

namespace {

Array<int32_t> bounds_of(const std::vector<int>& lengths) {
  Array<int32_t> bounds(lengths.size() + 1);
  bounds[0] = 0;
  for (size_t i = 0; i < lengths.size(); ++i) bounds[i + 1] = bounds[i] + lengths[i];
  return bounds;
}

// Sequences long and short, many of them empty.
std::vector<int> random_lengths(Random& random, int num, int longest) {
  std::vector<int> lengths(num);
  for (int& length : lengths) length = random.below(4) == 0 ? 0 : int(random.below(random.below(3) == 0 ? longest : 9));
  return lengths;
}

LeewayPacked packed(const Array<int32_t>& bounds) {
  return {bounds[bounds.size() - 1], int64_t(bounds.size()) - 1, bounds.data()};
}

// Runs `cpu` in pieces, or `cuda`.
template <typename Args>
void run(Device device, const Args& args, int64_t size, void (*cpu)(const Args*, int64_t, int64_t),
         int (*cuda)(const std::type_identity_t<Args>*, void*)) {
  if (device == Device::cpu) {
    for (int64_t begin = 0, step = 1; begin < size; begin += step, step = step * 3 + 1) {
      cpu(&args, begin, std::min(size, begin + step));
    }
  } else {
    finish(cuda(&args, nullptr));
  }
}

#ifdef LEEWAY_CUDA
#define BOTH(function) function##_cpu, function##_cuda
#else
#define BOTH(function) function##_cpu, nullptr
#endif

// Sequences in random places of a loose axis, in random order.
struct Loose {
  Array<int64_t> starts, order;
  int64_t size;

  Loose(Random& random, const std::vector<int>& lengths)
      : starts(lengths.size()), order(lengths.size()), size(random.below(5)) {
    std::vector<int64_t> places(lengths.size());
    for (size_t i = 0; i < places.size(); ++i) places[i] = int64_t(i);
    for (size_t i = places.size(); i > 1; --i) std::swap(places[i - 1], places[size_t(random.below(int64_t(i)))]);
    for (int64_t i : places) {
      starts[size_t(i)] = size;
      size += lengths[size_t(i)] + (random.below(2) ? random.below(40) : 0);
    }
    std::stable_partition(places.begin(), places.end(), [&](int64_t i) { return lengths[size_t(i)] > 0; });
    std::copy(places.begin(), places.end(), order.begin());
    for (size_t i = 0; i < lengths.size(); ++i) {
      if (lengths[i] == 0) starts[i] = random.below(size + 1);
    }
  }
};

constexpr int kWidths[] = {1, 2, 4, 8, 8, 4, 1};
constexpr int kStreams = sizeof(kWidths) / sizeof(int);

struct Streams {
  std::vector<Array<uint8_t>> arrays;

  explicit Streams(int64_t size) {
    for (int width : kWidths) arrays.emplace_back(size_t(size * width));
  }
  Streams(int64_t size, Random& random) : Streams(size) {
    for (auto& array : arrays) {
      for (uint8_t& byte : array) byte = uint8_t(random.bits());
    }
  }
};

LeewayMove move_of(const Array<int32_t>& bounds, const Loose& loose, const Streams& from, Streams& to) {
  LeewayMove move{packed(bounds), loose.starts.data(), loose.size, loose.order.data(), kStreams, {}};
  for (int k = 0; k < kStreams; ++k) {
    move.streams[k] = {from.arrays[k].data(), to.arrays[k].data(), kWidths[k], 0x0102030405060708};
  }
  return move;
}

}  // namespace

CHECK(streams_are_packed_and_unpacked) {
  Random random(1);
  for (int round = 0; round < 12; ++round) {
    const auto lengths = random_lengths(random, round < 2 ? round : int(random.below(120)), round % 3 == 0 ? 3000 : 60);
    const auto bounds = bounds_of(lengths);
    const Loose loose(random, lengths);
    const int64_t num_tokens = packed(bounds).num_tokens;
    const Streams source(loose.size, random);
    for (Device device : devices()) {
      Streams flat(num_tokens), back(loose.size);
      run(device, move_of(bounds, loose, source, flat), num_tokens, BOTH(leeway_pack));
      run(device, move_of(bounds, loose, flat, back), loose.size, BOTH(leeway_unpack));
      for (int k = 0; k < kStreams; ++k) {
        const size_t width = size_t(kWidths[k]);
        Array<uint8_t> expected(size_t(loose.size) * width);
        for (size_t byte = 0; byte < expected.size(); ++byte) expected[byte] = uint8_t(8 - byte % width);
        for (size_t i = 0; i < lengths.size(); ++i) {
          const uint8_t* from = source.arrays[k].data() + size_t(loose.starts[i]) * width;
          const size_t bytes = size_t(lengths[i]) * width;
          REQUIRE(memcmp(flat.arrays[k].data() + size_t(bounds[i]) * width, from, bytes) == 0,
                  "round %d, device %d, stream %d, sequence %zu", round, int(device), k, i);
          memcpy(expected.data() + size_t(loose.starts[i]) * width, from, bytes);
        }
        REQUIRE(back.arrays[k].same_bits(expected), "round %d, device %d, stream %d", round, int(device), k);
      }
    }
  }
}

CHECK(packing_many_bytes_goes_past_the_caches) {
  const int64_t size = 700001;
  Array<uint64_t> from(size), to(size);
  for (int64_t i = 0; i < size; ++i) from[i] = uint64_t(i);
  Array<int32_t> bounds(4);
  Array<int64_t> starts(3);
  const int32_t ends[] = {0, 300000, 300007, 700001};
  const int64_t places[] = {400001, 400000 - 7, 0};
  std::copy(ends, ends + 4, bounds.begin());
  std::copy(places, places + 3, starts.begin());
  LeewayMove move{packed(bounds), starts.data(), size, nullptr, 1, {{from.data(), to.data(), 8, 0}}};
  for (int64_t begin = 0; begin < size; begin += 100003) leeway_pack_cpu(&move, begin, std::min(size, begin + 100003));
  Array<int64_t> order(3);
  const int64_t places_in_order[] = {2, 1, 0};
  std::copy(places_in_order, places_in_order + 3, order.begin());
  const int64_t room = size + 50001;
  Array<uint64_t> back(room);
  for (int64_t& start : starts) start += start > 400000 ? 50000 : 1;
  const LeewayMove again{packed(bounds), starts.data(), room, order.data(), 1, {{to.data(), back.data(), 8, 7}}};
  for (int64_t begin = 0; begin < room; begin += 100003) leeway_unpack_cpu(&again, begin, std::min(room, begin + 100003));
  for (int64_t t = 0; t < room; ++t) {
    const bool gap = t < 1 || (t > 400000 && t < 450001) || t > 750000;
    const uint64_t expected = gap ? 7 : uint64_t(t <= 400000 ? t - 1 : t - 50000);
    REQUIRE(back[t] == expected, "position %lld", (long long)t);
  }
  for (int i = 0; i < 3; ++i) {
    for (int64_t t = ends[i]; t < ends[i + 1]; ++t) {
      REQUIRE(to[t] == uint64_t(places[i] + t - ends[i]), "token %lld", (long long)t);
    }
  }
}

CHECK(tokens_are_laid_out) {
  Random random(2);
  for (int longest : {3, 40, 3000}) {
    const auto lengths = random_lengths(random, 60, longest);
    const auto bounds = bounds_of(lengths);
    const size_t num_tokens = size_t(packed(bounds).num_tokens);
    Array<int64_t> tokens(num_tokens), prompts(lengths.size());
    for (int64_t& token : tokens) token = random.below(1000);
    for (size_t i = 0; i < lengths.size(); ++i) prompts[i] = random.below(lengths[i] + 2);
    for (Device device : devices()) {
      Array<int64_t> positions(num_tokens), labels(num_tokens), sequence(num_tokens);
      Array<float> mask(num_tokens);
      const LeewayTokenLayout args{packed(bounds), tokens.data(), prompts.data(),
                                   positions.data(), labels.data(), mask.data(), sequence.data()};
      run(device, args, int64_t(lengths.size()), BOTH(leeway_token_layout));
      for (size_t i = 0; i < lengths.size(); ++i) {
        for (int k = 0; k < lengths[i]; ++k) {
          const size_t t = size_t(bounds[i] + k);
          const bool predicts = k + 1 < lengths[i] && k + 1 >= prompts[i];
          REQUIRE(positions[t] == k && sequence[t] == int64_t(i) && mask[t] == (predicts ? 1.0f : 0.0f) &&
                      labels[t] == (predicts ? tokens[t + 1] : -100),
                  "token %zu, device %d", t, int(device));
        }
      }
    }
  }
}

namespace {

template <typename T>
constexpr LeewayType kType = sizeof(T) == 8 ? LEEWAY_F64 : LEEWAY_F32;
template <typename T>
constexpr double kRounding = sizeof(T) == 8 ? 1e-12 : 1e-6;

// Lengths at which a warp, a block's round or a tile ends.
const std::vector<int> kLengths = {0, 1, 2, 31, 32, 33, 0, 255, 256, 257, 511, 512, 513, 2047, 2048, 2049, 4096, 5, 9001};

template <typename T>
Array<T> numbers(Random& random, size_t size, double low, double high) {
  Array<T> result(size);
  for (T& x : result) x = T(random.uniform(low, high));
  return result;
}

template <typename T>
Array<T> coins(Random& random, size_t size, int one_in) {
  Array<T> result(size);
  for (T& x : result) x = random.below(one_in) == 0 ? T(0) : T(1);
  return result;
}

bool close(double a, double b, double rounding) { return a == b || fabs(a - b) <= rounding * (1 + fabs(b)); }

template <typename T>
void check_reductions(bool masked) {
  Random random(3);
  const auto bounds = bounds_of(kLengths);
  const size_t num = kLengths.size(), num_tokens = size_t(packed(bounds).num_tokens);
  const auto values = numbers<T>(random, num_tokens, -3, 5), mask = coins<T>(random, num_tokens, 3);
  const void* counts = masked ? mask.data() : nullptr;
  for (int reduction : {LEEWAY_SUM, LEEWAY_MEAN, LEEWAY_MAX}) {
    for (Device device : devices()) {
      Array<T> result(num), count(num), again(num), spread(num_tokens);
      const LeewayReduce args{packed(bounds), LeewayReduction(reduction), kType<T>, values.data(), counts, result.data(), count.data()};
      LeewayReduce twice = args;
      twice.result = again.data();
      run(device, args, int64_t(num), BOTH(leeway_reduce));
      run(device, twice, int64_t(num), BOTH(leeway_reduce));
      REQUIRE(result.same_bits(again), "reduction %d, device %d", reduction, int(device));
      const LeewaySpread back{packed(bounds), kType<T>, result.data(), counts, spread.data()};
      run(device, back, int64_t(num), BOTH(leeway_spread));
      for (size_t i = 0; i < num; ++i) {
        double sum = 0, greatest = -INFINITY, counted = 0;
        for (int t = bounds[i]; t < bounds[i + 1]; ++t) {
          REQUIRE(spread[t] == (masked ? result[i] * mask[t] : result[i]), "token %d, device %d", t, int(device));
          if (masked && mask[t] == 0) continue;
          sum += values[t], counted += 1, greatest = fmax(greatest, double(values[t]));
        }
        const double expected = reduction == LEEWAY_SUM ? sum : reduction == LEEWAY_MEAN ? sum / fmax(counted, 1) : greatest;
        REQUIRE(count[i] == counted && close(result[i], expected, kRounding<T>),
                "reduction %d of sequence %zu, device %d: %g, not %g", reduction, i, int(device), double(result[i]), expected);
      }
    }
  }
}

// With the arrays `offset` elements beyond their alignment.
template <typename T>
void check_gae(const std::vector<int>& lengths, bool masked, bool bootstrapped, size_t offset) {
  Random random(4);
  const auto bounds = bounds_of(lengths);
  const size_t num = lengths.size(), num_tokens = size_t(packed(bounds).num_tokens);
  const auto rewards = numbers<T>(random, num_tokens + offset, -1, 1), values = numbers<T>(random, num_tokens + offset, -1, 1);
  auto mask = coins<T>(random, num_tokens + offset, 3);
  for (size_t t = num_tokens / 2; t < num_tokens * 3 / 4; ++t) mask[t] = 0;  // more than a tile in a row
  const auto bootstrap = numbers<T>(random, num, -1, 1), critic = numbers<T>(random, num, 0.9, 1), policy = numbers<T>(random, num, 0, 1);
  for (Device device : devices()) {
    Array<T> advantages(num_tokens + offset), returns(num_tokens + offset), again(num_tokens + offset);
    const LeewayGae args{packed(bounds), kType<T>, 0.99, rewards.data() + offset, values.data() + offset,
                         masked ? mask.data() + offset : nullptr, bootstrapped ? bootstrap.data() : nullptr,
                         critic.data(), policy.data(), advantages.data() + offset, returns.data() + offset};
    LeewayGae twice = args;
    twice.returns = again.data() + offset;
    run(device, args, int64_t(num), BOTH(leeway_gae));
    run(device, twice, int64_t(num), BOTH(leeway_gae));
    REQUIRE(returns.same_bits(again), "device %d", int(device));
    for (size_t i = 0; i < num; ++i) {
      double following = bootstrapped ? double(bootstrap[i]) : 0, a = 0, b = 0;
      for (int k = bounds[i + 1] - 1; k >= bounds[i]; --k) {
        const size_t t = size_t(k) + offset;
        if (!masked || mask[t] != 0) {
          const double delta = rewards[t] + 0.99 * following - values[t];
          a = delta + 0.99 * policy[i] * a;
          b = delta + 0.99 * critic[i] * b;
          following = values[t];
        }
        REQUIRE(close(advantages[t], a, kRounding<T>) && close(returns[t], b + values[t], kRounding<T>),
                "token %d of sequence %zu, device %d: %g and %g, not %g and %g", k - bounds[i], i, int(device),
                double(advantages[t]), double(returns[t]), a, b + values[t]);
      }
    }
  }
}

}  // namespace

CHECK(sequences_are_reduced) {
  for (bool masked : {false, true}) {
    check_reductions<float>(masked);
    check_reductions<double>(masked);
  }
}

CHECK(advantages_are_scanned) {
  const std::vector<int> lengths = {0, 1, 2, 31, 33, 511, 512, 513, 0, 1700, 5};  // tiles of 512 tokens
  check_gae<float>(lengths, true, true, 0);
  check_gae<float>(lengths, false, false, 1);
  check_gae<double>(lengths, true, false, 0);
  check_gae<double>(lengths, false, true, 1);
  check_gae<float>({4200}, true, true, 0);  // tiles of 4096
  check_gae<double>({2100}, true, true, 0);
}

// Enough sequences that warps take one each, and blocks short and long ones in turn.
CHECK(many_sequences_are_reduced) {
  std::vector<int> lengths(1200, 1);
  lengths[0] = lengths[1100] = lengths[1199] = 2500;
  const auto bounds = bounds_of(lengths);
  Array<double> values(size_t(packed(bounds).num_tokens), 0.5);
  for (Device device : devices()) {
    Array<double> result(lengths.size()), count(lengths.size());
    const LeewayReduce args{packed(bounds), LEEWAY_SUM, LEEWAY_F64, values.data(), nullptr, result.data(), count.data()};
    run(device, args, int64_t(lengths.size()), BOTH(leeway_reduce));
    for (size_t i = 0; i < lengths.size(); ++i) REQUIRE(result[i] == 0.5 * lengths[i], "sequence %zu", i);
  }
}

#ifdef LEEWAY_CUDA
// What no one has checked on a device: any bounds, starts and order.
CHECK(wrong_bounds_touch_nothing_outside) {
  Random random(5);
  const int64_t num = 40, num_tokens = 1500, size = 2500;
  Array<double> values(num_tokens), result(num), count(num), advantages(num_tokens), returns(num_tokens), lambdas(num, 0.5);
  Array<int64_t> tokens(num_tokens), positions(num_tokens), labels(num_tokens), sequence(num_tokens), lengths(num);
  Array<float> mask(num_tokens);
  for (int round = 0; round < 3; ++round) {
    Array<int32_t> bounds(num + 1);
    Loose loose(random, std::vector<int>(num, 1));
    loose.size = size;
    const auto wild = [&](int64_t likely) {
      return round % 3 == 0 ? int64_t(random.bits()) : random.below(3 * likely) - likely;
    };
    for (int32_t& x : bounds) x = int32_t(wild(num_tokens));
    for (int64_t& x : loose.starts) x = wild(size);
    for (int64_t& x : loose.order) x = wild(num);
    for (int64_t& x : lengths) x = wild(100);
    const LeewayPacked packed{num_tokens, num, bounds.data()};
    Streams flat(num_tokens), apart(size);
    LeewayMove move = move_of(bounds, loose, apart, flat);
    move.packed = packed;
    finish(leeway_pack_cuda(&move, nullptr));
    move = move_of(bounds, loose, flat, apart);
    move.packed = packed;
    finish(leeway_unpack_cuda(&move, nullptr));
    const LeewayTokenLayout layout{packed, tokens.data(), lengths.data(), positions.data(), labels.data(), mask.data(), sequence.data()};
    finish(leeway_token_layout_cuda(&layout, nullptr));
    const LeewayReduce reduce{packed, LEEWAY_SUM, LEEWAY_F64, values.data(), nullptr, result.data(), count.data()};
    finish(leeway_reduce_cuda(&reduce, nullptr));
    const LeewaySpread spread{packed, LEEWAY_F64, result.data(), nullptr, values.data()};
    finish(leeway_spread_cuda(&spread, nullptr));
    const LeewayGae gae{packed, LEEWAY_F64, 0.9, values.data(), values.data(), nullptr, nullptr, lambdas.data(), lambdas.data(), advantages.data(), returns.data()};
    finish(leeway_gae_cuda(&gae, nullptr));
  }
}
#endif
