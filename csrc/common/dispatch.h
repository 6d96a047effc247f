// The instruction set that this processor gets, of those that the kernels are compiled for.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace leeway {

enum class Isa { portable, avx2, avx512 };

inline bool has(Isa isa) {
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return isa == Isa::portable || (avx2 && (isa == Isa::avx2 || avx512));
#else
  return isa == Isa::portable;
#endif
}

// The widest one, or the one that the environment variable LEEWAY_ISA names. Throws std::invalid_argument where that is
// unknown or this processor lacks it.
inline Isa isa() {
  static const Isa chosen = [] {
    const char* forced = std::getenv("LEEWAY_ISA");
    if (!forced) return has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::portable;
    const std::string name = forced;
    if (name == "portable") return Isa::portable;
    if (name == "avx2" && has(Isa::avx2)) return Isa::avx2;
    if (name == "avx512" && has(Isa::avx512)) return Isa::avx512;
    throw std::invalid_argument("LEEWAY_ISA = " + name + ": must be portable, avx2 or avx512, as the processor allows");
  }();
  return chosen;
}

}  // namespace leeway
