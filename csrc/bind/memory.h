// Memory that an operator writes for the first time.
#pragma once

#include <ATen/core/Tensor.h>

namespace leeway::bind {

// Uninitialised; a large one on the CPU in huge pages where the system grants them. To get fresh memory 4 KB at a time
// costs several times what it costs to write it once.
at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace leeway::bind
