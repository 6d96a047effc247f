// Where an operator runs: the threads of the host, or a stream of a device whose kernels stand in another library.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <utility>

#include "../api/types.h"

namespace leeway {

// Calls the CUDA library's function `name` with `arguments` on the device's current stream. It is looked up because
// this library must load where CUDA is not; engine.ops.library puts its symbols in sight.
template <typename Function, typename... Arguments>
void launch(const char* name, c10::Device device, Arguments... arguments) {
  void* symbol = dlsym(RTLD_DEFAULT, name);
  TORCH_CHECK(symbol, name, " is not in engine/ops/_cuda.so; `make install` builds it where nvcc is");
  const c10::DeviceGuard guard(device);
  const c10::impl::VirtualGuardImpl driver(device.type());
  void* stream = driver.getStreamNativeHandle(driver.getStream(device));
  const int error = reinterpret_cast<Function*>(symbol)(std::move(arguments)..., stream);
  TORCH_CHECK(error == 0, name, ": CUDA error ", error);
}

// launch of a function declared in ../api, its stream left out.
#define LEEWAY_LAUNCH(function, device, ...) ::leeway::launch<decltype(function)>(#function, device, __VA_ARGS__)

inline LeewayType type_of(c10::ScalarType type) {
  switch (type) {
    case c10::kDouble: return LEEWAY_F64;
    case c10::kFloat: return LEEWAY_F32;
    case c10::kBFloat16: return LEEWAY_BF16;
    case c10::kHalf: return LEEWAY_F16;
    default: TORCH_CHECK_TYPE(false, "no kernel takes ", type);
  }
}

}  // namespace leeway
