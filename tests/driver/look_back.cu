// The counting of changes over blocks, on states that blocks could leave; in a file of its own, since it has a kernel.
#include "../../csrc/sync/cuda/look_back.cuh"
#include "driver.h"

namespace driver {
namespace {

__global__ void look(leeway::Word* states, int64_t stretch, int64_t* before) {
  const int64_t found = leeway::look_back(states, stretch);
  before[threadIdx.x] = found;
}

}  // namespace

CHECK(a_stretch_looks_back_to_the_first_that_knows) {
  for (const int64_t stretch : {0, 1, 31, 32, 33, 64, 200}) {
    for (int64_t known = -1; known < stretch; ++known) {  // the last one that knows how many there are up to its end
      Array<unsigned long long> states(stretch + 1);
      int64_t expected = known < 0 ? 0 : 1000;
      for (int64_t i = 0; i < stretch; ++i) {
        const int64_t number = i < known ? 5 : i == known ? 1000 : i;
        states[i] = number << 2 | (i <= known ? leeway::kUpToEnd : leeway::kOwn);
        if (i > known) expected += i;
      }
      Array<int64_t> before(32);
      finish(leeway::launch<look>({.grid = 1, .block = 32}, nullptr, states.data(), stretch, before.data()));
      for (const int64_t found : before) {
        REQUIRE(found == expected, "%ld before %ld, known %ld", long(found), long(stretch), long(known));
      }
    }
  }
}

}  // namespace driver
