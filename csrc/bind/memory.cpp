#include "memory.h"

#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace leeway::bind {

at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor made = at::empty(sizes, options);
#ifdef __linux__
  constexpr size_t kLarge = 4 << 20;
  if (made.is_cpu() && made.nbytes() >= kLarge) {
    const uintptr_t page = sysconf(_SC_PAGESIZE), begin = reinterpret_cast<uintptr_t>(made.data_ptr());
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + made.nbytes()) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: what comes of it does not matter
  }
#endif
  return made;
}

}  // namespace leeway::bind
