// Streams between the loose and the packed axis: one copy a run, past the caches where there is much to write.
#include <algorithm>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "runs.h"

namespace leeway {
namespace {

constexpr int64_t kCached = 4 << 20;  // bytes written by a whole call that may stay in caches
constexpr int64_t kShort = 256;       // bytes of a run that are not worth aligning for

// A store past the caches need not first read the line that it writes: two thirds of the traffic.
void copy(char* to, const char* from, int64_t bytes, bool past_caches) {
#ifdef __SSE2__
  if (past_caches && bytes >= kShort) {
    const int64_t head = -reinterpret_cast<intptr_t>(to) & 15;
    std::memcpy(to, from, head);
    int64_t i = head;
    for (; i + 64 <= bytes; i += 64) {
      for (int64_t k = i; k < i + 64; k += 16) {
        const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), value);
      }
    }
    to += i, from += i, bytes -= i;
  }
#endif
  std::memcpy(to, from, bytes);
}

template <typename T>
void fill_as(char* to, int64_t num, uint64_t fill) {
  T value;
  std::memcpy(&value, &fill, sizeof(T));
  std::fill_n(reinterpret_cast<T*>(to), num, value);
}

void fill(char* to, int64_t num, const LeewayStream& stream) {
  switch (stream.width) {
    case 1: return fill_as<uint8_t>(to, num, stream.fill);
    case 2: return fill_as<uint16_t>(to, num, stream.fill);
    case 4: return fill_as<uint32_t>(to, num, stream.fill);
    default: return fill_as<uint64_t>(to, num, stream.fill);
  }
}

// Destinations [begin, end) of one stream.
template <typename Runs>
void move_stream(const Runs& runs, const LeewayStream& stream, int64_t begin, int64_t end, bool past_caches) {
  const int64_t num = runs.move.packed.num_sequences, width = stream.width;
  const auto* from = static_cast<const char*>(stream.from);
  auto* to = static_cast<char*>(stream.to);
  int64_t at = begin;
  for (int64_t i = num > 0 ? last_before(runs, begin, 0, num - 1) : num; i < num && at < end; ++i) {
    const Run run = runs.run(i);
    if (run.to + run.length <= at) continue;
    if (run.to > at) {
      const int64_t gap = std::min(run.to, end) - at;
      fill(to + at * width, gap, stream);
      at += gap;
    }
    const int64_t length = std::min(run.to + run.length, end) - at;
    if (length <= 0) continue;
    copy(to + at * width, from + (run.from + at - run.to) * width, length * width, past_caches);
    at += length;
  }
  if (at < end) fill(to + at * width, end - at, stream);
}

template <typename Runs>
void move_streams(const LeewayMove& move, int64_t begin, int64_t end) {
  const Runs runs{move};
  int64_t bytes = 0;
  for (int32_t k = 0; k < move.num_streams; ++k) bytes += runs.size() * move.streams[k].width;
  const bool past_caches = bytes > kCached;
  for (int32_t k = 0; k < move.num_streams; ++k) move_stream(runs, move.streams[k], begin, end, past_caches);
#ifdef __SSE2__
  if (past_caches) _mm_sfence();
#endif
}

}  // namespace
}  // namespace leeway

void leeway_pack_cpu(const LeewayMove* move, int64_t begin, int64_t end) {
  leeway::move_streams<leeway::Packing>(*move, begin, end);
}

void leeway_unpack_cpu(const LeewayMove* move, int64_t begin, int64_t end) {
  leeway::move_streams<leeway::Unpacking>(*move, begin, end);
}
