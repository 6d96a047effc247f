#include <sys/mman.h>

#include <map>
#include <string>

#include "../../csrc/common/dispatch.h"
#include "driver.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace driver {
namespace {

std::map<std::string, void (*)()>& checks() {
  static std::map<std::string, void (*)()> checks;
  return checks;
}

void print_isas() {
  using leeway::Isa;
  if (leeway::has(Isa::portable)) puts("portable");
  if (leeway::has(Isa::avx2)) puts("avx2");
  if (leeway::has(Isa::avx512)) puts("avx512");
}

}  // namespace

bool add(const char* name, void (*check)()) { return checks().emplace(name, check).second; }

const std::vector<Device> kCpu = {Device::cpu};
#ifdef LEEWAY_CUDA
const std::vector<Device> kAll = {Device::cpu, Device::cuda};
#else
const std::vector<Device> kAll = kCpu;
#endif
bool only_cpu = false;

const std::vector<Device>& devices() { return only_cpu ? kCpu : kAll; }

const std::vector<Device>& devices([[maybe_unused]] int number) {
#ifdef LEEWAY_EMULATED
  if (number % 7 != 0) return kCpu;
#endif
  return devices();
}

#ifdef __CUDACC__
void finish(int status) {
  REQUIRE(status == cudaSuccess, "%s", cudaGetErrorString(cudaError_t(status)));
  const cudaError_t later = cudaDeviceSynchronize();
  REQUIRE(later == cudaSuccess, "%s", cudaGetErrorString(later));
}

void* allocate(size_t bytes) {
  void* memory = nullptr;
  REQUIRE(cudaMallocManaged(&memory, bytes ? bytes : 1) == cudaSuccess, "%zu bytes", bytes);
  memset(memory, 0xff, bytes);
  return memory;
}

void release(void* memory) { cudaFree(memory); }

void* reserve(size_t bytes) {
  void* memory = nullptr;
  REQUIRE(cudaMallocManaged(&memory, bytes) == cudaSuccess, "%zu bytes", bytes);
  return memory;
}

void unreserve(void* memory, size_t) { cudaFree(memory); }
#else
void finish(int status) { REQUIRE(status == 0, "%d", status); }

void* allocate(size_t bytes) {
  void* memory = malloc(bytes);
  if (bytes > 0) memset(memory, 0xff, bytes);
  return memory;
}

void release(void* memory) { free(memory); }

void* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  REQUIRE(memory != MAP_FAILED, "%zu bytes", bytes);
  return memory;
}

void unreserve(void* memory, size_t bytes) { munmap(memory, bytes); }
#endif

}  // namespace driver

int main(int count, char** arguments) {
  if (count == 2 && strcmp(arguments[1], "--isa") == 0) {
    driver::print_isas();
    return 0;
  }
  driver::only_cpu = count > 1 && strcmp(arguments[1], "--cpu") == 0;
  const int first = driver::only_cpu ? 2 : 1;
  std::map<std::string, void (*)()> wanted;
  for (int i = first; i < count; ++i) wanted[arguments[i]] = driver::checks().at(arguments[i]);
  for (const auto& [name, check] : first >= count ? driver::checks() : wanted) {
    puts(name.c_str());
    fflush(stdout);
    check();
  }
}
