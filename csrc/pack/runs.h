// The runs of consecutive tokens that move between the loose and the packed axis, one for each sequence.
#pragma once

#include "../api/pack.h"
#include "../common/device.h"

namespace leeway {

struct Run {
  int64_t to, from, length;  // `length` positions, not more than lie in both arrays
};

// Where an array of which `have` positions exist is read from, or written to, by a run that may not fit it.
LEEWAY_HD int64_t fitting(int64_t begin, int64_t length, int64_t have) {
  if (begin < 0 || begin >= have || length <= 0) return 0;
  return length < have - begin ? length : have - begin;
}

// Destinations [0, size()) of a pack: runs in the order of sequences, none between them.
struct Packing {
  const LeewayMove& move;

  LEEWAY_HD int64_t size() const { return move.packed.num_tokens; }
  LEEWAY_HD int64_t to(int64_t i) const { return move.packed.cu_seqlens[i]; }
  LEEWAY_HD Run run(int64_t i) const {
    const int64_t begin = to(i), length = fitting(begin, to(i + 1) - begin, size());
    return {begin, move.starts[i], fitting(move.starts[i], length, move.size)};
  }
};

// Destinations of an unpack: runs in the order in which they start.
struct Unpacking {
  const LeewayMove& move;

  LEEWAY_HD int64_t size() const { return move.size; }
  LEEWAY_HD int64_t sequence(int64_t i) const {
    const int64_t s = move.order[i];
    return s < 0 ? 0 : s < move.packed.num_sequences ? s : move.packed.num_sequences - 1;
  }
  LEEWAY_HD int64_t to(int64_t i) const {
    const int32_t* bounds = move.packed.cu_seqlens + sequence(i);
    return bounds[0] < bounds[1] ? move.starts[sequence(i)] : size();
  }
  LEEWAY_HD Run run(int64_t i) const {
    const int32_t* bounds = move.packed.cu_seqlens + sequence(i);
    const int64_t length = fitting(bounds[0], int64_t(bounds[1]) - bounds[0], move.packed.num_tokens);
    return {to(i), bounds[0], fitting(to(i), length, size())};
  }
};

// The last of runs [first, last] that starts at `position` or before it; `first` where none does.
template <typename Runs>
LEEWAY_HD int64_t last_before(const Runs& runs, int64_t position, int64_t first, int64_t last) {
  while (first < last) {
    const int64_t middle = (first + last + 1) / 2;
    if (runs.to(middle) <= position) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

}  // namespace leeway
