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
constexpr int64_t kLine = 64;
constexpr int64_t kAhead = 512;  // bytes: runs are too short for the processor to foresee

// A store past the caches need not first read the line that it writes: a third of a copy's traffic. But it must write
// all of it, so the lines at which runs meet are written in the usual way: `head` bytes come before the first whole one.
int64_t head(const char* to, int64_t bytes) {
  return std::min<int64_t>(-reinterpret_cast<intptr_t>(to) & (kLine - 1), bytes);
}

#ifdef __SSE2__
// Writes whole lines from `to` on, 16 bytes `load(offset)` at a time, and returns how many bytes they are.
template <typename Load>
int64_t write_lines(char* to, int64_t bytes, Load load) {
  const int64_t whole = bytes / kLine * kLine;
  for (int64_t line = 0; line < whole; line += kLine) {
    for (int64_t i = line; i < line + kLine; i += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), load(i));
  }
  return whole;
}
#endif

void copy(char* to, const char* from, int64_t bytes, bool past_caches) {
#ifdef __SSE2__
  if (past_caches && bytes >= kShort) {
    const int64_t begin = head(to, bytes);
    std::memcpy(to, from, begin);
    const int64_t end = begin + write_lines(to + begin, bytes - begin, [&](int64_t i) {
      __builtin_prefetch(from + begin + i + kAhead);
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + begin + i));
    });
    to += end, from += end, bytes -= end;
  }
#endif
  std::memcpy(to, from, bytes);
}

template <typename T>
void fill_as(char* to, int64_t num, uint64_t fill, bool past_caches) {
  T value[16 / sizeof(T)];
  for (T& each : value) std::memcpy(&each, &fill, sizeof(T));
  auto* out = reinterpret_cast<T*>(to);
#ifdef __SSE2__
  const int64_t bytes = num * sizeof(T);
  if (past_caches && bytes >= kShort) {
    const int64_t begin = head(to, bytes);
    const __m128i pattern = _mm_loadu_si128(reinterpret_cast<const __m128i*>(value));
    out = std::fill_n(out, begin / sizeof(T), *value);
    num -= begin / sizeof(T);
    const int64_t whole = write_lines(to + begin, bytes - begin, [&](int64_t) { return pattern; });
    out += whole / sizeof(T);
    num -= whole / sizeof(T);
  }
#endif
  std::fill_n(out, num, *value);
}

void fill(char* to, int64_t num, const LeewayStream& stream, bool past_caches) {
  switch (stream.width) {
    case 1: return fill_as<uint8_t>(to, num, stream.fill, past_caches);
    case 2: return fill_as<uint16_t>(to, num, stream.fill, past_caches);
    case 4: return fill_as<uint32_t>(to, num, stream.fill, past_caches);
    default: return fill_as<uint64_t>(to, num, stream.fill, past_caches);
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
      fill(to + at * width, gap, stream, past_caches);
      at += gap;
    }
    const int64_t length = std::min(run.to + run.length, end) - at;
    if (length <= 0) continue;
    copy(to + at * width, from + (run.from + at - run.to) * width, length * width, past_caches);
    at += length;
  }
  if (at < end) fill(to + at * width, end - at, stream, past_caches);
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
